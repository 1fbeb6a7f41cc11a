//! `rollback`: the old collection is live again, with what was written since.
//!
//! The same exchange of names the other way round: what was written to the new
//! collection is followed from the moment of the cutover and brought to the old
//! one, writes are held off, names are exchanged. After a swap there is no old
//! collection: see `bring_back`.

use std::sync::Mutex;
use std::time::Instant;

use bson::{Bson, Document, doc};

use super::bring_back;
use super::exchange::Exchange;
use super::gates;
use super::in_step::InStep;
use super::order::{Method, Renames, job_name, method};
use super::record::{Record, State};
use super::recover::finish_earlier;
use super::report::Report;
use super::run::{finish, stored_job, take_over};
use super::switch::{self, stage::Stage};
use crate::Context;
use crate::cleanse::displaced::displaced;
use crate::cleanse::follow::{Direction, Follower};
use crate::cleanse::ledger::Tally;
use crate::cleanse::steer::{self, Steered};
use crate::cli::cutover::{Mode, RollbackArgs};
use crate::config::values::Namespace;
use crate::error::{Class, Error, Result};
use crate::job::Job;
use crate::mongo::feed::Position;
use crate::mongo::valid::Valid;
use crate::report::outcome::Outcome;
use crate::report::terminal::{check_terminal, confirm};

/// The job field with the position of the writes since the cutover while a rollback
/// without them is under way.
pub const KEPT: &str = "feed_back_kept";

/// Runs the command.
///
/// # Errors
/// Usage errors and refusals, before anything is touched.
pub async fn run(context: &Context, args: &RollbackArgs) -> Result<Outcome> {
    check_terminal(args.yes)?;
    let start = Instant::now();
    let name = job_name(&context.settings, &args.copy)?;
    let stored = context.unless_interrupted(stored_job(context, &name)).await?;
    if let Some(stage) = Stage::of(&stored) {
        return switch::run::roll_back(context, args, stage).await;
    }
    let record = cut_over(&name, &stored)?;
    if record.mode == Mode::Swap {
        return bring_back::run(context, args, &name, &stored, &record).await;
    }
    let old = record.renames.retired.clone().unwrap_or_else(|| record.renames.live.clone());
    let discarded = if args.discard_writes_since_cutover { ", WITHOUT what was written since" } else { "" };
    context.events.settled().await;
    let question = format!(
        "{old} will be {} again{discarded}. Writes are held off for a moment. Change streams and cursors \
         that the application has open on either collection will end. Go on?",
        record.renames.live
    );
    confirm(question, args.yes).await?;
    let identity = stored.get_document("identity").cloned().unwrap_or_default();
    let taken = take_over(context, &name, &record.renames.live, &identity);
    let job = context.unless_interrupted(taken).await?;
    let steered = steer::start(context, &job, None).await?;
    let mut report = Report { command: "rollback", ..Report::default() };
    let result = steps(&steered, args, &job, &mut report).await;
    Ok(finish(&steered.context, &name, Mode::Keep, job, result, &report, start.elapsed()).await)
}

/// The cutover that can be taken back.
pub(super) fn cut_over(name: &str, stored: &Document) -> Result<Record> {
    let record = Record::of(stored)?;
    let record = record.filter(|record| record.is_done() || record.is_rollback);
    record.ok_or_else(|| {
        Error::refused(format!("the job {name} was not cut over: there is nothing to take back"))
    })
}

async fn steps(steered: &Steered, args: &RollbackArgs, job: &Job, report: &mut Report) -> Result<()> {
    let context = &steered.context;
    finish_earlier(&context.mongo, job.name()).await?;
    let stored = stored_job(context, job.name()).await?;
    let record = cut_over(job.name(), &stored)?;
    if record.state == State::RolledBack {
        report.outcome = "rolled_back";
        report.displaced = displaced(&context.mongo, job.name()).await?;
        context.events.note("this was taken back before");
        return Ok(());
    }
    let renames = renames(job, &stored, &record)?;
    let options = check(context, &renames).await?;
    check_free(context, &renames).await?;
    let method = method(&context.mongo, &args.exchange, Mode::Keep, &renames.live).await?;
    let position = position(context, job, &stored, args).await?;
    let follower = backward(steered, job, &renames.live, &renames.incoming, options);
    take_back(context, &follower, renames.clone(), method, position, report).await
}

/// The follower from the new collection to the old one; the new one has these options.
pub fn backward<'a>(
    steered: &'a Steered,
    job: &'a Job,
    new: &'a Namespace,
    old: &'a Namespace,
    options: Document,
) -> Follower<'a> {
    Follower {
        mongo: &steered.context.mongo,
        job,
        source: new,
        target: old,
        // Whatever the application holds now is right.
        valid: Valid::default(),
        rejected: None,
        direction: Direction::Back,
        options: Some(options),
        events: &steered.context.events,
        pace: &steered.pace,
        tally: Mutex::new(Tally::default()),
    }
}

/// From the collection that is live now to the one that was.
///
/// # Errors
/// A refusal where the job does not tell.
pub fn renames(job: &Job, stored: &Document, record: &Record) -> Result<Renames> {
    let unknown = || Error::refused(format!("the job {} does not tell what was cut over", job.name()));
    if record.is_rollback {
        // One that was begun before and given up knows already.
        return Ok(Renames { working: None, ..record.renames.clone() });
    }
    let target: Namespace = stored
        .get_document("identity")
        .ok()
        .and_then(|identity| identity.get_str("target").ok())
        .and_then(|target| target.parse().ok())
        .ok_or_else(unknown)?;
    let Renames { live, live_uuid, incoming_uuid, retired, .. } = record.renames.clone();
    Ok(Renames {
        live,
        live_uuid: incoming_uuid,
        incoming: retired.ok_or_else(unknown)?,
        incoming_uuid: live_uuid,
        retired: Some(target),
        working: None,
    })
}

/// Makes sure that all is where it was left; returns the options of the live
/// collection.
///
/// # Errors
/// A refusal where it is not.
pub async fn check(context: &Context, renames: &Renames) -> Result<Document> {
    let live = context.mongo.describe(&renames.live).await?;
    gates::check_known(&context.mongo, &renames.live, Some(&renames.live_uuid)).await?;
    gates::check_known(&context.mongo, &renames.incoming, Some(&renames.incoming_uuid)).await?;
    Ok(live.map(|live| live.options).unwrap_or_default())
}

async fn check_free(context: &Context, renames: &Renames) -> Result<()> {
    match &renames.retired {
        Some(retired) if context.mongo.bearer(retired).await?.is_some() => Err(Error::refused(format!(
            "{retired} exists: the collection that is live now would get that name"
        ))
        .hint("drop or rename it")),
        _ => Ok(()),
    }
}

/// From where the writes since the cutover are brought along.
async fn position(context: &Context, job: &Job, stored: &Document, args: &RollbackArgs) -> Result<Position> {
    if args.discard_writes_since_cutover {
        // Should it be given up, nothing is discarded: the next one may want those writes.
        if let Some(position) = position_since(stored) {
            job.save(doc! {KEPT: position.to_document()}).await?;
        }
        return Ok(Position::Time(context.mongo.majority_time().await?));
    }
    take_kept_position(job, stored).await?.ok_or_else(|| {
        Error::refused("the job does not tell from where the writes since the cutover are to be followed")
            .hint("--discard-writes-since-cutover gives them up")
    })
}

/// Up to where the writes since the cutover were brought back. By the document as
/// it is now: it may have been stored after this run has taken the job.
pub fn position_since(stored: &Document) -> Option<Position> {
    let position = |field: &str| stored.get_document(field).ok().and_then(Position::from_document);
    position(KEPT).or_else(|| position(Direction::Back.position()))
}

/// The same, from where it goes on now, also where a rollback that was given up
/// would have done without those writes.
///
/// # Errors
/// A stop where the job can't be written.
pub async fn take_kept_position(job: &Job, stored: &Document) -> Result<Option<Position>> {
    let position = position_since(stored);
    if let (Some(position), Ok(_)) = (&position, stored.get_document(KEPT)) {
        job.save(doc! {Direction::Back.position(): position.to_document(), KEPT: Bson::Null}).await?;
    }
    Ok(position)
}

async fn take_back(
    context: &Context,
    follower: &Follower<'_>,
    renames: Renames,
    method: Method,
    position: Position,
    report: &mut Report,
) -> Result<()> {
    let mut in_step = InStep::from(follower, position, &context.stop).await.map_err(|error| {
        // The oplog no longer holds them: nothing was touched.
        if error.class() == Class::Refused {
            return Error::refused(error.message())
                .hint("--discard-writes-since-cutover goes back without what was written since");
        }
        error
    })?;
    context.events.note(format!("bringing {} up to date", renames.incoming));
    if in_step.draw_level(&context.stop).await?.is_none() {
        return Err(context.interrupted("interrupted before writes were held off; everything is as before"));
    }
    follower.put_displaced_back().await?;
    report.gates.extend(gates::rehearsed(context, &mut in_step, method.max_pause).await?);
    if let Some(refusal) = gates::refusal(&report.gates) {
        report.outcome = "refused";
        return Err(refusal);
    }
    let job = follower.job.name();
    let exchange = Exchange { context, job, mode: Mode::Keep, is_rollback: true, renames, method };
    report.exchanged(&exchange, exchange.run(&mut in_step).await?, "rolled_back");
    report.displaced = displaced(&context.mongo, job).await?;
    Ok(())
}
