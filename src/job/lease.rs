//! The lease: one process per job, proven by renewing in time.
//!
//! Renewal uses the server's clock; the holder judges by its own monotonic
//! clock, counted from before the last renewal was sent, so it always stops
//! before the server lets another one in.

use std::sync::Arc;
use std::time::Duration;

use bson::{Document, doc};
use mongodb::Collection;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};

/// How long a lease lasts without renewal.
pub const LEASE_MILLISECONDS: i64 = 10_000;
/// How often it is renewed; three renewals may fail.
const RENEWAL: Duration = Duration::from_millis(2_500);
/// The holder stops this long before the server's deadline.
const MARGIN: Duration = Duration::from_secs(1);

/// A lease that a background task renews.
#[derive(Debug)]
pub struct Lease {
    watch: LeaseWatch,
    /// Ends the renewing task.
    released: CancellationToken,
}

/// Tells whether a lease is still held; for whoever writes on its strength.
#[derive(Debug, Clone)]
pub struct LeaseWatch {
    job: String,
    /// Cancelled when the lease is lost; never before.
    lost: CancellationToken,
    /// Until when the holder may write.
    valid_until: Arc<std::sync::Mutex<Instant>>,
}

impl Lease {
    /// Starts renewing a lease that was just taken.
    pub(super) fn keep(collection: Collection<Document>, job: String, fence: i64) -> Self {
        let watch = LeaseWatch {
            job: job.clone(),
            lost: CancellationToken::new(),
            valid_until: Arc::new(std::sync::Mutex::new(Instant::now() + holding_time())),
        };
        let released = CancellationToken::new();
        tokio::spawn(renew(collection, doc! {"_id": job, "fence": fence}, watch.clone(), released.clone()));
        Self { watch, released }
    }

    /// For whoever writes on the strength of this lease.
    pub fn watch(&self) -> &LeaseWatch {
        &self.watch
    }

    pub(super) fn release(self) {
        self.released.cancel();
    }
}

impl LeaseWatch {
    /// Cancelled when the lease is lost.
    pub fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// Fails once the lease is lost: nothing may be written then.
    ///
    /// # Errors
    /// A stop that says so.
    pub fn check(&self) -> Result<()> {
        let in_time = self.valid_until.lock().is_ok_and(|until| Instant::now() < *until);
        if in_time && !self.lost.is_cancelled() { Ok(()) } else { Err(lost(&self.job)) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.released.cancel();
    }
}

/// The error of a holder that is none any more.
pub(super) fn lost(job: &str) -> Error {
    Error::stopped(format!("the lease of the job {job} is lost: another process may run it now"))
        .hint("see `mongorekey status`; started again, the job goes on from its checkpoint")
}

fn holding_time() -> Duration {
    Duration::from_millis(LEASE_MILLISECONDS.unsigned_abs()) - MARGIN
}

async fn renew(
    collection: Collection<Document>,
    filter: Document,
    watch: LeaseWatch,
    released: CancellationToken,
) {
    let LeaseWatch { lost, valid_until, .. } = watch;
    let update = vec![doc! {"$set": {
        "lease.renewed_at": "$$NOW",
        "lease.expires_at": {"$add": ["$$NOW", LEASE_MILLISECONDS]},
    }}];
    loop {
        let deadline = valid_until.lock().map_or_else(|_| Instant::now(), |until| *until);
        tokio::select! {
            () = released.cancelled() => return,
            () = tokio::time::sleep_until(deadline.min(Instant::now() + RENEWAL)) => {}
        }
        if Instant::now() >= deadline {
            lost.cancel();
            return;
        }
        let sent = Instant::now();
        match collection.update_one(filter.clone(), update.clone()).await {
            Ok(result) if result.matched_count == 1 => {
                if let Ok(mut until) = valid_until.lock() {
                    *until = sent + holding_time();
                }
            }
            Ok(_) => {
                lost.cancel();
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "the lease could not be renewed; trying again");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}
