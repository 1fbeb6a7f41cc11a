//! `verify`: the checks that apply, one after the other.

use bson::{Document, doc};
use serde_json::json;

use super::check::Check;
use super::quarantine::Quarantined;
use super::repair::{self, Repair};
use super::result::Findings;
use super::sides::Sides;
use super::wanted::{There, Wanted};
use super::{backfill, counts, dual_write, full, keys, sample, structure, unique, verdict};
use crate::Context;
use crate::backfill::default_job as backfill_job;
use crate::cleanse::quarantine::of_job;
use crate::cleanse::{combine, count, needs};
use crate::cli::verify::VerifyArgs;
use crate::cutover::situation::Situation;
use crate::error::{Error, Result};
use crate::job::store;
use crate::mongo::valid::Valid;
use crate::report::outcome::Outcome;
use crate::report::terminal::check_terminal;

/// One run.
struct Run<'a> {
    context: &'a Context,
    args: &'a VerifyArgs,
    wanted: Wanted,
    seed: u64,
    /// The job of the copy, as it is stored.
    copy: Option<Document>,
    findings: Findings,
}

/// Runs the command.
///
/// # Errors
/// A refusal where there is nothing to verify; a stop where the server goes away.
pub async fn run(context: &Context, args: &VerifyArgs) -> Result<Outcome> {
    let sides = context.unless_interrupted(Sides::of(context, args)).await?;
    check_options(context, args, sides.as_ref())?;
    if let Some(sides) = &sides {
        needs::check_reading(&context.mongo, &sides.source, &sides.predicate.valid()).await?;
    }
    let repair = match &sides {
        Some(sides) if args.repair => Some(repair::prepare(context, args, sides).await?),
        _ => None,
    };
    if args.keys.is_some() {
        // Before hours of comparing, and again when it is their turn.
        context.unless_interrupted(check_turn(context, args)).await?;
    }
    let mut run = context.unless_interrupted(Run::begin(context, args, sides.as_ref())).await?;
    run.check_quarantine(sides.as_ref())?;
    if let Some(sides) = sides.as_ref().filter(|_| run.wanted.concerns_sides()) {
        context.unless_interrupted(run.check_situation(sides)).await?;
    }
    let checked = run.check(sides.as_ref(), repair).await;
    run.keep(checked);
    if let Some(sides) = sides.as_ref().filter(|_| run.wanted.concerns_sides()) {
        let failed = run.findings.failed_of_sides();
        let taken_back = verdict::take_back(&context.mongo, &sides.job, failed).await;
        run.keep(taken_back);
    }
    let asked = run.ask_again().await;
    run.keep(asked);
    run.outcome()
}

async fn check_turn(context: &Context, args: &VerifyArgs) -> Result<()> {
    let settings = &context.settings;
    let targets = settings.targets(args.targets.target.as_deref())?;
    keys::check_turn(&context.mongo, args.job.as_deref(), &targets, settings.key_api()?).await
}

/// Options that need what is not configured.
fn check_options(context: &Context, args: &VerifyArgs, sides: Option<&Sides>) -> Result<()> {
    let of_two =
        [(args.full, "--full"), (args.dual_write, "--dual-write"), (args.sample.is_some(), "--sample")];
    if let Some((_, option)) = of_two.into_iter().find(|(is_given, _)| *is_given && sides.is_none()) {
        return Err(Error::usage(format!("{option} compares two collections, and none are named"))
            .hint("add `[cleanse]` with `source` and `to`, or give --source and --to"));
    }
    if let Some(sides) = sides.filter(|_| args.dual_write) {
        combine::only_conditions("--dual-write", &sides.predicate.valid())?;
    }
    if args.unique || args.keys.is_some() {
        context.settings.targets(args.targets.target.as_deref())?;
    }
    if args.keys.is_some() {
        context.settings.key_api()?;
    }
    if args.repair {
        check_terminal(args.yes)?;
    }
    Ok(())
}

impl<'a> Run<'a> {
    async fn begin(context: &'a Context, args: &'a VerifyArgs, sides: Option<&Sides>) -> Result<Self> {
        let mut findings = Findings::default();
        let copy = match sides {
            Some(sides) => store::find(&context.mongo, &sides.job).await?,
            None => None,
        };
        let filled = existing_backfill(context, args).await?;
        let there = There {
            sides: sides.is_some(),
            named_sides: args.source.is_some() || args.to.is_some(),
            copy: copy.is_some(),
            cut_over: situation(copy.as_ref())?.is_some(),
            backfill: filled.is_some(),
            unique_keys: context.settings.key_api.as_ref().is_some_and(|api| api.unique_keys),
        };
        let wanted = Wanted::of(args, there);
        let concerns_targets = wanted.candidates || wanted.unique || wanted.keys.is_some();
        findings.jobs.extend(filled.filter(|_| concerns_targets));
        let seed = args.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
        findings.seed = (wanted.sample.is_some() || wanted.keys.is_some()).then_some(seed);
        Ok(Self { context, args, wanted, seed, copy, findings })
    }

    /// Whether what the rules reject can be told document by document, where it is kept.
    fn check_quarantine(&self, sides: Option<&Sides>) -> Result<()> {
        match sides.filter(|_| self.wanted.concerns_sides()) {
            Some(sides) if self.copy.as_ref().and_then(of_job).is_some() => {
                combine::only_conditions("a copy with a quarantine", &sides.predicate.valid())
            }
            _ => Ok(()),
        }
    }

    /// Whether source and copy are still to be the same, as the job tells. Whoever names both
    /// means the collections that have these names now.
    async fn check_situation(&self, sides: &Sides) -> Result<()> {
        let Some(situation) = situation(self.copy.as_ref())? else { return Ok(()) };
        let are_named = self.args.source.is_some() && self.args.to.is_some();
        if are_named && self.context.mongo.bearer(&sides.target).await?.is_some() {
            return Ok(());
        }
        Err(situation.not_compared())
    }

    /// All checks but those that are calls.
    async fn check(&mut self, sides: Option<&Sides>, repair: Option<Repair>) -> Result<()> {
        let context = self.context;
        // These keep nothing that would have to be saved.
        context.unless_interrupted(self.check_targets()).await?;
        let Some(sides) = sides.filter(|_| self.wanted.concerns_sides()) else { return Ok(()) };
        if repair.is_none() {
            context.unless_interrupted(self.compare_sides(sides)).await?;
            return self.slow_checks(sides, None).await;
        }
        // What a repair may change is judged after it.
        self.slow_checks(sides, repair).await?;
        if self.findings.error.is_some() {
            return Ok(());
        }
        self.copy = store::find(&context.mongo, &sides.job).await?;
        context.unless_interrupted(self.compare_sides(sides)).await
    }

    /// What was found before an error is no less true; the first error is told.
    fn keep(&mut self, result: Result<()>) {
        if let Err(error) = result {
            self.findings.error.get_or_insert(error);
        }
    }

    /// What the run came to.
    fn outcome(mut self) -> Result<Outcome> {
        if self.findings.is_empty() {
            return Err(self.findings.error.take().unwrap_or_else(|| self.nothing()));
        }
        Ok(self.findings.outcome())
    }

    /// All checks of what a backfill has filled but those that are calls.
    async fn check_targets(&mut self) -> Result<()> {
        let mongo = &self.context.mongo;
        if self.wanted.candidates || self.wanted.unique {
            let targets = self.context.settings.targets(self.args.targets.target.as_deref())?;
            for target in targets.iter().filter(|_| self.wanted.candidates) {
                self.findings.of_targets.extend(backfill::check(mongo, target).await?);
            }
            if self.wanted.unique {
                let asked = unique::Asked {
                    new_keys: self.wanted.unique_new_keys,
                    by_name: self.args.unique,
                    most: self.args.max_differences,
                };
                self.findings.of_targets.extend(unique::check(mongo, &targets, asked).await?);
            }
        }
        Ok(())
    }

    /// All checks of both sides but those that are jobs.
    async fn compare_sides(&mut self, sides: &Sides) -> Result<()> {
        let (mongo, wanted) = (&self.context.mongo, self.wanted);
        let checks = &mut self.findings.of_sides;
        if wanted.structure {
            checks.extend(structure::check(mongo, &sides.source, &sides.target).await?);
        }
        if wanted.counts {
            checks.push(counts::check(self.context, sides, self.copy.as_ref(), self.args.settle.0).await?);
        }
        if let Some(size) = wanted.sample {
            checks.extend(sample::check(self.context, self.args, sides, size, self.seed).await?);
        }
        let Some(copy) = &self.copy else { return Ok(()) };
        self.findings.jobs.push(sides.job.clone());
        if let Some(quarantine) = of_job(copy) {
            let quarantined = Quarantined { sides, quarantine: &quarantine, copy };
            let wanted = self.wanted;
            checks.extend(quarantined.checks(self.context, self.args, wanted, self.seed).await?);
        }
        Ok(())
    }

    /// What has a job of its own, or takes its time.
    async fn slow_checks(&mut self, sides: &Sides, repair: Option<Repair>) -> Result<()> {
        if self.wanted.full {
            self.full(sides, repair).await?;
        }
        if self.wanted.dual_write && self.findings.error.is_none() {
            let watched = dual_write::run(self.context, &watch_order(self.args, sides)).await?;
            self.findings.of_sides.insert(0, watched.check);
            self.findings.figures.push(("dual_write", watched.summary));
            self.findings.error = watched.error;
        }
        Ok(())
    }

    async fn full(&mut self, sides: &Sides, repair: Option<Repair>) -> Result<()> {
        let mut full = full::run(self.context, &order(self.args, sides)).await?;
        self.findings.jobs.push(full.job.clone());
        if let Some(repair) = repair
            && full.error.is_none()
        {
            full = self.repair(sides, repair, full).await?;
        }
        let is_unbroken = full.error.is_none();
        self.findings.of_sides.insert(0, full.check);
        self.findings.figures.push(("full", full.summary));
        self.findings.error = full.error;
        if is_unbroken && let Some(quarantine) = self.full_quarantine(sides).await? {
            self.findings.jobs.push(quarantine.job);
            self.findings.of_sides.insert(1, quarantine.check);
            self.findings.error = quarantine.error;
        }
        Ok(())
    }

    /// Repairs what the first pass found, and compares again.
    async fn repair(&mut self, sides: &Sides, repair: Repair, first: full::Full) -> Result<full::Full> {
        if first.check.passed {
            let nothing = json!({"needed": false, "before": first.check.json()});
            self.findings.figures.push(("repair", nothing));
            return Ok(first);
        }
        let differing = repair::differing(&first);
        let before = json!({"check": first.check.json(), "full": first.summary.clone()});
        let repaired = match repair.run(self.context, self.args, &first.job, differing).await {
            Ok(repaired) => repaired,
            Err(error) => return Ok(full::Full { error: Some(error), ..first }),
        };
        self.context.events.note(format!(
            "repaired: {} documents differed, {} were written and {} removed; comparing again",
            repaired.differing, repaired.followed.applied.written, repaired.followed.applied.removed
        ));
        let mut figures = repaired.json();
        (figures["needed"], figures["before"]) = (json!(true), before);
        self.findings.figures.push(("repair", figures));
        full::run(self.context, &order(self.args, sides)).await
    }

    /// Compares the quarantine with what the rules reject, where it holds anything: whether it may
    /// be empty is told by the counts.
    async fn full_quarantine(&self, sides: &Sides) -> Result<Option<full::Full>> {
        let Some(quarantine) = self.copy.as_ref().and_then(of_job) else { return Ok(None) };
        let order = order(self.args, sides);
        if count::exactly(&self.context.mongo, &quarantine, &Document::new()).await? == 0 {
            return Ok(None);
        }
        let order = full::Order {
            target: &quarantine,
            valid: Valid::condition(doc! {"$nor": [order.valid.condition]}),
            job: full::quarantine_job_name(&sides.job),
            is_quarantine: true,
            ..order
        };
        let result = full::run(self.context, &order).await?;
        let check = Check { name: "full quarantine".into(), ..result.check };
        Ok(Some(full::Full { check, ..result }))
    }

    async fn ask_again(&mut self) -> Result<()> {
        let Some(wanted) = self.wanted.keys.filter(|_| self.findings.error.is_none()) else { return Ok(()) };
        let keys = keys::check(self.context, self.args, wanted, self.seed).await?;
        self.findings.of_targets.push(keys.check);
        self.findings.error = keys.error;
        Ok(())
    }

    fn nothing(&self) -> Error {
        match situation(self.copy.as_ref()).ok().flatten() {
            Some(situation) => situation.not_compared(),
            _ => Error::refused("there is nothing to verify: no job of this config has run yet")
                .hint("run `backfill` or `cleanse` first, or name two collections with --source and --to"),
        }
    }
}

fn situation(copy: Option<&Document>) -> Result<Option<Situation>> {
    Ok(copy.map(Situation::of).transpose()?.flatten())
}

fn order<'a>(args: &VerifyArgs, sides: &'a Sides) -> full::Order<'a> {
    full::Order {
        source: &sides.source,
        target: &sides.target,
        valid: sides.predicate.valid(),
        rules: sides.predicate.identity(),
        job: full::job_name(&sides.job),
        copy: &sides.job,
        parallel: usize::from(args.parallel),
        settle: args.settle.0,
        restart: args.restart,
        most: args.max_differences,
        is_quarantine: false,
    }
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
    Ok(store::find(&context.mongo, &name).await?.map(|_| name))
}
