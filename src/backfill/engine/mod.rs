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

use bson::RawBson;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use self::answers::Held;
use self::calls::{Retries, Work};
use self::keys::{Failure, Keys};
use self::writes::{Outbox, WriteDone};
use super::asker::{Asker, Settled};
use super::counts::{Api, Documents};
use super::guard::Guard;
use super::reader::Chunk;
use crate::error::{Error, Result, joined};
use crate::event::Events;
use crate::key_api::retry::Attempts;
use crate::key_map::KeyMap;
use crate::mongo::source::{Candidate, TargetCollection};
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
    /// 95th percentile of the API's latency above which the rate is lowered.
    pub max_api_latency: Duration,
    /// Where failures are shown.
    pub events: Events,
    /// Cancelled when the run is to drain.
    pub stop: CancellationToken,
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
            probes: 0,
            deferred_keys: HashMap::new(),
            may_defer: false,
            reading: false,
            outbox: Outbox::default(),
            calls: JoinSet::new(),
            writes: JoinSet::new(),
            held_answers: Vec::new(),
            counted: HashSet::new(),
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
    /// With `may_defer` keys that fail too many at once are put off to the next
    /// pass instead of being counted as failed.
    ///
    /// # Errors
    /// The fatal condition that ended the pass early.
    pub async fn pass(
        &mut self,
        mut chunks: mpsc::Receiver<Result<Chunk>>,
        may_defer: bool,
        mut on_tick: impl AsyncFnMut(&Self) -> Result<()>,
    ) -> Result<()> {
        (self.reading, self.may_defer) = (true, may_defer);
        let (mut looks, mut ticks) = (every(LOOK), every(TICK));
        loop {
            if self.is_draining() {
                self.reading = false;
                self.work.clear();
                self.retries.clear();
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
                    Some(chunk) => self.take_chunk(chunk?).await?,
                    None => self.reading = false,
                },
                _ = looks.tick() => self.look(),
                _ = ticks.tick() => {
                    self.adjust_rate();
                    on_tick(self).await?;
                }
                () = sleep_until(next_call) => {}
                () = self.parts.stop.cancelled(), if self.reading => self.reading = false,
            }
        }
        self.look();
        on_tick(self).await?;
        self.fatal.take().map_or(Ok(()), Err)
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

    /// What limits the speed now.
    pub fn limited_by(&self) -> &'static str {
        let asker = &self.parts.asker;
        if let Some(reason) = asker.pacer.paused_by() {
            reason.as_str()
        } else if asker.breaker.is_open() {
            "breaker"
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
            && self.calls.is_empty()
            && self.writes.is_empty()
            && self.outbox.updates.is_empty()
            && self.outbox.answers.is_empty()
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
