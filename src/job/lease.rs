//! The lease: one process per job, proven by renewing in time.
//!
//! Renewal uses the server's clock; the holder judges by its own clocks, counted
//! from before the last renewal was sent, so it always stops before the server
//! lets another one in. One of them goes on while the machine is suspended.

use std::time::Duration;

use bson::{Document, doc};
use mongodb::Collection;
use mongodb::options::ReturnDocument;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::{Deadline, Moment};
use crate::error::{Class, Error, Result, describe_mongo};
use crate::mongo::door;

/// How long a lease lasts without renewal.
pub const LEASE_MILLISECONDS: i64 = 10_000;
/// How often it is renewed.
///
/// Each renewal brings the job document along, and with it what operators and
/// other workers want: hence once per second.
const RENEWAL: Duration = Duration::from_secs(1);
/// How soon a renewal that failed is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// A database that is away for longer ends the run.
const LONGEST_OUTAGE: Duration = Duration::from_secs(120);
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
    /// Cancelled when somebody else has the lease; never before.
    lost: CancellationToken,
    /// Until when the holder may write; the renewing task moves it on.
    valid_until: watch::Receiver<Deadline>,
    /// The job document as the last renewal saw it.
    document: watch::Receiver<Document>,
}

/// What is renewed, and in which document.
#[derive(Debug)]
pub(super) struct Renewal {
    pub(super) collection: Collection<Document>,
    /// Finds the job, as long as the lease is ours.
    pub(super) filter: Document,
    /// Where in the document the lease stands.
    pub(super) path: String,
}

impl Lease {
    /// Starts renewing a lease that was just taken, with the job as it was then.
    pub(super) fn keep(renewal: Renewal, job: String, document: Document) -> Self {
        let (renewed, valid_until) = watch::channel(Moment::now().deadline(holding_time()));
        let (seen, document) = watch::channel(document);
        let watch = LeaseWatch { job, lost: CancellationToken::new(), valid_until, document };
        let released = CancellationToken::new();
        tokio::spawn(renew(renewal, renewed, seen, watch.lost.clone(), released.clone()));
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
    /// Name of the job.
    pub(crate) fn job(&self) -> &str {
        &self.job
    }

    /// Cancelled when the lease is lost.
    pub fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// The job document, as each renewal brings it along.
    pub fn document(&self) -> watch::Receiver<Document> {
        self.document.clone()
    }

    /// Whether the lease is known to be ours right now.
    pub fn is_valid(&self) -> bool {
        !self.lost.is_cancelled() && !self.valid_until.borrow().has_passed()
    }

    /// Waits until the lease is known to be ours, which it is at once unless the
    /// database could not be reached for a while. Nothing may be begun before.
    ///
    /// # Errors
    /// A stop where somebody else has it, or that can't be found out.
    pub async fn valid(&self) -> Result<()> {
        let mut valid_until = self.valid_until.clone();
        let given_up = Instant::now() + LONGEST_OUTAGE;
        loop {
            if self.lost.is_cancelled() {
                return Err(lost(&self.job));
            }
            if !valid_until.borrow_and_update().has_passed() {
                return Ok(());
            }
            tokio::select! {
                () = self.lost.cancelled() => {}
                signal = door::closed() => return Err(interrupted(&self.job, signal)),
                changed = valid_until.changed() => changed.map_err(|_| lost(&self.job))?,
                () = tokio::time::sleep_until(given_up) => return Err(Error::stopped(format!(
                    "the lease of the job {} could not be renewed for {} s",
                    self.job,
                    LONGEST_OUTAGE.as_secs()
                ))
                .hint("is the database reachable? Started again, the job goes on from its checkpoint")),
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.released.cancel();
    }
}

/// The error of a holder that is none any more.
pub(crate) fn lost(job: &str) -> Error {
    Error::stopped(format!("the lease of the job {job} is lost: another process may run it now"))
        .hint("see `mongorekey status`; started again, the job goes on from its checkpoint")
}

/// The error of a holder that had to end before it knew whether it is one still.
fn interrupted(job: &str, signal: u8) -> Error {
    let message =
        format!("interrupted; the lease of the job {job} could not be renewed: MongoDB did not answer");
    Error::new(Class::Interrupted(signal), message)
        .hint("started again once the database answers, the job goes on from its checkpoint")
}

fn holding_time() -> Duration {
    Duration::from_millis(LEASE_MILLISECONDS.unsigned_abs()) - MARGIN
}

/// Renews until released. A renewal that fails is tried again, past the
/// deadline too: the fence tells whether somebody else was faster.
async fn renew(
    renewal: Renewal,
    renewed: watch::Sender<Deadline>,
    seen: watch::Sender<Document>,
    lost: CancellationToken,
    released: CancellationToken,
) {
    let Renewal { collection, filter, path } = renewal;
    let update = vec![doc! {"$set": times(&path)}];
    let mut pause = RENEWAL;
    loop {
        tokio::select! {
            () = released.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        let sent = Moment::now();
        let update = collection
            .find_one_and_update(filter.clone(), update.clone())
            .return_document(ReturnDocument::After);
        match update.await {
            Ok(Some(document)) => {
                renewed.send_replace(sent.deadline(holding_time()));
                seen.send_replace(document);
                pause = RENEWAL;
            }
            Ok(None) => return lost.cancel(),
            Err(error) => {
                let error = describe_mongo(&error);
                tracing::info!(error, "the lease could not be renewed; trying again");
                pause = RETRY;
            }
        }
    }
}

/// The times of a lease at that path, by the server's clock.
pub(super) fn times(path: &str) -> Document {
    doc! {
        format!("{path}.renewed_at"): "$$NOW",
        format!("{path}.expires_at"): {"$add": ["$$NOW", LEASE_MILLISECONDS]},
    }
}
