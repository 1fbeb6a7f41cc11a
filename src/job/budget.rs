//! The calls per second that all workers of a job share.
//!
//! The budget is a timetable in the job document: the moment of the next call
//! that nobody has reserved yet, by the server's clock. A worker that has work
//! reserves the next few moments and calls at these and no other. So the
//! ceiling holds over all of them, whoever is idle leaves his part to the
//! others, and a dead worker costs a tenth of a second.

use std::sync::Arc;
use std::time::Duration;

use bson::{Bson, Document, doc};
use mongodb::Collection;
use mongodb::options::ReturnDocument;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::mongo::command::retrying;

/// Moments that are reserved at once, in time.
const BLOCK: Duration = Duration::from_millis(100);
/// The timetable is never reserved for longer ahead than so many blocks; what
/// lies beyond was reserved at a lower rate and is reserved anew.
const HORIZON: u32 = 64;

/// The server's clock is looked at again after this long: clocks drift apart.
const CLOCK_INTERVAL: Duration = Duration::from_secs(20);
/// Looks at the clock of which the quickest answer counts.
const CLOCK_LOOKS: usize = 5;

/// The timetable of a job.
#[derive(Debug, Clone)]
pub struct Budget {
    collection: Collection<Document>,
    job: String,
    clock: Arc<Mutex<Option<ServerClock>>>,
}

/// The server's clock, in terms of ours.
#[derive(Debug, Clone, Copy)]
struct ServerClock {
    /// Milliseconds since the Unix epoch by the server's clock, at `seen`.
    milliseconds: f64,
    seen: Instant,
}

impl ServerClock {
    /// When it is, or was, that late by the server's clock.
    fn local(&self, milliseconds: f64) -> Instant {
        let ahead = (milliseconds - self.milliseconds) / 1000.0;
        let distance = Duration::from_secs_f64(ahead.abs());
        if ahead >= 0.0 { self.seen + distance } else { self.seen.checked_sub(distance).unwrap_or(self.seen) }
    }
}

impl Budget {
    pub(super) fn new(collection: Collection<Document>, job: &str) -> Self {
        Self { collection, job: job.into(), clock: Arc::default() }
    }

    /// Reserves the next moments, `period` apart, in the local clock.
    ///
    /// # Errors
    /// A stop where the job document can't be written.
    pub async fn reserve(&self, period: Duration) -> Result<Vec<Instant>> {
        let count = moments_per_block(period);
        let period_ms = period.as_secs_f64() * 1000.0;
        let block_ms = period_ms * f64::from(count);
        let now = doc! {"$convert": {"input": {"$toLong": "$$NOW"}, "to": "double"}};
        let horizon = doc! {"$add": [now.clone(), block_ms * f64::from(HORIZON)]};
        // Without a timetable somebody may have called a moment ago.
        let reserved = doc! {"$ifNull": ["$budget.next", {"$add": [now.clone(), period_ms]}]};
        let first = doc! {"$max": [now.clone(), {"$min": [reserved, horizon]}]};
        let update = vec![
            doc! {"$set": {"budget.first": first}},
            doc! {"$set": {"budget.next": {"$add": ["$budget.first", block_ms]}}},
        ];
        let filter = doc! {"_id": &self.job};
        let document = retrying(format!("reserving calls of the job {}", self.job), || {
            let update = self
                .collection
                .find_one_and_update(filter.clone(), update.clone())
                .projection(doc! {"budget": 1})
                .return_document(ReturnDocument::After);
            async move { update.await }
        })
        .await?;
        let first = document.as_ref().and_then(first_moment).ok_or_else(|| {
            Error::stopped(format!("the job {} has no timetable any more", self.job))
                .hint("was its document removed?")
        })?;
        let first = self.server_clock().await?.local(first);
        Ok((0..count).map(|number| first + period * number).collect())
    }

    /// The server's clock. An answer that waits for a majority would tell it
    /// too late, so it is asked for on its own.
    async fn server_clock(&self) -> Result<ServerClock> {
        let mut clock = self.clock.lock().await;
        if let Some(known) = clock.filter(|clock| clock.seen.elapsed() < CLOCK_INTERVAL) {
            return Ok(known);
        }
        let mut looks = Vec::new();
        for _ in 0..CLOCK_LOOKS {
            looks.push(self.look_at_clock().await?);
        }
        let quickest = looks.into_iter().min_by_key(|(_, took)| *took).map(|(clock, _)| clock);
        *clock = quickest;
        quickest.ok_or_else(|| Error::stopped("the server's clock can't be read"))
    }

    async fn look_at_clock(&self) -> Result<(ServerClock, Duration)> {
        let admin = self.collection.client().database("admin");
        let (sent, hello, took) = retrying("reading the server's clock", || {
            let sent = Instant::now();
            let hello = admin.run_command(doc! {"hello": 1});
            async move {
                let hello = hello.await?;
                Ok((sent, hello, sent.elapsed()))
            }
        })
        .await?;
        let time = hello.get_datetime("localTime").map_err(|_| {
            Error::stopped("the server does not tell its time").hint("is it a MongoDB 4.4 or newer?")
        })?;
        // The time is cut to milliseconds: half of one is what it lacks on average.
        #[expect(clippy::cast_precision_loss, reason = "good for the next 280,000 years")]
        let milliseconds = time.timestamp_millis() as f64 + 0.5;
        Ok((ServerClock { milliseconds, seen: sent + took / 2 }, took))
    }
}

fn moments_per_block(period: Duration) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
    let count = (BLOCK.as_secs_f64() / period.as_secs_f64()).ceil().clamp(1.0, 100_000.0) as u32;
    count
}

fn first_moment(document: &Document) -> Option<f64> {
    document.get_document("budget").ok()?.get("first").and_then(Bson::as_f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_and_we_may_have_other_times() {
        let seen = Instant::now();
        let clock = ServerClock { milliseconds: 5_000.0, seen };
        assert_eq!(clock.local(5_250.0), seen + Duration::from_millis(250));
        assert_eq!(clock.local(4_999.0), seen - Duration::from_millis(1));
    }

    #[test]
    fn a_block_is_a_tenth_of_a_second_or_one_call() {
        assert_eq!(moments_per_block(Duration::from_millis(1)), 100);
        assert_eq!(moments_per_block(Duration::from_millis(100)), 1);
        assert_eq!(moments_per_block(Duration::from_secs(100)), 1);
    }
}
