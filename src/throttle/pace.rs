//! How fast documents may be copied: so many a second, and none while something
//! holds.
//!
//! Work is let in piece by piece. A piece that has begun is not slowed; the one
//! after it waits until the rate has made room for what was let in so far.
//! Nothing is made up for after a pause.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::waiting::Waiting;

/// Documents per piece while the database was in trouble lately.
const SPARING_PIECE: u64 = 20_000;
/// How long after trouble pieces are small.
const SPARING: Duration = Duration::from_secs(60);
/// No piece has more bytes than this, about: some seconds of work.
const BYTES_PER_PIECE: u64 = 128 << 20;

/// What may change while work is under way.
#[derive(Debug, Clone, Default, PartialEq)]
struct Order {
    holding: BTreeSet<Waiting>,
    /// Documents per second; 0 means no limit.
    rate: u32,
}

/// Lets pieces of work in; shared by all workers.
#[derive(Debug)]
pub struct Pace {
    order: watch::Sender<Order>,
    /// When the next piece may begin.
    next: Mutex<Instant>,
    /// Until when somebody waits for the rate.
    waited_until: Mutex<Instant>,
    /// Until when small pieces are better: the database was in trouble lately.
    spared_until: Mutex<Instant>,
    /// Whether there is nothing to do.
    is_idle: AtomicBool,
    /// Changes that were applied, for whoever wants to know how fast it goes.
    applied: AtomicU64,
}

impl Pace {
    /// A pace of so many documents a second; 0 means no limit.
    pub fn new(rate: u32) -> Self {
        let now = Instant::now();
        Self {
            order: watch::Sender::new(Order { rate, ..Order::default() }),
            next: Mutex::new(now),
            waited_until: Mutex::new(now),
            spared_until: Mutex::new(now),
            is_idle: AtomicBool::new(false),
            applied: AtomicU64::new(0),
        }
    }

    /// Sets the documents per second; 0 means no limit.
    pub fn set_rate(&self, rate: u32) {
        let changed = self.order.send_if_modified(|order| {
            let before = std::mem::replace(&mut order.rate, rate);
            before != rate
        });
        if changed {
            // What the former rate had reserved means nothing to the new one.
            *lock(&self.next) = Instant::now();
        }
    }

    /// Documents per second; 0 means no limit.
    pub fn rate(&self) -> u32 {
        self.order.borrow().rate
    }

    /// Lets no further piece in for this reason, or no longer for it.
    pub fn hold(&self, reason: Waiting, holds: bool) {
        if reason != Waiting::Paused {
            *lock(&self.spared_until) = Instant::now() + SPARING;
        }
        self.order.send_if_modified(|order| {
            if holds { order.holding.insert(reason) } else { order.holding.remove(&reason) }
        });
    }

    /// The first reason for which nothing is let in.
    pub fn held_by(&self) -> Option<Waiting> {
        self.order.borrow().holding.first().copied()
    }

    /// What keeps the work from being faster right now, where that is us.
    pub fn limit(&self) -> Option<Waiting> {
        let waits = Instant::now() < *lock(&self.waited_until);
        self.held_by().or(waits.then_some(Waiting::Documents))
    }

    /// What keeps the work from being faster right now, in one word.
    pub fn limited_by(&self) -> &'static str {
        match self.limit() {
            Some(limit) => limit.as_str(),
            None if self.is_idle.load(Ordering::Relaxed) => "source",
            None => "database",
        }
    }

    /// Takes note of whether there is anything to do.
    pub fn set_idle(&self, is_idle: bool) {
        self.is_idle.store(is_idle, Ordering::Relaxed);
    }

    /// Takes note of changes that were applied.
    pub fn count_applied(&self, changes: usize) {
        self.applied.fetch_add(changes as u64, Ordering::Relaxed);
    }

    /// Changes that were applied so far.
    pub fn applied(&self) -> u64 {
        self.applied.load(Ordering::Relaxed)
    }

    /// Documents for the next piece of one of so many workers, given their
    /// average size; `None` where there is no reason to cut pieces. A piece can't
    /// be slowed once it has begun, so that small ones follow the rate closely
    /// and let trouble be noticed soon.
    pub fn piece(&self, workers: usize, average_bytes: u64) -> Option<u64> {
        let workers = u64::try_from(workers).unwrap_or(1).max(1);
        let by_rate = match u64::from(self.rate()) {
            0 => None,
            rate => Some((rate / workers).max(1)),
        };
        let by_bytes = BYTES_PER_PIECE.checked_div(average_bytes).map(|documents| documents.max(1));
        let by_trouble = (Instant::now() < *lock(&self.spared_until)).then_some(SPARING_PIECE);
        [by_rate, by_bytes, by_trouble].into_iter().flatten().min()
    }

    /// Waits until nothing holds, or `stop`.
    pub async fn free(&self, stop: &CancellationToken) {
        let mut order = self.order.subscribe();
        tokio::select! {
            // The sender is ours, so that this can't fail.
            _ = order.wait_for(|order| order.holding.is_empty()) => {}
            () = stop.cancelled() => {}
        }
    }

    /// Waits until the rate lets a piece of so many documents begin; false where
    /// something holds, or `stop` came first.
    pub async fn turn(&self, documents: u64, stop: &CancellationToken) -> bool {
        let mut order = self.order.subscribe();
        while !stop.is_cancelled() {
            let Order { holding, rate } = order.borrow_and_update().clone();
            if !holding.is_empty() {
                return false;
            }
            match self.reserve(documents, rate, Instant::now()) {
                None => return true,
                Some(moment) => {
                    *lock(&self.waited_until) = moment;
                    tokio::select! {
                        () = tokio::time::sleep_until(moment) => {}
                        _ = order.changed() => {}
                        () = stop.cancelled() => {}
                    }
                }
            }
        }
        false
    }

    /// Reserves room for so many documents, or tells when to ask again.
    fn reserve(&self, documents: u64, rate: u32, now: Instant) -> Option<Instant> {
        let mut next = lock(&self.next);
        if rate == 0 {
            return None;
        }
        if *next > now {
            return Some(*next);
        }
        *next = now + time_of(documents, rate);
        None
    }
}

/// The time that so many documents take at that rate.
fn time_of(documents: u64, rate: u32) -> Duration {
    let nanoseconds = u128::from(documents) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

/// A holder of the lock that panicked has left nothing half-done in it.
fn lock(instant: &Mutex<Instant>) -> std::sync::MutexGuard<'_, Instant> {
    instant.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pieces_keep_to_the_rate_together() {
        let (pace, stop) = (Pace::new(1000), CancellationToken::new());
        let start = Instant::now();
        for _ in 0..10 {
            assert!(pace.turn(500, &stop).await);
        }
        let took = start.elapsed();
        assert!((4_490..4_600).contains(&took.as_millis()), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_nothing_waits() {
        let (pace, stop) = (Pace::new(0), CancellationToken::new());
        let start = Instant::now();
        for _ in 0..100 {
            assert!(pace.turn(1_000_000, &stop).await);
        }
        assert_eq!((start.elapsed(), pace.limit()), (Duration::ZERO, None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_rate_holds_at_once() {
        let (pace, stop) = (std::sync::Arc::new(Pace::new(1)), CancellationToken::new());
        assert!(pace.turn(3600, &stop).await);
        let waiting = tokio::spawn({
            let (pace, stop) = (pace.clone(), stop.clone());
            async move { pace.turn(1, &stop).await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(pace.limit(), Some(Waiting::Documents));
        let start = Instant::now();
        pace.set_rate(1000);
        assert!(waiting.await.expect("no panic"));
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_hold_ends_the_wait_for_the_rate() {
        let (pace, stop) = (std::sync::Arc::new(Pace::new(1)), CancellationToken::new());
        assert!(pace.turn(1_000_000, &stop).await);
        let waiting = tokio::spawn({
            let (pace, stop) = (pace.clone(), stop.clone());
            async move { pace.turn(1, &stop).await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        pace.hold(Waiting::Paused, true);
        assert!(!waiting.await.expect("no panic"));
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_let_in_while_something_holds() {
        let (pace, stop) = (std::sync::Arc::new(Pace::new(0)), CancellationToken::new());
        pace.hold(Waiting::ReplicationLag, true);
        pace.hold(Waiting::Paused, true);
        assert_eq!(pace.limit(), Some(Waiting::Paused));
        assert!(!pace.turn(1, &stop).await);
        let waiting = tokio::spawn({
            let (pace, stop) = (pace.clone(), stop.clone());
            async move { pace.free(&stop).await }
        });
        pace.hold(Waiting::Paused, false);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(!waiting.is_finished(), "the lag holds still");
        pace.hold(Waiting::ReplicationLag, false);
        waiting.await.expect("no panic");
        assert!(pace.turn(1, &stop).await);
    }

    #[tokio::test(start_paused = true)]
    async fn pieces_are_cut_for_a_rate_large_documents_and_trouble() {
        let pace = Pace::new(0);
        assert_eq!((pace.piece(2, 100), pace.piece(2, 0)), (Some(1_342_177), None));
        assert_eq!((pace.piece(2, 1 << 20), pace.piece(2, 1 << 40)), (Some(128), Some(1)));
        pace.set_rate(1000);
        assert_eq!((pace.piece(2, 100), pace.piece(64, 100)), (Some(500), Some(15)));
        pace.set_rate(1);
        assert_eq!(pace.piece(2, 100), Some(1));
        pace.set_rate(0);
        pace.hold(Waiting::Paused, true);
        assert_eq!(pace.piece(2, 0), None, "a pause is no trouble");
        pace.hold(Waiting::ReplicationLag, true);
        assert_eq!(pace.piece(2, 0), Some(SPARING_PIECE));
        pace.hold(Waiting::ReplicationLag, false);
        tokio::time::advance(SPARING + Duration::from_secs(1)).await;
        assert_eq!(pace.piece(2, 0), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_ends_every_wait() {
        let (pace, stop) = (std::sync::Arc::new(Pace::new(1)), CancellationToken::new());
        assert!(pace.turn(1_000_000, &stop).await);
        let waiting = tokio::spawn({
            let (pace, stop) = (pace.clone(), stop.clone());
            async move { pace.turn(1, &stop).await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        stop.cancel();
        assert!(!waiting.await.expect("no panic"));
    }
}
