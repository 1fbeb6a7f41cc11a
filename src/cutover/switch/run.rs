//! The steps of a switch, and of its way back.

use std::time::Instant;

use bson::{Bson, doc};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::owned::Ids;
use super::report::Report;
use super::stage::{FIELD, Stage, taken_back};
use super::sync::Sync;
use crate::Context;
use crate::cleanse::follow::{Direction, Follower};
use crate::cleanse::plan::Plan;
use crate::cleanse::steer::{self, Steered};
use crate::cli::cutover::{CopyArgs, CutoverArgs, RollbackArgs};
use crate::crash;
use crate::cutover::gates::{self, CHANGED_AT};
use crate::cutover::in_step::InStep;
use crate::cutover::rollback::backward;
use crate::cutover::run::{forward, give_back, prepare_copy, stored_job, stored_position_of, take_over};
use crate::error::{Error, Result};
use crate::job::{Job, store};
use crate::mongo::feed::{Position, after, nudge};
use crate::report::outcome::Outcome;
use crate::report::terminal::confirm;

/// Runs `cutover --mode switch`.
///
/// # Errors
/// Usage errors and refusals, before anything is touched.
pub async fn run(context: &Context, args: &CutoverArgs) -> Result<Outcome> {
    let start = Instant::now();
    let plan = context.unless_interrupted(prepare_copy(context, &args.copy)).await?;
    check_plan(&plan)?;
    let stored = context.unless_interrupted(stored_job(context, &plan.job)).await?;
    match Stage::of(&stored) {
        Some(Stage::RolledBack) => return Err(taken_back(&plan.source, &plan.target)),
        Some(_) => {}
        None => ask(context, &plan, args.yes).await?,
    }
    let taken = take_over(context, &plan.job, &plan.source, &plan.identity);
    let job = context.unless_interrupted(taken).await?;
    let steered = steer::start(context, &job, None).await?;
    let mut report = new_report("cutover", &plan);
    let result = steered.beside(&job, switch(&steered, args, &plan, &job, &mut report)).await;
    Ok(finish(&steered.context, job, result, &mut report, start).await)
}

/// Runs `rollback` after a switch.
///
/// # Errors
/// Usage errors and refusals, before anything is touched.
pub async fn roll_back(context: &Context, args: &RollbackArgs, stage: Stage) -> Result<Outcome> {
    let start = Instant::now();
    let plan = context.unless_interrupted(prepare_copy(context, &args.copy)).await?;
    if args.discard_writes_since_cutover {
        return Err(Error::usage("--discard-writes-since-cutover is for --mode keep").hint(
            "after a switch the old collection is there as it was left: deploy the application to it",
        ));
    }
    if matches!(stage, Stage::Switching | Stage::Switched) {
        return Err(Error::refused(format!(
            "{} does not have what was written to {} since the switch",
            plan.source, plan.target
        ))
        .hint("bring it back first: `cutover --mode switch --feed-back`, then `rollback`"));
    }
    context.events.settled().await;
    let question = format!(
        "{} is kept up to date until {} was quiet for {:.0?}: deploy the application to {} meanwhile. Go on?",
        plan.source, plan.target, args.quiet_for.0, plan.source
    );
    confirm(question, args.yes).await?;
    let taken = take_over(context, &plan.job, &plan.target, &plan.identity);
    let job = context.unless_interrupted(taken).await?;
    let steered = steer::start(context, &job, None).await?;
    let mut report = new_report("rollback", &plan);
    let work = async {
        if stage != Stage::RolledBack
            && !feed_back(&steered, &plan, &job, Some(args.quiet_for.0), &mut report).await?
        {
            return Err(steered.context.interrupted("interrupted; started again it goes on"));
        }
        Stage::RolledBack.save(&job).await?;
        report.outcome = "rolled_back";
        Ok(())
    };
    let result = steered.beside(&job, work).await;
    Ok(finish(&steered.context, job, result, &mut report, start).await)
}

/// Takes back a switch that nobody has made use of.
///
/// # Errors
/// A refusal where the application has written to the new collection.
pub async fn abort(context: &Context, copy: &CopyArgs) -> Result<Outcome> {
    let plan = prepare_copy(context, copy).await?;
    if store::is_running(&stored_job(context, &plan.job).await?) {
        return Err(Error::refused("the switch is under way, and its process is alive")
            .hint("stop that process, then --abort"));
    }
    let job = Job::start(&context.mongo, &plan.job, "cleanse", &plan.identity).await?;
    let steered = steer::start(context, &job, None).await?;
    let result = forget_unused(&steered, &plan, &job).await;
    give_back(context, job, &result).await;
    result?;
    let json = json!({
        "schema": 1, "command": "cutover", "job": plan.job, "mode": "switch", "outcome": "aborted",
    });
    let text = format!("{}: the switch is taken back, the application has made no use of it", plan.job);
    Ok(Outcome::reached(json, text))
}

async fn forget_unused(steered: &Steered, plan: &Plan, job: &Job) -> Result<()> {
    let follower = forward(steered, plan, job);
    let mut sync = Sync::of(&follower, &stored_job(&steered.context, job.name()).await?).await?;
    sync.look().await?;
    let owned = sync.owned.count().await?;
    if owned > 0 {
        return Err(Error::refused(format!(
            "the application has written to {owned} documents of {}",
            plan.target
        ))
        .hint("`cutover --mode switch --feed-back` brings that back, then `rollback`"));
    }
    job.save(doc! {FIELD: Bson::Null}).await
}

fn new_report(command: &'static str, plan: &Plan) -> Report {
    Report { command, old_collection: plan.source.to_string(), ..Report::default() }
}

/// What a switch does not do.
fn check_plan(plan: &Plan) -> Result<()> {
    let valid = plan.predicate.valid();
    let what = if valid.grouping.is_some() {
        "dedupe: writes to both sides would have no common winner"
    } else if !valid.memberships.is_empty() {
        "exists_in"
    } else if plan.quarantine.is_some() {
        "--quarantine"
    } else if plan.description.collation().is_some() {
        "a collation: different `_id`s may be equal"
    } else if plan.dual_write {
        "--dual-write: there the application keeps both sides up to date itself"
    } else {
        return Ok(());
    };
    Err(Error::usage(format!("--mode switch does not go together with {what}"))
        .hint("use --mode keep or --mode swap"))
}

async fn ask(context: &Context, plan: &Plan, yes: bool) -> Result<()> {
    context.events.settled().await;
    let question = format!(
        "{} is kept up to date from {} while the application is deployed to it. What the application has \
         written to {} itself is left alone. Go on?",
        plan.target, plan.source, plan.target
    );
    confirm(question, yes).await
}

async fn switch(
    steered: &Steered,
    args: &CutoverArgs,
    plan: &Plan,
    job: &Job,
    report: &mut Report,
) -> Result<()> {
    let context = &steered.context;
    let follower = forward(steered, plan, job);
    let mut stage = Stage::of(&stored_job(context, job.name()).await?);
    if stage.is_none() {
        begin(context, plan, &follower, report).await?;
        stage = Some(Stage::Switching);
    }
    if matches!(stage, Some(Stage::Switching | Stage::Switched)) {
        context.events.note(format!(
            "{} follows {}: deploy the application to {}",
            plan.target, plan.source, plan.target
        ));
        let mut sync = Sync::of(&follower, &stored_job(context, job.name()).await?).await?;
        let was_quiet = sync.run(Some(args.quiet_for.0), &context.stop).await;
        report.forward = sync.done;
        if !was_quiet? {
            return Err(context
                .interrupted("interrupted before the old collection was quiet; started again it goes on"));
        }
        sync.settle_conflicts().await?;
        report.conflicts = sync.first_conflicts().await?;
        report.owned = sync.owned.count().await?;
        Stage::Switched.save(job).await?;
        crash::point("switch_done");
    }
    report.outcome = "cut_over";
    if args.feed_back {
        context.events.note(format!(
            "{} was quiet for {:.0?}; it follows {} now",
            plan.source, args.quiet_for.0, plan.target
        ));
        feed_back(steered, plan, job, None, report).await?;
        return Err(context.interrupted("interrupted; started again it goes on feeding back"));
    }
    Ok(())
}

/// From an ordinary follower to one that yields: the last moment at which the new
/// collection is known to be nothing but a copy.
async fn begin(context: &Context, plan: &Plan, follower: &Follower<'_>, report: &mut Report) -> Result<()> {
    let (mongo, job) = (&context.mongo, follower.job);
    gates::check_copied(job, &plan.source)?;
    gates::check_collections(mongo, plan, job.document()).await?;
    let mut in_step =
        InStep::from(follower, stored_position_of(job, Direction::Forward)?, &context.stop).await?;
    let stopped = || context.interrupted("interrupted before the switch was begun; everything is as before");
    in_step.draw_level(&context.stop).await?.ok_or_else(stopped)?;
    report.gates.push(gates::verified(context, plan, job.stored(CHANGED_AT), &mut in_step).await?);
    report.gates.push(gates::lag(context, &mut in_step).await?);
    if let Some(refusal) = gates::refusal(&report.gates) {
        report.outcome = "refused";
        return Err(refusal);
    }
    in_step.draw_level(&CancellationToken::new()).await?;
    // From here on whatever is written to the new collection, but by us, is the application's.
    let since = Position::Time(after(mongo.last_write_time().await?));
    nudge(mongo).await?;
    job.save(doc! {
        Direction::Forward.position(): in_step.position().to_document(),
        Direction::Back.position(): since.to_document(),
        FIELD: {"v": 1, "stage": Stage::Switching.as_str(), "sessions": []},
    })
    .await?;
    crash::point("switch_begun");
    Ok(())
}

/// Brings what the application has written to the new collection back to the old
/// one, until the new one was quiet for that long; returns whether it was.
async fn feed_back(
    steered: &Steered,
    plan: &Plan,
    job: &Job,
    quiet_for: Option<std::time::Duration>,
    report: &mut Report,
) -> Result<bool> {
    let (context, mongo) = (&steered.context, &steered.context.mongo);
    let stored = stored_job(context, job.name()).await?;
    let options = mongo.describe(&plan.target).await?.map(|target| target.options).unwrap_or_default();
    let follower = backward(steered, job, &plan.target, &plan.source, options);
    let mut sync = Sync::of(&follower, &stored).await?;
    let result = async {
        if Stage::of(&stored) == Some(Stage::Switched) {
            bring_back_owned(&mut sync, &follower, context).await?;
            Stage::FeedingBack.save(job).await?;
            crash::point("switch_brought_back");
        }
        sync.run(quiet_for, &context.stop).await
    }
    .await;
    report.back = Some(sync.done);
    let was_quiet = result?;
    sync.settle_conflicts().await?;
    report.conflicts = sync.first_conflicts().await?;
    report.owned = Ids::owned(mongo, job.name(), Direction::Forward).count().await?;
    Ok(was_quiet)
}

/// Everything that belongs to the new collection, but for what the old one tells
/// differently: that stays as each side has it.
async fn bring_back_owned(sync: &mut Sync<'_>, follower: &Follower<'_>, context: &Context) -> Result<()> {
    let (mongo, job) = (follower.mongo, follower.job.name());
    let contested = Ids::conflicts(mongo, job, Direction::Forward);
    let mut last = None;
    loop {
        let page = contested.page(last.as_ref()).await?;
        let Some(end) = page.last().cloned() else { break };
        sync.owned.add(&page).await?;
        sync.conflicts.add(&page).await?;
        last = Some(end);
    }
    let owned = Ids::owned(mongo, job, Direction::Forward);
    let mut last = None;
    loop {
        let page = owned.page(last.as_ref()).await?;
        let Some(end) = page.last().cloned() else { return Ok(()) };
        if context.stop.is_cancelled() {
            return Err(context.interrupted("interrupted; started again it goes on feeding back"));
        }
        let now = mongo.last_write_time().await?;
        sync.bring(&page, Some(now)).await?;
        last = Some(end);
    }
}

async fn finish(
    context: &Context,
    job: Job,
    result: Result<()>,
    report: &mut Report,
    start: Instant,
) -> Outcome {
    if let (true, Err(error)) = (report.outcome.is_empty(), &result) {
        report.outcome = error.class().code();
    }
    let name = job.name().to_owned();
    give_back(context, job, &result).await;
    let (json, text) = (report.json(&name, start.elapsed()), report.text(&name));
    match result {
        Err(error) => Outcome::failed(json, text, error),
        Ok(()) if report.is_reached() => Outcome::reached(json, text),
        Ok(()) => Outcome::not_reached(json, text),
    }
}
