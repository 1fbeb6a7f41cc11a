//! What the application wrote while the live name was free.
//!
//! The server makes a collection for it under that name. It is set aside by a rename, which takes
//! as long for one document as for a million, and merged into the collection that got the name when
//! writes go on: as of the moment at which it got the name, so that anything newer stays. What was
//! written and deleted again is told by the change stream. What can't be merged is kept.

use std::collections::HashSet;
use std::time::Duration;

use bson::{Bson, DateTime, Document, RawBson, RawDocumentBuf, Timestamp, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use super::record::Record;
use crate::clock::{Deadline, Moment};
use crate::config::values::Namespace;
use crate::crash;
use crate::error::{Context as _, Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::exchange::{Obstacle, Validation};
use crate::mongo::giving_way::GivingWay;
use crate::mongo::insertion::id_of;
use crate::mongo::sink::{id_bytes, value_bytes};
use crate::mongo::source::{collect, to_bson};

/// In the state database: `{_id: {job, id}, at, document}`.
const COLLECTION: &str = "gap_writes";
/// How long it is tried to merge: a server knows the moment no longer.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// How long one rename may wait.
const RENAMING: Duration = Duration::from_millis(500);
/// Documents that are merged at once.
const BATCH: i64 = 500;
/// Bytes of them, at most.
const BATCH_BYTES: usize = 8 * 1024 * 1024;
/// Names that are tried at most for what is set aside.
const MOST_ASIDE: usize = 100;

/// What became of them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Merged {
    /// Documents that are now in the live collection.
    pub merged: u64,
    /// Documents that were deleted in the gap and are in the live collection no more.
    pub deleted: u64,
    /// `_id`s that the live collection has too; the documents are kept in the
    /// state database.
    pub conflicts: Vec<Bson>,
}

/// The moment of the way through the gap, and what left the live collection by it.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What became of the documents.
    pub merged: Merged,
    /// What was deleted last.
    pub deleted: Vec<RawBson>,
    /// `_id`s of what was deleted too long ago to tell whether something newer is there.
    pub left: Vec<Bson>,
}

/// Before the id of the attempt and a number.
fn prefix(attempt: &str) -> String {
    format!("mongorekey.gap.{attempt}.")
}

fn aside(database: &str, attempt: &str, number: usize) -> Namespace {
    Namespace { database: database.into(), collection: format!("{}{number:02}", prefix(attempt)) }
}

/// Gives a collection that came to be in the gap another name, so that the name is free again.
///
/// # Errors
/// The driver's error, for the caller to look again; a stop where there are too many.
pub async fn set_aside(mongo: &Mongo, live: &Namespace, uuid: &Bson, attempt: &str) -> Result<()> {
    for number in set_aside_so_far(mongo, &live.database, attempt).await?.len()..MOST_ASIDE {
        let to = aside(&live.database, attempt, number);
        let mut operation = mongo.operation().await?;
        match mongo.rename(&mut operation, live, uuid, &to, None, RENAMING).await {
            Err(error) if Obstacle::of(&error) == Obstacle::NameTaken => {}
            result => return result.during(format!("renaming {live} to {to}")),
        }
    }
    Err(Error::stopped(format!("{live} was made again and again while its name was free")))
}

/// The same where the name does not stay free for long enough: nobody may write to the collection any
/// more, and what it holds, which is little by then, is copied.
///
/// # Errors
/// The driver's error, for the caller to look again.
pub async fn copy_aside(mongo: &Mongo, live: &Namespace, uuid: &Bson, attempt: &str) -> Result<()> {
    let during = || format!("setting aside what was written to {live} in the gap");
    mongo
        .set_validation(live, uuid, &Validation::refusing(attempt, Document::new()), RENAMING)
        .await
        .during(during())?;
    let number = set_aside_so_far(mongo, &live.database, attempt).await?.len();
    let out = doc! {"$out": aside(&live.database, attempt, number).collection};
    let copied = mongo.collection(live).aggregate([out]).await.during(during())?;
    copied.try_collect::<Vec<Document>>().await.during(during()).map(|_| ())
}

/// What was set aside by that attempt, in this order.
async fn set_aside_so_far(mongo: &Mongo, database: &str, attempt: &str) -> Result<Vec<Namespace>> {
    let first = aside(database, attempt, 0).collection;
    let filter = doc! {"name": {"$gte": first, "$lt": format!("{}:", prefix(attempt))}};
    let collections = mongo.database(database);
    let mut names: Vec<String> = retrying(format!("looking for collections of {database}"), || {
        let list = collections.list_collection_names().filter(filter.clone());
        async move { list.await }
    })
    .await?;
    names.sort_unstable();
    Ok(names.into_iter().map(|collection| Namespace { database: database.into(), collection }).collect())
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

/// Brings what happened in the gap to the collection that has the live name by now, unless something
/// newer or something else is there. Writes go on meanwhile. Repeatable.
///
/// # Errors
/// A stop where it can't be read or written.
pub async fn merge(
    mongo: &Mongo,
    job: &str,
    record: &Record,
    fenced_at: Option<Timestamp>,
) -> Result<Outcome> {
    let renames = &record.renames;
    let asides = set_aside_so_far(mongo, &renames.live.database, &record.id).await?;
    if asides.is_empty() {
        return Ok(Outcome::default());
    }
    let from = fenced_at.ok_or_else(|| {
        Error::stopped(format!("the job {job} does not tell since when writes were held off"))
    })?;
    let history = mongo.name_history(&renames.live, from, &renames.to_become_live(), false).await?;
    let mut merging = Merging {
        mongo,
        job,
        live: &renames.live,
        deleted: history.deleted.iter().map(|id| value_bytes(id.as_raw_bson_ref())).collect(),
        into: GivingWay::new(mongo, &renames.live, history.taken_at)?,
        deadline: Moment::now().deadline(PATIENCE),
        merged: Merged::default(),
    };
    for aside in asides.iter().rev() {
        merging.empty(aside).await?;
    }
    let left = merging.delete(&history.deleted).await?;
    crash::point("cutover_gap_merged");
    // Last: they tell whoever comes after a crash that there is something to do.
    for aside in &asides {
        let collection = mongo.collection(aside);
        retrying(format!("dropping {aside}"), || {
            let drop = collection.drop();
            async move { drop.await }
        })
        .await?;
    }
    Ok(Outcome { merged: merging.merged, deleted: history.deleted, left })
}

/// What is under way.
struct Merging<'a> {
    mongo: &'a Mongo,
    job: &'a str,
    live: &'a Namespace,
    /// What was deleted last, by the bytes of the `_id`s.
    deleted: HashSet<Vec<u8>>,
    into: GivingWay,
    deadline: Deadline,
    merged: Merged,
}

impl Merging<'_> {
    /// Merges what was set aside, batch by batch; each leaves it when it is merged or kept.
    async fn empty(&mut self, aside: &Namespace) -> Result<()> {
        loop {
            let batch = self.some(aside).await?;
            if batch.is_empty() {
                return Ok(());
            }
            let is_deleted =
                |document: &RawDocumentBuf| id_bytes(document).is_some_and(|id| self.deleted.contains(&id));
            let written: Vec<RawDocumentBuf> =
                batch.iter().filter(|document| !is_deleted(document)).cloned().collect();
            self.bring(written).await?;
            self.forget(aside, &batch).await?;
        }
    }

    /// A batch of what is left.
    async fn some(&self, aside: &Namespace) -> Result<Vec<RawDocumentBuf>> {
        let collection = self.mongo.collection(aside);
        let mut bytes = 0;
        let batch =
            retrying(format!("reading {aside}"), || collect(collection.find(doc! {}).limit(BATCH))).await?;
        let fits = |document: &RawDocumentBuf| {
            let is_first = bytes == 0;
            bytes += document.as_bytes().len();
            is_first || bytes <= BATCH_BYTES
        };
        Ok(batch.into_iter().take_while(fits).collect())
    }

    /// Inserts what is not there; keeps what is there otherwise.
    async fn bring(&mut self, documents: Vec<RawDocumentBuf>) -> Result<()> {
        let ids: Vec<RawBson> = documents
            .iter()
            .filter_map(|document| document.get("_id").ok().flatten().map(RawBson::from))
            .collect();
        let found =
            self.mongo.by_ids(self.live, &ids, &Document::new(), None, bson::RawDocument::to_owned).await?;
        let there: HashSet<&[u8]> = found.iter().map(|document| document.as_bytes()).collect();
        let new: Vec<RawDocumentBuf> =
            documents.into_iter().filter(|document| !there.contains(document.as_bytes())).collect();
        let given = self.into.insert(&new, self.deadline).await?;
        self.merged.merged += u64::try_from(given.done).unwrap_or(u64::MAX);
        let not_merged: Vec<RawDocumentBuf> =
            given.newer.into_iter().chain(given.too_late).chain(given.left).collect();
        self.keep(&not_merged).await
    }

    /// Keeps documents that can't be merged, for a person.
    async fn keep(&mut self, documents: &[RawDocumentBuf]) -> Result<()> {
        let kept: Collection<Document> = self.mongo.state(COLLECTION);
        for document in documents {
            let id = id_of(document)?;
            let document = Document::try_from(document.as_ref()).map_err(|error| {
                Error::stopped(format!("what was written in the gap can't be read: {error}"))
            })?;
            let key = doc! {"job": self.job, "id": id.clone()};
            let entry = doc! {"_id": key.clone(), "at": DateTime::now(), "document": document};
            retrying("keeping what was written in the gap", || {
                let replace = kept.replace_one(doc! {"_id": key.clone()}, entry.clone()).upsert(true);
                async move { replace.await }
            })
            .await?;
            self.merged.conflicts.push(id);
        }
        Ok(())
    }

    async fn forget(&self, aside: &Namespace, batch: &[RawDocumentBuf]) -> Result<()> {
        let ids = batch.iter().map(|document| id_of(document)).collect::<Result<Vec<Bson>>>()?;
        let collection = self.mongo.collection(aside);
        retrying("forgetting what is merged", || {
            let delete = collection.delete_many(doc! {"_id": {"$in": ids.clone()}});
            async move { delete.await }
        })
        .await
        .map(|_| ())
    }

    /// Deletes what was deleted in the gap; returns what it is too late for: a person has to look.
    async fn delete(&mut self, ids: &[RawBson]) -> Result<Vec<Bson>> {
        let given = self.into.delete(ids, self.deadline).await?;
        self.merged.deleted += u64::try_from(given.done).unwrap_or(u64::MAX);
        given.too_late.iter().chain(&given.left).map(to_bson).collect()
    }
}
