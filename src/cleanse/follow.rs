//! Following the source: what is touched while the copy runs is marked; after
//! it, what was marked and what is touched from then on is brought up to date.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bson::{Bson, Document, RawBson, Timestamp, doc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ledger::{self, Tally};
use super::marks::Marks;
use crate::config::values::Namespace;
use crate::error::{Class, Error, Result};
use crate::event::{Events, Progress};
use crate::job::Job;
use crate::mongo::Mongo;
use crate::mongo::catch_up::{Applied, CatchUp};
use crate::mongo::feed::{Changes, Feed, Position, nudge};
use crate::throttle::pace::Pace;

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
    /// How fast it may go.
    pub pace: &'a Pace,
    /// What came and went in the source up to the position.
    pub tally: Mutex<Tally>,
}

impl Follower<'_> {
    /// Takes the position from which changes count: before anything is read.
    ///
    /// # Errors
    /// A refusal where this is no replica set.
    pub async fn begin(&self) -> Result<Position> {
        let position = Position::Time(self.mongo.majority_time().await?);
        Marks::of(self.mongo, self.job.name()).clear().await?;
        *self.tally() = Tally::since(position.time());
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
            self.tally().add(&changes.came_or_went, None);
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
                limited_by: Some(self.pace.limited_by().into()),
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
            self.pace.set_idle(changes.touched.is_empty());
            if !self.pace.turn(changes.touched.len() as u64, stop).await {
                // What was read is not applied, so it must be read again.
                feed = self.open(from.clone()).await?;
                continue;
            }
            followed.applied.add(catch_up.apply(&changes.touched, changes.time).await?);
            followed.changes += u64::try_from(changes.touched.len()).unwrap_or(0);
            from.clone_from(feed.position());
            self.tally().add(&changes.came_or_went, None);
            let has_reached = feed.has_reached(goal);
            if !changes.touched.is_empty() || has_reached || saved.elapsed() >= IDLE_SAVE {
                self.save_position(feed.position()).await?;
                saved = Instant::now();
            }
            if has_reached && !for_ever {
                return Ok(true);
            }
            self.show(feed.position(), followed);
        }
        // Stopped: marks may be left, however far the stream was read.
        Ok(false)
    }

    /// Reads what was touched up to that moment, and leaves position and target as
    /// they are. Returns how many changes there were, and the tally up to then.
    ///
    /// # Errors
    /// A stop where the source is no longer what it was or the changes are lost.
    pub async fn look_ahead(&self, from: Position, until: Timestamp) -> Result<(u64, Tally)> {
        let beyond = Timestamp { increment: until.increment + 1, ..until };
        // An idle source says nothing: its feed moves on with other writes only.
        nudge(self.mongo).await?;
        let mut feed = self.open(from).await?;
        let (mut touched, mut tally) = (0, self.tally().clone());
        while !feed.has_reached(beyond) {
            self.job.lease().valid().await?;
            let changes = self.next(&mut feed).await?;
            touched += changes.touched.len() as u64;
            tally.add(&changes.came_or_went, Some(until));
        }
        Ok((touched, tally))
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
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
        let changes = feed.next(self.batch()).await.map_err(|error| error.with_class(Class::Stopped))?;
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
        // Together: what was counted belongs to that position.
        let tally = self.tally().to_document();
        self.job.save(doc! {POSITION: position.to_document(), ledger::TALLY: tally}).await
    }

    fn show(&self, position: &Position, followed: &Followed) {
        let lag = position.time().map(|time| {
            let now = jiff::Timestamp::now().as_second();
            now.saturating_sub(i64::from(time.time)).max(0)
        });
        self.events.progress(Progress {
            phase: "follow".into(),
            unit: "changes",
            done: followed.changes,
            total: None,
            limited_by: Some(self.pace.limited_by().into()),
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
