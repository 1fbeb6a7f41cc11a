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
use crate::crash;
use crate::error::{Class, Error, Result};
use crate::event::{Events, Progress};
use crate::job::Job;
use crate::mongo::Mongo;
use crate::mongo::catch_up::Applied;
use crate::mongo::catch_up::quarantine::Quarantine;
use crate::mongo::exchange::Validation;
use crate::mongo::feed::{Changes, Feed, Position, after, nudge};
use crate::mongo::lanes::Lanes;
use crate::mongo::oplog::MOST_COUNTED;
use crate::mongo::valid::Valid;
use crate::mongo::watched::Watched;
use crate::throttle::pace::Pace;

/// Changes that are worked on at once.
const BATCH: usize = 4_000;
/// Changes that are marked at once.
const MARKS: usize = 1_000;
/// Documents are brought up to date by so many side by side.
const LANES: usize = 4;
/// Progress is shown this often: it asks the server how far behind the target is.
const SHOWN: Duration = Duration::from_secs(2);
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

    /// What the lanes of the writes are called.
    fn lane(self) -> &'static str {
        match self {
            Self::Forward => "catch_up",
            Self::Back => "feed_back",
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
    /// What makes a document valid.
    pub valid: Valid,
    /// Where rejected documents go, if they are kept.
    pub rejected: Option<Quarantine>,
    /// Where the job keeps the position.
    pub direction: Direction,
    /// The options that the source must keep; `None` where they are not known.
    pub options: Option<Document>,
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
        self.forget_affected().await?;
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
        let mut may_rest = true;
        while !copied.is_cancelled() {
            self.job.lease().valid().await?;
            let changes = self.checked(feed.next(MARKS).await).await?;
            if changes.is_empty() && may_rest {
                // Reading on would cost the server as much again as half of the copy.
                may_rest = no_refusal(feed.rest(IDLE_SAVE, copied).await)?;
            }
            marks.set(&changes.touched).await?;
            self.note_members(&changes.members).await?;
            crash::point("marks_set");
            self.tally().add(&changes.came_or_went, None);
            // Never before the marks: what it stands for must be remembered.
            if !changes.is_empty() || saved.elapsed() >= IDLE_SAVE {
                self.save_position(feed.position()).await?;
                saved = Instant::now();
                crash::point("marks_position_saved");
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
        let beyond = after(goal);
        // An idle source says nothing: its feed moves on with other writes only.
        nudge(self.mongo).await?;
        let mut feed = self.open(position.clone()).await?;
        while !stop.is_cancelled() {
            self.job.lease().valid().await?;
            let changes = self.checked(feed.next(MARKS).await).await?;
            marks.set(&changes.touched).await?;
            self.tally().add(&changes.came_or_went, None);
            position.clone_from(feed.position());
            self.save_position(position).await?;
            if feed.has_reached(beyond) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Works off all marks; `from` moves on where nothing may be applied for a while.
    ///
    /// # Errors
    /// A stop where a document can't be brought up to date.
    pub async fn work_off_marks(
        &self,
        catch_up: &mut Lanes,
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
            if !self.work_off_members(catch_up, from.time(), stop, followed).await? {
                continue;
            }
            let some = marks.some(i64::try_from(self.batch()).unwrap_or(i64::MAX)).await?;
            if some.is_empty() {
                return Ok(());
            }
            if !self.pace.turn(some.len() as u64, stop).await {
                continue;
            }
            let ids: Vec<RawBson> = some.iter().map(|mark| mark.id.clone()).collect();
            followed.applied.add(self.apply(catch_up, &ids, from.time()).await?);
            self.pace.count_applied(some.len());
            crash::point("marks_applied");
            marks.remove(&some).await?;
            crash::point("marks_removed");
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
        catch_up: &mut Lanes,
        from: &mut Position,
        for_ever: bool,
        stop: &CancellationToken,
        followed: &mut Followed,
    ) -> Result<bool> {
        // What a run has left that was killed, or ended while nothing might be applied.
        self.work_off_marks(catch_up, from, stop, followed).await?;
        crash::point("drain_begins");
        // A transaction's changes are all of one moment: one moment later they have all been told.
        let beyond = after(self.mongo.last_write_time().await?);
        // An idle source says nothing: its feed moves on with other writes only.
        nudge(self.mongo).await?;
        let mut batch = self.batch();
        // The oplog may have been long enough for all that was done before.
        let feed = if for_ever { self.reopen(from).await? } else { self.open(from.clone()).await? };
        let mut feed = feed.ahead(batch);
        let (mut saved, mut shown) = (Instant::now(), None);
        while !stop.is_cancelled() {
            if self.pace.held_by().is_some() || self.batch() != batch {
                self.work_off_marks(catch_up, from, stop, followed).await?;
                batch = self.batch();
                feed = self.reopen(from).await?.ahead(batch);
                continue;
            }
            let changes = self.checked(feed.next().await).await?;
            self.pace.set_idle(changes.is_empty());
            if !self.pace.turn(changes.len() as u64, stop).await {
                // What was read is not applied, so it must be read again.
                feed = self.reopen(from).await?.ahead(batch);
                continue;
            }
            self.job.lease().valid().await?;
            followed.applied.add(self.apply(catch_up, &changes.touched, changes.time).await?);
            let Some(applied) = self.bring_members(catch_up, &changes.members, changes.time, stop).await?
            else {
                feed = self.reopen(from).await?.ahead(batch);
                continue;
            };
            followed.applied.add(applied);
            self.pace.count_applied(changes.len());
            crash::point("changes_applied");
            followed.changes += u64::try_from(changes.len()).unwrap_or(0);
            from.clone_from(feed.position());
            self.tally().add(&changes.came_or_went, None);
            let has_reached = feed.has_reached(beyond);
            if !changes.is_empty() || has_reached || saved.elapsed() >= IDLE_SAVE {
                self.save_position(feed.position()).await?;
                saved = Instant::now();
                crash::point("changes_position_saved");
            }
            if has_reached && !for_ever {
                return Ok(true);
            }
            if shown.is_none_or(|shown: Instant| shown.elapsed() >= SHOWN) {
                shown = Some(Instant::now());
                self.show(feed.position(), followed).await;
            }
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
        let beyond = after(until);
        // An idle source says nothing: its feed moves on with other writes only.
        nudge(self.mongo).await?;
        let mut feed = self.open(from).await?;
        let (mut touched, mut tally) = (0, self.tally().clone());
        while !feed.has_reached(beyond) {
            self.job.lease().valid().await?;
            let changes = self.checked(feed.next(BATCH).await).await?;
            touched += changes.len() as u64;
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
        *from = no_refusal(marked)?;
        Ok(())
    }

    /// Changes to work on at once: with a limit no more than a second's.
    fn batch(&self) -> usize {
        match usize::try_from(self.pace.rate()) {
            Ok(0) | Err(_) => BATCH,
            Ok(rate) => rate.min(BATCH),
        }
    }

    /// The lanes of the writes.
    ///
    /// # Errors
    /// A stop where they can't be opened.
    pub async fn catch_up(&self) -> Result<Lanes> {
        let right = self.job.right(self.mongo);
        let mut lanes = Vec::new();
        for number in 0..Lanes::count(&self.valid, LANES) {
            lanes.push(right.lane(&format!("{}_{number}", self.direction.lane())).await?);
        }
        let source = self.mongo.describe(self.source).await?;
        let has_collation = source.is_some_and(|source| source.collation().is_some());
        let lanes = Lanes::new(lanes, self.source, self.target, &self.valid, has_collation, self.job.name());
        let identities = self.mongo.identities(self.source, self.target).await?;
        let mut lanes = lanes.only_between(&identities);
        if let Some(rejected) = &self.rejected {
            lanes = lanes.with_quarantine(rejected).await?;
        }
        crash::point("lanes_opened");
        Ok(lanes)
    }

    /// What is followed: the source, and what decides about its documents.
    pub fn watched(&self) -> Watched {
        Watched { source: self.source.clone(), memberships: self.valid.memberships.clone() }
    }

    async fn open(&self, from: Position) -> Result<Feed> {
        self.mongo.feed(&self.watched(), from).await
    }

    async fn reopen(&self, from: &Position) -> Result<Feed> {
        no_refusal(self.open(from.clone()).await)
    }

    async fn checked(&self, changes: Result<Changes>) -> Result<Changes> {
        let changes = no_refusal(changes)?;
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
            Validation::of(&found.options).is_refusing() || same_options(expected, &found.options)
        }))
    }

    /// Stores how far the source is followed.
    ///
    /// # Errors
    /// A stop where the lease is lost or the job can't be written.
    pub async fn save_position(&self, position: &Position) -> Result<()> {
        let mut fields = doc! {self.direction.position(): position.to_document()};
        if self.direction == Direction::Forward {
            // Together: what was counted belongs to that position.
            fields.insert(ledger::TALLY, self.tally().to_document());
        }
        self.job.save(fields).await
    }

    async fn show(&self, position: &Position, followed: &Followed) {
        let lag = match position.time() {
            Some(time) => Some((seconds_since(time), self.mongo.changes_after(self.source, time).await)),
            None => None,
        };
        self.events.progress(Progress {
            phase: "follow".into(),
            unit: "changes",
            done: followed.changes,
            total: None,
            limited_by: Some(self.pace.limited_by().into()),
            detail: format!(
                "{} written, {} removed{}",
                followed.applied.written,
                followed.applied.removed,
                lag.map_or(String::new(), |(seconds, changes)| behind(seconds, changes))
            ),
        });
    }
}

/// What was possible at the start and no longer is, is no refusal any more.
fn no_refusal<T>(result: Result<T>) -> Result<T> {
    result.map_err(|error| error.with_class(Class::Stopped))
}

fn seconds_since(time: Timestamp) -> i64 {
    jiff::Timestamp::now().as_second().saturating_sub(i64::from(time.time)).max(0)
}

/// How far behind the target is, in time and changes where they are known. Pure.
fn behind(seconds: i64, changes: Option<u64>) -> String {
    match changes {
        Some(changes) if changes >= u64::from(MOST_COUNTED) => {
            format!(", {MOST_COUNTED} changes or more and {seconds} s behind")
        }
        Some(changes) => format!(", {changes} changes and {seconds} s behind"),
        None => format!(", {seconds} s behind"),
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
    fn the_lag_is_told_in_changes_and_seconds() {
        assert_eq!(behind(3, Some(12)), ", 12 changes and 3 s behind");
        assert_eq!(behind(3, Some(10_000)), ", 10000 changes or more and 3 s behind");
        assert_eq!(behind(3, None), ", 3 s behind");
    }

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
