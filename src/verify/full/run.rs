//! A full comparison from its first look to its verdict.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bson::{Bson, Document, doc};
use serde_json::Value;

use super::job::{self, Identity};
use super::matching::Side;
use super::outcome::{self, Full, Totals};
use super::progress::{Figures, Ranges};
use super::sides::{Sides, Sizes};
use super::suspects::{Mismatches, Suspects};
use super::workers::{Compared, Workers};
use crate::Context;
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::event::Progress;
use crate::job::control::stop_asked;
use crate::job::{Job, JobState};
use crate::mongo::Mongo;
use crate::mongo::catalog::Description;
use crate::mongo::range::Range;
use crate::mongo::valid::Valid;
use crate::verify::check::Check;

/// Documents per range: large enough that starting one costs nothing, small
/// enough that an interrupted one is soon read again.
const DOCUMENTS_PER_RANGE: u64 = 20_000;
/// Bytes per range, for the same reason.
const BYTES_PER_RANGE: u64 = 256 << 20;
/// Ranges at most: they are kept in memory.
const MOST_RANGES: u64 = 10_000;
/// With fewer documents one range is enough.
const FEW_DOCUMENTS: u64 = 2_000;
/// Replies with documents of this size would need the memory of many.
const LARGE_DOCUMENT: u64 = 1 << 20;
/// Saving the end of a run that was interrupted may not take longer.
const SAVING: Duration = Duration::from_secs(10);

/// What to compare, and how.
#[derive(Debug)]
pub struct Order<'a> {
    /// The collection that is right.
    pub source: &'a Namespace,
    /// The collection that should be like it.
    pub target: &'a Namespace,
    /// Which documents of the source should be in the target.
    pub valid: Valid,
    /// The same, as it stands in the identity of the job.
    pub rules: Document,
    /// Name of the job.
    pub job: String,
    /// Name of the job that has made the target, if any has.
    pub copy: &'a str,
    /// Ranges at once.
    pub parallel: usize,
    /// How long differences are read again before they are reported.
    pub settle: Duration,
    /// Whether to start over.
    pub restart: bool,
    /// Differences to list.
    pub most: usize,
    /// Whether the target is a quarantine, whose documents are compared as they were.
    pub is_quarantine: bool,
}

/// How a comparison ended that was not cut short.
enum Ended {
    /// With these differences.
    Compared(Vec<Value>),
    /// There was nothing to compare.
    Nothing(String),
}

/// What both collections are; absent where there is none.
type Descriptions = [Option<Description>; 2];

/// Compares the two collections.
///
/// # Errors
/// A refusal where the job is run by another process or a collection can't be
/// compared; whatever happens later stands in the result.
pub async fn run(context: &Context, order: &Order<'_>) -> Result<Full> {
    let descriptions = context.unless_interrupted(describe(&context.mongo, order)).await?;
    let identity = Identity {
        name: order.job.clone(),
        what: doc! {
            "source": order.source.to_string(),
            "target": order.target.to_string(),
            "rules": order.rules.clone(),
        },
        uuids: uuids(&descriptions),
    };
    let begin = job::begin(&context.mongo, &identity, order.copy, order.restart, &context.events);
    let job = context.unless_interrupted(begin).await?;
    let start = Instant::now();
    let mut totals = Totals::default();
    let context = &stoppable(context, &job);
    let result = compare(context, order, &descriptions, &identity, &job, &mut totals).await;
    totals.seconds = job::seconds_before(&job) + start.elapsed().as_secs_f64();
    Ok(finish(order, job, result, &totals).await)
}

/// The context of a run that ends when an operator asks for that.
fn stoppable(context: &Context, job: &Job) -> Context {
    let run = context.of_one_run();
    let (stopped, documents) = (run.clone(), job.lease().document());
    // It ends with the lease, so with the run.
    tokio::spawn(async move {
        if let Some(who) = stop_asked(documents).await {
            stopped.events.warn(format!("control by {who}: stopping"));
            stopped.stop_by_control();
        }
    });
    run
}

async fn describe(mongo: &Mongo, order: &Order<'_>) -> Result<Descriptions> {
    let descriptions = [mongo.describe(order.source).await?, mongo.describe(order.target).await?];
    for (namespace, description) in [order.source, order.target].into_iter().zip(&descriptions) {
        let kind = description.as_ref().map_or("", |description| description.kind.as_str());
        if let "timeseries" | "view" = kind {
            return Err(Error::refused(format!(
                "{namespace} is a {kind}, whose documents need not have an `_id` each of its own"
            ))
            .hint("compare the collections that the documents are stored in"));
        }
    }
    Ok(descriptions)
}

fn uuids(descriptions: &Descriptions) -> Document {
    let uuid = |description: &Option<Description>| {
        description.as_ref().and_then(|description| description.uuid.clone()).unwrap_or(Bson::Null)
    };
    doc! {"source": uuid(&descriptions[0]), "target": uuid(&descriptions[1])}
}

async fn compare(
    context: &Context,
    order: &Order<'_>,
    descriptions: &Descriptions,
    identity: &Identity,
    job: &Job,
    totals: &mut Totals,
) -> Result<Ended> {
    let mongo = &context.mongo;
    let (source, target) = match descriptions {
        [None, _] => return Ok(Ended::Nothing(format!("there is no collection {}", order.source))),
        [_, None] => return Ok(Ended::Nothing(format!("there is no collection {}", order.target))),
        [Some(source), Some(target)] => (source, target),
    };
    let sizes = context.unless_interrupted(Sizes::of(mongo, [order.source, order.target])).await?;
    let sides = Sides::new(
        mongo,
        &context.stop,
        (order.source, source, order.valid.clone()),
        (order.target, target),
        sizes,
    )
    .in_quarantine(order.is_quarantine);
    for (side, what) in [
        (Side::Source, format!("{} has no documents that should be in the target", order.source)),
        (Side::Target, format!("{} is empty", order.target)),
    ] {
        if !context.unless_interrupted(sides.has_any(side)).await? {
            return Ok(Ended::Nothing(what));
        }
    }
    let one_range = source.collation() != target.collation();
    let documents = estimate(mongo, order).await;
    let count = if one_range { 1 } else { range_count(documents, sizes, order.parallel) };
    let ranges = context.unless_interrupted(ranges(mongo, order, identity, job, count)).await?;
    let sides = Arc::new(sides);
    let workers = Workers {
        sides: sides.clone(),
        ranges: &ranges,
        job,
        events: &context.events,
        parallel: if sizes.largest > LARGE_DOCUMENT { 1 } else { order.parallel },
        documents,
    };
    let mut compared = workers.run(totals).await?;
    if context.stop.is_cancelled() {
        return Err(interrupted(context));
    }
    settle(context, order, &sides, &mut compared.suspects, &mut compared.open).await?;
    let again = context.unless_interrupted(describe(mongo, order)).await?;
    if uuids(&again) != identity.uuids {
        return Err(Error::stopped("a collection was dropped or renamed while it was compared")
            .hint("start the same command again: it starts over with what is there now"));
    }
    conclude(&ranges, &compared, totals).await?;
    outcome::differences(&sides, &compared.suspects, order.most).await.map(Ended::Compared)
}

fn interrupted(context: &Context) -> Error {
    context
        .interrupted("interrupted; ranges that are equal are kept")
        .hint("start the same command again to go on")
}

/// About how many documents the larger side has.
async fn estimate(mongo: &Mongo, order: &Order<'_>) -> u64 {
    let source = mongo.collection(order.source).estimated_document_count().await.unwrap_or(0);
    let target = mongo.collection(order.target).estimated_document_count().await.unwrap_or(0);
    // With rules most of the source may be left out.
    if order.valid.is_everything() { source.max(target) } else { target }
}

/// Ranges for so many documents of these sizes.
fn range_count(documents: u64, sizes: Sizes, parallel: usize) -> usize {
    if documents < FEW_DOCUMENTS && documents * sizes.average < BYTES_PER_RANGE {
        return 1;
    }
    let per_range = (BYTES_PER_RANGE / sizes.average).clamp(1, DOCUMENTS_PER_RANGE);
    let count = usize::try_from((documents / per_range).min(MOST_RANGES)).unwrap_or(1);
    count.max(2 * parallel)
}

/// The ranges that an interrupted run has begun, else new ones.
async fn ranges(
    mongo: &Mongo,
    order: &Order<'_>,
    identity: &Identity,
    job: &Job,
    count: usize,
) -> Result<Ranges> {
    if let Some(known) = job::known_ranges(mongo, job)
        && known.is_whole().await?
    {
        return Ok(known);
    }
    // Of the same collections: others may be sorted by other rules.
    let is_same = job.stored("uuids").and_then(Bson::as_document) == Some(&identity.uuids);
    let former = if is_same { Ranges::former(mongo, job.name()).await? } else { None };
    let tiles = match (count, former) {
        (1, _) => vec![Range::all()],
        (_, Some(former)) if former.len() <= 2 * count && count <= 2 * former.len() => former,
        _ => mongo.ranges_of_both(order.source, order.target, count).await?,
    };
    job::lay_out(mongo, job, identity, &tiles).await
}

/// Reads what differs again and counts that for each range.
async fn settle(
    context: &Context,
    order: &Order<'_>,
    sides: &Sides,
    suspects: &mut Suspects,
    open: &mut HashMap<i32, Figures>,
) -> Result<()> {
    for suspect in suspects.kept() {
        open.entry(suspect.range).or_default().rechecked += 1;
    }
    let total = suspects.kept().len() as u64;
    let show = |left: usize| {
        context.events.progress(Progress {
            phase: "read differing documents again".into(),
            unit: "documents",
            done: total - left as u64,
            total: Some(total),
            limited_by: None,
            detail: format!("{left} still differ"),
        });
    };
    if !suspects.settle(sides, order.settle, show).await? {
        return Err(interrupted(context));
    }
    let mut left: HashMap<i32, Mismatches> = suspects.beyond().clone();
    for suspect in suspects.kept() {
        left.entry(suspect.range).or_default().count(&suspect.pair);
    }
    for (range, mismatches) in left {
        let figures = open.entry(range).or_default();
        (figures.missing, figures.extra, figures.different) =
            (mismatches.missing, mismatches.extra, mismatches.different);
    }
    Ok(())
}

/// Stores and adds up the ranges in which something differed at first.
async fn conclude(ranges: &Ranges, compared: &Compared, totals: &mut Totals) -> Result<()> {
    for (range, figures) in &compared.open {
        ranges.set(*range, figures, figures.mismatches() == 0).await?;
        totals.figures.add(figures);
        totals.compared += 1;
    }
    totals.not_rechecked = compared.suspects.beyond().values().map(Mismatches::total).sum();
    Ok(())
}

async fn finish(order: &Order<'_>, job: Job, result: Result<Ended>, totals: &Totals) -> Full {
    let (check, error) = match result {
        Ok(Ended::Compared(differences)) => (totals.check(differences), None),
        Ok(Ended::Nothing(what)) => (Check::nothing("full", &what), None),
        Err(error) => (Check { passed: false, ..totals.check(Vec::new()) }, Some(error)),
    };
    let state = match &error {
        None if check.passed => JobState::Completed,
        None => JobState::Incomplete,
        Some(error) => JobState::of_failure(error),
    };
    let mut fields =
        doc! {"documents": totals.stored(), "totals": totals.stored(), "seconds": totals.seconds};
    if error.is_none() {
        fields.insert("verdict", totals.verdict());
    }
    let saved = match &error {
        None => job.finish(state, fields).await,
        // Where the server is gone, what is stored already has to do.
        Some(_) => tokio::time::timeout(SAVING, job.finish(state, fields)).await.unwrap_or(Ok(())),
    };
    let (check, error) = match (error, saved) {
        (None, Err(unsaved)) => (Check { passed: false, ..check }, Some(unsaved)),
        (error, _) => (check, error),
    };
    Full { check, summary: totals.json(), job: order.job.clone(), error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_bounded_by_documents_and_by_bytes() {
        let sizes = |average| Sizes { average, largest: average };
        assert_eq!(range_count(0, sizes(1), 2), 1);
        assert_eq!(range_count(1_000, sizes(200), 2), 1);
        assert_eq!(range_count(3_000, sizes(200), 2), 4);
        assert_eq!(range_count(1_000_000, sizes(230), 2), 50);
        assert_eq!(range_count(1_000_000, sizes(1 << 20), 2), 3_906);
        assert_eq!(range_count(100, sizes(16 << 20), 2), 6);
        assert_eq!(range_count(250_000_000, sizes(230), 2), 10_000);
    }
}
