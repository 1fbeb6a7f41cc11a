//! From a chunk to queued calls: which key each document has, and whether this
//! run or the key map knows it already.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::answers::Held;
use super::{Engine, KeyState};
use crate::backfill::guard::Verdict;
use crate::backfill::reader::Chunk;
use crate::error::Result;
use crate::key_map::Remembered;
use crate::mongo::sink::{FlagReason, Update, Write};
use crate::mongo::source::Candidate;

/// A document is checked again before its call when it was read longer ago.
const FRESH: Duration = Duration::from_secs(2);
/// Calls that wait for their permit at once, in time: a longer queue would only
/// grow stale, a shorter one could run empty between two looks at it.
const QUEUE: Duration = Duration::from_secs(1);
/// Documents that may wait for an answer or a write at once: a key that stands
/// in a million documents must not gather them all in memory.
const MOST_WAITING: usize = 5_000;

/// A key whose call is queued.
#[derive(Debug)]
pub(super) struct Work {
    key: String,
    /// When its documents were last seen to be candidates.
    checked_at: Instant,
}

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
        if self.is_draining() || self.work.len() >= self.parts.slots {
            return false;
        }
        let asking = self.keys.values().map(|state| match state {
            KeyState::Asking(waiting) => waiting.len(),
            KeyState::Answered(_) => 0,
        });
        self.outbox.updates.len() + asking.sum::<usize>() < MOST_WAITING
    }

    pub(super) async fn take_chunk(&mut self, chunk: Chunk) -> Result<()> {
        self.position = Some(chunk.end);
        let mut groups: Vec<Group> = Vec::new();
        let mut group_of: HashMap<String, usize> = HashMap::new();
        for candidate in chunk.candidates {
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

    /// The key to ask for; a document without one is settled here.
    fn usable_key(&mut self, candidate: &Candidate) -> Option<String> {
        if !candidate.writable {
            self.fail(candidate, "unwritable_path", "a parent of the key or flag field is no document");
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
                self.fail(candidate, "unsendable_key", "`.` and `..` can't be sent in a path");
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
            if let Some((reason, description)) = self.failed_keys.get(&group.key).cloned() {
                group.candidates.iter().for_each(|candidate| self.fail(candidate, reason, &description));
                continue;
            }
            match self.keys.get_mut(&group.key) {
                Some(KeyState::Asking(waiting)) => waiting.extend(group.candidates),
                Some(KeyState::Answered(answer)) => {
                    let answer = answer.clone();
                    self.deliver(&answer, group.candidates);
                }
                None => unknown.push(group),
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
        self.keys.insert(group.key.clone(), KeyState::Asking(group.candidates));
        self.work.push_back(Work { key: group.key, checked_at: group.checked_at });
    }

    pub(super) fn start_calls(&mut self) {
        let asker = &self.parts.asker;
        let most = calls_within(QUEUE, self.parts.tps);
        while !self.work.is_empty() && asker.queued.load(Ordering::Relaxed) < most {
            let Ok(slot) = self.slots.clone().try_acquire_owned() else { return };
            let Some(work) = self.work.pop_front() else { return };
            asker.queued.fetch_add(1, Ordering::Relaxed);
            self.calls.spawn(asker.clone().ask(work.key, slot));
        }
    }

    /// The application fills keys too: documents that waited for their turn are
    /// checked again, so that no call is spent on what is filled by now.
    pub(super) async fn check_freshness(&mut self) -> Result<()> {
        let stale = self.work.front().is_some_and(|work| work.checked_at.elapsed() > FRESH);
        if !stale || self.slots.available_permits() == 0 {
            return Ok(());
        }
        let due = calls_within(FRESH, self.parts.tps);
        let count = self.work.len().min(due.max(self.slots.available_permits()));
        let keys: Vec<String> = self.work.drain(..count).map(|work| work.key).collect();
        let checked_at = Instant::now();
        let waiting: Vec<Candidate> = keys.iter().flat_map(|key| self.take_waiting(key)).collect();
        let before = waiting.len();
        let still = self.collection.still_candidates(waiting).await?;
        self.documents.already_filled += u64::try_from(before - still.len()).unwrap_or(0);
        let mut groups: HashMap<String, Vec<Candidate>> = HashMap::new();
        for candidate in still {
            // Without a key now: a later pass flags it.
            let key = candidate.legacy.text().unwrap_or_default();
            groups.entry(key).or_default().push(candidate);
        }
        for key in keys.into_iter().rev() {
            if let Some(candidates) = groups.remove(&key) {
                self.keys.insert(key.clone(), KeyState::Asking(candidates));
                self.work.push_front(Work { key, checked_at });
            }
        }
        // What is left has another legacy key now; a later pass sees to it.
        self.documents.changed += u64::try_from(groups.values().map(Vec::len).sum::<usize>()).unwrap_or(0);
        Ok(())
    }

    pub(super) fn take_waiting(&mut self, key: &str) -> Vec<Candidate> {
        match self.keys.remove(key) {
            Some(KeyState::Asking(waiting)) => waiting,
            _ => Vec::new(),
        }
    }
}

/// Calls that leave within a time, at least two.
fn calls_within(time: Duration, tps: f64) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
    let calls = (tps * time.as_secs_f64()).ceil().clamp(2.0, 10_000.0) as usize;
    calls
}
