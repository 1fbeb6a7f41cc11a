//! `cleanup`: clear away what a job has left in the state database.
//!
//! The job is taken like by a run, so that none can begin meanwhile, and its
//! identity is changed before anything is removed: a run that found half of its
//! records gone would take the rest for everything. The document goes last.

use std::collections::BTreeMap;

use bson::{Bson, Document, doc};
use mongodb::Collection;
use serde_json::json;

use crate::Context;
use crate::cleanse::{affected, displaced, names, out, quarantine};
use crate::cli::cleanup::CleanupArgs;
use crate::config::values::Namespace;
use crate::cutover::record::State;
use crate::cutover::situation::Situation;
use crate::cutover::switch::owned;
use crate::cutover::switch::stage::Stage;
use crate::error::{Context as _, Error, Result};
use crate::job::{Job, JobState, lanes, store};
use crate::mongo::command::retrying;
use crate::mongo::{Mongo, groups};
use crate::report::outcome::Outcome;
use crate::report::terminal;

/// The field of the job document with the collection that a cutover set aside.
const OLD_COLLECTION: &str = "old_collection";
/// What was written between two renames of a cutover: documents of the
/// application, so that they are never removed.
const GAP_WRITES: &str = "gap_writes";
/// States of a cutover in which something may still have to be put right.
const UNSETTLED: [State; 2] = [State::Fenced, State::Renaming];

/// Records of one kind.
struct Records {
    collection: &'static str,
    filter: Document,
}

/// A collection of user data that the job has set aside.
struct SetAside {
    namespace: Namespace,
    /// Its identity.
    uuid: Bson,
}

/// Runs the command.
///
/// # Errors
/// A refusal where there is no such job, somebody runs it, its cutover is not
/// settled or the answer is no; a usage error where nobody can be asked.
pub async fn run(context: &Context, args: &CleanupArgs) -> Result<Outcome> {
    let mongo = &context.mongo;
    let job = stored(mongo, &args.job).await?;
    check(&args.job, &job)?;
    let records = records(&args.job);
    let set_aside = set_aside(mongo, &job).await?;
    let mut counts = BTreeMap::new();
    for record in &records {
        counts.insert(record.collection, count(mongo, record).await?);
    }
    context.events.announce(listing(args, &job, &counts, &set_aside));
    context.events.settled().await;
    terminal::confirm(format!("Remove what the job {} has left?", args.job), args.yes).await?;

    let taken = take(mongo, &args.job).await?;
    end_operations(mongo, &args.job, &job).await?;
    let mut removed = BTreeMap::new();
    for record in &records {
        taken.lease().valid().await?;
        removed.insert(record.collection, remove(mongo, record).await?);
        crate::crash::point("cleanup_removed");
    }
    let (mut dropped, mut kept) = (Vec::new(), Vec::new());
    for collection in &set_aside {
        let is_dropped = args.drop_old_collection && drop_unchanged(mongo, collection).await?;
        if is_dropped { &mut dropped } else { &mut kept }.push(collection.namespace.to_string());
    }
    let mut left = BTreeMap::new();
    for collection in [GAP_WRITES, displaced::COLLECTION] {
        let records = Records { collection, filter: doc! {"_id.job": &args.job} };
        left.insert(collection, count(mongo, &records).await?);
    }
    taken.remove().await?;
    removed.insert("jobs", 1);
    if store::list(mongo, None).await?.is_empty() {
        let pulse = Records { collection: "pulse", filter: doc! {"_id": 1} };
        removed.insert(pulse.collection, remove(mongo, &pulse).await?);
    }
    Ok(report(&args.job, &removed, &dropped, &kept, &left))
}

async fn stored(mongo: &Mongo, name: &str) -> Result<Document> {
    store::find(mongo, name).await?.ok_or_else(|| {
        Error::refused(format!("there is no job `{name}`")).hint("`mongorekey status` lists all jobs")
    })
}

/// Whether the job may be cleared away now.
fn check(name: &str, job: &Document) -> Result<()> {
    if store::is_running(job) {
        let holder = job.get_document("lease").ok().and_then(store::holder_of);
        let who = holder.map_or("another process".into(), |holder| holder.to_string());
        return Err(Error::refused(format!("the job {name} is being run by {who}"))
            .hint(format!("end it with `mongorekey control {name} stop`, then clean up")));
    }
    let cutover = job.get_document("cutover").ok();
    let state = cutover.and_then(|cutover| cutover.get_str("state").ok());
    if state.is_some_and(|state| UNSETTLED.iter().any(|unsettled| unsettled.as_str() == state)) {
        return Err(Error::refused(format!(
            "the cutover of the job {name} was cut short and is not settled"
        ))
        .hint("run `mongorekey cutover` again, or with --abort"));
    }
    if matches!(Stage::of(job), Some(Stage::Switching | Stage::FeedingBack)) {
        return Err(Error::refused(format!("the switch of the job {name} is not finished"))
            .hint("go on with `mongorekey cutover --mode switch`, or take it back with `rollback`"));
    }
    Ok(())
}

/// All records of a job but its document and what the application has written.
fn records(job: &str) -> Vec<Records> {
    let by_owner = |owner: &str, last: &str| {
        let bound = |value: Bson| doc! {owner: job, last: value};
        doc! {"_id": {"$gte": bound(Bson::MinKey), "$lte": bound(Bson::MaxKey)}}
    };
    let mut records = vec![
        Records { collection: "ranges", filter: doc! {"_id.job": job} },
        Records { collection: "verify_ranges", filter: doc! {"_id.job": job} },
        Records { collection: lanes::COLLECTION, filter: doc! {"_id.job": job} },
        Records { collection: "marks", filter: by_owner("job", "id") },
        Records { collection: groups::NOTES, filter: by_owner("owner", "note") },
        Records { collection: affected::MEMBERS, filter: by_owner("owner", "note") },
        Records { collection: "failures", filter: doc! {"job": job} },
    ];
    let noted = |collection| Records { collection, filter: by_owner("owner", "note") };
    records.extend(owned::COLLECTIONS.map(noted));
    records
}

/// The collections of user data that the job has set aside and that still are
/// what they were: not the live one, and none that was replaced since.
async fn set_aside(mongo: &Mongo, job: &Document) -> Result<Vec<SetAside>> {
    let mut found = Vec::new();
    for (name, uuid) in [(OLD_COLLECTION, "source_uuid"), (quarantine::NAME, quarantine::UUID)] {
        let Some(namespace) = job.get_str(name).ok().and_then(|name| name.parse::<Namespace>().ok()) else {
            continue;
        };
        let Some(uuid) = job.get(uuid).filter(|uuid| **uuid != Bson::Null) else { continue };
        let is_in_use = ["source", "target"].iter().any(|role| {
            let identity = job.get_document("identity").ok();
            identity.and_then(|identity| identity.get_str(role).ok()) == Some(namespace.to_string().as_str())
        });
        let exists = mongo.describe(&namespace).await?.and_then(|collection| collection.uuid);
        if !is_in_use && exists.as_ref() == Some(uuid) {
            found.push(SetAside { namespace, uuid: uuid.clone() });
        }
    }
    let unfinished = names::unfinished(mongo, job).await?;
    found.extend(unfinished.into_iter().map(|(namespace, uuid)| SetAside { namespace, uuid }));
    Ok(found)
}

fn listing(
    args: &CleanupArgs,
    job: &Document,
    counts: &BTreeMap<&str, u64>,
    set_aside: &[SetAside],
) -> String {
    let mut lines = vec![format!("of the job {} are removed from the state database:", args.job)];
    lines.extend(
        counts.iter().filter(|(_, count)| **count > 0).map(|(name, count)| format!("  {count} {name}")),
    );
    lines.push("  its job document, and with it the way to resume it, to catch up and to roll back".into());
    let state = job.get_str("state").unwrap_or("unknown");
    if state != JobState::Completed.as_str() {
        lines.push(format!("note: the job is {state}, not completed: its progress is lost"));
    }
    if let Ok(Some(situation)) = Situation::of(job) {
        lines.push(format!("note: {}", situation.sentence()));
    }
    for collection in set_aside {
        lines.push(if args.drop_old_collection {
            format!("DROPPED WITH ALL ITS DOCUMENTS: {}", collection.namespace)
        } else {
            format!("kept: {} (--drop-old-collection drops it)", collection.namespace)
        });
    }
    lines.push("the key map is never touched".into());
    lines.join("\n")
}

/// Takes the job for nobody's purpose: what it did can't be started any more.
async fn take(mongo: &Mongo, name: &str) -> Result<Job> {
    let job = stored(mongo, name).await?;
    let command = job.get_str("command").unwrap_or("unknown").to_owned();
    Job::restart(mongo, name, &command, &doc! {"removed": true}, Document::new()).await
}

/// Ends what a killed run may have left running: it would go on writing.
async fn end_operations(mongo: &Mongo, name: &str, job: &Document) -> Result<()> {
    use futures_util::TryStreamExt as _;
    let ranges: Collection<Document> = mongo.state("ranges");
    let filter = doc! {"_id.job": name, "session": {"$exists": true}};
    let copying: Vec<Document> = retrying("looking for what a run has left", || {
        let find = ranges.find(filter.clone());
        async move { find.await?.try_collect().await }
    })
    .await?;
    let mut sessions: Vec<Document> =
        copying.iter().filter_map(|range| range.get_document("session").ok().cloned()).collect();
    sessions.extend(job.get_document(out::SESSION).ok().cloned());
    mongo.end_operations(&sessions).await
}

async fn count(mongo: &Mongo, records: &Records) -> Result<u64> {
    let collection: Collection<Document> = mongo.state(records.collection);
    retrying(format!("counting {}", records.collection), || {
        let count = collection.count_documents(records.filter.clone());
        async move { count.await }
    })
    .await
}

async fn remove(mongo: &Mongo, records: &Records) -> Result<u64> {
    let collection: Collection<Document> = mongo.state(records.collection);
    retrying(format!("removing {}", records.collection), || {
        let delete = collection.delete_many(records.filter.clone());
        async move { delete.await }
    })
    .await
    .map(|deleted| deleted.deleted_count)
}

/// Drops a collection if it is the one that was listed.
async fn drop_unchanged(mongo: &Mongo, collection: &SetAside) -> Result<bool> {
    let SetAside { namespace, uuid } = collection;
    let exists = mongo.describe(namespace).await?.and_then(|found| found.uuid);
    if exists.as_ref() != Some(uuid) {
        return Ok(false);
    }
    mongo.collection(namespace).drop().await.during(format!("dropping {namespace}"))?;
    Ok(true)
}

fn report(
    job: &str,
    removed: &BTreeMap<&str, u64>,
    dropped: &[String],
    kept: &[String],
    left: &BTreeMap<&str, u64>,
) -> Outcome {
    let json = json!({
        "schema": 1,
        "command": "cleanup",
        "job": job,
        "removed": removed,
        "dropped": dropped,
        "kept": kept,
        "kept_gap_writes": left.get(GAP_WRITES),
        "kept_displaced": left.get(displaced::COLLECTION),
    });
    let counts: Vec<String> = removed
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    let mut lines = vec![format!("{job}: removed {}", counts.join(", "))];
    lines.extend(dropped.iter().map(|name| format!("dropped {name}")));
    lines.extend(kept.iter().map(|name| format!("kept {name}")));
    for (collection, count) in left.iter().filter(|(_, count)| **count > 0) {
        lines.push(format!(
            "kept {count} documents of the application that a cutover or a rollback has set aside, in \
             {collection} of the state database"
        ));
    }
    Outcome::reached(json, lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Class;

    #[test]
    fn an_unsettled_cutover_is_not_cleared_away() {
        for (state, refused) in
            [("fenced", true), ("renaming", true), ("finished", false), ("given_up", false)]
        {
            let checked = check("j", &doc! {"cutover": {"state": state}});
            assert_eq!(checked.is_err_and(|error| error.class() == Class::Refused), refused, "{state}");
        }
        assert!(check("j", &doc! {}).is_ok());
    }
}
