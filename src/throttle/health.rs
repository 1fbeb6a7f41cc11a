//! Whether the database bears more. Pure: readings in, reasons to pause out.
//!
//! A signal that can't be read is no good signal: after a while it counts as a
//! bad one, because the moment in which a cluster stops answering is the very
//! moment in which it should be spared.

use std::time::Duration;

use tokio::time::Instant;

use super::pacer::Waiting;

/// Without a reading for this long work pauses.
const LONGEST_SILENCE: Duration = Duration::from_secs(30);
/// A single reading may catch a member between two of its reports; so many in a
/// row are a fact.
const READINGS_TO_PAUSE: u32 = 2;

/// What the database tells of itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    /// How far the slowest member that should keep up is behind; `None` where
    /// there is nobody who could be.
    pub lag: Option<Duration>,
    /// Whether the server slows writes down because of lag.
    pub flow_control: bool,
}

/// Judges reading after reading.
#[derive(Debug)]
pub struct HealthJudge {
    max_lag: Duration,
    last_reading: Instant,
    lagging: u32,
    flow_controlled: u32,
}

impl HealthJudge {
    /// A judge who pauses above this lag.
    pub fn new(max_lag: Duration, now: Instant) -> Self {
        Self { max_lag, last_reading: now, lagging: 0, flow_controlled: 0 }
    }

    /// Takes note of a reading, or of its failure; returns each reason to pause
    /// and whether it holds now.
    pub fn judge(&mut self, now: Instant, reading: Option<Reading>) -> [(Waiting, bool); 3] {
        if let Some(reading) = reading {
            self.last_reading = now;
            let lags = reading.lag.is_some_and(|lag| lag > self.max_lag);
            self.lagging = if lags { self.lagging + 1 } else { 0 };
            self.flow_controlled = if reading.flow_control { self.flow_controlled + 1 } else { 0 };
        }
        [
            (Waiting::ReplicationLag, self.lagging >= READINGS_TO_PAUSE),
            (Waiting::FlowControl, self.flow_controlled >= READINGS_TO_PAUSE),
            (Waiting::LostSignal, now.duration_since(self.last_reading) >= LONGEST_SILENCE),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    fn reading(lag: u64, flow_control: bool) -> Option<Reading> {
        Some(Reading { lag: Some(Duration::from_secs(lag)), flow_control })
    }

    fn held(reasons: [(Waiting, bool); 3]) -> Vec<Waiting> {
        reasons.into_iter().filter(|(_, holds)| *holds).map(|(reason, _)| reason).collect()
    }

    #[test]
    fn lag_and_flow_control_pause_until_they_are_gone() {
        let now = Instant::now();
        let mut judge = HealthJudge::new(LIMIT, now);
        assert!(held(judge.judge(now, reading(60, false))).is_empty(), "one reading is no fact");
        assert_eq!(held(judge.judge(now, reading(60, false))), [Waiting::ReplicationLag]);
        assert_eq!(held(judge.judge(now, reading(6, true))), [Waiting::ReplicationLag]);
        assert_eq!(held(judge.judge(now, reading(5, true))), [Waiting::FlowControl]);
        assert!(held(judge.judge(now, reading(0, false))).is_empty());
    }

    #[test]
    fn silence_is_bad_news_after_a_while() {
        let start = Instant::now();
        let mut judge = HealthJudge::new(LIMIT, start);
        assert!(held(judge.judge(start + Duration::from_secs(29), None)).is_empty());
        assert_eq!(held(judge.judge(start + Duration::from_secs(30), None)), [Waiting::LostSignal]);
        assert!(held(judge.judge(start + Duration::from_secs(31), reading(0, false))).is_empty());
    }

    #[test]
    fn what_was_bad_before_the_silence_stays_bad() {
        let start = Instant::now();
        let mut judge = HealthJudge::new(LIMIT, start);
        judge.judge(start, reading(9, false));
        judge.judge(start, reading(9, false));
        assert_eq!(held(judge.judge(start + Duration::from_secs(1), None)), [Waiting::ReplicationLag]);
    }
}
