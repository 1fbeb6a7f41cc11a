//! How much time each limit has cost: the answer to "why not faster?". Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// A stretch that was not looked at for longer is not put down to one limit.
const LONGEST_STRETCH: Duration = Duration::from_secs(5);

/// Time by what limited the speed.
#[derive(Debug)]
pub struct Limits {
    since: Instant,
    spent: BTreeMap<&'static str, Duration>,
}

impl Limits {
    /// Starts to watch.
    pub fn new(now: Instant) -> Self {
        Self { since: now, spent: BTreeMap::new() }
    }

    /// Puts the time since the last look down to a limit.
    pub fn record(&mut self, now: Instant, limit: &'static str) {
        let stretch = now.saturating_duration_since(self.since).min(LONGEST_STRETCH);
        self.since = now;
        *self.spent.entry(limit).or_default() += stretch;
    }

    /// Seconds per limit, the costliest first.
    pub fn seconds(&self) -> Vec<(&'static str, f64)> {
        let mut seconds: Vec<_> =
            self.spent.iter().map(|(limit, spent)| (*limit, spent.as_secs_f64())).collect();
        seconds.sort_by(|(_, first), (_, second)| second.total_cmp(first));
        seconds
    }
}

/// One line for people: `tps 92%, api latency 8%`.
pub fn describe(seconds: &[(&str, f64)]) -> String {
    let total: f64 = seconds.iter().map(|(_, seconds)| seconds).sum();
    if total <= 0.0 {
        return "too short to tell".into();
    }
    let parts: Vec<String> = seconds
        .iter()
        .map(|(limit, seconds)| (limit, 100.0 * seconds / total))
        .filter(|(_, percent)| *percent >= 1.0)
        .map(|(limit, percent)| format!("{limit} {percent:.0}%"))
        .collect();
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_put_down_to_what_limited() {
        let start = Instant::now();
        let mut limits = Limits::new(start);
        limits.record(start + Duration::from_secs(3), "tps");
        limits.record(start + Duration::from_secs(4), "breaker");
        // The machine slept: nobody knows what limited meanwhile.
        limits.record(start + Duration::from_secs(400), "tps");
        assert_eq!(limits.seconds(), [("tps", 8.0), ("breaker", 1.0)]);
        assert_eq!(describe(&limits.seconds()), "tps 89%, breaker 11%");
        assert_eq!(describe(&[]), "too short to tell");
    }
}
