//! Documents of the source that were touched while the copy runs, remembered
//! until the copy is done and they can be looked at again.
//!
//! A mark has a generation, another one each time it is set, so that a removal that
//! was meant for an earlier one does nothing, however late it arrives.

use bson::{Bson, Document, RawArrayBuf, RawBson, RawDocument, RawDocumentBuf, doc, rawdoc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::exact;
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
        let updates = ids.iter().map(|id| {
            let update = rawdoc! {"$set": {"generation": notes::generation()}};
            rawdoc! {"q": {"_id": self.key(id)}, "u": update, "upsert": true}
        });
        self.command(rawdoc! {"update": COLLECTION, "updates": RawArrayBuf::from_iter(updates)}).await
    }

    /// Some of the marks, in no order.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn some(&self, most: i64) -> Result<Vec<Mark>> {
        self.find(rawdoc! {"find": COLLECTION, "filter": exact::encoded(&self.all())?, "limit": most}).await
    }

    /// The marks of these documents.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn these(&self, ids: &[RawBson]) -> Result<Vec<Mark>> {
        self.find(rawdoc! {"find": COLLECTION, "filter": self.among(ids)}).await
    }

    /// The marks that follow a given one in their order, or the first ones.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn following(&self, last: Option<&Mark>, most: i64) -> Result<Vec<Mark>> {
        let mut filter = exact::encoded(&self.all())?;
        if let Some(last) = last {
            let beyond = rawdoc! {"_id": {"$gt": self.key(&last.id)}};
            filter.append(bson::cstr!("$and"), RawArrayBuf::from_iter([beyond]));
        }
        self.find(rawdoc! {"find": COLLECTION, "filter": filter, "sort": {"_id": 1}, "limit": most}).await
    }

    /// Whether one of these documents is marked.
    ///
    /// # Errors
    /// A stop where that can't be read.
    pub async fn has_any(&self, ids: &[RawBson]) -> Result<bool> {
        Ok(!self.find(rawdoc! {"find": COLLECTION, "filter": self.among(ids), "limit": 1}).await?.is_empty())
    }

    /// Removes marks that were not set again since they were read.
    ///
    /// # Errors
    /// A stop where they can't be removed.
    pub async fn remove(&self, marks: &[Mark]) -> Result<()> {
        if marks.is_empty() {
            return Ok(());
        }
        let deletes = marks.iter().map(|mark| {
            let filter = rawdoc! {"_id": self.key(&mark.id), "generation": mark.generation};
            rawdoc! {"q": filter, "limit": 1}
        });
        self.command(rawdoc! {"delete": COLLECTION, "deletes": RawArrayBuf::from_iter(deletes)}).await
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

    /// The condition for the marks of these documents.
    fn among(&self, ids: &[RawBson]) -> RawDocumentBuf {
        let keys: Vec<RawBson> = ids.iter().map(|id| self.key(id).into()).collect();
        exact::with_ids(&keys)
    }

    fn key(&self, id: &RawBson) -> RawDocumentBuf {
        let mut key = rawdoc! {"job": self.job.as_str()};
        exact::append(&mut key, "id", id.as_raw_bson_ref());
        key
    }

    async fn find(&self, command: RawDocumentBuf) -> Result<Vec<Mark>> {
        let database = self.mongo.database(&self.collection.namespace().db);
        let found: Vec<RawDocumentBuf> = retrying("reading the marks", || {
            let find = database.run_raw_cursor_command(command.clone());
            async move { find.await?.with_type().try_collect().await }
        })
        .await?;
        found.iter().map(|mark| read(mark)).collect()
    }

    async fn command(&self, command: RawDocumentBuf) -> Result<()> {
        notes::write(&self.mongo, &self.collection, command, "a mark").await
    }
}

fn read(document: &RawDocument) -> Result<Mark> {
    let id = document.get_document("_id").ok().and_then(|key| exact::field(key, "id"));
    let id = id.ok_or_else(|| Error::stopped("a mark can't be read: it names no document"))?;
    Ok(Mark { id, generation: document.get_i64("generation").unwrap_or(0) })
}
