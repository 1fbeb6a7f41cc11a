//! The key map: every answer of the key API, remembered.
//!
//! One document per legacy key, written before any document that uses the
//! answer. It makes one call per distinct key true over documents, targets and
//! restarts. Answers that would lead to flags are *held* until the guard has
//! judged enough of them; a guard that stops the job forgets them again.
//!
//! [`dump`] reads and writes files of keys, [`import`] takes them in, [`unique`]
//! sees to it that no two legacy keys share a new one, [`upkeep`] looks at the
//! whole map.

pub mod dump;
pub mod import;
pub mod unique;
pub mod upkeep;

use std::collections::HashMap;

use bson::oid::ObjectId;
use bson::{DateTime, Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;
use mongodb::error::{Error as DriverError, ErrorKind};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::unique::Conflict;
use crate::config::file::{KeyApi, Method};
use crate::config::template;
use crate::config::values::Namespace;
use crate::error::Result;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::sink::{FlagReason, Write};

/// Keys per query.
const KEYS_PER_QUERY: usize = 1000;
/// A guard looks at so many answers.
const MOST_BESIDE_HELD: u64 = 1000;
/// The server's code for a duplicate key.
const DUPLICATE_KEY: i32 = 11000;

/// A final answer of the key API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The new key.
    Found(String),
    /// There is none.
    NotFound,
    /// The legacy key is malformed.
    Rejected,
}

impl Answer {
    /// Whether it leads to a flag.
    pub fn is_negative(&self) -> bool {
        !matches!(self, Self::Found(_))
    }

    /// Its kind.
    pub fn outcome(&self) -> StoredOutcome {
        match self {
            Self::Found(_) => StoredOutcome::Found,
            Self::NotFound => StoredOutcome::NotFound,
            Self::Rejected => StoredOutcome::Rejected,
        }
    }

    /// The new key, where there is one.
    pub fn new_key(&self) -> Option<&str> {
        match self {
            Self::Found(key) => Some(key),
            Self::NotFound | Self::Rejected => None,
        }
    }

    /// What documents with that legacy key receive.
    pub fn write(&self) -> Write {
        match self {
            Self::Found(key) => Write::Key(key.clone()),
            Self::NotFound => Write::Flag(FlagReason::NotFound),
            Self::Rejected => Write::Flag(FlagReason::Rejected),
        }
    }
}

/// An answer with what the guard thinks of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remembered {
    /// The answer.
    pub answer: Answer,
    /// Not yet judged by the guard.
    pub held: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    #[serde(rename = "_id")]
    legacy_key: String,
    outcome: StoredOutcome,
    #[serde(rename = "newKey", skip_serializing_if = "Option::is_none")]
    new_key: Option<String>,
    at: DateTime,
    job: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    held: bool,
    /// Where an imported answer comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    import: Option<Origin>,
}

/// The place of an imported answer: which import, which line of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Origin {
    run: ObjectId,
    line: i64,
}

/// The kind of an answer, as it is stored and as dumps spell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum StoredOutcome {
    /// There is a new key.
    Found,
    /// There is none.
    NotFound,
    /// The legacy key is malformed.
    Rejected,
}

impl StoredOutcome {
    /// The word that is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::NotFound => "not_found",
            Self::Rejected => "rejected",
        }
    }
}

/// The answers of one API.
#[derive(Debug, Clone)]
pub struct KeyMap {
    entries: Collection<Entry>,
    job: String,
    /// The API, as jobs tell it.
    api: String,
    /// Whether one new key for two legacy keys is an error.
    unique: bool,
}

impl KeyMap {
    /// The key map of an API, used by a job.
    pub fn open(mongo: &Mongo, api: &KeyApi, job: &str) -> Self {
        Self {
            entries: mongo.state(&collection_name(api)),
            job: job.into(),
            api: shown_api(api),
            unique: api.unique_keys,
        }
    }

    /// What is known about these keys.
    ///
    /// # Errors
    /// A stop where the key map can't be read.
    pub async fn look_up(&self, keys: &[&str]) -> Result<HashMap<String, Remembered>> {
        let mut known = HashMap::new();
        for keys in keys.chunks(KEYS_PER_QUERY) {
            known.extend(self.entries_of(keys).await?.into_iter().filter_map(Entry::into_remembered));
        }
        Ok(known)
    }

    async fn entries_of(&self, keys: &[&str]) -> Result<Vec<Entry>> {
        let filter = doc! {"_id": {"$in": keys.to_vec()}};
        retrying("reading the key map", || {
            let find = self.entries.find(filter.clone());
            async move { find.await?.try_collect().await }
        })
        .await
    }

    /// Remembers answers, durable on a majority. What is known already stays.
    /// Gives back the answers that are not remembered because their new key
    /// stands for another legacy key; there are none unless `unique_keys` is set
    /// and the map was [prepared](Self::prepare).
    ///
    /// # Errors
    /// A stop where the key map can't be written.
    pub async fn remember(&self, answers: &[(String, Remembered)]) -> Result<Vec<Conflict>> {
        if answers.is_empty() {
            return Ok(Vec::new());
        }
        if self.unique {
            return self.remember_unique(answers).await;
        }
        self.insert(answers.iter()).await.map(|_| Vec::new())
    }

    /// Inserts answers; false where some of them were refused as duplicates.
    async fn insert(&self, answers: impl Iterator<Item = &(String, Remembered)>) -> Result<bool> {
        let now = DateTime::now();
        let entries: Vec<Entry> = answers.map(|(key, remembered)| self.entry(key, remembered, now)).collect();
        self.insert_entries(&entries).await
    }

    async fn insert_entries(&self, entries: &[Entry]) -> Result<bool> {
        retrying("writing the key map", || {
            let insert = self.entries.insert_many(entries).ordered(false);
            async move {
                match insert.await {
                    Err(error) if only_duplicates(&error) => Ok(false),
                    result => result.map(|_| true),
                }
            }
        })
        .await
    }

    /// Keys that this job found since the oldest of its answers that is still
    /// held, as far as a guard can count them.
    ///
    /// # Errors
    /// A stop where the key map can't be read.
    pub async fn found_beside_held(&self) -> Result<u64> {
        let held = doc! {"held": true, "job": &self.job};
        let oldest = retrying("looking for held answers in the key map", || {
            let find = self.entries.find_one(held.clone()).sort(doc! {"at": 1});
            async move { find.await }
        })
        .await?;
        let Some(oldest) = oldest else { return Ok(0) };
        let found = doc! {"job": &self.job, "outcome": "found", "at": {"$gte": oldest.at}};
        retrying("counting answers beside the held ones", || {
            let count = self.entries.count_documents(found.clone()).limit(MOST_BESIDE_HELD);
            async move { count.await }
        })
        .await
    }

    /// Makes the held answers of this job count.
    ///
    /// # Errors
    /// A stop where the key map can't be written.
    pub async fn release_held(&self) -> Result<()> {
        let filter = doc! {"held": true, "job": &self.job};
        retrying("releasing held answers of the key map", || {
            let update = self.entries.update_many(filter.clone(), doc! {"$unset": {"held": ""}});
            async move { update.await }
        })
        .await
        .map(|_| ())
    }

    /// Forgets the negative answers of this job that are held or not older
    /// than `since`; says how many.
    ///
    /// # Errors
    /// A stop where the key map can't be written.
    pub async fn forget_negatives(&self, since: DateTime) -> Result<u64> {
        let filter: Document = doc! {
            "job": &self.job,
            "outcome": {"$ne": "found"},
            "$or": [{"held": true}, {"at": {"$gte": since}}],
        };
        let deleted = retrying("forgetting distrusted answers of the key map", || {
            let delete = self.entries.delete_many(filter.clone());
            async move { delete.await }
        })
        .await?;
        Ok(deleted.deleted_count)
    }

    fn entry(&self, key: &str, remembered: &Remembered, at: DateTime) -> Entry {
        Entry {
            legacy_key: key.into(),
            outcome: remembered.answer.outcome(),
            new_key: remembered.answer.new_key().map(Into::into),
            at,
            job: self.job.clone(),
            held: remembered.held,
            import: None,
        }
    }

    /// The collection that holds the answers.
    pub fn namespace(&self) -> Namespace {
        let namespace = self.entries.namespace();
        Namespace { database: namespace.db, collection: namespace.coll }
    }

    /// Name of the collection in the state database.
    pub fn collection_name(&self) -> &str {
        self.entries.name()
    }
}

impl Entry {
    fn into_remembered(self) -> Option<(String, Remembered)> {
        let answer = match self.outcome {
            StoredOutcome::Found => Answer::Found(self.new_key?),
            StoredOutcome::NotFound => Answer::NotFound,
            StoredOutcome::Rejected => Answer::Rejected,
        };
        Some((self.legacy_key, Remembered { answer, held: self.held }))
    }
}

/// One collection per API: the answers of another API mean nothing here.
fn collection_name(api: &KeyApi) -> String {
    format!("key_map_{}", &fingerprint(api)[..8])
}

/// Identifies an API by what determines its answers; tokens may change.
pub fn fingerprint(api: &KeyApi) -> String {
    let mut digest = Sha256::new();
    let method = match api.method {
        Method::Get => "GET",
        Method::Post => "POST",
    };
    for part in [method, &api.url, api.body.as_deref().unwrap_or_default(), api.key_pointer.as_str()] {
        digest.update(part.as_bytes());
        digest.update([0]);
    }
    if let Some(batch) = &api.batch {
        digest.update(batch.body.as_bytes());
        digest.update([0]);
        digest.update(batch.items_pointer.as_str().as_bytes());
    }
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The API for people and for a job's identity: no query, which may hold a token.
pub fn shown_api(api: &KeyApi) -> String {
    format!("{} ({})", template::shown(&api.url), &fingerprint(api)[..8])
}

fn only_duplicates(error: &DriverError) -> bool {
    match error.kind.as_ref() {
        ErrorKind::InsertMany(failure) => {
            failure.write_concern_error.is_none()
                && failure
                    .write_errors
                    .as_ref()
                    .is_some_and(|errors| errors.iter().all(|error| error.code == DUPLICATE_KEY))
        }
        _ => false,
    }
}
