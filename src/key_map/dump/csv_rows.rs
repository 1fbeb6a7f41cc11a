//! The rows of a CSV file, found by the names in its header.

use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use super::feed::{Feed, Position};
use super::{Fault, Parts, Record, Row, Rules, problem, shortened};
use crate::error::{Error, Result};

/// Where the parts stand in a CSV file.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    fields: usize,
    legacy_key: usize,
    new_key: Option<usize>,
    outcome: Option<usize>,
    held: Option<usize>,
}

impl Header {
    fn find(columns: &csv::StringRecord, rules: &Rules) -> Result<Self> {
        let found = || columns.iter().collect::<Vec<_>>().join(", ");
        let one = |what: &str, is_it: &dyn Fn(&str) -> bool| -> Result<Option<usize>> {
            let mut positions = columns.iter().enumerate().filter(|(_, name)| is_it(name));
            match (positions.next(), positions.next()) {
                (_, Some(_)) => Err(Error::usage(format!("two columns are the {what}: {}", found()))),
                (first, None) => Ok(first.map(|(position, _)| position)),
            }
        };
        let header = Self {
            fields: columns.len(),
            legacy_key: one("legacy key", &|name| rules.is_legacy(name))?.ok_or_else(|| {
                Error::usage(format!("no column of the file is the legacy key; there are: {}", found()))
                    .hint("the first line must name the columns; name yours with --legacy-column")
            })?,
            new_key: one("new key", &|name| rules.is_key(name))?,
            outcome: one("outcome", &|name| name == "outcome")?,
            held: one("held", &|name| name == "held")?,
        };
        if header.new_key.is_none() && (header.outcome.is_none() || rules.key_column.is_some()) {
            return Err(Error::usage(format!(
                "no column of the file is the new key; there are: {}",
                found()
            ))
            .hint("name yours with --key-column"));
        }
        Ok(header)
    }
}

/// The rows of a CSV file.
pub(super) struct CsvRows<R> {
    reader: csv::Reader<Feed<R>>,
    position: Arc<Mutex<Position>>,
    header: Header,
    rules: Rules,
    ended: bool,
}

impl<R: Read> CsvRows<R> {
    pub(super) fn open(input: R, rules: Rules) -> Result<Self> {
        let (feed, position) = Feed::new(input);
        let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(feed);
        let mut first = csv::StringRecord::new();
        let unreadable = |error: csv::Error| Error::usage(format!("the header can't be read: {error}"));
        position.lock().unwrap_or_else(PoisonError::into_inner).begin_record();
        if !reader.read_record(&mut first).map_err(unreadable)? {
            return Err(Error::usage("the file is empty: a CSV file begins with the names of its columns"));
        }
        let end = reader.position().byte();
        position.lock().unwrap_or_else(PoisonError::into_inner).quotes_before(end);
        let header = Header::find(&first, &rules)?;
        Ok(Self { reader, position, header, rules, ended: false })
    }

    fn row(&mut self) -> Option<Result<Row>> {
        let mut fields = csv::ByteRecord::new();
        self.position.lock().unwrap_or_else(PoisonError::into_inner).begin_record();
        let start = self.reader.position().byte();
        let more = self.reader.read_byte_record(&mut fields);
        let end = self.reader.position().byte();
        let mut position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        match more {
            Ok(false) => None,
            Ok(true) => {
                let breaks = fields.iter().flatten().filter(|byte| **byte == b'\n').count();
                let is_odd = position.quotes_before(end) % 2 == 1;
                let unclosed = breaks > 0 && is_odd;
                // A line break at the end of an open quote belongs to its field.
                let line = position.line_at(if unclosed { end + 1 } else { end });
                let line = line.saturating_sub(u64::try_from(breaks).unwrap_or(0));
                let record = if unclosed { Err(unclosed_quote()) } else { self.record(&fields) };
                Some(Ok(Row { line, record: record.map_err(|fault| problem(fault, shown(&fields))) }))
            }
            Err(_) if position.is_exhausted() => {
                self.ended = true;
                let message =
                    "the record is longer than 1 MiB, for want of a closing quote? Nothing after it was read";
                let record = Err(problem(("too_long", message.into()), Value::Null));
                Some(Ok(Row { line: position.line_at(start + 2), record }))
            }
            Err(error) => {
                self.ended = true;
                Some(Err(Error::stopped(format!("the file can't be read on: {error}"))))
            }
        }
    }

    fn record(&self, fields: &csv::ByteRecord) -> Result<Record, Fault> {
        if fields.len() != self.header.fields {
            let message = format!("{} fields, where the header has {}", fields.len(), self.header.fields);
            return Err(("fields", message));
        }
        let text = |position: usize| {
            std::str::from_utf8(fields.get(position).unwrap_or_default())
                .map_err(|_| ("encoding", "the text is no valid UTF-8".to_owned()))
        };
        let optional = |position: Option<usize>| position.map(text).transpose();
        self.rules.record(Parts {
            legacy_key: Some(text(self.header.legacy_key)?.to_owned()),
            new_key: optional(self.header.new_key)?.map(Into::into),
            outcome: optional(self.header.outcome)?,
            held: optional(self.header.held)? == Some("true"),
        })
    }
}

impl<R: Read> Iterator for CsvRows<R> {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended { None } else { self.row() }
    }
}

/// What a parser takes for one long field.
fn unclosed_quote() -> Fault {
    ("quote", "a quote is not closed: the lines after it were taken for one field".into())
}

fn shown(fields: &csv::ByteRecord) -> Value {
    fields.iter().map(|field| Value::from(shortened(&String::from_utf8_lossy(field)))).collect()
}
