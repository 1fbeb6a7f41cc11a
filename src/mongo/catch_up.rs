//! Bringing single documents of a target up to date: re-read in the source,
//! written or deleted in the target.
//!
//! What is applied is not a change but the present state of a document, so
//! neither the order of changes nor their number matters, and doing it twice
//! does no harm. What would do harm is a command that arrives late, after a
//! newer state was written: all writes go by a [`Lane`], in transactions that the
//! server refuses to whoever is not its holder any more.

pub mod quarantine;
mod read;

use std::collections::{HashMap, HashSet};

use bson::{Document, RawArrayBuf, RawBson, RawBsonRef, RawDocument, RawDocumentBuf, Timestamp, doc, rawdoc};

use self::quarantine::Sorted;
use self::read::part_read;
use super::Mongo;
use super::by_id::deletion;
use super::command::retrying;
use super::exact;
use super::groups::Groups;
use super::identified::Identities;
use super::lane::{Lane, Parts, Refused};
use super::sink::{id_bytes, value_bytes};
use super::state::write_states;
use super::valid::Valid;
use super::watched::values_at;
use crate::config::values::Namespace;
use crate::crash;
use crate::error::{Error, Result};

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
/// The server's code for an `_id` that is equal to the one that is there and not the same.
const OTHER_ID: u64 = 66;

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
    lane: Lane,
    /// Documents to read at once, by the size of those before.
    at_once: usize,
    /// Whether the target has refused what stands in the source.
    bypasses: bool,
    /// What the collections must be.
    pub(super) identities: Identities,
}

impl CatchUp {
    /// Brings documents from one collection to another where they are valid; `owner`
    /// is whose notes are kept.
    pub fn new(lane: Lane, source: &Namespace, target: &Namespace, valid: Valid, owner: &str) -> Self {
        let mongo = lane.mongo().clone();
        Self {
            groups: Groups::of(&mongo, owner),
            mongo,
            source: source.clone(),
            target: target.clone(),
            valid,
            quarantine: None,
            lane,
            at_once: FIRST_STATEMENTS,
            bypasses: false,
            identities: Identities::default(),
        }
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
        while !open.is_empty() {
            let part: Vec<RawBson> = open.drain(..self.at_once.min(open.len())).collect();
            let read = self.read_within(READ_BYTES, &part, after).await?;
            let part = part_read(part, &read, &mut open);
            attempt.applied.add(self.apply_once(&part, &read.documents, &mut attempt.parties).await?);
        }
        Ok(attempt)
    }

    async fn apply_once(
        &mut self,
        ids: &[RawBson],
        documents: &[RawDocumentBuf],
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
        let removed: Vec<RawBson> = gone.into_values().collect();
        let leaving = self.leaving(&removed, &sorted)?;
        let written = self.write_after(leaving, documents, parties).await?;
        crash::point("left_a_side");
        self.leave_parts(&sorted).await?;
        self.write_rejected(sorted).await?;
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
        let commands = [self.removal(namespace, ids)?];
        match self.send(namespace, &commands).await? {
            Some(refused) => Err(self.refused(&refused)),
            None => Ok(()),
        }
    }

    fn removal(&self, namespace: &Namespace, ids: &[RawBson]) -> Result<RawDocumentBuf> {
        let mut command = deletion(&namespace.collection, ids);
        self.guard(&mut command, namespace)?;
        Ok(command)
    }

    /// The commands that remove what is gone from the target, and from the quarantine what is
    /// valid or gone: an `_id` may have come back as an equal number of another type.
    fn leaving(&self, removed: &[RawBson], sorted: &Sorted) -> Result<Vec<RawDocumentBuf>> {
        let mut commands = Vec::new();
        if !removed.is_empty() {
            commands.push(self.removal(&self.target, removed)?);
        }
        if let Some(namespace) = self.left(sorted) {
            commands.push(self.removal(namespace, &sorted.leaving)?);
        }
        Ok(commands)
    }

    pub(super) async fn write_all(
        &mut self,
        documents: &[RawDocumentBuf],
        parties: &mut Vec<RawBson>,
    ) -> Result<u64> {
        self.write_after(Vec::new(), documents, parties).await
    }

    /// Writes documents after these commands, the first of them in the same transaction.
    async fn write_after(
        &mut self,
        mut before: Vec<RawDocumentBuf>,
        documents: &[RawDocumentBuf],
        parties: &mut Vec<RawBson>,
    ) -> Result<u64> {
        let (mut start, mut bytes, mut written) = (0, 0, 0);
        for (position, document) in documents.iter().enumerate() {
            let size = document.as_bytes().len();
            if position > start && bytes + size > MOST_BYTES {
                written += self.write(&mut before, &documents[start..position], parties).await?;
                (start, bytes) = (position, 0);
            }
            bytes += size;
        }
        written += self.write(&mut before, &documents[start..], parties).await?;
        Ok(written)
    }

    /// One refused document brings a transaction to nothing: the others are written without it.
    async fn write(
        &mut self,
        before: &mut Vec<RawDocumentBuf>,
        documents: &[RawDocumentBuf],
        parties: &mut Vec<RawBson>,
    ) -> Result<u64> {
        let (mut parts, mut written) = (Parts::of(documents.len()), 0);
        // Those that an equal `_id` is in the way of.
        let mut anew = HashSet::new();
        loop {
            let part = parts.next();
            if part.is_none() && before.is_empty() {
                return Ok(written);
            }
            let part = part.unwrap_or_default();
            let these = documents.get(part.clone()).unwrap_or_default();
            let bypasses = self.bypasses;
            let mut commands = before.clone();
            commands.extend(self.writes(these, |index| anew.contains(&(part.start + index)))?);
            let refused = self.send(&self.target.clone(), &commands).await?;
            let Some(refused) = refused else {
                before.clear();
                written += u64::try_from(part.len()).unwrap_or(u64::MAX);
                parts.done();
                continue;
            };
            let is_about_a_document = refused.command + 1 == commands.len() && !these.is_empty();
            let document = these.get(refused.statement).filter(|_| is_about_a_document);
            let Some(document) = document else { return Err(self.refused(&refused)) };
            match refused.code() {
                // What the source holds is right, whatever the validator says; only where it
                // must be, because that takes a privilege.
                INVALID if !bypasses => self.bypasses = true,
                OTHER_ID if anew.insert(part.start + refused.statement) => {}
                DUPLICATE_KEY => {
                    parties.extend(exact::id_of(document));
                    parties.extend(self.rivals(document, &refused.error).await?);
                    parts.refused(refused.statement);
                }
                _ => return Err(self.refused(&refused)),
            }
        }
    }

    /// The commands that write documents of the target; the last one has a statement for each.
    fn writes(
        &self,
        documents: &[RawDocumentBuf],
        is_written_anew: impl Fn(usize) -> bool,
    ) -> Result<Vec<RawDocumentBuf>> {
        let mut commands = write_states(&self.target.collection, documents, is_written_anew)?;
        for command in &mut commands {
            self.guard(command, &self.target)?;
        }
        if let Some(command) = commands.last_mut().filter(|_| self.bypasses) {
            command.append(bson::cstr!("bypassDocumentValidation"), true);
        }
        Ok(commands)
    }

    /// The documents of the target that hold what a document was refused for.
    async fn rivals(&self, document: &RawDocumentBuf, error: &Document) -> Result<Vec<RawBson>> {
        let pattern = error.get_document("keyPattern").ok().filter(|pattern| !pattern.contains_key("_id"));
        // Not by the values that the server tells: with a collation they are keys of the index, by
        // which no document is found, and of a text that is not UTF-8 they are only like it.
        let Some(pattern) = pattern else { return Ok(Vec::new()) };
        self.holding(equal_values(document, pattern), error.get_document("collation").ok()).await
    }

    /// The documents of the target that hold these values.
    ///
    /// # Errors
    /// A stop where the target can't be read.
    pub async fn holders(&self, values: &Document) -> Result<Vec<RawBson>> {
        let filter: Document =
            values.iter().map(|(field, value)| (field.clone(), doc! {"$eq": value.clone()}.into())).collect();
        self.holding(exact::encoded(&filter)?, None).await
    }

    async fn holding(&self, filter: RawDocumentBuf, collation: Option<&Document>) -> Result<Vec<RawBson>> {
        let name = self.target.collection.as_str();
        let mut command = rawdoc! {"find": name, "filter": filter, "projection": {"_id": 1}};
        if let Some(collation) = collation {
            command.append(bson::cstr!("collation"), exact::encoded(collation)?);
        }
        let identity = self.identities.target.as_ref();
        let found = retrying(format!("finding what stands in the way in {}", self.target), || {
            self.mongo.documents_of(&self.target, command.clone(), doc! {"level": "local"}, identity)
        })
        .await?;
        Ok(found.iter().filter_map(|holder| exact::id_of(holder)).collect())
    }

    async fn send(&mut self, namespace: &Namespace, commands: &[RawDocumentBuf]) -> Result<Option<Refused>> {
        let operation = format!("bringing {namespace} up to date");
        self.lane.write(&operation, &namespace.database, commands).await
    }

    fn refused(&self, refused: &Refused) -> Error {
        let message = refused.message();
        Error::stopped(format!("a document can't be brought up to date in {}: {message}", self.target))
            .hint("mend the cause and start the same command again")
    }
}

/// The condition for documents with the values that this one has in the fields of
/// an index; of an array one element is enough. Pure.
fn equal_values(document: &RawDocument, pattern: &Document) -> RawDocumentBuf {
    let mut all = RawArrayBuf::new();
    for field in pattern.keys() {
        let values = values_at(document, field);
        let equal = |value: &RawBson| exact::single(field, exact::equal(value).as_ref().into());
        let any: Vec<RawDocumentBuf> = values.iter().map(equal).collect();
        all.push(if any.is_empty() {
            exact::single(field, RawBsonRef::Null)
        } else {
            rawdoc! {"$or": RawArrayBuf::from_iter(any)}
        });
    }
    rawdoc! {"$and": all}
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
