//! How much the rehearsal API lets through: a server-side limit of its own, so that a client which
//! breaks its ceiling is told so with 429, as the real API would.

use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};

/// Calls per second that are let through, and how many of them at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    quota: Quota,
}

impl RateLimit {
    /// Below it waiting for a single call takes hours; above it a nanosecond clock is too coarse.
    const CALLS_PER_SECOND: std::ops::RangeInclusive<f64> = 0.0001..=1_000_000.0;

    /// Lets `tps` calls per second through, after a quiet time `burst` at once (`None`: `tps`
    /// rounded up). In the first second that is up to `burst` and `tps` together.
    ///
    /// # Errors
    ///
    /// A message for the reader when `tps` is not a number from 0.0001 to 1,000,000.
    pub fn new(tps: f64, burst: Option<NonZeroU32>) -> Result<Self, String> {
        let refusal = || format!("--tps takes a number of calls from 0.0001 to 1000000, not {tps}");
        if !Self::CALLS_PER_SECOND.contains(&tps) {
            return Err(refusal());
        }
        let quota = Quota::with_period(Duration::from_secs_f64(1.0 / tps)).ok_or_else(refusal)?;
        Ok(Self { quota: quota.allow_burst(burst.unwrap_or_else(|| rounded_up(tps))) })
    }

    /// The limit that `--tps` and `--tps-burst` describe together.
    ///
    /// # Errors
    ///
    /// A message for the reader when there is a burst of nothing, or as for [`RateLimit::new`].
    pub fn from_options(tps: Option<f64>, burst: Option<NonZeroU32>) -> Result<Option<Self>, String> {
        match (tps, burst) {
            (Some(tps), burst) => Self::new(tps, burst).map(Some),
            (None, None) => Ok(None),
            (None, Some(_)) => Err("--tps-burst needs --tps".to_owned()),
        }
    }
}

/// The range that [`RateLimit::new`] accepts fits.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to fit")]
fn rounded_up(tps: f64) -> NonZeroU32 {
    NonZeroU32::new(tps.ceil() as u32).unwrap_or(NonZeroU32::MIN)
}

/// A [`RateLimit`] at work: remembers what it let through.
pub(crate) struct Limiter<C: Clock = DefaultClock> {
    calls: RateLimiter<NotKeyed, InMemoryState, C, NoOpMiddleware<C::Instant>>,
    clock: C,
}

impl Limiter {
    pub(crate) fn new(limit: RateLimit) -> Self {
        Self::with_clock(limit, DefaultClock::default())
    }
}

impl<C: Clock + Clone> Limiter<C> {
    fn with_clock(limit: RateLimit, clock: C) -> Self {
        Self { calls: RateLimiter::direct_with_clock(limit.quota, clock.clone()), clock }
    }

    /// Lets a call through, or says after how many whole seconds one may come again.
    pub(crate) fn admit(&self) -> Result<(), u64> {
        self.calls.check().map_err(|refusal| whole_seconds(refusal.wait_time_from(self.clock.now())))
    }
}

/// Rounded up, and never 0: `Retry-After: 0` would invite the next call at once.
fn whole_seconds(wait: Duration) -> u64 {
    let begun = u64::from(wait.subsec_nanos() > 0);
    (wait.as_secs() + begun).max(1)
}

#[cfg(test)]
mod tests {
    use governor::clock::FakeRelativeClock;

    use super::*;

    fn limiter(tps: f64, burst: u32) -> (Limiter<FakeRelativeClock>, FakeRelativeClock) {
        let clock = FakeRelativeClock::default();
        let limit = RateLimit::new(tps, NonZeroU32::new(burst)).unwrap();
        (Limiter::with_clock(limit, clock.clone()), clock)
    }

    #[test]
    fn lets_the_burst_through_and_then_says_when_to_come_back() {
        let (limiter, clock) = limiter(0.25, 3);
        for _ in 0..3 {
            assert_eq!(limiter.admit(), Ok(()));
        }
        assert_eq!(limiter.admit(), Err(4));
        clock.advance(Duration::from_millis(1500));
        assert_eq!(limiter.admit(), Err(3));
        clock.advance(Duration::from_millis(2500));
        assert_eq!(limiter.admit(), Ok(()));
    }

    #[test]
    fn the_burst_is_the_rate_rounded_up() {
        for (tps, burst) in [(0.5, 1), (2.5, 3), (10.0, 10)] {
            assert_eq!(RateLimit::new(tps, None), RateLimit::new(tps, NonZeroU32::new(burst)));
        }
    }

    #[test]
    fn lets_the_rate_through_over_time() {
        for (tps, burst, in_ten_seconds) in [(10.0, 1, 100), (10.0, 10, 109), (2.5, 1, 25)] {
            let (limiter, clock) = limiter(tps, burst);
            let mut admitted = 0;
            for _millisecond in 0..10_000 {
                admitted += u32::from(limiter.admit().is_ok());
                clock.advance(Duration::from_millis(1));
            }
            assert_eq!(admitted, in_ten_seconds, "{tps} per second, {burst} at once");
        }
    }

    #[test]
    fn waits_are_rounded_up_to_whole_seconds() {
        for (wait, seconds) in [(0, 1), (1, 1), (1000, 1), (1001, 2), (59_500, 60)] {
            assert_eq!(whole_seconds(Duration::from_millis(wait)), seconds);
        }
    }

    #[test]
    fn impossible_limits_are_refused() {
        for tps in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e7] {
            let message = RateLimit::new(tps, None).unwrap_err();
            assert!(message.starts_with("--tps takes"), "{message}");
        }
        assert!(RateLimit::from_options(None, Some(NonZeroU32::MIN)).is_err());
        assert_eq!(RateLimit::from_options(None, None), Ok(None));
    }
}
