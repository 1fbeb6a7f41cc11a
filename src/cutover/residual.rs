//! What was written between the last change that was brought along and the
//! exchange of names: deletes, which a validator does not hold off, and what
//! bypasses validation.
//!
//! Deletes are brought along as of the moment of the rename: where somebody has written to a
//! document since, that is newer and stays. So they begin before anybody may write to the
//! collection, for as long as the pause allows, and go on when writes do. Writes that bypass
//! validation can't be repeated by their events; they are reported.

use std::collections::HashSet;

use bson::{Bson, Document, RawBson, Timestamp, doc};

use super::gap::{self, Merged, PATIENCE};
use super::in_step::{LastMoment, last_moment};
use super::order::Renames;
use super::record::{FIELD, Record};
use super::rollback::KEPT;
use crate::cleanse::follow::Direction;
use crate::cleanse::quarantine::of_job;
use crate::clock::{Deadline, Moment};
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::job::store;
use crate::mongo::Mongo;
use crate::mongo::catch_up::distinct;
use crate::mongo::command::retrying;
use crate::mongo::feed::Position;
pub use crate::mongo::feed::after;
use crate::mongo::giving_way::GivingWay;
use crate::mongo::index::stored_count;
use crate::mongo::quarantine::{MOST_PARTS, part_id, parts_of};
use crate::mongo::sink::value_bytes;
use crate::mongo::source::to_bson;
use crate::mongo::watched::Watched;

/// Documents that leave the quarantine at once.
const DELETES: usize = 1000;

/// What came at the last moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Residue {
    /// Documents that were deleted.
    pub deletes: u64,
    /// `_id`s of documents that were written past validation, or deleted and found
    /// out too late: the new collection does not have that.
    pub lost: Vec<Bson>,
    /// What was written into the gap.
    pub gap: Merged,
}

impl Residue {
    /// Whether the live collection has all of it.
    pub fn is_whole(&self) -> bool {
        self.lost.is_empty() && self.gap.conflicts.is_empty()
    }

    /// As the record of a finished exchange tells it, whatever process has finished it.
    ///
    /// # Errors
    /// A stop where the gap can't be read.
    pub async fn stored(mongo: &Mongo, job: &str) -> Result<Self> {
        let job_document = store::find(mongo, job).await?.unwrap_or_default();
        let record = job_document.get_document(FIELD).cloned().unwrap_or_default();
        let count = |field: &str| record.get_i64(field).ok().and_then(|count| u64::try_from(count).ok());
        Ok(Self {
            deletes: count("residual_deletes").unwrap_or_default(),
            lost: record.get_array("lost_writes").cloned().unwrap_or_default(),
            gap: Merged {
                merged: count("gap_merged").unwrap_or_default(),
                deleted: count("gap_deleted").unwrap_or_default(),
                conflicts: gap::conflicts(mongo, job).await?,
            },
        })
    }
}

/// What was brought along before anybody writes again.
#[derive(Debug, Default)]
pub struct Brought {
    residue: Residue,
    deleted: Vec<RawBson>,
    /// What the deadline has left of them.
    left: Vec<RawBson>,
    /// The moment of the rename, where it was looked for.
    renamed_at: Option<Timestamp>,
}

/// Brings along what came at the last moment, as much of it as the deadline allows: the application
/// waits. Most often that is nothing, and then nothing is asked for.
///
/// # Errors
/// A stop where the moment of the rename can't be found or a write is refused.
pub(crate) async fn bring_along(
    mongo: &Mongo,
    renames: &Renames,
    fenced_at: Timestamp,
    last: LastMoment,
    deadline: Deadline,
) -> Result<Brought> {
    if last.touched.is_empty() {
        return Ok(Brought::default());
    }
    let written: HashSet<Vec<u8>> = last.written.iter().map(|id| value_bytes(id.as_raw_bson_ref())).collect();
    let is_written = |id: &RawBson| written.contains(&value_bytes(id.as_raw_bson_ref()));
    let (lost, deleted): (Vec<RawBson>, Vec<RawBson>) =
        distinct(&last.touched).into_iter().partition(is_written);
    let lost = lost.iter().map(to_bson).collect::<Result<Vec<Bson>>>()?;
    let mut brought = Brought {
        residue: Residue { lost, ..Residue::default() },
        left: deleted.clone(),
        deleted,
        renamed_at: None,
    };
    let looking = moment_of_rename(mongo, renames.incoming_now(), fenced_at);
    if let Ok(renamed_at) = tokio::time::timeout(deadline.remaining(), looking).await {
        brought.renamed_at = Some(renamed_at?);
        delete(mongo, renames, &mut brought, deadline).await?;
    }
    Ok(brought)
}

/// Deletes what is left.
async fn delete(mongo: &Mongo, renames: &Renames, brought: &mut Brought, deadline: Deadline) -> Result<()> {
    let Some(renamed_at) = brought.renamed_at else { return Ok(()) };
    let mut live = GivingWay::new(mongo, &renames.live, renamed_at)?;
    let given = live.delete(&std::mem::take(&mut brought.left), deadline).await?;
    brought.residue.deletes += u64::try_from(given.done + given.newer.len()).unwrap_or(u64::MAX);
    // Too late, they are told like what was written past validation: a person has to look.
    for id in &given.too_late {
        brought.residue.lost.push(to_bson(id)?);
    }
    brought.left = given.left;
    Ok(())
}

/// Does what is left when writes go on: deletes that the pause was too short for, what was written in
/// the gap; and what was deleted leaves the quarantine too, or a rollback would bring it back. Returns
/// what is to be stored of the exchange, and what came of it.
///
/// # Errors
/// A stop where the moment of the rename can't be found or something can't be written.
pub async fn complete(
    mongo: &Mongo,
    job: &str,
    record: &Record,
    fenced_at: Timestamp,
    mut brought: Brought,
) -> Result<(Document, Residue)> {
    let renames = &record.renames;
    let renamed_at = match brought.renamed_at {
        Some(moment) => moment,
        None => moment_of_rename(mongo, renames.incoming_now(), fenced_at).await?,
    };
    brought.renamed_at = Some(renamed_at);
    if !brought.left.is_empty() {
        delete(mongo, renames, &mut brought, Moment::now().deadline(PATIENCE)).await?;
    }
    let Brought { mut residue, mut deleted, left, .. } = brought;
    let gap = gap::merge(mongo, job, record, Some(fenced_at)).await?;
    residue.lost.extend(left.iter().map(to_bson).collect::<Result<Vec<Bson>>>()?);
    residue.lost.extend(gap.left);
    residue.gap = gap.merged;
    deleted.extend(gap.deleted);
    leave_quarantine(mongo, job, &deleted).await?;
    Ok((fields(record, &residue, renamed_at), residue))
}

async fn leave_quarantine(mongo: &Mongo, job: &str, deleted: &[RawBson]) -> Result<()> {
    if deleted.is_empty() {
        return Ok(());
    }
    let stored = store::find(mongo, job).await?.unwrap_or_default();
    let Some(quarantine) = of_job(&stored) else { return Ok(()) };
    for part in deleted.chunks(DELETES) {
        let ids = part.iter().map(to_bson).collect::<Result<Vec<Bson>>>()?;
        let parts: Vec<Bson> = part
            .iter()
            .flat_map(|id| (0..MOST_PARTS).map(|part| to_bson(&part_id(id, part).into())))
            .collect::<Result<_>>()?;
        // What refers to the parts goes first.
        for (namespace, ids) in [(quarantine.clone(), ids), (parts_of(&quarantine), parts)] {
            let collection = mongo.collection(&namespace);
            retrying(format!("removing what was deleted from {namespace}"), || {
                let delete = collection.delete_many(doc! {"_id": {"$in": ids.clone()}});
                async move { delete.await }
            })
            .await?;
        }
    }
    Ok(())
}

/// What is stored of a finished exchange: where the former collection is, and from
/// where the way back would have to be followed.
fn fields(record: &Record, residue: &Residue, renamed_at: Timestamp) -> Document {
    let old = record.renames.retired.as_ref().map(ToString::to_string);
    let mut fields = doc! {
        KEPT: Bson::Null,
        format!("{FIELD}.renamed_at"): renamed_at,
        format!("{FIELD}.residual_deletes"): stored_count(residue.deletes),
        format!("{FIELD}.lost_writes"): residue.lost.clone(),
        format!("{FIELD}.gap_merged"): stored_count(residue.gap.merged),
        format!("{FIELD}.gap_deleted"): stored_count(residue.gap.deleted),
    };
    if record.is_rollback {
        // The clean collection was live: what it holds is not what the rules say any more.
        fields.insert(Direction::Forward.position(), Bson::Null);
        fields.insert("old_collection", Bson::Null);
    } else {
        let position = Position::Time(after(renamed_at));
        fields.insert(Direction::Back.position(), position.to_document());
        fields.insert("old_collection", old);
    }
    fields
}

/// The moment from which the incoming collection bears the live name.
async fn moment_of_rename(mongo: &Mongo, incoming: &Namespace, after: Timestamp) -> Result<Timestamp> {
    let mut feed = mongo.prompt_feed(&Watched::only(incoming), Position::Time(after)).await?;
    let ended = last_moment(&mut feed).await?.ended;
    ended
        .and_then(|ended| ended.at)
        .ok_or_else(|| Error::stopped(format!("the change stream does not tell when {incoming} was renamed")))
}
