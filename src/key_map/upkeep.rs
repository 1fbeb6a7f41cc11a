//! The key map as a whole: page by page, in figures, and forgotten.

use bson::{Bson, DateTime, Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use super::{Entry, KEYS_PER_QUERY, KeyMap, Remembered, StoredOutcome};
use crate::error::Result;
use crate::mongo::command::retrying;
use crate::mongo::index::whole_number;

/// Answers per page.
const PAGE: i64 = 5000;
/// New keys that are shown as standing for several legacy keys.
const EXAMPLES: i32 = 5;
/// Legacy keys that are shown for each.
const LEGACY_KEYS_SHOWN: i64 = 5;

/// Which answers are wanted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Selection {
    /// Of this kind only.
    pub outcome: Option<StoredOutcome>,
    /// Those that no guard has judged, too.
    pub with_held: bool,
}

impl Selection {
    fn filter(self) -> Document {
        let mut filter = Document::new();
        if let Some(outcome) = self.outcome {
            filter.insert("outcome", outcome.as_str());
        }
        if !self.with_held {
            filter.insert("held", doc! {"$ne": true});
        }
        filter
    }
}

/// The key map in figures.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figures {
    /// Answers by outcome.
    pub outcomes: Vec<(String, u64)>,
    /// Answers that no guard has judged yet.
    pub held: u64,
    /// Answers by the job that brought them, most first.
    pub jobs: Vec<(String, u64)>,
    /// When the first of them was given.
    pub oldest: Option<DateTime>,
    /// When the last of them was given.
    pub newest: Option<DateTime>,
    /// New keys that stand for more than one legacy key.
    pub shared: u64,
    /// Some of those, with how many legacy keys and some of these.
    pub examples: Vec<Shared>,
}

/// A new key that stands for more than one legacy key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shared {
    /// The new key.
    pub new_key: String,
    /// How many legacy keys it stands for.
    pub count: u64,
    /// Some of them.
    pub legacy_keys: Vec<String>,
}

impl Figures {
    /// All answers.
    pub fn total(&self) -> u64 {
        self.outcomes.iter().map(|(_, count)| count).sum()
    }
}

impl KeyMap {
    /// The selected answers after a legacy key, in the order of their bytes; an
    /// empty page is the end.
    ///
    /// # Errors
    /// A stop where the key map can't be read.
    pub async fn page(&self, after: Option<&str>, selection: Selection) -> Result<Vec<(String, Remembered)>> {
        let mut filter = selection.filter();
        if let Some(after) = after {
            filter.insert("_id", doc! {"$gt": after});
        }
        let entries: Vec<Entry> = retrying("reading the key map", || {
            let find = self.entries.find(filter.clone()).sort(doc! {"_id": 1}).limit(PAGE);
            async move { find.await?.try_collect().await }
        })
        .await?;
        Ok(entries.into_iter().filter_map(Entry::into_remembered).collect())
    }

    /// How many answers there are.
    ///
    /// # Errors
    /// A stop where the key map can't be read.
    pub async fn count(&self, selection: Selection) -> Result<u64> {
        let filter = selection.filter();
        retrying("counting the key map", || {
            let count = self.entries.count_documents(filter.clone());
            async move { count.await }
        })
        .await
    }

    /// Drops the whole key map.
    ///
    /// # Errors
    /// A stop where it can't be dropped.
    pub async fn drop_all(&self) -> Result<()> {
        retrying("dropping the key map", || {
            let drop = self.entries.drop();
            async move { drop.await }
        })
        .await
    }

    /// Forgets the answers of one kind to these legacy keys, whoever was told;
    /// says how many.
    ///
    /// # Errors
    /// A stop where the key map can't be written.
    pub async fn forget(&self, keys: &[&str], outcome: StoredOutcome) -> Result<u64> {
        let mut forgotten = 0;
        for keys in keys.chunks(KEYS_PER_QUERY) {
            let filter = doc! {"_id": {"$in": keys.to_vec()}, "outcome": outcome.as_str()};
            let deleted = retrying("forgetting answers of the key map", || {
                let delete = self.entries.delete_many(filter.clone());
                async move { delete.await }
            })
            .await?;
            forgotten += deleted.deleted_count;
        }
        Ok(forgotten)
    }

    /// The figures of the whole map. It is read three times.
    ///
    /// # Errors
    /// A stop where the key map can't be read.
    pub async fn figures(&self) -> Result<Figures> {
        let is_held = doc! {"$cond": [{"$eq": ["$held", true]}, 1, 0]};
        let groups = self
            .aggregate(vec![doc! {"$group": {
                "_id": {"outcome": "$outcome", "job": "$job"},
                "n": {"$sum": 1},
                "held": {"$sum": is_held},
                "oldest": {"$min": "$at"},
                "newest": {"$max": "$at"},
            }}])
            .await?;
        let mut figures = Figures::default();
        for group in &groups {
            figures.add(group);
        }
        figures.jobs.sort_by(|one, other| other.1.cmp(&one.1).then_with(|| one.0.cmp(&other.0)));
        figures.outcomes.sort();
        self.add_shared(&mut figures).await?;
        Ok(figures)
    }

    async fn add_shared(&self, figures: &mut Figures) -> Result<()> {
        let shared = [
            doc! {"$match": {"outcome": "found"}},
            doc! {"$group": {"_id": "$newKey", "n": {"$sum": 1}}},
            doc! {"$match": {"n": {"$gt": 1}}},
        ];
        let mut pipeline = shared.to_vec();
        pipeline.push(doc! {"$facet": {
            "count": [{"$count": "n"}],
            "examples": [{"$sort": {"n": -1, "_id": 1}}, {"$limit": EXAMPLES}],
        }});
        let found = self.aggregate(pipeline).await?;
        let Some(found) = found.first() else { return Ok(()) };
        let documents = |name: &str| {
            found.get_array(name).into_iter().flatten().filter_map(Bson::as_document).collect::<Vec<_>>()
        };
        figures.shared = documents("count").first().map_or(0, |counted| count(counted));
        for example in documents("examples") {
            let new_key = example.get_str("_id").unwrap_or_default().to_owned();
            let legacy_keys = self
                .aggregate(vec![
                    doc! {"$match": {"outcome": "found", "newKey": &new_key}},
                    doc! {"$limit": LEGACY_KEYS_SHOWN},
                    doc! {"$project": {"_id": 1}},
                ])
                .await?;
            let legacy_keys =
                legacy_keys.iter().filter_map(|entry| entry.get_str("_id").ok()).map(Into::into).collect();
            figures.examples.push(Shared { new_key, count: count(example), legacy_keys });
        }
        Ok(())
    }

    async fn aggregate(&self, pipeline: Vec<Document>) -> Result<Vec<Document>> {
        let entries: Collection<Document> = self.entries.clone_with_type();
        retrying("reading the key map", || {
            let cursor = entries.aggregate(pipeline.clone()).allow_disk_use(true);
            async move { cursor.await?.try_collect().await }
        })
        .await
    }
}

impl Figures {
    fn add(&mut self, group: &Document) {
        let by = group.get_document("_id").cloned().unwrap_or_default();
        let word = |name: &str| by.get_str(name).unwrap_or("unknown").to_owned();
        let counted = count(group);
        for (figures, name) in [(&mut self.outcomes, word("outcome")), (&mut self.jobs, word("job"))] {
            match figures.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum += counted,
                None => figures.push((name, counted)),
            }
        }
        self.held += group.get("held").and_then(whole_number).unwrap_or(0);
        let at = |name: &str| group.get_datetime(name).ok().copied();
        self.oldest = self.oldest.into_iter().chain(at("oldest")).min();
        self.newest = self.newest.into_iter().chain(at("newest")).max();
    }
}

fn count(document: &Document) -> u64 {
    document.get("n").and_then(whole_number).unwrap_or(0)
}
