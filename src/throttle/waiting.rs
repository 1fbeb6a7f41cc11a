//! The words for what keeps calls waiting.

use std::fmt;

/// What keeps the next call from leaving right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Waiting {
    /// An operator paused the job.
    Paused,
    /// The secondaries lag behind.
    ReplicationLag,
    /// The server slows writes down by itself.
    FlowControl,
    /// What the database does can't be found out.
    LostSignal,
    /// No window is open.
    Window,
    /// The day's calls are used up.
    DailyLimit,
    /// The API asked for a pause by `Retry-After`.
    RetryAfter,
    /// The rate is lowered because the API got slow.
    ApiLatency,
    /// The rate is lowered because the API fails too often.
    ApiErrors,
    /// The rate.
    Rate,
    /// The documents per second that an operator allows.
    Documents,
}

impl Waiting {
    /// The word for it in results and on the status line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Paused => "paused",
            Self::ReplicationLag => "replication lag",
            Self::FlowControl => "flow control",
            Self::LostSignal => "lost signal",
            Self::Window => "window",
            Self::DailyLimit => "daily limit",
            Self::RetryAfter => "retry-after",
            Self::ApiLatency => "api latency",
            Self::ApiErrors => "api errors",
            Self::Rate => "tps",
            Self::Documents => "documents/s limit",
        }
    }
}

impl fmt::Display for Waiting {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}
