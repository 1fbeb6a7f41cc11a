//! Documents that gave way in the old collection while what is written to the new
//! one is brought back into it.
//!
//! The old collection holds what the rules rejected, which the new one does not. A
//! document of the new one may have a value that a unique index allows only once
//! and that such a rejected one holds. It is newer, so the rejected one is kept
//! here, and put back when the value is free again: it would be nowhere else. Any
//! change of its `_id` in the new collection makes it obsolete.

use bson::{Bson, DateTime, Document, RawArrayBuf, RawBson, RawDocument, RawDocumentBuf, rawdoc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use super::follow::{Direction, Follower};
use crate::crash;
use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::exact;
use crate::mongo::insertion::{Insertion, Put};
use crate::mongo::lanes::Lanes;
use crate::mongo::notes;
use crate::mongo::sink::{id_bytes, value_bytes};

/// In the state database: `{_id: {job, id}, at, document}`. Documents of the
/// application, so that they are never cleared away.
pub const COLLECTION: &str = "displaced";

/// The displaced documents of a job.
#[derive(Debug)]
struct Displaced {
    mongo: Mongo,
    collection: Collection<Document>,
    job: String,
}

impl Displaced {
    fn of(mongo: &Mongo, job: &str) -> Self {
        Self { mongo: mongo.clone(), collection: mongo.state(COLLECTION), job: job.into() }
    }

    fn key(&self, id: &RawBson) -> RawDocumentBuf {
        let mut key = rawdoc! {"job": self.job.as_str()};
        exact::append(&mut key, "id", id.as_raw_bson_ref());
        key
    }

    async fn keep(&self, document: &RawDocumentBuf) -> Result<()> {
        let operation = "a document that gives way";
        let key = self.key(&id_of(document)?);
        // A replacement as a whole: a field may stand in the document twice.
        let entry = rawdoc! {"_id": key.clone(), "at": DateTime::now(), "document": document.clone()};
        let update = rawdoc! {"q": {"_id": key}, "u": entry, "upsert": true};
        let command = rawdoc! {"update": COLLECTION, "updates": RawArrayBuf::from_iter([update])};
        notes::write(&self.mongo, &self.collection, command, operation).await
    }

    /// Most often there is none, and then this is one question to a small collection.
    async fn forget(&self, ids: &[RawBson]) -> Result<()> {
        let keys: Vec<RawBson> = ids.iter().map(|id| self.key(id).into()).collect();
        let filter = exact::with_ids(&keys);
        if self.find(filter.clone(), 1).await?.is_empty() {
            return Ok(());
        }
        let delete = rawdoc! {"q": filter, "limit": 0};
        let command = rawdoc! {"delete": COLLECTION, "deletes": RawArrayBuf::from_iter([delete])};
        notes::write(&self.mongo, &self.collection, command, "that a document gave way").await
    }

    async fn all(&self) -> Result<Vec<RawDocumentBuf>> {
        let entries = self.find(rawdoc! {"_id.job": self.job.as_str()}, 0).await?;
        let document = |entry: &RawDocumentBuf| {
            let document = entry.get_document("document").map(ToOwned::to_owned);
            document.map_err(|error| Error::stopped(format!("a kept document can't be read: {error}")))
        };
        entries.iter().map(document).collect()
    }

    async fn find(&self, filter: RawDocumentBuf, most: i64) -> Result<Vec<RawDocumentBuf>> {
        let database = self.mongo.database(&self.collection.namespace().db);
        let command = rawdoc! {"find": COLLECTION, "filter": filter, "limit": most};
        retrying("reading documents that gave way", || {
            let find = database.run_raw_cursor_command(command.clone());
            async move { find.await?.with_type().try_collect().await }
        })
        .await
    }
}

impl Follower<'_> {
    /// What was changed in the new collection is the truth about these documents.
    pub(super) async fn forget_displaced(&self, ids: &[RawBson]) -> Result<()> {
        if self.direction != Direction::Back || ids.is_empty() {
            return Ok(());
        }
        Displaced::of(self.mongo, self.job.name()).forget(ids).await
    }

    /// Removes those of these documents that only the old collection has, and keeps
    /// them; returns the others.
    pub(super) async fn displace(&self, lanes: &mut Lanes, parties: Vec<RawBson>) -> Result<Vec<RawBson>> {
        if self.direction != Direction::Back || parties.is_empty() {
            return Ok(parties);
        }
        let find = async |namespace| {
            let owned = |document: &RawDocument| document.to_owned();
            self.mongo.by_ids(namespace, &parties, &Document::new(), None, owned).await
        };
        // During an exchange the old collection has the name of the attempt.
        let (old, new) = (find(lanes.target().unwrap_or(self.target)).await?, find(self.source).await?);
        let live: Vec<Vec<u8>> = new.iter().filter_map(|document| id_bytes(document)).collect();
        let displaced = Displaced::of(self.mongo, self.job.name());
        let mut gone = Vec::new();
        for document in old.iter().filter(|old| id_bytes(old).is_some_and(|id| !live.contains(&id))) {
            displaced.keep(document).await?;
            gone.push(id_of(document)?);
        }
        crash::point("displaced_kept");
        lanes.remove(&gone).await?;
        let gone: Vec<Vec<u8>> = gone.iter().map(|id| value_bytes(id.as_raw_bson_ref())).collect();
        Ok(parties.into_iter().filter(|id| !gone.contains(&value_bytes(id.as_raw_bson_ref()))).collect())
    }

    /// Puts back what gave way, where it stands in nobody's way any more.
    ///
    /// # Errors
    /// A stop where the old collection can't be written.
    pub async fn put_displaced_back(&self) -> Result<()> {
        let displaced = Displaced::of(self.mongo, self.job.name());
        let documents = displaced.all().await?;
        if documents.is_empty() {
            return Ok(());
        }
        let mut insertion = Insertion::new(self.job.right(self.mongo).lane("displaced").await?, self.target);
        for document in documents {
            let one = std::slice::from_ref(&document);
            let is_there = !insertion.present(one).await?.is_empty();
            let now = self.mongo.majority_time().await?;
            if is_there || insertion.put(one, now).await? == Put::All {
                displaced.forget(&[id_of(&document)?]).await?;
            }
        }
        Ok(())
    }
}

/// The `_id`s of the documents of a job that gave way and are not back.
///
/// # Errors
/// A stop where they can't be read.
pub async fn displaced(mongo: &Mongo, job: &str) -> Result<Vec<Bson>> {
    let documents = Displaced::of(mongo, job).all().await?;
    documents.iter().map(|document| Ok(exact::shown(&id_of(document)?))).collect()
}

fn id_of(document: &RawDocumentBuf) -> Result<RawBson> {
    exact::id_of(document).ok_or_else(|| Error::stopped("a document has no `_id`"))
}
