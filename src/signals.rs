//! SIGINT, SIGTERM and SIGHUP: the first one drains, the second ends the process.
//!
//! Draining has an end, whatever the server or the network does: first no reply of the
//! database is awaited any longer, so that the run ends by itself; then the run is given
//! up; and where even its result can't be told, the process ends without.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::event::Events;
use crate::mongo::door;

const SIGHUP: u8 = 1;
const SIGINT: u8 = 2;
/// Also the end that live control asks for.
pub(crate) const SIGTERM: u8 = 15;

/// For so long after the first signal replies of the database are awaited.
const AWAITING: Duration = Duration::from_secs(5);
const _: () = assert!(door::GRACE.as_secs() < AWAITING.as_secs(), "the server is told to end before that");
/// For so long the run may take to end.
pub(crate) const DRAINING: Duration = Duration::from_secs(8);
/// When the process ends without a result, whatever it is doing.
const AT_THE_LATEST: Duration = Duration::from_millis(9_700);

/// Whether draining has an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drain {
    /// As for every command that people type.
    Bounded,
    /// Somebody relies on what the process is there for.
    Unbounded,
}

/// The first signal that was received, or that live control stands for.
#[derive(Debug, Default)]
pub(crate) struct Received {
    number: AtomicU8,
    by_control: AtomicBool,
    /// Cancelled when the run should have ended by now.
    overdue: CancellationToken,
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

    /// Waits until a run that was to drain should have ended.
    pub(crate) async fn overdue(&self) {
        self.overdue.cancelled().await;
    }
}

/// Watches for signals: the first cancels `stop`, the second exits at once,
/// which is safe because the documents are the checkpoint.
pub(crate) fn watch(stop: CancellationToken, events: Events, drain: Drain) -> Arc<Received> {
    let received = Arc::new(Received::default());
    let (Ok(interrupt), Ok(terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        events.warn("signals can't be watched: Ctrl-C ends the program without draining");
        return received;
    };
    let hangup = if is_hangup_ignored() { None } else { signal(SignalKind::hangup()).ok() };
    let first = received.clone();
    tokio::spawn(async move {
        let mut signals = Signals { interrupt, terminate, hangup };
        loop {
            let number = signals.next().await;
            if stop.is_cancelled() {
                exit_now(number);
            }
            first.number.store(number, Ordering::Relaxed);
            first.by_control.store(false, Ordering::Relaxed);
            events.note("stopping: what is under way is finished and saved (again to end at once)");
            stop.cancel();
            if drain == Drain::Bounded {
                bound(first.clone(), number);
            }
        }
    });
    received
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// The end of the terminal or of the connection to it.
    hangup: Option<Signal>,
}

impl Signals {
    /// The number of the next one.
    async fn next(&mut self) -> u8 {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => SIGINT,
            _ = self.terminate.recv() => SIGTERM,
            _ = hangup => SIGHUP,
        }
    }
}

/// Whether the process was started to outlive its terminal (`nohup`). Where that can't
/// be found out the signal does what it does by default.
fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_none_or(|mask| mask & (1 << (SIGHUP - 1)) != 0)
}

/// Sets an end to draining.
fn bound(received: Arc<Received>, number: u8) {
    tokio::spawn(async move {
        tokio::time::sleep(AWAITING).await;
        door::close(number);
        tokio::time::sleep(DRAINING - AWAITING).await;
        received.overdue.cancel();
    });
    // A thread: the tasks may be what hangs, or a reader of the result that does not read.
    std::thread::spawn(move || {
        std::thread::sleep(AT_THE_LATEST);
        exit_now(number);
    });
}

#[expect(clippy::exit, reason = "the operator asked twice, or draining does not end")]
fn exit_now(signal: u8) {
    std::process::exit(128 + i32::from(signal))
}
