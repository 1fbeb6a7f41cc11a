//! Documents that stand in each other's way under a unique index: the target is
//! made of states of different moments, and in no moment of the source did both
//! hold the value.
//!
//! All of them are removed and looked at again. One of them may have been in step
//! long since, and nothing in the change feed would bring it back: it is marked
//! before it is removed.

use bson::{Document, RawBson, Timestamp};
use tokio_util::sync::CancellationToken;

use super::build::{self, When};
use super::follow::{Followed, Follower};
use super::marks::Marks;
use super::target::index_name;
use crate::crash;
use crate::error::{Error, Result};
use crate::mongo::catalog::Description;
use crate::mongo::catch_up::{Applied, distinct};
use crate::mongo::feed::Position;
use crate::mongo::lanes::Lanes;

/// Rounds in which documents that stand in each other's way are written again, and
/// no further one turns up. A value may have passed through any number of hands, and
/// each round finds the next.
const ROUNDS: usize = 10;
/// Tries to build the unique indexes.
const BUILDS: usize = 20;

impl Follower<'_> {
    /// Brings documents up to the state that they have now or later, at least that
    /// of `after`.
    ///
    /// # Errors
    /// A stop where a document can't be written for good.
    pub async fn apply(
        &self,
        lanes: &mut Lanes,
        ids: &[RawBson],
        after: Option<Timestamp>,
    ) -> Result<Applied> {
        self.forget_displaced(ids).await?;
        let attempt = lanes.apply(ids, after).await?;
        let mut applied = attempt.applied;
        applied.add(self.separate(lanes, attempt.parties, after).await?);
        Ok(applied)
    }

    /// Builds the unique indexes; false where a signal came first.
    ///
    /// What was brought up to date last was read a moment later than what came
    /// before it: two documents may hold a value that has just passed from one to
    /// the other. Both are looked at again, and what came meanwhile, until the
    /// index can be built.
    ///
    /// # Errors
    /// A stop where it can't be built.
    pub async fn unique_indexes(
        &self,
        lanes: &mut Lanes,
        position: &mut Position,
        source: &Description,
        stop: &CancellationToken,
        followed: &mut Followed,
    ) -> Result<bool> {
        let mut last = None;
        for _ in 0..BUILDS {
            let built = build::try_indexes(self.mongo, self.target, source, When::CaughtUp, self.events);
            let Some((values, error)) = built.await? else { return Ok(true) };
            let parties = lanes.holders(&values).await?;
            followed.applied.add(self.separate(lanes, parties, position.time()).await?);
            if !self.drain(lanes, position, false, stop, followed).await? {
                return Ok(false);
            }
            last = Some(error);
        }
        match last {
            Some(error) => Err(error),
            None => Err(self.in_the_way(&[]).await),
        }
    }

    async fn separate(
        &self,
        lanes: &mut Lanes,
        parties: Vec<RawBson>,
        after: Option<Timestamp>,
    ) -> Result<Applied> {
        let marks = Marks::of(self.mongo, self.job.name());
        let mut applied = Applied::default();
        let mut open = distinct(&parties);
        if !open.is_empty() && self.valid.grouping.is_some() {
            // Groups have notes of their own.
            self.job.lease().valid().await?;
            return lanes.write_again(&open, after).await;
        }
        let mut rounds = 0;
        while !open.is_empty() {
            if rounds == ROUNDS {
                return Err(self.in_the_way(&open).await);
            }
            self.job.lease().valid().await?;
            open = self.displace(lanes, open).await?;
            marks.set(&open).await?;
            lanes.remove(&open).await?;
            crash::point("parties_removed");
            let marked = marks.these(&open).await?;
            let attempt = lanes.apply(&open, after).await?;
            applied.add(attempt.applied);
            if attempt.parties.is_empty() {
                marks.remove(&marked).await?;
            }
            let known = open.len();
            open.extend(attempt.parties.iter().cloned());
            open = if attempt.parties.is_empty() { Vec::new() } else { distinct(&open) };
            rounds = if open.len() > known { 0 } else { rounds + 1 };
        }
        Ok(applied)
    }

    async fn in_the_way(&self, open: &[RawBson]) -> Error {
        let id = open.first().map(|id| crate::report::json::extended(id.as_raw_bson_ref()));
        let error = Error::stopped(format!(
            "{} documents of {} stand in each other's way under a unique index, {} among them",
            open.len(),
            self.source,
            id.unwrap_or_default()
        ));
        match self.lost_unique_index().await {
            Some(name) => error.hint(format!(
                "{} does not have the unique index {name} any more: drop it from the copy too, \
                 db.getCollection({:?}).dropIndex({name:?}), and start the same command again",
                self.source, self.target.collection
            )),
            None => error.hint(
                "does the source itself hold duplicates that the rules keep? Started again, the job goes on",
            ),
        }
    }

    /// The name of a unique index of the target that the source had and has no longer.
    async fn lost_unique_index(&self) -> Option<String> {
        let source = self.mongo.describe(self.source).await.ok()??;
        let target = self.mongo.describe(self.target).await.ok()??;
        let is_unique = |index: &&Document| index.get_bool("unique").unwrap_or(false);
        let is_lost = |index: &&Document| {
            let mut of_source = source.indexes.iter().filter(is_unique);
            !of_source.any(|other| other.get("key") == index.get("key"))
        };
        let lost = target.indexes.iter().filter(is_unique).find(is_lost)?;
        Some(index_name(lost))
    }
}
