//! Compares every marked document until it agrees, is repaired or given up.

use std::collections::HashMap;
use std::time::Duration;

use bson::{RawBson, Timestamp};
use serde_json::Value;
use tokio::time::Instant;

use super::Figures;
use super::suspect::{Suspect, Verdict};
use crate::Context;
use crate::cleanse::marks::{Mark, Marks};
use crate::cleanse::plan::Plan;
use crate::error::Result;
use crate::event::Progress;
use crate::job::Job;
use crate::mongo::lane::Lane;
use crate::verify::full::matching::Id;
use crate::verify::pairs::{Pairs, Seen};

/// Marks that are compared at once.
const BATCH: usize = 1_000;
/// Documents under suspicion at once; more wait in their marks.
const MOST_SUSPECTS: usize = 10_000;
/// No pause is longer: the lease is looked at in between.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// Times that all marks are gone through: documents that are only equal to a
/// marked one for the server get marks of their own on the way.
const PASSES: u32 = 3;

/// All that goes on while marks are compared.
pub(super) struct Comparison<'a> {
    pub(super) context: &'a Context,
    pub(super) job: &'a Job,
    pub(super) pairs: Pairs<'a>,
    pub(super) marks: Marks,
    pub(super) lane: Lane,
    pub(super) after: Option<Timestamp>,
    pub(super) figures: &'a mut Figures,
    pub(super) suspects: Vec<Suspect>,
    grace: Duration,
    last: Option<Mark>,
    is_through: bool,
    has_strangers: bool,
}

impl<'a> Comparison<'a> {
    /// A comparison of what is marked, with documents of the source as of a
    /// moment or later.
    pub(super) fn new(
        context: &'a Context,
        plan: &'a Plan,
        job: &'a Job,
        lane: Lane,
        (grace, after): (Duration, Option<Timestamp>),
        figures: &'a mut Figures,
    ) -> Self {
        let pairs = Pairs {
            mongo: &context.mongo,
            source: &plan.source,
            target: &plan.target,
            valid: plan.predicate.valid().condition,
        };
        let marks = Marks::of(&context.mongo, job.name());
        Self {
            context,
            job,
            pairs,
            marks,
            lane,
            after,
            figures,
            suspects: Vec::new(),
            grace,
            last: None,
            is_through: false,
            has_strangers: false,
        }
    }

    /// Works off all marks; false where a signal came first.
    ///
    /// # Errors
    /// A stop where a side can't be read or the target can't be written.
    pub(super) async fn run(mut self) -> Result<bool> {
        for _ in 0..PASSES {
            if !self.pass().await? {
                return Ok(false);
            }
            if !self.has_strangers {
                break;
            }
            (self.last, self.is_through, self.has_strangers) = (None, false, false);
        }
        Ok(true)
    }

    async fn pass(&mut self) -> Result<bool> {
        let total = self.marks.count().await?;
        while !(self.is_through && self.suspects.is_empty()) {
            self.job.lease().valid().await?;
            self.show(total);
            if !self.is_through && self.suspects.len() + BATCH <= MOST_SUSPECTS {
                if self.context.stop.is_cancelled() {
                    return Ok(false);
                }
                self.take_more().await?;
                continue;
            }
            if !super::unless_stopped(self.context, self.pause()).await {
                return Ok(false);
            }
            self.look_again().await?;
        }
        Ok(true)
    }

    /// Until the first of the suspects has had its time.
    fn pause(&self) -> Duration {
        let now = Instant::now();
        let next = self.suspects.iter().map(|suspect| suspect.since + self.grace).min().unwrap_or(now);
        next.saturating_duration_since(now).min(LONGEST_PAUSE)
    }

    async fn take_more(&mut self) -> Result<()> {
        let most = i64::try_from(BATCH).unwrap_or(i64::MAX);
        let marks = self.marks.following(self.last.as_ref(), most).await?;
        let Some(last) = marks.last() else {
            self.is_through = true;
            return Ok(());
        };
        self.last = Some(last.clone());
        self.figures.compared += u64::try_from(marks.len()).unwrap_or(0);
        let mut by_id: HashMap<Id, Mark> =
            marks.into_iter().map(|mark| (Id::from_value(&mark.id), mark)).collect();
        let ids: Vec<Id> = by_id.keys().cloned().collect();
        let seen = self.pairs.look_up(&ids, self.after).await?;
        let (mut agreeing, mut strangers, now) = (Vec::new(), Vec::new(), Instant::now());
        for (id, seen) in seen {
            match (by_id.remove(&id), seen.kind()) {
                (Some(mark), None) => agreeing.push(mark),
                (Some(mark), Some(_)) => self.suspects.push(Suspect::new(id, Some(mark), seen, now)),
                (None, Some(_)) => strangers.push((id, seen)),
                (None, None) => {}
            }
        }
        self.suspect(strangers).await?;
        self.marks.remove(&agreeing).await
    }

    /// Puts documents without a mark under suspicion, not before they have one.
    async fn suspect(&mut self, strangers: Vec<(Id, Seen)>) -> Result<()> {
        let is_known = |id: &Id| self.suspects.iter().any(|suspect| suspect.id == *id);
        let new: Vec<_> = strangers.into_iter().filter(|(id, _)| !is_known(id)).collect();
        let ids: Vec<RawBson> = new.iter().filter_map(|(id, _)| id.value()).collect();
        self.has_strangers |= !ids.is_empty();
        self.marks.set(&ids).await?;
        let now = Instant::now();
        self.suspects.extend(new.into_iter().map(|(id, seen)| Suspect::new(id, None, seen, now)));
        Ok(())
    }

    async fn look_again(&mut self) -> Result<()> {
        let (grace, now) = (self.grace, Instant::now());
        let is_due = |suspect: &Suspect| suspect.since + grace <= now;
        let (due, waiting) = std::mem::take(&mut self.suspects).into_iter().partition(is_due);
        self.suspects = waiting;
        let due: Vec<Suspect> = due;
        let ids: Vec<Id> = due.iter().map(|suspect| suspect.id.clone()).collect();
        let seen = self.pairs.look_up(&ids, self.after).await?;
        let (mut done, mut to_repair, now) = (Vec::new(), Vec::new(), Instant::now());
        for mut suspect in due {
            let seen = seen.get(&suspect.id).copied().unwrap_or_default();
            match suspect.judge(seen, now, self.grace) {
                Verdict::Wait => self.suspects.push(suspect),
                Verdict::Repair => to_repair.push(suspect),
                Verdict::Agrees => {
                    self.count_repaired(&suspect);
                    done.extend(suspect.mark);
                }
                // Its mark stays, for the next run.
                Verdict::GiveUp if suspect.attempts > 0 => self.figures.not_repaired += 1,
                Verdict::GiveUp => self.figures.unsettled += 1,
            }
        }
        self.marks.remove(&done).await?;
        self.repair(to_repair).await
    }

    fn count_repaired(&mut self, suspect: &Suspect) {
        if suspect.attempts == 0 {
            return;
        }
        self.figures.repaired += 1;
        if let Some(entry) = suspect.entry.and_then(|entry| self.figures.differences.get_mut(entry)) {
            entry["outcome"] = Value::from("repaired");
        }
    }

    fn show(&self, total: u64) {
        let figures = &self.figures;
        self.context.events.progress(Progress {
            phase: "compare".into(),
            unit: "documents",
            done: figures.compared,
            total: Some(total.max(figures.compared)),
            limited_by: Some(if self.suspects.is_empty() { "database" } else { "grace time" }.into()),
            detail: format!("{} differ, {} repaired", self.suspects.len(), figures.repaired),
        });
    }
}
