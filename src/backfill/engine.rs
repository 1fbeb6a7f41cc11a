//! Moves documents from a chunk to a durable write.
//!
//! One task owns all the bookkeeping and never waits for anything but the next
//! event: a chunk, a settled call, a finished write, a signal. Calls and writes
//! run beside it. That makes one call per key a matter of a plain map, without
//! a lock, and bounds memory by the chunk size.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bson::RawBson;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::asker::{Asked, Asker, Settled};
use super::counts::{Api, Documents};
use super::guard::{Guard, Verdict};
use super::reader::Chunk;
use crate::error::{Error, Result};
use crate::event::Events;
use crate::key_map::{Answer, KeyMap, Remembered};
use crate::mongo::sink::{FlagReason, Update, Write, Written};
use crate::mongo::source::{Candidate, TargetCollection};

/// Writes under way at once: one is prepared by the server while the next
/// gathers its documents.
const WRITES_IN_FLIGHT: usize = 2;
/// A document is checked again before its call when it was read longer ago.
const FRESH: Duration = Duration::from_secs(2);
/// Documents that may wait for an answer or a write at once: a key that stands
/// in a million documents must not gather them all in memory.
const MOST_WAITING: usize = 20_000;
/// So many write refusals in a row mean that no document can be written.
const REFUSALS_IN_A_ROW: u32 = 20;
/// Keys whose failure is remembered within a run, so that it is shared.
const FAILED_KEYS: usize = 100_000;
/// Failures that are shown one by one.
const SHOWN_FAILURES: u64 = 10;

/// What the engine works with; made by `run`.
#[derive(Debug)]
pub struct Parts {
    /// Asks the API.
    pub asker: Arc<Asker>,
    /// Remembers answers, unless that is switched off.
    pub key_map: Option<KeyMap>,
    /// Calls that may be under way or not yet durable.
    pub slots: usize,
    /// Name of the job.
    pub job: String,
    /// Share of negative answers that stops the job.
    pub max_not_found_share: f64,
    /// Share of unusable keys that stops the job.
    pub max_no_legacy_key_share: f64,
    /// Calls per second, to size what is checked again at once.
    pub tps: f64,
    /// Where failures are shown.
    pub events: Events,
    /// Cancelled when the run is to drain.
    pub stop: CancellationToken,
}

/// A key that was asked for, until its answer is durable.
#[derive(Debug)]
enum KeyState {
    /// Its call is queued or under way; these documents wait for it.
    Asking(Vec<Candidate>),
    /// The answer is known, but may not be in the key map yet.
    Answered(Answer),
}

/// A key whose call is queued.
#[derive(Debug)]
struct Work {
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

/// What one write settles.
#[derive(Debug, Default)]
struct Outbox {
    answers: Vec<(String, Remembered)>,
    slots: Vec<OwnedSemaphorePermit>,
    updates: Vec<Update>,
}

#[derive(Debug)]
struct WriteDone {
    keys: Vec<String>,
    results: Vec<(Update, Written)>,
}

/// The state of a run over one target.
#[derive(Debug)]
pub struct Engine {
    parts: Parts,
    collection: Arc<TargetCollection>,
    slots: Arc<Semaphore>,
    keys: HashMap<String, KeyState>,
    work: VecDeque<Work>,
    outbox: Outbox,
    calls: JoinSet<Settled>,
    writes: JoinSet<Result<WriteDone>>,
    answer_guard: Guard,
    unusable_guard: Guard,
    /// Flags that wait for the guard's first verdict.
    held_answers: Vec<Update>,
    held_unusable: Vec<Update>,
    /// Keys that failed in this run and why, so that all documents share it.
    failed_keys: HashMap<String, (&'static str, String)>,
    refusals_in_a_row: u32,
    /// The first fatal condition; from then on the engine drains.
    fatal: Option<Error>,
    /// Flags are not written any more.
    distrusts_flags: bool,
    position: Option<RawBson>,
    documents: Documents,
    from_key_map: u64,
}

impl Engine {
    /// An engine for one target.
    pub fn new(parts: Parts, collection: Arc<TargetCollection>) -> Self {
        Self {
            slots: Arc::new(Semaphore::new(parts.slots)),
            answer_guard: Guard::new(parts.max_not_found_share),
            unusable_guard: Guard::new(parts.max_no_legacy_key_share),
            parts,
            collection,
            keys: HashMap::new(),
            work: VecDeque::new(),
            outbox: Outbox::default(),
            calls: JoinSet::new(),
            writes: JoinSet::new(),
            held_answers: Vec::new(),
            held_unusable: Vec::new(),
            failed_keys: HashMap::new(),
            refusals_in_a_row: 0,
            fatal: None,
            distrusts_flags: false,
            position: None,
            documents: Documents::default(),
            from_key_map: 0,
        }
    }

    /// Goes on with another collection; answers, guards and counts stay.
    pub fn switch_to(&mut self, collection: Arc<TargetCollection>) {
        self.collection = collection;
        self.position = None;
    }

    /// Documents so far.
    pub fn documents(&self) -> &Documents {
        &self.documents
    }

    /// Documents so far, for the counts that `run` makes itself.
    pub fn documents_mut(&mut self) -> &mut Documents {
        &mut self.documents
    }

    /// Calls so far.
    pub fn api(&self) -> Api {
        self.parts.asker.counters.snapshot(self.from_key_map)
    }

    /// The `_id` up to which chunks were taken in.
    pub fn position(&self) -> Option<&RawBson> {
        self.position.as_ref()
    }

    /// Works off a pass. Returns when everything that was begun is settled.
    ///
    /// # Errors
    /// The fatal condition that ended the pass early.
    pub async fn pass(
        &mut self,
        mut chunks: mpsc::Receiver<Result<Chunk>>,
        mut on_tick: impl AsyncFnMut(&Self) -> Result<()>,
    ) -> Result<()> {
        let mut reading = true;
        let mut ticks = tokio::time::interval(Duration::from_millis(500));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if self.is_draining() {
                reading = false;
                self.work.clear();
            } else {
                self.check_freshness().await?;
                self.start_calls();
            }
            self.start_writes();
            if !reading && self.is_idle() {
                break;
            }
            tokio::select! {
                biased;
                Some(done) = self.writes.join_next() => self.take_written(joined(done)?).await?,
                Some(settled) = self.calls.join_next() => self.take_settled(joined(settled)?).await?,
                chunk = chunks.recv(), if reading && self.wants_chunk() => match chunk {
                    Some(chunk) => self.take_chunk(chunk?).await?,
                    None => reading = false,
                },
                _ = ticks.tick() => on_tick(self).await?,
                () = self.parts.stop.cancelled(), if reading => reading = false,
            }
        }
        on_tick(self).await?;
        self.fatal.take().map_or(Ok(()), Err)
    }

    /// Settles what the guard held back because there were too few answers for
    /// a verdict; warns where the share is above the limit.
    ///
    /// # Errors
    /// A stop where the database can't be written.
    pub async fn finish(&mut self) -> Result<()> {
        if self.distrusts_flags {
            return Ok(());
        }
        self.warn_about_share();
        self.release_unusable();
        self.release_answers().await?;
        while !self.outbox.updates.is_empty() || !self.writes.is_empty() {
            self.start_writes();
            if let Some(done) = self.writes.join_next().await {
                self.take_written(joined(done)?).await?;
            }
        }
        Ok(())
    }

    /// Documents whose flag waits for the guard's first verdict.
    pub fn held(&self) -> u64 {
        u64::try_from(self.held_answers.len() + self.held_unusable.len()).unwrap_or(u64::MAX)
    }

    /// What limits the speed now.
    pub fn limited_by(&self) -> String {
        if let Some(waiting) = self.parts.asker.pacer.waiting() {
            return waiting.to_string();
        }
        if self.slots.available_permits() == 0 && self.parts.asker.counters.in_flight() > 0 {
            return "api latency".into();
        }
        "database".into()
    }

    fn is_draining(&self) -> bool {
        self.parts.stop.is_cancelled() || self.fatal.is_some()
    }

    fn is_idle(&self) -> bool {
        self.work.is_empty()
            && self.calls.is_empty()
            && self.writes.is_empty()
            && self.outbox.updates.is_empty()
            && self.outbox.answers.is_empty()
    }

    /// Another chunk is taken when the last one is nearly used up and what is
    /// on its way to the database does not pile up.
    fn wants_chunk(&self) -> bool {
        if self.is_draining() || self.work.len() >= self.parts.slots {
            return false;
        }
        let asking = self.keys.values().map(|state| match state {
            KeyState::Asking(waiting) => waiting.len(),
            KeyState::Answered(_) => 0,
        });
        self.outbox.updates.len() + asking.sum::<usize>() < MOST_WAITING
    }

    async fn take_chunk(&mut self, chunk: Chunk) -> Result<()> {
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
                self.held_unusable.push(Update { candidate: candidate.clone(), write });
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
                    self.deliver_remembered(&remembered, group.candidates).await?;
                }
            }
        }
        Ok(())
    }

    /// A held answer was never judged, so the guard counts it like a new one.
    async fn deliver_remembered(
        &mut self,
        remembered: &Remembered,
        candidates: Vec<Candidate>,
    ) -> Result<()> {
        if remembered.held {
            self.answer_guard.record(remembered.answer.is_negative());
            self.deliver(&remembered.answer, candidates);
            return self.judge_answers().await;
        }
        self.queue(&remembered.answer, candidates);
        Ok(())
    }

    /// Sends documents to the writer, or lets them wait where a flag may not be
    /// written yet.
    fn deliver(&mut self, answer: &Answer, candidates: Vec<Candidate>) {
        if answer.is_negative() && self.answer_guard.verdict() == Verdict::Undecided {
            let write = answer.write();
            self.held_answers
                .extend(candidates.into_iter().map(|candidate| Update { candidate, write: write.clone() }));
        } else {
            self.queue(answer, candidates);
        }
    }

    fn queue(&mut self, answer: &Answer, candidates: Vec<Candidate>) {
        if answer.is_negative() && self.distrusts_flags {
            return;
        }
        let write = answer.write();
        self.outbox
            .updates
            .extend(candidates.into_iter().map(|candidate| Update { candidate, write: write.clone() }));
    }

    fn enqueue(&mut self, group: Group) {
        self.keys.insert(group.key.clone(), KeyState::Asking(group.candidates));
        self.work.push_back(Work { key: group.key, checked_at: group.checked_at });
    }

    fn start_calls(&mut self) {
        while !self.work.is_empty() {
            let Ok(slot) = self.slots.clone().try_acquire_owned() else { return };
            let Some(work) = self.work.pop_front() else { return };
            self.calls.spawn(self.parts.asker.clone().ask(work.key, slot));
        }
    }

    /// The application fills keys too: documents that waited for their turn are
    /// checked again, so that no call is spent on what is filled by now.
    async fn check_freshness(&mut self) -> Result<()> {
        let stale = self.work.front().is_some_and(|work| work.checked_at.elapsed() > FRESH);
        if !stale || self.slots.available_permits() == 0 {
            return Ok(());
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
        let due = (self.parts.tps * FRESH.as_secs_f64()).clamp(1.0, 10_000.0) as usize;
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

    fn take_waiting(&mut self, key: &str) -> Vec<Candidate> {
        match self.keys.remove(key) {
            Some(KeyState::Asking(waiting)) => waiting,
            _ => Vec::new(),
        }
    }

    async fn take_settled(&mut self, settled: Settled) -> Result<()> {
        let waiting = self.take_waiting(&settled.key);
        match settled.asked {
            Asked::Answer(answer) => self.take_answer(settled.key, answer, settled.slot, waiting).await,
            Asked::Failed(reason, description) => {
                for candidate in &waiting {
                    self.fail(candidate, reason, &description);
                }
                if self.failed_keys.len() < FAILED_KEYS {
                    self.failed_keys.insert(settled.key, (reason, description));
                }
                Ok(())
            }
            Asked::NotAsked => Ok(()),
            Asked::Fatal(description) => {
                self.stop_for(Error::stopped(format!("the key API refuses our credentials: {description}")).hint(
                    "mend `key_api.headers` and start the same command again; no document was touched by the refused calls",
                ));
                Ok(())
            }
        }
    }

    async fn take_answer(
        &mut self,
        key: String,
        answer: Answer,
        slot: OwnedSemaphorePermit,
        waiting: Vec<Candidate>,
    ) -> Result<()> {
        self.answer_guard.record(answer.is_negative());
        let undecided = self.answer_guard.verdict() == Verdict::Undecided;
        let held = answer.is_negative() && undecided;
        self.deliver(&answer, waiting);
        self.keys.insert(key.clone(), KeyState::Answered(answer.clone()));
        self.outbox.answers.push((key, Remembered { answer, held }));
        // Without a key map a held flag can't be made durable: it gives its
        // slot back, or a hundred held flags would stall a smaller job.
        if self.parts.key_map.is_some() || !held {
            self.outbox.slots.push(slot);
        }
        self.judge_answers().await
    }

    async fn judge_answers(&mut self) -> Result<()> {
        match self.answer_guard.verdict() {
            Verdict::Undecided => Ok(()),
            Verdict::Fine => self.release_answers().await,
            Verdict::Tripped { bad, of } => {
                self.distrust_flags();
                self.stop_for(
                    Error::stopped(format!(
                        "the guard stopped the job: {bad} of the last {of} answers say that there is no key (limit {})",
                        self.parts.max_not_found_share
                    ))
                    .hint("is the API's address right, and do its answers mean what `not_found_status` says? If so, raise `backfill.max_not_found_share`"),
                );
                Ok(())
            }
        }
    }

    fn stop_for_unusable(&mut self, bad: usize, of: usize) {
        self.distrust_flags();
        self.stop_for(
            Error::stopped(format!(
                "the guard stopped the job: {bad} of the last {of} documents have no usable legacy key (limit {})",
                self.parts.max_no_legacy_key_share
            ))
            .hint("is `legacy_field` right? If so, raise `backfill.max_no_legacy_key_share`"),
        );
    }

    /// Nothing that would become a flag is written from here on.
    fn distrust_flags(&mut self) {
        self.distrusts_flags = true;
        self.held_answers.clear();
        self.held_unusable.clear();
        self.outbox.updates.retain(|update| matches!(update.write, Write::Key(_)));
        self.outbox.answers.retain(|(_, remembered)| !remembered.answer.is_negative());
    }

    /// Whether the guard tripped over answers, which must be forgotten then.
    pub fn distrusts_answers(&self) -> bool {
        matches!(self.answer_guard.verdict(), Verdict::Tripped { .. })
    }

    async fn release_answers(&mut self) -> Result<()> {
        if self.held_answers.is_empty() {
            return Ok(());
        }
        self.outbox.answers.iter_mut().for_each(|(_, remembered)| remembered.held = false);
        // Those on their way to the key map must have arrived to be released.
        while let Some(done) = self.writes.join_next().await {
            self.take_written(joined(done)?).await?;
        }
        if let Some(key_map) = &self.parts.key_map {
            key_map.release_held().await?;
        }
        self.outbox.updates.append(&mut self.held_answers);
        Ok(())
    }

    fn release_unusable(&mut self) {
        self.outbox.updates.append(&mut self.held_unusable);
    }

    fn warn_about_share(&self) {
        for (guard, held, what) in [
            (&self.answer_guard, self.held_answers.len(), "answers say that there is no key"),
            (&self.unusable_guard, self.held_unusable.len(), "documents have no usable legacy key"),
        ] {
            if held > 0 && guard.exceeds_limit() {
                let (bad, of) = guard.share();
                self.parts.events.warn(format!(
                    "{bad} of {of} {what}: too few for the guard to judge, so they are flagged; look at some of them"
                ));
            }
        }
    }

    fn start_writes(&mut self) {
        let empty = self.outbox.updates.is_empty() && self.outbox.answers.is_empty();
        if empty || self.writes.len() >= WRITES_IN_FLIGHT {
            return;
        }
        let outbox = std::mem::take(&mut self.outbox);
        let (key_map, collection, job) =
            (self.parts.key_map.clone(), self.collection.clone(), self.parts.job.clone());
        self.writes.spawn(async move { write(outbox, key_map, collection, &job).await });
    }

    async fn take_written(&mut self, done: Result<WriteDone>) -> Result<()> {
        let done = done?;
        for key in done.keys {
            self.keys.remove(&key);
        }
        for (update, written) in done.results {
            self.count_written(&update, written);
        }
        Ok(())
    }

    fn count_written(&mut self, update: &Update, written: Written) {
        if !matches!(written, Written::Refused { .. }) {
            self.refusals_in_a_row = 0;
        }
        match written {
            Written::Done => match &update.write {
                Write::Key(_) => self.documents.filled += 1,
                Write::Flag(reason) => self.documents.flag(reason.as_str()),
            },
            Written::AlreadyFilled => self.documents.already_filled += 1,
            Written::Changed => self.documents.changed += 1,
            Written::Refused { code, message } => {
                self.fail(&update.candidate, "write_refused", &format!("error {code}: {message}"));
                self.refusals_in_a_row += 1;
                if self.refusals_in_a_row == REFUSALS_IN_A_ROW {
                    self.stop_for(
                        Error::stopped(format!(
                            "{REFUSALS_IN_A_ROW} writes to {} in a row were refused; the last with error {code}: {message}",
                            self.collection.target.namespace
                        ))
                        .hint("a validator or a unique index that the keys break? The answers are kept in the key map"),
                    );
                }
            }
        }
    }

    fn fail(&mut self, candidate: &Candidate, reason: &str, description: &str) {
        self.documents.fail(reason);
        if self.documents.failed <= SHOWN_FAILURES {
            let id = crate::report::json::extended(candidate.id.as_raw_bson_ref());
            self.parts
                .events
                .warn(format!("{} {id}: {reason}: {description}", self.collection.target.namespace));
        }
    }

    fn stop_for(&mut self, error: Error) {
        self.parts.asker.stop.cancel();
        self.fatal.get_or_insert(error);
    }
}

/// Answers first, documents after: once the key map is durable the slots are
/// free, and a crash from here on costs no call.
async fn write(
    outbox: Outbox,
    key_map: Option<KeyMap>,
    collection: Arc<TargetCollection>,
    job: &str,
) -> Result<WriteDone> {
    let mut slots = outbox.slots;
    if let Some(key_map) = &key_map {
        key_map.remember(&outbox.answers).await?;
        slots.clear();
    }
    let results = collection.write(&outbox.updates, job).await?;
    drop(slots);
    let keys = outbox.answers.into_iter().map(|(key, _)| key).collect();
    Ok(WriteDone { keys, results: outbox.updates.into_iter().zip(results).collect() })
}

/// A task that panicked is a bug of ours; the run stops, the state is kept.
fn joined<T>(result: std::result::Result<T, tokio::task::JoinError>) -> Result<T> {
    result.map_err(|error| Error::stopped(format!("an internal task failed: {error}")))
}
