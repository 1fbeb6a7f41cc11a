//! The pacer hands out permits to call the key API, in order, never faster than
//! the configured rate.
//!
//! A ready-made limiter does not fit: `governor` lets a full burst through at
//! the start and after each idle moment, is not first-come-first-served, can't
//! change its rate and knows no moment before which nothing may leave. Here a
//! single schedule answers all of that, and time lost to a late timer is won
//! back within a fraction of the allowed burst.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::Date;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use super::daily::DailyBudget;
use super::reserved::Reserved;
pub use super::waiting::Waiting;
use super::window::{Schedule as Windows, TimeZoneName};
use crate::config::values::Tps;
use crate::job::budget::Budget;

/// The share of the allowed burst that the schedule uses to win back late
/// time. The rest absorbs the delay between a permit and its packet.
const BURST_SHARE_USED: f64 = 0.75;
/// A timer is late by a millisecond or two. Whatever is made up beyond that only
/// brings calls closer to the ceiling, where one delayed packet would break it.
const MOST_MADE_UP: Duration = Duration::from_millis(3);
/// The share of the allowed burst by which a reserved moment may be used late.
/// A moment that passes is lost as a whole, hence more than for our own schedule.
const LATE_SHARE: f64 = 0.4;
/// Moments of several workers are so much further apart than the ceiling asks
/// for: each has delays of its own on the way to the API, and they add up.
const APART: f64 = 1.006;
/// How soon a reservation that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// No sleep is longer: the clock of the machine may be set meanwhile.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// What may change while calls are made.
#[derive(Debug, Clone)]
struct Controls {
    /// The ceiling.
    tps: Tps,
    /// Which part of the ceiling is used now, and why not all of it.
    share: f64,
    lowered_by: Waiting,
    /// No call leaves before this moment.
    barrier: Instant,
    /// No call leaves while there is any.
    pauses: Vec<Waiting>,
    /// Where the moments of calls come from, when other workers share the ceiling.
    timetable: Option<Budget>,
}

impl Controls {
    fn period(&self) -> Duration {
        Duration::from_secs_f64(1.0 / (self.tps.per_second() * self.share))
    }

    /// The distance of moments that several workers share.
    fn shared_period(&self) -> Duration {
        self.period().mul_f64(APART)
    }

    /// How far a late call may be made up for.
    fn slack(&self) -> Duration {
        self.burst().mul_f64(BURST_SHARE_USED).min(MOST_MADE_UP)
    }

    /// How late a reserved moment may be used.
    fn lateness(&self) -> Duration {
        self.burst().mul_f64(LATE_SHARE)
    }

    /// The burst that the ceiling allows, in time.
    fn burst(&self) -> Duration {
        self.period().mul_f64((self.tps.per_second() / 100.0).max(1.0))
    }
}

/// The moments at which calls may leave.
#[derive(Debug)]
struct Schedule {
    /// The moment of the last call, had it been on time.
    last: Instant,
    /// The first call may not leave earlier.
    first: Instant,
    reserved: Reserved,
}

impl Schedule {
    /// When the next call may leave.
    fn earliest(&self, now: Instant, controls: &Controls) -> Instant {
        let made_up = now.checked_sub(controls.slack()).unwrap_or(now);
        (self.last + controls.period()).max(self.first).max(made_up).max(controls.barrier)
    }

    fn take(&mut self, now: Instant, controls: &Controls) {
        self.last = self.earliest(now, controls);
    }
}

/// Tells the time of day; tests bind it to tokio's paused clock.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// Hands out permits in the order in which they were asked for.
pub struct Pacer {
    /// Locked by the one caller whose turn it is; tokio's mutex is fair, which
    /// makes the queue first come, first served.
    turn: Mutex<Schedule>,
    /// Written by whoever changes something, read by the caller whose turn it is.
    controls: watch::Sender<Controls>,
    windows: Option<Windows>,
    daily: std::sync::Mutex<DailyBudget>,
    /// Callers stop this long before a window ends, so that no call is in
    /// flight at its end.
    longest_call: Duration,
    clock: Clock,
    queued: AtomicUsize,
    /// Milliseconds since the Unix epoch at which the closed window opens; 0: open.
    opens_at: AtomicU64,
    /// Whether it is the day's calls that are used up, rather than a window closed.
    is_day_used_up: AtomicBool,
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

    /// Limits the calls of a day.
    #[must_use]
    pub fn with_daily_budget(self, daily: DailyBudget) -> Self {
        Self { daily: std::sync::Mutex::new(daily), ..self }
    }

    /// Today and the calls it has seen, where they are limited, with those that
    /// may leave within so many seconds.
    pub fn calls_of_day(&self, seconds_ahead: u64) -> Option<(Date, u64)> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is above zero")]
        let ahead = (self.tps().per_second() * seconds_ahead as f64).ceil() as u64;
        self.daily().calls_of_day_with((self.clock)(), ahead)
    }

    fn with_clock(
        tps: Tps,
        first_wait: Duration,
        windows: Option<Windows>,
        longest_call: Duration,
        clock: Clock,
    ) -> Self {
        let now = Instant::now();
        let controls = Controls {
            tps,
            share: 1.0,
            lowered_by: Waiting::Rate,
            barrier: now,
            pauses: Vec::new(),
            timetable: None,
        };
        Self {
            turn: Mutex::new(Schedule { last: now, first: now + first_wait, reserved: Reserved::default() }),
            controls: watch::Sender::new(controls),
            windows,
            longest_call,
            clock,
            daily: std::sync::Mutex::new(DailyBudget::new(0, &TimeZoneName::default(), None)),
            queued: AtomicUsize::new(0),
            opens_at: AtomicU64::new(0),
            is_day_used_up: AtomicBool::new(false),
        }
    }

    /// Waits for this caller's turn. Dropping the future gives the turn back
    /// and costs nothing.
    pub async fn permit(&self) {
        let _queued = Queued::enter(&self.queued);
        let mut schedule = self.turn.lock().await;
        let mut changes = self.controls.subscribe();
        loop {
            let controls = changes.borrow_and_update().clone();
            let now = Instant::now();
            let open = schedule.first.max(controls.barrier).max(now + self.until_window_opens());
            let at = match &controls.timetable {
                _ if !controls.pauses.is_empty() => now + LONGEST_SLEEP,
                None => schedule.earliest(now, &controls).max(open),
                Some(_) if open > now => open,
                Some(budget) => tokio::select! {
                    moment = schedule.reserved.next(budget, controls.shared_period(), controls.lateness()) => match moment {
                        Ok(moment) => moment,
                        Err(error) => {
                            tracing::warn!(%error, "no call could be reserved");
                            now + RETRY
                        }
                    },
                    _changed = changes.changed() => continue,
                },
            };
            let at = if at <= Instant::now() { at.max(now + self.until_day_allows()) } else { at };
            if at <= Instant::now() {
                match &controls.timetable {
                    None => schedule.take(now, &controls),
                    Some(budget) => schedule.reserved.take(budget),
                }
                return;
            }
            tokio::select! {
                // The clock of the machine may be set, and windows with it: look again.
                () = tokio::time::sleep_until(at.min(now + LONGEST_SLEEP)) => {}
                // The sender lives as long as the pacer.
                _changed = changes.changed() => {}
            }
        }
    }

    /// From here on calls leave at the moments of a timetable that all workers
    /// of a job share.
    pub fn keep_to(&self, timetable: Budget) {
        self.controls.send_modify(|controls| controls.timetable = Some(timetable));
    }

    /// The ceiling in calls per second.
    pub fn tps(&self) -> Tps {
        self.controls.borrow().tps
    }

    /// Sets another ceiling, from the next call on.
    pub fn set_tps(&self, tps: Tps) {
        self.controls.send_if_modified(|controls| {
            let changed = controls.tps != tps;
            controls.tps = tps;
            changed
        });
    }

    /// Uses only a share of the ceiling (above 0, at most 1), for the reason given.
    pub fn use_share(&self, share: f64, reason: Waiting) {
        let share = share.clamp(f64::MIN_POSITIVE, 1.0);
        self.controls.send_if_modified(|controls| {
            let changed = (controls.share - share).abs() > f64::EPSILON;
            (controls.share, controls.lowered_by) = (share, reason);
            changed
        });
    }

    /// Stops calls for a reason, or no longer for this reason.
    pub fn pause(&self, reason: Waiting, paused: bool) {
        self.controls.send_if_modified(|controls| {
            let changed = controls.pauses.contains(&reason) != paused;
            controls.pauses.retain(|other| *other != reason);
            if paused {
                controls.pauses.push(reason);
            }
            changed
        });
    }

    /// Why calls are stopped, if they are: by an operator or for the sake of
    /// the database, which should be spared other work too.
    pub fn paused_by(&self) -> Option<Waiting> {
        self.controls.borrow().pauses.iter().min().copied()
    }

    /// Lets nothing leave for `pause` from now; a longer pause already asked
    /// for stays.
    pub fn hold_for(&self, pause: Duration) {
        let until = Instant::now() + pause;
        self.controls.send_if_modified(|controls| {
            let later = until > controls.barrier;
            if later {
                controls.barrier = until;
            }
            later
        });
    }

    /// What the callers in the queue wait for; `None` where nobody waits.
    pub fn waiting(&self) -> Option<Waiting> {
        if self.queued.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let controls = self.controls.borrow();
        Some(if let Some(reason) = controls.pauses.iter().min() {
            *reason
        } else if self.opens_at().is_some() && self.is_day_used_up.load(Ordering::Relaxed) {
            Waiting::DailyLimit
        } else if self.opens_at().is_some() {
            Waiting::Window
        } else if controls.barrier > Instant::now() {
            Waiting::RetryAfter
        } else {
            controls.lowered_by
        })
    }

    /// When calls may be made again, while no window is open or the day's calls
    /// are used up.
    pub fn opens_at(&self) -> Option<Timestamp> {
        let millisecond = i64::try_from(self.opens_at.load(Ordering::Relaxed)).ok()?;
        (millisecond > 0).then(|| Timestamp::from_millisecond(millisecond).ok()).flatten()
    }

    fn until_window_opens(&self) -> Duration {
        let Some(windows) = &self.windows else { return Duration::ZERO };
        let now = (self.clock)();
        let opens = windows.next_opening(now, self.longest_call);
        self.wait_for(now, opens, false)
    }

    /// Counts a call of today; zero where it may be made.
    fn until_day_allows(&self) -> Duration {
        let now = (self.clock)();
        match self.daily().take(now) {
            Ok(()) => self.wait_for(now, now, false),
            Err(tomorrow) => self.wait_for(now, tomorrow, true),
        }
    }

    fn wait_for(&self, now: Timestamp, opens: Timestamp, is_day_used_up: bool) -> Duration {
        let wait = Duration::try_from(opens.duration_since(now)).unwrap_or_default();
        let shown = if wait.is_zero() { 0 } else { u64::try_from(opens.as_millisecond()).unwrap_or(0) };
        self.is_day_used_up.store(is_day_used_up, Ordering::Relaxed);
        self.opens_at.store(shown, Ordering::Relaxed);
        wait
    }

    fn daily(&self) -> MutexGuard<'_, DailyBudget> {
        // Plain counts: a panic elsewhere can't leave them half changed.
        self.daily.lock().unwrap_or_else(PoisonError::into_inner)
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
    async fn another_rate_holds_from_the_next_call_on() {
        let pacer = Arc::new(Pacer::new(tps(0.01), Duration::ZERO, None, Duration::ZERO));
        let waiting = tokio::spawn({
            let pacer = pacer.clone();
            async move { pacer.permit().await }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        let changed = Instant::now();
        pacer.set_tps(tps(100.0));
        waiting.await.expect("no panic");
        assert!(changed.elapsed() < Duration::from_millis(50), "{:?}", changed.elapsed());
        let times = run(&pacer, 2).await;
        assert!(most_within(&times, Duration::from_secs(1)) <= 101);
        pacer.set_tps(tps(2.0));
        let times = run(&pacer, 10).await;
        assert!((19..=20).contains(&times.len()), "{}", times.len());
        pacer.use_share(0.5, Waiting::ApiLatency);
        let times = run(&pacer, 10).await;
        assert!((9..=10).contains(&times.len()), "{}", times.len());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_ends_only_when_every_reason_is_gone() {
        let pacer = Arc::new(Pacer::new(tps(10.0), Duration::ZERO, None, Duration::ZERO));
        pacer.pause(Waiting::ReplicationLag, true);
        pacer.pause(Waiting::Paused, true);
        let waiting = tokio::spawn({
            let pacer = pacer.clone();
            async move { pacer.permit().await }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(pacer.waiting(), Some(Waiting::Paused));
        pacer.pause(Waiting::Paused, false);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(pacer.waiting(), Some(Waiting::ReplicationLag));
        assert!(!waiting.is_finished());
        pacer.pause(Waiting::ReplicationLag, false);
        tokio::time::timeout(Duration::from_millis(1), waiting).await.expect("in time").expect("no panic");
        let times = run(&pacer, 3).await;
        assert!(most_within(&times, Duration::from_secs(1)) <= 11, "nothing was saved up");
    }

    #[tokio::test(start_paused = true)]
    async fn in_the_nights_of_both_clock_changes_no_call_leaves_outside() {
        let zone: TimeZoneName = "Europe/Berlin".parse().expect("a zone");
        // In spring 02:00 becomes 03:00, in autumn 03:00 becomes 02:00 again.
        for (begin, minutes) in [("2026-03-29T00:50:00+01:00", 90_u64), ("2026-10-25T01:50:00+02:00", 150)] {
            let begin: Timestamp = begin.parse().expect("a time");
            let origin = Instant::now();
            let clock: Clock = Arc::new(move || {
                begin + jiff::SignedDuration::try_from(origin.elapsed()).expect("a short time")
            });
            let windows = Windows::new(vec!["01:30-02:30".parse().expect("a window")], zone.clone());
            let longest_call = Duration::from_secs(5);
            let pacer = Pacer::with_clock(tps(0.1), Duration::ZERO, windows, longest_call, clock.clone());
            let times = run(&pacer, minutes * 60).await;
            assert!(!times.is_empty(), "the window opened");
            for time in times {
                let at = begin + jiff::SignedDuration::try_from(time - origin).expect("a short time");
                for moment in [at, at + jiff::SignedDuration::from_secs(4)] {
                    let wall = moment.to_zoned(zone.zone().clone()).time();
                    let open = jiff::civil::time(1, 30, 0, 0)..jiff::civil::time(2, 30, 0, 0);
                    assert!(open.contains(&wall), "a call under way at {wall}");
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_calls_of_a_day_are_counted() {
        let begin: Timestamp = "2026-03-01T23:59:50Z".parse().expect("a time");
        let origin = Instant::now();
        let clock: Clock =
            Arc::new(move || begin + jiff::SignedDuration::try_from(origin.elapsed()).expect("a short time"));
        let today = ("2026-03-01".parse().expect("a date"), 7);
        let daily = DailyBudget::new(10, &TimeZoneName::default(), Some(today));
        let pacer = Pacer::with_clock(tps(10.0), Duration::ZERO, None, Duration::ZERO, clock)
            .with_daily_budget(daily);
        let times = run(&pacer, 15).await;
        let before_midnight = times.iter().filter(|time| **time - origin < Duration::from_secs(10)).count();
        assert_eq!((before_midnight, times.len()), (3, 13));
        assert_eq!(pacer.calls_of_day(0), Some(("2026-03-02".parse().expect("a date"), 10)));
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
