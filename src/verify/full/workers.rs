//! Ranges, several at once.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bson::doc;
use tokio::task::JoinSet;

use super::outcome::Totals;
use super::progress::{Figures, Ranges, StoredRange};
use super::sides::{self, Sides};
use super::suspects::Suspects;
use crate::error::{Result, joined};
use crate::event::{Events, Progress};
use crate::job::Job;
use crate::mongo::door;

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(500);
/// Pictures of progress until it is stored with the job, for who looks from afar.
const TICKS_PER_SAVE: u32 = 8;

/// What is needed to compare all ranges.
pub struct Workers<'a> {
    /// Both sides.
    pub sides: Arc<Sides>,
    /// Where the ranges are stored.
    pub ranges: &'a Ranges,
    /// The job, which must be ours for anything to be stored.
    pub job: &'a Job,
    /// Where progress goes.
    pub events: &'a Events,
    /// Ranges at once.
    pub parallel: usize,
    /// Documents in all, about.
    pub documents: u64,
}

/// What is left when every range was read.
#[derive(Debug, Default)]
pub struct Compared {
    /// Documents that were not the same.
    pub suspects: Suspects,
    /// The ranges that they are in.
    pub open: HashMap<i32, Figures>,
    /// Documents that were read.
    read: u64,
}

type Done = Result<(i32, Option<sides::Compared>)>;

impl Workers<'_> {
    /// Compares every range that is not done. Where the run is to stop, some are left.
    ///
    /// # Errors
    /// The first failure, when the ranges under way have ended.
    pub async fn run(&self, totals: &mut Totals) -> Result<Compared> {
        let (mut pending, mut compared) = (VecDeque::new(), Compared::default());
        for range in self.ranges.load().await? {
            totals.ranges += 1;
            if range.is_done {
                totals.resumed += 1;
                self.count(totals, &mut compared, &range.figures);
            } else {
                pending.push_back(range);
            }
        }
        let stop = &self.sides.stop;
        let mut given_up = pin!(door::grace_is_over(stop));
        let mut workers: JoinSet<Done> = JoinSet::new();
        let mut ticks = tokio::time::interval(TICK);
        let (mut tick, mut result) = (0_u32, Ok(()));
        loop {
            while workers.len() < self.parallel && result.is_ok() && !stop.is_cancelled() {
                let Some(range) = pending.pop_front() else { break };
                self.start(&mut workers, range);
            }
            if workers.is_empty() {
                break;
            }
            tokio::select! {
                Some(done) = workers.join_next() => {
                    let taken = match joined(done).flatten() {
                        Ok(done) => self.take(done, totals, &mut compared).await,
                        Err(error) => Err(error),
                    };
                    result = result.and(taken);
                }
                _ = ticks.tick() => {
                    self.show(&compared);
                    tick += 1;
                    if tick.is_multiple_of(TICKS_PER_SAVE) && result.is_ok() {
                        result = self.job.save(doc! {"phase": "compare", "documents": totals.stored()}).await;
                    }
                }
                () = &mut given_up => break,
            }
        }
        result.map(|()| compared)
    }

    fn start(&self, workers: &mut JoinSet<Done>, range: StoredRange) {
        let sides = self.sides.clone();
        workers.spawn(async move {
            let compared = sides.compare(range.number, &range.range).await?;
            Ok((range.number, compared))
        });
    }

    /// Stores what a range came to.
    async fn take(
        &self,
        (number, found): (i32, Option<sides::Compared>),
        totals: &mut Totals,
        compared: &mut Compared,
    ) -> Result<()> {
        let Some(found) = found else { return Ok(()) };
        let figures = Figures { source: found.source, target: found.target, ..Figures::default() };
        self.job.lease().valid().await?;
        if found.suspects.is_empty() {
            self.ranges.set(number, &figures, true).await?;
            self.count(totals, compared, &figures);
            crate::crash::point("after_range");
        } else {
            compared.read += figures.source.documents.max(figures.target.documents);
            compared.open.insert(number, figures);
            compared.suspects.append(found.suspects);
        }
        Ok(())
    }

    fn count(&self, totals: &mut Totals, compared: &mut Compared, figures: &Figures) {
        totals.compared += 1;
        totals.figures.add(figures);
        compared.read += figures.source.documents.max(figures.target.documents);
    }

    fn show(&self, compared: &Compared) {
        self.events.progress(Progress {
            phase: "compare".into(),
            unit: "documents",
            done: compared.read,
            total: Some(self.documents.max(compared.read)),
            limited_by: Some("database".into()),
            detail: match compared.suspects.kept().len() {
                0 => String::new(),
                differing => format!("{differing} to be read again"),
            },
        });
    }
}
