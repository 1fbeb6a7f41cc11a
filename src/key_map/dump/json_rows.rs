//! The rows of a file of JSON lines.

use std::io::{BufRead, BufReader, Read};

use bson::{Bson, RawBson};
use serde_json::{Map, Value};

use super::{BYTE_ORDER_MARK, Fault, LONGEST_RECORD, Parts, Record, Row, Rules, problem, shortened};
use crate::error::{Error, Result};
use crate::legacy_key;

/// The rows of a file of JSON lines.
pub(super) struct JsonRows<R> {
    input: BufReader<R>,
    line: u64,
    rules: Rules,
    ended: bool,
}

impl<R: Read> JsonRows<R> {
    pub(super) fn new(input: R, rules: Rules) -> Self {
        Self { input: BufReader::new(input), line: 0, rules, ended: false }
    }

    /// The next line without its end, and whether it is whole; `None` at the end.
    fn next_line(&mut self) -> std::io::Result<Option<(Vec<u8>, bool)>> {
        let mut line = Vec::new();
        let mut limited = (&mut self.input).take(LONGEST_RECORD);
        if limited.read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        self.line += 1;
        let is_whole = line.ends_with(b"\n") || u64::try_from(line.len()).is_ok_and(|n| n < LONGEST_RECORD);
        if !is_whole {
            self.skip_line()?;
        }
        while line.last().is_some_and(|byte| b"\r\n".contains(byte)) {
            line.pop();
        }
        if self.line == 1 && line.starts_with(BYTE_ORDER_MARK) {
            line.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(Some((line, is_whole)))
    }

    fn skip_line(&mut self) -> std::io::Result<()> {
        loop {
            let buffer = self.input.fill_buf()?;
            let (length, end) = match buffer.iter().position(|byte| *byte == b'\n') {
                Some(position) => (position + 1, true),
                None => (buffer.len(), buffer.is_empty()),
            };
            self.input.consume(length);
            if end {
                return Ok(());
            }
        }
    }

    fn record(&self, line: &[u8]) -> Result<Record, Fault> {
        let text =
            std::str::from_utf8(line).map_err(|_| ("encoding", "the text is no valid UTF-8".to_owned()))?;
        let fields: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| ("json", format!("the line is no JSON object: {error}")))?;
        let find = |is_it: &dyn Fn(&str) -> bool| {
            fields.iter().find(|(name, _)| is_it(name)).map(|(_, value)| value)
        };
        let word = |name: &str| match fields.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(_) => Err(("outcome", format!("`{name}` is no text"))),
        };
        let new_key = match find(&|name| self.rules.is_key(name)) {
            None | Some(Value::Null) => None,
            Some(Value::String(key)) => Some(key.clone()),
            Some(_) => return Err(("new_key", "the new key is no text".into())),
        };
        self.rules.record(Parts {
            legacy_key: find(&|name| self.rules.is_legacy(name)).and_then(text_of_json),
            new_key,
            outcome: word("outcome")?,
            held: fields.get("held") == Some(&Value::Bool(true)),
        })
    }
}

impl<R: Read> Iterator for JsonRows<R> {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            let (line, is_whole) = match self.next_line() {
                Ok(Some(line)) => line,
                Ok(None) => break,
                Err(error) => {
                    self.ended = true;
                    return Some(Err(Error::stopped(format!("the file can't be read on: {error}"))));
                }
            };
            if line.trim_ascii().is_empty() {
                continue;
            }
            let record = if is_whole {
                self.record(&line)
            } else {
                Err(("too_long", "the line is longer than 1 MiB".into()))
            };
            let record =
                record.map_err(|fault| problem(fault, shortened(&String::from_utf8_lossy(&line)).into()));
            return Some(Ok(Row { line: self.line, record }));
        }
        None
    }
}

/// The text of a legacy key in JSON, by the rule for documents: extended JSON
/// may stand for any type of BSON.
fn text_of_json(value: &Value) -> Option<String> {
    let value = Bson::try_from(value.clone()).ok()?;
    let raw = RawBson::try_from(value).ok()?;
    legacy_key::text_of(raw.as_raw_bson_ref())
}
