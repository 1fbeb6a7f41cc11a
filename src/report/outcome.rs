//! What a command came to: one JSON document, one text, one exit code.

use std::io::{ErrorKind, Write as _};

use serde_json::{Value, json};

use crate::cli::LogFormat;
use crate::error::Error;

/// The format of results on stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// Exactly one JSON document.
    Json,
}

/// The result of a command.
#[derive(Debug)]
pub struct Outcome {
    json: Value,
    text: String,
    exit: u8,
    error: Option<Error>,
}

impl Outcome {
    /// The goal was reached (exit code 0).
    pub fn reached(json: Value, text: impl Into<String>) -> Self {
        Self { json, text: text.into(), exit: 0, error: None }
    }

    /// The command ran, but the goal was not reached (exit code 1).
    pub fn not_reached(json: Value, text: impl Into<String>) -> Self {
        Self { exit: 1, ..Self::reached(json, text) }
    }

    /// The command ran and ended by an error.
    pub fn failed(mut json: Value, text: impl Into<String>, error: Error) -> Self {
        json["error"] = error_json(&error);
        Self { json, text: text.into(), exit: error.class().exit_code(), error: Some(error) }
    }

    /// A command that could not even start.
    pub fn from_error(command: &str, job: Option<&str>, error: Error) -> Self {
        let json = json!({"schema": 1, "command": command, "job": job});
        Self::failed(json, String::new(), error)
    }

    /// Sets the exit code of an outcome that refused something (exit code 3).
    #[must_use]
    pub fn with_exit(mut self, exit: u8) -> Self {
        self.exit = exit;
        self
    }

    /// The JSON result.
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// Adds a member and a line to the result.
    #[must_use]
    pub fn with(mut self, name: &str, value: Value, line: &str) -> Self {
        self.json[name] = value;
        if !self.text.is_empty() {
            self.text.push('\n');
        }
        self.text.push_str(line);
        self
    }

    /// The same where something else failed afterwards; an error that is there
    /// already remains the one that counts.
    #[must_use]
    pub fn and_failed(self, error: Error) -> Self {
        if self.error.is_some() {
            return self;
        }
        Self::failed(self.json, self.text, error)
    }

    /// Prints the result to stdout and the error, if any, to stderr; returns
    /// the exit code.
    pub fn print(self, format: Format, log: LogFormat) -> u8 {
        let result = match format {
            Format::Text => self.text,
            Format::Json => self.json.to_string(),
        };
        let written = write(&result);
        if let Some(error) = self.error {
            tell(&error, log);
        }
        match written {
            // A reader that went away is no failure of the command.
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                let lost = Error::stopped(format!("the result can't be written to stdout: {error}"))
                    .hint("what the command did is done; `mongorekey status` tells where the job is");
                tell(&lost, log);
                // An error of the command itself says more.
                if self.exit <= 1 { lost.class().exit_code() } else { self.exit }
            }
            _ => self.exit,
        }
    }
}

fn write(result: &str) -> std::io::Result<()> {
    if result.is_empty() {
        return Ok(());
    }
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{result}")?;
    stdout.flush()
}

/// Says on stderr what went wrong.
fn tell(error: &Error, log: LogFormat) {
    let text = match log {
        LogFormat::Text => {
            let next = error.next_step().map(|hint| format!("\n  next: {hint}")).unwrap_or_default();
            format!("mongorekey: {error}{next}")
        }
        LogFormat::Json => json!({
            "level": "error",
            "at": jiff::Timestamp::now().to_string(),
            "code": error.class().code(),
            "message": error.message(),
            "hint": error.next_step(),
        })
        .to_string(),
    };
    let _closed = writeln!(std::io::stderr(), "{text}");
}

fn error_json(error: &Error) -> Value {
    json!({
        "code": error.class().code(),
        "exit_code": error.class().exit_code(),
        "message": error.message(),
        "hint": error.next_step(),
    })
}
