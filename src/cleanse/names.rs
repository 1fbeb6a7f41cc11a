//! The names that target and quarantine have while they are copied.
//!
//! A `$merge` or `$out` can't be part of a transaction, so nothing in it proves that its sender still
//! has the job, and one that was sent in time may arrive late. So both collections are copied under
//! names of the epoch of whoever copies, such as `users_v2.mongorekey-1764547200003`, and whoever takes
//! the job over renames them first: by the old name the command finds nothing. At most it makes a new
//! collection, which nobody reads and which is dropped. They get the names that the operator gave once
//! everything is copied.
//!
//! Where the application writes to the target too, its name stays what it is: such a copy goes by lanes.

use std::collections::HashSet;

use bson::{Bson, DateTime, Document};
use futures_util::TryStreamExt;

use super::plan::Plan;
use super::quarantine;
use super::run::Phase;
use crate::config::values::Namespace;
use crate::crash;
use crate::error::{Context, Error, Result};
use crate::job::{Job, store};
use crate::mongo::Mongo;
use crate::mongo::catalog::Description;
use crate::mongo::command::retrying;
use crate::mongo::renaming::Renamed;

/// Between the name that the operator gave and the epoch.
const MARK: &str = ".mongorekey-";
/// The longest name of a collection with its database, in bytes.
const LONGEST_NAME: usize = 255;
/// Digits of an epoch at most.
const LONGEST_EPOCH: usize = 19;
/// Runs of a job before its epochs could be those of one that was created a second later.
const RUNS_PER_SECOND: i64 = 1000;
/// The field of the job document with the identity of the target.
pub const TARGET_UUID: &str = "target_uuid";

/// The epoch of this run of a job. Another job of that name, after this one was cleared away, counts
/// its runs from one again: so the time of its creation counts too.
pub fn epoch(job: &Job) -> i64 {
    let created =
        job.stored("created_at").and_then(Bson::as_datetime).map_or(0, |at: &DateTime| at.timestamp_millis());
    created / 1000 * RUNS_PER_SECOND + job.run()
}

/// The name in an epoch. Pure.
fn in_epoch(namespace: &Namespace, epoch: i64) -> Namespace {
    Namespace {
        database: namespace.database.clone(),
        collection: format!("{}{MARK}{epoch}", namespace.collection),
    }
}

/// Whether a collection has the name of some epoch. Pure.
fn is_in_an_epoch(namespace: &Namespace, name: &Namespace) -> bool {
    let epoch = name.collection.strip_prefix(&namespace.collection).and_then(|rest| rest.strip_prefix(MARK));
    let is_number = |epoch: &str| !epoch.is_empty() && epoch.bytes().all(|byte| byte.is_ascii_digit());
    name.database == namespace.database && epoch.is_some_and(is_number)
}

/// Whether the server would take a name of an epoch.
///
/// # Errors
/// A usage error where it would be too long.
pub fn check_length(namespace: &Namespace) -> Result<()> {
    let most = LONGEST_NAME - MARK.len() - LONGEST_EPOCH;
    if namespace.to_string().len() <= most {
        return Ok(());
    }
    Err(Error::usage(format!("the name {namespace} is too long: {most} bytes are possible"))
        .hint("while it is copied, the collection bears a name that is longer by the number of the run"))
}

impl Plan {
    /// The same copy under the names of an epoch.
    #[must_use]
    pub fn in_epoch(&self, epoch: i64) -> Self {
        if self.dual_write {
            return self.clone();
        }
        Self {
            target: in_epoch(&self.target, epoch),
            quarantine: self.quarantine.as_ref().map(|quarantine| in_epoch(quarantine, epoch)),
            ..self.clone()
        }
    }
}

/// The collection of that identity, whichever of its names it has; without an identity, what has the
/// name itself.
///
/// # Errors
/// A stop where the server can't be asked.
pub async fn find(
    mongo: &Mongo,
    namespace: &Namespace,
    uuid: Option<&Bson>,
) -> Result<Option<(Namespace, Description)>> {
    let owned = match uuid {
        Some(uuid) => mongo.name_of(&namespace.database, uuid).await?,
        None => None,
    };
    let name = owned.filter(|name| is_in_an_epoch(namespace, name)).unwrap_or_else(|| namespace.clone());
    Ok(mongo.describe(&name).await?.map(|description| (name, description)))
}

/// Names and identities of what a job has copied so far, while it has not finished.
///
/// # Errors
/// A stop where the server can't be asked.
pub async fn unfinished(mongo: &Mongo, job: &Document) -> Result<Vec<(Namespace, Bson)>> {
    let mut found = Vec::new();
    for (role, field) in [("target", TARGET_UUID), (quarantine::NAME, quarantine::UUID)] {
        let identity = job.get_document("identity").ok();
        let name = identity.and_then(|identity| identity.get_str(role).ok()?.parse::<Namespace>().ok());
        let Some((name, uuid)) = name.zip(job.get(field).filter(|uuid| **uuid != Bson::Null)) else {
            continue;
        };
        let now = mongo.name_of(&name.database, uuid).await?;
        found.extend(now.filter(|now| is_in_an_epoch(&name, now)).map(|now| (now, uuid.clone())));
    }
    Ok(found)
}

/// A copy in progress has a name of its own, so that nothing shows what it is going to be called.
///
/// # Errors
/// A refusal where another job copies to the same name.
pub async fn check_nobody_else_copies(mongo: &Mongo, plan: &Plan) -> Result<()> {
    let names: Vec<String> = [Some(&plan.target), plan.quarantine.as_ref()]
        .into_iter()
        .flatten()
        .map(ToString::to_string)
        .collect();
    let jobs = store::list(mongo, None).await?;
    let other = jobs.iter().filter(|job| job.get_str("_id").ok() != Some(&plan.job)).find(|job| {
        let identity = job.get_document("identity").ok();
        let name = |role: &str| identity.and_then(|identity| identity.get_str(role).ok());
        let is_named = ["target", quarantine::NAME]
            .into_iter()
            .any(|role| name(role).is_some_and(|name| names.iter().any(|ours| ours == name)));
        is_named && Phase::is_copying(job)
    });
    let Some(other) = other.and_then(|job| job.get_str("_id").ok()) else { return Ok(()) };
    Err(Error::refused(format!("the job {other} is copying to {} and has not finished", plan.target)).hint(
        format!("choose another name with --to, go on with that job (--job {other}), or forget it: `mongorekey cleanup {other}`"),
    ))
}

/// Gives what the job has made so far the names of this epoch.
///
/// # Errors
/// A stop where the server refuses.
pub async fn take(mongo: &Mongo, job: &Job, plan: &Plan, in_epoch: &Plan) -> Result<()> {
    for (uuid, name, working) in collections(job.document(), plan, in_epoch) {
        if let Renamed::NameTaken = rename(mongo, &uuid, name, working).await? {
            return Err(Error::stopped(format!("{working} exists already"))
                .hint("start the same command again: every run has another name"));
        }
    }
    crash::point("cleanse_renamed");
    Ok(())
}

/// Gives what was copied the names that the operator gave, and drops what late commands have left.
///
/// # Errors
/// A stop where another collection has such a name, or the server refuses.
pub async fn give_back(mongo: &Mongo, plan: &Plan, in_epoch: &Plan) -> Result<()> {
    // They may have been made by this very run.
    let job = store::find(mongo, &plan.job).await?.unwrap_or_default();
    for (uuid, name, working) in collections(&job, plan, in_epoch) {
        match rename(mongo, &uuid, name, name).await? {
            Renamed::Done => {}
            Renamed::NameTaken => {
                return Err(Error::stopped(format!(
                    "another collection was made as {name}, the name of the copy, meanwhile"
                ))
                .hint(format!(
                    "rename or drop {name}, then start the same command again: {working} is whole"
                )));
            }
            Renamed::NotOurs | Renamed::Gone => {
                return Err(Error::stopped(format!("{working}, the copy, was renamed or dropped meanwhile"))
                    .hint("copy anew with --restart"));
            }
        }
    }
    crash::point("cleanse_named");
    drop_leftovers(mongo, plan).await
}

async fn rename(mongo: &Mongo, uuid: &Bson, name: &Namespace, to: &Namespace) -> Result<Renamed> {
    mongo.rename_by_uuid(uuid, to, |from| from == name || is_in_an_epoch(name, from)).await
}

/// Identity, name and name in the epoch of the collections that the job has made. None where its
/// names stay.
fn collections<'a>(
    job: &Document,
    plan: &'a Plan,
    in_epoch: &'a Plan,
) -> Vec<(Bson, &'a Namespace, &'a Namespace)> {
    if plan.dual_write {
        return Vec::new();
    }
    let uuid = |field: &str| job.get(field).filter(|uuid| **uuid != Bson::Null).cloned();
    let target = uuid(TARGET_UUID).map(|uuid| (uuid, &plan.target, &in_epoch.target));
    let quarantine = uuid(quarantine::UUID)
        .zip(plan.quarantine.as_ref().zip(in_epoch.quarantine.as_ref()))
        .map(|(uuid, (name, working))| (uuid, name, working));
    target.into_iter().chain(quarantine).collect()
}

/// Drops collections that have a name of some epoch and that no job knows: late commands of a former
/// holder of the job made them, or it ended before it could record them.
///
/// # Errors
/// A stop where the server refuses.
pub async fn drop_leftovers(mongo: &Mongo, plan: &Plan) -> Result<()> {
    let known = known_uuids(mongo).await?;
    for namespace in [Some(&plan.target), plan.quarantine.as_ref()].into_iter().flatten() {
        for (name, uuid) in named_in_epochs(mongo, namespace).await? {
            if !known.contains(&uuid.to_string()) {
                mongo.collection(&name).drop().await.during(format!("dropping {name}"))?;
            }
        }
    }
    Ok(())
}

async fn known_uuids(mongo: &Mongo) -> Result<HashSet<String>> {
    let jobs = store::list(mongo, None).await?;
    let uuids = jobs.iter().flat_map(|job| [TARGET_UUID, quarantine::UUID].map(|field| job.get(field)));
    Ok(uuids.flatten().map(ToString::to_string).collect())
}

async fn named_in_epochs(mongo: &Mongo, namespace: &Namespace) -> Result<Vec<(Namespace, Bson)>> {
    let database = mongo.database(&namespace.database);
    let found: Vec<_> = retrying(format!("listing the collections of {}", namespace.database), || {
        let list = database.list_collections();
        async move { list.await?.try_collect().await }
    })
    .await?;
    let name = |name: String| Namespace { database: namespace.database.clone(), collection: name };
    Ok(found
        .into_iter()
        .filter_map(|found| Some((name(found.name), Bson::Binary(found.info.uuid?))))
        .filter(|(name, _)| is_in_an_epoch(namespace, name))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(name: &str) -> Namespace {
        name.parse().expect("a namespace")
    }

    #[test]
    fn a_name_of_an_epoch_is_known_as_such() {
        let target = namespace("app.users_v2");
        let working = in_epoch(&target, 1_764_547_200_003);
        assert_eq!(working, namespace("app.users_v2.mongorekey-1764547200003"));
        assert!(is_in_an_epoch(&target, &working));
        for other in [
            "app.users_v2",
            "app.users_v2.mongorekey-",
            "app.users_v2.mongorekey-1x",
            "app.users.mongorekey-1",
            "other.users_v2.mongorekey-1",
            "app.users_v2.0123456789abcdef",
        ] {
            assert!(!is_in_an_epoch(&target, &namespace(other)), "{other}");
        }
    }

    #[test]
    fn a_name_without_room_for_an_epoch_is_a_usage_error() {
        let longest = LONGEST_NAME - MARK.len() - LONGEST_EPOCH - "app.".len();
        assert!(check_length(&namespace(&format!("app.{}", "x".repeat(longest)))).is_ok());
        assert!(check_length(&namespace(&format!("app.{}", "x".repeat(longest + 1)))).is_err());
    }
}
