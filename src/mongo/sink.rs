//! Writing keys and flags: guarded, batched, durable on a majority.
//!
//! The driver's bulk write needs a newer server, so a batch is an `update`
//! command. Its reply is Ok even where single updates failed, and an update
//! whose guard did not match shows in the totals only; then the batch is read
//! back to tell each document's fate. Because every update is guarded by the
//! state it was derived from, a batch may be sent twice.

use std::collections::HashMap;

use bson::{Bson, DateTime, Document, RawArrayBuf, RawBson, RawBsonRef, RawDocumentBuf, doc, rawdoc};

use super::by_id::by_id;
use super::command::{is_transient_code, retrying};
use super::index::whole_number;
use super::source::{Candidate, TargetCollection, collect, legacy_projection, to_bson_array};
use super::{WRITE_TIMEOUT, majority_document};
use crate::error::{Error, Result};

/// Updates per command; larger batches gain nothing.
const MOST_UPDATES: usize = 1000;
/// Bytes per command, well below the 48 MB that a message may have.
const MOST_BYTES: usize = 8 * 1024 * 1024;
/// Rounds for updates that the server refused for a passing reason.
const MOST_ROUNDS: usize = 8;

/// Why a document can't have a new key, as stored in its flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum FlagReason {
    /// The API says that there is none.
    NotFound,
    /// There is nothing to ask for.
    NoLegacyKey,
    /// The API refuses the key as malformed.
    Rejected,
}

impl FlagReason {
    /// The word that is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::NoLegacyKey => "no_legacy_key",
            Self::Rejected => "rejected",
        }
    }
}

/// What to write into one document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// The new key.
    Key(String),
    /// The flag.
    Flag(FlagReason),
}

/// One guarded update.
#[derive(Debug, Clone)]
pub struct Update {
    /// The document as it was read.
    pub candidate: Candidate,
    /// What it receives.
    pub write: Write,
}

/// What became of one update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Written {
    /// Our value stands in the document.
    Done,
    /// Somebody else had written a key or a flag; it was left alone.
    AlreadyFilled,
    /// The document is gone or has another legacy key now.
    Changed,
    /// Not sent, because the new key stands for another legacy key.
    SharedKey {
        /// The legacy key that has it.
        owner: String,
    },
    /// The document still is a candidate, and no write makes it another thing:
    /// the field stands in it twice, or holds an array with a null.
    Unwritable,
    /// The server refuses the write for good.
    Refused {
        /// The server's error code.
        code: i32,
        /// The server's message.
        message: String,
    },
}

/// A refusal by the server, for one update of a batch.
struct WriteError {
    index: usize,
    code: i32,
    message: String,
}

/// Updates of a round that are sent once more.
#[derive(Default)]
struct Again {
    /// The server refused them for a passing reason.
    refused: Vec<usize>,
    /// They matched nothing, and their documents still wait for them.
    unmatched: Vec<usize>,
}

struct Reply {
    matched: u64,
    errors: Vec<WriteError>,
}

impl TargetCollection {
    /// Writes a batch; one result per update, in their order.
    ///
    /// # Errors
    /// A stop where the server can't be reached or a write stays impossible
    /// for a reason that is not the document's.
    pub async fn write(&self, updates: &[Update], job: &str) -> Result<Vec<Written>> {
        let mut results: Vec<Option<Written>> = vec![None; updates.len()];
        let mut open: Vec<usize> = (0..updates.len()).collect();
        let mut unmatched = Vec::new();
        for _ in 0..MOST_ROUNDS {
            let mut again = Again::default();
            for batch in self.split(&open, updates) {
                self.write_batch(batch, updates, job, &mut results, &mut again).await?;
            }
            open = [again.refused.as_slice(), again.unmatched.as_slice()].concat();
            if open.is_empty() {
                return Ok(results.into_iter().flatten().collect());
            }
            unmatched = again.unmatched;
        }
        // They wait for a write that they do not take, round after round.
        for index in &unmatched {
            results[*index] = Some(Written::Unwritable);
        }
        if unmatched.len() == open.len() {
            return Ok(results.into_iter().flatten().collect());
        }
        Err(Error::stopped(format!(
            "{} updates on {} were refused again and again for a passing reason",
            open.len(),
            self.target.namespace
        ))
        .hint("look at the server's log; started again, the job goes on from here"))
    }

    async fn write_batch(
        &self,
        batch: &[usize],
        updates: &[Update],
        job: &str,
        results: &mut [Option<Written>],
        again: &mut Again,
    ) -> Result<()> {
        let reply = self.send(batch.iter().map(|index| &updates[*index]), job).await?;
        let refused = u64::try_from(reply.errors.len()).unwrap_or(u64::MAX);
        for error in reply.errors {
            let index = batch[error.index];
            if is_transient_code(error.code) {
                again.refused.push(index);
            } else {
                results[index] = Some(Written::Refused { code: error.code, message: error.message });
            }
        }
        let unknown: Vec<usize> = batch
            .iter()
            .copied()
            .filter(|index| results[*index].is_none() && !again.refused.contains(index))
            .collect();
        if reply.matched + refused >= u64::try_from(batch.len()).unwrap_or(u64::MAX) {
            unknown.iter().for_each(|index| results[*index] = Some(Written::Done));
            return Ok(());
        }
        self.read_back(&unknown, updates, job, results, again).await
    }

    async fn send<'a>(&self, updates: impl Iterator<Item = &'a Update>, job: &str) -> Result<Reply> {
        let namespace = &self.target.namespace;
        let mut statements = RawArrayBuf::new();
        for update in updates {
            statements.push(self.statement(update, job)?);
        }
        let mut command = rawdoc! {
            "update": namespace.collection.as_str(),
            "ordered": false,
            "maxTimeMS": i64::try_from(WRITE_TIMEOUT.as_millis()).unwrap_or(i64::MAX),
            "comment": job,
        };
        command.append(bson::cstr!("writeConcern"), raw(&majority_document())?);
        command.append(bson::cstr!("updates"), statements);
        let database = self.primary().client().database(&namespace.database);
        let reply = retrying(format!("writing to {namespace}"), || {
            let database = database.clone();
            let command = command.clone();
            async move {
                let reply = database.run_raw_command(command).await?;
                check_write_concern(&reply)?;
                Ok(reply)
            }
        })
        .await?;
        Ok(read_reply(&reply))
    }

    /// Guarded by key and flag, which are still null or missing, and by the legacy
    /// value, which is of the type and value that was read. Never a pipeline: the
    /// server would rebuild the whole document, and it aborts where a field stands
    /// in it twice.
    fn statement(&self, update: &Update, job: &str) -> Result<RawDocumentBuf> {
        let (name, value) = match &update.write {
            Write::Key(key) => (self.key_name(), RawBson::from(key.as_str())),
            Write::Flag(reason) => (
                self.flag_name(),
                rawdoc! {"reason": reason.as_str(), "at": DateTime::now(), "job": job}.into(),
            ),
        };
        let candidate = &update.candidate;
        let mut conditions = self.writable_conditions();
        conditions.push(self.legacy_unchanged(candidate)?);
        let mut guard = by_id(candidate.id.clone());
        guard.append(self.key_name(), RawBson::Null);
        guard.append(self.flag_name(), RawBson::Null);
        guard.append(bson::cstr!("$expr"), raw(&doc! {"$and": conditions})?);
        // One document by its `_id`: nothing to choose, and no plan to forget.
        Ok(rawdoc! {"q": guard, "u": {"$set": field(name, value)}, "hint": {"_id": 1}})
    }

    fn legacy_unchanged(&self, candidate: &Candidate) -> Result<Document> {
        let legacy = format!("${}", self.target.legacy_field);
        let same_type = doc! {"$eq": [{"$type": &legacy}, &candidate.legacy.type_name]};
        let Some(value) = &candidate.legacy.value else { return Ok(same_type) };
        let value = super::source::to_bson(value)?;
        let mut conditions = vec![doc! {"$eq": [&legacy, {"$literal": value.clone()}]}];
        if let (true, Bson::String(text)) = (self.has_collation, &value) {
            // Under a collation `$eq` may take "abc" for "ABC"; these two look at bytes.
            let length = i64::try_from(text.len()).unwrap_or(i64::MAX);
            conditions.push(doc! {"$eq": [{"$strLenBytes": &legacy}, length]});
            conditions.push(doc! {"$eq": [{"$indexOfBytes": [&legacy, {"$literal": value.clone()}]}, 0]});
        }
        if let Bson::Decimal128(decimal) = &value {
            // 5.0 equals 5.00, but they are two keys.
            conditions.push(doc! {"$eq": [{"$toString": &legacy}, decimal.to_string()]});
        }
        if conditions.len() == 1 {
            conditions.push(same_type);
            return Ok(doc! {"$and": conditions});
        }
        // `$cond` keeps the string operators away from other types.
        Ok(doc! {"$cond": [same_type, {"$and": conditions}, false]})
    }

    /// Reads documents again to see what became of updates that did not match.
    async fn read_back(
        &self,
        unknown: &[usize],
        updates: &[Update],
        job: &str,
        results: &mut [Option<Written>],
        again: &mut Again,
    ) -> Result<()> {
        let namespace = &self.target.namespace;
        let ids = to_bson_array(unknown.iter().map(|index| &updates[*index].candidate.id))?;
        let mut projection = legacy_projection(&self.target.legacy_field);
        projection.insert("k", format!("${}", self.target.key_field));
        projection.insert("f", format!("${}", self.target.flag_field));
        projection.insert("w", doc! {"$and": self.writable_conditions()});
        let filter = doc! {"_id": {"$in": ids}};
        let documents = retrying(format!("reading back {namespace}"), || {
            collect(self.primary().find(filter.clone()).projection(projection.clone()))
        })
        .await?;
        let now: HashMap<Vec<u8>, &RawDocumentBuf> =
            documents.iter().filter_map(|document| Some((id_bytes(document)?, document))).collect();
        for index in unknown {
            let update = &updates[*index];
            let document = now.get(&value_bytes(update.candidate.id.as_raw_bson_ref()));
            match document.map_or(Some(Written::Changed), |document| fate(document, update, job)) {
                Some(written) => results[*index] = Some(written),
                None => again.unmatched.push(*index),
            }
        }
        Ok(())
    }

    fn split<'a>(&self, open: &'a [usize], updates: &[Update]) -> Vec<&'a [usize]> {
        let mut batches = Vec::new();
        let (mut start, mut bytes) = (0, 0);
        for (position, index) in open.iter().enumerate() {
            let size = approximate_size(&updates[*index]);
            if position > start && (position - start >= MOST_UPDATES || bytes + size > MOST_BYTES) {
                batches.push(&open[start..position]);
                (start, bytes) = (position, 0);
            }
            bytes += size;
        }
        if start < open.len() {
            batches.push(&open[start..]);
        }
        batches
    }
}

/// The fate of an update as the document shows it; `None` where the document
/// still waits for it and it should be sent again.
fn fate(document: &RawDocumentBuf, update: &Update, job: &str) -> Option<Written> {
    let is_absent = |value: &RawBsonRef<'_>| matches!(value, RawBsonRef::Null | RawBsonRef::Undefined);
    // What can't be read is somebody's value, too.
    let present = |name: &str| match document.get(name) {
        Ok(value) => value.filter(|value| !is_absent(value)),
        Err(_) => Some(RawBsonRef::MinKey),
    };
    let holds_null = |value: &Option<RawBsonRef<'_>>| match value {
        Some(RawBsonRef::Array(items)) => items.into_iter().flatten().any(|item| is_absent(&item)),
        _ => false,
    };
    let (key, flag) = (present("k"), present("f"));
    let is_open = |value: &Option<RawBsonRef<'_>>| value.is_none() || holds_null(value);
    let is_ours = match (&update.write, key, flag) {
        (Write::Key(ours), Some(RawBsonRef::String(theirs)), None) => ours == theirs,
        (Write::Flag(reason), None, Some(RawBsonRef::Document(flag))) => {
            flag.get_str("reason").ok() == Some(reason.as_str()) && flag.get_str("job").ok() == Some(job)
        }
        (_, key, flag) if is_open(&key) && is_open(&flag) => return still_open(document, update),
        _ => false,
    };
    Some(if is_ours { Written::Done } else { Written::AlreadyFilled })
}

/// The fate of an update whose document still lacks key and flag.
fn still_open(document: &RawDocumentBuf, update: &Update) -> Option<Written> {
    let same_type = document.get_str("t").ok() == Some(update.candidate.legacy.type_name.as_str());
    let value: Option<RawBson> = document.get("v").ok().flatten().map(Into::into);
    if !same_type || value != update.candidate.legacy.value {
        return Some(Written::Changed);
    }
    let is_writable = document.get_bool("w").unwrap_or(false);
    if is_writable { None } else { Some(Written::Unwritable) }
}

fn field(name: &bson::raw::CStr, value: impl Into<RawBson>) -> RawDocumentBuf {
    let mut document = RawDocumentBuf::new();
    document.append(name, value.into());
    document
}

/// The bytes of a document's `_id`, its type before them: equal only if identical.
pub(crate) fn id_bytes(document: &bson::RawDocument) -> Option<Vec<u8>> {
    super::exact::id_bytes(document)
}

/// The bytes of a value with its type.
pub(crate) fn value_bytes(value: RawBsonRef<'_>) -> Vec<u8> {
    super::exact::bytes_of(value)
}

fn approximate_size(update: &Update) -> usize {
    let value = update.candidate.legacy.value.as_ref();
    let text = value.and_then(|value| value.as_str()).map_or(16, str::len);
    let id = value_bytes(update.candidate.id.as_raw_bson_ref()).len();
    512 + id + 3 * text
}

fn raw(document: &Document) -> Result<RawDocumentBuf> {
    RawDocumentBuf::try_from(document)
        .map_err(|error| Error::stopped(format!("a command could not be encoded: {error}")))
}

/// Turns a write concern that was not met into an error, so that the batch is
/// sent again: what is not on a majority yet may still be lost.
pub(crate) fn check_write_concern(reply: &Document) -> mongodb::error::Result<()> {
    match reply.get_document("writeConcernError") {
        Ok(error) => {
            let reason = error.get_str("errmsg").unwrap_or("no reason given").to_owned();
            Err(std::io::Error::other(NotOnMajority(reason)).into())
        }
        Err(_) => Ok(()),
    }
}

/// A write that was done, and that a majority does not have yet.
#[derive(Debug)]
struct NotOnMajority(String);

impl std::error::Error for NotOnMajority {}

impl std::fmt::Display for NotOnMajority {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "the write is not on a majority yet: {}", self.0)
    }
}

/// Whether [`check_write_concern`] has made this error.
pub(crate) fn is_not_on_majority(error: &mongodb::error::Error) -> bool {
    match error.kind.as_ref() {
        mongodb::error::ErrorKind::Io(error) => {
            error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<NotOnMajority>)
        }
        _ => false,
    }
}

fn read_reply(reply: &Document) -> Reply {
    let errors = reply.get_array("writeErrors").map(Vec::as_slice).unwrap_or_default();
    Reply {
        matched: reply.get("n").and_then(whole_number).unwrap_or(0),
        errors: errors
            .iter()
            .filter_map(Bson::as_document)
            .map(|error| WriteError {
                index: error
                    .get("index")
                    .and_then(whole_number)
                    .and_then(|index| usize::try_from(index).ok())
                    .unwrap_or(0),
                code: error.get_i32("code").unwrap_or(0),
                message: error.get_str("errmsg").unwrap_or("no message").to_owned(),
            })
            .collect(),
    }
}
