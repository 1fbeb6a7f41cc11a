//! What was written between the last change that was brought along and the
//! exchange of names: deletes, which a validator does not hold off, and what
//! bypasses validation.
//!
//! It is brought along afterwards as of the moment of the rename: where the
//! application has written to a document since, that is newer and stays.

use bson::{Bson, Document, RawBson, Timestamp, doc};

use super::gap::{self, Merged};
use super::in_step::{LastMoment, last_moment};
use super::order::Renames;
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::exchange::GivingWay;
use crate::mongo::feed::Position;
use crate::mongo::sink::value_bytes;
use crate::mongo::source::{collect, to_bson};

/// What was brought along afterwards.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Residue {
    /// Documents that were deleted at the last moment.
    pub deletes: u64,
    /// Documents that were written past validation at the last moment.
    pub writes: u64,
    /// `_id`s of such documents whose last state went with the old collection.
    pub lost: Vec<Bson>,
    /// What was written into the gap.
    pub gap: Merged,
}

/// Brings along what came at the last moment; returns it with the moment of the
/// rename.
///
/// # Errors
/// A stop where the moment of the rename can't be found or a write is refused.
pub async fn bring_along(
    mongo: &Mongo,
    job: &str,
    renames: &Renames,
    fenced_at: Timestamp,
    last: LastMoment,
    valid: &Document,
) -> Result<(Residue, Timestamp)> {
    let renamed_at = moment_of_rename(mongo, &renames.incoming, fenced_at).await?;
    let mut live = GivingWay::new(mongo, &renames.live, renamed_at).await?;
    let mut residue = Residue::default();
    let written: std::collections::HashSet<Vec<u8>> =
        last.written.iter().map(|id| value_bytes(id.as_raw_bson_ref())).collect();
    for id in distinct(last.touched) {
        let is_delete = !written.contains(&value_bytes(id.as_raw_bson_ref()));
        match (&renames.retired, is_delete) {
            (None, true) => {
                live.delete(id).await?;
                residue.deletes += 1;
            }
            (None, false) => residue.lost.push(to_bson(&id)?),
            (Some(retired), _) => match state_of(mongo, retired, &id, valid).await? {
                Some(document) => {
                    live.write(&document).await?;
                    residue.writes += 1;
                }
                None => {
                    live.delete(id).await?;
                    residue.deletes += 1;
                }
            },
        }
    }
    residue.gap = gap::merge(mongo, job, &renames.live, &mut live).await?;
    Ok((residue, renamed_at))
}

/// The moment from which the incoming collection bears the live name.
async fn moment_of_rename(mongo: &Mongo, incoming: &Namespace, after: Timestamp) -> Result<Timestamp> {
    let mut feed = mongo.prompt_feed(incoming, Position::Time(after)).await?;
    let ended = last_moment(&mut feed).await?.ended;
    ended
        .and_then(|ended| ended.at)
        .ok_or_else(|| Error::stopped(format!("the change stream does not tell when {incoming} was renamed")))
}

/// A document of the former collection, if it is valid.
async fn state_of(
    mongo: &Mongo,
    retired: &Namespace,
    id: &RawBson,
    valid: &Document,
) -> Result<Option<bson::RawDocumentBuf>> {
    let by_id = Bson::Document(doc! {"_id": {"$eq": to_bson(id)?}});
    let filter = crate::cleanse::predicate::all_of(vec![by_id, Bson::Document(valid.clone())]);
    let collection = mongo.collection(retired);
    let found =
        retrying(format!("reading a document of {retired}"), || collect(collection.find(filter.clone())))
            .await?;
    Ok(found.into_iter().next())
}

fn distinct(ids: Vec<RawBson>) -> Vec<RawBson> {
    let mut seen = std::collections::HashSet::new();
    ids.into_iter().filter(|id| seen.insert(value_bytes(id.as_raw_bson_ref()))).collect()
}
