//! Files of keys: CSV and JSON lines, row by row, whatever stands in them.
//!
//! A file that somebody exported elsewhere is never clean. So a row is either a
//! record or a problem with its line, and reading goes on after a problem.
//! Memory is bounded by the longest record that is accepted.

mod csv_rows;
mod feed;
mod json_rows;
mod writer;

use std::io::Read;
use std::path::Path;

use serde_json::Value;

use self::csv_rows::CsvRows;
use self::json_rows::JsonRows;
use super::Answer;
use crate::config::values::Pattern;
use crate::error::Result;

pub use self::writer::Writer;

/// No record may be longer, in bytes. It stops a quote without its partner from
/// taking the rest of the file into memory.
pub const LONGEST_RECORD: u64 = 1024 * 1024;
/// A row is shown up to so many characters.
const SHOWN_CHARACTERS: usize = 500;
/// What some editors put before UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The names that columns and fields may have.
const LEGACY_NAMES: [&str; 2] = ["legacyKey", "legacy_key"];
const KEY_NAMES: [&str; 2] = ["newKey", "new_key"];

/// The format of a dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Comma-separated values with a header (RFC 4180).
    Csv,
    /// One JSON object per line.
    Jsonl,
}

impl Format {
    /// The format that a file's extension tells.
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "csv" => Some(Self::Csv),
            "jsonl" | "ndjson" | "json" => Some(Self::Jsonl),
            _ => None,
        }
    }
}

/// What a row must fulfil and where its parts stand.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// Name of the column with the legacy key, where it has a name of its own.
    pub legacy_column: Option<String>,
    /// Name of the column with the new key, where it has a name of its own.
    pub key_column: Option<String>,
    /// What a new key looks like.
    pub key_pattern: Option<Pattern>,
}

/// One answer of a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The text of the legacy key.
    pub legacy_key: String,
    /// What is known about it.
    pub answer: Answer,
}

/// Why a row is not taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// One word, to count by.
    pub reason: &'static str,
    /// What is wrong, for people.
    pub message: String,
    /// The row as far as it could be read.
    pub row: Value,
}

/// One row of a dump.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The line it begins at, counted from 1.
    pub line: u64,
    /// The record, or what is wrong with it.
    pub record: Result<Record, Problem>,
}

/// What is wrong with a row, before it is known which row.
type Fault = (&'static str, String);

/// Reads a dump; the rows come one by one. An item that is an error means that
/// nothing more can be read.
///
/// # Errors
/// A usage error where the header names no legacy key or new key.
pub fn read(
    input: impl Read + Send + 'static,
    format: Format,
    rules: Rules,
) -> Result<Box<dyn Iterator<Item = Result<Row>> + Send>> {
    Ok(match format {
        Format::Csv => Box::new(CsvRows::open(input, rules)?),
        Format::Jsonl => Box::new(JsonRows::new(input, rules)),
    })
}

/// The parts of a row as they were found.
#[derive(Default)]
struct Parts<'a> {
    legacy_key: Option<String>,
    new_key: Option<String>,
    outcome: Option<&'a str>,
    held: bool,
}

impl Rules {
    fn is_legacy(&self, name: &str) -> bool {
        names(self.legacy_column.as_deref(), &LEGACY_NAMES, name)
    }

    fn is_key(&self, name: &str) -> bool {
        names(self.key_column.as_deref(), &KEY_NAMES, name)
    }

    /// Turns the parts of a row into a record. Pure.
    fn record(&self, parts: Parts<'_>) -> Result<Record, Fault> {
        let legacy_key = parts
            .legacy_key
            .filter(|key| !key.is_empty())
            .ok_or_else(|| ("legacy_key", "the legacy key is empty or of a type that can't be one".into()))?;
        if parts.held {
            return Err(("held", "the answer was held: no guard has judged it yet".into()));
        }
        let new_key = parts.new_key.filter(|key| !key.is_empty());
        let answer = match (parts.outcome.filter(|outcome| !outcome.is_empty()), new_key) {
            (None | Some("found"), Some(key)) => Answer::Found(self.checked(key)?),
            (None | Some("found"), None) => {
                return Err(("new_key", "there is no new key, and no outcome that says so".into()));
            }
            (Some("not_found"), None) => Answer::NotFound,
            (Some("rejected"), None) => Answer::Rejected,
            (Some(outcome @ ("not_found" | "rejected")), Some(_)) => {
                return Err(("outcome", format!("there is a new key although the outcome is {outcome}")));
            }
            (Some(other), _) => {
                let message = format!("`{}` is none of found, not_found and rejected", shortened(other));
                return Err(("outcome", message));
            }
        };
        Ok(Record { legacy_key, answer })
    }

    fn checked(&self, key: String) -> Result<String, Fault> {
        if key.trim().is_empty() {
            return Err(("new_key", "the new key is blank".into()));
        }
        if key.contains(['\n', '\r']) {
            // No API hands these out; a quote in the wrong place does.
            return Err(("new_key", "the new key holds a line break".into()));
        }
        match &self.key_pattern {
            Some(pattern) if !pattern.matches(&key) => {
                Err(("key_pattern", format!("the new key does not match {}", pattern.as_str())))
            }
            _ => Ok(key),
        }
    }
}

fn names(own: Option<&str>, usual: &[&str], name: &str) -> bool {
    own.map_or_else(|| usual.contains(&name), |own| own == name)
}

fn problem((reason, message): Fault, row: Value) -> Problem {
    Problem { reason, message, row }
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests;
