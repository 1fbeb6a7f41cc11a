//! Takes the records of a dump into the key map.
//!
//! What is known stays. A record that says something else than the map, or than
//! an earlier line of its file, is a conflict: one of the two is wrong, and no
//! program can tell which.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};

use bson::oid::ObjectId;
use bson::{Bson, DateTime, Document, doc};

use super::dump::Record;
use super::{Answer, DUPLICATE_KEY, Entry, KeyMap, Origin, Remembered};
use crate::error::{Error, Result};
use crate::mongo::command::retrying;
use crate::mongo::index::whole_number;
use crate::mongo::{majority_document, sink};

/// Records that somebody else writes at the same moment are looked up again.
const ROUNDS: usize = 5;
/// Records of one file that a dry run tells apart, in about 36 MB.
const MOST_SEEN: usize = 1_800_000;

/// How an import deals with what it finds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Manner {
    /// Check only, write nothing.
    pub dry_run: bool,
    /// A known different answer is replaced.
    pub replace: bool,
}

/// A record with its line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Numbered {
    /// The line of the file it begins at.
    pub line: u64,
    /// The record.
    pub record: Record,
}

/// What became of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// The map has it now, and had nothing.
    Imported,
    /// The map had just that.
    Known,
    /// The map has it now, and had something else.
    Replaced,
    /// An earlier line of the file says something else.
    Contradicted(String),
    /// The map says something else.
    Conflict(String),
    /// The new key stands for another legacy key, which must not be.
    Shared(String),
}

impl Fate {
    /// What becomes of the same record once more.
    fn repeated(self) -> Self {
        match self {
            Self::Imported | Self::Known | Self::Replaced => Self::Known,
            refused => refused,
        }
    }
}

/// How the records of a batch relate to earlier lines.
#[derive(Debug, Default)]
struct Within {
    /// What is settled already.
    fates: Vec<Option<Fate>>,
    /// Records that are the same as an earlier one of the batch.
    repeats: HashMap<usize, usize>,
    /// Records that are the same as one of an earlier batch.
    again: Vec<usize>,
}

/// An import under way.
#[derive(Debug)]
pub struct Import {
    key_map: KeyMap,
    manner: Manner,
    run: ObjectId,
    seen: Seen,
}

/// What is to be done about a record. Pure.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Insert,
    /// Replace the entry, or take it over where it says the same.
    Update(Fate),
    Settled(Fate),
}

impl Import {
    /// An import into a key map.
    pub fn new(key_map: KeyMap, manner: Manner) -> Self {
        Self { key_map, manner, run: ObjectId::new(), seen: Seen::default() }
    }

    /// Whether the file is longer than a dry run can compare with itself.
    pub fn has_lost_track(&self) -> bool {
        self.seen.is_full
    }

    /// Takes in records; one fate per record, in their order.
    ///
    /// # Errors
    /// A stop where the key map can't be read or written.
    pub async fn take(&mut self, records: &[Numbered]) -> Result<Vec<Fate>> {
        let Within { mut fates, repeats, again } = self.compare_within(records);
        for _ in 0..ROUNDS {
            let is_open = |index: &usize| fates[*index].is_none() && !repeats.contains_key(index);
            let open: Vec<usize> = (0..records.len()).filter(is_open).collect();
            if open.is_empty() {
                break;
            }
            self.round(records, &open, &mut fates).await?;
        }
        for index in again {
            fates[index] = fates[index].take().map(Fate::repeated);
        }
        for (later, earlier) in repeats {
            fates[later] = fates[earlier].clone().map(Fate::repeated);
        }
        if fates.iter().any(Option::is_none) {
            return Err(Error::stopped("the key map changes faster than it can be imported into")
                .hint("import again when nothing else writes to it"));
        }
        Ok(fates.into_iter().flatten().collect())
    }

    async fn round(&self, records: &[Numbered], open: &[usize], fates: &mut [Option<Fate>]) -> Result<()> {
        let keys: Vec<&str> = open.iter().map(|index| records[*index].record.legacy_key.as_str()).collect();
        let known: HashMap<String, Entry> = self
            .key_map
            .entries_of(&keys)
            .await?
            .into_iter()
            .map(|entry| (entry.legacy_key.clone(), entry))
            .collect();
        let owners = self.owners(records, open).await?;
        let (mut inserts, mut updates) = (Vec::new(), Vec::new());
        for index in open {
            let record = &records[*index];
            if let Some(fate) = shared(&record.record, &owners) {
                fates[*index] = Some(fate);
                continue;
            }
            match step(record, known.get(&record.record.legacy_key), self.run, self.manner.replace) {
                Step::Settled(fate) => fates[*index] = Some(fate),
                Step::Insert if self.manner.dry_run => fates[*index] = Some(Fate::Imported),
                Step::Update(fate) if self.manner.dry_run => fates[*index] = Some(fate),
                Step::Insert => inserts.push(*index),
                Step::Update(fate) => updates.push((*index, fate)),
            }
        }
        // A new key that somebody else has by now is seen in the next round.
        let refused = self.update(records, &updates).await?;
        for (position, (index, fate)) in updates.into_iter().enumerate() {
            if !refused.contains(&position) {
                fates[index] = Some(fate);
            }
        }
        if self.insert(records, &inserts).await? {
            inserts.iter().for_each(|index| fates[*index] = Some(Fate::Imported));
        }
        Ok(())
    }

    /// Who has the new keys of these records, where no two may share one.
    async fn owners(&self, records: &[Numbered], open: &[usize]) -> Result<HashMap<String, String>> {
        if !self.key_map.unique {
            return Ok(HashMap::new());
        }
        let new_keys: Vec<&str> =
            open.iter().filter_map(|index| records[*index].record.answer.new_key()).collect();
        self.key_map.owners(&new_keys).await
    }

    /// Finds records that repeat or contradict an earlier line.
    fn compare_within(&mut self, records: &[Numbered]) -> Within {
        let mut first: HashMap<&str, usize> = HashMap::new();
        let mut within = Within { fates: vec![None; records.len()], ..Within::default() };
        for (index, Numbered { record, .. }) in records.iter().enumerate() {
            match first.get(record.legacy_key.as_str()) {
                Some(earlier) if records[*earlier].record.answer == record.answer => {
                    within.repeats.insert(index, *earlier);
                }
                Some(earlier) => within.fates[index] = Some(contradicted(Some(records[*earlier].line))),
                None => {
                    first.insert(&record.legacy_key, index);
                    match self.manner.dry_run.then(|| self.seen.compare(record, self.key_map.unique)) {
                        None | Some(Earlier::Nothing) => {}
                        Some(Earlier::Same) => within.again.push(index),
                        Some(Earlier::Other(fate)) => within.fates[index] = Some(fate),
                    }
                }
            }
        }
        within
    }

    /// Inserts; false where some of them were there already.
    async fn insert(&self, records: &[Numbered], inserts: &[usize]) -> Result<bool> {
        if inserts.is_empty() {
            return Ok(true);
        }
        let now = DateTime::now();
        let entries: Vec<Entry> = inserts.iter().map(|index| self.entry(&records[*index], now)).collect();
        self.key_map.insert_entries(&entries).await
    }

    /// Replaces or marks entries; gives back the positions of those that were
    /// refused for a new key that is not unique.
    async fn update(&self, records: &[Numbered], updates: &[(usize, Fate)]) -> Result<Vec<usize>> {
        if updates.is_empty() {
            return Ok(Vec::new());
        }
        let now = DateTime::now();
        let statements: Vec<Document> = updates
            .iter()
            .map(|(index, fate)| self.statement(self.entry(&records[*index], now), fate))
            .collect();
        let command = doc! {
            "update": self.key_map.entries.name(),
            "updates": statements,
            "ordered": false,
            "writeConcern": majority_document(),
        };
        let database = self.key_map.entries.client().database(&self.key_map.entries.namespace().db);
        let reply = retrying("replacing answers of the key map", || {
            let database = database.clone();
            let command = command.clone();
            async move {
                let reply = database.run_command(command).await?;
                sink::check_write_concern(&reply)?;
                Ok(reply)
            }
        })
        .await?;
        let errors = reply.get_array("writeErrors").map(Vec::as_slice).unwrap_or_default();
        errors
            .iter()
            .filter_map(Bson::as_document)
            .map(|error| match (error.get_i32("code"), error.get("index").and_then(whole_number)) {
                (Ok(DUPLICATE_KEY), Some(index)) => Ok(usize::try_from(index).unwrap_or(usize::MAX)),
                _ => Err(Error::stopped(format!("an answer of the key map could not be replaced: {error}"))),
            })
            .collect()
    }

    /// An entry that says the same is only marked, so that a later line which
    /// contradicts this one is seen.
    fn statement(&self, entry: Entry, fate: &Fate) -> Document {
        let origin =
            entry.import.map_or_else(Document::new, |origin| doc! {"run": origin.run, "line": origin.line});
        let mut set = doc! {"import": origin};
        let mut update = Document::new();
        if *fate == Fate::Replaced {
            set.extend(doc! {"outcome": entry.outcome.as_str(), "at": entry.at, "job": entry.job});
            let mut unset = doc! {"held": ""};
            match entry.new_key {
                Some(key) => drop(set.insert("newKey", key)),
                None => drop(unset.insert("newKey", "")),
            }
            update.insert("$unset", unset);
        }
        update.insert("$set", set);
        doc! {"q": {"_id": entry.legacy_key}, "u": update, "upsert": *fate == Fate::Replaced}
    }

    fn entry(&self, record: &Numbered, at: DateTime) -> Entry {
        let known = Remembered { answer: record.record.answer.clone(), held: false };
        let line = i64::try_from(record.line).unwrap_or(i64::MAX);
        let import = Some(Origin { run: self.run, line });
        Entry { import, ..self.key_map.entry(&record.record.legacy_key, &known, at) }
    }
}

/// Decides what to do about a record that the map knows as `entry`.
fn step(record: &Numbered, entry: Option<&Entry>, run: ObjectId, replace: bool) -> Step {
    let Some(entry) = entry else { return Step::Insert };
    let ours = entry.import.filter(|origin| origin.run == run);
    let line = i64::try_from(record.line).unwrap_or(i64::MAX);
    let same = entry.outcome == record.record.answer.outcome()
        && entry.new_key.as_deref() == record.record.answer.new_key();
    match (same, ours) {
        // Our own insert, whose reply was lost or told of others.
        (true, Some(origin)) if origin.line == line => Step::Settled(Fate::Imported),
        (true, None) if replace => Step::Update(Fate::Known),
        (true, _) => Step::Settled(Fate::Known),
        (false, Some(origin)) => Step::Settled(contradicted(Some(origin.line.unsigned_abs()))),
        (false, None) if replace => Step::Update(Fate::Replaced),
        (false, None) => Step::Settled(Fate::Conflict(format!(
            "the key map knows {}{}, by {}",
            said(entry),
            if entry.held { " (held)" } else { "" },
            entry.job
        ))),
    }
}

/// Whether another legacy key has the new key of a record. Pure.
fn shared(record: &Record, owners: &HashMap<String, String>) -> Option<Fate> {
    let owner = owners.get(record.answer.new_key()?)?;
    (*owner != record.legacy_key)
        .then(|| Fate::Shared(format!("the new key stands for the legacy key {owner:?} already")))
}

fn said(entry: &Entry) -> String {
    match &entry.new_key {
        Some(key) => format!("the new key {key:?}"),
        None => format!("the outcome {}", entry.outcome.as_str()),
    }
}

fn contradicted(line: Option<u64>) -> Fate {
    let earlier = line.map_or("an earlier line".into(), |line| format!("line {line}"));
    Fate::Contradicted(format!("{earlier} has the same legacy key and another answer"))
}

/// The records of a file as hashes, for a dry run, which leaves no trace in the
/// map that it could compare with.
#[derive(Debug, Default)]
struct Seen {
    hasher: RandomState,
    answers: HashMap<u64, u64>,
    /// The new keys with their legacy keys, where no two may share one.
    owners: HashMap<u64, u64>,
    is_full: bool,
}

/// What earlier batches of a file say about a record.
enum Earlier {
    Nothing,
    Same,
    Other(Fate),
}

impl Seen {
    fn compare(&mut self, record: &Record, unique: bool) -> Earlier {
        let key = self.hasher.hash_one(&record.legacy_key);
        let answer = self.hasher.hash_one((record.answer.outcome().as_str(), record.answer.new_key()));
        match self.answers.get(&key) {
            Some(earlier) if *earlier == answer => return Earlier::Same,
            Some(_) => return Earlier::Other(contradicted(None)),
            None => {}
        }
        if self.answers.len() + self.owners.len() >= MOST_SEEN {
            self.is_full = true;
            return Earlier::Nothing;
        }
        if let (true, Answer::Found(_)) = (unique, &record.answer) {
            if self.owners.get(&answer).is_some_and(|owner| *owner != key) {
                let message = "an earlier line has the same new key for another legacy key";
                return Earlier::Other(Fate::Shared(message.into()));
            }
            self.owners.insert(answer, key);
        }
        self.answers.insert(key, answer);
        Earlier::Nothing
    }
}
