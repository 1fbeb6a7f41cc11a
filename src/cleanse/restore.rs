//! Putting a quarantine back into a live collection: every rejected document as
//! it was, but none that the application has written anew since, and none that it
//! has written anew and deleted again.
//!
//! The first are seen: they are there. The second are told by the change feed of
//! the collection: each delete of an `_id` that the quarantine has too is marked.
//! Documents are put back as of a moment up to which the feed was read, so that
//! whatever comes between is noticed and looked at.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use bson::{RawBson, RawDocumentBuf, Timestamp};
use tokio_util::sync::CancellationToken;

use super::marks::Marks;
use crate::config::values::Namespace;
use crate::crash;
use crate::error::{Class, Error, Result};
use crate::mongo::Mongo;
use crate::mongo::catch_up::distinct;
use crate::mongo::exact;
use crate::mongo::feed::{Feed, Position, nudge};
use crate::mongo::insertion::{Insertion, Put, id_of};
use crate::mongo::restore::Restore;
use crate::mongo::restore::progress::Restored;
use crate::mongo::sink::{id_bytes, value_bytes};
use crate::mongo::watched::Watched;
use crate::throttle::pace::Pace;

/// Changes that are read at once.
const BATCH: usize = 1_000;
/// Attempts at a document that somebody else is writing.
const ATTEMPTS: usize = 50;
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(100);
/// While nothing may be written, the feed is read on this often.
const HELD: Duration = Duration::from_secs(1);

/// What the application has deleted since a quarantine was filled.
#[derive(Debug)]
pub struct Since {
    mongo: Mongo,
    into: Namespace,
    quarantine: Namespace,
    feed: Feed,
    marks: Marks,
}

impl Since {
    /// What is deleted of `into` from a position on, remembered with the job of
    /// that name.
    ///
    /// # Errors
    /// A refusal where the oplog no longer reaches back that far.
    pub async fn of(
        mongo: &Mongo,
        into: &Namespace,
        quarantine: &Namespace,
        job: &str,
        position: Position,
    ) -> Result<Self> {
        let feed = mongo.prompt_feed(&Watched::only(into), position).await?;
        Ok(Self {
            mongo: mongo.clone(),
            into: into.clone(),
            quarantine: quarantine.clone(),
            feed,
            marks: Marks::of(mongo, job),
        })
    }

    /// Up to where deletes are marked.
    pub fn position(&self) -> &Position {
        self.feed.position()
    }

    /// Marks what was deleted until now; returns that moment.
    ///
    /// # Errors
    /// A stop where the collection is no longer what it was or the changes are lost.
    pub async fn look(&mut self) -> Result<Timestamp> {
        let now = self.mongo.majority_time().await?;
        // An idle collection says nothing: its feed moves on with other writes only.
        nudge(&self.mongo).await?;
        // Several deletes of one transaction are of one moment.
        let beyond = Timestamp { increment: now.increment + 1, ..now };
        while !self.feed.has_reached(beyond) {
            let changes = self.feed.next(BATCH).await.map_err(|error| error.with_class(Class::Stopped))?;
            if let Some(ended) = changes.ended_by {
                return Err(Error::stopped(format!(
                    "{} is no longer what it was: {}",
                    self.into, ended.event
                )));
            }
            self.mark(&changes.deleted).await?;
        }
        Ok(now)
    }

    async fn mark(&self, deleted: &[RawBson]) -> Result<()> {
        if deleted.is_empty() {
            return Ok(());
        }
        let ours = self.mongo.existing_ids(&self.quarantine, &distinct(deleted), exact::id_of).await?;
        self.marks.set(&ours.into_iter().flatten().collect::<Vec<RawBson>>()).await
    }

    /// Takes out what was deleted, and tells how much that is.
    async fn take_out(&self, documents: &mut Vec<RawDocumentBuf>) -> Result<u64> {
        let ids: Vec<RawBson> = documents.iter().filter_map(|document| exact::id_of(document)).collect();
        let marks = self.marks.these(&ids).await?;
        let gone: HashSet<Vec<u8>> =
            marks.iter().map(|mark| value_bytes(mark.id.as_raw_bson_ref())).collect();
        let before = documents.len();
        documents.retain(|document| id_bytes(document).is_none_or(|id| !gone.contains(&id)));
        Ok(u64::try_from(before - documents.len()).unwrap_or(0))
    }
}

/// Puts every quarantined document back as it was where the application has done
/// nothing to its `_id` since. Goes on from where `restored` says it was; `save` is
/// called after each batch, to store that.
///
/// # Errors
/// A stop where a document can't be read or written; what `save` says.
pub async fn restore_into(
    restore: &mut Restore,
    since: &mut Since,
    pace: &Pace,
    restored: &mut Restored,
    stop: &CancellationToken,
    mut save: impl AsyncFnMut(&Restored, &Position) -> Result<()>,
) -> Result<()> {
    loop {
        let (batch, position) = restore.batch(restored.position.as_ref()).await?;
        let Some(position) = position else {
            restored.is_complete = true;
            return save(restored, since.position()).await;
        };
        while !pace.turn(batch.len() as u64, stop).await {
            if stop.is_cancelled() {
                return Ok(());
            }
            // The oplog does not wait.
            since.look().await?;
            tokio::time::sleep(HELD).await;
        }
        if stop.is_cancelled() {
            return Ok(());
        }
        put_all(&mut restore.insertion, since, batch, restored).await?;
        crash::point("restore_put");
        restored.position = Some(position);
        save(restored, since.position()).await?;
        crash::point("restore_saved");
    }
}

/// Puts all of them back but those of which something else became.
async fn put_all(
    insertion: &mut Insertion,
    since: &mut Since,
    documents: Vec<RawDocumentBuf>,
    restored: &mut Restored,
) -> Result<()> {
    let mut open = VecDeque::from([(documents, 0)]);
    while let Some((mut part, attempts)) = open.pop_front() {
        let moment = since.look().await?;
        restored.deleted_since += since.take_out(&mut part).await?;
        take_out_present(insertion, &mut part, restored).await?;
        let Some(first) = part.first() else { continue };
        match insertion.put(&part, moment).await? {
            Put::All => restored.restored += part.len() as u64,
            Put::Refused { index, reason } => {
                let refused = part.remove(index.min(part.len() - 1));
                restored.refuse(id_of(&refused)?, &reason);
                open.push_front((part, 0));
            }
            Put::LookAgain if part.len() == 1 && attempts == ATTEMPTS => {
                restored.refuse(id_of(first)?, "somebody is writing to it again and again");
            }
            Put::LookAgain => {
                tokio::time::sleep(PAUSE).await;
                // Smaller and smaller: what stands in the way of one must not hold up others.
                let rest = part.split_off(part.len().div_ceil(2));
                if !rest.is_empty() {
                    open.push_front((rest, attempts + 1));
                }
                open.push_front((part, attempts + 1));
            }
        }
    }
    Ok(())
}

/// Takes out the documents whose `_id` is there. One that is there just as it was
/// rejected was put back before, by a run that did not live to say so.
async fn take_out_present(
    insertion: &Insertion,
    part: &mut Vec<RawDocumentBuf>,
    restored: &mut Restored,
) -> Result<()> {
    let mut present = insertion.present(part).await?;
    if let ([only], Some(there)) = (part.as_slice(), present.values().next().cloned()) {
        // Equal `_id`s may differ in their bytes, such as numbers of two types.
        present = id_bytes(only).map(|id| (id, there)).into_iter().collect();
    }
    let mut absent = Vec::with_capacity(part.len());
    for document in part.drain(..) {
        match id_bytes(&document).and_then(|id| present.get(&id)) {
            None => absent.push(document),
            Some(there) if *there == document => restored.restored += 1,
            Some(_) => restored.keep(id_of(&document)?),
        }
    }
    *part = absent;
    Ok(())
}
