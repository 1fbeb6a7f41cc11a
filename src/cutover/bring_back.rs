//! `rollback` after a swap: the old collection is gone, but what is live and what
//! was rejected are together what it would be. So the quarantine is put back into
//! the live collection, beside the application, which is never held off.

use std::time::Instant;

use bson::{Bson, Document, doc};
use serde_json::{Value, json};

use super::gates::{self, CHANGED_AT, Gate};
use super::in_step::InStep;
use super::record::{FIELD, Record, State};
use super::recover::finish_earlier;
use super::rollback::{cut_over, position_since};
use super::run::{give_back, stored_job};
use crate::Context;
use crate::cleanse::follow::Direction;
use crate::cleanse::marks::Marks;
use crate::cleanse::plan::Plan;
use crate::cleanse::quarantine::{self, of_job};
use crate::cleanse::restore::{Since, restore_into};
use crate::cleanse::steer::{self, Steered};
use crate::cli::cutover::RollbackArgs;
use crate::config::values::Namespace;
use crate::crash;
use crate::error::{Class, Error, Result};
use crate::event::Progress;
use crate::job::Job;
use crate::mongo::feed::Position;
use crate::mongo::restore::Restore;
use crate::mongo::restore::progress::Restored;
use crate::report::outcome::Outcome;
use crate::report::terminal::confirm;

/// The field of the job with the identity of a quarantine that was found to hold
/// all that was rejected, right before the swap.
const VERIFIED: &str = "quarantine_verified";
/// The field with what was put back so far.
const RESTORED: &str = "restored";

/// What is reported.
#[derive(Debug, Default)]
struct Report {
    outcome: Option<&'static str>,
    quarantine: Option<Namespace>,
    restored: Restored,
    /// Whether it is not known what the application has deleted since.
    is_blind: bool,
}

/// Compares the quarantine, before a swap, and remembers that it can be put back;
/// `None` where there is none.
///
/// # Errors
/// A stop where keeping step or comparing fails.
pub async fn verified(
    context: &Context,
    plan: &Plan,
    job: &Job,
    in_step: &mut InStep<'_>,
) -> Result<Option<Gate>> {
    let gate = gates::quarantine_verified(context, plan, job.stored(CHANGED_AT), in_step).await?;
    if gate.as_ref().is_some_and(|gate| gate.passed) {
        let uuid = job.stored(quarantine::UUID).cloned().unwrap_or(Bson::Null);
        job.save(doc! {VERIFIED: uuid}).await?;
    }
    Ok(gate)
}

/// Runs the command for a job that was cut over by a swap.
///
/// # Errors
/// Usage errors and refusals, before anything is touched.
pub async fn run(
    context: &Context,
    args: &RollbackArgs,
    name: &str,
    stored: &Document,
    record: &Record,
) -> Result<Outcome> {
    if args.discard_writes_since_cutover {
        return Err(Error::usage("--discard-writes-since-cutover is for what was cut over by --mode keep")
            .hint("after a swap the writes since are in the live collection, and stay there: leave it out"));
    }
    let start = Instant::now();
    let live = &record.renames.live;
    let quarantine = context.unless_interrupted(check(context, stored, record)).await?;
    context.events.settled().await;
    let question = format!(
        "What is in {quarantine} will be put back into {live}, but for what the application has written \
         anew. Writes go on meanwhile. Go on?"
    );
    confirm(question, args.yes).await?;
    let identity = stored.get_document("identity").cloned().unwrap_or_default();
    let job = context.unless_interrupted(Job::start(&context.mongo, name, "cleanse", &identity)).await?;
    let steered = steer::start(context, &job, None).await?;
    let mut report = Report::default();
    let work = steps(&steered, &job, &mut report);
    let result = steered.beside(&job, work).await;
    give_back(&steered.context, job, &result).await;
    let (json, text) = (report.json(name, start.elapsed().as_secs_f64()), report.text(name, live));
    Ok(match result {
        Err(error) => Outcome::failed(json, text, error),
        Ok(()) if report.restored.refused == 0 => Outcome::reached(json, text),
        Ok(()) => Outcome::not_reached(json, text),
    })
}

/// Makes sure that there is a quarantine to go back by; returns it.
async fn check(context: &Context, stored: &Document, record: &Record) -> Result<Namespace> {
    let mongo = &context.mongo;
    let live = &record.renames.live;
    let dropped = format!("{live} was cut over by a swap, which drops the old collection");
    let Some(quarantine) = of_job(stored) else {
        return Err(Error::refused(format!("{dropped}, and the job has no quarantine")).hint(
            "what was rejected is in a backup only; `cleanse --quarantine` makes a swap reversible, \
             and --mode keep keeps the old collection",
        ));
    };
    gates::check_known(mongo, live, Some(&record.renames.incoming_uuid)).await?;
    let uuid = stored.get(quarantine::UUID).filter(|uuid| **uuid != Bson::Null);
    if uuid.is_none() || mongo.bearer(&quarantine).await?.as_ref() != uuid {
        return Err(Error::refused(format!("{dropped}, and {quarantine} is not what this job has made"))
            .hint("was it dropped or renamed since the cutover?"));
    }
    if stored.get(VERIFIED) != uuid {
        return Err(Error::refused(format!(
            "{dropped}, and {quarantine} was not verified before: it may not hold all that was rejected"
        ))
        .hint("look at it yourself: each of its documents holds a rejected one in `document`"));
    }
    Ok(quarantine)
}

async fn steps(steered: &Steered, job: &Job, report: &mut Report) -> Result<()> {
    let context = &steered.context;
    let mongo = &context.mongo;
    finish_earlier(mongo, job.name()).await?;
    let stored = stored_job(context, job.name()).await?;
    let record = cut_over(job.name(), &stored)?;
    let quarantine = check(context, &stored, &record).await?;
    report.quarantine = Some(quarantine.clone());
    let earlier = stored.get_document(RESTORED).ok();
    if earlier.is_none() {
        // From here on a mark says that the application has deleted the document.
        Marks::of(mongo, job.name()).clear().await?;
    }
    report.restored = earlier.map(Restored::from_document).unwrap_or_default();
    report.is_blind = earlier.is_some_and(|earlier| earlier.get_bool("is_blind").unwrap_or(false));
    if record.state == State::RolledBack && report.restored.refused == 0 {
        report.outcome = Some("rolled_back");
        context.events.note("this was taken back before");
        return Ok(());
    }
    if report.restored.is_complete {
        // Perhaps what stood in the way is gone. What is there by now is left alone.
        report.restored = Restored::default();
    }
    put_back(steered, job, &record, &quarantine, report).await?;
    if !report.restored.is_complete {
        return Err(context.interrupted("interrupted; started again it goes on from there"));
    }
    crash::point("restore_complete");
    job.save(doc! {
        format!("{FIELD}.state"): State::RolledBack.as_str(),
        format!("{FIELD}.is_rollback"): true,
        // What is live is no clean copy any more.
        Direction::Forward.position(): Bson::Null,
    })
    .await?;
    report.outcome = Some("rolled_back");
    Ok(())
}

async fn put_back(
    steered: &Steered,
    job: &Job,
    record: &Record,
    quarantine: &Namespace,
    report: &mut Report,
) -> Result<()> {
    let context = &steered.context;
    let mongo = &context.mongo;
    let live = &record.renames.live;
    let mut restore = Restore::new(job.right(mongo).lane("restore").await?, quarantine, live).await?;
    let mut since = since(context, job.name(), live, quarantine, report).await?;
    let is_blind = report.is_blind;
    let total = mongo.collection(quarantine).estimated_document_count().await.unwrap_or(0);
    let save = async |restored: &Restored, position: &Position| {
        let mut fields = restored.to_document();
        fields.insert("is_blind", is_blind);
        context.events.progress(progress(restored, total, steered.pace.limited_by()));
        job.save(doc! {RESTORED: fields, Direction::Back.position(): position.to_document()}).await
    };
    restore_into(&mut restore, &mut since, &steered.pace, &mut report.restored, &context.stop, save).await
}

/// The deletes since the swap; where the oplog no longer tells them, those from now on.
async fn since(
    context: &Context,
    job: &str,
    live: &Namespace,
    quarantine: &Namespace,
    report: &mut Report,
) -> Result<Since> {
    let mongo = &context.mongo;
    if let Some(position) = position_since(&stored_job(context, job).await?) {
        match Since::of(mongo, live, quarantine, job, position).await {
            Err(error) if error.class() == Class::Refused => {}
            result => return result,
        }
    }
    report.is_blind = true;
    context.events.warn(format!(
        "the oplog no longer tells what was deleted of {live} since the cutover: a document that the \
         application has written anew and deleted again comes back as it was rejected"
    ));
    let now = Position::Time(mongo.majority_time().await?);
    Since::of(mongo, live, quarantine, job, now).await
}

fn progress(restored: &Restored, total: u64, limited_by: &'static str) -> Progress {
    let done = restored.restored + restored.kept + restored.deleted_since + restored.refused;
    Progress {
        phase: "restore".into(),
        unit: "documents",
        done,
        total: Some(total.max(done)),
        limited_by: Some(limited_by.into()),
        detail: format!("{} put back", restored.restored),
    }
}

impl Report {
    fn json(&self, job: &str, elapsed: f64) -> Value {
        let id = |id: &Bson| id.clone().into_canonical_extjson();
        let restored = &self.restored;
        let refusals: Vec<Value> = restored
            .refusals
            .iter()
            .map(|refusal| json!({"_id": id(&refusal.id), "reason": refusal.reason}))
            .collect();
        json!({
            "schema": 1,
            "command": "rollback",
            "job": job,
            "mode": "swap",
            "outcome": self.outcome.unwrap_or("unfinished"),
            "quarantine": self.quarantine.as_ref().map(ToString::to_string),
            "documents": {
                "restored": restored.restored,
                "kept": restored.kept,
                "deleted_since": restored.deleted_since,
                "not_restored": restored.refused,
            },
            "kept": restored.kept_ids.iter().map(id).collect::<Vec<_>>(),
            "not_restored": refusals,
            "deletes_known": !self.is_blind,
            "elapsed_seconds": elapsed,
        })
    }

    fn text(&self, job: &str, live: &Namespace) -> String {
        let restored = &self.restored;
        let outcome = self.outcome.unwrap_or("unfinished").replace('_', " ");
        let mut lines = vec![
            format!("rollback of {job} by its quarantine: {outcome}"),
            format!("  put back into {live}: {} documents", restored.restored),
        ];
        for (count, what) in [
            (restored.kept, "written anew by the application, which stays"),
            (restored.deleted_since, "written anew by the application and deleted again, which stay away"),
            (restored.refused, "NOT put back, because the collection refuses them"),
        ] {
            if count > 0 {
                lines.push(format!("  {count} {what}"));
            }
        }
        for refusal in restored.refusals.iter().take(10) {
            lines.push(format!("    {}: {}", refusal.id, refusal.reason));
        }
        lines.join("\n")
    }
}
