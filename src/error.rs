//! Errors, grouped by what the reader must do about them.
//!
//! A message says what happened and to which document, host or file; a hint
//! says what to do next. The class alone decides the exit code, so that the
//! table in the README and the code can't come apart.

use std::fmt;

use crate::mongo::door::given_up_for;

/// What the reader of an error must do, and with it the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Mend the command line or the configuration. Nothing was touched.
    Usage,
    /// Mend the surroundings (index, target, privileges). Nothing was touched.
    Refused,
    /// Look at the cause, then start again: all state is kept.
    Stopped,
    /// Look yourself: what has become of a cutover could not be established.
    Unknown,
    /// The process was interrupted by a signal of this number; all state is saved.
    Interrupted(u8),
}

impl Class {
    /// The exit code of the process.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Usage => 2,
            Self::Refused => 3,
            Self::Stopped => 4,
            Self::Unknown => 5,
            Self::Interrupted(signal) => 128 + signal,
        }
    }

    /// The word for this class in JSON results.
    pub fn code(self) -> &'static str {
        match self {
            Self::Usage => "usage",
            Self::Refused => "refused",
            Self::Stopped => "stopped",
            Self::Unknown => "unknown",
            Self::Interrupted(_) => "interrupted",
        }
    }
}

/// An error as an operator sees it: class, message, cause and hint.
#[derive(Debug)]
pub struct Error {
    class: Class,
    message: String,
    hint: Option<String>,
}

/// The result of everything that can end a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of the given class.
    pub fn new(class: Class, message: impl Into<String>) -> Self {
        Self { class, message: message.into(), hint: None }
    }

    /// Bad usage or configuration (exit code 2).
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Class::Usage, message)
    }

    /// Refused by a check before anything was touched (exit code 3).
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(Class::Refused, message)
    }

    /// Stopped by a fatal condition with all state kept (exit code 4).
    pub fn stopped(message: impl Into<String>) -> Self {
        Self::new(Class::Stopped, message)
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same error in another class: a failed read before anything was
    /// touched is a refusal, the same failure in mid-run a stop.
    #[must_use]
    pub fn with_class(mut self, class: Class) -> Self {
        self.class = class;
        self
    }

    /// What the reader must do.
    pub fn class(&self) -> Class {
        self.class
    }

    /// What happened.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What to do next, where we know.
    pub fn next_step(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Puts the operation that failed in front of a foreign error.
pub trait Context<T> {
    /// Turns the error into a stop (exit code 4) that says what was being done.
    ///
    /// # Errors
    /// The original failure, as an [`Error`].
    fn during(self, operation: impl fmt::Display) -> Result<T>;
}

impl<T> Context<T> for std::result::Result<T, mongodb::error::Error> {
    fn during(self, operation: impl fmt::Display) -> Result<T> {
        self.map_err(|source| {
            if let Some(signal) = given_up_for(&source) {
                let message =
                    format!("interrupted; {operation} was given up: MongoDB did not answer in time");
                return Error::new(Class::Interrupted(signal), message).hint(
                    "the state is kept as it was last saved: start the same command again once the database \
                     answers",
                );
            }
            let hint = if is_another_collection(&source) {
                "another collection bears that name now: was it dropped, renamed or replaced? What was \
                 copied stays as it was; copy anew with --restart"
            } else {
                "the state is kept: mend the cause and start the same command again"
            };
            Error::stopped(format!("{operation} failed: {}", describe_mongo(&source))).hint(hint)
        })
    }
}

/// Whether a name is borne by another collection than the one that was meant.
fn is_another_collection(error: &mongodb::error::Error) -> bool {
    const UUID_MISMATCH: i32 = 361;
    matches!(error.kind.as_ref(), mongodb::error::ErrorKind::Command(command) if command.code == UUID_MISMATCH)
}

/// The result of a task. One that panicked is a bug of ours: the run stops, the
/// state is kept.
///
/// # Errors
/// A stop where the task panicked.
pub(crate) fn joined<T>(result: std::result::Result<T, tokio::task::JoinError>) -> Result<T> {
    result.map_err(|error| Error::stopped(format!("an internal task failed: {error}")))
}

/// The driver's message without its Rust wrapping, with the server's code.
pub(crate) fn describe_mongo(error: &mongodb::error::Error) -> String {
    use mongodb::error::{ErrorKind, WriteFailure};
    match error.kind.as_ref() {
        ErrorKind::Command(command) => {
            format!("{} ({} {})", command.message, command.code_name, command.code)
        }
        ErrorKind::ServerSelection { message, .. } => message.clone(),
        ErrorKind::Write(WriteFailure::WriteConcernError(error)) => {
            format!("{} ({})", error.message, error.code)
        }
        ErrorKind::Write(WriteFailure::WriteError(error)) => format!("{} ({})", error.message, error.code),
        ErrorKind::InsertMany(failure) => {
            let concern = failure.write_concern_error.as_ref().map(|error| (&error.message, error.code));
            let first =
                failure.write_errors.iter().flatten().next().map(|error| (&error.message, error.code));
            concern
                .or(first)
                .map_or("the insert failed".into(), |(message, code)| format!("{message} ({code})"))
        }
        // Not the error itself: it would add the server's whole reply, in bytes.
        kind => kind.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let codes: Vec<u8> = [
            Class::Usage,
            Class::Refused,
            Class::Stopped,
            Class::Unknown,
            Class::Interrupted(2),
            Class::Interrupted(15),
        ]
        .map(Class::exit_code)
        .to_vec();
        assert_eq!(codes, [2, 3, 4, 5, 130, 143]);
    }
}
