//! Several workers on one job: who is alive, and who has which keys.
//!
//! Each worker looks at the job document with every renewal of its lease and
//! takes or gives away shares of the keys until they are even. Nobody commands:
//! a share is taken by an update that succeeds only where it still is free.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bson::{Bson, Document, doc};
use mongodb::Collection;
use mongodb::options::UpdateModifications;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::budget::Budget;
use super::ownership::{BUCKETS, Owner, Ownership, Step, next_step};
use super::store::{Job, Role, leaving, runner_name};
use crate::error::Result;
use crate::mongo::command::retrying;

/// The owner of a bucket whose keys are all done.
const DONE: &str = "*";
/// How often the state of a release is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// What this worker knows of the others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct News {
    /// Whether there is any news yet.
    pub is_known: bool,
    /// Whether others take part, so that calls go by the common timetable.
    pub shared: bool,
    /// Whether somebody holds the lease of the job.
    pub has_runner: bool,
    /// Whether every share is done.
    pub all_done: bool,
    /// Whether anybody else is alive.
    pub others: usize,
}

/// This worker's place among the others.
#[derive(Debug)]
pub struct Crew {
    /// Its share of the keys.
    pub ownership: Arc<Ownership>,
    news: watch::Receiver<News>,
    done: watch::Sender<bool>,
    ended: CancellationToken,
}

impl Crew {
    /// Takes a place in the crew of a job; `shares` is called before others may
    /// call the API, and must make this worker keep to the common timetable.
    pub fn start(job: &Job, shares: impl FnOnce(Budget) + Send + 'static) -> Self {
        // Who takes over a job that others work on gets his share from them.
        let is_shared = job.stored("shared").and_then(Bson::as_bool).unwrap_or(false);
        let ownership = Arc::new(Ownership::new(*job.role() == Role::Runner && !is_shared));
        let budget = Budget::new(job.collection().clone(), job.name());
        let (sender, news) = watch::channel(News::default());
        let (done, is_done) = watch::channel(false);
        let ended = CancellationToken::new();
        let trader = Trader {
            collection: job.collection().clone(),
            job: job.name().into(),
            us: job.member(),
            role: job.role().clone(),
            ownership: ownership.clone(),
            is_done,
            news: sender,
        };
        let (documents, until) = (job.lease().document(), ended.clone());
        let shares = (budget, shares);
        tokio::spawn(async move { until.run_until_cancelled(trader.run(documents, shares)).await });
        Self { ownership, news, done, ended }
    }

    /// What is known of the others.
    pub fn news(&self) -> watch::Receiver<News> {
        self.news.clone()
    }

    /// Tells the others whether this worker's share is done.
    pub fn set_done(&self, done: bool) {
        self.done.send_replace(done);
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.ended.cancel();
    }
}

struct Trader {
    collection: Collection<Document>,
    job: String,
    us: String,
    role: Role,
    ownership: Arc<Ownership>,
    is_done: watch::Receiver<bool>,
    news: watch::Sender<News>,
}

impl Trader {
    async fn run(
        mut self,
        mut documents: watch::Receiver<Document>,
        shares: (Budget, impl FnOnce(Budget) + Send),
    ) {
        let mut shares = Some(shares);
        loop {
            let document = documents.borrow_and_update().clone();
            if let Err(error) = self.look(&document, &mut shares).await {
                // The next renewal tries again; without any the lease is lost.
                tracing::warn!(%error, "the shares of the job could not be traded");
            }
            tokio::select! {
                changed = documents.changed() => if changed.is_err() { return },
                changed = self.is_done.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(LOOK), if self.ownership.is_giving() => {}
            }
        }
    }

    async fn look(
        &mut self,
        document: &Document,
        shares: &mut Option<(Budget, impl FnOnce(Budget) + Send)>,
    ) -> Result<()> {
        let living = living(document);
        self.bury_the_dead(document, &living).await?;
        let others = living.iter().filter(|name| **name != self.us).count();
        let has_runner = living.contains(&runner_name(document.get_i64("fence").unwrap_or(0)));
        let is_shared = document.get_bool("shared").unwrap_or(false);
        if !is_shared && (self.role != Role::Runner || others == 0) {
            self.news.send_replace(News { is_known: true, has_runner, others, ..News::default() });
            return Ok(());
        }
        if let Some((budget, keep_to)) = shares.take() {
            keep_to(budget);
        }
        if !is_shared {
            self.share().await?;
        }
        let owners = self.owners(document, &present(document));
        let all_done = owners.iter().all(|owner| *owner == Owner::Done);
        self.news.send_replace(News { is_known: true, shared: is_shared, has_runner, all_done, others });
        self.trade(&owners, active(document, &living)).await
    }

    /// Writes down that all keys are ours, so that others can ask for a share.
    async fn share(&self) -> Result<()> {
        let buckets: Document =
            (0..BUCKETS).map(|bucket| (bucket.to_string(), self.us.as_str().into())).collect();
        let filter = doc! {"_id": &self.job, "shared": {"$ne": true}, "fence": self.fence()};
        self.update(filter, doc! {"$set": {"shared": true, "buckets": buckets}}.into()).await.map(|_| ())
    }

    async fn trade(&self, owners: &[Owner], workers: usize) -> Result<()> {
        // Shares that came just now are not done, whatever was said before.
        let is_done = *self.is_done.borrow() && !self.ownership.has_gained();
        let released = self.ownership.released();
        if !released.is_empty() {
            return self.hand_over(&released, "").await;
        }
        if is_done {
            let ours = self.ownership.owned();
            if !ours.is_empty() {
                return self.hand_over(&ours, DONE).await;
            }
        }
        match next_step(owners, workers) {
            Step::Keep => Ok(()),
            Step::Claim(buckets) => self.claim(&buckets, owners).await,
            Step::Release(buckets) => {
                self.ownership.begin_release(&buckets);
                Ok(())
            }
        }
    }

    async fn claim(&self, buckets: &[usize], owners: &[Owner]) -> Result<()> {
        let mut filter = self.ours();
        let mut claims = Document::new();
        for bucket in buckets {
            if let Owner::Free(word) = &owners[*bucket] {
                filter.insert(format!("buckets.{bucket}"), word.as_str());
                claims.insert(format!("buckets.{bucket}"), self.us.as_str());
            }
        }
        // Somebody was faster with one of them: the next look shows what is left.
        if self.update(filter, doc! {"$set": claims}.into()).await? {
            self.ownership.gain(buckets);
        }
        Ok(())
    }

    async fn hand_over(&self, buckets: &[usize], to: &str) -> Result<()> {
        let fields: Document =
            buckets.iter().map(|bucket| (format!("buckets.{bucket}"), to.into())).collect();
        if self.update(self.ours(), doc! {"$set": fields}.into()).await? {
            self.ownership.lose(buckets);
        }
        Ok(())
    }

    /// Finds the job as long as our lease is good.
    fn ours(&self) -> Document {
        match &self.role {
            Role::Runner => doc! {"_id": &self.job, "fence": self.fence()},
            Role::Joined(worker) => doc! {"_id": &self.job, format!("workers.{worker}"): {"$exists": true}},
        }
    }

    fn fence(&self) -> i64 {
        self.us.trim_start_matches('r').parse().unwrap_or(-1)
    }

    async fn update(&self, filter: Document, update: UpdateModifications) -> Result<bool> {
        let result = retrying(format!("sharing the job {}", self.job), || {
            let update = self.collection.update_one(filter.clone(), update.clone());
            async move { update.await }
        })
        .await?;
        Ok(result.matched_count == 1)
    }

    /// Takes those off the job whose lease has run out. Only then their keys are
    /// anybody's: a process that was merely asleep finds its lease gone and
    /// stops. One that has renewed it meanwhile is left alone.
    async fn bury_the_dead(&self, document: &Document, living: &BTreeSet<String>) -> Result<()> {
        for (name, lease) in leases(document) {
            let Some(expired) = lease.get("expires_at").filter(|_| !living.contains(&name)) else { continue };
            if name == runner_name(document.get_i64("fence").unwrap_or(0)) {
                let fence = document.get_i64("fence").unwrap_or(0);
                let filter = doc! {"_id": &self.job, "fence": fence, "lease.expires_at": expired.clone()};
                // The next fence, so that the runner can't renew what it has lost.
                self.update(filter, doc! {"$inc": {"fence": 1_i64}, "$unset": {"lease": ""}}.into()).await?;
            } else {
                let filter = doc! {"_id": &self.job, format!("workers.{name}.expires_at"): expired.clone()};
                let totals = lease.get_document("totals").cloned().unwrap_or_default();
                self.update(filter, leaving(&name, &totals).into()).await?;
            }
        }
        Ok(())
    }

    fn owners(&self, document: &Document, present: &BTreeSet<String>) -> Vec<Owner> {
        let buckets = document.get_document("buckets").ok();
        (0..BUCKETS)
            .map(|bucket| {
                let owner = buckets.and_then(|buckets| buckets.get_str(bucket.to_string()).ok());
                match owner {
                    // What we know of our own share is newer than any document.
                    _ if self.ownership.owned().contains(&bucket) => Owner::Us,
                    Some(DONE) => Owner::Done,
                    Some(owner) if owner == self.us => Owner::Other,
                    Some(owner) if present.contains(owner) => Owner::Other,
                    other => Owner::Free(other.unwrap_or_default().into()),
                }
            })
            .collect()
    }
}

/// Everybody with a lease on a job, by name.
fn leases(document: &Document) -> Vec<(String, &Document)> {
    let runner = document.get_document("lease").ok().map(|lease| {
        let name = runner_name(document.get_i64("fence").unwrap_or(0));
        (name, lease)
    });
    let joined = document.get_document("workers").into_iter().flatten();
    let joined = joined.filter_map(|(name, worker)| Some((name.clone(), worker.as_document()?)));
    runner.into_iter().chain(joined).collect()
}

/// The workers on a job, those included whose lease has run out.
fn present(document: &Document) -> BTreeSet<String> {
    leases(document).into_iter().map(|(name, _)| name).collect()
}

/// The living workers of a job, by the clock of the server that the latest of
/// the leases shows.
fn living(document: &Document) -> BTreeSet<String> {
    let workers = leases(document);
    let time = |worker: &Document, name: &str| worker.get_datetime(name).ok().copied();
    let now = workers.iter().filter_map(|(_, worker)| time(worker, "renewed_at")).max();
    workers.into_iter().filter(|(_, worker)| time(worker, "expires_at") > now).map(|(name, _)| name).collect()
}

/// How many of the living have keys or may have some: not those whose share is
/// done.
fn active(document: &Document, living: &BTreeSet<String>) -> usize {
    let buckets = document.get_document("buckets").ok();
    let owners: BTreeSet<&str> =
        buckets.into_iter().flat_map(Document::values).filter_map(Bson::as_str).collect();
    let all_taken = !owners.iter().any(|owner| *owner != DONE && !living.contains(*owner));
    let has_done = owners.contains(DONE);
    let working = living.iter().filter(|name| owners.contains(name.as_str())).count();
    // While shares are done, who has none is one of those who did them.
    if has_done && all_taken { working.max(1) } else { living.len() }
}
