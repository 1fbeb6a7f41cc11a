//! Keeping a target in step where of several documents only the newest is valid.
//!
//! The *group* of a document are the candidates with its values, its *winner* the
//! one that is valid. A change of one document may thus decide about others: a
//! winner that leaves its group lets one win that nobody touched. Which group it
//! left can't be asked of the source any more. The target tells: there the winner
//! still stands as it was.
//!
//! **A look.** Source, winners and documents to write are read as of one moment,
//! not before the changes that are worked off and never before an earlier look. From the touched
//! `_id`s on it takes in
//! - the group of each document in the source, and that of its copy in the target,
//! - the winner of each such group, and all copies in the target with its values,
//! - for those documents the same again, until nothing new appears.
//!
//! Then in each of these groups the winner is the only copy that is left.
//!
//! **Why nothing is missed.** Suppose that all changes up to now are worked off and
//! a group `g` is not as it should be. Since it was last looked at, at `r`, nothing has
//! written, moved or removed a copy with its values: whoever does has such a copy
//! among his documents, and so looks at `g`. So the copy of its winner `w` of then
//! stands there still. What has changed in the source since `r`? If `w` did, its
//! change was worked off with the copy of `w` still in `g`, so `g` was looked at.
//! If not, another one has joined `g` or risen in it, and stays: its change was
//! worked off with that document in `g`, so `g` was looked at. Either contradicts
//! that `r` was the last look. A group that was never looked at has, after a copy
//! of all candidates, the one copy of its only document: those with more are marked
//! when the copy is done. Whether a document moves twice within a batch, between two
//! or during the copy plays no part: only where it stands at the moment of a look.
//!
//! **Why no kill forgets anything.** What was not worked off to its end is worked
//! off again; but the copies that told a former group may be gone by then. So a
//! group in which a copy may be lost has its winner before:
//! 1. Winners without a copy are written first.
//! 2. A winner whose copy still stands in another group can't be: its own change is
//!    yet to be worked off, but by then it may have moved on. Such groups are noted,
//!    durably, before anything is written.
//! 3. Where a unique index is in the way of a winner, the copies in question are removed and
//!    looked at again; they and their groups are noted before.
//!
//! Notes are removed when everything is written; a new run begins with those that
//! it finds. Copies of winners that nobody touched and that stand in the right
//! group are left alone: where such a copy is out of date, a change of its document is
//! yet to be worked off.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bson::{Bson, Document, RawArrayBuf, RawBson, RawDocument, RawDocumentBuf, Timestamp, doc, rawdoc};
use mongodb::error::{Error as DriverError, ErrorKind};

use super::Mongo;
use super::catch_up::{Applied, CatchUp, MOST_STATEMENTS};
use super::command::retrying;
use super::exact;
use super::identified::not_before;
use super::notes::Notes;
use super::sink::{id_bytes, value_bytes};
use super::valid::{Grouping, Key, Valid};
use crate::config::values::Namespace;
use crate::error::{Error, Result};

/// The collection of groups in the state database.
pub const NOTES: &str = "groups";
/// `_id`s that are looked at together at first.
const PART: usize = 500;
/// Groups per query.
const KEYS: usize = 200;
/// Looks at groups whose documents stand in each other's way.
const ROUNDS: usize = 10;
/// Copies of so many groups at once; where there are more, some are removed first.
const MOST_COPIES: usize = 5_000;
/// Whole documents per read.
const DOCUMENTS: usize = 100;
/// The server's codes for a moment that can't be read any more.
const STALE: [i32; 2] = [239, 246];
/// Tries to find a moment that can be read.
const TRIES: usize = 50;

/// What is remembered between two looks.
#[derive(Debug)]
pub(super) struct Groups {
    notes: Notes,
    /// Whether the notes that an earlier run has left were taken up.
    is_begun: bool,
    /// The latest moment that was looked at.
    latest: Option<Timestamp>,
}

impl Groups {
    pub(super) fn of(mongo: &Mongo, owner: &str) -> Self {
        Self { notes: Notes::of(mongo, NOTES, owner), is_begun: false, latest: None }
    }
}

/// What is to be looked at.
struct Open {
    ids: Vec<RawBson>,
    keys: Vec<Key>,
}

/// A document in the two collections. The inner `None` is a document in no group.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    id: RawBson,
    candidate: Option<Option<Key>>,
    copy: Option<Option<Key>>,
}

/// What was seen at one moment, by the bytes of `_id`s.
#[derive(Debug, Default)]
struct Look {
    at: Option<Timestamp>,
    seen: HashMap<Vec<u8>, Seen>,
    touched: HashSet<Vec<u8>>,
    winners: HashSet<Vec<u8>>,
    keys: HashMap<Vec<u8>, Key>,
    /// Whether some groups have more copies than were read.
    is_cut: bool,
    /// Whether the server takes the `_id` of a winner for that of another copy.
    has_twins: bool,
}

/// What is to be done to the target, in this order.
#[derive(Debug, Default, PartialEq)]
struct Steps {
    note: Vec<Key>,
    write_first: Vec<RawBson>,
    remove: Vec<RawBson>,
    write: Vec<RawBson>,
}

impl Look {
    /// Pure.
    fn steps(&self) -> Steps {
        let mut steps = Steps::default();
        for (bytes, seen) in &self.seen {
            let is_valid = match &seen.candidate {
                None => false,
                Some(None) => true,
                Some(Some(_)) => self.winners.contains(bytes),
            };
            let id = seen.id.clone();
            match (is_valid, &seen.candidate, &seen.copy) {
                (false, _, None) | (true, None, _) => {}
                (false, _, Some(_)) => steps.remove.push(id),
                (true, Some(_), None) => steps.write_first.push(id),
                (true, Some(key), Some(copied)) => {
                    let has_moved = key.as_ref().map(Key::bytes) != copied.as_ref().map(Key::bytes);
                    if has_moved {
                        steps.note.extend(key.clone());
                    }
                    if has_moved || self.touched.contains(bytes) {
                        steps.write.push(id);
                    }
                }
            }
        }
        if self.has_twins {
            // One of the two must be gone before the other is written.
            steps.note = self.keys.values().cloned().collect();
            steps.write.append(&mut steps.write_first);
        }
        steps
    }
}

impl CatchUp {
    /// Brings these documents, and those that they decide about, up to the state
    /// that they have now or later, at least that of `after`.
    pub(super) async fn apply_groups(
        &mut self,
        grouping: &Grouping,
        ids: &[RawBson],
        after: Option<Timestamp>,
    ) -> Result<Applied> {
        let mut applied = self.take_up_notes(grouping, after).await?;
        for part in ids.chunks(PART) {
            let open = Open { ids: part.to_vec(), keys: Vec::new() };
            applied.add(self.settle(grouping, open, after, false).await?);
        }
        Ok(applied)
    }

    /// Removes the copies of these documents, of which some stand in the way of
    /// others, and looks at all of them and their groups anew.
    ///
    /// # Errors
    /// A stop where a document can't be written for good.
    pub async fn write_again(&mut self, ids: &[RawBson], after: Option<Timestamp>) -> Result<Applied> {
        let Some(grouping) = self.valid.grouping.clone() else { return Ok(Applied::default()) };
        let mut applied = self.take_up_notes(&grouping, after).await?;
        let keys = self.unblock(&grouping, ids).await?;
        applied.add(self.settle(&grouping, Open { ids: ids.to_vec(), keys }, after, true).await?);
        Ok(applied)
    }

    /// Looks at what an earlier run has noted.
    async fn take_up_notes(&mut self, grouping: &Grouping, after: Option<Timestamp>) -> Result<Applied> {
        if self.groups.is_begun {
            return Ok(Applied::default());
        }
        let notes = self.groups.notes.some(0).await?;
        let mut open = Open { ids: Vec::new(), keys: Vec::new() };
        for note in &notes {
            match noted_id(&note.content) {
                Some(id) => open.ids.push(id),
                None => open.keys.extend(Key::from_bytes(&note.content)),
            }
        }
        let applied = self.settle(grouping, open, after, !notes.is_empty()).await?;
        self.groups.is_begun = true;
        Ok(applied)
    }

    /// Removes copies, and notes them and their groups before: a copy may be of a
    /// document in no group that nobody touches again. Returns the groups.
    async fn unblock(&mut self, grouping: &Grouping, ids: &[RawBson]) -> Result<Vec<Key>> {
        let keys = self.keys_of_copies(grouping, ids).await?;
        self.note(&keys).await?;
        self.groups.notes.add(&ids.iter().map(id_note).collect::<Vec<_>>()).await?;
        self.remove(ids).await?;
        crate::crash::point("groups_unblocked");
        Ok(keys)
    }

    async fn settle(
        &mut self,
        grouping: &Grouping,
        mut open: Open,
        after: Option<Timestamp>,
        mut has_notes: bool,
    ) -> Result<Applied> {
        let (mut applied, mut rounds) = (Applied::default(), 0);
        while rounds < ROUNDS {
            let look = self.look(grouping, &open, after).await?;
            let steps = look.steps();
            has_notes |= self.note(&steps.note).await?;
            open.keys.extend(steps.note.iter().cloned());
            crate::crash::point("groups_noted");
            match self.take(&look, &steps, &mut applied).await? {
                Taken::All if look.is_cut => {}
                Taken::All => {
                    if has_notes {
                        self.groups.notes.clear().await?;
                    }
                    return Ok(applied);
                }
                Taken::Stale => rounds += 1,
                Taken::Blocked(ids) => {
                    rounds += 1;
                    open.keys.extend(self.unblock(grouping, &ids).await?);
                    has_notes = true;
                    open.ids.extend(ids);
                }
            }
        }
        Err(Error::stopped(format!(
            "documents of {} stand in each other's way under a unique index",
            self.source
        ))
        .hint("does the source itself hold duplicates that the rules keep? Started again, the job goes on"))
    }

    /// Makes groups be looked at by whoever comes next; whether there were any.
    async fn note(&self, keys: &[Key]) -> Result<bool> {
        let notes: HashSet<Vec<u8>> = keys.iter().map(Key::bytes).collect();
        self.groups.notes.add(&notes.into_iter().collect::<Vec<_>>()).await?;
        Ok(!keys.is_empty())
    }

    /// Does to the target what the look has shown.
    async fn take(&mut self, look: &Look, steps: &Steps, applied: &mut Applied) -> Result<Taken> {
        let Some(at) = look.at else { return Ok(Taken::All) };
        match self.write_as_of(at, &steps.write_first, applied).await? {
            Taken::All => {}
            other => return Ok(other),
        }
        crate::crash::point("groups_first");
        for part in steps.remove.chunks(MOST_STATEMENTS) {
            self.remove(part).await?;
            applied.removed += u64::try_from(part.len()).unwrap_or(0);
            crate::crash::point("groups_removed");
        }
        self.write_as_of(at, &steps.write, applied).await
    }

    async fn write_as_of(&mut self, at: Timestamp, ids: &[RawBson], applied: &mut Applied) -> Result<Taken> {
        let mut blocked = Vec::new();
        for part in ids.chunks(DOCUMENTS) {
            let pipeline = exact::pipeline(exact::with_ids(part), &[])?;
            let read = retrying(format!("reading winners of {}", self.source), || {
                unless_stale(self.of_source(&pipeline, as_of(at)))
            });
            let Some(documents) = read.await? else { return Ok(Taken::Stale) };
            let wanted: HashSet<Vec<u8>> = part.iter().map(|id| value_bytes(id.as_raw_bson_ref())).collect();
            let is_wanted =
                |document: &RawDocumentBuf| id_bytes(document).is_some_and(|id| wanted.contains(&id));
            let documents: Vec<RawDocumentBuf> = documents.into_iter().filter(is_wanted).collect();
            applied.written += self.write_all(&documents, &mut blocked).await?;
            crate::crash::point("groups_written");
        }
        Ok(if blocked.is_empty() { Taken::All } else { Taken::Blocked(blocked) })
    }

    /// All that a pipeline leaves of the source.
    async fn of_source(
        &self,
        pipeline: &RawArrayBuf,
        concern: Document,
    ) -> mongodb::error::Result<Vec<RawDocumentBuf>> {
        rows(&self.mongo, &self.source, pipeline, concern, self.identities.source.as_ref()).await
    }

    /// All that a pipeline leaves of the target.
    async fn of_target(
        &self,
        pipeline: &RawArrayBuf,
        concern: Document,
    ) -> mongodb::error::Result<Vec<RawDocumentBuf>> {
        rows(&self.mongo, &self.target, pipeline, concern, self.identities.target.as_ref()).await
    }

    /// The groups in which copies stand.
    async fn keys_of_copies(&self, grouping: &Grouping, ids: &[RawBson]) -> Result<Vec<Key>> {
        let pipeline = exact::pipeline(exact::with_ids(ids), &[projection(grouping)])?;
        let copies = retrying(format!("reading groups of {}", self.target), || {
            self.of_target(&pipeline, doc! {"level": "local"})
        })
        .await?;
        Ok(copies.iter().filter_map(|copy| grouping.key_of(copy)).collect())
    }

    async fn look(&mut self, grouping: &Grouping, open: &Open, after: Option<Timestamp>) -> Result<Look> {
        if open.ids.is_empty() && open.keys.is_empty() {
            return Ok(Look::default());
        }
        let floor = self.groups.latest.max(after);
        for _ in 0..TRIES {
            let operation = format!("looking at groups of {}", self.source);
            let found = retrying(operation, || unless_stale(self.look_once(grouping, open, floor))).await?;
            if let Some(look) = found {
                self.groups.latest = look.at;
                return Ok(look);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Err(Error::stopped(format!("{} can't be read as of one moment", self.source)))
    }

    async fn look_once(
        &self,
        grouping: &Grouping,
        open: &Open,
        floor: Option<Timestamp>,
    ) -> mongodb::error::Result<Look> {
        let at = moment(&self.mongo, floor).await?;
        let mut look = Look { at: Some(at), ..Look::default() };
        look.touched.extend(open.ids.iter().map(|id| value_bytes(id.as_raw_bson_ref())));
        let (mut ids, mut keys) = (open.ids.clone(), open.keys.clone());
        while !ids.is_empty() || !keys.is_empty() {
            for part in ids.chunks(MOST_STATEMENTS) {
                keys.extend(self.look_at_documents(grouping, part, at, &mut look).await?);
            }
            keys.retain(|key| look.keys.insert(key.bytes(), key.clone()).is_none());
            ids.clear();
            for part in keys.chunks(KEYS) {
                ids.extend(self.look_at_groups(grouping, part, at, &mut look).await?);
            }
            keys.clear();
        }
        look.has_twins = self.has_twins(&look.steps().write_first, at).await?;
        Ok(look)
    }

    /// Whether there are copies of documents that have none: the server takes their
    /// `_id`s for the same, though their bytes are not.
    async fn has_twins(&self, ids: &[RawBson], at: Timestamp) -> mongodb::error::Result<bool> {
        for part in ids.chunks(MOST_STATEMENTS) {
            let only_one = [doc! {"$limit": 1}, doc! {"$project": {"_id": 1}}];
            let pipeline = piped(exact::with_ids(part), &only_one)?;
            if !self.of_target(&pipeline, not_before(Some(at))).await?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes documents into the look; returns their groups.
    async fn look_at_documents(
        &self,
        grouping: &Grouping,
        ids: &[RawBson],
        at: Timestamp,
        look: &mut Look,
    ) -> mongodb::error::Result<Vec<Key>> {
        for id in ids {
            look.see(&value_bytes(id.as_raw_bson_ref()), id);
        }
        let (only, projection) = (exact::with_ids(ids), projection(grouping));
        let candidates = piped(only.clone(), &[self.valid.stages(), vec![projection.clone()]].concat())?;
        let copies = piped(only, &[projection])?;
        let mut keys = Vec::new();
        for document in self.of_source(&candidates, as_of(at)).await? {
            let Some((bytes, id)) = id_of(&document) else { continue };
            let key = grouping.key_of(&document);
            keys.extend(key.clone());
            look.see(&bytes, &id).candidate = Some(key);
        }
        for document in self.of_target(&copies, not_before(Some(at))).await? {
            let Some((bytes, id)) = id_of(&document) else { continue };
            let key = grouping.key_of(&document);
            keys.extend(key.clone());
            look.see(&bytes, &id).copy = Some(key);
        }
        Ok(keys)
    }

    /// Takes groups into the look; returns the documents that are not in it yet.
    async fn look_at_groups(
        &self,
        grouping: &Grouping,
        keys: &[Key],
        at: Timestamp,
        look: &mut Look,
    ) -> mongodb::error::Result<Vec<RawBson>> {
        let of_groups = grouping.of_groups(keys);
        let winners = piped(of_groups.clone(), &[self.valid.stages(), grouping.winners()].concat())?;
        let copies = [
            doc! {"$match": grouping.in_a_group()},
            doc! {"$limit": i64::try_from(MOST_COPIES).unwrap_or(i64::MAX)},
            doc! {"$project": {"_id": 1}},
        ];
        let copies = piped(of_groups, &copies)?;
        let winners = self.of_source(&winners, as_of(at)).await?;
        let copies = self.of_target(&copies, not_before(Some(at))).await?;
        look.is_cut |= copies.len() >= MOST_COPIES;
        look.winners.extend(winners.iter().filter_map(|document| id_bytes(document)));
        let found = winners.iter().chain(&copies).filter_map(|document| id_of(document));
        let mut ids = HashMap::new();
        ids.extend(found.filter(|(bytes, _)| !look.seen.contains_key(bytes)));
        Ok(ids.into_values().collect())
    }
}

/// How far doing it came.
enum Taken {
    All,
    /// Something in the target is in the way: of these, or these themselves.
    Blocked(Vec<RawBson>),
    /// The moment can't be read any more.
    Stale,
}

impl Look {
    fn see(&mut self, bytes: &[u8], id: &RawBson) -> &mut Seen {
        self.seen.entry(bytes.to_vec()).or_insert_with(|| Seen {
            id: id.clone(),
            candidate: None,
            copy: None,
        })
    }
}

/// A note of a document. The fields of a group's note are numbers.
fn id_note(id: &RawBson) -> Vec<u8> {
    exact::single("id", id.as_raw_bson_ref()).into_bytes()
}

fn noted_id(note: &[u8]) -> Option<RawBson> {
    exact::field(RawDocument::from_bytes(note).ok()?, "id")
}

fn id_of(document: &RawDocument) -> Option<(Vec<u8>, RawBson)> {
    let id = exact::id_of(document)?;
    Some((value_bytes(id.as_raw_bson_ref()), id))
}

/// What tells the group of a document.
fn projection(grouping: &Grouping) -> Document {
    doc! {"$project": grouping.projection()}
}

fn piped(condition: RawDocumentBuf, stages: &[Document]) -> mongodb::error::Result<RawArrayBuf> {
    exact::pipeline(condition, stages).map_err(DriverError::custom)
}

fn as_of(at: Timestamp) -> Document {
    doc! {"level": "snapshot", "atClusterTime": at}
}

/// A moment that a majority has reached, not before another one.
async fn moment(mongo: &Mongo, floor: Option<Timestamp>) -> mongodb::error::Result<Timestamp> {
    let hello = mongo.admin().run_command(doc! {"hello": 1}).await?;
    let last = hello.get_document("lastWrite").and_then(|last| last.get_document("majorityOpTime"));
    let reached = last.ok().and_then(|time| time.get_timestamp("ts").ok());
    reached.max(floor).ok_or_else(|| DriverError::custom("the server does not tell what a majority has"))
}

/// All that a pipeline leaves of the collection with that identity.
async fn rows(
    mongo: &Mongo,
    namespace: &Namespace,
    pipeline: &RawArrayBuf,
    concern: Document,
    identity: Option<&Bson>,
) -> mongodb::error::Result<Vec<RawDocumentBuf>> {
    let command = rawdoc! {
        "aggregate": namespace.collection.as_str(),
        "pipeline": pipeline.clone(),
        "cursor": {},
        "allowDiskUse": true,
    };
    mongo.documents_of(namespace, command, concern, identity).await
}

/// `None` where the moment can't be read any more.
async fn unless_stale<T>(
    read: impl Future<Output = mongodb::error::Result<T>>,
) -> mongodb::error::Result<Option<T>> {
    match read.await {
        Ok(found) => Ok(Some(found)),
        Err(error) if is_stale(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_stale(error: &DriverError) -> bool {
    matches!(error.kind.as_ref(), ErrorKind::Command(command) if STALE.contains(&command.code))
}

impl Mongo {
    /// Which of these documents, all candidates, are valid.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide.
    pub async fn are_valid(
        &self,
        namespace: &Namespace,
        valid: &Valid,
        documents: &[&RawDocument],
    ) -> mongodb::error::Result<Vec<bool>> {
        let Some(grouping) = &valid.grouping else { return Ok(vec![true; documents.len()]) };
        let keys: Vec<Option<Key>> = documents.iter().map(|document| grouping.key_of(document)).collect();
        let distinct: HashMap<Vec<u8>, Key> =
            keys.iter().flatten().map(|key| (key.bytes(), key.clone())).collect();
        let distinct: Vec<Key> = distinct.into_values().collect();
        let mut winners = HashSet::new();
        for part in distinct.chunks(KEYS) {
            let stages = [valid.stages(), grouping.winners()].concat();
            let pipeline = piped(grouping.of_groups(part), &stages)?;
            let found = rows(self, namespace, &pipeline, doc! {"level": "majority"}, None).await?;
            winners.extend(found.iter().filter_map(|document| id_bytes(document)));
        }
        let is_valid = |(document, key): (&&RawDocument, &Option<Key>)| {
            key.is_none() || id_bytes(document).is_some_and(|id| winners.contains(&id))
        };
        Ok(documents.iter().zip(&keys).map(is_valid).collect())
    }

    /// The `_id` of one document for each group of a collection that has more, as a cursor.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide.
    pub async fn crowded(
        &self,
        namespace: &Namespace,
        grouping: &Grouping,
    ) -> mongodb::error::Result<mongodb::Cursor<RawDocumentBuf>> {
        let collection = self.collection(namespace);
        let cursor = collection.aggregate(grouping.crowded()).allow_disk_use(true).await?;
        Ok(cursor.with_type())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY_G: i32 = 1;
    const KEY_H: i32 = 2;

    fn key(value: i32) -> Key {
        Key(vec![value.into()])
    }

    fn look(documents: &[(i32, Option<i32>, Option<i32>, bool)]) -> Look {
        let mut look = Look::default();
        for (id, candidate, copy, wins) in documents {
            let raw = RawBson::Int32(*id);
            let bytes = value_bytes(raw.as_raw_bson_ref());
            let seen = look.see(&bytes, &raw);
            seen.candidate = candidate.map(|value| Some(key(value)));
            seen.copy = copy.map(|value| Some(key(value)));
            if *wins {
                look.winners.insert(bytes);
            }
        }
        look
    }

    #[test]
    fn notes_of_documents_are_told_from_notes_of_groups() {
        assert_eq!(noted_id(&id_note(&7.into())), Some(7.into()));
        assert_eq!(noted_id(&key(KEY_G).bytes()), None);
    }

    #[test]
    fn a_winner_without_a_copy_comes_before_any_removal() {
        let steps = look(&[(1, None, Some(KEY_G), false), (2, Some(KEY_G), None, true)]).steps();
        assert_eq!((steps.write_first, steps.remove), (vec![2.into()], vec![1.into()]));
        assert!(steps.note.is_empty() && steps.write.is_empty());
    }

    #[test]
    fn a_winner_that_comes_from_another_group_is_noted() {
        let steps = look(&[(1, Some(KEY_H), Some(KEY_G), true)]).steps();
        assert_eq!((steps.note, steps.write), (vec![key(KEY_H)], vec![1.into()]));
    }

    #[test]
    fn a_winner_that_nobody_touched_is_left_alone() {
        let mut look = look(&[(1, Some(KEY_G), Some(KEY_G), true), (2, Some(KEY_G), None, false)]);
        assert_eq!(look.steps(), Steps::default());
        look.touched.insert(value_bytes(RawBson::Int32(1).as_raw_bson_ref()));
        assert_eq!(look.steps().write, [RawBson::Int32(1)]);
    }

    #[test]
    fn equal_ids_of_different_bytes_are_removed_before_they_are_written() {
        let mut look = look(&[(1, None, Some(KEY_G), false), (2, Some(KEY_G), None, true)]);
        look.has_twins = true;
        look.keys.insert(key(KEY_G).bytes(), key(KEY_G));
        let steps = look.steps();
        assert!(steps.write_first.is_empty());
        assert_eq!((steps.note, steps.write), (vec![key(KEY_G)], vec![2.into()]));
    }
}
