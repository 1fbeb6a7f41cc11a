//! SIGINT and SIGTERM: the first one drains, the second ends the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::event::Events;

const SIGINT: u8 = 2;
/// Also the end that live control asks for.
pub(crate) const SIGTERM: u8 = 15;

/// The first signal that was received.
#[derive(Debug, Default)]
pub(crate) struct Received(AtomicU8);

impl Received {
    /// Its number; SIGINT where none was received.
    pub(crate) fn number(&self) -> u8 {
        match self.0.load(Ordering::Relaxed) {
            0 => SIGINT,
            number => number,
        }
    }
}

/// Watches for signals: the first cancels `stop`, the second exits at once,
/// which is safe because the documents are the checkpoint.
pub(crate) fn watch(stop: CancellationToken, events: Events) -> Arc<Received> {
    let received = Arc::new(Received::default());
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        events.warn("signals can't be watched: Ctrl-C ends the program without draining");
        return received;
    };
    let first = received.clone();
    tokio::spawn(async move {
        loop {
            let number = tokio::select! {
                _ = interrupt.recv() => SIGINT,
                _ = terminate.recv() => SIGTERM,
            };
            if stop.is_cancelled() {
                exit_now(number);
            }
            first.0.store(number, Ordering::Relaxed);
            events.note("stopping: what is under way is finished and saved (again to end at once)");
            stop.cancel();
        }
    });
    received
}

#[expect(clippy::exit, reason = "the operator asked twice")]
fn exit_now(signal: u8) {
    std::process::exit(128 + i32::from(signal))
}
