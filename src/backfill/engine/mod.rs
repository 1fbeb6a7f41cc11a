//! Moves documents from a chunk to a durable write.
//!
//! One task owns all the bookkeeping and never waits for anything but the next
//! event: a chunk, a settled call, a finished write, a signal. Calls and writes
//! run beside it. That makes one call per key a matter of a plain map, without
//! a lock, and bounds memory by the chunk size.

mod answers;
mod calls;
mod intake;
mod keys;
mod writes;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bson::{Document, RawBson, doc};
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use self::answers::Held;
use self::calls::{Retries, Work};
use self::keys::{Failure, Keys};
use self::writes::{Outbox, WriteDone};
use super::asker::{Asker, Settled};
use super::checkpoint::Checkpoints;
use super::counts::{Api, Documents};
use super::failures::Failures;
use super::guard::Guard;
use super::latency::Counts;
use super::reader::Chunk;
use super::steer::LiveSettings;
use crate::config::values::Namespace;
use crate::error::{Error, Result, joined};
use crate::event::Events;
use crate::job::ownership::Ownership;
use crate::key_api::retry::Attempts;
use crate::key_map::KeyMap;
use crate::mongo::index::stored_count;
use crate::mongo::source::{Candidate, TargetCollection};
use crate::report::json::extended;
use crate::throttle::adaptive::AdaptiveShare;
use crate::throttle::limits::Limits;

/// How often it is seen what limits the speed.
const LOOK: Duration = Duration::from_millis(100);
/// How often progress is shown and the rate adjusted.
const TICK: Duration = Duration::from_secs(1);
/// Failures that are shown one by one.
const SHOWN_FAILURES: u64 = 10;

/// What the engine works with; made by `run`.
#[derive(Debug)]
pub struct Parts {
    /// Asks the API.
    pub asker: Arc<Asker>,
    /// Targets whose documents can be found by their legacy key: they are filled
    /// as soon as any target's document has led to the answer.
    pub siblings: Vec<Arc<TargetCollection>>,
    /// Remembers answers, unless that is switched off.
    pub key_map: Option<KeyMap>,
    /// Calls that may be under way or not yet durable, to begin with.
    pub slots: usize,
    /// What operators may change.
    pub live: Arc<LiveSettings>,
    /// Which keys this worker may ask for.
    pub ownership: Arc<Ownership>,
    /// The list of documents that failed.
    pub failures: Failures,
    /// Name of the job.
    pub job: String,
    /// Share of negative answers that stops the job.
    pub max_not_found_share: f64,
    /// Share of unusable keys that stops the job.
    pub max_no_legacy_key_share: f64,
    /// 95th percentile of the API's latency above which the rate is lowered.
    pub max_api_latency: Duration,
    /// Where failures are shown.
    pub events: Events,
    /// Cancelled when the run is to drain.
    pub stop: CancellationToken,
}

/// What became of a document, for operators to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Recorded {
    /// The collection.
    pub collection: String,
    /// The `_id` as canonical extended JSON.
    pub document: serde_json::Value,
    /// The legacy key, where there is a usable one.
    pub legacy_key: Option<String>,
    /// `filled`, `flagged`, `already_filled`, `changed` or `failed`.
    pub outcome: &'static str,
    /// The new key, the reason of the flag or the description of the failure.
    pub detail: String,
}

/// The state of a run over one target.
#[derive(Debug)]
pub struct Engine {
    parts: Parts,
    collection: Arc<TargetCollection>,
    slots: Arc<Semaphore>,
    slot_count: usize,
    keys: Keys,
    work: VecDeque<Work>,
    retries: Retries,
    /// Parts of batches that the API refused as a whole.
    halves: VecDeque<Vec<String>>,
    /// How often the probe under way has asked for its key.
    probes: u32,
    /// Keys that are put off to the next pass, with the attempts made so far.
    deferred_keys: HashMap<String, Attempts>,
    may_defer: bool,
    /// Whether the pass still delivers chunks.
    reading: bool,
    adaptive: AdaptiveShare,
    limits: Limits,
    outbox: Outbox,
    calls: JoinSet<Settled>,
    writes: JoinSet<Result<WriteDone>>,
    /// Since when writes are under way and none of them was done.
    waits_since: Option<Instant>,
    answer_guard: Guard,
    unusable_guard: Guard,
    /// Flags that wait for the guard's first verdict.
    held_answers: Vec<Held>,
    /// Keys of held answers that the guard has counted: a later chunk may find
    /// them in the key map, still held.
    counted: HashSet<String>,
    held_unusable: Vec<Held>,
    /// Keys that failed in this run and why, so that all documents share it.
    failed_keys: HashMap<String, Failure>,
    refusals_in_a_row: u32,
    /// Documents that wait for the key map to accept the answer of their key.
    late: HashMap<String, Vec<Candidate>>,
    /// The first fatal condition; from then on the engine drains.
    fatal: Option<Error>,
    /// Flags are not written any more.
    distrusts_flags: bool,
    /// A pass over the current collection is done, and the guard had too few answers
    /// for a verdict: there will hardly be more.
    has_few_answers: bool,
    position: Option<RawBson>,
    recorded: Option<Vec<Recorded>>,
    documents: Documents,
    from_key_map: u64,
}

impl Engine {
    /// An engine for one target.
    pub fn new(parts: Parts, collection: Arc<TargetCollection>) -> Self {
        Self {
            slots: Arc::new(Semaphore::new(parts.slots)),
            slot_count: parts.slots,
            adaptive: AdaptiveShare::new(parts.max_api_latency),
            limits: Limits::new(Instant::now()),
            answer_guard: Guard::new(parts.max_not_found_share),
            unusable_guard: Guard::new(parts.max_no_legacy_key_share),
            parts,
            collection,
            keys: Keys::default(),
            work: VecDeque::new(),
            retries: Retries::default(),
            halves: VecDeque::new(),
            probes: 0,
            deferred_keys: HashMap::new(),
            may_defer: false,
            reading: false,
            outbox: Outbox::default(),
            calls: JoinSet::new(),
            writes: JoinSet::new(),
            waits_since: None,
            held_answers: Vec::new(),
            counted: HashSet::new(),
            held_unusable: Vec::new(),
            failed_keys: HashMap::new(),
            refusals_in_a_row: 0,
            late: HashMap::new(),
            fatal: None,
            distrusts_flags: false,
            has_few_answers: false,
            position: None,
            recorded: None,
            documents: Documents::default(),
            from_key_map: 0,
        }
    }

    /// Goes on with another collection; answers, guards and counts stay.
    pub fn switch_to(&mut self, collection: Arc<TargetCollection>) {
        self.collection = collection;
        self.position = None;
        self.has_few_answers = false;
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

    /// How long calls took so far.
    pub fn latencies(&self) -> Counts {
        self.parts.asker.counters.latencies.snapshot()
    }

    /// The `_id` up to which chunks were taken in.
    pub fn position(&self) -> Option<&RawBson> {
        self.position.as_ref()
    }

    /// Works off a pass. Returns when everything that was begun is settled.
    ///
    /// With `may_defer` keys that fail too many at once are put off to the next
    /// pass instead of being counted as failed.
    ///
    /// # Errors
    /// The fatal condition that ended the pass early.
    pub async fn pass(
        &mut self,
        mut chunks: mpsc::Receiver<Result<Chunk>>,
        may_defer: bool,
        checkpoints: &mut Checkpoints<'_>,
    ) -> Result<()> {
        (self.reading, self.may_defer) = (true, may_defer);
        let (mut looks, mut ticks) = (every(LOOK), every(TICK));
        loop {
            if self.is_draining() {
                self.reading = false;
                self.work.clear();
                self.retries.clear();
                self.halves.clear();
            } else {
                self.check_freshness().await?;
                self.start_calls();
            }
            self.start_writes();
            if !self.reading && self.is_idle() {
                break;
            }
            let next_call = self.next_call();
            tokio::select! {
                biased;
                Some(done) = self.writes.join_next() => self.take_written(joined(done)?).await?,
                Some(settled) = self.calls.join_next() => self.take_settled(joined(settled)?).await?,
                chunk = chunks.recv(), if self.reading && self.wants_chunk() => match chunk {
                    Some(Ok(chunk)) => self.take_chunk(chunk).await?,
                    // What was answered is written and counted before the run ends.
                    Some(Err(error)) => self.stop_for(error),
                    None => self.reading = false,
                },
                _ = looks.tick() => self.look(),
                _ = ticks.tick() => {
                    self.adjust_rate();
                    checkpoints.tick(self).await?;
                }
                () = sleep_until(next_call) => {}
                () = self.parts.stop.cancelled(), if self.reading => self.reading = false,
            }
        }
        self.look();
        checkpoints.tick(self).await?;
        self.fatal.take().map_or(Ok(()), Err)
    }

    /// Keeps from here on what becomes of each document.
    pub fn record(&mut self) {
        self.recorded = Some(Vec::new());
    }

    /// What became of the documents since [`Engine::record`].
    pub fn take_recorded(&mut self) -> Vec<Recorded> {
        self.recorded.take().unwrap_or_default()
    }

    /// Fills documents of one target only, so that a limit counts all that is
    /// written: the key map answers for the others when their turn comes. Without
    /// one they would be asked for again, and are filled all the same.
    pub fn stay_with_one_target(&mut self) {
        if self.parts.key_map.is_some() {
            self.parts.siblings.clear();
        }
    }

    /// Strikes off the failures in a collection since an earlier moment, because
    /// their documents are tried again.
    ///
    /// # Errors
    /// A stop where the list of failures can't be written.
    pub async fn forget_failures_since(&mut self, earlier: &Documents, collection: &Namespace) -> Result<()> {
        if self.documents.failed > earlier.failed {
            self.documents.forget_failures_since(earlier);
            self.parts.failures.forget(&collection.to_string()).await?;
        }
        Ok(())
    }

    /// Stores the failures so far.
    ///
    /// # Errors
    /// A stop where the list of failures can't be written.
    pub async fn flush_failures(&mut self) -> Result<()> {
        self.parts.failures.flush().await
    }

    /// Strikes off the failures of earlier runs.
    ///
    /// # Errors
    /// A stop where the list of failures can't be written.
    pub async fn forget_earlier_failures(&self) -> Result<()> {
        self.parts.failures.forget_earlier().await
    }

    /// When calls may be made again, while no window is open.
    pub fn opens_at(&self) -> Option<jiff::Timestamp> {
        self.parts.asker.pacer.opens_at()
    }

    /// The calls of today, where they are limited, with those that may leave
    /// within so many seconds.
    pub fn calls_of_day(&self, seconds_ahead: u64) -> Option<Document> {
        let (day, calls) = self.parts.asker.pacer.calls_of_day(seconds_ahead)?;
        Some(doc! {"day": day.to_string(), "calls": stored_count(calls)})
    }

    /// Whether keys were put off to the next pass.
    pub fn has_deferred(&self) -> bool {
        !self.deferred_keys.is_empty()
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
        self.has_few_answers = true;
        self.release_unusable();
        self.release_answers().await?;
        while !self.outbox.updates.is_empty() || !self.writes.is_empty() {
            self.parts.asker.lease.valid().await?;
            self.start_writes();
            if let Some(done) = self.writes.join_next().await {
                self.take_written(joined(done)?).await?;
            }
        }
        Ok(())
    }

    /// What limits the speed now.
    pub fn limited_by(&self) -> &'static str {
        let asker = &self.parts.asker;
        if let Some(reason) = asker.pacer.paused_by() {
            reason.as_str()
        } else if asker.breaker.is_open() {
            "breaker"
        } else if self.is_stalled() {
            "database"
        } else if let Some(waiting) = asker.pacer.waiting() {
            waiting.as_str()
        } else if self.slots.available_permits() == 0 && asker.counters.in_flight() > 0 {
            "api latency"
        } else if !self.writes.is_empty() || (self.reading && self.work.is_empty()) {
            "database"
        } else if self.calls.is_empty() && !self.retries.is_empty() {
            "retries"
        } else {
            "cpu"
        }
    }

    /// Seconds by what limited the speed, the costliest first.
    pub fn limits(&self) -> Vec<(&'static str, f64)> {
        self.limits.seconds()
    }

    fn look(&mut self) {
        let limit = self.limited_by();
        self.limits.record(Instant::now(), limit);
        self.adjust_slots();
        if self.parts.ownership.is_releasing() {
            self.drop_released_keys();
        }
    }

    fn adjust_slots(&mut self) {
        let wanted = self.parts.live.slots();
        if wanted > self.slot_count {
            self.slots.add_permits(wanted - self.slot_count);
            self.slot_count = wanted;
        } else if wanted < self.slot_count {
            // Those in use are taken away once they are given back.
            self.slot_count -= self.slots.forget_permits(self.slot_count - wanted);
        }
    }

    fn adjust_rate(&mut self) {
        let (share, reason) = self.adaptive.adjust();
        self.parts.asker.pacer.use_share(share, reason);
    }

    fn is_draining(&self) -> bool {
        self.parts.stop.is_cancelled() || self.fatal.is_some()
    }

    fn is_idle(&self) -> bool {
        self.work.is_empty()
            && self.retries.is_empty()
            && self.halves.is_empty()
            && self.calls.is_empty()
            && self.writes.is_empty()
            && self.outbox.updates.is_empty()
            && self.outbox.answers.is_empty()
    }

    fn fail(&mut self, candidate: &Candidate, reason: &str, description: &str) {
        let namespace = self.collection.target.namespace.clone();
        self.fail_in(&namespace, candidate, reason, description);
    }

    fn fail_in(&mut self, namespace: &Namespace, candidate: &Candidate, reason: &str, description: &str) {
        self.documents.fail(reason);
        self.parts.failures.record(&namespace.to_string(), candidate, reason, description);
        self.keep_record(namespace, candidate, "failed", format!("{reason}: {description}"));
        if self.documents.failed <= SHOWN_FAILURES {
            let id = extended(candidate.id.as_raw_bson_ref());
            self.parts.events.warn(format!("{namespace} {id}: {reason}: {description}"));
        }
    }

    fn keep_record(
        &mut self,
        namespace: &Namespace,
        candidate: &Candidate,
        outcome: &'static str,
        detail: String,
    ) {
        if let Some(recorded) = &mut self.recorded {
            recorded.push(Recorded {
                collection: namespace.to_string(),
                document: extended(candidate.id.as_raw_bson_ref()),
                legacy_key: candidate.legacy.text(),
                outcome,
                detail,
            });
        }
    }

    fn stop_for(&mut self, error: Error) {
        self.parts.asker.stop.cancel();
        self.fatal.get_or_insert(error);
    }
}

fn every(period: Duration) -> Interval {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// Sleeps for ever where there is no moment to wake up at.
async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
