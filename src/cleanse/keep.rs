//! Copies a range into a target that the application writes to as well: what
//! stands there is newer than what we have read, and stays as it is.
//!
//! The server has no stage for that which changes no document (`$merge` that
//! keeps what exists takes a name with a dot for a path), so documents pass
//! through here and are inserted, and a duplicate key is the sign to leave one
//! alone. A range that was begun is not emptied but simply copied once more.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bson::{Bson, RawDocumentBuf};
use mongodb::options::{Hint, ReadConcern};

use super::copy::{Copied, Copy};
use super::marks::Marks;
use super::predicate::all_of;
use super::ranges::{JobRange, RangeState};
use crate::error::{Context, Error, Result, describe_mongo};
use crate::mongo::command::is_transient;
use crate::mongo::lane::Lane;

/// Documents that are written at once.
const BATCH: usize = 1_000;
/// Bytes that are written at once, if it is more than one document.
const BATCH_BYTES: usize = 4 << 20;
/// Attempts per range; elections and network errors pass.
const ATTEMPTS: u32 = 8;
/// Between two of them.
const PAUSE: Duration = Duration::from_secs(1);

/// What a copy that keeps existing documents needs besides.
#[derive(Debug, Default)]
pub struct Keeping {
    inserted: AtomicU64,
    existing: AtomicU64,
}

impl Keeping {
    /// Nothing was done yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Documents that were inserted, and that were left as they are.
    pub fn figures(&self) -> (u64, u64) {
        (self.inserted.load(Ordering::Relaxed), self.existing.load(Ordering::Relaxed))
    }
}

/// Why a range could not be poured.
enum Failure {
    Reading(mongodb::error::Error),
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl Copy {
    /// Copies what the target lacks of a range.
    ///
    /// # Errors
    /// A stop where the source can't be read or the target can't be written.
    pub(super) async fn range_keeping(&self, range: &JobRange, keeping: &Keeping) -> Result<Copied> {
        for attempt in 1.. {
            self.lease.valid().await?;
            let mut lane = self.lanes.take().await?;
            self.ranges.set(range.number, &RangeState::Copying(lane.session())).await?;
            let poured = self.pour(range, keeping, &mut lane).await;
            self.lanes.put_back(lane).await;
            match poured {
                Ok(Copied::All) => {
                    self.ranges.set(range.number, &RangeState::Done).await?;
                    return Ok(Copied::All);
                }
                Ok(Copied::Touched | Copied::Interrupted) => {
                    self.ranges.set(range.number, &RangeState::Pending).await?;
                    return Ok(Copied::Interrupted);
                }
                Err(Failure::Reading(error)) if attempt < ATTEMPTS && is_transient(&error) => {
                    let error = describe_mongo(&error);
                    tracing::warn!(error, range = range.number, "the range is read again");
                    tokio::time::sleep(PAUSE).await;
                }
                Err(Failure::Reading(error)) => {
                    return Err(error).during(format!("copying a range of {}", self.source));
                }
                Err(Failure::Other(error)) => return Err(error),
            }
        }
        Err(Error::stopped(format!("a range of {} could not be copied", self.source)))
    }

    async fn pour(&self, range: &JobRange, keeping: &Keeping, lane: &mut Lane) -> Result<Copied, Failure> {
        let condition =
            all_of(vec![range.range.filter().into(), Bson::Document(self.valid.condition.clone())]);
        let collection = self.mongo.collection(&self.source);
        let mut find = collection
            .find(condition)
            .batch_size(u32::try_from(BATCH).unwrap_or(u32::MAX))
            // What a failover takes back must not be copied.
            .read_concern(ReadConcern::majority())
            .comment(Bson::String(self.job.clone()));
        if self.hint {
            find = find.hint(Hint::Keys(bson::doc! {"_id": 1}));
        }
        let mut cursor = find.await.map_err(Failure::Reading)?;
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while cursor.advance().await.map_err(Failure::Reading)? {
            let document = cursor.current().to_owned();
            if !batch.is_empty()
                && (batch.len() >= self.documents_at_once()
                    || bytes + document.as_bytes().len() > BATCH_BYTES)
            {
                if !self.may_put(batch.len()).await {
                    return Ok(Copied::Interrupted);
                }
                self.put(std::mem::take(&mut batch), keeping, lane).await?;
                bytes = 0;
            }
            bytes += document.as_bytes().len();
            batch.push(document);
        }
        if !batch.is_empty() && !self.may_put(batch.len()).await {
            return Ok(Copied::Interrupted);
        }
        self.put(batch, keeping, lane).await?;
        Ok(Copied::All)
    }

    /// With a limit no more than a second's.
    fn documents_at_once(&self) -> usize {
        match usize::try_from(self.pace.rate()) {
            Ok(0) | Err(_) => BATCH,
            Ok(rate) => rate.min(BATCH),
        }
    }

    /// Waits until so many documents may be written; false where the run is to end.
    async fn may_put(&self, documents: usize) -> bool {
        while !self.stop.is_cancelled() {
            self.pace.free(&self.stop).await;
            if self.pace.turn(documents as u64, &self.stop).await {
                return true;
            }
        }
        false
    }

    async fn put(&self, batch: Vec<RawDocumentBuf>, keeping: &Keeping, lane: &mut Lane) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let put = lane.insert_absent(&self.target, batch).await?;
        // One that the target does not take now is looked at again after the copy.
        Marks::of(&self.mongo, &self.job).set(&put.refused).await?;
        keeping.inserted.fetch_add(put.inserted, Ordering::Relaxed);
        keeping.existing.fetch_add(put.existing, Ordering::Relaxed);
        crate::crash::point("after_kept_batch");
        Ok(())
    }
}
