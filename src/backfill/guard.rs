//! The guard against wrong flags. Pure.
//!
//! A misconfigured API that answers 404 to everything must not flag ten million
//! documents. The guard watches the last answers and stops the job when too
//! many of them would lead to a flag.

use std::collections::VecDeque;

/// How many of the last answers count.
const WINDOW: usize = 1000;
/// With fewer answers than this there is no verdict.
const FIRST_VERDICT: usize = 100;

/// What the guard thinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Too few answers yet: flags must wait.
    Undecided,
    /// Flags may be written.
    Fine,
    /// The job must stop: so many bad ones among the last so many.
    Tripped {
        /// Answers that lead to a flag.
        bad: usize,
        /// Answers looked at.
        of: usize,
    },
}

/// Watches one share.
#[derive(Debug)]
pub struct Guard {
    limit: f64,
    recent: VecDeque<bool>,
    bad: usize,
}

impl Guard {
    /// A guard that trips when the share of bad ones passes `limit`.
    pub fn new(limit: f64) -> Self {
        Self { limit, recent: VecDeque::with_capacity(WINDOW), bad: 0 }
    }

    /// Counts one answer.
    pub fn record(&mut self, bad: bool) -> Verdict {
        if self.recent.len() == WINDOW && self.recent.pop_front() == Some(true) {
            self.bad -= 1;
        }
        self.recent.push_back(bad);
        self.bad += usize::from(bad);
        self.verdict()
    }

    /// The verdict on what was counted so far.
    pub fn verdict(&self) -> Verdict {
        if self.recent.len() < FIRST_VERDICT {
            Verdict::Undecided
        } else if self.exceeds_limit() {
            Verdict::Tripped { bad: self.bad, of: self.recent.len() }
        } else {
            Verdict::Fine
        }
    }

    /// Whether the share is above the limit, however few were counted.
    pub fn exceeds_limit(&self) -> bool {
        self.bad as f64 > self.limit * self.recent.len() as f64
    }

    /// Bad ones and all among the last.
    pub fn share(&self) -> (usize, usize) {
        (self.bad, self.recent.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_judges_from_the_hundredth_on() {
        let mut guard = Guard::new(0.5);
        for _ in 0..99 {
            assert_eq!(guard.record(true), Verdict::Undecided);
        }
        assert!(guard.exceeds_limit());
        assert_eq!(guard.record(true), Verdict::Tripped { bad: 100, of: 100 });
    }

    #[test]
    fn exactly_the_limit_is_fine() {
        let mut guard = Guard::new(0.5);
        for index in 0..100 {
            guard.record(index % 2 == 0);
        }
        assert_eq!(guard.verdict(), Verdict::Fine);
        assert!(matches!(guard.record(true), Verdict::Tripped { .. }));
    }

    #[test]
    fn only_the_last_thousand_count() {
        let mut guard = Guard::new(0.5);
        for _ in 0..10_000 {
            assert!(!matches!(guard.record(false), Verdict::Tripped { .. }));
        }
        let trips_after = (1..).find(|_| matches!(guard.record(true), Verdict::Tripped { .. }));
        assert_eq!(trips_after, Some(501));
    }

    #[test]
    fn a_limit_of_one_never_trips() {
        let mut guard = Guard::new(1.0);
        for _ in 0..2000 {
            assert!(!matches!(guard.record(true), Verdict::Tripped { .. }));
        }
    }
}
