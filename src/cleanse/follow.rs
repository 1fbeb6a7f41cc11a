//! Following the source: what is touched while the copy runs is marked; after
//! it, what was marked and what is touched from then on is brought up to date.

use std::time::Duration;

use bson::{Bson, Document, RawBson, doc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::marks::Marks;
use crate::config::values::Namespace;
use crate::error::{Class, Error, Result};
use crate::event::{Events, Progress};
use crate::job::Job;
use crate::mongo::Mongo;
use crate::mongo::catch_up::{Applied, CatchUp};
use crate::mongo::exchange::Validation;
use crate::mongo::feed::{Changes, Feed, Position, nudge};
use crate::throttle::pace::Pace;
use crate::throttle::waiting::Waiting;

/// Changes that are worked on at once.
const BATCH: usize = 1_000;
/// The position is stored this often where nothing changes, or the oplog would
/// outrun it.
const IDLE_SAVE: Duration = Duration::from_secs(10);
/// Where a job document keeps how far something is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the source of the cleanse to its target.
    Forward,
    /// After a cutover, from the new collection to the old one.
    Back,
}

impl Direction {
    /// The field with the position in the change stream.
    pub fn position(self) -> &'static str {
        match self {
            Self::Forward => "feed",
            Self::Back => "feed_back",
        }
    }

    /// The field with the session of the writes.
    fn session(self) -> &'static str {
        match self {
            Self::Forward => "catch_up_session",
            Self::Back => "feed_back_session",
        }
    }
}

/// What was followed so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Followed {
    /// Changes of the source that were seen.
    pub changes: u64,
    /// What they led to in the target.
    pub applied: Applied,
}

/// Follows the source of one job.
#[derive(Debug)]
pub struct Follower<'a> {
    /// The connection.
    pub mongo: &'a Mongo,
    /// The job, which keeps the position.
    pub job: &'a Job,
    /// The collection that is followed.
    pub source: &'a Namespace,
    /// The collection that is kept in step.
    pub target: &'a Namespace,
    /// The condition for valid documents.
    pub valid: Document,
    /// Where the job keeps the position.
    pub direction: Direction,
    /// The options that the source must keep; `None` where they are not known.
    pub options: Option<Document>,
    /// Where progress goes.
    pub events: &'a Events,
    /// How fast it may go.
    pub pace: &'a Pace,
}

impl Follower<'_> {
    /// Takes the position from which changes count: before anything is read.
    ///
    /// # Errors
    /// A refusal where this is no replica set.
    pub async fn begin(&self) -> Result<Position> {
        let position = Position::Time(self.mongo.majority_time().await?);
        Marks::of(self.mongo, self.job.name()).clear().await?;
        self.save_position(&position).await?;
        Ok(position)
    }

    /// Marks what is touched until `copied` is cancelled.
    ///
    /// # Errors
    /// A stop where the source is no longer what it was or the changes are lost.
    pub async fn mark(&self, from: Position, copied: &CancellationToken) -> Result<Position> {
        let marks = Marks::of(self.mongo, self.job.name());
        let mut feed = self.open(from).await?;
        let mut saved = Instant::now();
        while !copied.is_cancelled() {
            self.job.lease().valid().await?;
            let changes = self.next(&mut feed).await?;
            marks.set(&changes.touched).await?;
            // Never before the marks: what it stands for must be remembered.
            if !changes.touched.is_empty() || saved.elapsed() >= IDLE_SAVE {
                self.save_position(feed.position()).await?;
                saved = Instant::now();
            }
        }
        Ok(feed.position().clone())
    }

    /// Works off all marks; `from` moves on where nothing may be applied for a while.
    ///
    /// # Errors
    /// A stop where a document can't be brought up to date.
    pub async fn work_off_marks(
        &self,
        catch_up: &mut CatchUp,
        from: &mut Position,
        stop: &CancellationToken,
        followed: &mut Followed,
    ) -> Result<()> {
        let marks = Marks::of(self.mongo, self.job.name());
        let total = marks.count().await?;
        let mut done = 0;
        while !stop.is_cancelled() {
            self.job.lease().valid().await?;
            self.mark_while_held(from, stop).await?;
            let some = marks.some(i64::try_from(self.batch()).unwrap_or(i64::MAX)).await?;
            if some.is_empty() {
                return Ok(());
            }
            if !self.pace.turn(some.len() as u64, stop).await {
                continue;
            }
            let ids: Vec<RawBson> = some.iter().map(|mark| mark.id.clone()).collect();
            followed.applied.add(catch_up.apply(&ids, from.time()).await?);
            marks.remove(&some).await?;
            done += u64::try_from(some.len()).unwrap_or(0);
            followed.changes += u64::try_from(some.len()).unwrap_or(0);
            self.events.progress(Progress {
                phase: "catch-up".into(),
                unit: "documents",
                done,
                total: Some(total.max(done)),
                limited_by: Some(self.limit("database")),
                detail: "touched before".into(),
            });
        }
        Ok(())
    }

    /// Brings everything up to date that was touched before this call, and moves
    /// the position on; returns whether it got that far. With `for_ever` it goes on until it is stopped.
    ///
    /// # Errors
    /// A stop where a document can't be brought up to date, the source is no
    /// longer what it was or the changes are lost.
    pub async fn drain(
        &self,
        catch_up: &mut CatchUp,
        from: &mut Position,
        for_ever: bool,
        stop: &CancellationToken,
        followed: &mut Followed,
    ) -> Result<bool> {
        // A run that was ended while nothing might be applied has left some.
        self.work_off_marks(catch_up, from, stop, followed).await?;
        let goal = self.mongo.last_write_time().await?;
        // An idle source says nothing: its feed moves on with other writes only.
        nudge(self.mongo).await?;
        let mut feed = self.open(from.clone()).await?;
        let mut saved = Instant::now();
        while !stop.is_cancelled() {
            self.job.lease().valid().await?;
            if self.pace.held_by().is_some() {
                self.work_off_marks(catch_up, from, stop, followed).await?;
                feed = self.open(from.clone()).await?;
                continue;
            }
            let changes = self.next(&mut feed).await?;
            if !self.pace.turn(changes.touched.len() as u64, stop).await {
                // What was read is not applied, so it must be read again.
                feed = self.open(from.clone()).await?;
                continue;
            }
            followed.applied.add(catch_up.apply(&changes.touched, changes.time).await?);
            followed.changes += u64::try_from(changes.touched.len()).unwrap_or(0);
            from.clone_from(feed.position());
            let has_reached = feed.has_reached(goal);
            if !changes.touched.is_empty() || has_reached || saved.elapsed() >= IDLE_SAVE {
                self.save_position(feed.position()).await?;
                saved = Instant::now();
            }
            if has_reached && !for_ever {
                return Ok(true);
            }
            self.show(&changes, feed.position(), followed);
        }
        // Stopped: marks may be left, however far the stream was read.
        Ok(false)
    }

    /// While nothing may be applied, what is touched is marked and the position
    /// moves on: the oplog does not wait.
    async fn mark_while_held(&self, from: &mut Position, stop: &CancellationToken) -> Result<()> {
        if self.pace.held_by().is_none() || stop.is_cancelled() {
            return Ok(());
        }
        let freed = CancellationToken::new();
        let mut marking = std::pin::pin!(self.mark(from.clone(), &freed));
        let marked = tokio::select! {
            ended = &mut marking => ended,
            () = self.pace.free(stop) => {
                freed.cancel();
                marking.await
            }
        };
        *from = marked?;
        Ok(())
    }

    /// Changes to work on at once: with a limit no more than a second's.
    fn batch(&self) -> usize {
        match usize::try_from(self.pace.rate()) {
            Ok(0) | Err(_) => BATCH,
            Ok(rate) => rate.min(BATCH),
        }
    }

    fn limit(&self, otherwise: &'static str) -> String {
        self.pace.limit().map_or(otherwise, Waiting::as_str).into()
    }

    /// A session for the writes, stored before the first one, after what still
    /// runs on that of an earlier holder was ended.
    ///
    /// # Errors
    /// A stop where that can't be made sure.
    pub async fn catch_up(&self) -> Result<CatchUp> {
        if let Some(Bson::Document(session)) = self.job.stored(self.direction.session()) {
            self.mongo.end_operations(std::slice::from_ref(session)).await?;
        }
        let catch_up = CatchUp::new(self.mongo, self.source, self.target, self.valid.clone()).await?;
        self.job.save(doc! {self.direction.session(): catch_up.session()}).await?;
        Ok(catch_up)
    }

    async fn open(&self, from: Position) -> Result<Feed> {
        self.mongo.feed(self.source, from).await
    }

    async fn next(&self, feed: &mut Feed) -> Result<Changes> {
        // What was possible at the start and no longer is, is no refusal any more.
        let changes = feed.next(self.batch()).await.map_err(|error| error.with_class(Class::Stopped))?;
        self.check(&changes).await?;
        Ok(changes)
    }

    /// Makes sure that the source is still what it was.
    ///
    /// # Errors
    /// A stop where it is not.
    pub async fn check(&self, changes: &Changes) -> Result<()> {
        match &changes.ended_by {
            Some(ended) => Err(self.no_longer(&ended.event)),
            None if changes.modified && !self.has_kept_its_options().await? => Err(self.no_longer("modify")),
            None => Ok(()),
        }
    }

    fn no_longer(&self, event: &str) -> Error {
        Error::stopped(format!(
            "{} is no longer what it was: {event}. The target is as of the moment before",
            self.source
        ))
        .hint("look at what was done to the source; copy anew with --restart")
    }

    /// A cutover holds writes off by changing them, and changes them back.
    async fn has_kept_its_options(&self) -> Result<bool> {
        let Some(expected) = &self.options else { return Ok(false) };
        let found = self.mongo.describe(self.source).await?;
        Ok(found.is_some_and(|found| {
            Validation::of(&found.options) == Validation::refusing() || same_options(expected, &found.options)
        }))
    }

    /// Stores how far the source is followed.
    ///
    /// # Errors
    /// A stop where the lease is lost or the job can't be written.
    pub async fn save_position(&self, position: &Position) -> Result<()> {
        self.job.save(doc! {self.direction.position(): position.to_document()}).await
    }

    fn show(&self, changes: &Changes, position: &Position, followed: &Followed) {
        let lag = position.time().map(|time| {
            let now = jiff::Timestamp::now().as_second();
            now.saturating_sub(i64::from(time.time)).max(0)
        });
        let waiting = if changes.touched.len() >= self.batch() { "database" } else { "source" };
        self.events.progress(Progress {
            phase: "follow".into(),
            unit: "changes",
            done: followed.changes,
            total: None,
            limited_by: Some(self.limit(waiting)),
            detail: format!(
                "{} written, {} removed, {} s behind",
                followed.applied.written,
                followed.applied.removed,
                lag.unwrap_or(0)
            ),
        });
    }
}

/// Whether two collections with these options treat documents alike. Pure.
fn same_options(left: &Document, right: &Document) -> bool {
    let others = |options: &Document| {
        let mut others = options.clone();
        for name in ["validator", "validationLevel", "validationAction", "uuid"] {
            others.remove(name);
        }
        others
    };
    Validation::of(left) == Validation::of(right) && others(left) == others(right)
}

/// The position that a job has stored; `None` for a job without.
pub fn stored_position(job: &Job, direction: Direction) -> Option<Position> {
    job.stored(direction.position()).and_then(Bson::as_document).and_then(Position::from_document)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_validator_that_was_restored_is_the_same() {
        let before = doc! {"collation": {"locale": "en"}, "uuid": 1};
        let after =
            doc! {"validationLevel": "strict", "validationAction": "error", "collation": {"locale": "en"}};
        assert!(same_options(&before, &after));
        assert!(!same_options(&before, &doc! {}));
        assert!(!same_options(&doc! {}, &doc! {"validator": {"a": 1}}));
        assert!(!same_options(
            &doc! {"validator": {"a": 1}},
            &doc! {"validator": {"a": 1}, "validationLevel": "moderate"}
        ));
    }
}
