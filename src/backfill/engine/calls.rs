//! When a key is asked for: first calls, retries behind them, probes while the
//! breaker is open, and a last look at documents that waited long.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::Engine;
use super::keys::Failure;
use crate::backfill::asker::Settled;
use crate::error::{Error, Result};
use crate::job::ownership::bucket_of;
use crate::key_api::batch::{BatchOutcome, bisect};
use crate::key_api::classify::{OUTCOME_NAMES, Outcome};
use crate::key_api::retry::{Next, is_outage, jittered};
use crate::key_map::Answer;
use crate::mongo::source::Candidate;
use crate::throttle::breaker::{Admission, Change, Pass};

/// A document is checked again before its call when it was read longer ago.
const FRESH: Duration = Duration::from_secs(2);
/// Calls that wait for their permit at once, in time: a longer queue would only
/// grow stale, a shorter one could run empty between two looks at it.
const QUEUE: Duration = Duration::from_secs(1);
/// Keys that wait for their retry at once; more are put off to the next pass.
const MOST_RETRIES: usize = 2_000;
/// Where only keys are left that failed before, so many failed probes end the
/// waiting (after half a minute): nobody could tell an outage from keys that
/// the API always fails on.
const LAST_PROBE: u32 = 20;
/// So often a probe asks for the same key before another one is tried: a key
/// that fails twice and then is answered ends the outage sooner than two keys
/// that were asked for once.
const PROBES_PER_KEY: u32 = 3;
/// Keys whose failure is remembered within a run, so that it is shared.
const FAILED_KEYS: usize = 100_000;

/// A key whose call is queued.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) key: String,
    /// When its documents were last seen to be candidates.
    pub(super) checked_at: Instant,
}

/// Keys that wait for their retry, by the moment at which it is due.
#[derive(Debug, Default)]
pub(super) struct Retries {
    /// The key to probe with, and how often it was.
    probed: Option<(Work, u32)>,
    queue: BTreeMap<(Instant, u64), Work>,
    /// Tells retries of the same moment apart.
    number: u64,
}

impl Retries {
    pub(super) fn clear(&mut self) {
        self.probed = None;
        self.queue.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.probed.is_none() && self.queue.is_empty()
    }

    fn retain(&mut self, mut keep: impl FnMut(&Work) -> bool) {
        self.probed = self.probed.take().filter(|(work, _)| keep(work));
        self.queue.retain(|_, work| keep(work));
    }

    /// Puts a key back that a probe failed on.
    fn push_probed(&mut self, work: Work, probes: u32) {
        if probes < PROBES_PER_KEY {
            self.probed = Some((work, probes));
        } else {
            self.push(Instant::now(), work);
        }
    }

    fn push(&mut self, due: Instant, work: Work) {
        self.number += 1;
        self.queue.insert((due, self.number), work);
    }

    fn next_due(&self) -> Option<Instant> {
        match &self.probed {
            Some((work, _)) => Some(work.checked_at),
            None => self.queue.first_key_value().map(|((due, _), _)| *due),
        }
    }

    fn pop(&mut self) -> Option<Work> {
        self.pop_to_probe().map(|(work, _)| work)
    }

    /// The next key, and how often it was probed with in a row.
    fn pop_to_probe(&mut self) -> Option<(Work, u32)> {
        self.probed.take().or_else(|| self.queue.pop_first().map(|(_, work)| (work, 0)))
    }

    fn pop_due(&mut self, now: Instant) -> Option<Work> {
        if self.next_due()? <= now { self.pop() } else { None }
    }
}

impl Engine {
    /// Starts as many calls as slots, pacer and breaker allow.
    pub(super) fn start_calls(&mut self) {
        if !self.parts.asker.breaker.is_open() {
            let now = Instant::now();
            // Behind fresh work: a key that failed may wait.
            while let Some(work) = self.retries.pop_due(now) {
                self.work.push_back(work);
            }
        }
        while self.can_call() {
            let Admission::Granted(pass) = self.parts.asker.breaker.admit() else { return };
            let slot = self.slots.clone().try_acquire_owned();
            let (Ok(slot), Some(keys)) = (slot, self.next_keys(pass)) else {
                self.parts.asker.breaker.abandon(pass);
                return;
            };
            let asker = self.parts.asker.clone();
            let is_retry = keys.iter().any(|key| self.keys.was_tried(key));
            asker.queued.fetch_add(1, Ordering::Relaxed);
            self.calls.spawn(asker.ask(keys, is_retry, pass, slot));
        }
    }

    /// Whether there is something to ask for and room for its call.
    fn can_call(&self) -> bool {
        let asker = &self.parts.asker;
        let is_open = asker.breaker.is_open();
        let has_batch = self.work.len() >= self.batch_size() || !self.awaits_more_keys();
        let has_keys = !self.halves.is_empty()
            || (!self.work.is_empty() && (has_batch || is_open))
            || (is_open && !self.retries.is_empty());
        let most = calls_within(QUEUE, asker.pacer.tps().per_second());
        has_keys
            && !self.is_stalled()
            && self.slots.available_permits() > 0
            && asker.queued.load(Ordering::Relaxed) < most
    }

    /// Whether further keys will come to fill a batch: from the next chunk, or
    /// from one after it, once what is under way has made room for it.
    fn awaits_more_keys(&self) -> bool {
        self.reading && (self.wants_chunk() || !self.calls.is_empty() || !self.writes.is_empty())
    }

    /// Keys that one call asks for.
    pub(super) fn batch_size(&self) -> usize {
        self.parts.asker.client.api().batch.as_ref().map_or(1, |batch| batch.size)
    }

    /// A probe takes a key that failed before, so that keys which the API
    /// always fails on are told from an outage by their own answers.
    fn next_keys(&mut self, pass: Pass) -> Option<Vec<String>> {
        if pass == Pass::Probe {
            let (work, probes) =
                self.retries.pop_to_probe().or_else(|| self.work.pop_front().map(|work| (work, 0)))?;
            self.probes = probes + 1;
            return Some(vec![work.key]);
        }
        if let Some(half) = self.halves.pop_front() {
            return Some(half);
        }
        let count = self.work.len().min(self.batch_size());
        let keys: Vec<String> = self.work.drain(..count).map(|work| work.key).collect();
        (!keys.is_empty()).then_some(keys)
    }

    /// When calls may start that can't start now, as far as the clock decides.
    pub(super) fn next_call(&self) -> Option<Instant> {
        if self.is_draining() {
            return None;
        }
        if !self.parts.asker.breaker.is_open() {
            return self.retries.next_due();
        }
        if self.can_call() { self.parts.asker.breaker.next_probe() } else { None }
    }

    pub(super) async fn take_settled(&mut self, settled: Settled) -> Result<()> {
        let Settled { keys, pass, call, slot } = settled;
        let Some(call) = call else {
            self.take_back(keys);
            return Ok(());
        };
        let outage = match &call.outcome {
            BatchOutcome::Failed(outcome) if is_outage(outcome) => Some(outcome.clone()),
            _ => None,
        };
        self.tell_breaker(pass, outage.as_ref());
        if !self.parts.asker.breaker.is_open() {
            self.adaptive.record(call.latency, outage.is_some());
        }
        match call.outcome {
            BatchOutcome::Failed(outcome) => {
                drop(slot);
                keys.into_iter().for_each(|key| self.take_failure(key, pass, &outcome));
            }
            BatchOutcome::Refused(status) => {
                drop(slot);
                self.ask_in_halves(&keys, status);
            }
            BatchOutcome::Answered(answers) => {
                if answers.stray > 0 {
                    tracing::info!(
                        stray = answers.stray,
                        "items of an answer name keys that were not asked for"
                    );
                }
                self.take_outcomes(keys, pass, answers.outcomes, slot).await?;
            }
        }
        if pass == Pass::Probe && self.waits_in_vain() {
            self.fail_all_tried();
        }
        Ok(())
    }

    async fn take_outcomes(
        &mut self,
        keys: Vec<String>,
        pass: Pass,
        outcomes: Vec<Outcome>,
        slot: OwnedSemaphorePermit,
    ) -> Result<()> {
        if outcomes.iter().any(Outcome::is_answer) {
            self.keep_until_durable(
                slot,
                outcomes.iter().any(|outcome| matches!(outcome, Outcome::Found(_))),
            );
        }
        for (key, outcome) in keys.into_iter().zip(outcomes) {
            match outcome {
                Outcome::Found(new_key) => self.take_answer(key, Answer::Found(new_key)).await?,
                Outcome::NotFound => self.take_answer(key, Answer::NotFound).await?,
                Outcome::Rejected => self.take_answer(key, Answer::Rejected).await?,
                failure => self.take_failure(key, pass, &failure),
            }
        }
        Ok(())
    }

    /// One bad key makes an API refuse all of a batch: the halves tell which.
    fn ask_in_halves(&mut self, keys: &[String], status: u16) {
        tracing::debug!(keys = keys.len(), status, "a batch was refused: asking in two halves");
        let (left, right) = bisect(keys);
        for half in [left, right].into_iter().filter(|half| !half.is_empty()) {
            self.halves.push_back(half.to_vec());
        }
    }

    /// The call was not made after all: its keys are next again.
    fn take_back(&mut self, keys: Vec<String>) {
        for key in keys.into_iter().rev() {
            if self.is_draining() {
                self.keys.give_up(&key);
            } else {
                self.work.push_front(Work { key, checked_at: Instant::now() });
            }
        }
    }

    fn tell_breaker(&mut self, pass: Pass, outage: Option<&Outcome>) {
        match self.parts.asker.breaker.record(pass, outage.is_some()) {
            Change::Opened => {
                self.adaptive.start_afresh();
                self.parts.events.warn(format!(
                    "the key API fails again and again ({}): calls stop until a probe is answered",
                    outage.map(Outcome::describe).unwrap_or_default()
                ));
            }
            Change::Closed => self.parts.events.note("the key API answers again"),
            Change::None => {}
        }
    }

    fn take_failure(&mut self, key: String, pass: Pass, outcome: &Outcome) {
        let failure = Failure { reason: OUTCOME_NAMES[outcome.index()], description: outcome.describe() };
        let max_attempts = self.parts.asker.client.api().max_attempts;
        let is_excused = is_outage(outcome) && self.parts.asker.breaker.is_open();
        let is_draining = self.is_draining();
        let Some(asking) = self.keys.asking(&key) else { return };
        asking.failure = Some(failure);
        // The outage is to blame, not the key: this attempt does not count.
        let next = if is_excused {
            Next::RetryWithin(Duration::ZERO)
        } else {
            asking.attempts.next(outcome, max_attempts)
        };
        match next {
            Next::StopJob => self.stop_for(
                Error::stopped(format!("the key API refuses our credentials: {}", outcome.describe())).hint(
                    "mend `key_api.headers` and start the same command again; no document was touched by the refused calls",
                ),
            ),
            _ if is_draining => {
                self.keys.give_up(&key);
            }
            _ if is_excused && pass == Pass::Probe => {
                let work = Work { key, checked_at: Instant::now() };
                self.retries.push_probed(work, self.probes);
            }
            Next::RetryWithin(bound) => self.retry_within(key, bound),
            Next::Settle | Next::GiveUp => self.fail_key(&key),
        }
    }

    fn retry_within(&mut self, key: String, bound: Duration) {
        if self.retries.queue.len() < MOST_RETRIES {
            let now = Instant::now();
            let due = now + jittered(bound, rand::random());
            self.retries.push(due, Work { key, checked_at: now });
        } else if self.may_defer {
            self.defer(key);
        } else {
            self.fail_key(&key);
        }
    }

    /// Lets the documents of a key wait in the database for the next pass.
    fn defer(&mut self, key: String) {
        let Some(asking) = self.keys.give_up(&key) else { return };
        if self.deferred_keys.len() < FAILED_KEYS {
            self.deferred_keys.insert(key, asking.attempts);
        }
    }

    fn fail_key(&mut self, key: &str) {
        let Some(asking) = self.keys.give_up(key) else { return };
        let Some(failure) = asking.failure else { return };
        for candidate in &asking.waiting {
            self.fail(candidate, failure.reason, &failure.description);
        }
        if self.failed_keys.len() < FAILED_KEYS {
            self.failed_keys.insert(key.into(), failure);
        }
    }

    /// Whether probes failed for long enough, with no key left that was never
    /// asked for.
    fn waits_in_vain(&self) -> bool {
        self.parts.asker.breaker.failed_probes() >= LAST_PROBE
            && !self.reading
            && self.work.iter().all(|work| self.keys.was_tried(&work.key))
    }

    fn fail_all_tried(&mut self) {
        let tried: Vec<String> = self.work.drain(..).map(|work| work.key).collect();
        tried.iter().for_each(|key| self.fail_key(key));
        while let Some(work) = self.retries.pop() {
            self.fail_key(&work.key);
        }
    }

    /// Keys that another worker is to have are not asked for any more; once none
    /// of them is in flight they can be handed over.
    pub(super) fn drop_released_keys(&mut self) {
        let ownership = self.parts.ownership.clone();
        let is_ours = |key: &str| ownership.owns(bucket_of(key.as_bytes()));
        let mut dropped: Vec<String> = Vec::new();
        self.work.retain(|work| keep(&is_ours, work, &mut dropped));
        self.retries.retain(|work| keep(&is_ours, work, &mut dropped));
        let mut halves: Vec<Vec<String>> = self.halves.drain(..).collect();
        for half in &mut halves {
            let (ours, others) = std::mem::take(half).into_iter().partition(|key| is_ours(key));
            *half = ours;
            dropped.extend::<Vec<String>>(others);
        }
        self.halves.extend(halves.into_iter().filter(|half| !half.is_empty()));
        dropped.iter().for_each(|key| {
            self.keys.give_up(key);
        });
        if self.keys.all(is_ours) {
            ownership.confirm_release();
        }
    }

    /// The application fills keys too: documents that waited for their turn are
    /// checked again, so that no call is spent on what is filled by now.
    pub(super) async fn check_freshness(&mut self) -> Result<()> {
        let asker = &self.parts.asker;
        let is_waiting =
            asker.pacer.paused_by().is_some() || asker.pacer.opens_at().is_some() || asker.breaker.is_open();
        if is_waiting {
            // Nothing is asked for now; before it is, there is another look.
            return Ok(());
        }
        let stale = self.work.front().is_some_and(|work| work.checked_at.elapsed() > FRESH);
        if !stale || self.slots.available_permits() == 0 {
            return Ok(());
        }
        let due = calls_within(FRESH, self.parts.asker.pacer.tps().per_second());
        let calls = due.max(self.slots.available_permits());
        let count = self.work.len().min(calls * self.batch_size());
        let keys: Vec<String> = self.work.drain(..count).map(|work| work.key).collect();
        let checked_at = Instant::now();
        let waiting: Vec<Candidate> = keys.iter().flat_map(|key| self.keys.borrow_waiting(key)).collect();
        let before = waiting.len();
        let still = self.collection.still_candidates(waiting).await?;
        self.documents.already_filled += u64::try_from(before - still.len()).unwrap_or(0);
        let mut groups: HashMap<String, Vec<Candidate>> = HashMap::new();
        for candidate in still {
            // Without a key now: a later pass flags it.
            let key = candidate.legacy.text().unwrap_or_default();
            groups.entry(key).or_default().push(candidate);
        }
        let known: HashSet<&str> = keys.iter().map(String::as_str).collect();
        // What has another legacy key now is left to a later pass.
        let changed: usize = groups
            .iter()
            .filter(|(key, _)| !known.contains(key.as_str()))
            .map(|(_, group)| group.len())
            .sum();
        self.documents.changed += u64::try_from(changed).unwrap_or(0);
        for key in keys.into_iter().rev() {
            if self.keys.put_back(&key, groups.remove(&key).unwrap_or_default()) {
                self.work.push_front(Work { key, checked_at });
            }
        }
        Ok(())
    }
}

/// Whether queued work is still ours; notes its key where it is not.
fn keep(is_ours: &impl Fn(&str) -> bool, work: &Work, dropped: &mut Vec<String>) -> bool {
    let ours = is_ours(&work.key);
    if !ours {
        dropped.push(work.key.clone());
    }
    ours
}

/// Calls that leave within a time, at least two.
fn calls_within(time: Duration, tps: f64) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
    let calls = (tps * time.as_secs_f64()).ceil().clamp(2.0, 10_000.0) as usize;
    calls
}
