//! How much of the ceiling the API bears. Pure.
//!
//! The ceiling is what was agreed; an API that gets slow or fails shows that it
//! bears less at this moment. The rate is cut by a factor then and rises again
//! step by step. The rate is what is changed, not the number of calls in
//! flight: that would let a slow API see as many calls as a quick one.

use std::collections::VecDeque;
use std::time::Duration;

use super::pacer::Waiting;

/// The last so many calls are looked at.
const WINDOW: usize = 200;
/// With fewer the 95th percentile is an accident.
const FIRST_LATENCY_VERDICT: usize = 100;
/// With fewer the share of failures is an accident.
const FIRST_ERROR_VERDICT: usize = 40;
/// So many calls must have shown that the rate is borne before it rises: at a
/// low rate it would be back at the ceiling before the next verdict otherwise.
const CALLS_TO_RISE: usize = 20;
/// More failures than this slow down.
const MOST_FAILURES: f64 = 0.3;
/// The limit is exceeded when it is by this factor: calls that take as long as
/// the limit says, and a moment for the machine, are within it.
const CLEARLY: f64 = 1.2;
/// What a decrease leaves of the share.
const DECREASE: f64 = 0.6;
/// What an increase adds, once per second.
const INCREASE: f64 = 0.1;
/// From here on the sum of the increases counts as the whole.
const ALL: f64 = 0.999;
/// The job never quite stops for this: what is too slow at a tenth of the
/// ceiling is not slow because of us.
const LOWEST: f64 = 0.1;

/// One call, as far as it tells how the API is.
#[derive(Debug, Clone, Copy)]
struct Observation {
    latency: Duration,
    failed: bool,
}

/// The share of the ceiling in use.
#[derive(Debug)]
pub struct AdaptiveShare {
    limit: Duration,
    recent: VecDeque<Observation>,
    share: f64,
    reason: Waiting,
}

impl AdaptiveShare {
    /// Starts at the ceiling; slows down while the 95th percentile of the
    /// latency is above `limit`.
    pub fn new(limit: Duration) -> Self {
        Self { limit, recent: VecDeque::with_capacity(WINDOW), share: 1.0, reason: Waiting::Rate }
    }

    /// Takes note of a call.
    pub fn record(&mut self, latency: Duration, failed: bool) {
        if self.recent.len() == WINDOW {
            self.recent.pop_front();
        }
        self.recent.push_back(Observation { latency, failed });
    }

    /// Forgets the calls so far: those of an outage say nothing about the rate.
    pub fn start_afresh(&mut self) {
        self.recent.clear();
    }

    /// The share from here on and what it is lowered by; to be asked for once
    /// per second.
    pub fn adjust(&mut self) -> (f64, Waiting) {
        if let Some(reason) = self.complaint() {
            self.share = (self.share * DECREASE).max(LOWEST);
            self.reason = reason;
            // The calls at the old rate say nothing about the new one.
            self.recent.clear();
        } else if self.share < 1.0 && self.bears_more() {
            self.share = (self.share + INCREASE).min(1.0);
            if self.share > ALL {
                self.share = 1.0;
            }
        }
        if self.share >= 1.0 {
            self.reason = Waiting::Rate;
        }
        (self.share, self.reason)
    }

    fn complaint(&self) -> Option<Waiting> {
        let calls = self.recent.len();
        if calls >= FIRST_ERROR_VERDICT && self.fails_too_often() {
            return Some(Waiting::ApiErrors);
        }
        (calls >= FIRST_LATENCY_VERDICT && self.is_slow()).then_some(Waiting::ApiLatency)
    }

    fn bears_more(&self) -> bool {
        self.recent.len() >= CALLS_TO_RISE && !self.fails_too_often() && !self.is_slow()
    }

    fn fails_too_often(&self) -> bool {
        let failed = self.recent.iter().filter(|call| call.failed).count();
        failed as f64 > MOST_FAILURES * self.recent.len() as f64
    }

    fn is_slow(&self) -> bool {
        self.percentile_95() > self.limit.mul_f64(CLEARLY)
    }

    /// The latency that 95 of 100 calls do not exceed.
    fn percentile_95(&self) -> Duration {
        let mut latencies: Vec<Duration> = self.recent.iter().map(|call| call.latency).collect();
        latencies.sort_unstable();
        let rank = (latencies.len() * 95).div_ceil(100);
        latencies.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(2);
    const QUICK: Duration = Duration::from_millis(300);
    const SLOW: Duration = Duration::from_millis(2_500);

    fn record(share: &mut AdaptiveShare, calls: usize, slow_every: usize, failed_every: usize) {
        for call in 1..=calls {
            let latency = if slow_every > 0 && call % slow_every == 0 { SLOW } else { QUICK };
            share.record(latency, failed_every > 0 && call % failed_every == 0);
        }
    }

    #[test]
    fn rare_outliers_and_failures_change_nothing() {
        let mut share = AdaptiveShare::new(LIMIT);
        for _ in 0..20 {
            record(&mut share, 100, 25, 10);
            assert_eq!(share.adjust(), (1.0, Waiting::Rate));
        }
    }

    #[test]
    fn a_slow_api_is_called_less_and_a_recovered_one_step_by_step_as_before() {
        let mut share = AdaptiveShare::new(LIMIT);
        record(&mut share, 200, 10, 0);
        assert_eq!(share.adjust(), (DECREASE, Waiting::ApiLatency));
        let steps = (1..100).find(|_| {
            record(&mut share, 10, 0, 0);
            share.adjust().0 >= 1.0
        });
        // The first ten calls are too few to go by.
        assert_eq!(steps, Some(5));
        assert_eq!(share.adjust(), (1.0, Waiting::Rate));
    }

    #[test]
    fn at_a_low_rate_the_share_stays_low_while_calls_are_slow() {
        let mut share = AdaptiveShare::new(LIMIT);
        let shares: Vec<f64> = (0..60)
            .map(|_| {
                record(&mut share, 10, 1, 0);
                share.adjust().0
            })
            .collect();
        assert!(shares.is_sorted_by(|before, after| after <= before), "{shares:?}");
        assert!(shares[59] < 0.2, "{shares:?}");
    }

    #[test]
    fn failures_slow_down_but_never_stop() {
        let mut share = AdaptiveShare::new(LIMIT);
        for _ in 0..50 {
            record(&mut share, 100, 0, 2);
            share.adjust();
        }
        record(&mut share, 100, 0, 2);
        assert_eq!(share.adjust(), (LOWEST, Waiting::ApiErrors));
    }

    #[test]
    fn few_calls_prove_nothing() {
        let mut share = AdaptiveShare::new(LIMIT);
        record(&mut share, FIRST_ERROR_VERDICT - 1, 1, 1);
        assert_eq!(share.adjust(), (1.0, Waiting::Rate));
    }
}
