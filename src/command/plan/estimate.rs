//! How long calls take, and how fast they must be. Pure: the time is always
//! given.

use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::throttle::daily::days;
use crate::throttle::window::Schedule;

/// Where calls end up on a round number, rounding must not cost another day.
const ROUNDING: f64 = 1e-9;

/// What limits calls besides their rate.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// Calls per day; 0 is no limit. Today is taken for untouched.
    pub(super) per_day: u64,
    /// Times of day at which calls may be made; `None`: always.
    pub(super) windows: Option<Schedule>,
    /// The zone of the days.
    pub(super) zone: TimeZone,
}

impl Limits {
    /// The same without windows.
    pub(super) fn nonstop(&self) -> Self {
        Self { windows: None, ..self.clone() }
    }

    fn open_time(&self, from: Timestamp, to: Timestamp) -> Duration {
        match &self.windows {
            Some(windows) => windows.open_time(from, to),
            None => Duration::try_from(to.duration_since(from)).unwrap_or_default(),
        }
    }

    /// When the last of `calls` leaves at `tps` calls per second; `None` where
    /// that is not within a hundred years.
    pub(super) fn finish(&self, now: Timestamp, calls: u64, tps: f64) -> Option<Timestamp> {
        if self.per_day == 0 {
            return self.finish_unlimited(now, calls as f64 / tps);
        }
        let mut left = calls as f64;
        for (begins, ends) in days(&self.zone, now) {
            let possible = (self.open_time(begins, ends).as_secs_f64() * tps).min(self.per_day as f64);
            if left <= possible + ROUNDING {
                return self.finish_unlimited(begins, left / tps);
            }
            left -= possible;
        }
        None
    }

    fn finish_unlimited(&self, start: Timestamp, seconds: f64) -> Option<Timestamp> {
        let needed = Duration::try_from_secs_f64(seconds).ok()?;
        match &self.windows {
            Some(windows) => windows.finish(start, needed),
            None => start.checked_add(SignedDuration::try_from(needed).ok()?).ok(),
        }
    }

    /// The lowest rate at which `calls` are made until `deadline`.
    pub(super) fn needed_tps(
        &self,
        now: Timestamp,
        deadline: Timestamp,
        calls: u64,
    ) -> Result<f64, Impossible> {
        if self.per_day == 0 {
            return lowest_rate(calls, vec![self.open_time(now, deadline).as_secs_f64()], f64::INFINITY);
        }
        let open = days(&self.zone, now)
            .take_while(|(begins, _)| *begins < deadline)
            .map(|(begins, ends)| self.open_time(begins, ends.min(deadline)).as_secs_f64());
        lowest_rate(calls, open.collect(), self.per_day as f64)
    }
}

/// Why no rate is high enough.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Impossible {
    /// No window opens in time.
    Windows,
    /// All days together allow this many calls.
    PerDay(f64),
}

impl Impossible {
    /// The key of the config to change.
    pub(super) fn key(self) -> &'static str {
        match self {
            Self::Windows => "windows",
            Self::PerDay(_) => "max_calls_per_day",
        }
    }
}

/// The lowest rate, in calls per second, at which `calls` fit into stretches of
/// so many seconds, each of which takes `most` at most.
fn lowest_rate(calls: u64, mut stretches: Vec<f64>, most: f64) -> Result<f64, Impossible> {
    let mut left = calls as f64;
    if calls == 0 {
        return Ok(0.0);
    }
    stretches.retain(|seconds| *seconds > 0.0);
    if stretches.is_empty() {
        return Err(Impossible::Windows);
    }
    let possible = stretches.len() as f64 * most;
    if left > possible {
        return Err(Impossible::PerDay(possible));
    }
    // The longest stretch is the first to reach its most; what it does not take
    // is left for the others.
    stretches.sort_by(|one, other| other.total_cmp(one));
    let mut seconds: f64 = stretches.iter().sum();
    for longest in stretches {
        let rate = left / seconds;
        if rate * longest <= most + ROUNDING {
            return Ok(rate);
        }
        left -= most;
        seconds -= longest;
    }
    Err(Impossible::PerDay(possible))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn limits(per_day: u64, windows: &[&str], zone: &str) -> Limits {
        let windows = windows.iter().map(|window| window.parse().expect("a window")).collect();
        let zone: crate::throttle::window::TimeZoneName = zone.parse().expect("a zone");
        Limits { per_day, zone: zone.zone().clone(), windows: Schedule::new(windows, zone) }
    }

    #[track_caller]
    fn close(found: Result<f64, Impossible>, expected: f64) {
        let found = found.expect("possible");
        assert!((found - expected).abs() < expected * 1e-9 + 1e-12, "{found} {expected}");
    }

    #[test]
    fn ten_million_calls_at_ten_a_second_take_eleven_and_a_half_days() {
        let now = time("2026-11-22T12:00:00+09:00");
        let nights = limits(0, &["22:00-06:00"], "Asia/Seoul");
        assert_eq!(nights.finish(now, 10_000_000, 10.0), Some(time("2026-12-27T03:46:40+09:00")));
        let end = nights.nonstop().finish(now, 10_000_000, 10.0).expect("an end");
        assert_eq!(end.duration_since(now), SignedDuration::from_secs(1_000_000));
    }

    #[test]
    fn a_daily_limit_lets_the_rest_wait_for_the_next_days() {
        let now = time("2026-11-22T12:00:00+09:00");
        let limited = limits(100, &[], "Asia/Seoul");
        let end = |calls| limited.finish(now, calls, 10.0).expect("an end");
        assert_eq!(end(0), now);
        assert_eq!(end(100), time("2026-11-22T12:00:10+09:00"));
        assert_eq!(end(101), time("2026-11-23T00:00:00.1+09:00"));
        assert_eq!(end(250), time("2026-11-24T00:00:05+09:00"));
        assert_eq!(end(300), time("2026-11-24T00:00:10+09:00"));
        // A limit that the rate does not reach changes nothing.
        let loose = limits(1_000_000, &["22:00-06:00"], "Asia/Seoul");
        let free = limits(0, &["22:00-06:00"], "Asia/Seoul");
        assert_eq!(loose.finish(now, 10_000_000, 10.0), free.finish(now, 10_000_000, 10.0));
    }

    #[test]
    fn a_daily_limit_and_windows_hold_together() {
        let now = time("2026-11-22T23:59:50Z");
        let both = limits(100, &["23:00-01:00"], "UTC");
        // Ten seconds of today at 5 a second, then a hundred a day.
        assert_eq!(both.finish(now, 50, 5.0), Some(time("2026-11-23T00:00:00Z")));
        assert_eq!(both.finish(now, 150, 5.0), Some(time("2026-11-23T00:00:20Z")));
        assert_eq!(both.finish(now, 160, 5.0), Some(time("2026-11-24T00:00:02Z")));
    }

    #[test]
    fn what_takes_longer_than_a_hundred_years_has_no_end() {
        let now = time("2026-11-22T12:00:00Z");
        assert_eq!(limits(1, &[], "UTC").finish(now, 100_000, 10.0), None);
        assert_eq!(limits(0, &["00:00-00:01"], "UTC").finish(now, 100_000_000, 1.0), None);
    }

    #[test]
    fn the_rate_that_a_deadline_needs_is_that_of_the_open_time() {
        let (now, deadline) = (time("2026-11-22T12:00:00+09:00"), time("2026-11-29T12:00:00+09:00"));
        let nights = limits(0, &["22:00-06:00"], "Asia/Seoul");
        close(nights.needed_tps(now, deadline, 604_800), 3.0);
        close(nights.nonstop().needed_tps(now, deadline, 604_800), 1.0);
        close(nights.needed_tps(now, deadline, 0), 0.0);
        let soon = time("2026-11-22T21:00:00+09:00");
        assert_eq!(nights.needed_tps(now, soon, 1), Err(Impossible::Windows));
        close(nights.needed_tps(now, soon, 0), 0.0);
    }

    #[test]
    fn the_rate_makes_up_for_days_that_are_full() {
        // Half an hour of today, then two whole days.
        let (now, deadline) = (time("2026-11-22T23:30:00Z"), time("2026-11-25T00:00:00Z"));
        let limited = |per_day| limits(per_day, &[], "UTC");
        // 10,000 calls on each of the long days, the rest in the half hour.
        close(limited(10_000).needed_tps(now, deadline, 20_900), 0.5);
        close(limited(10_000).needed_tps(now, deadline, 30_000), 10_000.0 / 1800.0);
        close(limited(1_000_000).needed_tps(now, deadline, 17_460), 0.1);
        assert_eq!(limited(10_000).needed_tps(now, deadline, 30_001), Err(Impossible::PerDay(30_000.0)));
    }

    #[test]
    fn the_rate_that_is_told_is_enough_and_no_higher_than_needed() {
        let now = time("2026-10-23T18:40:00Z");
        for (per_day, windows) in [
            (0, &[][..]),
            (0, &["01:00-06:00"]),
            (5000, &[]),
            (5000, &["22:00-02:30", "12:00-12:20"]),
            (700, &["23:00-23:10"]),
        ] {
            let limits = limits(per_day, windows, "Europe/Berlin");
            for (hours, calls) in [(30, 1), (75, 900), (80, 1990), (240, 4000)] {
                let deadline = now.checked_add(SignedDuration::from_hours(hours)).expect("a time");
                let Ok(tps) = limits.needed_tps(now, deadline, calls) else {
                    assert!(limits.finish(now, calls, 1e6).is_none_or(|end| end > deadline), "{limits:?}");
                    continue;
                };
                let end = |tps: f64| limits.finish(now, calls, tps).expect("an end");
                assert!(end(tps * 1.000_001) <= deadline, "{tps} {hours} {calls} {limits:?}");
                assert!(end(tps * 0.999) > deadline, "{tps} {hours} {calls} {limits:?}");
            }
        }
    }
}
