//! The exchange of names: writes held off, what is left brought along, renamed.
//!
//! Everything that may have to be undone is in the job document before it is
//! done. The pause that the application sees begins with the attempt to hold
//! writes off and ends when the new collection takes them.

use std::time::Duration;

use bson::{Bson, Document, Timestamp, doc};

use super::fence::{self, Raised};
use super::gap;
use super::in_step::InStep;
use super::order::{Joint, Method, Renames};
use super::record::{self, Claim, Fence, Record, State};
use super::recover::{Found, after_going_back, finish, forbid, go_back, look, recover, unknown};
use super::residual::{Brought, Residue, bring_along};
use super::watchdog::Watchdog;
use super::working_name;
use crate::Context;
use crate::cli::cutover::Mode;
use crate::clock::{Deadline, Moment};
use crate::config::values::Namespace;
use crate::crash;
use crate::error::{Class, Context as _, Error, Result};
use crate::mongo::Mongo;
use crate::mongo::exchange::{Obstacle, Validation};
use crate::mongo::operation::Operation;
use crate::mongo::ticket::Ticket;

/// Attempts to hold writes off, before it is given up.
const ATTEMPTS: u32 = 5;
/// Between attempts, so that those who were held up can go on.
const BREATH: Duration = Duration::from_secs(1);
/// A rename that has less time than this is not sent.
const SHORTEST_RENAME: Duration = Duration::from_millis(2);
/// Names that were taken in the gap are freed so often.
const GAPS: u32 = 20;
/// So often what was made in the gap is set aside by a rename; where the name is taken again each time,
/// it is dropped by the very rename that takes the name.
const ASIDES: u32 = 5;
/// So long one rename may wait for whoever holds the collection: the application waits too.
const RENAMING: Duration = Duration::from_millis(500);

/// What is asked for.
#[derive(Debug)]
pub struct Exchange<'a> {
    /// The surroundings.
    pub context: &'a Context,
    /// Name of the job.
    pub job: &'a str,
    /// What was asked for.
    pub mode: Mode,
    /// Whether this is the way back.
    pub is_rollback: bool,
    /// What is exchanged.
    pub renames: Renames,
    /// How.
    pub method: Method,
}

/// What came of it.
#[derive(Debug)]
pub enum Exchanged {
    /// Names are exchanged.
    Yes(Swapped),
    /// Nothing was exchanged, for this reason.
    No(String),
}

/// An exchange that happened.
#[derive(Debug)]
pub struct Swapped {
    /// For how long writes were held off.
    pub pause: Duration,
    /// What came at the last moment.
    pub residue: Residue,
}

/// What an attempt came to.
enum Attempt<T> {
    /// Names are exchanged.
    Exchanged(T),
    /// Nothing was exchanged; another attempt may do better.
    Again(String),
    /// Nothing was exchanged, and that is the end.
    GivenUp(String),
    /// The same, after the first of two renames was taken back.
    WentBack(String, Timestamp),
}

impl Exchange<'_> {
    /// Exchanges the names, in a few attempts.
    ///
    /// # Errors
    /// An unknown outcome, or a stop where the server does not do as asked.
    pub async fn run(&self, in_step: &mut InStep<'_>) -> Result<Exchanged> {
        let mut reason = String::new();
        for attempt in 1..=ATTEMPTS {
            match self.attempt(in_step).await? {
                Attempt::Exchanged(swapped) => return Ok(Exchanged::Yes(swapped)),
                Attempt::Again(why) => {
                    self.context.events.note(format!("attempt {attempt}: {why}; writes go on"));
                    reason = why;
                }
                Attempt::GivenUp(reason) | Attempt::WentBack(reason, _) => return Ok(Exchanged::No(reason)),
            }
            tokio::time::sleep(BREATH).await;
            if in_step.draw_level(&self.context.stop).await?.is_none() {
                return Ok(Exchanged::No("interrupted before writes were held off".into()));
            }
        }
        Ok(Exchanged::No(format!("{reason}, {ATTEMPTS} times")))
    }

    async fn attempt(&self, in_step: &mut InStep<'_>) -> Result<Attempt<Swapped>> {
        let (mongo, job) = (&self.context.mongo, in_step.follower.job);
        let fence = fence::planned(mongo, &self.method, &self.renames).await?;
        let mut operation = mongo.operation().await?;
        let record = self.record(&fence, &operation);
        let settings = &self.context.settings;
        // Earlier than the fence, so that nothing of its time is missed by whoever knows no more than this.
        let about = Record { fenced_at: Some(mongo.majority_time().await?), ..record.clone() };
        let about = about.about(job.name(), &settings.state_database);
        let mut watchdog = Watchdog::start(&settings.uri, &about).await?;
        let refusing = Validation::refusing(&record.id, about);
        let mut stored = record.to_document();
        if self.is_rollback {
            stored.extend(record::before(mongo, job.name()).await?);
        }
        if !record::store(mongo, job, &record, stored).await? {
            return Err(self.overtaken());
        }
        crash::point("cutover_recorded");
        let attempt =
            self.under_a_fence(in_step, &record, (&fence, &refusing), &mut operation, &mut watchdog).await;
        in_step.retarget(&self.renames.incoming);
        match &attempt {
            // It goes on trying to let writes through, and finds nothing to do where that was done.
            Err(_) => watchdog.leave(),
            Ok(_) => watchdog.dismiss().await,
        }
        attempt
    }

    async fn under_a_fence(
        &self,
        in_step: &mut InStep<'_>,
        record: &Record,
        fence: (&Fence, &Validation),
        operation: &mut Operation,
        watchdog: &mut Watchdog,
    ) -> Result<Attempt<Swapped>> {
        let prepared = self.prepare(in_step, record, fence, watchdog).await;
        let begun = Moment::now();
        let attempt = match prepared {
            Ok(Some(ticket)) => self.fenced(in_step, record, fence, operation, &ticket, begun).await,
            Ok(None) => Ok(Attempt::Again("the copy did not get its name of the attempt".into())),
            Err(error) => Err(error),
        };
        self.settle(in_step, record, fence.0, begun, attempt, watchdog).await
    }

    /// What nobody has to wait for; `None` where another attempt is needed.
    async fn prepare(
        &self,
        in_step: &mut InStep<'_>,
        record: &Record,
        (fence, refusing): (&Fence, &Validation),
        watchdog: &mut Watchdog,
    ) -> Result<Option<Ticket>> {
        let mongo = &self.context.mongo;
        self.save_by_right(in_step, record, Document::new()).await?;
        if !working_name::take(mongo, &record.renames).await? {
            return Ok(None);
        }
        in_step.retarget(record.renames.incoming_now());
        let ticket = mongo.ticket(&record.id).await?;
        self.save_by_right(in_step, record, Document::new()).await?;
        fence::prepare(mongo, fence, &record.renames, refusing).await?;
        // As close as it gets before anybody has to wait.
        in_step.draw_level(&self.context.stop).await?;
        watchdog.begin(self.method.max_pause)?;
        self.save_by_right(in_step, record, Document::new()).await?;
        Ok(Some(ticket))
    }

    /// Stores fields, unless somebody has begun to recover: who does lets writes through, and
    /// nothing may be done about the names after that.
    async fn save_by_right(&self, in_step: &InStep<'_>, record: &Record, fields: Document) -> Result<()> {
        let job = in_step.follower.job;
        let mut condition = Claim::BEGINNER.condition(&record.id);
        // Late, it would take back what is over.
        condition.insert(format!("{}.fence", record::FIELD), doc! {"$type": "object"});
        if job.save_where(condition, fields).await? { Ok(()) } else { Err(self.overtaken()) }
    }

    fn record(&self, fence: &Fence, operation: &Operation) -> Record {
        let id = format!("{:016x}", rand::random::<u64>());
        Record {
            renames: self.renames.in_attempt(&id),
            id,
            mode: self.mode,
            is_rollback: self.is_rollback,
            state: State::Fenced,
            fence: Some(fence.clone()),
            session: Some(operation.id()),
            fenced_at: None,
        }
    }

    /// From the first write that is held off to the exchange; tells since when writes
    /// are held off.
    async fn fenced(
        &self,
        in_step: &mut InStep<'_>,
        record: &Record,
        (fence, refusing): (&Fence, &Validation),
        operation: &mut Operation,
        ticket: &Ticket,
        begun: Moment,
    ) -> Result<Attempt<Timestamp>> {
        let mongo = &self.context.mongo;
        if self.context.stop.is_cancelled() {
            return Ok(Attempt::GivenUp("interrupted before writes were held off".into()));
        }
        let raised = fence::raise(mongo, fence, &record.renames, refusing, self.method.max_pause).await?;
        let fenced_at = match raised {
            Raised::Up(moment) => moment,
            Raised::NotInTime => {
                return Ok(Attempt::Again(format!(
                    "an open transaction or operation on {}, or a majority, took longer than writes may be held off",
                    self.renames.live
                )));
            }
        };
        crash::point("cutover_fenced");
        if self.method.is_blocking_all {
            crate::mongo::feed::nudge(mongo).await?;
        }
        let deadline = begun.deadline(self.method.max_pause);
        // A signal waits: this is over in a moment, one way or the other.
        if !in_step.reach(fenced_at, Some(deadline), &tokio_util::sync::CancellationToken::new()).await? {
            return Ok(Attempt::Again(format!(
                "bringing along the last writes took longer than --max-pause ({:?})",
                self.method.max_pause
            )));
        }
        let fields = doc! {
            in_step.follower.direction.position(): in_step.position().to_document(),
            format!("{}.state", record::FIELD): State::Renaming.as_str(),
            format!("{}.fenced_at", record::FIELD): fenced_at,
        };
        self.save_by_right(in_step, record, fields).await?;
        crash::point("cutover_renaming");
        // Looked at after the last await before the rename: this process may have stood still.
        let limit = deadline.remaining();
        if limit < SHORTEST_RENAME {
            return Ok(Attempt::Again(format!(
                "the names could not be exchanged within --max-pause ({:?})",
                self.method.max_pause
            )));
        }
        crash::point("cutover_deadline_seen");
        let renamed = self.rename(record, operation, ticket, limit).await;
        crash::point("cutover_renamed");
        match renamed {
            Ok(()) => {}
            Err(error) => tracing::warn!(%error, "looking what became of the rename"),
        }
        match self.outcome(record, operation).await? {
            Found::Exchanged => Ok(Attempt::Exchanged(fenced_at)),
            Found::AsBefore => Ok(Attempt::Again("the rename was not done in time".into())),
            Found::Between => {
                go_back(&self.context.mongo, record).await?;
                Ok(Attempt::WentBack("the second rename was not done".into(), fenced_at))
            }
            Found::Unknown => Err(unknown(&record.renames)),
        }
    }

    async fn rename(
        &self,
        record: &Record,
        operation: &mut Operation,
        ticket: &Ticket,
        limit: Duration,
    ) -> Result<()> {
        let (mongo, renames) = (&self.context.mongo, &record.renames);
        let Renames { live, live_uuid, incoming_uuid, retired, .. } = renames;
        let incoming = renames.incoming_now();
        let during = |what: &str| format!("renaming {what}");
        match (self.method.joint, retired) {
            (Joint::Replacing, _) | (_, None) => mongo
                .rename(operation, incoming, incoming_uuid, live, Some(live_uuid), limit)
                .await
                .during(during(&format!("{incoming} to {live}"))),
            (Joint::Together, Some(retired)) => mongo
                .rename_together(operation, &[(live, retired), (incoming, live)], ticket, limit)
                .await
                .during(during(&format!("{live} to {retired} and {incoming} to {live}"))),
            (Joint::Blocked | Joint::Gap, Some(retired)) => {
                mongo
                    .rename(operation, live, live_uuid, retired, None, limit)
                    .await
                    .during(during(&format!("{live} to {retired}")))?;
                crash::point("cutover_gap");
                take_name(mongo, record, incoming, incoming_uuid).await
            }
        }
    }

    /// What the identities tell, once nothing is under way any more.
    async fn outcome(&self, record: &Record, operation: &Operation) -> Result<Found> {
        let (mongo, renames) = (&self.context.mongo, &record.renames);
        match look(mongo, renames).await? {
            Found::Exchanged => Ok(Found::Exchanged),
            _ => {
                mongo.end_operations(&[operation.id()]).await?;
                // What is still on its way can't happen after this, so that the second look tells.
                forbid(mongo, record).await?;
                look(mongo, renames).await
            }
        }
    }

    /// Lets writes through again and stores what it came to, whatever that is.
    async fn settle(
        &self,
        in_step: &mut InStep<'_>,
        record: &Record,
        fence: &Fence,
        begun: Moment,
        attempt: Result<Attempt<Timestamp>>,
        watchdog: &mut Watchdog,
    ) -> Result<Attempt<Swapped>> {
        match attempt {
            Ok(Attempt::Exchanged(fenced_at)) => self
                .complete(in_step, record, (fence, watchdog), (begun, fenced_at))
                .await
                .map(Attempt::Exchanged),
            Ok(Attempt::Again(why)) => {
                self.undo(record, (fence, watchdog), None).await.map(|()| Attempt::Again(why))
            }
            Ok(Attempt::GivenUp(why)) => {
                self.undo(record, (fence, watchdog), None).await.map(|()| Attempt::GivenUp(why))
            }
            Ok(Attempt::WentBack(why, fenced_at)) => {
                let undone = self.undo(record, (fence, watchdog), Some(fenced_at)).await;
                undone.map(|()| Attempt::WentBack(why, fenced_at))
            }
            // The names stay as they are for a person to look at; the application goes on.
            Err(error) if error.class() == Class::Unknown => {
                if let Err(lifting) =
                    fence::lift(&self.context.mongo, fence, &record.renames, &record.id).await
                {
                    tracing::warn!(error = %lifting, "the watchdog goes on letting writes through");
                }
                Err(error)
            }
            Err(error) => {
                // Names may have been exchanged all the same: whoever looks knows, and
                // brings the last moment along before anybody writes upon it.
                if recover(&self.context.mongo, self.job, record).await?.is_none() {
                    self.withdraw(record, fence).await?;
                }
                Err(error)
            }
        }
    }

    /// Brings along what came at the last moment as far as the pause allows, lets writes through, and
    /// goes on with the rest.
    async fn complete(
        &self,
        in_step: &mut InStep<'_>,
        record: &Record,
        (fence, watchdog): (&Fence, &mut Watchdog),
        (begun, fenced_at): (Moment, Timestamp),
    ) -> Result<Swapped> {
        let mongo = &self.context.mongo;
        let deadline = begun.deadline(self.method.max_pause);
        let brought = self.bring_along(in_step, record, fenced_at, deadline).await;
        // Whoever comes next does what could not be done, by the record.
        fence::lift(mongo, fence, &record.renames, &record.id).await?;
        let pause = begun.elapsed();
        watchdog.rest();
        crash::point("cutover_lifted");
        let (fields, residue) = finish(mongo, self.job, record, brought).await?;
        self.close(record, record.end(), fields).await?;
        Ok(Swapped { pause, residue })
    }

    async fn bring_along(
        &self,
        in_step: &mut InStep<'_>,
        record: &Record,
        fenced_at: Timestamp,
        deadline: Deadline,
    ) -> Result<Option<(Brought, Timestamp)>> {
        let Ok(last) = tokio::time::timeout(deadline.remaining(), in_step.last_moment()).await else {
            return Ok(None);
        };
        let brought = bring_along(&self.context.mongo, &record.renames, fenced_at, last?, deadline).await?;
        Ok(Some((brought, fenced_at)))
    }

    /// Undoes what this attempt has done after somebody else had recovered it: it stood still and
    /// did not know.
    async fn withdraw(&self, record: &Record, fence: &Fence) -> Result<()> {
        let (mongo, renames) = (&self.context.mongo, &record.renames);
        forbid(mongo, record).await?;
        if look(mongo, renames).await? == Found::AsBefore {
            fence::lift(mongo, fence, renames, &record.id).await?;
        }
        Ok(())
    }

    /// Lets writes through to the collection that is live as before; where it was not for a moment,
    /// which is told by when writes were held off, what was written meanwhile is brought to it.
    async fn undo(
        &self,
        record: &Record,
        (fence, watchdog): (&Fence, &mut Watchdog),
        gap: Option<Timestamp>,
    ) -> Result<()> {
        let (mongo, renames) = (&self.context.mongo, &record.renames);
        forbid(mongo, record).await?;
        if look(mongo, renames).await? != Found::AsBefore {
            recover(mongo, self.job, record).await?;
            return Err(unknown(renames));
        }
        fence::lift(mongo, fence, renames, &record.id).await?;
        watchdog.rest();
        if let Some(fenced_at) = gap {
            after_going_back(mongo, self.job, record).await?;
            gap::merge(mongo, self.job, record, Some(fenced_at)).await?;
        }
        self.close(record, State::GivenUp, Document::new()).await
    }

    /// Stores what the exchange came to.
    async fn close(&self, record: &Record, state: State, fields: Document) -> Result<()> {
        let mongo = &self.context.mongo;
        if record::close(mongo, self.job, &record.id, Claim::BEGINNER, state, fields).await? {
            Ok(())
        } else {
            Err(self.overtaken())
        }
    }

    /// The error where another process has begun to recover: this one did not go on for too long.
    fn overtaken(&self) -> Error {
        Error::stopped(format!(
            "this process stood still for too long: another one lets writes to {} through again",
            self.renames.live
        ))
        .hint("look at it with `mongorekey status`; start the same command again")
    }
}

/// Gives a collection the live name, which should be free. What the server has made under
/// that name meanwhile, for a write into the gap, is set aside.
///
/// # Errors
/// A stop where the name can't be had.
pub async fn take_name(mongo: &Mongo, record: &Record, from: &Namespace, uuid: &Bson) -> Result<()> {
    let to = &record.renames.live;
    let mut replacing = None;
    for round in 0..GAPS {
        let mut operation = mongo.operation().await?;
        let renamed = mongo.rename(&mut operation, from, uuid, to, replacing.take().as_ref(), RENAMING).await;
        let error = match renamed {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let bearer = mongo.bearer(to).await?;
        // Perhaps it was done, and only the answer was lost.
        if bearer.as_ref() == Some(uuid) {
            return Ok(());
        }
        let made = bearer.filter(|_| Obstacle::of(&error) == Obstacle::NameTaken);
        let Some(made) = made else {
            tracing::warn!(error = crate::error::describe_mongo(&error), "the rename is tried again");
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        match make_way(mongo, record, &made, round).await {
            Ok(drop) => replacing = drop,
            Err(error) if error.class() == Class::Refused => return Err(error),
            Err(error) => tracing::warn!(%error, "{to} is looked at again"),
        }
    }
    Err(Error::stopped(format!("{from} can't be renamed to {to}: the name is taken again and again")))
}

/// Sets aside what stands in the way; returns its identity where it is to be dropped.
///
/// # Errors
/// A refusal where it is one of those that are exchanged: somebody else was at it. A stop where it
/// can't be set aside, or is gone again.
async fn make_way(mongo: &Mongo, record: &Record, made: &Bson, round: u32) -> Result<Option<Bson>> {
    let Renames { live, live_uuid, incoming_uuid, .. } = &record.renames;
    if made == live_uuid || made == incoming_uuid {
        return Err(Error::refused(format!("{live} was renamed meanwhile by another process"))
            .hint("start the same command again: it looks what has become of the names"));
    }
    if round < ASIDES {
        return gap::set_aside(mongo, live, made, &record.id).await.map(|()| None);
    }
    gap::copy_aside(mongo, live, made, &record.id).await?;
    Ok(Some(made.clone()))
}
