//! A collection kept in step with another one, closely: what is left to do when
//! writes are held off must be little.

use std::time::Duration;

use bson::{RawBson, Timestamp};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cleanse::follow::{Followed, Follower};
use crate::clock::Deadline;
use crate::config::values::Namespace;
use crate::error::{Class, Error, Result};
use crate::mongo::feed::{Ended, Feed, Position, after, nudge};
use crate::mongo::lanes::Lanes;

/// Changes that are worked on at once.
const BATCH: usize = 500;
/// Stored this often on the way: a crash repeats no more than that.
const SAVE: Duration = Duration::from_secs(1);

/// Keeps step.
pub struct InStep<'a> {
    /// Knows both collections.
    pub follower: &'a Follower<'a>,
    catch_up: Lanes,
    feed: Feed,
    saved: Instant,
    /// What was done so far.
    pub followed: Followed,
}

/// What came after everything was brought along, until the names were exchanged.
#[derive(Debug, Default)]
pub struct LastMoment {
    /// `_id`s of touched documents.
    pub touched: Vec<RawBson>,
    /// Those that were written, not deleted.
    pub written: Vec<RawBson>,
    /// What ended the collection under its name.
    pub ended: Option<Ended>,
}

impl<'a> InStep<'a> {
    /// Goes on from a position.
    ///
    /// # Errors
    /// A refusal where the oplog no longer holds what comes next.
    pub async fn from(
        follower: &'a Follower<'a>,
        position: Position,
        stop: &CancellationToken,
    ) -> Result<Self> {
        let mut catch_up = follower.catch_up().await?;
        let (mut position, mut followed) = (position, Followed::default());
        // What an earlier run has left.
        follower.work_off_marks(&mut catch_up, &mut position, stop, &mut followed).await?;
        let feed = follower.mongo.prompt_feed(&follower.watched(), position).await?;
        Ok(Self { follower, catch_up, feed, saved: Instant::now(), followed })
    }

    /// Brings along everything up to that moment; false where `stop` or the
    /// deadline came first.
    ///
    /// # Errors
    /// A stop where a document can't be brought up to date or the source is no
    /// longer what it was.
    pub(crate) async fn reach(
        &mut self,
        goal: Timestamp,
        deadline: Option<Deadline>,
        stop: &CancellationToken,
    ) -> Result<bool> {
        while !self.feed.has_reached(goal) {
            if stop.is_cancelled() || deadline.is_some_and(Deadline::has_passed) {
                return Ok(false);
            }
            self.step().await?;
        }
        Ok(true)
    }

    /// Brings along everything that was written before this call; returns how
    /// long that took, or nothing where `stop` came first.
    ///
    /// # Errors
    /// A stop where a document can't be brought up to date or the source is no longer what it was.
    pub async fn draw_level(&mut self, stop: &CancellationToken) -> Result<Option<Duration>> {
        let begun = Instant::now();
        let beyond = after(self.follower.mongo.last_write_time().await?);
        // An idle source says nothing: its feed moves on with other writes only.
        nudge(self.follower.mongo).await?;
        Ok(self.reach(beyond, None, stop).await?.then(|| begun.elapsed()))
    }

    /// Keeps step until `halt`.
    ///
    /// # Errors
    /// A stop where a document can't be brought up to date or the source is no longer what it was.
    pub async fn keep(&mut self, halt: &CancellationToken) -> Result<()> {
        while !halt.is_cancelled() {
            self.step().await?;
        }
        Ok(())
    }

    async fn step(&mut self) -> Result<()> {
        self.follower.job.lease().valid().await?;
        let changes = self.feed.next(BATCH).await.map_err(|error| error.with_class(Class::Stopped))?;
        self.follower.check(&changes).await?;
        self.followed
            .applied
            .add(self.follower.apply(&mut self.catch_up, &changes.touched, changes.time).await?);
        let never = CancellationToken::new();
        let members =
            self.follower.bring_members(&mut self.catch_up, &changes.members, changes.time, &never).await?;
        let members = members.ok_or_else(|| {
            Error::stopped("the job is paused, so that nothing can be brought along")
                .hint("`mongorekey control JOB resume`, then start again")
        })?;
        self.followed.applied.add(members);
        self.followed.changes += u64::try_from(changes.touched.len()).unwrap_or(0);
        if self.saved.elapsed() >= SAVE {
            self.follower.save_position(self.feed.position()).await?;
            self.saved = Instant::now();
        }
        Ok(())
    }

    /// Goes on writing to the target, which has another name by now.
    pub fn retarget(&mut self, name: &Namespace) {
        self.catch_up.retarget(name);
    }

    /// From where one has to go on.
    pub fn position(&self) -> &Position {
        self.feed.position()
    }

    /// What came until the end of the collection under its name.
    ///
    /// # Errors
    /// A stop where that end does not come.
    pub async fn last_moment(&mut self) -> Result<LastMoment> {
        last_moment(&mut self.feed).await
    }
}

/// Reads a feed up to the end of its collection.
///
/// # Errors
/// A stop where that end does not come.
pub async fn last_moment(feed: &mut Feed) -> Result<LastMoment> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut last = LastMoment::default();
    while last.ended.is_none() {
        if Instant::now() > deadline {
            return Err(Error::stopped("the change stream does not tell of the rename")
                .hint("start `cutover` again to finish"));
        }
        let changes = feed.next(BATCH).await?;
        last.touched.extend(changes.touched);
        last.written.extend(changes.written);
        last.ended = changes.ended_by;
    }
    Ok(last)
}

impl std::fmt::Debug for InStep<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("InStep").field("followed", &self.followed).finish_non_exhaustive()
    }
}
