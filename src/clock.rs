//! Deadlines that a suspend of the machine does not stretch.
//!
//! The clock of `Instant` stands still while a machine is suspended or a virtual machine is
//! paused; the leases and fences that others judge do not wait for it. So a right that ends at a
//! moment is judged by the clock of the boot time as well, which goes on.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

/// A moment, by both clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    instant: Instant,
    /// Since the boot of this machine, suspends included.
    since_boot: Duration,
}

/// The end of a right; it has come when one of the two clocks says so.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline(Moment);

impl Moment {
    /// This moment.
    pub(crate) fn now() -> Self {
        Self { instant: Instant::now(), since_boot: since_boot() }
    }

    /// The deadline that comes so long after this moment.
    pub(crate) fn deadline(self, after: Duration) -> Deadline {
        Deadline(Self { instant: self.instant + after, since_boot: self.since_boot + after })
    }

    /// How long ago this moment was, by the clock that has gone further.
    pub(crate) fn elapsed(self) -> Duration {
        let now = Self::now();
        let by_instant = now.instant.saturating_duration_since(self.instant);
        by_instant.max(now.since_boot.saturating_sub(self.since_boot))
    }
}

impl Deadline {
    /// Whether it has come.
    pub(crate) fn has_passed(self) -> bool {
        self.remaining().is_zero()
    }

    /// What is left of the time before it; zero where it has come.
    pub(crate) fn remaining(self) -> Duration {
        self.remaining_at(Moment::now())
    }

    fn remaining_at(self, now: Moment) -> Duration {
        let by_instant = self.0.instant.saturating_duration_since(now.instant);
        by_instant.min(self.0.since_boot.saturating_sub(now.since_boot))
    }
}

fn since_boot() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_deadline_has_come_when_one_of_the_clocks_says_so() {
        let start = Moment::now();
        let deadline = start.deadline(10 * SECOND);
        let later = |by_instant: u32, by_boot_time: u32| Moment {
            instant: start.instant + by_instant * SECOND,
            since_boot: start.since_boot + by_boot_time * SECOND,
        };
        assert_eq!(deadline.remaining_at(later(4, 4)), 6 * SECOND);
        assert_eq!(deadline.remaining_at(later(0, 9)), SECOND);
        // A suspend of eleven seconds: the clock of `Instant` stood still.
        assert_eq!(deadline.remaining_at(later(0, 11)), Duration::ZERO);
        assert_eq!(deadline.remaining_at(later(11, 0)), Duration::ZERO);
    }

    #[test]
    fn the_boot_time_goes_on() {
        let before = Moment::now();
        std::thread::sleep(Duration::from_millis(20));
        assert!(before.elapsed() >= Duration::from_millis(20));
        assert!(!before.deadline(60 * SECOND).has_passed());
        assert!(before.deadline(Duration::from_millis(10)).has_passed());
    }
}
