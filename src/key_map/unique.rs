//! One new key for one legacy key, where the config asks for it.
//!
//! A unique index decides, because no program can: several processes may learn
//! of the same new key at the same moment. The answer that came first stands,
//! the others are conflicts and are not stored, so they are asked again.

use std::collections::HashMap;

use bson::{Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use super::{Answer, Entry, KeyMap, Remembered};
use crate::error::{Error, Result};
use crate::job::store;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;

/// Name of the index.
const INDEX: &str = "mongorekey_unique_new_key";
/// Conflicts whose owner vanished before it was seen are inserted again.
const ROUNDS: usize = 5;

/// An answer that is not stored, because its new key stands for another legacy
/// key already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The legacy key that was asked for.
    pub legacy_key: String,
    /// The new key that was answered.
    pub new_key: String,
    /// The legacy key that has it.
    pub owner: String,
}

impl KeyMap {
    /// Makes the map as the config wants it: with or without the unique index.
    /// To be called once, before anything is remembered.
    ///
    /// # Errors
    /// A refusal where a new key stands for several legacy keys already, or another
    /// job relies on that none does; a stop where the index can't be built or dropped.
    pub async fn prepare(&self, mongo: &Mongo) -> Result<()> {
        let stored = mongo.describe(&self.namespace()).await?;
        let exists = stored.is_some_and(|map| map.index(INDEX).is_some());
        match (self.unique, exists) {
            (true, false) => self.build_index(mongo).await,
            (false, true) => {
                self.check_unused(mongo).await?;
                let entries = &self.entries;
                retrying("dropping an index of the key map", || {
                    let drop = entries.drop_index(INDEX);
                    async move { drop.await }
                })
                .await
            }
            _ => Ok(()),
        }
    }

    /// Makes sure that no other job fills the map by the rule that is to end.
    async fn check_unused(&self, mongo: &Mongo) -> Result<()> {
        let jobs = store::list(mongo, None).await?;
        let is_other = |job: &Document| job.get_str("_id").is_ok_and(|name| name != self.job);
        let running = jobs.iter().find(|job| is_other(job) && store::calls(job, &self.api));
        let Some(running) = running else { return Ok(()) };
        Err(Error::refused(format!(
            "the job {} is being run, and in its config a new key may stand for one legacy key only",
            running.get_str("_id").unwrap_or_default()
        ))
        .hint("set `key_api.unique_keys` here too, or wait for the end of that job"))
    }

    async fn build_index(&self, mongo: &Mongo) -> Result<()> {
        let index = doc! {
            "name": INDEX,
            "key": {"newKey": 1},
            "unique": true,
            "partialFilterExpression": {"outcome": "found"},
        };
        let built = mongo.build_indexes(&self.namespace(), vec![index], |_| ()).await;
        let Err(error) = built else { return Ok(()) };
        let figures = self.figures().await?;
        let Some(shared) = figures.examples.first() else { return Err(error) };
        Err(Error::refused(format!(
            "{} new keys of the key map stand for more than one legacy key, such as {} for {}",
            figures.shared,
            shared.new_key,
            shared.legacy_keys.join(", ")
        ))
        .hint("`mongorekey key-map stats` shows some; clear them up, or set `key_api.unique_keys = false`"))
    }

    /// The legacy keys that have these new keys.
    pub(super) async fn owners(&self, new_keys: &[&str]) -> Result<HashMap<String, String>> {
        if new_keys.is_empty() {
            return Ok(HashMap::new());
        }
        let filter = doc! {"outcome": "found", "newKey": {"$in": new_keys.to_vec()}};
        let entries: Collection<Document> = self.entries.clone_with_type();
        let found: Vec<Document> = retrying("reading the key map", || {
            let find = entries.find(filter.clone()).projection(doc! {"newKey": 1});
            async move { find.await?.try_collect().await }
        })
        .await?;
        let text = |entry: &Document, name: &str| entry.get_str(name).ok().map(str::to_owned);
        Ok(found.iter().filter_map(|entry| Some((text(entry, "newKey")?, text(entry, "_id")?))).collect())
    }

    /// Inserts what the unique index allows; says what it does not.
    pub(super) async fn remember_unique(&self, answers: &[(String, Remembered)]) -> Result<Vec<Conflict>> {
        let mut open: Vec<&(String, Remembered)> = answers.iter().collect();
        let mut conflicts = Vec::new();
        for _ in 0..ROUNDS {
            if open.is_empty() || self.insert(open.iter().copied()).await? {
                return Ok(conflicts);
            }
            // Refused for its legacy key, which is known then, or for its new key.
            let keys: Vec<&str> = open.iter().map(|(key, _)| key.as_str()).collect();
            let known: HashMap<String, Entry> = self
                .entries_of(&keys)
                .await?
                .into_iter()
                .map(|entry| (entry.legacy_key.clone(), entry))
                .collect();
            open.retain(|(key, _)| !known.contains_key(key));
            let new_keys: Vec<&str> = open.iter().filter_map(|(_, answer)| answer.answer.new_key()).collect();
            let owners = self.owners(&new_keys).await?;
            open.retain(|(key, remembered)| match &remembered.answer {
                Answer::Found(new_key) => match owners.get(new_key) {
                    Some(owner) => {
                        conflicts.push(Conflict {
                            legacy_key: key.clone(),
                            new_key: new_key.clone(),
                            owner: owner.clone(),
                        });
                        false
                    }
                    None => true,
                },
                Answer::NotFound | Answer::Rejected => true,
            });
        }
        if open.is_empty() {
            return Ok(conflicts);
        }
        Err(Error::stopped("the key map changes faster than answers can be remembered")
            .hint("is somebody deleting from it? Started again, the job goes on from here"))
    }
}
