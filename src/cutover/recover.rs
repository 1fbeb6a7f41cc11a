//! After a crash or an answer that was lost: what has become of an exchange of
//! names, told by the identities of the collections, and the fence lifted.

use std::time::Duration;

use bson::{Bson, Document, Timestamp, doc};
use futures_util::TryStreamExt as _;

use super::exchange::take_name;
use super::fence::{self, LONGEST_WAIT};
use super::gap;
use super::in_step::last_moment;
use super::order::Renames;
use super::orphan;
use super::record::{self, Claim, Record, State};
use super::residual::{Brought, Residue, after, bring_along, complete};
use super::working_name;
use crate::cleanse::follow::Direction;
use crate::cleanse::marks::Marks;
use crate::clock::{Deadline, Moment};
use crate::config::Settings;
use crate::crash;
use crate::error::{Class, Error, Result};
use crate::event::Events;
use crate::job::lanes;
use crate::job::store;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::feed::Position;
use crate::mongo::watched::Watched;

/// What a dead process has sent may still be on its way to the server, or wait
/// there for its lock: a fence that was raised after all would stay.
const ON_THE_WAY: Duration = LONGEST_WAIT.saturating_add(Duration::from_millis(250));
/// For so long a recovery brings along what came at the last moment while writes are held off; the
/// rest comes after they go on.
const UNDER_THE_FENCE: Duration = Duration::from_millis(500);
/// How often it is looked whether another process has recovered.
const POLL: Duration = Duration::from_millis(250);

/// Another process may need so long to recover.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the collections are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The incoming collection bears the live name.
    Exchanged,
    /// Everything is as it was.
    AsBefore,
    /// The former collection has its new name, the live one is free or somebody
    /// else's.
    Between,
    /// None of these.
    Unknown,
}

/// Looks which collection bears which name.
///
/// # Errors
/// A stop where the server can't be asked.
pub async fn look(mongo: &Mongo, renames: &Renames) -> Result<Found> {
    let live = mongo.bearer(&renames.live).await?;
    // Whatever its name is: during an attempt it has another one.
    let incoming = mongo.name_of(&renames.incoming.database, &renames.incoming_uuid).await?;
    let incoming = incoming.map(|_| renames.incoming_uuid.clone());
    let retired = match &renames.retired {
        Some(retired) => mongo.bearer(retired).await?,
        None => None,
    };
    Ok(judge(renames, live.as_ref(), incoming.as_ref(), retired.as_ref()))
}

/// What the bearers of the three names tell. Pure.
fn judge(renames: &Renames, live: Option<&Bson>, incoming: Option<&Bson>, retired: Option<&Bson>) -> Found {
    let is = |found: Option<&Bson>, wanted: &Bson| found == Some(wanted);
    if is(live, &renames.incoming_uuid) {
        Found::Exchanged
    } else if is(live, &renames.live_uuid) {
        Found::AsBefore
    } else if is(retired, &renames.live_uuid) && is(incoming, &renames.incoming_uuid) {
        Found::Between
    } else {
        Found::Unknown
    }
}

/// The error where nobody can tell what happened.
pub fn unknown(renames: &Renames) -> Error {
    let retired = renames.retired.as_ref().map_or("(dropped)".into(), ToString::to_string);
    Error::new(
        Class::Unknown,
        format!(
            "the outcome of the cutover can't be established: {} is neither the collection from before nor the new one",
            renames.live
        ),
    )
    .hint(format!(
        "a person must look: compare the UUIDs (db.getCollectionInfos()) of {}, {} and {retired} with those in the job document",
        renames.live, renames.incoming
    ))
}

/// Ends what a crash has left of the exchange of that record, and lifts its
/// fence; returns what became of it. `None` where somebody else is at it.
///
/// # Errors
/// An unknown outcome, or a stop where the server does not do as asked.
pub async fn recover(mongo: &Mongo, job: &str, record: &Record) -> Result<Option<State>> {
    let Some(claim) = record::claim(mongo, job, &record.id).await? else { return Ok(None) };
    let recovered = recover_claimed(mongo, job, record, claim).await;
    if recovered.is_err() {
        // It stays on record for the person who looks, and for whoever asks again.
        record::release(mongo, job, &record.id, claim).await?;
    }
    recovered
}

/// Returns `None` where somebody else has claimed it since.
async fn recover_claimed(mongo: &Mongo, job: &str, record: &Record, claim: Claim) -> Result<Option<State>> {
    if let Some(session) = &record.session {
        mongo.end_operations(std::slice::from_ref(session)).await?;
    }
    lanes::end_transactions(mongo, job).await?;
    let renames = &record.renames;
    // First of all: from here on nothing can be exchanged any more, whatever is still on its way.
    forbid(mongo, record).await?;
    let mut has_gone_back = false;
    let found = match look(mongo, renames).await? {
        Found::Between => {
            // Back: nothing is lost either way, and this way nothing is new.
            go_back(mongo, record).await?;
            has_gone_back = true;
            look(mongo, renames).await?
        }
        found => found,
    };
    let deadline = Moment::now().deadline(UNDER_THE_FENCE);
    let brought =
        if found == Found::Exchanged { brought_along(mongo, job, record, deadline).await } else { Ok(None) };
    // Writes go on, whatever could not be done.
    if let Some(fence) = &record.fence {
        fence::lift(mongo, fence, renames, &record.id).await?;
        crash::point("recover_lifted");
        // One that arrives after that is lifted too.
        tokio::time::sleep(ON_THE_WAY).await;
        fence::lift(mongo, fence, renames, &record.id).await?;
    }
    let state = match found {
        Found::Exchanged => record.end(),
        Found::AsBefore => State::GivenUp,
        Found::Between | Found::Unknown => return Err(unknown(renames)),
    };
    let fields = if found == Found::Exchanged {
        finish(mongo, job, record, brought).await?.0
    } else {
        if has_gone_back {
            after_going_back(mongo, job, record).await?;
        }
        let fenced_at = stored_moment(mongo, job, record.direction()).await.ok().map(|(_, moment)| moment);
        gap::merge(mongo, job, record, fenced_at).await?;
        Document::new()
    };
    let is_closed = record::close(mongo, job, &record.id, claim, state, fields).await?;
    Ok(is_closed.then_some(state))
}

/// Makes every rename of an exchange impossible that has not happened yet, whatever is still on its
/// way to the server.
///
/// # Errors
/// A stop where the server does not do as asked.
pub async fn forbid(mongo: &Mongo, record: &Record) -> Result<()> {
    if record.renames.retired.is_some() {
        // First: an `applyOps` between the two would take the live name away and give it to nobody.
        mongo.take_ticket(&record.id).await?;
    }
    working_name::take_away(mongo, &record.renames).await
}

/// Makes sure that nothing is left of an exchange that was cut short: by
/// recovering, or by waiting for who is at it. Returns what became of it, where
/// there was any.
///
/// # Errors
/// As [`recover`]; a stop where the other one does not come to an end.
pub async fn finish_earlier(mongo: &Mongo, job: &str) -> Result<Option<State>> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let stored = store::find(mongo, job).await?.unwrap_or_default();
        let record = match Record::of(&stored)? {
            Some(record) if record.fence.is_some() => record,
            Some(record) => {
                if !record.is_done() {
                    // The first rename of an attempt may have arrived after it was given up.
                    working_name::give_back(mongo, &record.renames).await?;
                }
                return Ok(Some(record.state));
            }
            None => return Ok(None),
        };
        if let Some(state) = recover(mongo, job, &record).await? {
            return Ok(Some(state));
        }
        if tokio::time::Instant::now() > deadline {
            return Err(Error::stopped(format!("another process does not end the exchange of {job}"))
                .hint("start the same command again"));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Gives the former collection its name again, after the first of two renames.
///
/// # Errors
/// A stop where the name can't be had, or as for the change stream.
pub async fn go_back(mongo: &Mongo, record: &Record) -> Result<()> {
    let Renames { live_uuid, retired, .. } = &record.renames;
    let retired = retired.as_ref().ok_or_else(|| unknown(&record.renames))?;
    take_name(mongo, record, retired, live_uuid).await
}

/// The feed of the live collection ends with the first of two renames, although the
/// collection has come back: what came before that is marked, and the feed goes on
/// after the rename that brought it back.
///
/// # Errors
/// A stop where the change stream does not tell of the renames.
pub async fn after_going_back(mongo: &Mongo, job: &str, record: &Record) -> Result<()> {
    let retired = record.renames.retired.as_ref().ok_or_else(|| unknown(&record.renames))?;
    let direction = record.direction();
    let (position, _) = stored_moment(mongo, job, direction).await?;
    let no_moment = || Error::stopped("the change stream does not tell of the renames");
    let mut feed = mongo.prompt_feed(&Watched::only(&record.renames.live), position).await?;
    let last = last_moment(&mut feed).await?;
    Marks::of(mongo, job).set(&last.touched).await?;
    let gone = last.ended.and_then(|ended| ended.at).ok_or_else(no_moment)?;
    let mut feed = mongo.prompt_feed(&Watched::only(retired), Position::Time(after(gone))).await?;
    let back = last_moment(&mut feed).await?.ended.and_then(|ended| ended.at).ok_or_else(no_moment)?;
    let position = Position::Time(after(back)).to_document();
    let jobs = mongo.state::<Document>("jobs");
    let (filter, update) = (doc! {"_id": job}, doc! {"$set": {direction.position(): position}});
    retrying(format!("saving the job {job}"), || {
        let update = jobs.update_one(filter.clone(), update.clone());
        async move { update.await }
    })
    .await
    .map(|_| ())
}

/// The position of a job, and since when writes were held off.
async fn stored_moment(mongo: &Mongo, job: &str, direction: Direction) -> Result<(Position, Timestamp)> {
    let stored = store::find(mongo, job).await?.unwrap_or_default();
    let position = stored.get_document(direction.position()).ok().and_then(Position::from_document);
    let fenced_at = Record::of(&stored)?.and_then(|latest| latest.fenced_at);
    position
        .zip(fenced_at)
        .ok_or_else(|| Error::stopped(format!("the job {job} does not tell since when writes were held off")))
}

/// What came at the last moment of an exchange whose process did not live to see
/// to it; returns it with the moment since when writes were held off. `None` where the
/// deadline came first.
async fn brought_along(
    mongo: &Mongo,
    job: &str,
    record: &Record,
    deadline: Deadline,
) -> Result<Option<(Brought, Timestamp)>> {
    let reading = async {
        let (position, fenced_at) = stored_moment(mongo, job, record.direction()).await?;
        let mut feed = mongo.prompt_feed(&Watched::only(&record.renames.live), position).await?;
        Ok((last_moment(&mut feed).await?, fenced_at))
    };
    let Ok(read) = tokio::time::timeout(deadline.remaining(), reading).await else { return Ok(None) };
    let (last, fenced_at) = read?;
    let brought = bring_along(mongo, &record.renames, fenced_at, last, deadline).await?;
    Ok(Some((brought, fenced_at)))
}

/// Does what is left of an exchange that happened, now that writes go on: what could not be brought
/// along before is brought along now, and gives way to anything newer. Returns what is to be stored
/// and what came of it.
///
/// # Errors
/// A stop where it can't be read or written.
pub async fn finish(
    mongo: &Mongo,
    job: &str,
    record: &Record,
    brought: Result<Option<(Brought, Timestamp)>>,
) -> Result<(Document, Residue)> {
    let brought = match brought {
        Ok(Some(brought)) => brought,
        not_yet => {
            if let Err(error) = not_yet {
                tracing::warn!(%error, "the last moment is brought along while writes go on");
            }
            let patient = Moment::now().deadline(gap::PATIENCE);
            let late =
                || Error::stopped("what was written at the last moment of the cutover could not be read");
            brought_along(mongo, job, record, patient).await?.ok_or_else(late)?
        }
    };
    complete(mongo, job, record, brought.1, brought.0).await
}

/// Lifts every fence that a process has left which is gone. What can't be done is
/// warned of: it is for the commands of that job to fail, and others go on.
pub async fn lift_orphans(mongo: &Mongo, settings: &Settings, events: &Events) {
    for name in with_a_fence(mongo).await {
        if let Err(error) = lift_orphan(mongo, events, &name).await {
            let next = error.next_step().map(|hint| format!("; {hint}")).unwrap_or_default();
            events.warn(format!("the cutover of the job {name} was cut short: {error}{next}"));
        }
    }
    let Some(rules) = &settings.cleanse else { return };
    // Whoever can't list the collections is told so by the command itself.
    for orphan in orphan::find(mongo, &rules.source.database).await.unwrap_or_default() {
        events.warn(orphan.told());
    }
}

/// Names of the jobs that may hold writes off. Most often there is none, and then
/// this is one question to a small collection.
async fn with_a_fence(mongo: &Mongo) -> Vec<String> {
    let jobs = mongo.state::<Document>("jobs");
    let found = async { jobs.find(Record::with_a_fence()).await?.try_collect::<Vec<Document>>().await }.await;
    // Whoever can't read the jobs is told so by the command itself.
    let found = found.unwrap_or_default();
    found.iter().filter_map(|job| job.get_str("_id").ok().map(str::to_owned)).collect()
}

async fn lift_orphan(mongo: &Mongo, events: &Events, name: &str) -> Result<()> {
    let Some(job) = store::find(mongo, name).await? else { return Ok(()) };
    let Some(record) = Record::of(&job)? else { return Ok(()) };
    if store::is_running(&job) || record.fence.is_none() {
        return Ok(());
    }
    if let Some(state) = finish_earlier(mongo, name).await? {
        events.warn(format!(
            "a cutover of {} was cut short and had left its writes held off: they are let through again; {}",
            record.renames.live,
            match state {
                State::Finished => "the new collection is live",
                _ => "the old collection is live as before",
            }
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_tell_what_happened() {
        let renames = Renames {
            live: "app.users".parse().expect("valid"),
            live_uuid: 1.into(),
            incoming: "app.users_v2".parse().expect("valid"),
            incoming_uuid: 2.into(),
            retired: Some("app.users_old".parse().expect("valid")),
            working: None,
        };
        let (old, new, other) = (Bson::from(1), Bson::from(2), Bson::from(3));
        let judge = |live: Option<&Bson>, incoming, retired| judge(&renames, live, incoming, retired);
        assert_eq!(judge(Some(&old), Some(&new), None), Found::AsBefore);
        assert_eq!(judge(Some(&new), None, Some(&old)), Found::Exchanged);
        assert_eq!(judge(Some(&new), None, None), Found::Exchanged, "the old one was dropped");
        assert_eq!(judge(None, Some(&new), Some(&old)), Found::Between);
        assert_eq!(judge(Some(&other), Some(&new), Some(&old)), Found::Between, "written into the gap");
        assert_eq!(judge(Some(&other), Some(&new), None), Found::Unknown);
        assert_eq!(judge(None, None, Some(&old)), Found::Unknown);
    }
}
