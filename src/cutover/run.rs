//! `cutover`: the steps from the first look to the last document.

use std::time::{Duration, Instant};

use bson::{Bson, Document};
use serde_json::json;

use super::bring_back;
use super::exchange::Exchange;
use super::feed_back;
use super::gap;
use super::gates::{self, CHANGED_AT};
use super::in_step::InStep;
use super::order::{Renames, job_name, method, retired_name};
use super::orphan::{self, Orphan};
use super::record::{Record, State, mode_word};
use super::recover::finish_earlier;
use super::report::{self, Report, extended};
use super::residual::Residue;
use super::switch;
use crate::Context;
use crate::cleanse::follow::{Direction, Follower, stored_position};
use crate::cleanse::ledger::Tally;
use crate::cleanse::plan::{Plan, prepare, rules};
use crate::cleanse::run::source_options;
use crate::cleanse::steer::{self, Steered};
use crate::cli::cleanse::CleanseArgs;
use crate::cli::cutover::{CopyArgs, CutoverArgs, Mode};
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::job::{Job, JobState, control, store};
use crate::mongo::feed::Position;
use crate::report::outcome::Outcome;
use crate::report::terminal::{check_terminal, confirm};

/// How long a follower may take to hand over.
const HANDING_OVER: Duration = Duration::from_secs(60);
/// How often it is looked at.
const POLL: Duration = Duration::from_millis(100);

/// Runs the command.
///
/// # Errors
/// Usage errors and refusals, before anything is touched.
pub async fn run(context: &Context, args: &CutoverArgs) -> Result<Outcome> {
    if args.abort {
        return context.unless_interrupted(abort(context, &args.copy)).await;
    }
    check_terminal(args.yes)?;
    check_options(args)?;
    if args.mode == Mode::Switch && !is_cut_over(context, &args.copy).await? {
        return switch::run::run(context, args).await;
    }
    let start = Instant::now();
    let plan = context.unless_interrupted(prepare_copy(context, &args.copy)).await?;
    let stored = stored_job(context, &plan.job).await?;
    let mode = earlier(&stored)?.map_or(args.mode, |record| record.mode);
    if switch::stage::Stage::of(&stored).is_some() {
        return Err(Error::refused(format!("the application is being switched to {}", plan.target))
            .hint("go on with --mode switch; --abort takes back a switch that was not made use of"));
    }
    ask(context, &plan, args, mode).await?;
    let job = context.unless_interrupted(take(context, &plan)).await?;
    let steered = steer::start(context, &job, None).await?;
    let context = &steered.context;
    let mut report = Report::default();
    let mut result = steps(&steered, args, &plan, &job, &mut report).await;
    if result.is_ok() && args.feed_back && report.outcome == "cut_over" {
        result = steered.beside(&job, feed_back::run(&steered, &job, &mut report)).await;
    }
    Ok(finish(context, &plan.job, mode, job, result, &report, start.elapsed()).await)
}

/// Options that don't go together.
fn check_options(args: &CutoverArgs) -> Result<()> {
    if args.mode == Mode::Switch && args.exchange.fence.is_some() {
        return Err(Error::usage("--fence is for --mode swap and keep: a switch does not hold writes off"));
    }
    if args.feed_back && args.mode == Mode::Swap {
        return Err(Error::usage("--feed-back needs an old collection, and --mode swap drops it")
            .hint("use --mode keep; or make the swap reversible by `cleanse --quarantine`"));
    }
    if args.exchange.allow_gap && args.mode != Mode::Keep {
        return Err(Error::usage("--allow-gap is for --mode keep, the only one with two renames"));
    }
    Ok(())
}

/// The plan of the copy that is to be cut over.
///
/// # Errors
/// As for the cleanse itself.
pub async fn prepare_copy(context: &Context, copy: &CopyArgs) -> Result<Plan> {
    let stored = stored_job(context, &job_name(&context.settings, copy)?).await?;
    let identity = stored.get_document("identity").cloned().unwrap_or_default();
    let args = CleanseArgs::of_copy(copy, identity.get_str("quarantine").ok());
    prepare(&context.mongo, &context.settings, &args).await
}

/// The job of a cleanse, as it is stored.
///
/// # Errors
/// A refusal where there is none.
pub async fn stored_job(context: &Context, name: &str) -> Result<Document> {
    store::find(&context.mongo, name).await?.ok_or_else(|| {
        Error::refused(format!("there is no job {name}: nothing was copied yet"))
            .hint("run `cleanse` first, or name its job with --job")
    })
}

/// Whether the names were exchanged already; then the mode is what it was.
async fn is_cut_over(context: &Context, copy: &CopyArgs) -> Result<bool> {
    let stored = stored_job(context, &job_name(&context.settings, copy)?).await?;
    Ok(earlier(&stored)?.is_some())
}

/// An exchange that is done already, whole or but for its last steps.
fn earlier(stored: &Document) -> Result<Option<Record>> {
    Ok(Record::of(stored)?.filter(Record::is_done))
}

async fn ask(context: &Context, plan: &Plan, args: &CutoverArgs, mode: Mode) -> Result<()> {
    let live = &plan.source;
    let what = match mode {
        Mode::Swap => format!("{} will take the place of {live}, which will be DROPPED", plan.target),
        Mode::Keep | Mode::Switch => format!(
            "{} will take the place of {live}, which will be kept as {}",
            plan.target,
            retired_name(live, &plan.job)?
        ),
    };
    context.events.settled().await;
    confirm(
        format!(
            "{what}. Writes are held off for a moment. Change streams and cursors that the application has \
             open on either collection will end. Go on?"
        ),
        args.yes,
    )
    .await
}

/// Takes the job; who follows the source elsewhere hands over. Who feeds back what
/// is cut over already goes on.
///
/// # Errors
/// A refusal where it is not handed over.
pub async fn take(context: &Context, plan: &Plan) -> Result<Job> {
    let stored = stored_job(context, &plan.job).await?;
    if earlier(&stored)?.is_some() {
        return Job::start(&context.mongo, &plan.job, "cleanse", &plan.identity).await;
    }
    take_over(context, &plan.job, &plan.source, &plan.identity).await
}

/// Takes a job; the process that follows or feeds back elsewhere hands over.
///
/// # Errors
/// A refusal where it is not handed over.
pub async fn take_over(context: &Context, name: &str, live: &Namespace, identity: &Document) -> Result<Job> {
    let mongo = &context.mongo;
    let stored = stored_job(context, name).await?;
    if store::is_running(&stored) {
        if Record::of(&stored)?.is_some_and(|record| record.fence.is_some()) {
            return Err(Error::refused(format!("a cutover of {live} is under way"))
                .hint("look at it with `mongorekey status`"));
        }
        context.events.note(format!("asking the process that follows {live} to hand over"));
        control::request(mongo, name, &[control::Change::Stop]).await?;
        let deadline = tokio::time::Instant::now() + HANDING_OVER;
        while store::is_running(&stored_job(context, name).await?) {
            if tokio::time::Instant::now() > deadline {
                return Err(Error::refused(format!("the job {name} was not handed over in time"))
                    .hint("stop the process that runs it, then start again"));
            }
            tokio::time::sleep(POLL).await;
        }
    }
    Job::start(mongo, name, "cleanse", identity).await
}

/// The way of a cutover.
async fn steps(
    steered: &Steered,
    args: &CutoverArgs,
    plan: &Plan,
    job: &Job,
    report: &mut Report,
) -> Result<()> {
    let context = &steered.context;
    // Again, now that nobody else has the job.
    finish_earlier(&context.mongo, job.name()).await?;
    let stored = stored_job(context, &plan.job).await?;
    if let Some(record) = earlier(&stored)? {
        report.outcome = "cut_over";
        report.residue = Residue::stored(&context.mongo, job.name()).await?;
        report.old_collection = record.renames.retired.as_ref().map(ToString::to_string);
        context.events.note("the names were exchanged before");
        return Ok(());
    }
    cut_over(context, args, plan, &forward(steered, plan, job), report).await?;
    report.residue.gap.conflicts = gap::conflicts(&context.mongo, job.name()).await?;
    Ok(())
}

/// The follower from the source to the target of a cleanse.
pub fn forward<'a>(steered: &'a Steered, plan: &'a Plan, job: &'a Job) -> Follower<'a> {
    Follower {
        mongo: &steered.context.mongo,
        pace: &steered.pace,
        job,
        source: &plan.source,
        target: &plan.target,
        valid: plan.predicate.valid(),
        rejected: plan.rejected(),
        tally: std::sync::Mutex::new(Tally::stored(job.document())),
        direction: Direction::Forward,
        options: Some(source_options(plan, job)),
        events: &steered.context.events,
    }
}

/// From where a job is to be followed.
///
/// # Errors
/// A refusal where that is not known.
pub fn stored_position_of(job: &Job, direction: Direction) -> Result<Position> {
    stored_position(job, direction).ok_or_else(|| {
        Error::refused(format!(
            "the job {} does not tell from where its source is to be followed",
            job.name()
        ))
        .hint("copy anew with `cleanse --restart`")
    })
}

async fn cut_over(
    context: &Context,
    args: &CutoverArgs,
    plan: &Plan,
    follower: &Follower<'_>,
    report: &mut Report,
) -> Result<()> {
    let job = follower.job;
    gates::check_copied(job, &plan.source)?;
    let renames = renames(context, plan, job, args.mode).await?;
    let method = method(&context.mongo, &args.exchange, args.mode, &plan.source).await?;
    let position = stored_position_of(job, Direction::Forward)?;
    let mut in_step = InStep::from(follower, position, &context.stop).await?;
    context.events.note(format!("bringing {} up to date", plan.target));
    if in_step.draw_level(&context.stop).await?.is_none() {
        return Err(context.interrupted("interrupted before writes were held off; everything is as before"));
    }
    let changed_at = job.stored(CHANGED_AT);
    report.gates.push(gates::verified(context, plan, changed_at, &mut in_step).await?);
    if args.mode == Mode::Swap {
        // All that is left of what a swap drops.
        report.gates.extend(bring_back::verified(context, plan, job, &mut in_step).await?);
    }
    report.gates.extend(gates::rehearsed(context, &mut in_step, method.max_pause).await?);
    if let Some(refusal) = gates::refusal(&report.gates) {
        report.outcome = "refused";
        return Err(refusal);
    }
    let exchange = Exchange { context, job: &plan.job, mode: args.mode, is_rollback: false, renames, method };
    report.exchanged(&exchange, exchange.run(&mut in_step).await?, "cut_over");
    Ok(())
}

async fn renames(context: &Context, plan: &Plan, job: &Job, mode: Mode) -> Result<Renames> {
    let uuid = |field: &str| job.stored(field).cloned().unwrap_or(Bson::Null);
    let renames = Renames {
        live: plan.source.clone(),
        live_uuid: uuid("source_uuid"),
        incoming: plan.target.clone(),
        incoming_uuid: uuid("target_uuid"),
        retired: if mode == Mode::Keep { Some(retired_name(&plan.source, &plan.job)?) } else { None },
        working: None,
    };
    gates::check_known(&context.mongo, &renames.live, Some(&renames.live_uuid)).await?;
    gates::check_known(&context.mongo, &renames.incoming, Some(&renames.incoming_uuid)).await?;
    if let Some(retired) = &renames.retired
        && context.mongo.bearer(retired).await?.is_some()
    {
        return Err(Error::refused(format!(
            "{retired} exists already: the old collection can't be kept under that name"
        ))
        .hint("drop or rename it"));
    }
    Ok(renames)
}

/// Lifts the fence of a cutover that was cut short.
async fn abort(context: &Context, copy: &CopyArgs) -> Result<Outcome> {
    let source = rules(&context.settings, copy.source.as_ref())?.source;
    let mut orphans = orphan::find(&context.mongo, &source.database).await?;
    orphans.retain(|orphan| *orphan.live() == source);
    if let Some(orphan) = orphans.first() {
        return abort_orphan(context, orphan).await;
    }
    let name = job_name(&context.settings, copy)?;
    let stored = stored_job(context, &name).await?;
    if switch::stage::Stage::of(&stored).is_some() {
        return switch::run::abort(context, copy).await;
    }
    let record = Record::of(&stored)?.filter(|record| record.fence.is_some());
    let Some(record) = record else {
        let json = json!({"schema": 1, "command": "cutover", "job": name, "outcome": "nothing_to_abort"});
        return Ok(Outcome::reached(
            json,
            format!("{name}: no writes are held off, there is nothing to abort"),
        ));
    };
    if store::is_running(&stored) {
        return Err(Error::refused("the cutover is under way, and its process is alive").hint(
            "stop that process (it lifts the fence itself); then --abort, if writes are still refused",
        ));
    }
    let state = finish_earlier(&context.mongo, &name).await?;
    let residue = Residue::stored(&context.mongo, &name).await?;
    Ok(aborted(&name, Some(record.mode), state, &residue))
}

/// The same for a fence whose job is gone.
async fn abort_orphan(context: &Context, orphan: &Orphan) -> Result<Outcome> {
    context.events.warn(format!(
        "the job {} does not know of the fence around {}",
        orphan.job,
        orphan.live()
    ));
    let lifted = orphan.lift(&context.mongo).await?;
    Ok(aborted(&orphan.job, None, Some(lifted.state), &lifted.residue))
}

/// What an abort has come to.
fn aborted(name: &str, mode: Option<Mode>, state: Option<State>, residue: &Residue) -> Outcome {
    let (outcome, text) = match state {
        Some(State::Finished) => ("cut_over", "the names were exchanged already, the new collection is live"),
        _ => ("aborted", "the old collection is live as before, its writes go on"),
    };
    let json = json!({
        "schema": 1,
        "command": "cutover",
        "job": name,
        "mode": mode.map(mode_word),
        "outcome": outcome,
        "lost_writes": extended(&residue.lost),
        "gap": report::gap(&residue.gap),
    });
    let text = format!("{name}: {text}");
    if residue.is_whole() {
        Outcome::reached(json, text)
    } else {
        Outcome::not_reached(json, format!("{text}; not all that was written at the last moment is there"))
    }
}

/// Gives the job back and tells what it came to.
pub async fn finish(
    context: &Context,
    name: &str,
    mode: Mode,
    job: Job,
    result: Result<()>,
    report: &Report,
    elapsed: Duration,
) -> Outcome {
    let mut report = report.clone();
    if let (true, Err(error)) = (report.outcome.is_empty(), &result) {
        // An error may come after the names were exchanged, and then that is what counts.
        let stored = stored_job(context, name).await.ok();
        let record = stored.and_then(|stored| Record::of(&stored).ok().flatten());
        report.ended_by(error, record.as_ref());
    }
    give_back(context, job, &result).await;
    let json = report.json(name, mode, elapsed);
    let text = report.text(name, mode);
    match result {
        Err(error) => Outcome::failed(json, text, error),
        Ok(()) if report.is_reached() => Outcome::reached(json, text),
        Ok(()) => Outcome::not_reached(json, text),
    }
}

/// Gives the job back, in the state that this result leaves it in.
pub async fn give_back(context: &Context, job: Job, result: &Result<()>) {
    let state = match result {
        Ok(()) => JobState::Completed,
        Err(error) => JobState::of_failure(error),
    };
    if let Err(error) = job.finish(state, Document::new()).await {
        context.events.warn(format!("the end of the job could not be stored: {error}"));
    }
}
