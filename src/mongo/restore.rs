//! Putting quarantined documents back into a collection, byte for byte.
//!
//! A document that is there already is never touched: what the application has
//! written since is newer. So every write can only insert. Most go by `insert`;
//! one with a `Timestamp(0, 0)` at its top level, which an insert would turn into
//! the time of day, goes by an update that matches nothing and therefore inserts
//! exactly what it is told.
//!
//! All writes run on one session with rising transaction numbers: one that is
//! sent again is executed once, or a document that the application deleted
//! meanwhile would come back.

use bson::{Bson, Document, RawArrayBuf, RawBson, RawBsonRef, RawDocument, RawDocumentBuf, doc, rawdoc};
use mongodb::ClientSession;
use mongodb::options::Hint;
use tokio_util::sync::CancellationToken;

use super::command::{is_transient_code, retrying, retrying_in};
use super::index::{stored_count, whole_number};
use super::quarantine::{self, Read};
use super::sink::check_write_concern;
use super::{Mongo, WRITE_TIMEOUT, majority_document};
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result};
use crate::report::json::extended;

/// Bytes of documents per batch.
const MOST_BYTES: usize = 8 * 1024 * 1024;
/// Documents per batch.
const MOST_DOCUMENTS: usize = 1000;
/// The server's code for a duplicate key.
const DUPLICATE_KEY: i32 = 11000;
/// The server's code for a document that violates the validator.
const INVALID_DOCUMENT: i32 = 121;
/// Attempts for documents whose write failed for a passing reason.
const ATTEMPTS: usize = 10;
/// `_id`s of documents in conflict that are told.
const SAMPLES: usize = 20;

/// What was put back so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Restored {
    /// Documents that were put back.
    pub restored: u64,
    /// Documents whose `_id` was there already; they were left alone.
    pub already_there: u64,
    /// Documents that were not put back because another one has what a unique
    /// index allows only once.
    pub in_conflict: u64,
    /// Some of their `_id`s.
    pub conflicts: Vec<Bson>,
    /// The `_id` up to which everything was looked at, in the order of `_id`: to go
    /// on from there. A run from the start would put back what the application has
    /// deleted since it was put back first.
    pub position: Option<Bson>,
    /// Whether the whole quarantine was looked at.
    pub is_complete: bool,
}

impl Restored {
    /// As it is stored.
    pub fn to_document(&self) -> Document {
        let mut document = doc! {
            "restored": stored_count(self.restored),
            "already_there": stored_count(self.already_there),
            "in_conflict": stored_count(self.in_conflict),
            "conflicts": self.conflicts.clone(),
            "is_complete": self.is_complete,
        };
        // Absent at the start; an `_id` may itself be null.
        if let Some(position) = &self.position {
            document.insert("position", position.clone());
        }
        document
    }

    /// Reads what [`Restored::to_document`] made.
    pub fn from_document(document: &Document) -> Self {
        let count = |name: &str| document.get(name).and_then(whole_number).unwrap_or(0);
        Self {
            restored: count("restored"),
            already_there: count("already_there"),
            in_conflict: count("in_conflict"),
            conflicts: document.get_array("conflicts").cloned().unwrap_or_default(),
            position: document.get("position").cloned(),
            is_complete: document.get_bool("is_complete").unwrap_or(false),
        }
    }
}

/// Puts a quarantine back.
#[derive(Debug)]
pub struct Restore {
    mongo: Mongo,
    quarantine: Namespace,
    into: Namespace,
    writing: ClientSession,
    transaction: i64,
}

impl Restore {
    /// Puts the documents of a quarantine into a collection.
    ///
    /// # Errors
    /// A refusal where there is no such quarantine, a stop where no session can be had.
    pub async fn new(mongo: &Mongo, quarantine: &Namespace, into: &Namespace) -> Result<Self> {
        if mongo.describe(quarantine).await?.is_none() {
            return Err(Error::refused(format!("there is no quarantine {quarantine} to put back")));
        }
        // The driver hands sessions on, and whoever got ours would be refused for its numbers.
        let mongo = mongo.apart()?;
        let writing = mongo.client().start_session().await.during("starting a session")?;
        Ok(Self { mongo, quarantine: quarantine.clone(), into: into.clone(), writing, transaction: 0 })
    }

    /// The session of the writes, to be recorded before the first: whoever comes
    /// next ends what still runs on it.
    pub fn session(&self) -> Document {
        self.writing.id().clone()
    }

    /// Puts everything back that comes after the position of `restored`, until it
    /// is done or `stop` is cancelled. `save` is called after each batch, which a
    /// majority has then.
    ///
    /// # Errors
    /// A stop where a document can't be read or written, and what `save` says.
    pub async fn run(
        &mut self,
        restored: &mut Restored,
        stop: &CancellationToken,
        mut save: impl AsyncFnMut(&Restored) -> Result<()>,
    ) -> Result<()> {
        while !stop.is_cancelled() {
            let (batch, position) = self.batch(restored.position.as_ref()).await?;
            let Some(position) = position else {
                restored.is_complete = true;
                return save(restored).await;
            };
            self.write(batch, restored).await?;
            restored.position = Some(position);
            save(restored).await?;
        }
        Ok(())
    }

    /// The next documents in the order of `_id`, as they were, and the last `_id`.
    async fn batch(&self, after: Option<&Bson>) -> Result<(Vec<RawDocumentBuf>, Option<Bson>)> {
        // `$expr` sees all types, where `{_id: {$gt}}` sees one only.
        let filter = after.map_or_else(Document::new, |after| {
            doc! {"$expr": {"$gt": ["$_id", {"$literal": after.clone()}]}}
        });
        let stored = retrying(format!("reading {}", self.quarantine), || self.read(filter.clone())).await?;
        let position = match stored.last().and_then(|last| last.get("_id").ok().flatten()) {
            Some(id) => Some(super::source::to_bson(&id.into())?),
            None => None,
        };
        let mut documents = Vec::with_capacity(stored.len());
        for stored in &stored {
            documents.push(self.mongo.unwrap_quarantined(&self.quarantine, stored).await?);
        }
        Ok((documents, position))
    }

    async fn read(&self, filter: Document) -> mongodb::error::Result<Vec<RawDocumentBuf>> {
        let collection = self.mongo.collection(&self.quarantine);
        let limit = i64::try_from(MOST_DOCUMENTS).unwrap_or(i64::MAX);
        let find = collection.find(filter).sort(doc! {"_id": 1}).limit(limit);
        let mut cursor = find.hint(Hint::Keys(doc! {"_id": 1})).await?;
        let (mut stored, mut bytes) = (Vec::new(), 0);
        while bytes < MOST_BYTES && cursor.advance().await? {
            let document = cursor.current();
            // One in parts is as large as a batch by itself.
            let is_whole = matches!(quarantine::read(document), Ok(Read::Whole(_)));
            bytes += if is_whole { document.as_bytes().len() } else { MOST_BYTES };
            stored.push(document.to_owned());
        }
        Ok(stored)
    }

    async fn write(&mut self, documents: Vec<RawDocumentBuf>, restored: &mut Restored) -> Result<()> {
        let (exact, plain): (Vec<_>, Vec<_>) =
            documents.into_iter().partition(|document| has_zero_timestamp(document));
        for part in split(&plain) {
            self.insert(part, insert_command, restored).await?;
        }
        for part in split(&exact) {
            self.insert(part, upsert_command, restored).await?;
        }
        Ok(())
    }

    async fn insert(
        &mut self,
        documents: &[RawDocumentBuf],
        command: fn(&str, &[&RawDocumentBuf]) -> Result<RawDocumentBuf>,
        restored: &mut Restored,
    ) -> Result<()> {
        let mut open: Vec<&RawDocumentBuf> = documents.iter().collect();
        let mut bypass = false;
        for _ in 0..ATTEMPTS {
            let mut command = command(&self.into.collection, &open)?;
            if bypass {
                command.append(bson::cstr!("bypassDocumentValidation"), true);
            }
            let failures = failures(&self.send(command).await?);
            restored.restored += u64::try_from(open.len().saturating_sub(failures.len())).unwrap_or(0);
            let (mut again, mut violates) = (Vec::new(), false);
            for failure in failures {
                let Some(document) = open.get(failure.index).copied() else {
                    return Err(self.refused(&failure, None));
                };
                match failure.code {
                    DUPLICATE_KEY => self.stands_in_the_way(document, &failure, restored).await?,
                    // It was in the source all the same.
                    INVALID_DOCUMENT if !bypass => again.push(document),
                    code if is_transient_code(code) => again.push(document),
                    _ => return Err(self.refused(&failure, Some(document))),
                }
                violates |= failure.code == INVALID_DOCUMENT;
            }
            bypass |= violates;
            if again.is_empty() {
                return Ok(());
            }
            open = again;
        }
        Err(Error::stopped(format!("{} documents could not be put back into {}", open.len(), self.into))
            .hint("start the same command again: it goes on from there"))
    }

    /// A document that could not be inserted: either it is there, or another one
    /// has what a unique index allows only once.
    async fn stands_in_the_way(
        &self,
        document: &RawDocument,
        failure: &Failure,
        restored: &mut Restored,
    ) -> Result<()> {
        let Some(id) = document.get("_id").ok().flatten() else { return Ok(()) };
        let id = super::source::to_bson(&id.into())?;
        if failure.is_by_id || self.is_there(&id).await? {
            restored.already_there += 1;
            return Ok(());
        }
        restored.in_conflict += 1;
        if restored.conflicts.len() < SAMPLES {
            restored.conflicts.push(id);
        }
        Ok(())
    }

    async fn is_there(&self, id: &Bson) -> Result<bool> {
        let collection = self.mongo.collection(&self.into);
        let filter = doc! {"_id": {"$eq": id.clone()}};
        let found = retrying(format!("looking for a document of {}", self.into), || {
            let find = collection.find_one(filter.clone()).projection(doc! {"_id": 1});
            async move { find.await }
        })
        .await?;
        Ok(found.is_some())
    }

    /// Sends a write, again and again under the same number: the server executes
    /// it once.
    async fn send(&mut self, mut command: RawDocumentBuf) -> Result<Document> {
        self.transaction += 1;
        command.append(bson::cstr!("txnNumber"), self.transaction);
        command
            .append(bson::cstr!("maxTimeMS"), i64::try_from(WRITE_TIMEOUT.as_millis()).unwrap_or(i64::MAX));
        command.append(bson::cstr!("writeConcern"), encode(&majority_document())?);
        let database = self.mongo.database(&self.into.database);
        retrying_in(
            format!("putting documents back into {}", self.into),
            &mut self.writing,
            async |session| {
                let reply = database.run_raw_command(command.clone()).session(&mut *session).await?;
                check_write_concern(&reply)?;
                Ok(reply)
            },
        )
        .await
    }

    fn refused(&self, failure: &Failure, document: Option<&RawDocumentBuf>) -> Error {
        let id = document.and_then(|document| document.get("_id").ok().flatten()).map(extended);
        Error::stopped(format!(
            "the quarantined document {} can't be put back into {}: {}",
            id.unwrap_or_default(),
            self.into,
            failure.message
        ))
        .hint("mend the cause and start the same command again: it goes on from there")
    }
}

/// A document that was not written.
struct Failure {
    index: usize,
    code: i32,
    message: String,
    /// Whether the `_id` itself is taken.
    is_by_id: bool,
}

fn failures(reply: &Document) -> Vec<Failure> {
    let errors = reply.get_array("writeErrors").map(Vec::as_slice).unwrap_or_default();
    errors
        .iter()
        .filter_map(Bson::as_document)
        .map(|error| Failure {
            index: error
                .get("index")
                .and_then(whole_number)
                .and_then(|index| usize::try_from(index).ok())
                .unwrap_or(usize::MAX),
            code: error.get_i32("code").unwrap_or(0),
            message: error.get_str("errmsg").unwrap_or("no reason given").to_owned(),
            is_by_id: error
                .get_document("keyPattern")
                .is_ok_and(|keys| keys.len() == 1 && keys.contains_key("_id")),
        })
        .collect()
}

fn insert_command(into: &str, documents: &[&RawDocumentBuf]) -> Result<RawDocumentBuf> {
    let mut inserted = RawArrayBuf::new();
    for document in documents {
        inserted.push(RawDocumentBuf::clone(document));
    }
    let mut command = rawdoc! {"insert": into, "ordered": false};
    command.append(bson::cstr!("documents"), inserted);
    Ok(command)
}

/// An update that matches no document and so inserts, whatever its values.
fn upsert_command(into: &str, documents: &[&RawDocumentBuf]) -> Result<RawDocumentBuf> {
    let mut updates = RawArrayBuf::new();
    for document in documents {
        let id: RawBson = document
            .get("_id")
            .ok()
            .flatten()
            .map(Into::into)
            .ok_or_else(|| Error::stopped("a document has no `_id`"))?;
        let mut pipeline = RawArrayBuf::new();
        pipeline.push(rawdoc! {"$replaceWith": {"$literal": RawDocumentBuf::clone(document)}});
        updates.push(rawdoc! {
            "q": {"_id": {"$eq": id}, "$nor": [{}]},
            "u": pipeline,
            "upsert": true,
        });
    }
    let mut command = rawdoc! {"update": into, "ordered": false};
    command.append(bson::cstr!("updates"), updates);
    Ok(command)
}

fn encode(document: &Document) -> Result<RawDocumentBuf> {
    RawDocumentBuf::try_from(document)
        .map_err(|error| Error::stopped(format!("a command could not be encoded: {error}")))
}

/// Whether an insert would change the document.
fn has_zero_timestamp(document: &RawDocument) -> bool {
    document.iter().any(|field| {
        matches!(field, Ok((_, RawBsonRef::Timestamp(bson::Timestamp { time: 0, increment: 0 }))))
    })
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

    #[test]
    fn only_a_zero_timestamp_at_the_top_would_be_changed_by_an_insert() {
        let zero = bson::Timestamp { time: 0, increment: 0 };
        assert!(has_zero_timestamp(&rawdoc! {"_id": 1, "t": zero}));
        assert!(!has_zero_timestamp(&rawdoc! {"_id": 1, "t": bson::Timestamp { time: 0, increment: 1 }}));
        assert!(!has_zero_timestamp(&rawdoc! {"_id": 1, "n": {"t": zero}, "a": [zero]}));
    }

    #[test]
    fn what_is_stored_of_a_restoration_is_read_again() {
        let restored = Restored {
            restored: 5,
            already_there: 2,
            in_conflict: 1,
            conflicts: vec![Bson::Int32(7)],
            position: Some(Bson::Null),
            is_complete: true,
        };
        for restored in [restored, Restored::default()] {
            assert_eq!(Restored::from_document(&restored.to_document()), restored);
        }
    }

    #[test]
    fn commands_stay_below_the_size_of_a_message() {
        let documents: Vec<_> = (0..5).map(|n| rawdoc! {"_id": n, "s": "x".repeat(3 << 20)}).collect();
        let sizes: Vec<_> = split(&documents).iter().map(|part| part.len()).collect();
        assert_eq!(sizes, [2, 2, 1]);
        assert!(split(&[]).is_empty());
    }

    #[test]
    fn a_taken_id_is_told_from_another_unique_value() {
        let error = |pattern: Document| {
            doc! {"index": 3, "code": 11000, "errmsg": "E11000", "keyPattern": pattern}
        };
        let reply = doc! {"n": 1, "writeErrors": [error(doc! {"_id": 1}), error(doc! {"email": 1})]};
        let read = failures(&reply);
        assert_eq!(read.iter().map(|failure| failure.is_by_id).collect::<Vec<_>>(), [true, false]);
        assert_eq!((read[0].index, read[0].code), (3, 11000));
    }
}
