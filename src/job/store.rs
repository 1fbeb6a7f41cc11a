//! The job document: what is kept of a job, and how its holder writes it.

use bson::{Bson, DateTime, Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;
use mongodb::options::UpdateModifications;
use mongodb::results::UpdateResult;

use super::elsewhere::failing;
use super::holder::Holder;
use super::lanes::Right;
use super::lease::{Lease, LeaseWatch, Renewal};
use crate::error::{Class, Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;

/// The collection of jobs in the state database.
pub(super) const COLLECTION: &str = "jobs";

/// How a run of a job ended, or that it has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobState {
    /// A process works on it, or died doing so.
    Running,
    /// Everything is done.
    Completed,
    /// The run ended, but some documents failed.
    Incomplete,
    /// A signal ended the run.
    Interrupted,
    /// A fatal condition ended the run.
    Stopped,
}

impl JobState {
    /// How a run ended that ended with this error.
    pub fn of_failure(error: &Error) -> Self {
        match error.class() {
            Class::Interrupted(_) => Self::Interrupted,
            _ => Self::Stopped,
        }
    }

    /// The word that is stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Interrupted => "interrupted",
            Self::Stopped => "stopped",
        }
    }
}

/// What a worker is to its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Holds the lease of the job and keeps its document.
    Runner,
    /// Joined a runner, under this name.
    Joined(String),
}

/// A job that this process runs, or takes part in.
#[derive(Debug)]
pub struct Job {
    name: String,
    role: Role,
    fence: i64,
    /// The document as it was when the job was started.
    document: Document,
    /// Whether another process held the lease until now, so that calls of its
    /// may have left a moment ago.
    taken_over: bool,
    /// Whether nothing is run, so that the last run stays what it was.
    is_borrowed: bool,
    collection: Collection<Document>,
    lease: Lease,
}

/// All job documents, newest first, or the one named.
///
/// # Errors
/// A stop where they can't be read.
pub async fn list(mongo: &Mongo, name: Option<&str>) -> Result<Vec<Document>> {
    let collection: Collection<Document> = mongo.state(COLLECTION);
    let filter = name.map_or_else(Document::new, |name| doc! {"_id": name});
    let pipeline = vec![
        doc! {"$match": filter},
        doc! {"$set": {"lease_valid": {"$gt": ["$lease.expires_at", "$$NOW"]}, "now": "$$NOW"}},
        doc! {"$sort": {"updated_at": -1, "_id": 1}},
    ];
    retrying("reading the jobs", || {
        let cursor = collection.aggregate(pipeline.clone());
        async move { cursor.await?.try_collect().await }
    })
    .await
}

/// The job document of that name.
///
/// # Errors
/// A stop where it can't be read.
pub async fn find(mongo: &Mongo, name: &str) -> Result<Option<Document>> {
    Ok(list(mongo, Some(name)).await?.into_iter().next())
}

/// Sets fields of a job, whoever holds it, where it meets a condition.
///
/// # Errors
/// A stop where the job can't be written.
pub async fn amend(mongo: &Mongo, name: &str, mut condition: Document, fields: Document) -> Result<()> {
    let collection: Collection<Document> = mongo.state(COLLECTION);
    condition.insert("_id", name);
    let update = doc! {"$set": fields};
    retrying(format!("amending the job {name}"), || {
        let update = collection.update_one(condition.clone(), update.clone());
        async move { update.await }
    })
    .await
    .map(|_| ())
}

/// Whether a job of that name meets a condition.
///
/// # Errors
/// A stop where the jobs can't be read.
pub async fn exists(mongo: &Mongo, name: &str, mut condition: Document) -> Result<bool> {
    let collection: Collection<Document> = mongo.state(COLLECTION);
    condition.insert("_id", name);
    let found = retrying(format!("reading the job {name}"), || {
        let find = collection.find_one(condition.clone());
        async move { find.await }
    })
    .await?;
    Ok(found.is_some())
}

impl Job {
    /// A job whose lease was just taken, from then on renewed.
    pub(super) fn held(
        document: Document,
        name: &str,
        collection: Collection<Document>,
        role: Role,
        taken_over: bool,
    ) -> Self {
        let fence = document.get_i64("fence").unwrap_or(0);
        let path = match &role {
            Role::Runner => "lease".into(),
            Role::Joined(worker) => format!("workers.{worker}"),
        };
        let mut filter = filter(name, fence, &role);
        // A renewal that is late must not bring a lease back that was given up.
        filter.insert(format!("{path}.holder"), doc! {"$exists": true});
        let renewal = Renewal { collection: collection.clone(), filter, path };
        let lease = Lease::keep(renewal, name.into(), document.clone());
        Self { name: name.into(), role, fence, document, taken_over, is_borrowed: false, collection, lease }
    }

    pub(super) fn borrowed(self, is_borrowed: bool) -> Self {
        Self { is_borrowed, ..self }
    }

    /// What this worker is to the job.
    pub fn role(&self) -> &Role {
        &self.role
    }

    /// Under which name this worker owns its share of the keys.
    pub fn member(&self) -> String {
        match &self.role {
            Role::Runner => runner_name(self.fence),
            Role::Joined(worker) => worker.clone(),
        }
    }

    /// The number of this run; all who work on it have the same.
    pub fn run(&self) -> i64 {
        self.fence
    }

    /// Asks all who work on this run to stop, because one of them can't go on.
    ///
    /// # Errors
    /// A stop where the document can't be written.
    pub async fn stop_everybody(&self) -> Result<()> {
        self.update(vec![doc! {"$set": {"control.stop": "$fence"}}].into()).await
    }

    /// What lets others write on the strength of this job, to be shown to the server.
    pub fn right(&self, mongo: &Mongo) -> Right {
        Right::of(mongo, &self.document, self.lease())
    }

    /// The collection of jobs.
    pub(super) fn collection(&self) -> &Collection<Document> {
        &self.collection
    }

    /// Name of the job.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The lease, to see whether it is lost.
    pub fn lease(&self) -> &LeaseWatch {
        self.lease.watch()
    }

    /// Whether the lease came from a process that did not give it back.
    pub fn was_taken_over(&self) -> bool {
        self.taken_over
    }

    /// A field as it was stored when the job was started.
    pub fn stored(&self, field: &str) -> Option<&Bson> {
        self.document.get(field)
    }

    /// The document as it was when the job was started.
    pub fn document(&self) -> &Document {
        &self.document
    }

    /// Lets fields that were just stored count as stored.
    pub(super) fn remember(&mut self, fields: Document) {
        self.document.extend(fields);
    }

    /// Stores fields; only while the lease is ours. Those of a joined worker
    /// stand under its name.
    ///
    /// # Errors
    /// A stop where the lease is lost or the document can't be written.
    pub async fn save(&self, mut fields: Document) -> Result<()> {
        self.lease.watch().valid().await?;
        if !self.is_borrowed {
            fields.insert("updated_at", DateTime::now());
        }
        if let Role::Joined(worker) = &self.role {
            fields =
                fields.into_iter().map(|(name, value)| (format!("workers.{worker}.{name}"), value)).collect();
        }
        self.update(doc! {"$set": fields}.into()).await
    }

    /// Stores fields where the job also meets a condition; returns whether it did.
    ///
    /// # Errors
    /// A stop where the lease is lost or the document can't be written.
    pub async fn save_where(&self, condition: Document, mut fields: Document) -> Result<bool> {
        self.lease.watch().valid().await?;
        fields.insert("updated_at", DateTime::now());
        let mut filter = filter(&self.name, self.fence, &self.role);
        filter.extend(condition);
        let result = self.update_one(filter, doc! {"$set": fields}.into()).await?;
        Ok(result.matched_count > 0)
    }

    /// Removes the job itself.
    ///
    /// # Errors
    /// A stop where the lease is lost or the document can't be removed.
    pub async fn remove(self) -> Result<()> {
        self.lease.watch().valid().await?;
        let filter = filter(&self.name, self.fence, &self.role);
        // Sent twice it finds nothing, which is no loss of the lease.
        retrying(format!("removing the job {}", self.name), || {
            let delete = self.collection.delete_one(filter.clone());
            async move { delete.await }
        })
        .await?;
        self.lease.release();
        Ok(())
    }

    /// Stores the end of this run and gives the lease back. `totals` of a
    /// joined worker are what it has done, and are added to the job's.
    ///
    /// # Errors
    /// A stop where the lease is lost or the document can't be written.
    pub async fn finish(self, state: JobState, mut fields: Document) -> Result<()> {
        match &self.role {
            Role::Runner => {
                fields.insert("state", state.as_str());
                fields.insert("updated_at", DateTime::now());
                self.update(doc! {"$set": fields, "$unset": {"lease": ""}}.into()).await?;
            }
            Role::Joined(worker) => {
                let totals = fields.get_document("totals").cloned().unwrap_or_default();
                let mut stages = leaving(worker, &totals);
                if state == JobState::Incomplete {
                    // Of one that was ended before, others try all of its share again.
                    stages.extend(failing(fields.get_document("documents").ok()));
                }
                self.update(stages.into()).await?;
                self.close_after_the_runner(state).await?;
            }
        }
        self.add_failures_of_others().await?;
        self.lease.release();
        Ok(())
    }

    /// Gives the lease of a borrowed job back, with fields that others keep in it.
    ///
    /// # Errors
    /// A stop where the lease is lost or the document can't be written.
    pub async fn give_back(self, fields: Document) -> Result<()> {
        let mut update = doc! {"$unset": {"lease": ""}};
        if !fields.is_empty() {
            update.insert("$set", fields);
        }
        self.update(update.into()).await?;
        self.lease.release();
        Ok(())
    }

    /// The last one to leave says how the job ended where its runner can't.
    async fn close_after_the_runner(&self, state: JobState) -> Result<()> {
        let filter = doc! {
            "_id": &self.name,
            "lease": {"$exists": false},
            "workers": {},
            "state": JobState::Running.as_str(),
        };
        let update = doc! {"$set": {"state": state.as_str(), "updated_at": DateTime::now()}};
        retrying(format!("saving the job {}", self.name), || {
            let update = self.collection.update_one(filter.clone(), update.clone());
            async move { update.await }
        })
        .await
        .map(|_| ())
    }

    async fn update(&self, update: UpdateModifications) -> Result<()> {
        let result = self.update_one(filter(&self.name, self.fence, &self.role), update).await?;
        if result.matched_count == 0 {
            return Err(super::lease::lost(&self.name));
        }
        Ok(())
    }

    async fn update_one(&self, filter: Document, update: UpdateModifications) -> Result<UpdateResult> {
        retrying(format!("saving the job {}", self.name), || {
            let update = self.collection.update_one(filter.clone(), update.clone());
            async move { update.await }
        })
        .await
    }
}

/// Finds the job as long as the worker has not lost its lease.
fn filter(name: &str, fence: i64, role: &Role) -> Document {
    match role {
        Role::Runner => doc! {"_id": name, "fence": fence},
        Role::Joined(worker) => doc! {"_id": name, format!("workers.{worker}"): {"$exists": true}},
    }
}

/// The name under which the runner of that fence owns keys.
pub(super) fn runner_name(fence: i64) -> String {
    format!("r{fence}")
}

/// Removes a joined worker and adds what it has done to the job.
pub(super) fn leaving(worker: &str, totals: &Document) -> Vec<Document> {
    let sums: Document = totals
        .iter()
        .map(|(name, value)| {
            let path = format!("joined_totals.{name}");
            let before = doc! {"$ifNull": [format!("${path}"), 0_i64]};
            (path, doc! {"$add": [before, value.clone()]}.into())
        })
        .collect();
    let mut stages = vec![doc! {"$unset": format!("workers.{worker}")}];
    if !sums.is_empty() {
        stages.insert(0, doc! {"$set": sums});
    }
    stages
}

/// Whether a living process holds the job or takes part in it, as far as its
/// leases tell. Wants a document of [`list`].
pub fn is_running(job: &Document) -> bool {
    let observer = Holder::current();
    let is_gone = |lease: &Document| holder_of(lease).is_some_and(|holder| holder.is_gone(&observer));
    let runner = job.get_bool("lease_valid").unwrap_or(false)
        && job.get_document("lease").is_ok_and(|lease| !is_gone(lease));
    let now = job.get_datetime("now").ok();
    let joined = job.get_document("workers").into_iter().flat_map(Document::values).any(|worker| {
        worker.as_document().is_some_and(|worker| {
            worker.get_datetime("expires_at").ok() > now && now.is_some() && !is_gone(worker)
        })
    });
    runner || joined
}

/// Whether somebody runs a job that calls that API now.
pub fn calls(job: &Document, api: &str) -> bool {
    let identity = job.get_document("identity");
    is_running(job) && identity.is_ok_and(|identity| identity.get_str("api").is_ok_and(|known| known == api))
}

/// Who holds a lease, as far as it can be read.
pub fn holder_of(lease: &Document) -> Option<Holder> {
    let holder = lease.get_document("holder").ok()?;
    bson::deserialize_from_document(holder.clone()).ok()
}
