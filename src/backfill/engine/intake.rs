//! From a chunk to queued calls: which key each document has, and whether this
//! run or the key map knows it already.

use std::collections::HashMap;

use tokio::time::Instant;

use super::Engine;
use super::answers::Held;
use super::calls::Work;
use super::keys::Joined;
use crate::backfill::guard::Verdict;
use crate::backfill::reader::Chunk;
use crate::error::Result;
use crate::job::ownership::bucket_of;
use crate::key_map::Remembered;
use crate::mongo::sink::{FlagReason, Update, Write, value_bytes};
use crate::mongo::source::Candidate;

/// Documents that may wait for an answer or a write at once: a key that stands
/// in a million documents must not gather them all in memory.
const MOST_WAITING: usize = 5_000;
/// The same where the API takes batches: what is not read can't fill one, and
/// calls are what there is the least of.
const MOST_WAITING_FOR_BATCHES: usize = 40_000;

/// Documents of a chunk with the same key.
#[derive(Debug)]
struct Group {
    key: String,
    candidates: Vec<Candidate>,
    checked_at: Instant,
}

impl Engine {
    /// Another chunk is taken when the last one is nearly used up and what is
    /// on its way to the database does not pile up.
    pub(super) fn wants_chunk(&self) -> bool {
        !self.is_draining()
            && self.parts.asker.pacer.paused_by().is_none()
            && self.work.len() < self.slot_count * self.batch_size()
            && self.outbox.updates.len() + self.keys.waiting() < self.most_waiting()
    }

    fn most_waiting(&self) -> usize {
        if self.batch_size() > 1 { MOST_WAITING_FOR_BATCHES } else { MOST_WAITING }
    }

    pub(super) async fn take_chunk(&mut self, chunk: Chunk) -> Result<()> {
        self.position = Some(chunk.end);
        let mut groups: Vec<Group> = Vec::new();
        let mut group_of: HashMap<String, usize> = HashMap::new();
        for candidate in chunk.candidates {
            if !self.is_ours(&candidate) {
                continue;
            }
            let Some(key) = self.usable_key(&candidate) else { continue };
            match group_of.get(&key) {
                Some(group) => groups[*group].candidates.push(candidate),
                None => {
                    group_of.insert(key.clone(), groups.len());
                    groups.push(Group { key, candidates: vec![candidate], checked_at: chunk.read_at });
                }
            }
        }
        let unknown = self.join_known_keys(groups);
        self.answer_from_key_map(unknown).await?;
        if self.unusable_guard.verdict() == Verdict::Fine && !self.distrusts_flags {
            self.release_unusable();
        }
        Ok(())
    }

    /// Whether this worker is to see to a document: by its key, or where there
    /// is none by its `_id`.
    fn is_ours(&self, candidate: &Candidate) -> bool {
        let bucket = match candidate.legacy.text() {
            Some(key) => bucket_of(key.as_bytes()),
            None => bucket_of(&value_bytes(candidate.id.as_raw_bson_ref())),
        };
        self.parts.ownership.owns(bucket)
    }

    /// The key to ask for; a document without one is settled here.
    fn usable_key(&mut self, candidate: &Candidate) -> Option<String> {
        if let Some(obstacle) = candidate.obstacle {
            self.fail(candidate, obstacle.reason(), obstacle.description());
            return None;
        }
        let key = candidate.legacy.text();
        if let Verdict::Tripped { bad, of } = self.unusable_guard.record(key.is_none()) {
            self.stop_for_unusable(bad, of);
        }
        match key {
            None => {
                let write = Write::Flag(FlagReason::NoLegacyKey);
                let update = Update { candidate: candidate.clone(), write };
                self.held_unusable.push(Held { collection: self.collection.clone(), update });
                None
            }
            Some(key) if !self.parts.asker.client.is_sendable(&key) => {
                self.fail(
                    candidate,
                    "unsendable_key",
                    "a URL can't hold it: it is `.` or `..`, or longer than 64 KB",
                );
                None
            }
            key => key,
        }
    }

    /// Lets documents share the call, answer or failure of a key that this run
    /// already knows; returns the others.
    fn join_known_keys(&mut self, groups: Vec<Group>) -> Vec<Group> {
        let mut unknown = Vec::new();
        for group in groups {
            let Group { key, candidates, checked_at } = group;
            if let Some(failure) = self.failed_keys.get(&key).cloned() {
                candidates
                    .iter()
                    .for_each(|candidate| self.fail(candidate, failure.reason, &failure.description));
                continue;
            }
            match self.keys.join(&key, candidates) {
                Joined::Waiting => {}
                // The key map may refuse the answer yet.
                Joined::Answered(_, candidates) if self.parts.asker.client.api().unique_keys => {
                    self.late.entry(key).or_default().extend(candidates);
                }
                Joined::Answered(answer, candidates) => self.deliver(&answer, candidates),
                Joined::Unknown(candidates) => unknown.push(Group { key, candidates, checked_at }),
            }
        }
        unknown
    }

    async fn answer_from_key_map(&mut self, groups: Vec<Group>) -> Result<()> {
        let Some(key_map) = &self.parts.key_map else {
            groups.into_iter().for_each(|group| self.enqueue(group));
            return Ok(());
        };
        let keys: Vec<&str> = groups.iter().map(|group| group.key.as_str()).collect();
        let mut known = key_map.look_up(&keys).await?;
        for group in groups {
            match known.remove(&group.key) {
                None => self.enqueue(group),
                Some(remembered) => {
                    self.from_key_map += 1;
                    self.deliver_remembered(group.key, &remembered, group.candidates).await?;
                }
            }
        }
        Ok(())
    }

    /// A held answer was never judged, so the guard counts it like a new one.
    async fn deliver_remembered(
        &mut self,
        key: String,
        remembered: &Remembered,
        candidates: Vec<Candidate>,
    ) -> Result<()> {
        if remembered.held {
            if self.counted.insert(key) {
                self.answer_guard.record(remembered.answer.is_negative());
            }
            self.deliver(&remembered.answer, candidates);
            return self.judge_answers().await;
        }
        self.queue(&remembered.answer, candidates);
        Ok(())
    }

    fn enqueue(&mut self, group: Group) {
        let attempts = self.deferred_keys.remove(&group.key).unwrap_or_default();
        self.keys.begin(&group.key, group.candidates, attempts);
        self.work.push_back(Work { key: group.key, checked_at: group.checked_at });
    }
}
