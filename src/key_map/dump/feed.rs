//! What a CSV parser reads from: it counts lines, which the parser does not do
//! for every line ending, and ends a record that has no end.

use std::collections::VecDeque;
use std::io::{Error, Read, Result};
use std::sync::{Arc, Mutex, PoisonError};

use super::{BYTE_ORDER_MARK, LONGEST_RECORD};

/// Where the parser is.
#[derive(Debug, Default)]
pub(super) struct Position {
    /// Bytes handed to the parser.
    offset: u64,
    /// Bytes that the current record may still take.
    left: u64,
    /// Offsets of line breaks that the parser may not have passed yet.
    breaks: VecDeque<u64>,
    /// Line breaks before those.
    passed: u64,
    /// Offsets of quotes that the parser may not have passed yet.
    quotes: VecDeque<u64>,
}

impl Position {
    /// A record begins: it may take the whole length again.
    pub(super) fn begin_record(&mut self) {
        self.left = LONGEST_RECORD;
    }

    /// Whether the current record is too long.
    pub(super) fn is_exhausted(&self) -> bool {
        self.left == 0
    }

    /// The line of the last byte of a record that ends before this offset. A
    /// line break that ends the record is not counted.
    pub(super) fn line_at(&mut self, end: u64) -> u64 {
        while self.breaks.front().is_some_and(|offset| offset + 1 < end) {
            self.breaks.pop_front();
            self.passed += 1;
        }
        self.passed + 1
    }

    /// The quotes of the record that ends at this offset; to be asked for each.
    pub(super) fn quotes_before(&mut self, end: u64) -> usize {
        let count = self.quotes.iter().take_while(|offset| **offset < end).count();
        self.quotes.drain(..count);
        count
    }

    fn hand_out(&mut self, bytes: &[u8]) {
        for (at, byte) in (self.offset..).zip(bytes) {
            match byte {
                b'\n' => self.breaks.push_back(at),
                b'"' => self.quotes.push_back(at),
                _ => {}
            }
        }
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.offset += length;
        self.left = self.left.saturating_sub(length);
    }
}

/// A reader for the parser, without the byte order mark.
pub(super) struct Feed<R> {
    input: R,
    position: Arc<Mutex<Position>>,
    /// The first bytes, once they were looked at.
    first: Option<VecDeque<u8>>,
}

impl<R: Read> Feed<R> {
    pub(super) fn new(input: R) -> (Self, Arc<Mutex<Position>>) {
        let position = Arc::new(Mutex::new(Position::default()));
        (Self { input, position: position.clone(), first: None }, position)
    }

    /// Takes the byte order mark away, where there is one.
    fn first_bytes(&mut self) -> Result<VecDeque<u8>> {
        let mut first = Vec::new();
        (&mut self.input).take(3).read_to_end(&mut first)?;
        Ok(if first == BYTE_ORDER_MARK { VecDeque::new() } else { first.into() })
    }
}

impl<R: Read> Read for Feed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if self.first.is_none() {
            self.first = Some(self.first_bytes()?);
        }
        if self.position.lock().unwrap_or_else(PoisonError::into_inner).is_exhausted() {
            return Err(Error::other("the record is too long"));
        }
        let length = match &mut self.first {
            Some(first) if !first.is_empty() => first.read(buffer)?,
            _ => self.input.read(buffer)?,
        };
        self.position.lock().unwrap_or_else(PoisonError::into_inner).hand_out(&buffer[..length]);
        Ok(length)
    }
}
