//! What the server's replies and errors mean for the journal.

use bson::{Bson, Document};
use mongodb::error::{Error, ErrorKind};

use super::operation::{Answer, Change, Kind};

/// Server errors that leave open whether a command was executed: elections, shutdowns, time limits.
const OPEN_CODES: [i32; 18] =
    [6, 7, 24, 50, 64, 89, 91, 189, 262, 9001, 10107, 11600, 11601, 11602, 13388, 13435, 13436, 43];

/// Whether the server has surely not executed a command that failed like this.
pub fn is_certain(error: &Error) -> bool {
    matches!(error.kind.as_ref(), ErrorKind::Command(command) if !OPEN_CODES.contains(&command.code))
}

/// Whether an election got between the statements.
pub fn is_open(reply: &Document) -> bool {
    let errors = reply.get_array("writeErrors").map(Vec::as_slice).unwrap_or_default();
    errors
        .iter()
        .filter_map(|error| error.as_document()?.get_i32("code").ok())
        .any(|code| OPEN_CODES.contains(&code))
}

pub fn error_at(reply: &Document, index: usize) -> Option<&Document> {
    let errors = reply.get_array("writeErrors").ok()?;
    errors
        .iter()
        .filter_map(Bson::as_document)
        .find(|error| error.get_i32("index").is_ok_and(|at| usize::try_from(at).is_ok_and(|at| at == index)))
}

pub fn is_duplicate_id(error: &Document) -> bool {
    error.get_i32("code").is_ok_and(|code| code == 11000)
        && error.get_document("keyPattern").is_ok_and(|pattern| pattern.contains_key("_id"))
}

pub fn is_upserted(reply: &Document, index: usize) -> bool {
    let upserted = reply.get_array("upserted").map(Vec::as_slice).unwrap_or_default();
    let mut indexes = upserted.iter().filter_map(|entry| entry.as_document()?.get_i32("index").ok());
    indexes.any(|at| usize::try_from(at).is_ok_and(|at| at == index))
}

pub fn count(reply: &Document) -> usize {
    reply.get_i32("n").ok().and_then(|count| usize::try_from(count).ok()).expect("a count")
}

/// The answer to a command of one statement; `None` where it was refused.
pub fn answer(reply: &Document, change: &Change) -> Option<Answer> {
    match (error_at(reply, 0), change.kind()) {
        (Some(error), Kind::Insert) if is_duplicate_id(error) => None,
        (Some(_), _) => None,
        (None, Kind::Insert) => Some(Answer::Inserted),
        (None, _) if is_upserted(reply, 0) => Some(Answer::Inserted),
        (None, _) if count(reply) > 0 => Some(Answer::Matched),
        (None, _) => Some(Answer::Nothing),
    }
}
