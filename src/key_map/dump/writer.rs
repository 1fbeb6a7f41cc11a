//! Writes a dump that can be read again.

use std::io::Write;

use serde_json::json;

use super::Format;
use crate::key_map::{Remembered, StoredOutcome};

/// Writes a dump.
pub enum Writer<W: Write> {
    /// As CSV.
    Csv(Box<csv::Writer<W>>),
    /// As JSON lines.
    Jsonl(W),
}

impl<W: Write> Writer<W> {
    /// A writer; CSV begins with its header. `with_held` adds a column that
    /// marks held answers.
    ///
    /// # Errors
    /// The failure to write.
    pub fn new(output: W, format: Format, with_held: bool) -> std::io::Result<Self> {
        match format {
            Format::Jsonl => Ok(Self::Jsonl(output)),
            Format::Csv => {
                let mut writer = csv::Writer::from_writer(output);
                let columns = ["legacyKey", "newKey", "outcome", "held"];
                writer.write_record(&columns[..if with_held { 4 } else { 3 }])?;
                Ok(Self::Csv(Box::new(writer)))
            }
        }
    }

    /// Writes one answer.
    ///
    /// # Errors
    /// The failure to write.
    pub fn write(&mut self, legacy_key: &str, known: &Remembered, with_held: bool) -> std::io::Result<()> {
        let outcome: StoredOutcome = known.answer.outcome();
        match self {
            Self::Csv(writer) => {
                let held = if known.held { "true" } else { "false" };
                let fields = [legacy_key, known.answer.new_key().unwrap_or_default(), outcome.as_str(), held];
                writer.write_record(&fields[..if with_held { 4 } else { 3 }])?;
                Ok(())
            }
            Self::Jsonl(output) => {
                let mut line = json!({"legacyKey": legacy_key});
                if let Some(key) = known.answer.new_key() {
                    line["newKey"] = key.into();
                }
                line["outcome"] = outcome.as_str().into();
                if known.held {
                    line["held"] = true.into();
                }
                writeln!(output, "{line}")
            }
        }
    }

    /// Ends the dump and gives back what it was written to.
    ///
    /// # Errors
    /// The failure to write.
    pub fn finish(self) -> std::io::Result<W> {
        match self {
            Self::Csv(writer) => {
                writer.into_inner().map_err(|error| std::io::Error::other(error.to_string()))
            }
            Self::Jsonl(mut output) => output.flush().map(|()| output),
        }
    }
}
