//! Bringing single documents of a target up to date: re-read in the source,
//! written or deleted in the target.
//!
//! What is applied is not a change but the present state of a document, so
//! neither the order of changes nor their number matters, and doing it twice
//! does no harm. What would do harm is a command that arrives late, after a
//! newer state was written: all writes run on one session with rising
//! transaction numbers, and the server refuses a number that is lower than one
//! it has seen.

pub mod quarantine;
mod read;

use std::collections::{HashMap, HashSet};

use bson::{Bson, Document, RawArrayBuf, RawBson, RawDocument, RawDocumentBuf, Timestamp, doc, rawdoc};
use mongodb::ClientSession;
use mongodb::error::Error as DriverError;

use self::read::part_read;
use super::by_id::{by_id, deletion};
use super::command::{is_transient_code, retrying, retrying_in};
use super::groups::Groups;
use super::identified::Identities;
use super::index::whole_number;
use super::sink::{check_write_concern, id_bytes, value_bytes};
use super::source::to_bson;
use super::valid::Valid;
use super::watched::values_at;
use super::{Mongo, WRITE_TIMEOUT, majority_document};
use crate::config::values::Namespace;
use crate::crash;
use crate::error::{Context, Error, Result};
use crate::job::lease::LeaseWatch;

/// Bytes of documents per command, and about as many are read at once.
pub(super) const MOST_BYTES: usize = 2 * 1024 * 1024;
/// Bytes of documents that are read at once, at most and but for the last: those of
/// one batch may be a thousand times as large as those of the batch before.
const READ_BYTES: usize = 2 * MOST_BYTES;
/// Statements per command.
pub(super) const MOST_STATEMENTS: usize = 1000;
/// The same as long as nobody knows how large documents are.
const FIRST_STATEMENTS: usize = 100;
/// The server's code for a duplicate key.
const DUPLICATE_KEY: u64 = 11000;
/// The server's code for a document that a validator refuses.
const INVALID: u64 = 121;
/// Rounds in which documents are written again that failed for a passing reason.
pub(super) const ROUNDS: usize = 10;

/// What was done to the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Documents written.
    pub written: u64,
    /// `_id`s that are not valid, or not there, and were removed if they were in
    /// the target.
    pub removed: u64,
}

impl Applied {
    /// Adds what was done elsewhere.
    pub fn add(&mut self, other: Self) {
        self.written += other.written;
        self.removed += other.removed;
    }
}

/// What became of some documents.
#[derive(Debug, Default)]
pub struct Attempt {
    /// What was done.
    pub applied: Applied,
    /// Documents that were not written because of others under a unique index,
    /// and these others. They are left as they are.
    pub parties: Vec<RawBson>,
}

impl Attempt {
    /// Adds what became of others.
    pub fn add(&mut self, other: Self) {
        self.applied.add(other.applied);
        self.parties.extend(other.parties);
    }
}

/// Keeps a target in step with a source.
#[derive(Debug)]
pub struct CatchUp {
    pub(super) mongo: Mongo,
    pub(super) source: Namespace,
    pub(super) target: Namespace,
    pub(super) valid: Valid,
    pub(super) groups: Groups,
    quarantine: Option<quarantine::Kept>,
    writing: ClientSession,
    transaction: i64,
    /// Documents to read at once, by the size of those before.
    at_once: usize,
    /// Whether the target has refused what stands in the source.
    bypasses: bool,
    /// What the collections must be.
    pub(super) identities: Identities,
    /// On whose strength it writes, where that may end.
    lease: Option<LeaseWatch>,
}

impl CatchUp {
    /// Brings documents from one collection to another where they are valid; `owner`
    /// is whose notes are kept.
    ///
    /// # Errors
    /// A stop where no session can be had.
    pub async fn new(
        mongo: &Mongo,
        source: &Namespace,
        target: &Namespace,
        valid: Valid,
        owner: &str,
    ) -> Result<Self> {
        // The driver hands sessions on, and whoever got one of ours would be
        // refused for its numbers.
        let mongo = mongo.apart()?;
        let groups = Groups::of(&mongo, owner);
        let writing = mongo.client().start_session().await.during("starting a session")?;
        let (source, target) = (source.clone(), target.clone());
        let (quarantine, at_once) = (None, FIRST_STATEMENTS);
        Ok(Self {
            bypasses: false,
            identities: Identities::default(),
            lease: None,
            mongo,
            source,
            target,
            valid,
            groups,
            quarantine,
            writing,
            transaction: 0,
            at_once,
        })
    }

    /// The session of the writes, to be recorded before the first: whoever comes
    /// next ends what still runs on it.
    pub fn session(&self) -> Document {
        self.writing.id().clone()
    }

    /// The target, by the name that it has now.
    pub fn target(&self) -> &Namespace {
        &self.target
    }

    /// Goes on writing to the target, which has another name by now.
    pub fn retarget(&mut self, name: &Namespace) {
        self.target = name.clone();
    }

    /// Lets reads and writes fail where a name is borne by another collection.
    #[must_use]
    pub fn only_between(self, identities: Identities) -> Self {
        Self { identities, ..self }
    }

    /// Writes nothing, and repeats no write, unless the lease is held.
    #[must_use]
    pub fn while_held(self, lease: LeaseWatch) -> Self {
        Self { lease: Some(lease), ..self }
    }

    /// Adds the identity to a command that writes to the target.
    fn guard(&self, command: &mut RawDocumentBuf, namespace: &Namespace) -> Result<()> {
        let target = self.identities.target.as_ref();
        let Some(uuid) = target.filter(|_| *namespace == self.target) else { return Ok(()) };
        let uuid = RawBson::try_from(uuid.clone())
            .map_err(|error| Error::stopped(format!("a command could not be encoded: {error}")))?;
        command.append(bson::cstr!("collectionUUID"), uuid);
        Ok(())
    }

    /// Whether a document decides about others.
    pub(super) fn has_groups(&self) -> bool {
        self.valid.grouping.is_some()
    }

    /// Brings these documents up to the state that they have now or later, at
    /// least that of `after`.
    ///
    /// # Errors
    /// A stop where a document can't be written for good.
    pub async fn apply(&mut self, ids: &[RawBson], after: Option<Timestamp>) -> Result<Attempt> {
        if let Some(grouping) = self.valid.grouping.clone() {
            // What stands in the way of a winner is cared for there.
            let applied = self.apply_groups(&grouping, &distinct(ids), after).await?;
            return Ok(Attempt { applied, parties: Vec::new() });
        }
        let mut attempt = Attempt::default();
        let mut open = distinct(ids);
        for _ in 0..ROUNDS {
            let (mut again, mut rest) = (Vec::new(), open);
            while !rest.is_empty() {
                let part: Vec<RawBson> = rest.drain(..self.at_once.min(rest.len())).collect();
                let read = self.read_within(READ_BYTES, &part, after).await?;
                let part = part_read(part, &read, &mut rest);
                let documents = read.documents;
                attempt
                    .applied
                    .add(self.apply_once(&part, &documents, &mut again, &mut attempt.parties).await?);
            }
            if again.is_empty() {
                return Ok(attempt);
            }
            open = distinct(&again);
        }
        Err(Error::stopped(format!(
            "{} documents could not be brought up to date in {}",
            open.len(),
            self.target
        ))
        .hint("the server was interrupted again and again; start the same command again"))
    }

    async fn apply_once(
        &mut self,
        ids: &[RawBson],
        documents: &[RawDocumentBuf],
        again: &mut Vec<RawBson>,
        parties: &mut Vec<RawBson>,
    ) -> Result<Applied> {
        let mut gone: HashMap<Vec<u8>, RawBson> =
            ids.iter().map(|id| (value_bytes(id.as_raw_bson_ref()), id.clone())).collect();
        if !documents.is_empty() {
            self.at_once = statements_at_once(documents);
        }
        for document in documents {
            if let Some(bytes) = id_bytes(document) {
                gone.remove(&bytes);
            }
        }
        let sorted = self.sort(documents, &mut gone).await?;
        // Removed first: an `_id` may have come back as an equal number of another type.
        let removed: Vec<RawBson> = gone.into_values().collect();
        self.remove(&removed).await?;
        crash::point("catch_up_removed");
        self.leave(&sorted).await?;
        crash::point("left_a_side");
        let written = self.write_all(documents, again, parties).await?;
        self.write_rejected(sorted, again).await?;
        Ok(Applied { written, removed: u64::try_from(removed.len()).unwrap_or(0) })
    }

    /// Removes documents from the target.
    ///
    /// # Errors
    /// A stop where the server refuses.
    pub async fn remove(&mut self, ids: &[RawBson]) -> Result<()> {
        self.remove_from(&self.target.clone(), ids).await
    }

    async fn remove_from(&mut self, namespace: &Namespace, ids: &[RawBson]) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let mut command = deletion(&namespace.collection, ids);
        command.append(bson::cstr!("ordered"), false);
        self.guard(&mut command, namespace)?;
        let reply = self.send(command).await?;
        match first_error(&reply) {
            Some(error) => Err(self.refused(&error)),
            None => Ok(()),
        }
    }

    pub(super) async fn write_all(
        &mut self,
        documents: &[RawDocumentBuf],
        again: &mut Vec<RawBson>,
        parties: &mut Vec<RawBson>,
    ) -> Result<u64> {
        let (mut start, mut bytes, mut written) = (0, 0, 0);
        for (position, document) in documents.iter().enumerate() {
            let size = document.as_bytes().len();
            if position > start && bytes + size > MOST_BYTES {
                written += self.write(&documents[start..position], again, parties).await?;
                (start, bytes) = (position, 0);
            }
            bytes += size;
        }
        if start < documents.len() {
            written += self.write(&documents[start..], again, parties).await?;
        }
        Ok(written)
    }

    async fn write(
        &mut self,
        documents: &[RawDocumentBuf],
        again: &mut Vec<RawBson>,
        parties: &mut Vec<RawBson>,
    ) -> Result<u64> {
        let mut updates = RawArrayBuf::new();
        for document in documents {
            updates.push(statement(document)?);
        }
        let mut command = rawdoc! {"update": self.target.collection.as_str(), "ordered": false};
        command.append(bson::cstr!("updates"), updates);
        self.guard(&mut command, &self.target)?;
        let bypasses = self.bypasses;
        if bypasses {
            command.append(bson::cstr!("bypassDocumentValidation"), true);
        }
        let reply = self.send(command).await?;
        let errors = errors(&reply);
        let failed = u64::try_from(errors.len()).unwrap_or(u64::MAX);
        for error in errors {
            self.resolve(documents, &error, bypasses, again, parties).await?;
        }
        Ok(u64::try_from(documents.len()).unwrap_or(u64::MAX).saturating_sub(failed))
    }

    /// A document that could not be written: it is tried again, or it is told who
    /// stands in whose way.
    async fn resolve(
        &mut self,
        documents: &[RawDocumentBuf],
        error: &Document,
        did_bypass: bool,
        again: &mut Vec<RawBson>,
        parties: &mut Vec<RawBson>,
    ) -> Result<()> {
        let code = error.get("code").and_then(whole_number).unwrap_or(0);
        let index = error.get("index").and_then(whole_number).and_then(|index| usize::try_from(index).ok());
        let document = index.and_then(|index| documents.get(index));
        let id = document.and_then(|document| document.get("_id").ok().flatten()).map(RawBson::from);
        let Some(id) = id else { return Err(self.refused(error)) };
        if i32::try_from(code).is_ok_and(is_transient_code) {
            again.push(id);
            return Ok(());
        }
        if code == INVALID && !did_bypass {
            // What the source holds is right, whatever the validator says; only where it
            // must be, because that takes a privilege.
            self.bypasses = true;
            again.push(id);
            return Ok(());
        }
        if code != DUPLICATE_KEY {
            return Err(self.refused(error));
        }
        parties.push(id);
        parties.extend(self.rivals(document, error).await?);
        Ok(())
    }

    /// The documents of the target that hold what a document was refused for.
    async fn rivals(&self, document: Option<&RawDocumentBuf>, error: &Document) -> Result<Vec<RawBson>> {
        let pattern = error.get_document("keyPattern").ok().filter(|pattern| !pattern.contains_key("_id"));
        match (error.get_document("collation"), pattern, document) {
            // The server tells the key of the index, by which no document is found.
            (Ok(collation), Some(pattern), Some(document)) => {
                self.holding(equal_values(document, pattern)?, Some(collation)).await
            }
            _ => match error.get_document("keyValue").ok().filter(|values| !values.contains_key("_id")) {
                Some(values) => self.holders(values).await,
                None => Ok(Vec::new()),
            },
        }
    }

    /// The documents of the target that hold these values.
    ///
    /// # Errors
    /// A stop where the target can't be read.
    pub async fn holders(&self, values: &Document) -> Result<Vec<RawBson>> {
        let filter: Document =
            values.iter().map(|(field, value)| (field.clone(), doc! {"$eq": value.clone()}.into())).collect();
        self.holding(filter, None).await
    }

    async fn holding(&self, filter: Document, collation: Option<&Document>) -> Result<Vec<RawBson>> {
        let mut command = doc! {"find": &self.target.collection, "filter": filter, "projection": {"_id": 1}};
        if let Some(collation) = collation {
            command.insert("collation", collation.clone());
        }
        let identity = self.identities.target.as_ref();
        let found = retrying(format!("finding what stands in the way in {}", self.target), || {
            self.mongo.documents_of(&self.target, command.clone(), doc! {"level": "local"}, identity)
        })
        .await?;
        Ok(found.iter().filter_map(|holder| holder.get("_id").ok().flatten().map(RawBson::from)).collect())
    }

    /// Sends a write, again and again under the same number: the server executes
    /// it once.
    async fn send(&mut self, mut command: RawDocumentBuf) -> Result<Document> {
        self.transaction += 1;
        command.append(bson::cstr!("txnNumber"), self.transaction);
        command
            .append(bson::cstr!("maxTimeMS"), i64::try_from(WRITE_TIMEOUT.as_millis()).unwrap_or(i64::MAX));
        let concern = RawDocumentBuf::try_from(&majority_document())
            .map_err(|error| Error::stopped(format!("a command could not be encoded: {error}")))?;
        command.append(bson::cstr!("writeConcern"), concern);
        let database = self.mongo.database(&self.target.database);
        let operation = format!("bringing {} up to date", self.target);
        let lease = self.lease.as_ref();
        retrying_in(operation, &mut self.writing, async |session| {
            if let Some(lease) = lease {
                // Whoever has it by now may have written a newer state.
                lease.valid().await.map_err(|error| DriverError::custom(error.to_string()))?;
            }
            let reply = database.run_raw_command(command.clone()).session(&mut *session).await?;
            check_write_concern(&reply)?;
            Ok(reply)
        })
        .await
    }

    fn refused(&self, error: &Document) -> Error {
        let message = error.get_str("errmsg").unwrap_or("no reason given");
        Error::stopped(format!("a document can't be brought up to date in {}: {message}", self.target))
            .hint("mend the cause and start the same command again")
    }
}

/// The whole document as it is, whatever its field names and values: neither a
/// replacement nor an insert keeps them all.
pub(super) fn statement(document: &RawDocument) -> Result<RawDocumentBuf> {
    let id = document.get("_id").ok().flatten().ok_or_else(|| Error::stopped("a document has no `_id`"))?;
    let mut pipeline = RawArrayBuf::new();
    pipeline.push(rawdoc! {"$replaceWith": {"$literal": document.to_owned()}});
    Ok(rawdoc! {"q": by_id(id.into()), "u": pipeline, "upsert": true})
}

/// The condition for documents with the values that this one has in the fields of
/// an index; of an array one element is enough. Pure.
fn equal_values(document: &RawDocument, pattern: &Document) -> Result<Document> {
    let mut all = Vec::new();
    for field in pattern.keys() {
        let values = values_at(document, field).iter().map(to_bson).collect::<Result<Vec<Bson>>>()?;
        let any: Vec<Document> = values.into_iter().map(|value| doc! {field: {"$eq": value}}).collect();
        all.push(if any.is_empty() {
            doc! {field: Bson::Null}
        } else {
            doc! {"$or": any}
        });
    }
    Ok(doc! {"$and": all})
}

/// How many documents to read at once, so that they are no more than a command
/// holds: by the average size of the last. Pure.
fn statements_at_once(documents: &[RawDocumentBuf]) -> usize {
    let bytes: usize = documents.iter().map(|document| document.as_bytes().len()).sum();
    let average = bytes / documents.len().max(1);
    (MOST_BYTES / average.max(1)).clamp(1, MOST_STATEMENTS)
}

/// Each `_id` once.
pub(crate) fn distinct(ids: &[RawBson]) -> Vec<RawBson> {
    let mut seen = HashSet::new();
    ids.iter().filter(|id| seen.insert(value_bytes(id.as_raw_bson_ref()))).cloned().collect()
}

fn errors(reply: &Document) -> Vec<Document> {
    let errors = reply.get_array("writeErrors").map(Vec::as_slice).unwrap_or_default();
    errors.iter().filter_map(Bson::as_document).cloned().collect()
}

fn first_error(reply: &Document) -> Option<Document> {
    errors(reply).into_iter().next()
}
