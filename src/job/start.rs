//! Taking a job: starting, resuming and joining it, and who may.

use std::time::Duration;

use bson::{Bson, DateTime, Document, doc};
use mongodb::Collection;
use mongodb::options::ReturnDocument;

use super::elsewhere::FAILED_ELSEWHERE;
use super::holder::Holder;
use super::lanes;
use super::lease::times;
use super::store;
use super::store::{COLLECTION, Job, JobState, Role, holder_of, is_running, leaving};
use crate::command_line;
use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;

/// Version of the document's layout.
const VERSION: i32 = 1;
/// What a run leaves behind that means nothing to the next one.
const OF_ONE_RUN: [&str; 4] = [FAILED_ELSEWHERE, "documents", "limited_by", "limited_by_seconds"];
/// The field with the result of the last run, for a report.
pub const RESULT: &str = "result";
/// How often a job was borrowed: each time counts in `fence`, and is no run.
pub const BORROWED: &str = "borrowed";
/// The field that tells who ran last, for a report.
pub const RAN: &str = "ran";
/// How often a lease that may be dead is looked at.
const POLL: Duration = Duration::from_millis(500);

/// What a lease is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum For {
    /// A run of what the job is.
    Run,
    /// A run of something else under its name.
    AnotherRun,
    /// Keeping others from it.
    Others,
}

impl Job {
    /// Takes the lease of the job of that name for something else than before.
    /// `mark` is stored together with the new identity: whoever starts next must
    /// see that what the former identity had made is still to be cleared away.
    ///
    /// # Errors
    /// A refusal where another process runs the job.
    pub async fn restart(
        mongo: &Mongo,
        name: &str,
        command: &str,
        identity: &Document,
        mark: Document,
    ) -> Result<Self> {
        let mut job = Self::acquire(mongo, name, command, identity, For::AnotherRun).await?;
        let mut fields = mark;
        fields.insert("identity", identity.clone());
        job.save(fields.clone()).await?;
        job.remember(fields);
        Ok(job)
    }

    /// Starts or resumes the job of that name and takes its lease.
    ///
    /// # Errors
    /// A refusal where the job does something else or another process runs it.
    pub async fn start(mongo: &Mongo, name: &str, command: &str, identity: &Document) -> Result<Self> {
        Self::acquire(mongo, name, command, identity, For::Run).await
    }

    /// Takes the lease of a job so that nobody runs it meanwhile, without running
    /// it: what is stored of its last run stays. To be ended by [`Job::give_back`].
    ///
    /// # Errors
    /// As [`Job::start`].
    pub async fn borrow(mongo: &Mongo, name: &str, command: &str, identity: &Document) -> Result<Self> {
        Self::acquire(mongo, name, command, identity, For::Others).await
    }

    async fn acquire(
        mongo: &Mongo,
        name: &str,
        command: &str,
        identity: &Document,
        purpose: For,
    ) -> Result<Self> {
        let collection: Collection<Document> = mongo.state(COLLECTION);
        let holder = Holder::current();
        let mut first_seen_renewal = None;
        let mut taken_over = false;
        loop {
            let Some(stored) = store::find(mongo, name).await? else {
                refuse_others(mongo).await?;
                create(&collection, name, command, identity).await?;
                continue;
            };
            let expected = match purpose {
                For::AnotherRun => stored.get_document("identity").unwrap_or(identity),
                For::Run | For::Others => identity,
            };
            check_identity(name, &stored, command, expected)?;
            let lease = stored.get_document("lease").ok();
            if lease.and_then(holder_of).as_ref() == Some(&holder) {
                // We took it and did not hear of it: the answer was lost or late.
                let job = Self::held(stored, name, collection, Role::Runner, taken_over);
                return job.alone(mongo, purpose).await;
            }
            if let Some(lease) = lease
                && !may_take(name, lease, &stored, &holder, &mut first_seen_renewal)?
            {
                tokio::time::sleep(POLL).await;
                continue;
            }
            let fence = stored.get_i64("fence").unwrap_or(0);
            taken_over = lease.is_some();
            count_the_dead(&collection, &stored).await?;
            if let Some(document) = take(&collection, name, fence, &holder, purpose).await? {
                let job = Self::held(document, name, collection, Role::Runner, taken_over);
                return job.alone(mongo, purpose).await;
            }
        }
    }

    /// Once nothing that a former holder sends can be carried out any more.
    async fn alone(self, mongo: &Mongo, purpose: For) -> Result<Self> {
        lanes::raise(mongo, self.document(), self.lease()).await?;
        Ok(self.borrowed(purpose == For::Others))
    }

    /// Joins those who run the job; `None` where nobody does.
    ///
    /// # Errors
    /// A refusal where the job does something else.
    pub async fn join(mongo: &Mongo, name: &str, command: &str, identity: &Document) -> Result<Option<Self>> {
        let collection: Collection<Document> = mongo.state(COLLECTION);
        let Some(stored) = store::find(mongo, name).await? else { return Ok(None) };
        check_identity(name, &stored, command, identity)?;
        if !is_running(&stored) {
            return Ok(None);
        }
        let worker = format!("w{:016x}", rand::random::<u64>());
        let path = format!("workers.{worker}");
        let mut fields = times(&path);
        fields.insert(format!("{path}.holder"), doc! {"$literal": encode(&Holder::current())?});
        fields.insert(format!("{path}.joined_at"), "$$NOW");
        let filter = doc! {"_id": name, "fence": stored.get_i64("fence").unwrap_or(0)};
        let joined = retrying(format!("joining the job {name}"), || {
            let update = collection
                .find_one_and_update(filter.clone(), vec![doc! {"$set": fields.clone()}])
                .return_document(ReturnDocument::After);
            async move { update.await }
        })
        .await?;
        Ok(joined.map(|document| Self::held(document, name, collection, Role::Joined(worker), false)))
    }
}

/// Refuses a state database in which `jobs` is a collection of an application.
///
/// # Errors
/// A refusal where it holds a document that no job is; a stop where it can't be read.
pub async fn refuse_others(mongo: &Mongo) -> Result<()> {
    let collection: Collection<Document> = mongo.state(COLLECTION);
    let is_no_job = doc! {"$or": [{"v": {"$exists": false}}, {"fence": {"$exists": false}}]};
    let found = retrying(format!("looking at {}", collection.namespace()), || {
        let find = collection.find_one(is_no_job.clone()).projection(doc! {"_id": 1});
        async move { find.await }
    });
    if found.await?.is_none() {
        return Ok(());
    }
    let namespace = collection.namespace();
    Err(Error::refused(format!("{namespace} holds documents that are no jobs of mongorekey"))
        .hint("it seems to be a collection of an application: name another `state_database` in the config"))
}

async fn create(
    collection: &Collection<Document>,
    name: &str,
    command: &str,
    identity: &Document,
) -> Result<()> {
    let filter = doc! {"_id": name};
    let insert = doc! {"$setOnInsert": {
        "v": VERSION,
        "command": command,
        "identity": identity.clone(),
        "fence": 0_i64,
        "created_at": DateTime::now(),
        "updated_at": DateTime::now(),
    }};
    retrying(format!("creating the job {name}"), || {
        let update = collection.update_one(filter.clone(), insert.clone()).upsert(true);
        async move { update.await }
    })
    .await
    .map(|_| ())
}

/// Takes the lease if nobody was faster; `None` if somebody was.
async fn take(
    collection: &Collection<Document>,
    name: &str,
    fence: i64,
    holder: &Holder,
    purpose: For,
) -> Result<Option<Document>> {
    let filter = doc! {"_id": name, "fence": fence};
    // A pipeline, because only the server's clock counts.
    let mut fields = times("lease");
    fields.extend(doc! {
        "lease.holder": {"$literal": encode(holder)?},
        "fence": fence + 1,
        "workers": living_workers(),
    });
    let mut update = vec![doc! {"$set": freed_buckets()}];
    if purpose == For::Others {
        fields.insert(BORROWED, doc! {"$add": [{"$ifNull": [format!("${BORROWED}"), 0_i64]}, 1_i64]});
    } else {
        fields.extend(doc! {
            "state": JobState::Running.as_str(),
            "started_at": "$$NOW",
            "updated_at": "$$NOW",
            RAN: {"$literal": ran(holder)},
        });
        update.push(doc! {"$unset": OF_ONE_RUN.to_vec()});
    }
    update.insert(0, doc! {"$set": fields});
    retrying(format!("taking the lease of the job {name}"), || {
        let update = collection
            .find_one_and_update(filter.clone(), update.clone())
            .return_document(ReturnDocument::After);
        async move { update.await }
    })
    .await
}

/// Adds what workers have done whose lease has run out: whoever takes the lease
/// knows them no longer.
async fn count_the_dead(collection: &Collection<Document>, stored: &Document) -> Result<()> {
    let now = stored.get_datetime("now").ok();
    for (name, worker) in stored.get_document("workers").into_iter().flatten() {
        let Some(worker) = worker.as_document() else { continue };
        let Some(expired) = worker.get_datetime("expires_at").ok().filter(|expires| Some(*expires) <= now)
        else {
            continue;
        };
        let filter = doc! {"_id": stored.get("_id"), format!("workers.{name}.expires_at"): *expired};
        let totals = worker.get_document("totals").cloned().unwrap_or_default();
        let update = leaving(name, &totals);
        retrying("counting what workers have done that are gone", || {
            let update = collection.update_one(filter.clone(), update.clone());
            async move { update.await }
        })
        .await?;
    }
    Ok(())
}

/// Which process ran last and how it was started: kept when the lease is given back.
fn ran(holder: &Holder) -> Document {
    doc! {
        "host": &holder.host,
        "pid": holder.pid,
        "version": env!("CARGO_PKG_VERSION"),
        "command_line": command_line::shown(),
    }
}

fn encode(holder: &Holder) -> Result<Document> {
    bson::serialize_to_document(holder)
        .map_err(|error| Error::stopped(format!("the lease could not be encoded: {error}")))
}

/// Those who joined an earlier runner and are still alive go on with the new one.
fn living_workers() -> Document {
    doc! {"$arrayToObject": {"$filter": {
        "input": {"$objectToArray": {"$ifNull": ["$workers", {}]}},
        "cond": {"$gt": ["$$this.v.expires_at", "$$NOW"]},
    }}}
}

/// Without anybody who joined the runner owns everything, which needs no list, and
/// calls by no common timetable. Otherwise whatever is not in the hands of the
/// living is free, and they go on calling at the moments that they have reserved.
fn freed_buckets() -> Document {
    let living = doc! {"$map": {"input": {"$objectToArray": "$workers"}, "in": "$$this.k"}};
    let freed = doc! {"$arrayToObject": {"$map": {
        "input": {"$objectToArray": {"$ifNull": ["$buckets", {}]}},
        "in": {"k": "$$this.k", "v": {"$cond": [{"$in": ["$$this.v", living]}, "$$this.v", ""]}},
    }}};
    let is_alone = doc! {"$eq": ["$workers", {}]};
    doc! {
        "buckets": {"$cond": [is_alone.clone(), "$$REMOVE", freed]},
        "budget": {"$cond": [is_alone.clone(), "$$REMOVE", "$budget"]},
        "shared": {"$and": [{"$not": [is_alone]}, {"$ifNull": ["$shared", false]}]},
    }
}

/// Whether a held lease may be taken now; false: look again later.
fn may_take(
    name: &str,
    lease: &Document,
    stored: &Document,
    observer: &Holder,
    first_seen_renewal: &mut Option<Bson>,
) -> Result<bool> {
    let holder = holder_of(lease);
    let valid = stored.get_bool("lease_valid").unwrap_or(false);
    if !valid || holder.as_ref().is_some_and(|holder| holder.is_gone(observer)) {
        return Ok(true);
    }
    let renewed = lease.get("renewed_at").cloned();
    let first = first_seen_renewal.get_or_insert_with(|| renewed.clone().unwrap_or(Bson::Null));
    let alive = holder.as_ref().is_some_and(|holder| holder.is_alive(observer));
    if alive || renewed.as_ref() != Some(first) {
        let who = holder.map_or("another process".into(), |holder| holder.to_string());
        return Err(Error::refused(format!("the job {name} is being run by {who}"))
            .hint("stop that process first, or look at it with `mongorekey status`"));
    }
    Ok(false)
}

fn check_identity(name: &str, stored: &Document, command: &str, identity: &Document) -> Result<()> {
    let version = stored.get_i32("v").unwrap_or(0);
    if version > VERSION {
        return Err(Error::refused(format!(
            "the job {name} was written by a newer version of mongorekey (layout {version}, known {VERSION})"
        ))
        .hint("run that version, or choose another name with --job"));
    }
    let mut differences = Vec::new();
    if stored.get_str("command").ok() != Some(command) {
        differences
            .push(format!("command: was {}, is {command}", stored.get_str("command").unwrap_or("unknown")));
    }
    let empty = Document::new();
    let old = stored.get_document("identity").unwrap_or(&empty);
    differences.extend(identity_differences(old, identity));
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::refused(format!("the job {name} exists and does something else: {}", differences.join("; ")))
        .hint("choose another name with --job, or change the config back"))
}

fn identity_differences(old: &Document, new: &Document) -> Vec<String> {
    let names = old.keys().chain(new.keys().filter(|key| !old.contains_key(*key)));
    names
        .filter(|name| old.get(*name) != new.get(*name))
        .map(|name| {
            let shown =
                |document: &Document| document.get(name).map_or("nothing".into(), ToString::to_string);
            format!("{name}: was {}, is {}", shown(old), shown(new))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_of_identity_are_shown() {
        let old = doc! {"targets": "a", "api": "x"};
        assert!(identity_differences(&old, &old).is_empty());
        let differences = identity_differences(&old, &doc! {"targets": "a", "api": "y"});
        assert_eq!(differences, ["api: was \"x\", is \"y\""]);
    }

    #[test]
    fn a_lease_of_a_living_neighbour_is_refused_at_once() {
        let current = Holder::current();
        let holder = bson::serialize_to_document(&current).expect("a document");
        let lease = doc! {"holder": holder, "renewed_at": 1};
        let stored = doc! {"lease_valid": true};
        let refusal = may_take("j", &lease, &stored, &current, &mut None).expect_err("refused");
        assert_eq!(refusal.class(), crate::error::Class::Refused);
    }

    #[test]
    fn a_lease_from_elsewhere_is_waited_for_and_refused_once_renewed() {
        let current = Holder::current();
        let elsewhere = Holder { boot_id: Some("other".into()), ..current.clone() };
        let holder = bson::serialize_to_document(&elsewhere).expect("a document");
        let stored = doc! {"lease_valid": true};
        let mut seen = None;
        let lease = doc! {"holder": holder.clone(), "renewed_at": 1};
        assert!(!may_take("j", &lease, &stored, &current, &mut seen).expect("waits"));
        assert!(!may_take("j", &lease, &stored, &current, &mut seen).expect("waits"));
        let renewed = doc! {"holder": holder, "renewed_at": 2};
        assert!(may_take("j", &renewed, &stored, &current, &mut seen).is_err());
        assert!(may_take("j", &lease, &doc! {"lease_valid": false}, &current, &mut None).expect("expired"));
    }
}
