//! The cleanse from its first check to its last count: the list of phases.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use bson::{Bson, Document, doc};
use tokio_util::sync::CancellationToken;

use super::build::{self, When};
use super::copy::{Copied, Copy};
use super::dry_run::{self, average_size};
use super::dual_write::{self, adopt};
use super::follow::{Direction, Follower, stored_position};
use super::keep::Keeping;
use super::ledger::Tally;
use super::names::{self, TARGET_UUID};
use super::needs;
use super::out;
use super::outlook::{self, Outlook};
use super::pending;
use super::plan::{Plan, prepare, range_count};
use super::quarantine;
use super::ranges::Ranges;
use super::result::{self, Figures};
use super::steer;
use crate::Context;
use crate::cli::cleanse::{CleanseArgs, Method};
use crate::config::values::{ExtendedJson, Namespace};
use crate::crash;
use crate::cutover::gates::CHANGED_AT;
use crate::cutover::record::Record;
use crate::cutover::switch::stage::{Stage, taken_back};
use crate::error::{Class, Error, Result};
use crate::job::lanes::Pool;
use crate::job::{Job, store};
use crate::mongo::Mongo;
use crate::mongo::feed::Position;
use crate::report::outcome::Outcome;
use crate::throttle::pace::Pace;

/// The field of the job document with the options of the source.
const SOURCE_OPTIONS: &str = "source_options";
/// Marked documents that are fetched at once,
const PENDING: usize = 100;
/// and of those that were too large to stand beside their rule.
const LARGE_PENDING: usize = 8;

/// Runs the command.
///
/// # Errors
/// Usage errors and refusals, before anything is touched.
pub async fn run(context: &Context, args: &CleanseArgs) -> Result<Outcome> {
    let plan = context.unless_interrupted(prepare(&context.mongo, &context.settings, args)).await?;
    if args.dry_run {
        return context.unless_interrupted(look(context, &plan, args)).await;
    }
    let start = Instant::now();
    context.unless_interrupted(check_following(&context.mongo, &plan)).await?;
    if !is_begun(&context.mongo, &plan).await? {
        Outlook::of(&context.mongo, &plan).await.check_start(context, &plan)?;
    }
    let job = context.unless_interrupted(begin(&context.mongo, &plan, args)).await?;
    let mut figures = Figures::default();
    let steered = steer::start(context, &job, args.documents_per_second).await?;
    let context = &steered.context;
    let work = phases(context, &steered.pace, &plan, &job, args, &mut figures);
    let ended = steered.beside(&job, work).await;
    figures.limits = steered.limits();
    result::finish(context, &plan, job, ended, &figures, start.elapsed().as_secs_f64()).await
}

/// The dry run: it shows what there is to show, and is refused where the run would be.
async fn look(context: &Context, plan: &Plan, args: &CleanseArgs) -> Result<Outcome> {
    let mongo = &context.mongo;
    let check = async {
        check_following(mongo, plan).await?;
        check_start(mongo, plan, args).await
    };
    let refusal = match check.await {
        Err(error) if error.class() != Class::Refused => return Err(error),
        result => result.err(),
    };
    dry_run::run(context, plan, steer::rate(context, args.documents_per_second), refusal).await
}

async fn check_following(mongo: &Mongo, plan: &Plan) -> Result<()> {
    needs::check_following(mongo, &plan.source, &plan.description, &plan.predicate.valid()).await
}

/// Whether there is something of the target, by whatever name.
async fn is_begun(mongo: &Mongo, plan: &Plan) -> Result<bool> {
    let job = store::find(mongo, &plan.job).await?;
    let uuid = job.as_ref().and_then(|job| job.get(TARGET_UUID));
    Ok(names::find(mongo, &plan.target, uuid).await?.is_some())
}

/// Refuses what can't begin, or can't go on.
async fn check_start(mongo: &Mongo, plan: &Plan, args: &CleanseArgs) -> Result<()> {
    let existing = store::find(mongo, &plan.job).await?;
    names::check_nobody_else_copies(mongo, plan).await?;
    check_target(mongo, plan, existing.as_ref(), args.restart).await?;
    if let Some(job) = existing.as_ref().filter(|_| !args.restart) {
        out::check_method(job, args.method)?;
    }
    Ok(())
}

/// Takes the job, if source and target are what they should be.
async fn begin(mongo: &Mongo, plan: &Plan, args: &CleanseArgs) -> Result<Job> {
    check_start(mongo, plan, args).await?;
    if args.restart {
        let mark = doc! {"phase": Phase::Clear.as_str()};
        Job::restart(mongo, &plan.job, "cleanse", &plan.identity, mark).await
    } else {
        Job::start(mongo, &plan.job, "cleanse", &plan.identity).await
    }
}

/// The target must be absent or this job's own, and the source the one that the
/// copy was begun from.
async fn check_target(mongo: &Mongo, plan: &Plan, job: Option<&Document>, restart: bool) -> Result<()> {
    let stored = |field: &str| job.and_then(|job| job.get(field)).filter(|value| **value != Bson::Null);
    let found = names::find(mongo, &plan.target, stored(TARGET_UUID)).await?;
    let is_named_by_us = found.as_ref().is_some_and(|(name, _)| *name != plan.target);
    let exists = found.map(|(_, description)| description);
    let phase = stored("phase").and_then(Bson::as_str);
    if job.map(Record::of).transpose()?.flatten().is_some_and(|record| record.is_done()) {
        return Err(Error::refused(format!(
            "{} was cut over already: it is the clean collection",
            plan.source
        ))
        .hint(
            "`rollback` takes that back; `cleanup` forgets the job, after which another cleanse may begin",
        ));
    }
    if job.and_then(Stage::of) == Some(Stage::RolledBack) {
        return Err(taken_back(&plan.source, &plan.target));
    }
    if job.and_then(Stage::of).is_some() {
        return Err(Error::refused(format!(
            "the application is being switched to {}: what it has written there would be overwritten",
            plan.target
        ))
        .hint("go on with `cutover --mode switch`; `cutover --abort` takes back a switch that was not made use of"));
    }
    let begins_anew = restart || phase == Some(Phase::Clear.as_str()) || job.is_some_and(out::is_interrupted);
    adopt::refuse_to_drop(plan, job, exists.as_ref(), restart)?;
    quarantine::check(mongo, plan, job, begins_anew).await?;
    let is_same_source =
        stored("source_uuid").is_none_or(|uuid| plan.description.uuid.as_ref() == Some(uuid));
    if !begins_anew && !is_same_source {
        return Err(Error::refused(format!(
            "{} is not the collection that the job {} was begun from: it was dropped or renamed since",
            plan.source, plan.job
        ))
        .hint("copy anew with --restart"));
    }
    if is_named_by_us && mongo.describe(&plan.target).await?.is_some() {
        return Err(not_ours(&plan.target));
    }
    match (exists, stored(TARGET_UUID)) {
        (None, Some(_)) if !begins_anew => {
            Err(Error::refused(format!("{}, which the job {} had made, is gone", plan.target, plan.job))
                .hint("copy anew with --restart"))
        }
        (Some(target), Some(owned)) if target.uuid.as_ref() == Some(owned) => Ok(()),
        (Some(target), _) if job.is_some_and(|job| out::is_made_by(job, &target)) => Ok(()),
        (Some(target), None) if plan.dual_write => adopt::check(plan, &target),
        (Some(_), _) => Err(not_ours(&plan.target)),
        (None, _) => Ok(()),
    }
}

fn not_ours(target: &Namespace) -> Error {
    Error::refused(format!("{target} exists already and is not this job's"))
        .hint("choose another name with --to, or drop it yourself")
}

/// The way of the data, phase after phase; each is safe to begin again.
async fn phases(
    context: &Context,
    pace: &Arc<Pace>,
    plan: &Plan,
    job: &Job,
    args: &CleanseArgs,
    figures: &mut Figures,
) -> Result<Copied> {
    let mongo = &context.mongo;
    let ranges = Ranges::of_run(mongo, job);
    let mut phase = Phase::stored(job);
    let method = out::method(job.document(), args.method);
    let halt = context.stop.child_token();
    let copying = &plan.in_epoch(names::epoch(job));
    names::drop_leftovers(mongo, plan).await?;
    if matches!(phase, Phase::Create | Phase::Copy) {
        names::take(mongo, job, plan, copying).await?;
    }
    let copy = Arc::new(copy_of(context, pace, copying, job, &ranges, halt.clone()).await?);
    copy.clean_up().await?;
    let follower = Follower {
        mongo,
        job,
        source: &plan.source,
        target: &plan.target,
        valid: plan.predicate.valid(),
        direction: Direction::Forward,
        options: Some(source_options(plan, job)),
        rejected: plan.rejected(),
        events: &context.events,
        pace: pace.as_ref(),
        tally: Mutex::new(Tally::stored(job.document())),
    };
    let mut position = stored_position(job, Direction::Forward);
    if phase == Phase::Done {
        context.events.note(complete_already(&plan.target));
    }
    if phase == Phase::Copy && out::is_out(job.document()) {
        out::end_former(mongo, job).await?;
        context.events.note("the interrupted $out is begun anew");
        phase = Phase::Clear;
    }
    if phase == Phase::Clear {
        clear(mongo, plan, job, &ranges).await?;
        crash::point("cleanse_cleared");
        phase = Phase::Create;
    }
    if phase == Phase::Create {
        position = Some(create(context, plan, copying, job, &ranges, &follower, method).await?);
        crash::point("cleanse_created");
        phase = Phase::Copy;
    }
    let mut position = position.ok_or_else(|| without_position(job))?;
    if phase == Phase::Copy && method == Method::Out {
        let shot = out::copy(context, copying, job, &follower, &position).await?;
        figures.touched = Some(shot.touched);
        if shot.copied == Copied::Interrupted {
            result::count_written(mongo, copying, figures).await?;
            return Ok(Copied::Interrupted);
        }
        names::give_back(mongo, plan, copying).await?;
        if shot.touched > 0 {
            result::count_written(mongo, plan, figures).await?;
            return Ok(Copied::Touched);
        }
        phase = Phase::Finish;
    }
    if phase == Phase::Copy {
        let copied = copy_ranges(&follower, &mut position, &halt, &copy, figures).await?;
        if copied == Copied::Interrupted {
            result::count_written(mongo, copying, figures).await?;
            return Ok(Copied::Interrupted);
        }
        phase = Phase::Finish;
    }
    let is_to_finish = phase == Phase::Finish;
    if is_to_finish {
        names::give_back(mongo, plan, copying).await?;
    }
    if !catch_up(context, plan, args, &follower, &mut position, is_to_finish, figures).await? {
        result::count_written(mongo, plan, figures).await?;
        return Ok(Copied::Interrupted);
    }
    result::count_at_the_end(plan, &follower, &position, args.count_rules, figures).await?;
    Ok(Copied::All)
}

fn complete_already(target: &Namespace) -> String {
    format!("{target} is complete already: what was written since is caught up with; --restart copies anew")
}

/// Copies all ranges, and marks meanwhile what is touched.
async fn copy_ranges(
    follower: &Follower<'_>,
    position: &mut Position,
    halt: &CancellationToken,
    copy: &Arc<Copy>,
    figures: &mut Figures,
) -> Result<Copied> {
    let (begun, pending) = (Instant::now(), copy.pending().await?);
    let copied = while_marking(follower, position, halt, copy.clone().run()).await?;
    if let Some(keeping) = &copy.keeping {
        dual_write::count_copied(&mut figures.dual_write, keeping);
    }
    if copied != Copied::Interrupted {
        let rate = copy.rate(pending, begun.elapsed());
        follower.job.save(doc! {"phase": Phase::Finish.as_str(), outlook::MEASURED: rate}).await?;
        crash::point("cleanse_copied");
    }
    Ok(copied)
}

/// Whether the copy of a job is finished.
pub fn is_copied(job: &Job) -> bool {
    Phase::stored(job) == Phase::Done
}

fn without_position(job: &Job) -> Error {
    Error::refused(format!(
        "the job {} does not tell from where its source is to be followed: its cutover was taken back, \
         or it is of an early version",
        job.name()
    ))
    .hint("copy anew with --restart")
}

/// The options of the source when the copy was begun.
pub fn source_options(plan: &Plan, job: &Job) -> Document {
    // As text: a validator may hold what no stored field name may.
    let stored = job.stored(SOURCE_OPTIONS).and_then(Bson::as_str).and_then(|text| text.parse().ok());
    stored.map_or_else(|| plan.description.options.clone(), |options: ExtendedJson| options.0)
}

/// Does some work, and marks meanwhile what is touched; moves the position on. Where
/// that fails the work would be worth nothing: `halt` asks it to end.
async fn while_marking<T>(
    follower: &Follower<'_>,
    position: &mut Position,
    halt: &CancellationToken,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let done = CancellationToken::new();
    let work = async {
        let result = work.await;
        done.cancel();
        result
    };
    let marking = async { follower.mark(position.clone(), &done).await.inspect_err(|_| halt.cancel()) };
    let (result, marked) = tokio::join!(work, marking);
    *position = marked?;
    result
}

/// Brings the target up to date, finishes it where that is still to be done, and
/// follows on where that is asked for; false where a signal came first.
async fn catch_up(
    context: &Context,
    plan: &Plan,
    args: &CleanseArgs,
    follower: &Follower<'_>,
    position: &mut Position,
    is_to_finish: bool,
    figures: &mut Figures,
) -> Result<bool> {
    if plan.dual_write {
        let found = &mut figures.dual_write;
        return dual_write::catch_up(context, plan, args, follower, position, is_to_finish, found).await;
    }
    let (mongo, events, stop) = (&context.mongo, &context.events, &context.stop);
    let followed = &mut figures.followed;
    let mut catch_up = follower.catch_up().await?;
    if is_to_finish {
        out::unmark(mongo, &plan.target).await?;
        let after = position.time();
        pending::resolve(follower, &plan.target, &mut catch_up, after, PENDING).await?;
        if let Some(quarantine) = &plan.quarantine {
            pending::resolve(follower, quarantine, &mut catch_up, after, LARGE_PENDING).await?;
        }
        crash::point("cleanse_fetched");
        let building = build::indexes(mongo, &plan.target, &plan.description, When::Copied, events);
        // Building may take longer than the oplog reaches back; it can't be ended halfway.
        while_marking(follower, position, &CancellationToken::new(), building).await?;
        crash::point("cleanse_indexed");
        follower.mark_crowded().await?;
        follower.work_off_marks(&mut catch_up, position, stop, followed).await?;
    }
    let drained = follower.drain(&mut catch_up, position, false, stop, followed).await;
    // A refusal would say that nothing was done yet.
    let class = |error: Error| if is_to_finish { error.with_class(Class::Stopped) } else { error };
    if !drained.map_err(class)? {
        return Ok(false);
    }
    if is_to_finish {
        if !follower.unique_indexes(&mut catch_up, position, &plan.description, stop, followed).await? {
            return Ok(false);
        }
        crash::point("cleanse_unique");
        figures.violations = build::late_options(mongo, &plan.target, &plan.description).await?;
        crash::point("cleanse_options");
        build::indexes(mongo, &plan.target, &plan.description, When::Last, events).await?;
        crash::point("cleanse_last_indexes");
        follower.job.save(doc! {"phase": Phase::Done.as_str(), CHANGED_AT: bson::DateTime::now()}).await?;
        crash::point("cleanse_done");
    }
    if args.follow {
        events.note(format!("{} is up to date and follows {}", plan.target, plan.source));
        follower.drain(&mut catch_up, position, true, stop, followed).await?;
        return Ok(false);
    }
    Ok(true)
}

/// How far a job is, as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// What an earlier copy has made is to be dropped.
    Clear,
    Create,
    Copy,
    Finish,
    Done,
}

impl Phase {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Clear => "clear",
            Self::Create => "create",
            Self::Copy => "copy",
            Self::Finish => "finish",
            Self::Done => "done",
        }
    }

    /// Whether a stored job has begun to make its target and has not finished copying. Pure.
    pub(super) fn is_copying(job: &Document) -> bool {
        let unfinished = [Self::Clear, Self::Create, Self::Copy];
        job.get_str("phase").is_ok_and(|stored| unfinished.iter().any(|phase| phase.as_str() == stored))
    }

    fn stored(job: &Job) -> Self {
        let stored = job.stored("phase").and_then(Bson::as_str);
        [Self::Clear, Self::Copy, Self::Finish, Self::Done]
            .into_iter()
            .find(|phase| stored == Some(phase.as_str()))
            .unwrap_or(Self::Create)
    }
}

async fn copy_of(
    context: &Context,
    pace: &Arc<Pace>,
    plan: &Plan,
    job: &Job,
    ranges: &Ranges,
    stop: CancellationToken,
) -> Result<Copy> {
    let source_count = context.mongo.collection(&plan.source).estimated_document_count().await.unwrap_or(0);
    Ok(Copy {
        mongo: context.mongo.clone(),
        source: plan.source.clone(),
        target: plan.target.clone(),
        valid: plan.predicate.valid(),
        rejected: plan.rejected(),
        hint: !plan.description.is_clustered(),
        ranges: ranges.clone(),
        job: job.name().to_owned(),
        lease: job.lease().clone(),
        events: context.events.clone(),
        stop,
        pace: pace.clone(),
        parallel: plan.parallel,
        average_bytes: average_size(context, plan).await,
        documents_per_range: source_count / range_count(&context.mongo, plan).await.max(1) as u64,
        source_count,
        keeping: plan.dual_write.then(Keeping::new),
        lanes: Pool::new(job.right(&context.mongo), "copy"),
    })
}

/// Drops what an earlier copy of this job has made.
async fn clear(mongo: &Mongo, plan: &Plan, job: &Job, ranges: &Ranges) -> Result<()> {
    use crate::error::Context as _;
    let owned = job.stored(TARGET_UUID).filter(|uuid| **uuid != Bson::Null);
    if let Some((name, target)) = names::find(mongo, &plan.target, owned).await? {
        let is_ours =
            owned.is_some() && target.uuid.as_ref() == owned || out::is_made_by(job.document(), &target);
        // Empty or not: the application may be about to write to it.
        let is_foreign = plan.dual_write && !is_ours;
        if !is_foreign && (is_ours || build::is_empty(mongo, &name).await?) {
            mongo.collection(&name).drop().await.during(format!("dropping {name}"))?;
            crash::point("cleanse_dropped");
        }
    }
    quarantine::clear(mongo, plan, job).await?;
    ranges.clear().await?;
    let nothing = doc! {"phase": Phase::Create.as_str(), TARGET_UUID: Bson::Null, "source_uuid": Bson::Null, adopt::ADOPTED: Bson::Null};
    job.save(nothing).await?;
    names::drop_leftovers(mongo, plan).await
}

/// Makes target and ranges; returns the position from which changes count.
async fn create(
    context: &Context,
    plan: &Plan,
    copying: &Plan,
    job: &Job,
    ranges: &Ranges,
    follower: &Follower<'_>,
    method: Method,
) -> Result<Position> {
    let mongo = &context.mongo;
    // Recorded first: an empty target found afterwards is ours.
    job.save(doc! {"phase": Phase::Create.as_str()}).await?;
    let (uuid, existed) = adopt::take_or_create(mongo, copying).await?;
    crash::point("cleanse_target_made");
    let source_uuid = plan.description.uuid.clone().unwrap_or(Bson::Null);
    let options = Bson::Document(plan.description.options.clone()).into_canonical_extjson().to_string();
    let adopted = plan.dual_write && existed;
    job.save(doc! {
        TARGET_UUID: uuid,
        "source_uuid": source_uuid,
        adopt::ADOPTED: adopted,
        SOURCE_OPTIONS: options,
    })
    .await?;
    if method == Method::Out {
        ranges.clear().await?;
        out::mark(mongo, job, &copying.target).await?;
    } else {
        job.save(doc! {out::METHOD: Method::Merge.as_str()}).await?;
        if !plan.dual_write {
            build::index_pending(mongo, &copying.target).await?;
        }
    }
    if let (Some(quarantine), Some(working)) = (&plan.quarantine, &copying.quarantine) {
        quarantine::create(mongo, quarantine, working, &plan.description, job).await?;
    }
    // Before anything is copied: what changes from here on is seen.
    let position = follower.begin().await?;
    crash::point("cleanse_begun");
    if method != Method::Out {
        let tiles = mongo.ranges(&plan.source, range_count(mongo, plan).await).await?;
        ranges.create(&tiles).await?;
        crash::point("cleanse_ranges_made");
    }
    job.save(doc! {"phase": Phase::Copy.as_str()}).await?;
    Ok(position)
}
