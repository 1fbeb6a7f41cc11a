//! Copies ranges in parallel, each in one server-side operation.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bson::Document;
use mongodb::options::Hint;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::keep::Keeping;
use super::ranges::{JobRange, RangeState, Ranges};
use super::target::copy_stages;
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result, describe_mongo, joined};
use crate::event::{Events, Progress};
use crate::job::lease::LeaseWatch;
use crate::mongo::Mongo;
use crate::mongo::command::is_transient;

/// Attempts per range; elections and network errors pass.
const ATTEMPTS: u32 = 8;
/// How long a range may go on after the first signal before it is interrupted.
const GRACE: Duration = Duration::from_secs(5);
/// How often progress is looked at.
const TICK: Duration = Duration::from_millis(500);

/// What all workers share.
#[derive(Debug)]
pub struct Copy {
    /// The connection.
    pub mongo: Mongo,
    /// The collection to copy from.
    pub source: Namespace,
    /// The collection to copy to.
    pub target: Namespace,
    /// The condition for valid documents.
    pub valid: Document,
    /// Whether the source has an `_id` index to follow.
    pub hint: bool,
    /// Where the state of ranges is kept.
    pub ranges: Ranges,
    /// Name of the job.
    pub job: String,
    /// Nothing is started once the lease is lost.
    pub lease: LeaseWatch,
    /// Where progress goes.
    pub events: Events,
    /// Cancelled when the run is to end.
    pub stop: CancellationToken,
    /// Documents in the source, for progress.
    pub source_count: u64,
    /// Set where the application writes to the target too: nothing that exists
    /// there is replaced or removed.
    pub keeping: Option<Arc<Keeping>>,
}

/// How copying ended.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Copied {
    /// Every range is done.
    All,
    /// A signal came first.
    Interrupted,
}

impl Copy {
    /// Makes sure that nothing of an interrupted run is left: its operations on
    /// the server are ended and its unfinished ranges emptied.
    ///
    /// # Errors
    /// A stop where that can't be made sure.
    pub async fn clean_up(&self) -> Result<()> {
        let (mut interrupted, mut sessions) = (Vec::new(), Vec::new());
        for range in self.ranges.load().await? {
            if let RangeState::Copying(session) = &range.state {
                sessions.push(session.clone());
                interrupted.push(range);
            }
        }
        self.mongo.end_operations(&sessions).await?;
        for range in &interrupted {
            match self.keeping {
                None => self.empty(range).await?,
                Some(_) => self.ranges.set(range.number, &RangeState::Pending).await?,
            }
        }
        Ok(())
    }

    /// Copies every range that is not done, so many at once.
    ///
    /// # Errors
    /// The first failure; other ranges under way are finished or interrupted
    /// before it is returned.
    pub async fn run(self: Arc<Self>, parallel: usize) -> Result<Copied> {
        let all = self.ranges.load().await?;
        let total = all.len();
        let mut pending: VecDeque<JobRange> =
            all.into_iter().filter(|range| range.state != RangeState::Done).collect();
        let mut workers: JoinSet<Result<Copied>> = JoinSet::new();
        let mut ticks = tokio::time::interval(TICK);
        let mut result = Ok(Copied::All);
        loop {
            while workers.len() < parallel && result.is_ok() && !self.stop.is_cancelled() {
                let Some(range) = pending.pop_front() else { break };
                let copy = self.clone();
                workers.spawn(async move { copy.range(&range).await });
            }
            if workers.is_empty() {
                break;
            }
            tokio::select! {
                Some(done) = workers.join_next() => {
                    let done = joined(done).flatten();
                    result = result.and_then(|so_far| done.map(|copied| so_far.max(copied)));
                }
                _ = ticks.tick() => self.show(total, total - pending.len() - workers.len()).await,
            }
        }
        let copied = result?;
        // What is stored decides, not what we remember.
        let unfinished = self.ranges.load().await?.iter().any(|range| range.state != RangeState::Done);
        Ok(if unfinished { Copied::Interrupted } else { copied })
    }

    async fn range(&self, range: &JobRange) -> Result<Copied> {
        if let Some(keeping) = &self.keeping {
            return self.range_keeping(range, keeping).await;
        }
        for attempt in 1..=ATTEMPTS {
            self.lease.valid().await?;
            let mut operation = self.mongo.operation().await?;
            let session = operation.id();
            self.ranges.set(range.number, &RangeState::Copying(session.clone())).await?;
            let stages = copy_stages(range.range.filter(), self.valid.clone(), &self.target.collection);
            let hint = self.hint.then(|| Hint::Keys(bson::doc! {"_id": 1}));
            let run = self.mongo.run_writing_pipeline(&mut operation, &self.source, stages, hint, &self.job);
            let (result, interrupted) = self.until_stopped(run, &session).await;
            match result {
                Ok(()) => {
                    self.ranges.set(range.number, &RangeState::Done).await?;
                    return Ok(Copied::All);
                }
                // The operation may still run on the server, or have written a part.
                Err(_) if interrupted => {
                    self.reset(range, &session).await?;
                    return Ok(Copied::Interrupted);
                }
                Err(error) if attempt < ATTEMPTS && is_transient(&error) => {
                    let error = describe_mongo(&error);
                    tracing::warn!(error, range = range.number, "the range is emptied and copied again");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    self.reset(range, &session).await?;
                }
                Err(error) => {
                    self.reset(range, &session).await?;
                    return Err(error).during(format!("copying a range of {}", self.source));
                }
            }
        }
        Err(Error::stopped(format!("a range of {} could not be copied", self.source)))
    }

    /// After a signal the range may finish within a moment, else its session is
    /// killed. Either way the operation is awaited.
    async fn until_stopped(
        &self,
        run: impl Future<Output = mongodb::error::Result<()>>,
        session: &Document,
    ) -> (mongodb::error::Result<()>, bool) {
        let mut run = std::pin::pin!(run);
        tokio::select! {
            result = &mut run => return (result, false),
            () = async { self.stop.cancelled().await; tokio::time::sleep(GRACE).await } => {}
        }
        let (killed, result) = tokio::join!(self.mongo.end_operations(std::slice::from_ref(session)), run);
        if let Err(error) = killed {
            tracing::warn!(%error, "the interrupted range could not be ended");
        }
        (result, true)
    }

    async fn reset(&self, range: &JobRange, session: &Document) -> Result<()> {
        self.mongo.end_operations(std::slice::from_ref(session)).await?;
        self.empty(range).await
    }

    /// Emptying runs on a recorded session too: one that outlives its client
    /// would delete what the next one copies.
    async fn empty(&self, range: &JobRange) -> Result<()> {
        for attempt in 1.. {
            self.lease.valid().await?;
            let mut operation = self.mongo.operation().await?;
            let session = operation.id();
            self.ranges.set(range.number, &RangeState::Copying(session.clone())).await?;
            match self.mongo.delete(&mut operation, &self.target, range.range.filter()).await {
                Ok(()) => break,
                Err(error) if attempt < ATTEMPTS && is_transient(&error) => {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    self.mongo.end_operations(&[session]).await?;
                }
                Err(error) => return Err(error).during(format!("emptying a range of {}", self.target)),
            }
        }
        self.ranges.set(range.number, &RangeState::Pending).await
    }

    async fn show(&self, ranges: usize, done: usize) {
        // The server's own count costs nothing; it is good enough for a picture.
        let copied = self.mongo.collection(&self.target).estimated_document_count().await.unwrap_or(0);
        let share = |part: u64| u64::try_from(ranges).map_or(0, |ranges| part / ranges.max(1));
        let done_ranges = u64::try_from(done).unwrap_or(0);
        self.events.progress(Progress {
            phase: "copy".into(),
            unit: "source documents",
            done: share(self.source_count.saturating_mul(done_ranges)),
            total: Some(self.source_count),
            limited_by: Some("database".into()),
            detail: format!(
                "{done} of {ranges} ranges done, {copied} documents in {}",
                self.target.collection
            ),
        });
    }
}
