//! What the application wrote while the live name was free: kept first, then
//! merged into the collection that got the name.

use bson::{Bson, DateTime, Document, RawDocumentBuf, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::exchange::{GivingWay, Guarded};
use crate::mongo::source::collect;

/// In the state database: `{_id: {job, id}, at, document}`.
const COLLECTION: &str = "gap_writes";

/// What became of them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Merged {
    /// Documents that are now in the live collection.
    pub merged: u64,
    /// `_id`s that the live collection has too; the documents are kept in the
    /// state database.
    pub conflicts: Vec<Bson>,
}

/// Keeps all documents of a collection that came to be in the gap.
///
/// # Errors
/// A stop where they can't be kept.
pub async fn keep(mongo: &Mongo, job: &str, namespace: &Namespace) -> Result<()> {
    let operation = format!("keeping what was written to {namespace} in the gap");
    let collection = mongo.collection(namespace);
    let documents: Vec<RawDocumentBuf> = retrying(&operation, || collect(collection.find(doc! {}))).await?;
    let kept: Collection<Document> = mongo.state(COLLECTION);
    for document in documents {
        let document = Document::try_from(document)
            .map_err(|error| Error::stopped(format!("{operation} failed: {error}")))?;
        let id = doc! {"job": job, "id": document.get("_id").cloned().unwrap_or(Bson::Null)};
        let entry = doc! {"_id": id.clone(), "at": DateTime::now(), "document": document};
        retrying(&operation, || {
            let replace = kept.replace_one(doc! {"_id": id.clone()}, entry.clone()).upsert(true);
            async move { replace.await }
        })
        .await?;
    }
    Ok(())
}

/// `_id`s of what was written into a gap of that job and could not be merged: it is
/// kept until a person has looked, whatever process found it.
///
/// # Errors
/// A stop where it can't be read.
pub async fn conflicts(mongo: &Mongo, job: &str) -> Result<Vec<Bson>> {
    let kept: Collection<Document> = mongo.state(COLLECTION);
    let entries: Vec<Document> = retrying("reading what could not be merged", || {
        let find = kept.find(doc! {"_id.job": job}).projection(doc! {"_id": 1}).sort(doc! {"_id": 1});
        async move { find.await?.try_collect().await }
    })
    .await?;
    let id = |entry: &Document| entry.get_document("_id").ok()?.get("id").cloned();
    Ok(entries.iter().filter_map(id).collect())
}

/// Merges what was kept into the live collection, unless something newer or
/// something else is there.
///
/// # Errors
/// A stop where it can't be written.
pub async fn merge(mongo: &Mongo, job: &str, live: &Namespace, into: &mut GivingWay) -> Result<Merged> {
    let kept: Collection<Document> = mongo.state(COLLECTION);
    let filter = doc! {"_id.job": job};
    let entries: Vec<Document> = retrying("reading what was written in the gap", || {
        let find = kept.find(filter.clone());
        async move { find.await?.try_collect().await }
    })
    .await?;
    let mut merged = Merged::default();
    let collection = mongo.collection(live);
    for entry in entries {
        let Ok(document) = entry.get_document("document") else { continue };
        let id = document.get("_id").cloned().unwrap_or(Bson::Null);
        let raw = RawDocumentBuf::try_from(document)
            .map_err(|error| Error::stopped(format!("a kept document can't be read: {error}")))?;
        let there = retrying(format!("looking for a document of {live}"), || {
            collect(collection.find(doc! {"_id": {"$eq": id.clone()}}))
        })
        .await?;
        if there.first().is_some_and(|there| *there != raw) {
            merged.conflicts.push(id);
            continue;
        }
        if there.is_empty() {
            if into.write(&raw).await? != Guarded::Done {
                merged.conflicts.push(id);
                continue;
            }
            merged.merged += 1;
        }
        let done = doc! {"_id": entry.get("_id").cloned().unwrap_or(Bson::Null)};
        retrying("forgetting what is merged", || {
            let delete = kept.delete_one(done.clone());
            async move { delete.await }
        })
        .await?;
    }
    Ok(merged)
}

/// The same where nothing was exchanged after all.
///
/// # Errors
/// As [`merge`].
pub async fn merge_back(mongo: &Mongo, job: &str, live: &Namespace) -> Result<Merged> {
    let now = mongo.majority_time().await?;
    let mut into = GivingWay::new(mongo, live, now)?;
    merge(mongo, job, live, &mut into).await
}
