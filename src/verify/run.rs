//! `verify`: which checks apply, in which order they run.

use bson::{Document, doc};

use super::check::Check;
use super::quarantine::Quarantined;
use super::result::report;
use super::sample::{self, DEFAULT_SAMPLE};
use super::sides::Sides;
use super::{backfill, counts, dual_write, full, structure};
use crate::Context;
use crate::backfill::default_job as backfill_job;
use crate::cleanse::quarantine::of_job;
use crate::cleanse::{combine, count, needs};
use crate::cli::verify::VerifyArgs;
use crate::error::{Error, Result};
use crate::job::store;
use crate::mongo::valid::Valid;
use crate::report::outcome::Outcome;

/// Runs the command.
///
/// # Errors
/// A refusal where there is nothing to verify; a stop where the server goes away.
pub async fn run(context: &Context, args: &VerifyArgs) -> Result<Outcome> {
    let sides = Sides::of(context, args)?;
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
    let seed = args.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
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
        let job = sides.job.clone();
        let stored = store::list(&context.mongo, Some(&job)).await?.into_iter().next();
        if named || explicit || stored.is_some() {
            checks.extend(compare_sides(context, sides, args, !named, seed).await?);
        }
        if let Some(stored) = stored {
            jobs.push(job);
            if let Some(quarantine) = of_job(&stored) {
                let Sides { source, target, predicate, .. } = sides;
                combine::only_conditions("a copy with a quarantine", &predicate.valid())?;
                let quarantined = Quarantined { source, target, quarantine: &quarantine, predicate };
                checks.extend(quarantined.checks(context, args, !named, seed).await?);
            }
        }
    }
    Ok((jobs, checks))
}

fn order<'a>(args: &VerifyArgs, sides: &'a Sides) -> full::Order<'a> {
    full::Order {
        source: &sides.source,
        target: &sides.target,
        valid: sides.predicate.valid(),
        rules: sides.predicate.identity(),
        job: full::job_name(&sides.job),
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
    let stored = store::list(mongo, Some(&sides.job)).await?;
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

async fn existing_backfill(context: &Context, args: &VerifyArgs) -> Result<Option<String>> {
    if context.settings.targets.is_empty() {
        return Ok(None);
    }
    let targets = context.settings.targets(args.targets.target.as_deref())?;
    let name = args.job.clone().unwrap_or_else(|| backfill_job(&targets));
    Ok((!store::list(&context.mongo, Some(&name)).await?.is_empty()).then_some(name))
}

async fn compare_sides(
    context: &Context,
    sides: &Sides,
    args: &VerifyArgs,
    all: bool,
    seed: u64,
) -> Result<Vec<Check>> {
    let mongo = &context.mongo;
    let mut checks = Vec::new();
    if args.full || all {
        checks.extend(structure::check(mongo, &sides.source, &sides.target).await?);
    }
    if args.counts || all {
        checks.push(counts::check(mongo, sides).await?);
    }
    if let Some(size) = args.sample.or(all.then_some(DEFAULT_SAMPLE)) {
        checks.extend(sample::check(context, args, sides, size, seed).await?);
    }
    Ok(checks)
}
