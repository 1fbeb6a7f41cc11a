//! Documents of the source that were touched while the copy runs, remembered
//! until the copy is done and they can be looked at again.
//!
//! A mark has a generation, another one each time it is set, so that a removal that
//! was meant for an earlier one does nothing, however late it arrives.

use bson::{Bson, Document, RawBson, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::notes;

/// The collection of marks in the state database.
const COLLECTION: &str = "marks";

/// One touched document.
#[derive(Debug, Clone)]
pub struct Mark {
    /// The `_id` of the document.
    pub id: RawBson,
    generation: i64,
}

/// The marks of a job.
#[derive(Debug, Clone)]
pub struct Marks {
    mongo: Mongo,
    collection: Collection<Document>,
    job: String,
}

impl Marks {
    /// The marks of a job.
    pub fn of(mongo: &Mongo, job: &str) -> Self {
        Self { mongo: mongo.clone(), collection: mongo.state(COLLECTION), job: job.into() }
    }

    /// Marks documents, durable on a majority.
    ///
    /// # Errors
    /// A stop where the marks can't be written.
    pub async fn set(&self, ids: &[RawBson]) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let updates = ids
            .iter()
            .map(|id| {
                let key = self.key(id)?;
                Ok(doc! {"q": {"_id": key}, "u": {"$set": {"generation": notes::generation()}}, "upsert": true})
            })
            .collect::<Result<Vec<Document>>>()?;
        self.command(doc! {"update": COLLECTION, "updates": updates}).await
    }

    /// Some of the marks, in no order.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn some(&self, most: i64) -> Result<Vec<Mark>> {
        let filter = self.all();
        let documents: Vec<Document> = retrying("reading the marks", || {
            let find = self.collection.find(filter.clone()).limit(most);
            async move { find.await?.try_collect().await }
        })
        .await?;
        documents.iter().map(read).collect()
    }

    /// The marks of these documents.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn these(&self, ids: &[RawBson]) -> Result<Vec<Mark>> {
        let keys = ids.iter().map(|id| self.key(id)).collect::<Result<Vec<Document>>>()?;
        let documents: Vec<Document> = retrying("reading the marks", || {
            let find = self.collection.find(doc! {"_id": {"$in": keys.clone()}});
            async move { find.await?.try_collect().await }
        })
        .await?;
        documents.iter().map(read).collect()
    }

    /// The marks that follow a given one in their order, or the first ones.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn following(&self, last: Option<&Mark>, most: i64) -> Result<Vec<Mark>> {
        let mut filter = self.all();
        if let (Some(last), Ok(bounds)) = (last, filter.get_document_mut("_id")) {
            bounds.remove("$gte");
            bounds.insert("$gt", self.key(&last.id)?);
        }
        let documents: Vec<Document> = retrying("reading the marks", || {
            let find = self.collection.find(filter.clone()).sort(doc! {"_id": 1}).limit(most);
            async move { find.await?.try_collect().await }
        })
        .await?;
        documents.iter().map(read).collect()
    }

    /// Whether one of these documents is marked.
    ///
    /// # Errors
    /// A stop where that can't be read.
    pub async fn has_any(&self, ids: &[RawBson]) -> Result<bool> {
        let keys = ids.iter().map(|id| self.key(id)).collect::<Result<Vec<Document>>>()?;
        let filter = doc! {"_id": {"$in": keys}};
        let found = retrying("reading the marks", || {
            let find = self.collection.find_one(filter.clone());
            async move { find.await }
        })
        .await?;
        Ok(found.is_some())
    }

    /// Removes marks that were not set again since they were read.
    ///
    /// # Errors
    /// A stop where they can't be removed.
    pub async fn remove(&self, marks: &[Mark]) -> Result<()> {
        if marks.is_empty() {
            return Ok(());
        }
        let deletes = marks
            .iter()
            .map(|mark| {
                let filter = doc! {"_id": self.key(&mark.id)?, "generation": mark.generation};
                Ok(doc! {"q": filter, "limit": 1})
            })
            .collect::<Result<Vec<Document>>>()?;
        self.command(doc! {"delete": COLLECTION, "deletes": deletes}).await
    }

    /// How many documents are marked.
    ///
    /// # Errors
    /// A stop where they can't be counted.
    pub async fn count(&self) -> Result<u64> {
        let filter = self.all();
        retrying("counting the marks", || {
            let count = self.collection.count_documents(filter.clone());
            async move { count.await }
        })
        .await
    }

    /// Forgets all marks.
    ///
    /// # Errors
    /// A stop where they can't be removed.
    pub async fn clear(&self) -> Result<()> {
        let filter = self.all();
        retrying("forgetting the marks", || {
            let delete = self.collection.delete_many(filter.clone());
            async move { delete.await }
        })
        .await
        .map(|_| ())
    }

    /// The condition for all marks of this job, as bounds on `_id`, which an index
    /// follows: a key begins with the name of its job.
    fn all(&self) -> Document {
        let bound = |id: Bson| doc! {"job": &self.job, "id": id};
        doc! {"_id": {"$gte": bound(Bson::MinKey), "$lte": bound(Bson::MaxKey)}}
    }

    fn key(&self, id: &RawBson) -> Result<Document> {
        Ok(doc! {"job": &self.job, "id": crate::mongo::source::askable(id)?})
    }

    async fn command(&self, command: Document) -> Result<()> {
        notes::write(&self.mongo, &self.collection, command, "a mark").await
    }
}

fn read(document: &Document) -> Result<Mark> {
    let id = document.get_document("_id").ok().and_then(|key| key.get("id")).cloned();
    let id = RawBson::try_from(id.unwrap_or(Bson::Null))
        .map_err(|error| Error::stopped(format!("a mark can't be read: {error}")))?;
    Ok(Mark { id, generation: document.get_i64("generation").unwrap_or(0) })
}
