//! Inserting documents into a live collection, byte for byte, as of a moment.
//!
//! A document that is there already is never touched: what the application has
//! written since is newer. So every write can only insert. Most go by `insert`;
//! one with a `Timestamp(0, 0)` at its top level, which an insert would turn into
//! the time of day, goes by an update that matches nothing and therefore inserts
//! exactly what it is told.
//!
//! One that the application has written and deleted again must not come back
//! either, and an insert does not notice that there was one. So documents are
//! inserted by transactions of a moment of the past: whatever was done to the same
//! `_id` since that moment makes them fail, and what was done until then is known
//! to the caller.

use std::collections::HashMap;

use bson::{Bson, Document, RawArrayBuf, RawBson, RawDocument, RawDocumentBuf, Timestamp, rawdoc};
use mongodb::error::{Error as DriverError, ErrorKind};

use super::command::{is_transient, is_transient_code};
use super::exact;
use super::index::whole_number;
use super::lane::Lane;
use super::sink::id_bytes;
use super::state::{insertion, is_changed_by_inserts};
use super::transaction::is_given_up;
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result};

/// Bytes of documents that are looked for at once.
const MOST_BYTES: usize = 8 * 1024 * 1024;
/// The server's code for a duplicate key.
const DUPLICATE_KEY: i32 = 11000;
/// The server's code for a document that violates the validator.
const INVALID_DOCUMENT: i32 = 121;
/// The server's code for what this user may not do.
const UNAUTHORIZED: i32 = 13;

/// What came of inserting some documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    /// All of them are there, on a majority.
    All,
    /// None: something was done since the moment, or the server could not at this
    /// time. It has to be looked at again.
    LookAgain,
    /// None, because the collection refuses this one for good.
    Refused {
        /// Its place among the documents.
        index: usize,
        /// What the server has against it.
        reason: String,
    },
}

/// Whether documents are written past the validator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bypass {
    /// It was not necessary so far, and takes a privilege.
    NotYet,
    Always,
    /// This user may not.
    Never,
}

/// Inserts into one collection.
#[derive(Debug)]
pub struct Insertion {
    lane: Lane,
    into: Namespace,
    bypass: Bypass,
}

impl Insertion {
    /// Inserts into a collection.
    pub fn new(lane: Lane, into: &Namespace) -> Self {
        Self { lane, into: into.clone(), bypass: Bypass::NotYet }
    }

    /// The documents of the collection that have these `_id`s, as a majority has
    /// them, by the bytes of their `_id`s.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn present(&self, documents: &[RawDocumentBuf]) -> Result<HashMap<Vec<u8>, RawDocumentBuf>> {
        let mut found = HashMap::new();
        for part in split(documents) {
            let ids = part.iter().map(|document| exact_id_of(document)).collect::<Result<Vec<RawBson>>>()?;
            let (anything, owned) = (Document::new(), |document: &RawDocument| document.to_owned());
            let there = self.lane.mongo().by_ids(&self.into, &ids, &anything, None, owned).await?;
            found.extend(there.into_iter().filter_map(|document| Some((id_bytes(&document)?, document))));
        }
        Ok(found)
    }

    /// Puts documents back, all or none, unless anything was done to one of their
    /// `_id`s since that moment, which a majority must have.
    ///
    /// # Errors
    /// A stop where the server does not do as asked.
    pub async fn put(&mut self, documents: &[RawDocumentBuf], moment: Timestamp) -> Result<Put> {
        loop {
            let (put, code) = self.attempt(documents, moment).await?;
            if code != INVALID_DOCUMENT || self.bypass != Bypass::NotYet {
                return Ok(put);
            }
            // It was in the source all the same.
            self.bypass = Bypass::Always;
        }
    }

    /// Tries it once; tells the server's code too.
    async fn attempt(&mut self, documents: &[RawDocumentBuf], moment: Timestamp) -> Result<(Put, i32)> {
        self.lane.begin_at(moment).await?;
        let (exact, plain): (Vec<_>, Vec<_>) =
            documents.iter().enumerate().partition(|(_, document)| is_changed_by_inserts(document));
        for (part, is_plain) in [(plain, true), (exact, false)] {
            if part.is_empty() {
                continue;
            }
            let these: Vec<&RawDocumentBuf> = part.iter().map(|(_, document)| *document).collect();
            let mut command = if is_plain {
                insert_command(&self.into.collection, &these)
            } else {
                upsert_command(&self.into.collection, &these)?
            };
            if self.bypass == Bypass::Always {
                command.append(bson::cstr!("bypassDocumentValidation"), true);
            }
            let failure = match self.lane.send(&self.into.database, command).await? {
                Ok(reply) => match first_failure(&reply) {
                    None => continue,
                    Some(failure) => failure,
                },
                Err(error) if may_pass(&error) => {
                    self.lane.abort().await;
                    return Ok((Put::LookAgain, 0));
                }
                Err(error) if self.bypass == Bypass::Always && is_unauthorized(&error) => {
                    self.lane.abort().await;
                    // The validator will say which ones they are.
                    self.bypass = Bypass::Never;
                    return Ok((Put::LookAgain, 0));
                }
                Err(error) => {
                    self.lane.abort().await;
                    return Err(error).during(format!("putting documents back into {}", self.into));
                }
            };
            self.lane.abort().await;
            let index = part.get(failure.index).map_or(0, |(index, _)| *index);
            let passes = is_transient_code(failure.code) || failure.is_by_id;
            let put = if passes { Put::LookAgain } else { Put::Refused { index, reason: failure.message } };
            return Ok((put, failure.code));
        }
        let committed = self.lane.commit().await?;
        Ok((committed.map_or(Put::LookAgain, |_| Put::All), 0))
    }
}

/// The `_id` of a document, to be shown.
///
/// # Errors
/// A stop for a document without.
pub fn id_of(document: &RawDocument) -> Result<Bson> {
    Ok(exact::shown(&exact_id_of(document)?))
}

fn exact_id_of(document: &RawDocument) -> Result<RawBson> {
    exact::id_of(document).ok_or_else(|| Error::stopped("a document has no `_id`"))
}

/// A document that was not written.
struct Failure {
    index: usize,
    code: i32,
    message: String,
    /// Whether the `_id` itself is taken.
    is_by_id: bool,
}

fn first_failure(reply: &Document) -> Option<Failure> {
    let error = reply.get_array("writeErrors").ok()?.first()?.as_document()?;
    let index = error.get("index").and_then(whole_number).and_then(|index| usize::try_from(index).ok());
    let code = error.get_i32("code").unwrap_or(0);
    let pattern = error.get_document("keyPattern");
    Some(Failure {
        index: index.unwrap_or(usize::MAX),
        code,
        message: error.get_str("errmsg").unwrap_or("no reason given").to_owned(),
        is_by_id: code == DUPLICATE_KEY
            && pattern.is_ok_and(|keys| keys.len() == 1 && keys.contains_key("_id")),
    })
}

fn code_of(error: &DriverError) -> i32 {
    match error.kind.as_ref() {
        ErrorKind::Command(command) => command.code,
        _ => 0,
    }
}

/// Whether the same may succeed as of a later moment.
fn may_pass(error: &DriverError) -> bool {
    is_transient(error) || is_given_up(error)
}

fn is_unauthorized(error: &DriverError) -> bool {
    code_of(error) == UNAUTHORIZED
}

fn insert_command(into: &str, documents: &[&RawDocumentBuf]) -> RawDocumentBuf {
    let mut inserted = RawArrayBuf::new();
    for document in documents {
        inserted.push(RawDocumentBuf::clone(document));
    }
    let mut command = rawdoc! {"insert": into};
    command.append(bson::cstr!("documents"), inserted);
    command
}

/// An update that matches no document and so inserts, whatever its values.
fn upsert_command(into: &str, documents: &[&RawDocumentBuf]) -> Result<RawDocumentBuf> {
    let mut updates = RawArrayBuf::new();
    for document in documents {
        updates.push(insertion(document)?);
    }
    let mut command = rawdoc! {"update": into};
    command.append(bson::cstr!("updates"), updates);
    Ok(command)
}

/// Documents that go into one command each.
fn split(documents: &[RawDocumentBuf]) -> Vec<&[RawDocumentBuf]> {
    let mut parts = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (position, document) in documents.iter().enumerate() {
        let size = document.as_bytes().len();
        if position > start && bytes + size > MOST_BYTES {
            parts.push(&documents[start..position]);
            (start, bytes) = (position, 0);
        }
        bytes += size;
    }
    if start < documents.len() {
        parts.push(&documents[start..]);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::doc;

    #[test]
    fn commands_stay_below_the_size_of_a_message() {
        let documents: Vec<_> = (0..5).map(|n| rawdoc! {"_id": n, "s": "x".repeat(3 << 20)}).collect();
        let sizes: Vec<_> = split(&documents).iter().map(|part| part.len()).collect();
        assert_eq!(sizes, [2, 2, 1]);
        assert!(split(&[]).is_empty());
    }

    #[test]
    fn a_taken_id_is_told_from_another_unique_value() {
        let read = |pattern: Document| {
            let error = doc! {"index": 3, "code": 11000, "errmsg": "E11000", "keyPattern": pattern};
            first_failure(&doc! {"n": 1, "writeErrors": [error]}).expect("a failure")
        };
        assert!(read(doc! {"_id": 1}).is_by_id);
        let other = read(doc! {"email": 1});
        assert_eq!((other.index, other.code, other.is_by_id), (3, 11000, false));
        assert!(first_failure(&doc! {"n": 1}).is_none());
    }
}
