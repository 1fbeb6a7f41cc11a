//! SIGINT and SIGTERM: the first one drains, the second ends the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::event::Events;

const SIGINT: u8 = 2;
/// Also the end that live control asks for.
pub(crate) const SIGTERM: u8 = 15;

/// The first signal that was received, or that live control stands for.
#[derive(Debug, Default)]
pub(crate) struct Received {
    number: AtomicU8,
    by_control: AtomicBool,
}

impl Received {
    /// Its number; SIGINT where none was received.
    pub(crate) fn number(&self) -> u8 {
        match self.number.load(Ordering::Relaxed) {
            0 => SIGINT,
            number => number,
        }
    }

    /// Lets the wish of an operator to end the run count as a signal.
    pub(crate) fn ask_by_control(&self) {
        let is_first = self.number.compare_exchange(0, SIGTERM, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        self.by_control.fetch_or(is_first, Ordering::Relaxed);
    }

    /// Whether it was live control and no signal.
    pub(crate) fn is_by_control(&self) -> bool {
        self.by_control.load(Ordering::Relaxed)
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
            first.number.store(number, Ordering::Relaxed);
            first.by_control.store(false, Ordering::Relaxed);
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
