//! The lanes of a job: opened by its holder, closed to him by whoever takes over.
//!
//! The epoch of a lane is the job's `fence`. A lane is opened by one transaction that
//! changes the job *if it has that fence*, so that none comes into being behind the
//! back of whoever has raised the others. The job keeps the session of each: an open
//! transaction of a former holder would hold the raising up.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bson::{Bson, Document, RawDocumentBuf, doc};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::lease::{LeaseWatch, lost};
use super::store;
use crate::error::{Context, Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::{Attempts, is_transient};
use crate::mongo::index::whole_number;
use crate::mongo::lane::{Gate, Lane};
use crate::mongo::sink::check_write_concern;
use crate::mongo::transaction::Transactions;

/// In the state database: `{_id: {job, since, name}, epoch, transactions}`, `since` being
/// when the job was created: a job of the same name that comes later has other lanes.
pub const COLLECTION: &str = "lanes";
/// The field of the job with the session of each lane.
const SESSIONS: &str = "lane_sessions";
/// The field of the job with the sessions of all lanes so far, the newest last.
const ALL_SESSIONS: &str = "writing_sessions";
/// So many of them are kept: events of older ones are taken for those of others.
const MOST_SESSIONS: i32 = 1_000;
/// The server gives a transaction up after a minute, whoever holds it.
const LONGEST_RAISE: Duration = Duration::from_secs(75);
/// One attempt: a transaction that is in the way has to be ended again.
const RAISE_MILLISECONDS: i64 = 1_000;
/// A transaction that was ended in the middle of a statement is gone within this time.
const PAUSE: Duration = Duration::from_millis(20);
/// The server's code for something that took longer than it was given.
const TOO_LONG: i32 = 50;

/// What lets somebody write on the strength of a job: shown to the server with every write.
#[derive(Debug, Clone)]
pub struct Right {
    mongo: Mongo,
    job: Bson,
    since: Bson,
    epoch: i64,
    lease: LeaseWatch,
}

impl Right {
    pub(super) fn of(mongo: &Mongo, job: &Document, lease: &LeaseWatch) -> Self {
        Self {
            mongo: mongo.clone(),
            job: job.get("_id").cloned().unwrap_or(Bson::Null),
            since: job.get("created_at").cloned().unwrap_or(Bson::Null),
            epoch: epoch(job),
            lease: lease.clone(),
        }
    }

    /// Opens the lane of that name, by a connection of its own. Its session is stored before anything
    /// is written on it.
    ///
    /// # Errors
    /// A stop where the job is somebody else's by now, or the server does not do as asked.
    pub async fn lane(&self, name: &str) -> Result<Lane> {
        let operation = format!("opening the lane {name}");
        let mut transactions = Transactions::on(&self.mongo.apart()?).await.during("starting a session")?;
        let session = transactions.session();
        let mut attempts = Attempts::default();
        loop {
            self.lease.valid().await?;
            match self.open(&mut transactions, name, &session).await {
                Ok(true) => {
                    let gate = Gate::new(self.mongo.state_database(), COLLECTION, self.id(name)?, self.epoch);
                    return Ok(Lane::new(transactions.behind(gate), &self.lease));
                }
                Ok(false) => return Err(lost(self.lease.job())),
                Err(error) if is_transient(&error) && attempts.again(&operation, &error).await => {}
                Err(error) => return Err(error).during(operation),
            }
        }
    }

    /// False where the job has another holder.
    async fn open(
        &self,
        transactions: &mut Transactions,
        name: &str,
        session: &Document,
    ) -> mongodb::error::Result<bool> {
        let encode =
            |document: &Document| RawDocumentBuf::try_from(document).map_err(mongodb::error::Error::custom);
        let job = doc! {
            "q": {"_id": &self.job, "fence": self.epoch},
            "u": {
                "$set": {format!("{SESSIONS}.{name}"): session},
                "$push": {ALL_SESSIONS: {"$each": [session], "$slice": -MOST_SESSIONS}},
            },
        };
        let lane = doc! {
            "q": {"_id": self.lane_id(name), "epoch": {"$lte": self.epoch}},
            "u": {"$set": {"epoch": self.epoch}},
            "upsert": true,
        };
        transactions.begin();
        for (collection, update) in [(store::COLLECTION, job), (COLLECTION, lane)] {
            let command = encode(&doc! {"update": collection, "updates": [update]})?;
            let reply = transactions.send(self.mongo.state_database(), command).await?;
            if reply.get("n").and_then(whole_number) != Some(1) {
                transactions.abort().await;
                return Ok(false);
            }
        }
        transactions.commit_once().await.map(|_| true)
    }

    fn lane_id(&self, name: &str) -> Document {
        doc! {"job": &self.job, "since": &self.since, "name": name}
    }

    fn id(&self, name: &str) -> Result<RawDocumentBuf> {
        RawDocumentBuf::try_from(&self.lane_id(name))
            .map_err(|error| Error::stopped(format!("the name of a lane could not be encoded: {error}")))
    }
}

/// Closes the lanes of a job to its former holders: when this returns, nothing that they have begun or
/// will send can be carried out. What they have committed before is there to be read. Wants the job
/// as it is with the new fence.
///
/// # Errors
/// A stop where a transaction of a former holder does not end.
pub(super) async fn raise(mongo: &Mongo, job: &Document, lease: &LeaseWatch) -> Result<()> {
    let sessions = sessions(job);
    let command = raising(job);
    let (begun, mut attempts) = (Instant::now(), Attempts::default());
    loop {
        lease.valid().await?;
        mongo.end_operations(&sessions).await?;
        match raise_once(mongo, &command).await {
            Ok(()) => return Ok(()),
            Err(error) if is_too_long(&error) && begun.elapsed() < LONGEST_RAISE => {
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) if !is_too_long(&error) && attempts.again(&"raising the lanes", &error).await => {}
            Err(error) => {
                return Err(error).during("ending what a former holder of the job has begun");
            }
        }
    }
}

async fn raise_once(mongo: &Mongo, command: &Document) -> mongodb::error::Result<()> {
    let reply = mongo.database(mongo.state_database()).run_command(command.clone()).await?;
    // What an election takes back would open the lanes again.
    check_write_concern(&reply)?;
    match reply.get_array("writeErrors") {
        Ok(errors) => Err(mongodb::error::Error::custom(format!("{errors:?}"))),
        Err(_) => Ok(()),
    }
}

/// Ends what is open on the lanes of a job, for who does not take it over: an open transaction holds
/// up whatever changes the names of a collection.
///
/// # Errors
/// A stop where that can't be made sure.
pub async fn end_transactions(mongo: &Mongo, job: &str) -> Result<()> {
    if let Some(job) = store::find(mongo, job).await? {
        mongo.end_operations(&sessions(&job)).await?;
    }
    Ok(())
}

fn sessions(job: &Document) -> Vec<Document> {
    let sessions = job.get_document(SESSIONS).into_iter().flat_map(Document::values);
    sessions.filter_map(|session| session.as_document().cloned()).collect()
}

/// The sessions of all that was ever written on the strength of a job, by which its events are
/// told from those of others.
pub fn all_sessions(job: &Document) -> Vec<Document> {
    let stored = job.get_array(ALL_SESSIONS).map(Vec::as_slice).unwrap_or_default();
    stored.iter().filter_map(|session| session.as_document().cloned()).collect()
}

/// Only upwards: nobody gives a former holder his right back by coming late. Pure.
fn raising(job: &Document) -> Document {
    let of_job = doc! {
        "_id.job": job.get("_id").cloned(),
        "_id.since": job.get("created_at").cloned(),
        "epoch": {"$lt": epoch(job)},
    };
    doc! {
        "update": COLLECTION,
        "updates": [{"q": of_job, "u": {"$set": {"epoch": epoch(job)}}, "multi": true}],
        "maxTimeMS": RAISE_MILLISECONDS,
        "writeConcern": crate::mongo::majority_document(),
    }
}

fn epoch(job: &Document) -> i64 {
    job.get_i64("fence").unwrap_or(0)
}

fn is_too_long(error: &mongodb::error::Error) -> bool {
    matches!(error.kind.as_ref(), mongodb::error::ErrorKind::Command(command) if command.code == TOO_LONG)
}

/// Lanes for tasks that come and go: as many as are in use at once.
#[derive(Debug)]
pub struct Pool {
    right: Right,
    name: &'static str,
    idle: Mutex<Vec<Lane>>,
    opened: AtomicUsize,
}

impl Pool {
    /// None yet; they will be called `name` and a number.
    pub fn new(right: Right, name: &'static str) -> Self {
        Self { right, name, idle: Mutex::new(Vec::new()), opened: AtomicUsize::new(0) }
    }

    /// One that nobody uses.
    ///
    /// # Errors
    /// As [`Right::lane`].
    pub async fn take(&self) -> Result<Lane> {
        if let Some(lane) = self.idle.lock().await.pop() {
            return Ok(lane);
        }
        let number = self.opened.fetch_add(1, Ordering::Relaxed);
        self.right.lane(&format!("{}_{number}", self.name)).await
    }

    /// Gives it back.
    pub async fn put_back(&self, lane: Lane) {
        self.idle.lock().await.push(lane);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_raised_and_never_lowered() {
        let job = doc! {"_id": "j", "fence": 8_i64, "created_at": 1};
        let command = raising(&job);
        let update = command.get_array("updates").expect("updates").first().expect("one");
        let update = update.as_document().expect("a document");
        let of_job = doc! {"_id.job": "j", "_id.since": 1, "epoch": {"$lt": 8_i64}};
        assert_eq!(update.get_document("q").expect("a filter"), &of_job);
        assert_eq!(update.get_document("u").expect("a change"), &doc! {"$set": {"epoch": 8_i64}});
    }
}
