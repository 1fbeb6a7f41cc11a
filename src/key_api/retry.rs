//! When to ask again. Pure: the random number and the time of day are given.

use std::time::Duration;

use jiff::Timestamp;
use jiff::fmt::rfc2822;

use super::classify::Outcome;

/// The first retry waits up to this long.
const BASE: Duration = Duration::from_millis(500);
/// No retry waits longer than this unless the API asks for it.
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// A longer `Retry-After` is cut to this: a mistaken header must not put a job
/// to sleep for a year.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);
/// An answer of 429 says nothing about the key, so it uses up a smaller part of
/// the attempts; so many of them count as one.
const RATE_LIMITED_PER_ATTEMPT: u32 = 8;

/// What to do after an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The outcome is an answer.
    Settle,
    /// Ask again, up to this long from now (full jitter).
    RetryWithin(Duration),
    /// This key's attempts are used up.
    GiveUp,
    /// No call can succeed any more.
    StopJob,
}

/// The attempts made for one key in one run.
#[derive(Debug, Default, Clone, Copy)]
pub struct Attempts {
    failed: u32,
    rate_limited: u32,
}

/// Whether an outcome says that the API itself fails, whatever the key.
pub fn is_outage(outcome: &Outcome) -> bool {
    matches!(
        outcome,
        Outcome::ServerError(..) | Outcome::RateLimited(_) | Outcome::Timeout | Outcome::Connect(_)
    )
}

impl Attempts {
    /// Counts an outcome and decides what comes next.
    pub fn next(&mut self, outcome: &Outcome, max_attempts: u32) -> Next {
        match outcome {
            Outcome::Found(_) | Outcome::NotFound | Outcome::Rejected => return Next::Settle,
            Outcome::Unauthorized(_) => return Next::StopJob,
            Outcome::RateLimited(_) => self.rate_limited += 1,
            _ => self.failed += 1,
        }
        let used = self.failed + self.rate_limited / RATE_LIMITED_PER_ATTEMPT;
        if used >= max_attempts {
            return Next::GiveUp;
        }
        Next::RetryWithin(backoff(self.failed + self.rate_limited))
    }
}

/// The upper bound of the wait before the retry of that number (from 1).
fn backoff(retry: u32) -> Duration {
    BASE.saturating_mul(1_u32.checked_shl(retry - 1).unwrap_or(u32::MAX)).min(LONGEST_BACKOFF)
}

/// Full jitter: anything from nothing to the bound, by a random number in 0..1.
pub fn jittered(bound: Duration, random: f64) -> Duration {
    bound.mul_f64(random.clamp(0.0, 1.0))
}

/// Reads `Retry-After` in seconds or as an HTTP date; zero and the past mean
/// nothing.
pub fn parse_retry_after(header: &str, now: Timestamp) -> Option<Duration> {
    let text = header.trim();
    let pause = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let at = rfc2822::parse(text).ok()?.timestamp();
            Duration::try_from(at.duration_since(now)).ok()?
        }
    };
    (!pause.is_zero()).then(|| pause.min(LONGEST_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_its_cap() {
        assert_eq!(backoff(1), Duration::from_millis(500));
        assert_eq!(backoff(3), Duration::from_secs(2));
        assert_eq!(backoff(8), LONGEST_BACKOFF);
        assert_eq!(backoff(4000), LONGEST_BACKOFF);
    }

    #[test]
    fn attempts_run_out_for_failures() {
        let mut attempts = Attempts::default();
        for _ in 0..2 {
            assert!(matches!(attempts.next(&Outcome::Timeout, 3), Next::RetryWithin(_)));
        }
        assert_eq!(attempts.next(&Outcome::Timeout, 3), Next::GiveUp);
    }

    #[test]
    fn rate_limiting_hardly_uses_attempts_but_ends() {
        let mut attempts = Attempts::default();
        let calls = (1..).find(|_| attempts.next(&Outcome::RateLimited(None), 8) == Next::GiveUp);
        assert_eq!(calls, Some(64));
    }

    #[test]
    fn answers_settle_and_refused_credentials_stop() {
        let mut attempts = Attempts::default();
        assert_eq!(attempts.next(&Outcome::NotFound, 1), Next::Settle);
        assert_eq!(attempts.next(&Outcome::Unauthorized(401), 8), Next::StopJob);
    }

    #[test]
    fn retry_after_is_read_in_both_forms() {
        let now: Timestamp = "2026-11-22T02:00:00Z".parse().expect("a time");
        assert_eq!(parse_retry_after("7", now), Some(Duration::from_secs(7)));
        assert_eq!(parse_retry_after("Sun, 22 Nov 2026 02:00:30 GMT", now), Some(Duration::from_secs(30)));
        assert_eq!(parse_retry_after("Sun, 22 Nov 2026 01:00:00 GMT", now), None);
        assert_eq!(parse_retry_after("0", now), None);
        assert_eq!(parse_retry_after("soon", now), None);
        assert_eq!(parse_retry_after("999999999", now), Some(LONGEST_RETRY_AFTER));
    }
}
