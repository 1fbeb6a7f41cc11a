//! Moments of calls that a worker has reserved in the timetable that all workers
//! of a job share.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::error::{Result, joined};
use crate::job::budget::Budget;

/// Moments of the common timetable that are ours.
#[derive(Debug, Default)]
pub(super) struct Reserved {
    moments: VecDeque<Instant>,
    /// How many came with the last reservation.
    block: usize,
    /// The rate at which they were reserved.
    period: Duration,
    /// More of them, on their way. A task of its own, because a reservation
    /// that was begun must be heard out even when its caller is gone.
    coming: Option<JoinHandle<Result<Vec<Instant>>>>,
}

impl Reserved {
    /// The next moment; waits for a reservation where there is none.
    ///
    /// `lateness` is how late a moment may be used; losing the future loses nothing.
    pub(super) async fn next(
        &mut self,
        budget: &Budget,
        period: Duration,
        lateness: Duration,
    ) -> Result<Instant> {
        if self.period != period {
            // Reserved at another rate.
            self.moments.clear();
            self.coming = None;
            self.period = period;
        }
        loop {
            let oldest = Instant::now().checked_sub(lateness);
            while self.moments.front().is_some_and(|moment| Some(*moment) < oldest) {
                // Too late: by now the moment may be another worker's.
                self.moments.pop_front();
            }
            if let Some(moment) = self.moments.front() {
                return Ok(*moment);
            }
            let coming = self.coming.get_or_insert_with(|| order(budget, period));
            let more = joined(coming.await).flatten();
            self.coming = None;
            let more = more?;
            self.block = more.len();
            self.moments.extend(more);
        }
    }

    /// Uses the next moment, and orders more before the last is used.
    pub(super) fn take(&mut self, budget: &Budget) {
        self.moments.pop_front();
        if self.coming.is_none() && 2 * self.moments.len() <= self.block {
            self.coming = Some(order(budget, self.period));
        }
    }
}

fn order(budget: &Budget, period: Duration) -> JoinHandle<Result<Vec<Instant>>> {
    let budget = budget.clone();
    tokio::spawn(async move { budget.reserve(period).await })
}
