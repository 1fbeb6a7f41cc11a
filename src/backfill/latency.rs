//! How long calls took, in steps fine enough for percentiles and few enough to
//! count each call by one addition.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::job::series::PERCENTILES;

/// Steps per doubling: each is about 9 % longer than the one before it.
const STEPS_PER_DOUBLING: u32 = 8;
/// From a millisecond to some two minutes.
const STEPS: usize = 17 * STEPS_PER_DOUBLING as usize + 1;

/// Calls by how long they took.
#[derive(Debug)]
pub struct Latencies([AtomicU64; STEPS]);

impl Default for Latencies {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; STEPS])
    }
}

impl Latencies {
    /// Counts a call.
    pub fn record(&self, latency: Duration) {
        self.0[step(latency)].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts so far.
    pub fn snapshot(&self) -> Counts {
        Counts(self.0.iter().map(|count| count.load(Ordering::Relaxed)).collect())
    }
}

/// Counts at a moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counts(Vec<u64>);

impl Counts {
    /// Adds those of another worker.
    pub fn add(&mut self, other: &Self) {
        self.0.resize(self.0.len().max(other.0.len()), 0);
        self.0.iter_mut().zip(&other.0).for_each(|(sum, more)| *sum += more);
    }

    /// Milliseconds by percentile of the calls since `earlier`, each the end of its
    /// step; `None` where there was none.
    pub fn percentiles_since(&self, earlier: &Self) -> Option<[f64; 3]> {
        let before = earlier.0.iter().copied().chain(std::iter::repeat(0));
        let since: Vec<u64> = self.0.iter().zip(before).map(|(now, then)| now.saturating_sub(then)).collect();
        let calls: u64 = since.iter().sum();
        (calls > 0).then(|| PERCENTILES.map(|percentile| percentile_of(&since, calls, percentile)))
    }
}

fn percentile_of(counts: &[u64], calls: u64, percentile: u8) -> f64 {
    let rank = (calls * u64::from(percentile)).div_ceil(100);
    let mut seen = 0;
    let step = counts.iter().position(|count| {
        seen += count;
        seen >= rank
    });
    let end = step.unwrap_or(0) as f64 / f64::from(STEPS_PER_DOUBLING);
    (end.exp2() * 10.0).round() / 10.0
}

/// The first step whose end is not below the latency.
fn step(latency: Duration) -> usize {
    let milliseconds = (latency.as_secs_f64() * 1000.0).max(1.0);
    let steps = (milliseconds.log2() * f64::from(STEPS_PER_DOUBLING)).ceil();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to a few hundred")]
    let step = steps.min(STEPS as f64) as usize;
    step.min(STEPS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(latencies: &Latencies, milliseconds: impl IntoIterator<Item = u64>) -> Counts {
        milliseconds.into_iter().for_each(|wait| latencies.record(Duration::from_millis(wait)));
        latencies.snapshot()
    }

    #[test]
    fn percentiles_are_right_within_a_step_and_never_too_low() {
        let found = counts(&Latencies::default(), 1..=1000);
        let found = found.percentiles_since(&Counts::default()).expect("calls");
        for (found, exact) in found.into_iter().zip([500.0, 950.0, 990.0]) {
            assert!(found >= exact && found <= exact * 1.1, "{found} for {exact}");
        }
    }

    #[test]
    fn only_what_was_called_since_counts() {
        let latencies = Latencies::default();
        let before = counts(&latencies, [5000; 50]);
        assert_eq!(before.percentiles_since(&before), None);
        let now = counts(&latencies, [16; 3]);
        assert_eq!(now.percentiles_since(&before), Some([16.0; 3]));
        let mut both = before.clone();
        both.add(&now);
        assert_eq!(both.percentiles_since(&now), before.percentiles_since(&Counts::default()));
    }

    #[test]
    fn every_latency_has_its_step() {
        assert_eq!((step(Duration::ZERO), step(Duration::from_millis(1))), (0, 0));
        assert_eq!(step(Duration::from_secs(100_000)), STEPS - 1);
    }
}
