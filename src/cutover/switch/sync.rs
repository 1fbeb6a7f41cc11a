//! One collection brought up to date from another while others write to both.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use bson::{Document, RawBson, Timestamp, doc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::owned::Ids;
use super::stage::{self, FIELD, session_id};
use crate::cleanse::follow::{Direction, Follower};
use crate::crash;
use crate::error::{Class, Error, Result};
use crate::event::Progress;
use crate::mongo::catch_up::{CatchUp, distinct};
use crate::mongo::feed::{Feed, Position, after, nudge};
use crate::mongo::same_id::key_of_id;
use crate::mongo::sink::{id_bytes, value_bytes};
use crate::mongo::watched::Watched;
use crate::mongo::yielding::{Yielded, Yielding};

/// Changes that are worked on at once.
const BATCH: usize = 500;
/// Bytes of the documents of one transaction.
const MOST_BYTES: usize = 12 * 1024 * 1024;
/// Rounds in which a batch yields to others before it is given up.
const ROUNDS: u32 = 60;
/// Rounds without a pause between them.
const EAGER: u32 = 3;
/// Between later rounds.
const PAUSE: Duration = Duration::from_millis(100);
/// Both sides are looked at this often where nothing changes.
const IDLE: Duration = Duration::from_secs(1);

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    /// Changes by others that were seen.
    pub changes: u64,
    /// Documents written.
    pub written: u64,
    /// Documents removed, or not there.
    pub removed: u64,
}

/// Brings the one side up to date.
pub struct Sync<'a> {
    pub(super) follower: &'a Follower<'a>,
    pub(super) reader: CatchUp,
    writer: Yielding,
    /// The changes of the side that is followed.
    feed: Feed,
    /// The changes of the side that is written to.
    answers: Feed,
    ours: HashSet<Vec<u8>>,
    /// What belongs to the side that is written to.
    pub owned: Ids,
    /// What both sides tell differently.
    pub conflicts: Ids,
    committed: Option<Timestamp>,
    saved: Instant,
    /// What was done so far.
    pub done: Done,
}

/// What became of documents that were to be brought along.
enum Brought {
    All,
    /// Somebody has written to one of them.
    Newer,
    /// They are too large for one transaction.
    TooLarge,
    /// One of them has unique values that these others have.
    Blocked(RawBson, Vec<RawBson>),
}

impl<'a> Sync<'a> {
    /// Goes on from the positions of the job, in the direction of the follower.
    ///
    /// # Errors
    /// A refusal where the oplog no longer holds what comes next; a stop where what
    /// an earlier run has begun can't be ended.
    pub async fn of(follower: &'a Follower<'a>, stored: &Document) -> Result<Self> {
        let (mongo, job) = (follower.mongo, follower.job);
        let (source, target, direction) = (follower.source, follower.target, follower.direction);
        let earlier = stage::sessions(stored);
        let right = job.right(mongo);
        let writer = Yielding::to(right.lane("switch").await?, target);
        let sessions: Vec<Document> = earlier.into_iter().chain([writer.session()]).collect();
        let ours = sessions.iter().filter_map(session_id).collect();
        // Before the first write: its events must be known as ours after a crash, too.
        job.save(doc! {format!("{FIELD}.sessions"): sessions}).await?;
        crash::point("switch_session_stored");
        let from = position(stored, direction)?;
        let back = position(stored, opposite(direction))?;
        let reader = right.lane("switch_reader").await?;
        let reader = CatchUp::new(reader, source, target, follower.valid.clone(), job.name());
        Ok(Self {
            reader: reader.only_between(mongo.identities(source, target).await?),
            writer,
            feed: mongo.feed(&follower.watched(), from).await?,
            answers: mongo.prompt_feed(&Watched::only(target), back).await?,
            ours,
            owned: Ids::owned(mongo, job.name(), direction),
            conflicts: Ids::conflicts(mongo, job.name(), direction),
            committed: None,
            saved: Instant::now(),
            done: Done::default(),
            follower,
        })
    }

    /// Brings along what others write, until the followed side was quiet for that
    /// long or `stop`; returns whether it was quiet.
    ///
    /// # Errors
    /// A stop where a document can't be brought along or one of the collections is
    /// no longer what it was.
    pub async fn run(&mut self, quiet_for: Option<Duration>, stop: &CancellationToken) -> Result<bool> {
        let mut quiet_since = Instant::now();
        let mut looked = Instant::now();
        while !stop.is_cancelled() {
            self.follower.pace.free(stop).await;
            if self.step(stop).await? {
                quiet_since = Instant::now();
            } else if looked.elapsed() > IDLE {
                looked = Instant::now();
                self.look().await?;
                self.save().await?;
            }
            self.show(quiet_since);
            if quiet_for.is_some_and(|time| quiet_since.elapsed() >= time) {
                if self.is_level(stop).await? {
                    self.look().await?;
                    self.save().await?;
                    return Ok(true);
                }
                quiet_since = Instant::now();
            }
        }
        self.save().await?;
        Ok(false)
    }

    /// Works off the next changes; returns whether there were any by others.
    async fn step(&mut self, stop: &CancellationToken) -> Result<bool> {
        self.follower.job.lease().valid().await?;
        let changes = self.feed.next(BATCH).await.map_err(|error| error.with_class(Class::Stopped))?;
        self.follower.check(&changes).await?;
        let touched = changes.by_others(&self.ours);
        if touched.is_empty() {
            return Ok(false);
        }
        self.follower.pace.turn(touched.len() as u64, stop).await;
        self.bring(&touched, changes.time).await?;
        crash::point("switch_applied");
        self.done.changes += touched.len() as u64;
        self.save().await?;
        Ok(true)
    }

    /// Whether everything was seen that was written to the followed side before
    /// this call, and nothing of it was by others.
    async fn is_level(&mut self, stop: &CancellationToken) -> Result<bool> {
        let beyond = after(self.follower.mongo.last_write_time().await?);
        nudge(self.follower.mongo).await?;
        while !self.feed.has_reached(beyond) {
            if stop.is_cancelled() || self.step(stop).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Brings these documents to the state that they have now or later, at least
    /// that of `time`, where they do not belong to the other side.
    ///
    /// # Errors
    /// A stop where that does not succeed.
    pub async fn bring(&mut self, ids: &[RawBson], time: Option<Timestamp>) -> Result<()> {
        let mut parts = VecDeque::from([distinct(ids)]);
        while let Some(part) = parts.pop_front() {
            if let Some((one, other)) = self.bring_part(part, time).await? {
                parts.extend([one, other]);
            }
        }
        Ok(())
    }

    /// Brings along what fits into one transaction; returns two halves where it does not.
    async fn bring_part(
        &mut self,
        mut open: Vec<RawBson>,
        time: Option<Timestamp>,
    ) -> Result<Option<(Vec<RawBson>, Vec<RawBson>)>> {
        let mut replaces = false;
        for round in 0..ROUNDS {
            if round >= EAGER {
                tokio::time::sleep(PAUSE).await;
            }
            self.follower.job.lease().valid().await?;
            let moment = self.look().await?;
            let (owned, free) = self.owned.part(open).await?;
            self.contest(&owned).await?;
            if free.is_empty() {
                return Ok(None);
            }
            match self.write(moment, &free, time, replaces).await? {
                Brought::All => return Ok(None),
                Brought::Newer => open = free,
                Brought::TooLarge => {
                    let (one, other) = free.split_at(free.len() / 2);
                    return Ok(Some((one.to_vec(), other.to_vec())));
                }
                Brought::Blocked(blocked, others) => {
                    open = free;
                    if self.may_replace(&others).await? {
                        // Both are ours to write: at once, so that nobody misses one.
                        open = distinct(&open.into_iter().chain(others).collect::<Vec<_>>());
                        replaces = true;
                    } else {
                        self.conflicts.add(std::slice::from_ref(&blocked)).await?;
                        let blocked = key_of_id(&blocked);
                        open.retain(|id| key_of_id(id) != blocked);
                    }
                }
            }
            if open.is_empty() {
                return Ok(None);
            }
        }
        Err(Error::stopped(format!(
            "{} documents could not be brought to {}: others write to them without a pause",
            open.len(),
            self.follower.target
        ))
        .hint("start the same command again"))
    }

    /// Whether documents that stand in the way of another one may be written anew
    /// together with it.
    async fn may_replace(&mut self, ids: &[RawBson]) -> Result<bool> {
        self.look().await?;
        let (owned, free) = self.owned.part(ids.to_vec()).await?;
        if !owned.is_empty() || self.follower.direction == Direction::Forward {
            return Ok(owned.is_empty());
        }
        // What the rules had rejected is nowhere but in the old collection.
        let known = self.reader.read(&free, None).await?;
        Ok(known.len() == free.len())
    }

    async fn write(
        &mut self,
        moment: Timestamp,
        ids: &[RawBson],
        time: Option<Timestamp>,
        replaces: bool,
    ) -> Result<Brought> {
        let read = self.reader.read_within(MOST_BYTES, ids, time).await?;
        if !read.is_all && ids.len() > 1 {
            return Ok(Brought::TooLarge);
        }
        let documents = read.documents;
        let valid: HashSet<Vec<u8>> = documents.iter().filter_map(|document| id_bytes(document)).collect();
        let is_gone = |id: &&RawBson| !valid.contains(&value_bytes(id.as_raw_bson_ref()));
        let removed: Vec<RawBson> =
            if replaces { ids.to_vec() } else { ids.iter().filter(is_gone).cloned().collect() };
        match self.writer.write(moment, &removed, &documents).await? {
            Yielded::Done(at) => {
                self.committed = Some(at);
                self.done.written += documents.len() as u64;
                self.done.removed += ids.iter().filter(is_gone).count() as u64;
                Ok(Brought::All)
            }
            Yielded::Newer => Ok(Brought::Newer),
            Yielded::Taken { index, values } => {
                let id = documents.get(index).and_then(|document| document.get("_id").ok().flatten());
                let holders = self.reader.holders(&values).await?;
                Ok(match id {
                    Some(id) if !holders.is_empty() => Brought::Blocked(id.into(), holders),
                    // Gone meanwhile.
                    _ => Brought::Newer,
                })
            }
        }
    }

    /// Notes who else has written to the other side up to now; returns a moment up
    /// to which that is complete.
    ///
    /// # Errors
    /// A stop where the other side is no longer what it was.
    pub async fn look(&mut self) -> Result<Timestamp> {
        let now = self.follower.mongo.last_write_time().await?;
        let goal = self.committed.map_or(now, |at| later(at, now));
        let beyond = after(goal);
        nudge(self.follower.mongo).await?;
        while !self.answers.has_reached(beyond) {
            self.follower.job.lease().valid().await?;
            let changes = self.answers.next(BATCH).await.map_err(|error| error.with_class(Class::Stopped))?;
            if let Some(ended) = &changes.ended_by {
                return Err(Error::stopped(format!(
                    "{} is no longer what it was: {}",
                    self.follower.target, ended.event
                )));
            }
            let others = distinct(&changes.by_others(&self.ours));
            if !others.is_empty() {
                self.owned.add(&others).await?;
                crash::point("switch_owned");
            }
        }
        let time = self.answers.position().time();
        // Of the very last moment not everything may have been delivered.
        time.map(before).ok_or_else(|| Error::stopped("a change stream does not tell its time"))
    }

    /// Stores how far both sides were followed: never before what that stands for.
    async fn save(&mut self) -> Result<()> {
        let direction = self.follower.direction;
        self.saved = Instant::now();
        let fields = doc! {
            direction.position(): self.feed.position().to_document(),
            opposite(direction).position(): self.answers.position().to_document(),
        };
        self.follower.job.save(fields).await?;
        crash::point("switch_position_saved");
        Ok(())
    }

    fn show(&self, quiet_since: Instant) {
        let Done { changes, written, removed } = self.done;
        let quiet = quiet_since.elapsed().as_secs();
        self.follower.events.progress(Progress {
            phase: "switch".into(),
            unit: "changes",
            done: changes,
            total: None,
            limited_by: Some(self.follower.pace.limited_by().into()),
            detail: format!(
                "{written} written and {removed} removed in {}; {} quiet for {quiet} s",
                self.follower.target, self.follower.source
            ),
        });
    }
}

impl std::fmt::Debug for Sync<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Sync").field("done", &self.done).finish_non_exhaustive()
    }
}

/// The other direction.
pub fn opposite(direction: Direction) -> Direction {
    match direction {
        Direction::Forward => Direction::Back,
        Direction::Back => Direction::Forward,
    }
}

fn position(stored: &Document, direction: Direction) -> Result<Position> {
    let field = direction.position();
    stored.get_document(field).ok().and_then(Position::from_document).ok_or_else(|| {
        Error::refused(format!("the job does not tell from where a collection is to be followed ({field})"))
            .hint("copy anew with `cleanse --restart`")
    })
}

fn later(one: Timestamp, other: Timestamp) -> Timestamp {
    if (one.time, one.increment) > (other.time, other.increment) { one } else { other }
}

/// The moment before.
fn before(time: Timestamp) -> Timestamp {
    match time.increment.checked_sub(1) {
        Some(increment) => Timestamp { increment, ..time },
        None => Timestamp { time: time.time.saturating_sub(1), increment: u32::MAX },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_moment_before_may_be_of_the_second_before() {
        let time = |time, increment| Timestamp { time, increment };
        assert_eq!(before(time(5, 2)), time(5, 1));
        assert_eq!(before(time(5, 0)), time(4, u32::MAX));
        assert_eq!(later(time(5, 2), time(4, 9)), time(5, 2));
    }
}
