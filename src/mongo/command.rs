//! Sending again what failed for a passing reason.
//!
//! The driver repeats a read or a single write once, and a raw command never.
//! An election takes ten seconds and more, so everything that is safe to repeat
//! goes through here: reads, and writes guarded by the state they expect.

use std::fmt::Display;
use std::future::Future;
use std::time::Duration;

use mongodb::error::{Error as DriverError, ErrorKind, WriteFailure};
use tokio_retry::RetryIf;
use tokio_retry::strategy::{ExponentialBackoff, jitter};

use super::door;
use crate::error::{Context, Result, describe_mongo};

/// Server errors that pass: elections, shutdowns, interrupted or conflicting
/// operations, plans that were killed, time limits.
const TRANSIENT_CODES: [i32; 21] = [
    6, 7, 24, 50, 64, 89, 91, 112, 134, 175, 189, 262, 9001, 10107, 11600, 11601, 11602, 13388, 13435, 13436,
    43,
];

/// Attempts after the first; with their waits they cover about a minute.
const RETRIES: usize = 16;
/// No wait is longer than this.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Runs an operation until it succeeds, fails for good or has failed for too long.
///
/// # Errors
/// The last failure, as a stop that names the operation.
pub async fn retrying<T, F>(operation: impl Display, action: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = mongodb::error::Result<T>>,
{
    let waits =
        ExponentialBackoff::from_millis(2).factor(50).max_delay(LONGEST_WAIT).map(jitter).take(RETRIES);
    let is_transient = |error: &DriverError| {
        let transient = is_transient(error);
        if transient {
            let error = describe_mongo(error);
            tracing::debug!(%operation, error, "will be sent again");
        }
        transient
    };
    door::ask(RetryIf::start(waits, action, is_transient)).await.during(&operation)
}

/// Whether the same operation may succeed a little later.
pub fn is_transient(error: &DriverError) -> bool {
    if error.contains_label("RetryableWriteError") || error.contains_label("TransientTransactionError") {
        return true;
    }
    match error.kind.as_ref() {
        ErrorKind::Io(_) | ErrorKind::ServerSelection { .. } | ErrorKind::ConnectionPoolCleared { .. } => {
            true
        }
        ErrorKind::Command(command) => is_transient_code(command.code),
        // Written, but not yet on a majority: what is sent again waits for that.
        ErrorKind::Write(WriteFailure::WriteConcernError(_)) => true,
        ErrorKind::InsertMany(failure) => failure.write_concern_error.is_some(),
        _ => false,
    }
}

/// Whether a server error of that code passes.
pub fn is_transient_code(code: i32) -> bool {
    TRANSIENT_CODES.contains(&code)
}

/// The attempts at one operation, for a loop of its own: an operation on a session
/// can't be shared between attempts as [`retrying`] wants it.
#[derive(Debug, Default)]
pub struct Attempts {
    failed: usize,
}

impl Attempts {
    /// Whether the operation may be sent again after this failure; waits until
    /// it should be.
    pub async fn again(&mut self, operation: &impl Display, error: &DriverError) -> bool {
        let mut waits = ExponentialBackoff::from_millis(2).factor(50).max_delay(LONGEST_WAIT).take(RETRIES);
        let Some(wait) = waits.nth(self.failed).filter(|_| is_transient(error)) else { return false };
        self.failed += 1;
        let error = describe_mongo(error);
        tracing::debug!(%operation, error, "will be sent again");
        tokio::select! {
            () = tokio::time::sleep(jitter(wait)) => true,
            _signal = door::closed() => false,
        }
    }
}
