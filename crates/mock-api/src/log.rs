//! Every call that came, as the server saw it: what a client says about its own calls is worth
//! little in a test of that client.

use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use serde::{Serialize, Serializer};

/// One call and how it ended; one line of the log.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Call {
    /// When its head had arrived. Derived from the start and a monotonic clock, so it never jumps.
    #[serde(serialize_with = "with_microseconds")]
    pub at: Timestamp,
    /// The same in microseconds since the log was opened.
    pub since_start_us: u64,
    /// HTTP method.
    pub method: String,
    /// The legacy key asked for; `None` for a batch, and where none could be read.
    pub key: Option<String>,
    /// The legacy keys of a batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keys: Option<Vec<String>>,
    /// How it ended.
    pub outcome: Outcome,
    /// HTTP status; `None` where nothing was answered.
    pub status: Option<u16>,
    /// Milliseconds from its arrival to its end.
    pub latency_ms: f64,
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// One key, answered with its new key.
    Found,
    /// One key, answered that it has no new key.
    NotFound,
    /// Many keys, answered one by one.
    Batch,
    /// 429.
    RateLimited,
    /// 500.
    ServerError,
    /// Deliberately not answered, until the client or the server went away.
    Timeout,
    /// Connection reset.
    Reset,
    /// 200 with broken JSON.
    Garbage,
    /// 200 with an HTML page.
    Html,
    /// Not a call that this API has: wrong path, method, body or key.
    BadRequest,
    /// The client or the server went away before the answer was due.
    Abandoned,
}

/// What came so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Calls that ended, a batch being one.
    pub calls: u64,
    /// The same calls by how they ended.
    pub outcomes: OutcomeCounts,
    /// Keys answered with a new key, in batches and alone.
    pub keys_found: u64,
    /// Keys answered as not found, in batches and alone.
    pub keys_not_found: u64,
}

/// Number of calls per [`Outcome`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "the names are those of the outcomes")]
pub struct OutcomeCounts {
    pub found: u64,
    pub not_found: u64,
    pub batch: u64,
    pub rate_limited: u64,
    pub server_error: u64,
    pub timeout: u64,
    pub reset: u64,
    pub garbage: u64,
    pub html: u64,
    pub bad_request: u64,
    pub abandoned: u64,
}

/// Where calls are written to and counted. Shared by all connections.
pub struct CallLog {
    started: Instant,
    started_at: Timestamp,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    summary: Summary,
    lines: Option<BufWriter<Box<dyn Write + Send>>>,
    memory: Option<Vec<Call>>,
    /// The first error, kept for [`CallLog::flush`]: a connection has nobody to tell.
    failure: Option<io::Error>,
}

impl CallLog {
    /// Only counts.
    #[must_use]
    pub fn counting() -> Self {
        Self::with(State::default())
    }

    /// Counts and keeps every call in memory, for [`CallLog::calls`]. Grows without bound.
    #[must_use]
    pub fn in_memory() -> Self {
        Self::with(State { memory: Some(Vec::new()), ..State::default() })
    }

    /// Counts and appends one JSON line per call to the file at `path`; `-` is stderr, and `None`
    /// only counts.
    ///
    /// # Errors
    ///
    /// When the file can't be opened for appending.
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        let writer: Box<dyn Write + Send> = match path {
            None => return Ok(Self::counting()),
            Some(path) if path == Path::new("-") => Box::new(io::stderr()),
            Some(path) => Box::new(OpenOptions::new().create(true).append(true).open(path)?),
        };
        Ok(Self::writing_to(writer))
    }

    fn writing_to(writer: Box<dyn Write + Send>) -> Self {
        Self::with(State { lines: Some(BufWriter::with_capacity(64 * 1024, writer)), ..State::default() })
    }

    fn with(state: State) -> Self {
        Self { started: Instant::now(), started_at: Timestamp::now(), state: Mutex::new(state) }
    }

    /// The calls that ended so far, in the order in which they ended: a client that has its answer
    /// finds its call here. Empty unless [`CallLog::in_memory`].
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.state().memory.clone().unwrap_or_default()
    }

    /// Counts of the calls that ended so far.
    #[must_use]
    pub fn summary(&self) -> Summary {
        self.state().summary
    }

    /// Writes out the lines that are still buffered.
    ///
    /// # Errors
    ///
    /// The first error of any write since the last flush.
    pub fn flush(&self) -> io::Result<()> {
        let mut state = self.state();
        if let Some(failure) = state.failure.take() {
            return Err(failure);
        }
        state.lines.as_mut().map_or(Ok(()), Write::flush)
    }

    /// Opens the entry of a call that has just arrived.
    pub(crate) fn arrival(&self, method: &str) -> OpenCall<'_> {
        OpenCall {
            log: self,
            arrived: Instant::now(),
            method: method.to_owned(),
            key: None,
            keys: None,
            outcome: Outcome::Abandoned,
            status: None,
            keys_found: 0,
            keys_not_found: 0,
        }
    }

    fn record(&self, call: Call, keys_found: u64, keys_not_found: u64) {
        let mut state = self.state();
        state.summary.calls += 1;
        state.summary.outcomes.add(call.outcome);
        state.summary.keys_found += keys_found;
        state.summary.keys_not_found += keys_not_found;
        state.write(&call);
        if let Some(memory) = &mut state.memory {
            memory.push(call);
        }
    }

    /// A panic of another connection leaves counts that are still worth reading.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn write(&mut self, call: &Call) {
        let Some(lines) = &mut self.lines else { return };
        let written = serde_json::to_writer(&mut *lines, call)
            .map_err(io::Error::from)
            .and_then(|()| lines.write_all(b"\n"));
        if let Err(error) = written {
            self.failure.get_or_insert(error);
        }
    }
}

impl OutcomeCounts {
    fn add(&mut self, outcome: Outcome) {
        let count = match outcome {
            Outcome::Found => &mut self.found,
            Outcome::NotFound => &mut self.not_found,
            Outcome::Batch => &mut self.batch,
            Outcome::RateLimited => &mut self.rate_limited,
            Outcome::ServerError => &mut self.server_error,
            Outcome::Timeout => &mut self.timeout,
            Outcome::Reset => &mut self.reset,
            Outcome::Garbage => &mut self.garbage,
            Outcome::Html => &mut self.html,
            Outcome::BadRequest => &mut self.bad_request,
            Outcome::Abandoned => &mut self.abandoned,
        };
        *count += 1;
    }
}

/// A call between its arrival and its end. Recorded when dropped: hyper drops the work on a call
/// when its client goes away, and such a call was made too.
pub(crate) struct OpenCall<'log> {
    log: &'log CallLog,
    arrived: Instant,
    method: String,
    pub(crate) key: Option<String>,
    pub(crate) keys: Option<Vec<String>>,
    pub(crate) outcome: Outcome,
    pub(crate) status: Option<u16>,
    pub(crate) keys_found: u64,
    pub(crate) keys_not_found: u64,
}

impl Drop for OpenCall<'_> {
    fn drop(&mut self) {
        let since_start = self.arrived.saturating_duration_since(self.log.started);
        let offset = SignedDuration::try_from(since_start).unwrap_or(SignedDuration::MAX);
        let call = Call {
            at: self.log.started_at.saturating_add(offset).unwrap_or(Timestamp::MAX),
            since_start_us: u64::try_from(since_start.as_micros()).unwrap_or(u64::MAX),
            method: std::mem::take(&mut self.method),
            key: self.key.take(),
            keys: self.keys.take(),
            outcome: self.outcome,
            status: self.status,
            latency_ms: milliseconds(self.arrived.elapsed()),
        };
        self.log.record(call, self.keys_found, self.keys_not_found);
    }
}

/// With three decimals: more digits would only pretend.
fn milliseconds(time: std::time::Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

fn with_microseconds<S: Serializer>(at: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{at:.6}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_documented_fields() {
        let call = Call {
            at: "2026-01-02T03:04:05.5Z".parse().unwrap(),
            since_start_us: 12,
            method: "GET".to_owned(),
            key: Some("가 1".to_owned()),
            keys: None,
            outcome: Outcome::NotFound,
            status: Some(404),
            latency_ms: 0.25,
        };
        assert_eq!(
            serde_json::to_string(&call).unwrap(),
            r#"{"at":"2026-01-02T03:04:05.500000Z","since_start_us":12,"method":"GET","key":"가 1","outcome":"not_found","status":404,"latency_ms":0.25}"#
        );
    }

    #[test]
    fn a_call_that_nobody_finished_is_recorded() {
        let log = CallLog::in_memory();
        log.arrival("GET").key = Some("K1".to_owned());
        assert_eq!(log.summary().outcomes.abandoned, 1);
        assert_eq!(log.calls()[0].key.as_deref(), Some("K1"));
        assert_eq!(log.calls()[0].status, None);
    }

    #[test]
    fn lines_are_appended() {
        let path = std::env::temp_dir().join(format!("mock-api-{}.log", std::process::id()));
        for _ in 0..2 {
            let log = CallLog::open(Some(&path)).unwrap();
            drop(log.arrival("GET"));
            log.flush().unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text.lines().count(), 2);
    }

    #[test]
    fn a_failing_log_is_an_error() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let log = CallLog::writing_to(Box::new(Full));
        for _ in 0..1000 {
            drop(log.arrival("GET"));
        }
        let error = log.flush().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
