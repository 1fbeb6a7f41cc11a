//! No reply of the server is awaited without an end.
//!
//! A server, or a network, may take a command and never answer. What is awaited then is
//! given up, and what has become of the command is *unknown*: it may be carried out
//! later. So only that is sent again which may be: reads, and writes that the server
//! refuses or that change nothing when they arrive twice. Once the process is to end
//! nothing is sent again, and what is awaited is given up at once.

use std::future::Future;
use std::io;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use mongodb::error::{Error as DriverError, Result};
use tokio_util::sync::CancellationToken;

/// How long what the server is doing may go on after the first signal. Then it is ended at
/// the server, which has to be done before the door is closed.
pub(crate) const GRACE: Duration = Duration::from_secs(3);

/// Waits until what the server is doing is to be ended because of a signal.
pub async fn grace_is_over(stop: &CancellationToken) {
    stop.cancelled().await;
    tokio::time::sleep(GRACE).await;
}

/// The one of this process.
static DOOR: LazyLock<Door> = LazyLock::new(Door::default);

/// Closed when the process is to end; never opened again.
#[derive(Debug, Default)]
struct Door {
    closed: CancellationToken,
    signal: AtomicU8,
}

impl Door {
    fn close(&self, signal: u8) {
        self.signal.store(signal, Ordering::Relaxed);
        self.closed.cancel();
    }

    async fn ask<T>(&self, reply: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            // A reply that is there counts, however late it is.
            biased;
            reply = reply => reply,
            () = self.closed.cancelled() => {
                Err(DriverError::custom(GivenUp { signal: self.signal.load(Ordering::Relaxed) }))
            }
        }
    }
}

/// A reply that is not awaited any longer because the process is to end.
#[derive(Debug, Clone, Copy)]
struct GivenUp {
    signal: u8,
}

/// Gives up all that is awaited, now and from now on, because of that signal.
pub(crate) fn close(signal: u8) {
    DOOR.close(signal);
}

/// Waits until the process is to end; tells the signal.
pub(crate) async fn closed() -> u8 {
    DOOR.closed.cancelled().await;
    DOOR.signal.load(Ordering::Relaxed)
}

/// The signal because of which something was given up.
pub(crate) fn given_up_for(error: &DriverError) -> Option<u8> {
    error.get_custom::<GivenUp>().map(|given_up| given_up.signal)
}

/// Awaits something as long as it takes, but not beyond the end of the process.
///
/// # Errors
/// The driver's error; one that is not to be sent again once the process is to end.
pub async fn ask<T>(reply: impl Future<Output = Result<T>>) -> Result<T> {
    DOOR.ask(reply).await
}

/// Awaits a reply that a healthy server gives within this time. What has become of a
/// command without a reply is as unknown as where its connection is lost.
///
/// # Errors
/// The driver's error; that of a lost connection where there is no reply.
pub async fn ask_within<T>(limit: Duration, reply: impl Future<Output = Result<T>>) -> Result<T> {
    let late = || {
        let text = format!("no answer within {} s", limit.as_secs());
        Err(DriverError::from(io::Error::new(io::ErrorKind::TimedOut, text)))
    };
    ask(async { tokio::time::timeout(limit, reply).await.unwrap_or_else(|_| late()) }).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mongo::command::is_transient;

    #[tokio::test]
    async fn what_is_awaited_ends_when_the_door_is_closed() {
        let door = Door::default();
        let hanging = door.ask(std::future::pending::<Result<()>>());
        let closing = async { door.close(15) };
        let error = tokio::join!(hanging, closing).0.expect_err("no reply");
        assert_eq!(given_up_for(&error), Some(15));
        assert!(!is_transient(&error), "it would be sent again");
        assert!(door.ask(async { Ok(7) }).await.is_ok_and(|reply| reply == 7), "a reply that is there");
    }

    #[tokio::test(start_paused = true)]
    async fn a_reply_that_does_not_come_counts_as_a_lost_connection() {
        let hanging = ask_within(Duration::from_secs(5), std::future::pending::<Result<()>>());
        let error = hanging.await.expect_err("no reply");
        assert!(is_transient(&error) && given_up_for(&error).is_none(), "{error}");
    }
}
