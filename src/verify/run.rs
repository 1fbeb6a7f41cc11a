//! `verify`: which checks apply, and the two sides of a copy compared.

use std::collections::HashMap;

use bson::{Bson, Document, RawDocument, RawDocumentBuf, doc};
use serde_json::{Value, json};

use super::backfill;
use super::check::Check;
use super::compare::{self, FieldDifference};
use super::quarantine::Quarantined;
use super::{dual_write, full, structure};
use crate::Context;
use crate::backfill::default_job as backfill_job;
use crate::cleanse::plan::{compile, default_job as cleanse_job, rules, target_of};
use crate::cleanse::predicate::{Predicate, all_of};
use crate::cleanse::quarantine::of_job;
use crate::cleanse::{combine, count, needs};
use crate::cli::verify::VerifyArgs;
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::event::{Events, Progress};
use crate::job::store;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::sink::id_bytes;
use crate::mongo::source::collect;
use crate::mongo::valid::Valid;
use crate::report::json::extended;
use crate::report::outcome::Outcome;

/// Documents that are sampled where the options don't say.
pub(super) const DEFAULT_SAMPLE: u32 = 1000;
/// Documents that are fetched from the other side at once.
const BATCH: usize = 200;

/// A source and what should have become of it.
#[derive(Debug)]
struct Sides {
    source: Namespace,
    target: Namespace,
    predicate: Predicate,
}

/// Runs the command.
///
/// # Errors
/// A refusal where there is nothing to verify; a stop where the server goes away.
pub async fn run(context: &Context, args: &VerifyArgs) -> Result<Outcome> {
    let sides = sides(context, args)?;
    let live = [(args.full, "--full"), (args.dual_write, "--dual-write")];
    if let Some((_, option)) = live.into_iter().find(|(is_given, _)| *is_given && sides.is_none()) {
        return Err(Error::usage(format!("{option} compares two collections, and none are named"))
            .hint("add `[cleanse]` with `source` and `to`, or give --source and --to"));
    }
    if let Some(sides) = &sides {
        let valid = sides.predicate.valid();
        if args.dual_write {
            combine::only_conditions("--dual-write", &valid)?;
        }
        needs::check_reading(&context.mongo, &sides.source, &valid).await?;
    }
    // These keep nothing that would have to be saved.
    let (mut jobs, mut checks) =
        context.unless_interrupted(quick_checks(context, args, sides.as_ref())).await?;
    let mut full = None;
    if let Some(sides) = sides.as_ref().filter(|_| args.full) {
        let mut result = full::run(context, &order(args, sides)).await?;
        jobs.push(result.job.clone());
        checks.insert(0, result.check.clone());
        if result.error.is_none()
            && let Some(quarantine) = full_quarantine(context, args, sides).await?
        {
            jobs.push(quarantine.job);
            checks.insert(1, quarantine.check);
            result.error = quarantine.error;
        }
        full = Some(result);
    }
    let mut watched = None;
    let is_unbroken = full.as_ref().is_none_or(|full| full.error.is_none());
    if let Some(sides) = sides.as_ref().filter(|_| args.dual_write && is_unbroken) {
        let result = dual_write::run(context, &watch_order(args, sides)).await?;
        checks.insert(0, result.check.clone());
        watched = Some(result);
    }
    if checks.is_empty() {
        return Err(Error::refused("there is nothing to verify: no job of this config has run yet")
            .hint("run `backfill` or `cleanse` first, or name two collections with --source and --to"));
    }
    Ok(report(&jobs, &checks, full, watched))
}

/// All checks but the full comparison, with the names of the jobs they are about.
async fn quick_checks(
    context: &Context,
    args: &VerifyArgs,
    sides: Option<&Sides>,
) -> Result<(Vec<String>, Vec<Check>)> {
    let named = args.counts || args.sample.is_some() || args.full || args.dual_write;
    let explicit = args.source.is_some() || args.to.is_some();
    let mut checks = Vec::new();
    let mut jobs = Vec::new();
    if !explicit
        && (!named || sides.is_none())
        && let Some(job) = existing_backfill(context, args).await?
    {
        jobs.push(job);
        for target in context.settings.targets(args.targets.target.as_deref())? {
            checks.extend(backfill::check(&context.mongo, &target).await?);
        }
    }
    if let Some(sides) = sides {
        let job = copy_job(args, sides);
        let stored = store::list(&context.mongo, Some(&job)).await?.into_iter().next();
        if named || explicit || stored.is_some() {
            checks.extend(compare_sides(context, sides, args, !named).await?);
        }
        if let Some(stored) = stored {
            jobs.push(job);
            if let Some(quarantine) = of_job(&stored) {
                let Sides { source, target, predicate } = sides;
                combine::only_conditions("a copy with a quarantine", &predicate.valid())?;
                let quarantined = Quarantined { source, target, quarantine: &quarantine, predicate };
                checks.extend(quarantined.checks(context, args, !named).await?);
            }
        }
    }
    Ok((jobs, checks))
}

/// Name of the job that has made the copy.
fn copy_job(args: &VerifyArgs, sides: &Sides) -> String {
    args.job.clone().unwrap_or_else(|| cleanse_job(&sides.source, &sides.target))
}

fn order<'a>(args: &VerifyArgs, sides: &'a Sides) -> full::Order<'a> {
    let copy = copy_job(args, sides);
    full::Order {
        source: &sides.source,
        target: &sides.target,
        valid: sides.predicate.valid(),
        rules: sides.predicate.identity(),
        job: full::job_name(&copy),
        parallel: usize::from(args.parallel),
        settle: args.settle.0,
        restart: args.restart,
        most: args.max_differences,
        is_quarantine: false,
    }
}

/// Compares the quarantine with what the rules reject, where it holds anything: whether it may
/// be empty is told by the counts.
async fn full_quarantine(context: &Context, args: &VerifyArgs, sides: &Sides) -> Result<Option<full::Full>> {
    let mongo = &context.mongo;
    let stored = store::list(mongo, Some(&copy_job(args, sides))).await?;
    let Some(quarantine) = stored.first().and_then(of_job) else { return Ok(None) };
    let order = order(args, sides);
    combine::only_conditions("a copy with a quarantine", &order.valid)?;
    if count::exactly(mongo, &quarantine, &Document::new()).await? == 0 {
        return Ok(None);
    }
    let order = full::Order {
        target: &quarantine,
        valid: Valid::condition(doc! {"$nor": [order.valid.condition]}),
        job: format!("{}-quarantine", order.job),
        is_quarantine: true,
        ..order
    };
    let result = full::run(context, &order).await?;
    let check = Check { name: "full quarantine".into(), ..result.check };
    Ok(Some(full::Full { check, ..result }))
}

fn watch_order<'a>(args: &VerifyArgs, sides: &'a Sides) -> dual_write::Order<'a> {
    dual_write::Order {
        source: &sides.source,
        target: &sides.target,
        valid: sides.predicate.valid().condition,
        time: args.watch.0,
        grace: args.settle.0,
        most: args.max_differences,
    }
}

/// The sides of the configured or named copy; `None` where there is none.
fn sides(context: &Context, args: &VerifyArgs) -> Result<Option<Sides>> {
    let settings = &context.settings;
    if settings.cleanse.is_none() && args.source.is_none() {
        if args.to.is_some() {
            return Err(Error::usage("--to needs --source, or `[cleanse]` in the config"));
        }
        return Ok(None);
    }
    let rules = rules(settings, args.source.as_ref())?;
    let Some(to) = args.to.clone().or_else(|| rules.to.clone()) else {
        return if args.source.is_some() {
            Err(Error::usage("--source needs --to, the collection to compare with"))
        } else {
            Ok(None)
        };
    };
    let source = rules.source.clone();
    let target = target_of(&source, &to)?;
    if target == source {
        return Err(Error::usage(format!("source and target are both {source}: that would prove nothing")));
    }
    Ok(Some(Sides { predicate: compile(settings, &rules)?, source, target }))
}

async fn existing_backfill(context: &Context, args: &VerifyArgs) -> Result<Option<String>> {
    if context.settings.targets.is_empty() {
        return Ok(None);
    }
    let targets = context.settings.targets(args.targets.target.as_deref())?;
    let name = args.job.clone().unwrap_or_else(|| backfill_job(&targets));
    Ok((!store::list(&context.mongo, Some(&name)).await?.is_empty()).then_some(name))
}

async fn compare_sides(context: &Context, sides: &Sides, args: &VerifyArgs, all: bool) -> Result<Vec<Check>> {
    let mongo = &context.mongo;
    let mut checks = Vec::new();
    if args.full || all {
        checks.extend(structure::check(mongo, &sides.source, &sides.target).await?);
    }
    if !(args.counts || args.sample.is_some() || all) {
        return Ok(checks);
    }
    let expected = count::valid(mongo, &sides.source, &sides.predicate.valid()).await?;
    let found = count::exactly(mongo, &sides.target, &Document::new()).await?;
    if args.counts || all {
        checks.push(counts(sides, expected, found));
    }
    let size = args.sample.or(all.then_some(DEFAULT_SAMPLE));
    if let Some(size) = size {
        checks.push(sample(context, sides, Direction::Forward, size, expected, args.max_differences).await?);
        checks.push(sample(context, sides, Direction::Backward, size, found, args.max_differences).await?);
    }
    Ok(checks)
}

fn counts(sides: &Sides, expected: u64, found: u64) -> Check {
    let check = Check::of("counts", json!(expected), json!(found), Vec::new());
    let check =
        check.remark(format!("valid documents of {} and documents of {}", sides.source, sides.target));
    // Two empty sides agree, which proves nothing.
    Check { passed: check.passed && expected > 0, ..check }
}

/// From which side documents are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// Drawn from the source, looked up in the target: finds missing ones.
    Forward,
    /// Drawn from the target, looked up in the source: finds extra ones.
    Backward,
}

async fn sample(
    context: &Context,
    sides: &Sides,
    direction: Direction,
    size: u32,
    population: u64,
    most: usize,
) -> Result<Check> {
    let name = match direction {
        Direction::Forward => "sample source to target",
        Direction::Backward => "sample target to source",
    };
    if population == 0 {
        let side = if direction == Direction::Forward { &sides.source } else { &sides.target };
        return Ok(Check::nothing(name, &format!("{side} is missing or has no valid documents")));
    }
    let mongo = &context.mongo;
    let valid = sides.predicate.valid();
    let (from, from_valid, to, to_valid) = match direction {
        Direction::Forward => (&sides.source, valid, &sides.target, Valid::default()),
        Direction::Backward => (&sides.target, Valid::default(), &sides.source, valid),
    };
    let to_draw = to_draw(mongo, from, &from_valid, size, population).await?;
    let mut drawn = draw(mongo, from, &from_valid, to_draw).await?;
    let (mut differences, mut different, mut compared) = (Vec::new(), 0_u64, 0_u64);
    while let Some(batch) = drawn.next_batch().await? {
        let batch = only_valid(mongo, from, &from_valid, batch).await?;
        let others = look_up(mongo, to, &to_valid, &batch).await?;
        for document in &batch {
            compared += 1;
            if let Some(difference) = difference(document, &others, direction) {
                different += 1;
                if differences.len() < most {
                    differences.push(difference);
                }
            }
        }
        show(&context.events, name, compared, u64::from(size).min(population));
    }
    let passed = different == 0 && compared > 0;
    let check = Check::of(name, json!(compared), json!(compared - different), differences);
    Ok(Check { passed, ..check.remark(confidence(compared, different, population)) })
}

/// Documents drawn at random, as a cursor.
pub(super) struct Drawn {
    cursor: mongodb::Cursor<RawDocumentBuf>,
    operation: String,
    ended: bool,
}

/// How many candidates make about a sample of that size; `None` for all of them.
pub(super) async fn to_draw(
    mongo: &Mongo,
    from: &Namespace,
    valid: &Valid,
    size: u32,
    population: u64,
) -> Result<Option<u64>> {
    let size = u64::from(size);
    if size >= population {
        return Ok(None);
    }
    if valid.grouping.is_none() {
        return Ok(Some(size));
    }
    let candidates = count::candidates(mongo, from, valid).await?;
    Ok(Some(size.saturating_mul(candidates).div_ceil(population)))
}

/// Those that win their group.
async fn only_valid(
    mongo: &Mongo,
    namespace: &Namespace,
    valid: &Valid,
    batch: Vec<RawDocumentBuf>,
) -> Result<Vec<RawDocumentBuf>> {
    if valid.grouping.is_none() {
        return Ok(batch);
    }
    let documents: Vec<&RawDocument> = batch.iter().map(AsRef::as_ref).collect();
    let are_valid = retrying(format!("looking at groups of {namespace}"), || {
        mongo.are_valid(namespace, valid, &documents)
    })
    .await?;
    Ok(batch
        .into_iter()
        .zip(are_valid)
        .filter(|(_, is_valid)| *is_valid)
        .map(|(document, _)| document)
        .collect())
}

pub(super) async fn draw(mongo: &Mongo, from: &Namespace, valid: &Valid, size: Option<u64>) -> Result<Drawn> {
    use crate::error::Context as _;
    let mut pipeline = valid.stages();
    if let Some(size) = size {
        pipeline.push(doc! {"$sample": {"size": i64::try_from(size).unwrap_or(i64::MAX)}});
    }
    let operation = format!("drawing a sample of {from}");
    let cursor = mongo
        .collection(from)
        .aggregate(pipeline)
        .allow_disk_use(true)
        .await
        .during(&operation)?
        .with_type::<RawDocumentBuf>();
    Ok(Drawn { cursor, operation, ended: false })
}

impl Drawn {
    pub(super) async fn next_batch(&mut self) -> Result<Option<Vec<RawDocumentBuf>>> {
        use crate::error::Context as _;
        let mut batch = Vec::new();
        while !self.ended && batch.len() < BATCH {
            if self.cursor.advance().await.during(&self.operation)? {
                batch.push(self.cursor.current().to_owned());
            } else {
                self.ended = true;
            }
        }
        Ok((!batch.is_empty()).then_some(batch))
    }
}

/// The documents of the other side, by the bytes of their `_id`s.
pub(super) async fn look_up(
    mongo: &Mongo,
    namespace: &Namespace,
    valid: &Valid,
    batch: &[RawDocumentBuf],
) -> Result<HashMap<Vec<u8>, RawDocumentBuf>> {
    let ids: Vec<Bson> = batch
        .iter()
        .filter_map(|document| document.get("_id").ok().flatten())
        .filter_map(|id| Bson::try_from(bson::RawBson::from(id)).ok())
        .collect();
    let by_id = doc! {"_id": {"$in": ids}};
    let collection = mongo.collection(namespace);
    let operation = format!("looking up documents of {namespace}");
    let found = if valid.is_condition() {
        let filter = all_of(vec![Bson::Document(by_id), Bson::Document(valid.condition.clone())]);
        retrying(operation, || collect(collection.find(filter.clone()))).await?
    } else {
        let pipeline = valid.candidates(by_id);
        let found = retrying(operation, || async {
            let mut cursor = collection.aggregate(pipeline.clone()).await?.with_type::<RawDocumentBuf>();
            let mut found = Vec::new();
            while cursor.advance().await? {
                found.push(cursor.current().to_owned());
            }
            Ok(found)
        })
        .await?;
        only_valid(mongo, namespace, valid, found).await?
    };
    Ok(found.into_iter().filter_map(|document| Some((id_bytes(&document)?, document))).collect())
}

pub(super) fn difference(
    document: &RawDocumentBuf,
    others: &HashMap<Vec<u8>, RawDocumentBuf>,
    direction: Direction,
) -> Option<Value> {
    let id = document.get("_id").ok().flatten()?;
    match id_bytes(document).and_then(|bytes| others.get(&bytes)) {
        None => {
            let kind = if direction == Direction::Forward { "missing" } else { "extra" };
            Some(json!({"_id": extended(id), "kind": kind}))
        }
        Some(other) => {
            let differences = match direction {
                Direction::Forward => compare::difference(document, other),
                Direction::Backward => compare::difference(other, document),
            };
            different(extended(id), &differences)
        }
    }
}

/// How a document differs, as an entry of the result; `None` where it does not.
pub(super) fn different(id: Value, differences: &[FieldDifference]) -> Option<Value> {
    let paths: Vec<&str> = differences.iter().map(|field| field.path.as_str()).collect();
    let details: Vec<Value> = differences
        .iter()
        .map(|field| json!({"path": field.path, "kind": field.kind.as_str(), "detail": field.detail}))
        .collect();
    compare::gravest(differences).map(|gravest| {
        json!({
            "_id": id,
            "kind": "different",
            "difference": gravest.as_str(),
            "fields": paths,
            "details": details,
        })
    })
}

/// What a sample proves: with no difference among n, the share of differing
/// documents is below 3/n with 95% confidence (rule of three).
pub(super) fn confidence(compared: u64, different: u64, population: u64) -> String {
    if different > 0 {
        return format!("{different} of {compared} differ");
    }
    if compared >= population {
        return format!("0 of {compared} differ; that is all of them");
    }
    let bound = 300.0 / compared as f64;
    format!("0 of {compared} differ: below {bound:.2}% of all at 95% confidence")
}

fn show(events: &Events, phase: &str, done: u64, total: u64) {
    events.progress(Progress {
        phase: phase.into(),
        unit: "documents",
        done,
        total: Some(total),
        limited_by: Some("database".into()),
        detail: String::new(),
    });
}

fn report(
    jobs: &[String],
    checks: &[Check],
    full: Option<full::Full>,
    watched: Option<dual_write::DualWrite>,
) -> Outcome {
    let (summary, error) = full.map_or((None, None), |full| (Some(full.summary), full.error));
    let (writes, broken) = watched.map_or((None, None), |watched| (Some(watched.summary), watched.error));
    let error = error.or(broken);
    let passed = error.is_none() && checks.iter().all(|check| check.passed);
    let mut json = json!({
        "schema": 1,
        "command": "verify",
        "job": if let [job] = jobs { json!(job) } else { Value::Null },
        "jobs": jobs,
        "passed": passed,
        "checks": checks.iter().map(Check::json).collect::<Vec<_>>(),
    });
    if let Some(summary) = summary {
        json["full"] = summary;
    }
    if let Some(writes) = writes {
        json["dual_write"] = writes;
    }
    let mut lines: Vec<String> = checks.iter().map(Check::text).collect();
    lines.push(match (passed, &error) {
        (true, _) => "verification passed".into(),
        (false, None) => "verification FAILED".into(),
        (false, Some(_)) => "verification NOT DONE".into(),
    });
    let text = lines.join("\n");
    match error {
        Some(error) => Outcome::failed(json, text, error),
        None if passed => Outcome::reached(json, text),
        None => Outcome::not_reached(json, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confidence_is_the_rule_of_three() {
        assert_eq!(confidence(5000, 0, 1_000_000), "0 of 5000 differ: below 0.06% of all at 95% confidence");
        assert_eq!(confidence(10, 0, 10), "0 of 10 differ; that is all of them");
        assert_eq!(confidence(10, 2, 100), "2 of 10 differ");
    }

    #[test]
    fn two_empty_sides_do_not_pass() {
        let sides = Sides {
            source: "app.a".parse().expect("a namespace"),
            target: "app.b".parse().expect("a namespace"),
            predicate: Predicate::everything(),
        };
        assert!(!counts(&sides, 0, 0).passed);
        assert!(counts(&sides, 5, 5).passed);
        assert!(!counts(&sides, 5, 4).passed);
    }
}
