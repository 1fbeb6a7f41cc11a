//! The list of documents that failed, kept for operators: `status --failed`.
//!
//! The list is a help, not a record: the documents themselves still are
//! candidates, and the next run tries them whatever stands here.

use bson::{Bson, DateTime, Document, doc};
use futures_util::TryStreamExt;
use mongodb::{Collection, IndexModel};

use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::source::Candidate;

/// The collection in the state database.
const COLLECTION: &str = "failures";
/// So many failures of a run are listed; beyond that the counts tell enough.
const MOST: u64 = 100_000;

/// Characters of a legacy key that are listed: it may be megabytes long.
const MOST_SHOWN: usize = 1000;

/// Keeps the list of a job's failures.
#[derive(Debug)]
pub struct Failures {
    collection: Collection<Document>,
    job: String,
    run: i64,
    worker: String,
    pending: Vec<Document>,
    listed: u64,
    is_indexed: bool,
}

impl Failures {
    /// The list of a job, for a worker of a run.
    pub fn new(mongo: &Mongo, job: &str, run: i64, worker: &str) -> Self {
        Self {
            collection: mongo.state(COLLECTION),
            job: job.into(),
            run,
            worker: worker.into(),
            pending: Vec::new(),
            listed: 0,
            is_indexed: false,
        }
    }

    /// Takes note of a failure; stored by the next [`Failures::flush`].
    pub fn record(&mut self, collection: &str, candidate: &Candidate, reason: &str, description: &str) {
        if self.listed >= MOST {
            return;
        }
        self.listed += 1;
        self.pending.push(doc! {
            "job": &self.job,
            "run": self.run,
            "worker": &self.worker,
            "collection": collection,
            "document": Bson::try_from(candidate.id.clone()).unwrap_or(Bson::Null),
            "legacy_key": candidate.legacy.text().map(|text| text.chars().take(MOST_SHOWN).collect::<String>()),
            "reason": reason,
            "description": description,
            "at": DateTime::now(),
        });
    }

    /// Stores what was recorded.
    ///
    /// # Errors
    /// A stop where the list can't be written.
    pub async fn flush(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        if !self.is_indexed {
            let index = IndexModel::builder().keys(doc! {"job": 1, "run": 1}).build();
            retrying("indexing the list of failures", || {
                let create = self.collection.create_index(index.clone());
                async move { create.await }
            })
            .await?;
            self.is_indexed = true;
        }
        let pending = std::mem::take(&mut self.pending);
        // Sent again after a lost answer, entries may be listed twice.
        retrying("listing failures", || {
            let insert = self.collection.insert_many(&pending).ordered(false);
            async move { insert.await }
        })
        .await
        .map(|_| ())
    }

    /// Strikes the failures of this worker in a collection off: their documents are
    /// tried again.
    ///
    /// # Errors
    /// A stop where the list can't be written.
    pub async fn forget(&mut self, collection: &str) -> Result<()> {
        let is_of = |failure: &Document| failure.get_str("collection").is_ok_and(|known| known == collection);
        let before = self.pending.len();
        self.pending.retain(|failure| !is_of(failure));
        self.listed -= (before - self.pending.len()) as u64;
        if self.listed == 0 {
            return Ok(());
        }
        let theirs =
            doc! {"job": &self.job, "run": self.run, "worker": &self.worker, "collection": collection};
        let deleted = self.delete(theirs).await?;
        self.listed = self.listed.saturating_sub(deleted);
        Ok(())
    }

    /// Strikes the failures of earlier runs off, once this one has tried all
    /// documents.
    ///
    /// # Errors
    /// A stop where the list can't be written.
    pub async fn forget_earlier(&self) -> Result<()> {
        self.delete(doc! {"job": &self.job, "run": {"$ne": self.run}}).await.map(|_| ())
    }

    async fn delete(&self, filter: Document) -> Result<u64> {
        retrying("clearing the list of failures", || {
            let delete = self.collection.delete_many(filter.clone());
            async move { delete.await }
        })
        .await
        .map(|deleted| deleted.deleted_count)
    }
}

/// The failures of a job, in the order in which they happened: handed over one
/// by one, because there may be many; says how many there were.
///
/// # Errors
/// A stop where they can't be read, and whatever `each` fails with.
pub async fn list(mongo: &Mongo, job: &str, mut each: impl FnMut(Document) -> Result<()>) -> Result<u64> {
    let collection: Collection<Document> = mongo.state(COLLECTION);
    let failed = |error: mongodb::error::Error| {
        Error::stopped(format!("the failures can't be read: {}", crate::error::describe_mongo(&error)))
    };
    let find = collection.find(doc! {"job": job}).projection(doc! {"_id": 0, "run": 0, "worker": 0});
    let mut cursor = find.sort(doc! {"_id": 1}).await.map_err(failed)?;
    let mut count = 0;
    while let Some(failure) = cursor.try_next().await.map_err(failed)? {
        each(failure)?;
        count += 1;
    }
    Ok(count)
}
