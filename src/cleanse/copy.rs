//! Copies ranges in parallel, each in one server-side operation.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bson::{Bson, Document};
use mongodb::options::Hint;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::keep::Keeping;
use super::quarantine::{self, Existing, Form};
use super::ranges::{JobRange, RangeState, Ranges};
use super::target::copy_stages;
use crate::config::values::Namespace;
use crate::crash;
use crate::error::{Context, Error, Result, describe_mongo, joined};
use crate::event::{Events, Progress};
use crate::job::lanes::Pool;
use crate::job::lease::LeaseWatch;
use crate::mongo::Mongo;
use crate::mongo::catch_up::quarantine::Quarantine;
use crate::mongo::command::is_transient;
use crate::mongo::door;
use crate::mongo::lane::Lane;
use crate::mongo::operation::Operation;
use crate::mongo::range::Range;
use crate::mongo::valid::Valid;
use crate::throttle::pace::Pace;

/// Attempts per range; elections and network errors pass.
const ATTEMPTS: u32 = 8;
/// Documents that are deleted at once where a range is emptied.
const EMPTIED_AT_ONCE: u64 = 20_000;
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
    /// What makes a document valid. Of a group all candidates are copied.
    pub valid: Valid,
    /// Where rejected documents go, if they are kept.
    pub rejected: Option<Quarantine>,
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
    /// How fast it may go.
    pub pace: Arc<Pace>,
    /// Ranges at once.
    pub parallel: usize,
    /// Average size of a document; 0 where it is not known.
    pub average_bytes: u64,
    /// About how many documents a range has.
    pub documents_per_range: u64,
    /// Documents in the source, for progress.
    pub source_count: u64,
    /// Set where the application writes to the target too: nothing that exists
    /// there is replaced or removed.
    pub keeping: Option<Arc<Keeping>>,
    /// What writes of its own go by, emptying included.
    pub lanes: Pool,
}

/// How copying ended.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Copied {
    /// Every range is done.
    All,
    /// Everything is copied, but what was written meanwhile is not.
    Touched,
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

    /// How many ranges are not done, of how many.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn pending(&self) -> Result<(usize, usize)> {
        let ranges = self.ranges.load().await?;
        let pending = ranges.iter().filter(|range| range.state != RangeState::Done).count();
        Ok((pending, ranges.len()))
    }

    /// Documents of the source per second, where so many ranges took so long.
    pub fn rate(&self, (pending, all): (usize, usize), took: Duration) -> f64 {
        let share = pending as f64 / all.max(1) as f64;
        self.source_count as f64 * share / took.as_secs_f64().max(0.001)
    }

    /// Copies every range that is not done, so many at once.
    ///
    /// # Errors
    /// The first failure; other ranges under way are finished or interrupted
    /// before it is returned.
    pub async fn run(self: Arc<Self>) -> Result<Copied> {
        let all = self.ranges.load_whole().await?;
        let total = all.len();
        let mut pending: VecDeque<JobRange> =
            all.into_iter().filter(|range| range.state != RangeState::Done).collect();
        let mut workers: JoinSet<Result<Copied>> = JoinSet::new();
        let mut ticks = tokio::time::interval(TICK);
        let mut result = Ok(Copied::All);
        loop {
            while workers.len() < self.parallel && result.is_ok() && !self.stop.is_cancelled() {
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

    /// Copies what is left of a range, in pieces where it is not to be too fast.
    async fn range(&self, range: &JobRange) -> Result<Copied> {
        if let Some(keeping) = &self.keeping {
            return self.range_keeping(range, keeping).await;
        }
        let mut left = range.clone();
        while let Some(end) = self.next_piece(&left).await? {
            let range =
                Range { lower: left.range.lower.clone(), upper: end.clone().or(left.range.upper.clone()) };
            if self.piece(&JobRange { range, ..left.clone() }).await? == Copied::Interrupted {
                return Ok(Copied::Interrupted);
            }
            let Some(end) = end else {
                self.ranges.set(left.number, &RangeState::Done).await?;
                return Ok(Copied::All);
            };
            self.ranges.advance(left.number, &end).await?;
            crate::crash::point("after_piece");
            left.range.lower = Some(end);
        }
        Ok(Copied::Interrupted)
    }

    /// Waits until the next piece may be copied; tells before which `_id` it ends,
    /// `None` within for the end of the range. `None` where the run is to end.
    async fn next_piece(&self, left: &JobRange) -> Result<Option<Option<Bson>>> {
        while !self.stop.is_cancelled() {
            self.pace.free(&self.stop).await;
            self.lease.valid().await?;
            let (documents, end) = match self.pace.piece(self.parallel, self.average_bytes) {
                Some(most) if self.pace.rate() > 0 || most < self.documents_per_range => {
                    self.mongo.cut(&self.source, &left.range, most, self.hint()).await?
                }
                _ => (self.documents_per_range, None),
            };
            if self.pace.turn(documents, &self.stop).await {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    async fn piece(&self, piece: &JobRange) -> Result<Copied> {
        let mut form = Form::Documents;
        for attempt in 1..=ATTEMPTS {
            self.lease.valid().await?;
            let mut operation = self.mongo.operation().await?;
            let session = operation.id();
            self.ranges.set(piece.number, &RangeState::Copying(session.clone())).await?;
            crash::point("range_begun");
            let run = self.write(&mut operation, piece, form);
            let (result, interrupted) = self.until_stopped(run, &session).await;
            match result {
                Ok(()) => {
                    crash::point("range_copied");
                    return Ok(Copied::All);
                }
                // The operation may still run on the server, or have written a part.
                Err(_) if interrupted => {
                    self.reset(piece, &session).await?;
                    return Ok(Copied::Interrupted);
                }
                Err(error) if form == Form::Documents && quarantine::is_too_deep(&error) => {
                    form = Form::Marks;
                    self.reset(piece, &session).await?;
                }
                Err(error) if attempt < ATTEMPTS && is_transient(&error) => {
                    let error = describe_mongo(&error);
                    tracing::warn!(error, range = piece.number, "the range is emptied and copied again");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    self.reset(piece, &session).await?;
                }
                Err(error) => {
                    self.reset(piece, &session).await?;
                    return Err(error).during(format!("copying a range of {}", self.source));
                }
            }
        }
        Err(Error::stopped(format!("a range of {} could not be copied", self.source)))
    }

    fn hint(&self) -> Option<Hint> {
        self.hint.then(|| Hint::Keys(bson::doc! {"_id": 1}))
    }

    /// Runs what copies a range, one operation after the other on the same session:
    /// the valid documents, and those of each rule where they are kept.
    async fn write(
        &self,
        operation: &mut Operation,
        range: &JobRange,
        form: Form,
    ) -> mongodb::error::Result<()> {
        let filter = || range.range.filter();
        let stages = copy_stages(filter(), &self.valid, &self.target.collection);
        self.run_stages(operation, stages).await?;
        let Some(Quarantine { namespace, hits }) = &self.rejected else { return Ok(()) };
        for hit in hits {
            let stages =
                |existing| quarantine::copy_stages(filter(), hit, &namespace.collection, form, existing);
            match self.run_stages(operation, stages(Existing::Fails)).await {
                // It was copied under an earlier rule, and changed before this one looked at it.
                Err(error) if quarantine::is_duplicate(&error) => {
                    self.run_stages(operation, stages(Existing::IsReplaced)).await?;
                }
                result => result?,
            }
        }
        Ok(())
    }

    async fn run_stages(
        &self,
        operation: &mut Operation,
        stages: Vec<Document>,
    ) -> mongodb::error::Result<()> {
        // Whoever has the lease by now has made sure that nothing runs on this session.
        self.lease.valid().await.map_err(|error| mongodb::error::Error::custom(error.to_string()))?;
        crash::point("copy_sending");
        self.mongo.run_writing_pipeline(operation, &self.source, stages, self.hint(), &self.job).await
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
            () = door::grace_is_over(&self.stop) => {}
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

    async fn empty(&self, range: &JobRange) -> Result<()> {
        for namespace in self.rejected.iter().map(|rejected| &rejected.namespace).chain([&self.target]) {
            self.empty_in(namespace, range).await?;
        }
        self.ranges.set(range.number, &RangeState::Pending).await
    }

    /// Piece by piece, because a transaction is to be short; late, a piece would delete
    /// what the next one has copied, which its lane prevents.
    async fn empty_in(&self, namespace: &Namespace, range: &JobRange) -> Result<()> {
        let mut lane = self.lanes.take().await?;
        let emptied = self.empty_by(&mut lane, namespace, &range.range).await;
        self.lanes.put_back(lane).await;
        emptied
    }

    async fn empty_by(&self, lane: &mut Lane, namespace: &Namespace, range: &Range) -> Result<()> {
        let operation = format!("emptying a range of {namespace}");
        let mut left = range.clone();
        loop {
            let (_, end) = self.mongo.cut(namespace, &left, EMPTIED_AT_ONCE, self.hint()).await?;
            let piece = Range { lower: left.lower.take(), upper: end.clone().or(left.upper.clone()) };
            let refused = lane.delete_all(&operation, namespace, &piece.filter()).await?;
            if let Some(refused) = refused {
                return Err(Error::stopped(format!("{operation} failed: {}", refused.message())));
            }
            if end.is_none() {
                return Ok(());
            }
            left.lower = end;
        }
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
            limited_by: Some(self.pace.limited_by().into()),
            detail: format!(
                "{done} of {ranges} ranges done, {copied} documents in {}",
                self.target.collection
            ),
        });
    }
}
