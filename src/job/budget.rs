//! The calls per second that all workers of a job share.
//!
//! The budget is a timetable in the job document: the moment of the next call
//! that nobody has reserved yet, by the server's clock. A worker that has work
//! reserves the next few moments and calls at these and no other. So the
//! ceiling holds over all of them, whoever is idle leaves his part to the
//! others, and a dead worker costs a tenth of a second.

use std::time::Duration;

use bson::{Bson, Document, doc};
use mongodb::Collection;
use mongodb::options::ReturnDocument;
use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::mongo::command::retrying;

/// Moments that are reserved at once, in time.
const BLOCK: Duration = Duration::from_millis(100);
/// The timetable is never reserved for longer ahead than so many blocks; what
/// lies beyond was reserved at a lower rate and is reserved anew.
const HORIZON: u32 = 64;

/// The timetable of a job.
#[derive(Debug, Clone)]
pub struct Budget {
    collection: Collection<Document>,
    job: String,
}

impl Budget {
    pub(super) fn new(collection: Collection<Document>, job: &str) -> Self {
        Self { collection, job: job.into() }
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
            doc! {"$set": {"budget.first": first, "budget.now": now}},
            doc! {"$set": {"budget.next": {"$add": ["$budget.first", block_ms]}}},
        ];
        let filter = doc! {"_id": &self.job};
        let (sent, document, received) = retrying(format!("reserving calls of the job {}", self.job), || {
            let update = self
                .collection
                .find_one_and_update(filter.clone(), update.clone())
                .projection(doc! {"budget": 1})
                .return_document(ReturnDocument::After);
            async move {
                let sent = Instant::now();
                Ok((sent, update.await?, Instant::now()))
            }
        })
        .await?;
        let ahead = document.as_ref().and_then(milliseconds_ahead).ok_or_else(|| {
            Error::stopped(format!("the job {} has no timetable any more", self.job))
                .hint("was its document removed?")
        })?;
        // The server looked at its clock somewhere between the two.
        let server_now = sent + (received - sent) / 2;
        let first = server_now + Duration::from_secs_f64(ahead.max(0.0) / 1000.0);
        Ok((0..count).map(|number| first + period * number).collect())
    }
}

fn moments_per_block(period: Duration) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
    let count = (BLOCK.as_secs_f64() / period.as_secs_f64()).ceil().clamp(1.0, 100_000.0) as u32;
    count
}

fn milliseconds_ahead(document: &Document) -> Option<f64> {
    let budget = document.get_document("budget").ok()?;
    let figure = |name: &str| budget.get(name).and_then(Bson::as_f64);
    Some(figure("first")? - figure("now")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_a_tenth_of_a_second_or_one_call() {
        assert_eq!(moments_per_block(Duration::from_millis(1)), 100);
        assert_eq!(moments_per_block(Duration::from_millis(100)), 1);
        assert_eq!(moments_per_block(Duration::from_secs(100)), 1);
    }
}
