//! The backfill from its first check to its last count: order and policy.

use std::sync::Arc;
use std::time::Instant;

use bson::{Bson, Document};
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::canary;
use super::checkpoint::Board;
use super::counts::{Documents, add};
use super::plan::{Options, Plan, prepare};
use super::summary::Report;
use super::worker::Worker;
use crate::Context;
use crate::crash;
use crate::error::{Class, Error, Result, joined};
use crate::job::{Job, JobState, store};
use crate::report::outcome::Outcome;
use crate::signals::SIGTERM;

/// Runs the command.
///
/// # Errors
/// Usage errors and refusals; what happens after the job has started is part
/// of the outcome.
pub async fn run(context: &Context, options: &Options) -> Result<Outcome> {
    if options.from_key_map && !options.dry_run {
        return super::from_key_map::run(context, options).await;
    }
    let plan =
        Arc::new(context.unless_interrupted(prepare(&context.mongo, &context.settings, options)).await?);
    if options.dry_run {
        return context.unless_interrupted(dry_run(&plan)).await;
    }
    let mut canary = None;
    if let Some(documents) = options.canary {
        canary::check_question(options)?;
        let (mut report, started) = canary_run(context, &plan, documents).await?;
        if !canary::goes_on(context, options, &report).await? {
            if context.stop.is_cancelled() {
                report.state = JobState::Interrupted;
            }
            return finish(context, &plan, report, started).await;
        }
        canary = Some((report, started));
    }
    let (mut report, mut started) = all_workers(context, &plan, options).await?;
    if report.was_left_alone && report.state == JobState::Completed && !context.stop.is_cancelled() {
        // Nobody is left to join: now the job is ours.
        (report, started) = all_workers(context, &plan, &Options { join: false, ..options.clone() }).await?;
    }
    if let Some((first, begun)) = canary {
        (report, started) = (first.followed_by(report), begun);
    }
    finish(context, &plan, report, started).await
}

async fn canary_run(context: &Context, plan: &Arc<Plan>, documents: u64) -> Result<(Report, Instant)> {
    let job = context.unless_interrupted(start(context, plan)).await?;
    warn_of_other_callers(context, plan).await?;
    let started = Instant::now();
    let worker = Worker::new(context, plan, job, Board::default(), context.stop.child_token())?;
    Ok((worker.only(documents).run().await, started))
}

/// Starts the workers of this process and waits for all of them. The first one
/// that can't go on ends the others.
async fn all_workers(context: &Context, plan: &Arc<Plan>, options: &Options) -> Result<(Report, Instant)> {
    let first = context.unless_interrupted(take_part(context, plan, options.join)).await?;
    if options.canary.is_none() {
        warn_of_other_callers(context, plan).await?;
    }
    let started = Instant::now();
    let halt = context.stop.child_token();
    let mut workers = JoinSet::new();
    let board = Board::default();
    workers.spawn(Worker::new(context, plan, first, board.clone(), halt.child_token())?.run());
    for _ in 1..options.workers.unwrap_or(1) {
        workers.spawn(joining(context.clone(), plan.clone(), board.clone(), halt.child_token()));
    }
    let mut all: Option<Report> = None;
    while let Some(report) = workers.join_next().await {
        let report = joined(report)?;
        if report.error.is_some() {
            halt.cancel();
        }
        match &mut all {
            Some(all) => all.merge(report),
            None => all = Some(report),
        }
    }
    Ok((all.unwrap_or_else(|| Report::empty(JobState::Completed)), started))
}

/// A further worker of this process; none where the job is done before it could
/// join.
async fn joining(context: Context, plan: Arc<Plan>, board: Board, stop: CancellationToken) -> Report {
    let join = Job::join(&context.mongo, &plan.job, "backfill", &plan.identity);
    let worker = match context.unless_interrupted(join).await {
        Ok(Some(job)) => Worker::new(&context, &plan, job, board, stop),
        Ok(None) => return Report::empty(JobState::Completed),
        Err(error) => Err(error),
    };
    match worker {
        Ok(worker) => worker.run().await,
        Err(error) => {
            let state = JobState::of_failure(&error);
            Report { error: Some(error), ..Report::empty(state) }
        }
    }
}

/// Joins those who run the job, or starts it where nobody does.
async fn take_part(context: &Context, plan: &Plan, join: bool) -> Result<Job> {
    if join && let Some(job) = Job::join(&context.mongo, &plan.job, "backfill", &plan.identity).await? {
        context.events.note(format!("joined the job {}", job.name()));
        return Ok(job);
    }
    start(context, plan).await
}

async fn start(context: &Context, plan: &Plan) -> Result<Job> {
    let job = Job::start(&context.mongo, &plan.job, "backfill", &plan.identity).await?;
    if job.was_taken_over() {
        context.events.note(format!("took over the job {} from a process that is gone", job.name()));
    }
    job.save(plan.settings()).await?;
    crash::point("after_claim");
    Ok(job)
}

/// Each job keeps to its own ceiling, and the API sees the calls of all of them.
async fn warn_of_other_callers(context: &Context, plan: &Plan) -> Result<()> {
    let Ok(api) = plan.identity.get_str("api") else { return Ok(()) };
    for job in store::list(&context.mongo, None).await?.iter().filter(|job| store::calls(job, api)) {
        let name = job.get_str("_id").unwrap_or_default();
        if name != plan.job {
            context.events.warn(format!(
                "the job {name} is run for the same API at this moment: their calls add up to more than one \
                 ceiling; lower --tps, or give the targets to one job"
            ));
        }
    }
    Ok(())
}

async fn dry_run(plan: &Plan) -> Result<Outcome> {
    let mut documents = Documents::default();
    for collection in &plan.collections {
        documents.candidates += collection.count().await?;
    }
    documents.candidates_left = documents.candidates;
    let text = format!(
        "dry run: {} candidates, nothing was called or written\n`mongorekey plan` tells how many calls they need",
        documents.candidates
    );
    let report = Report { documents, ..Report::empty(JobState::Completed) };
    let mut json = report.json(&plan.job, 0.0);
    json["dry_run"] = json!(true);
    Ok(Outcome::reached(json, text))
}

async fn finish(context: &Context, plan: &Plan, mut report: Report, started: Instant) -> Result<Outcome> {
    let elapsed = started.elapsed().as_secs_f64();
    let stored = stored(context, plan).await;
    if report.state == JobState::Completed && stored.as_ref().is_some_and(is_incomplete) {
        context.events.note("documents failed in the hands of another worker: `status` tells which");
        report.state = JobState::Incomplete;
    }
    let mut json = report.json(&plan.job, elapsed);
    if let Some(totals) = stored.as_ref().map(job_totals) {
        json["job_totals"] = Bson::Document(totals).into_relaxed_extjson();
    }
    let text = report.text(&plan.job, elapsed);
    if let Some(error) = report.error.take() {
        return Ok(Outcome::failed(json, text, error));
    }
    Ok(match report.state {
        JobState::Interrupted => {
            let error = if context.stop.is_cancelled() {
                context.interrupted("interrupted; everything answered is written")
            } else {
                Error::new(
                    Class::Interrupted(SIGTERM),
                    "stopped by live control; everything answered is written",
                )
            };
            Outcome::failed(json, text, error.hint("start the same command again to go on"))
        }
        JobState::Incomplete => Outcome::not_reached(json, text),
        _ => Outcome::reached(json, text),
    })
}

/// The job as it is stored now; none where it can't be read.
async fn stored(context: &Context, plan: &Plan) -> Option<Document> {
    store::find(&context.mongo, &plan.job).await.ok()?
}

fn is_incomplete(job: &Document) -> bool {
    job.get_str("state").is_ok_and(|state| state == JobState::Incomplete.as_str())
}

/// Counts over all runs and workers of the job.
fn job_totals(job: &Document) -> Document {
    let stored = |name: &str| job.get_document(name).cloned().unwrap_or_default();
    add(Some(&stored("joined_totals")), &stored("totals"))
}
