//! Following the source: what is touched while the copy runs is marked; after
//! it, what was marked and what is touched from then on is brought up to date.

use std::time::Duration;

use bson::{Bson, Document, RawBson, Timestamp, doc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::marks::Marks;
use crate::config::values::Namespace;
use crate::error::{Class, Error, Result};
use crate::event::{Events, Progress};
use crate::job::Job;
use crate::mongo::Mongo;
use crate::mongo::catch_up::{Applied, CatchUp};
use crate::mongo::feed::{Changes, Feed, Position, nudge};

/// Changes that are worked on at once.
const BATCH: usize = 1_000;
/// The position is stored this often where nothing changes, or the oplog would
/// outrun it.
const IDLE_SAVE: Duration = Duration::from_secs(10);
/// The field of the job document with the position in the change stream.
pub const POSITION: &str = "feed";
/// The field with the session of the writes.
const SESSION: &str = "catch_up_session";

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
    /// Where progress goes.
    pub events: &'a Events,
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

    /// Marks what was touched up to a moment, and moves the position on; returns
    /// whether it got that far.
    ///
    /// # Errors
    /// A stop where the source is no longer what it was or the changes are lost.
    pub async fn mark_up_to(
        &self,
        goal: Timestamp,
        position: &mut Position,
        stop: &CancellationToken,
    ) -> Result<bool> {
        let marks = Marks::of(self.mongo, self.job.name());
        // An idle source says nothing: its feed moves on with other writes only.
        nudge(self.mongo).await?;
        let mut feed = self.open(position.clone()).await?;
        while !stop.is_cancelled() {
            self.job.lease().valid().await?;
            let changes = self.next(&mut feed).await?;
            marks.set(&changes.touched).await?;
            position.clone_from(feed.position());
            self.save_position(position).await?;
            if feed.has_reached(goal) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Works off all marks.
    ///
    /// # Errors
    /// A stop where a document can't be brought up to date.
    pub async fn work_off_marks(
        &self,
        catch_up: &mut CatchUp,
        after: Option<Timestamp>,
        stop: &CancellationToken,
        followed: &mut Followed,
    ) -> Result<()> {
        let marks = Marks::of(self.mongo, self.job.name());
        let total = marks.count().await?;
        let mut done = 0;
        while !stop.is_cancelled() {
            self.job.lease().valid().await?;
            let some = marks.some(i64::try_from(BATCH).unwrap_or(i64::MAX)).await?;
            if some.is_empty() {
                return Ok(());
            }
            let ids: Vec<RawBson> = some.iter().map(|mark| mark.id.clone()).collect();
            followed.applied.add(catch_up.apply(&ids, after).await?);
            marks.remove(&some).await?;
            done += u64::try_from(some.len()).unwrap_or(0);
            followed.changes += u64::try_from(some.len()).unwrap_or(0);
            self.events.progress(Progress {
                phase: "catch-up".into(),
                unit: "documents",
                done,
                total: Some(total.max(done)),
                limited_by: Some("database".into()),
                detail: "touched during the copy".into(),
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
        let goal = self.mongo.last_write_time().await?;
        // An idle source says nothing: its feed moves on with other writes only.
        nudge(self.mongo).await?;
        let mut feed = self.open(from.clone()).await?;
        let mut saved = Instant::now();
        while !stop.is_cancelled() {
            self.job.lease().valid().await?;
            let changes = self.next(&mut feed).await?;
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

    /// A session for the writes, stored before the first one, after what still
    /// runs on that of an earlier holder was ended.
    ///
    /// # Errors
    /// A stop where that can't be made sure.
    pub async fn catch_up(&self) -> Result<CatchUp> {
        if let Some(Bson::Document(session)) = self.job.stored(SESSION) {
            self.mongo.end_operations(std::slice::from_ref(session)).await?;
        }
        let catch_up = CatchUp::new(self.mongo, self.source, self.target, self.valid.clone()).await?;
        self.job.save(doc! {SESSION: catch_up.session()}).await?;
        Ok(catch_up)
    }

    async fn open(&self, from: Position) -> Result<Feed> {
        self.mongo.feed(self.source, from).await
    }

    async fn next(&self, feed: &mut Feed) -> Result<Changes> {
        // What was possible at the start and no longer is, is no refusal any more.
        let changes = feed.next(BATCH).await.map_err(|error| error.with_class(Class::Stopped))?;
        match &changes.ended_by {
            Some(event) => Err(Error::stopped(format!(
                "{} is no longer what it was: {event}. The target is as of the moment before",
                self.source
            ))
            .hint("look at what was done to the source; copy anew with --restart")),
            None => Ok(changes),
        }
    }

    async fn save_position(&self, position: &Position) -> Result<()> {
        self.job.save(doc! {POSITION: position.to_document()}).await
    }

    fn show(&self, changes: &Changes, position: &Position, followed: &Followed) {
        let lag = position.time().map(|time| {
            let now = jiff::Timestamp::now().as_second();
            now.saturating_sub(i64::from(time.time)).max(0)
        });
        let waiting = if changes.touched.len() >= BATCH { "database" } else { "source" };
        self.events.progress(Progress {
            phase: "follow".into(),
            unit: "changes",
            done: followed.changes,
            total: None,
            limited_by: Some(waiting.into()),
            detail: format!(
                "{} written, {} removed, {} s behind",
                followed.applied.written,
                followed.applied.removed,
                lag.unwrap_or(0)
            ),
        });
    }
}

/// The position that a job has stored; `None` for a job without.
pub fn stored_position(job: &Job) -> Option<Position> {
    job.stored(POSITION).and_then(Bson::as_document).and_then(Position::from_document)
}
