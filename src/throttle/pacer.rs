//! The pacer hands out permits to call the key API, in order, never faster than
//! the configured rate.
//!
//! A ready-made limiter does not fit: `governor` lets a full burst through at
//! the start and after each idle moment, is not first-come-first-served, can't
//! change its rate and knows no moment before which nothing may leave. Here a
//! single schedule answers all of that, and time lost to a late timer is won
//! back within a fraction of the allowed burst.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use super::window::Schedule as Windows;
use crate::config::values::Tps;

/// The share of the allowed burst that the schedule uses to win back late
/// time. The rest absorbs the delay between a permit and its packet.
const BURST_SHARE_USED: f64 = 0.75;
/// A timer is late by a millisecond or two. Whatever is made up beyond that only
/// brings calls closer to the ceiling, where one delayed packet would break it.
const MOST_MADE_UP: Duration = Duration::from_millis(3);

/// What keeps the next call from leaving right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// The rate.
    Rate,
    /// The API asked for a pause by `Retry-After`.
    RetryAfter,
    /// No window is open.
    Window,
}

impl fmt::Display for Waiting {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Rate => "tps",
            Self::RetryAfter => "retry-after",
            Self::Window => "window",
        })
    }
}

/// The moments at which calls may leave. Pure: it is told the time.
#[derive(Debug)]
struct Schedule {
    /// The earliest moment of the next call, were all calls on time.
    next: Instant,
    period: Duration,
    /// How far a late call may be made up for.
    slack: Duration,
}

impl Schedule {
    fn new(tps: Tps, first: Instant) -> Self {
        let period = 1.0 / tps.per_second();
        let burst = (tps.per_second() / 100.0).max(1.0);
        Self {
            next: first,
            period: Duration::from_secs_f64(period),
            slack: Duration::from_secs_f64(period * burst * BURST_SHARE_USED).min(MOST_MADE_UP),
        }
    }

    /// When the next call may leave, given that none may before `barrier`.
    fn earliest(&self, now: Instant, barrier: Instant) -> Instant {
        let made_up = now.checked_sub(self.slack).unwrap_or(now);
        self.next.max(made_up).max(barrier)
    }

    fn take(&mut self, now: Instant, barrier: Instant) {
        self.next = self.earliest(now, barrier) + self.period;
    }
}

/// Tells the time of day; tests bind it to tokio's paused clock.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// Hands out permits in the order in which they were asked for.
pub struct Pacer {
    /// Locked by the one caller whose turn it is; tokio's mutex is fair, which
    /// makes the queue first come, first served.
    turn: Mutex<Schedule>,
    /// No call leaves before this moment. Written by whoever receives a
    /// `Retry-After`, read by the caller whose turn it is.
    barrier: watch::Sender<Instant>,
    windows: Option<Windows>,
    /// Callers stop this long before a window ends, so that no call is in
    /// flight at its end.
    longest_call: Duration,
    clock: Clock,
    queued: AtomicUsize,
    /// Milliseconds since the Unix epoch at which the closed window opens; 0: open.
    opens_at: AtomicU64,
}

impl fmt::Debug for Pacer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Pacer").field("turn", &self.turn).finish_non_exhaustive()
    }
}

impl Pacer {
    /// A pacer whose first permit is good after `first_wait` (at least one
    /// period, so that a restart can't add a call to the one just made).
    pub fn new(tps: Tps, first_wait: Duration, windows: Option<Windows>, longest_call: Duration) -> Self {
        Self::with_clock(tps, first_wait, windows, longest_call, Arc::new(Timestamp::now))
    }

    fn with_clock(
        tps: Tps,
        first_wait: Duration,
        windows: Option<Windows>,
        longest_call: Duration,
        clock: Clock,
    ) -> Self {
        let now = Instant::now();
        let period = Duration::from_secs_f64(1.0 / tps.per_second());
        Self {
            turn: Mutex::new(Schedule::new(tps, now + first_wait.max(period))),
            barrier: watch::Sender::new(now),
            windows,
            longest_call,
            clock,
            queued: AtomicUsize::new(0),
            opens_at: AtomicU64::new(0),
        }
    }

    /// Waits for this caller's turn. Dropping the future gives the turn back
    /// and costs nothing.
    pub async fn permit(&self) {
        let _queued = Queued::enter(&self.queued);
        let mut schedule = self.turn.lock().await;
        loop {
            let now = Instant::now();
            let barrier = *self.barrier.borrow();
            let at = schedule.earliest(now, barrier).max(now + self.until_window_opens());
            if at <= now {
                schedule.take(now, barrier);
                return;
            }
            // Barriers and windows may move while we sleep, hence the loop.
            tokio::time::sleep_until(at).await;
        }
    }

    /// Lets nothing leave for `pause` from now; a longer pause already asked
    /// for stays.
    pub fn hold_for(&self, pause: Duration) {
        let until = Instant::now() + pause;
        self.barrier.send_if_modified(|barrier| {
            let later = until > *barrier;
            if later {
                *barrier = until;
            }
            later
        });
    }

    /// What the callers in the queue wait for; `None` where nobody waits.
    pub fn waiting(&self) -> Option<Waiting> {
        if self.queued.load(Ordering::Relaxed) == 0 {
            None
        } else if self.opens_at().is_some() {
            Some(Waiting::Window)
        } else if *self.barrier.borrow() > Instant::now() {
            Some(Waiting::RetryAfter)
        } else {
            Some(Waiting::Rate)
        }
    }

    /// When the next window opens, while none is open.
    pub fn opens_at(&self) -> Option<Timestamp> {
        let millisecond = i64::try_from(self.opens_at.load(Ordering::Relaxed)).ok()?;
        (millisecond > 0).then(|| Timestamp::from_millisecond(millisecond).ok()).flatten()
    }

    fn until_window_opens(&self) -> Duration {
        let Some(windows) = &self.windows else { return Duration::ZERO };
        let now = (self.clock)();
        let opens = windows.next_opening(now, self.longest_call);
        let wait = Duration::try_from(opens.duration_since(now)).unwrap_or_default();
        let shown = if wait.is_zero() { 0 } else { u64::try_from(opens.as_millisecond()).unwrap_or(0) };
        self.opens_at.store(shown, Ordering::Relaxed);
        wait
    }
}

/// Counts a waiting caller for as long as it lives, cancelled or not.
struct Queued<'a>(&'a AtomicUsize);

impl<'a> Queued<'a> {
    fn enter(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tps(value: f64) -> Tps {
        Tps::new(value).expect("a valid rate")
    }

    /// The most calls in any window of the given length, both ends included.
    fn most_within(times: &[Instant], length: Duration) -> usize {
        times
            .iter()
            .enumerate()
            .map(|(first, start)| times[first..].iter().take_while(|time| **time - *start <= length).count())
            .max()
            .unwrap_or(0)
    }

    async fn run(pacer: &Pacer, seconds: u64) -> Vec<Instant> {
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut times = Vec::new();
        while tokio::time::timeout_at(end, pacer.permit()).await.is_ok() {
            times.push(Instant::now());
        }
        times
    }

    fn ceiling(rate: f64, seconds: f64) -> usize {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small positive numbers")]
        let calls = ((rate * seconds).ceil() + (rate / 100.0).max(1.0)) as usize;
        calls
    }

    #[tokio::test(start_paused = true)]
    async fn the_ceiling_holds_and_is_used_at_every_rate() {
        for rate in [0.5, 1.0, 10.0, 50.0, 200.0, 1000.0] {
            let pacer = Pacer::new(tps(rate), Duration::ZERO, None, Duration::ZERO);
            let times = run(&pacer, 20).await;
            assert!(times.len() as f64 >= 0.99 * rate * 20.0 - 1.0, "{rate}: {}", times.len());
            for seconds in [1, 3, 10] {
                let most = most_within(&times, Duration::from_secs(seconds));
                assert!(most <= ceiling(rate, seconds as f64), "{rate}: {most} in {seconds} s");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_saved_up_at_the_start_or_while_idle() {
        let pacer = Pacer::new(tps(10.0), Duration::ZERO, None, Duration::ZERO);
        tokio::time::sleep(Duration::from_secs(60)).await;
        let times = run(&pacer, 2).await;
        assert!(most_within(&times, Duration::from_secs(1)) <= 11);
        tokio::time::sleep(Duration::from_secs(60)).await;
        let times = run(&pacer, 2).await;
        assert!(most_within(&times, Duration::from_secs(1)) <= 11);
    }

    #[tokio::test(start_paused = true)]
    async fn a_takeover_waits_before_its_first_call() {
        let start = Instant::now();
        let pacer = Pacer::new(tps(100.0), Duration::from_secs(1), None, Duration::ZERO);
        pacer.permit().await;
        assert!(start.elapsed() >= Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_hold_stops_everybody_and_is_not_made_up_for() {
        let pacer = Pacer::new(tps(10.0), Duration::ZERO, None, Duration::ZERO);
        pacer.permit().await;
        let held = Instant::now();
        pacer.hold_for(Duration::from_secs(3));
        pacer.hold_for(Duration::from_secs(1));
        let times = run(&pacer, 6).await;
        assert!(times[0] - held >= Duration::from_secs(3));
        assert!(most_within(&times, Duration::from_secs(1)) <= 11);
    }

    #[tokio::test(start_paused = true)]
    async fn permits_come_in_the_order_asked_for() {
        let pacer = Arc::new(Pacer::new(tps(10.0), Duration::ZERO, None, Duration::ZERO));
        let (sender, mut receiver) = tokio::sync::mpsc::channel(64);
        for number in 0..32 {
            let (pacer, sender) = (pacer.clone(), sender.clone());
            tokio::spawn(async move {
                pacer.permit().await;
                sender.send(number).await.expect("the receiver lives");
            });
            tokio::task::yield_now().await;
        }
        drop(sender);
        let mut order = Vec::new();
        while let Some(number) = receiver.recv().await {
            order.push(number);
        }
        assert_eq!(order, (0..32).collect::<Vec<_>>());
    }

    #[tokio::test(start_paused = true)]
    async fn no_call_leaves_outside_a_window() {
        let begin: Timestamp = "2026-03-01T05:59:50Z".parse().expect("a time");
        let origin = Instant::now();
        let clock: Clock =
            Arc::new(move || begin + jiff::SignedDuration::try_from(origin.elapsed()).expect("a short time"));
        let windows =
            Windows::new(vec!["01:00-06:00".parse().expect("a window")], "UTC".parse().expect("UTC"));
        let pacer =
            Pacer::with_clock(tps(10.0), Duration::ZERO, windows, Duration::from_secs(5), clock.clone());
        let mut last = clock();
        for _ in 0..60 {
            pacer.permit().await;
            let now = clock();
            let opened = "2026-03-02T01:00:00Z".parse::<Timestamp>().expect("a time");
            let closing = "2026-03-01T05:59:55Z".parse::<Timestamp>().expect("a time");
            assert!(now <= closing || now >= opened, "{now}");
            last = now;
        }
        assert!(last > "2026-03-02T01:00:00Z".parse().expect("a time"));
    }
}
