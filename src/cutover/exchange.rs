//! The exchange of names: writes held off, what is left brought along, renamed.
//!
//! Everything that may have to be undone is in the job document before it is
//! done. The pause that the application sees begins with the attempt to hold
//! writes off and ends when the new collection takes them.

use std::time::Duration;

use bson::{Bson, Document, Timestamp, doc};
use tokio::time::Instant;

use super::fence::{self, Raised};
use super::gap;
use super::in_step::InStep;
use super::order::{Joint, Method, Renames};
use super::record::{self, Fence, Record, State};
use super::recover::{Found, go_back, look, recover, unknown};
use super::residual::{Residue, bring_along, complete};
use super::watchdog::Watchdog;
use crate::Context;
use crate::cli::cutover::Mode;
use crate::config::values::Namespace;
use crate::crash;
use crate::error::{Class, Context as _, Error, Result};
use crate::mongo::Mongo;
use crate::mongo::exchange::{Obstacle, Validation};
use crate::mongo::operation::Operation;

/// Attempts to hold writes off, before it is given up.
const ATTEMPTS: u32 = 5;
/// Between attempts, so that those who were held up can go on.
const BREATH: Duration = Duration::from_secs(1);
/// A rename waits for those who hold the collections: this long at least.
const SHORTEST_RENAME: Duration = Duration::from_millis(100);
/// Names that were taken in the gap are freed so often.
const GAPS: u32 = 20;
/// What may take long, because the application does not wait for it.
const PATIENT: Duration = Duration::from_secs(30);

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
                Attempt::GivenUp(reason) => return Ok(Exchanged::No(reason)),
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
        let mut watchdog =
            Watchdog::start(&settings.uri, &settings.state_database, job.name(), &record.id).await?;
        let mut stored = record.to_document();
        if self.is_rollback {
            stored.extend(record::before(mongo, job.name()).await?);
        }
        job.save(doc! {record::FIELD: stored}).await?;
        crash::point("cutover_recorded");
        let attempt = self.under_a_fence(in_step, &record, &fence, &mut operation, &mut watchdog).await;
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
        fence: &Fence,
        operation: &mut Operation,
        watchdog: &mut Watchdog,
    ) -> Result<Attempt<Swapped>> {
        fence::prepare(&self.context.mongo, fence, &self.renames).await?;
        // As close as it gets before anybody has to wait.
        in_step.draw_level(&self.context.stop).await?;
        watchdog.begin(self.method.max_pause)?;
        let begun = Instant::now();
        let attempt = self.fenced(in_step, record, fence, operation, begun).await;
        self.settle(in_step, record, fence, begun, attempt).await
    }

    fn record(&self, fence: &Fence, operation: &Operation) -> Record {
        Record {
            id: format!("{:016x}", rand::random::<u64>()),
            mode: self.mode,
            is_rollback: self.is_rollback,
            state: State::Fenced,
            renames: self.renames.clone(),
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
        fence: &Fence,
        operation: &mut Operation,
        begun: Instant,
    ) -> Result<Attempt<Timestamp>> {
        let mongo = &self.context.mongo;
        if self.context.stop.is_cancelled() {
            return Ok(Attempt::GivenUp("interrupted before writes were held off".into()));
        }
        let fenced_at = match fence::raise(mongo, fence, &self.renames, self.method.max_pause).await? {
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
        let deadline = begun + self.method.max_pause;
        // A signal waits: this is over in a moment, one way or the other.
        if !in_step.reach(fenced_at, Some(deadline), &tokio_util::sync::CancellationToken::new()).await? {
            return Ok(Attempt::Again(format!(
                "bringing along the last writes took longer than --max-pause ({:?})",
                self.method.max_pause
            )));
        }
        let follower = in_step.follower;
        follower
            .job
            .save(doc! {
                follower.direction.position(): in_step.position().to_document(),
                format!("{}.state", record::FIELD): State::Renaming.as_str(),
                format!("{}.fenced_at", record::FIELD): fenced_at,
            })
            .await?;
        crash::point("cutover_renaming");
        let limit = deadline.saturating_duration_since(Instant::now()).max(SHORTEST_RENAME);
        let renamed = self.rename(operation, limit).await;
        crash::point("cutover_renamed");
        match renamed {
            Ok(()) => {}
            Err(error) => tracing::warn!(%error, "looking what became of the rename"),
        }
        match self.outcome(operation).await? {
            Found::Exchanged => Ok(Attempt::Exchanged(fenced_at)),
            Found::AsBefore => Ok(Attempt::Again("the rename was not done in time".into())),
            Found::Between => {
                go_back(&self.context.mongo, self.job, record).await?;
                // Acknowledged is what was written into the gap, too; a failure ends in `recover`.
                gap::merge_back(&self.context.mongo, self.job, &self.renames.live).await?;
                Ok(Attempt::GivenUp("the second rename was not done".into()))
            }
            Found::Unknown => Err(unknown(&self.renames)),
        }
    }

    async fn rename(&self, operation: &mut Operation, limit: Duration) -> Result<()> {
        let mongo = &self.context.mongo;
        let Renames { live, live_uuid, incoming, incoming_uuid, retired } = &self.renames;
        let during = |what: &str| format!("renaming {what}");
        match (self.method.joint, retired) {
            (Joint::Replacing, _) | (_, None) => mongo
                .rename(operation, incoming, incoming_uuid, live, true, limit)
                .await
                .during(during(&format!("{incoming} to {live}"))),
            (Joint::Together, Some(retired)) => mongo
                .rename_together(operation, &[(live, retired), (incoming, live)], limit)
                .await
                .during(during(&format!("{live} to {retired} and {incoming} to {live}"))),
            (Joint::Blocked | Joint::Gap, Some(retired)) => {
                mongo
                    .rename(operation, live, live_uuid, retired, false, limit)
                    .await
                    .during(during(&format!("{live} to {retired}")))?;
                crash::point("cutover_gap");
                take_name(mongo, self.job, &self.renames, incoming, incoming_uuid).await
            }
        }
    }

    /// What the identities tell, once nothing is under way any more.
    async fn outcome(&self, operation: &Operation) -> Result<Found> {
        let mongo = &self.context.mongo;
        match look(mongo, &self.renames).await? {
            Found::Exchanged => Ok(Found::Exchanged),
            _ => {
                mongo.end_operations(&[operation.id()]).await?;
                look(mongo, &self.renames).await
            }
        }
    }

    /// Lets writes through again and stores what it came to, whatever that is.
    async fn settle(
        &self,
        in_step: &mut InStep<'_>,
        record: &Record,
        fence: &Fence,
        begun: Instant,
        attempt: Result<Attempt<Timestamp>>,
    ) -> Result<Attempt<Swapped>> {
        match attempt {
            Ok(Attempt::Exchanged(fenced_at)) => {
                self.complete(in_step, record, fence, begun, fenced_at).await.map(Attempt::Exchanged)
            }
            Ok(Attempt::Again(why)) => self.undo(record, fence).await.map(|()| Attempt::Again(why)),
            Ok(Attempt::GivenUp(why)) => self.undo(record, fence).await.map(|()| Attempt::GivenUp(why)),
            // The names stay as they are for a person to look at; the application goes on.
            Err(error) if error.class() == Class::Unknown => {
                if let Err(lifting) = fence::lift(&self.context.mongo, fence, &self.renames).await {
                    tracing::warn!(error = %lifting, "the watchdog goes on letting writes through");
                }
                Err(error)
            }
            Err(error) => {
                // Names may have been exchanged all the same: whoever looks knows, and
                // brings the last moment along before anybody writes upon it.
                recover(&self.context.mongo, self.job, record).await?;
                Err(error)
            }
        }
    }

    /// Brings along what came at the last moment, and lets writes through.
    async fn complete(
        &self,
        in_step: &mut InStep<'_>,
        record: &Record,
        fence: &Fence,
        begun: Instant,
        fenced_at: Timestamp,
    ) -> Result<Swapped> {
        let mongo = &self.context.mongo;
        let may_have_gap = matches!(self.method.joint, Joint::Gap | Joint::Blocked);
        let brought = match in_step.last_moment().await {
            Ok(last) => bring_along(mongo, self.job, &self.renames, fenced_at, last, may_have_gap).await,
            Err(error) => Err(error),
        };
        // Whoever comes next does what could not be done, by the record.
        fence::lift(mongo, fence, &self.renames).await?;
        let pause = begun.elapsed();
        crash::point("cutover_lifted");
        let brought = brought?;
        let fields = complete(mongo, self.job, record, fenced_at, &brought).await?;
        record::close(mongo, self.job, &record.id, record.end(), fields).await?;
        Ok(Swapped { pause, residue: brought.residue })
    }

    /// Lets writes through to the collection that is live as before.
    async fn undo(&self, record: &Record, fence: &Fence) -> Result<()> {
        let mongo = &self.context.mongo;
        fence::lift(mongo, fence, &self.renames).await?;
        if look(mongo, &self.renames).await? != Found::AsBefore {
            return Err(unknown(&self.renames));
        }
        record::close(mongo, self.job, &record.id, State::GivenUp, Document::new()).await
    }
}

/// Gives a collection the live name, which should be free. What the server has made under
/// that name meanwhile, for a write into the gap, gives way and is kept.
///
/// # Errors
/// A stop where the name can't be had.
pub async fn take_name(
    mongo: &Mongo,
    job: &str,
    renames: &Renames,
    from: &Namespace,
    uuid: &Bson,
) -> Result<()> {
    let to = &renames.live;
    for _ in 0..GAPS {
        let mut operation = mongo.operation().await?;
        match mongo.rename(&mut operation, from, uuid, to, false, PATIENT).await {
            Ok(()) => return Ok(()),
            Err(error) if Obstacle::of(&error) == Obstacle::NameTaken => {
                if mongo.bearer(to).await?.as_ref() == Some(uuid) {
                    return Ok(());
                }
                if put_aside(mongo, job, renames).await? {
                    let mut operation = mongo.operation().await?;
                    return mongo
                        .rename(&mut operation, from, uuid, to, true, PATIENT)
                        .await
                        .during(format!("renaming {from} to {to}"));
                }
            }
            Err(error) => {
                // Perhaps it was done, and only the answer was lost.
                if mongo.bearer(to).await?.as_ref() == Some(uuid) {
                    return Ok(());
                }
                tracing::warn!(error = crate::error::describe_mongo(&error), "the rename is tried again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    Err(Error::stopped(format!("{from} can't be renamed to {to}: the name is taken again and again")))
}

/// Holds off writes to what stands in the way, and keeps its documents; false
/// where it is gone again.
///
/// # Errors
/// A stop where it is one of those that are exchanged: somebody else was at it.
async fn put_aside(mongo: &Mongo, job: &str, renames: &Renames) -> Result<bool> {
    let namespace = &renames.live;
    let Some(uuid) = mongo.bearer(namespace).await? else { return Ok(false) };
    if uuid == renames.live_uuid || uuid == renames.incoming_uuid {
        return Err(Error::stopped(format!("{namespace} was renamed meanwhile by another process"))
            .hint("start the same command again: it looks what has become of the names"));
    }
    let fenced = mongo.set_validation(namespace, &uuid, &Validation::refusing(), PATIENT).await;
    if fenced.is_err() {
        return Ok(false);
    }
    gap::keep(mongo, job, namespace).await?;
    Ok(true)
}
