//! Writes that are made up for after a rename: as of its moment, so that anything that was
//! written to a document since makes them give way.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use bson::{Bson, Document, RawArrayBuf, RawBson, RawDocumentBuf, Timestamp, rawdoc};
use mongodb::error::{Error as DriverError, ErrorKind};

use super::Mongo;
use super::by_id::deletion;
use super::command::is_transient;
use super::index::whole_number;
use super::sink::{id_bytes, is_not_on_majority, value_bytes};
use super::state::insertion;
use super::transaction::{Transactions, is_given_up};
use crate::clock::Deadline;
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result};

/// The server's code for a document that something newer was written to.
const WRITE_CONFLICT: i32 = 112;
/// The server's code for a value that is in a unique index already.
const DUPLICATE_KEY: u64 = 11000;
/// The server's codes where it no longer knows a moment of the past, or not yet.
const NO_SNAPSHOT: [i32; 2] = [239, 246];
/// A server knows the moments of so long at least, unless it was told to forget
/// them sooner.
const SHORTEST_HISTORY: Duration = Duration::from_secs(60);
/// Attempts at a write, of those that conflict and of those that fail.
const ATTEMPTS: u32 = 5;
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(100);
/// Before a commit is sent again whose answer was lost.
const RECONNECTING: Duration = Duration::from_millis(20);
/// Documents per transaction.
const DOCUMENTS: usize = 500;

/// What became of one transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guarded {
    /// It was done, or there was nothing to do.
    Done,
    /// Something newer was there.
    GaveWay,
    /// The server no longer knows the moment, so that it can't tell.
    TooLate,
}

/// What became of many writes.
#[derive(Debug)]
pub struct Given<T> {
    /// How many were done.
    pub done: usize,
    /// Something newer is there.
    pub newer: Vec<T>,
    /// The server no longer knows the moment.
    pub too_late: Vec<T>,
    /// The deadline came first.
    pub left: Vec<T>,
}

impl<T> Default for Given<T> {
    fn default() -> Self {
        Self { done: 0, newer: Vec::new(), too_late: Vec::new(), left: Vec::new() }
    }
}

/// Writes of the moment right after a rename: where anything was written to the
/// document since, they do nothing.
#[derive(Debug)]
pub struct GivingWay {
    mongo: Mongo,
    namespace: Namespace,
    moment: Timestamp,
    /// A transaction of the past conflicts with what its session has done since, so
    /// each has a session of its own; kept, or the driver would hand it out again.
    sessions: Vec<Transactions>,
}

impl GivingWay {
    /// Writes to that collection as of `moment`, which must be in the past of a
    /// majority and at most minutes ago.
    ///
    /// # Errors
    /// A stop where no connection can be had.
    pub fn new(mongo: &Mongo, namespace: &Namespace, moment: Timestamp) -> Result<Self> {
        // Sessions that go back to the driver would be refused for their numbers.
        let mongo = mongo.apart()?;
        Ok(Self { mongo, namespace: namespace.clone(), moment, sessions: Vec::new() })
    }

    /// Deletes documents: many at once, fewer where something newer is among them. What is gone
    /// already counts as done.
    ///
    /// # Errors
    /// A stop where the server refuses for another reason than something newer.
    pub(crate) async fn delete(&mut self, ids: &[RawBson], deadline: Deadline) -> Result<Given<RawBson>> {
        let collection = self.namespace.collection.clone();
        let command = |part: &[RawBson]| Ok(deletion(&collection, part));
        let mut given = self.in_parts(ids, deadline, command, 1).await?;
        if !given.newer.is_empty() {
            // An earlier attempt may have deleted them, and the conflict is with that.
            let there = self.still_there(&given.newer).await?;
            given.done += given.newer.len() - there.len();
            let again = self.in_parts(&there, deadline, command, ATTEMPTS).await?;
            given.done += again.done;
            given.newer = again.newer;
            given.too_late.extend(again.too_late);
            given.left.extend(again.left);
        }
        Ok(given)
    }

    /// Inserts documents as they are, past the validator. One whose `_id` or unique value is there
    /// already counts as giving way.
    ///
    /// # Errors
    /// A stop where the server refuses for another reason than something newer.
    pub(crate) async fn insert(
        &mut self,
        documents: &[RawDocumentBuf],
        deadline: Deadline,
    ) -> Result<Given<RawDocumentBuf>> {
        let collection = self.namespace.collection.clone();
        self.in_parts(documents, deadline, |part| insertions(&collection, part), ATTEMPTS).await
    }

    async fn still_there(&self, ids: &[RawBson]) -> Result<Vec<RawBson>> {
        let found = self.mongo.existing_ids(&self.namespace, ids, id_bytes).await?;
        let found: HashSet<Vec<u8>> = found.into_iter().flatten().collect();
        let is_there = |id: &&RawBson| found.contains(&value_bytes(id.as_raw_bson_ref()));
        Ok(ids.iter().filter(is_there).cloned().collect())
    }

    /// Does something to each, in transactions that are halved where something is in the way, until
    /// what is in the way stands by itself.
    async fn in_parts<T: Clone>(
        &mut self,
        all: &[T],
        deadline: Deadline,
        command: impl Fn(&[T]) -> Result<RawDocumentBuf>,
        rounds: u32,
    ) -> Result<Given<T>> {
        let mut given = Given::default();
        let mut parts: VecDeque<Vec<T>> = all.chunks(DOCUMENTS).map(<[T]>::to_vec).collect();
        for round in 1..=rounds {
            while let Some(part) = parts.pop_front() {
                if deadline.has_passed() {
                    given.left.extend(part);
                    continue;
                }
                match self.attempt(&command(&part)?).await? {
                    Guarded::Done => given.done += part.len(),
                    Guarded::TooLate => given.too_late.extend(part),
                    // What is in the way is looked for by whoever asks for several rounds.
                    Guarded::GaveWay if part.len() > 1 && rounds > 1 => {
                        let (first, second) = part.split_at(part.len() / 2);
                        parts.push_front(second.to_vec());
                        parts.push_front(first.to_vec());
                    }
                    Guarded::GaveWay => given.newer.extend(part),
                }
            }
            if round == rounds || given.newer.is_empty() || deadline.has_passed() {
                break;
            }
            // What conflicts may be a transaction that is going to be aborted.
            tokio::time::sleep(PAUSE).await;
            parts = std::mem::take(&mut given.newer).into_iter().map(|one| vec![one]).collect();
        }
        Ok(given)
    }

    async fn attempt(&mut self, command: &RawDocumentBuf) -> Result<Guarded> {
        let operation = format!("writing to {} what came during the cutover", self.namespace);
        let mut failures = 0;
        loop {
            let error = match self.try_once(command).await {
                Ok(None) => return Ok(Guarded::Done),
                Ok(Some(refusal)) if is_duplicate(&refusal) => return Ok(Guarded::GaveWay),
                Ok(Some(refusal)) => return Err(Error::stopped(format!("{operation} failed: {refusal}"))),
                Err(error) => error,
            };
            if is_conflict(&error) {
                return Ok(Guarded::GaveWay);
            }
            if is_too_old(&error, self.moment) {
                return Ok(Guarded::TooLate);
            }
            if !is_transient(&error) || failures == ATTEMPTS {
                return Err(error).during(operation);
            }
            failures += 1;
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Returns what the server has against the statement, if anything.
    async fn try_once(&mut self, command: &RawDocumentBuf) -> mongodb::error::Result<Option<Bson>> {
        let mut transaction = Transactions::on(&self.mongo).await?;
        transaction.begin_at(self.moment);
        let reply = transaction.send(&self.namespace.database, command.clone()).await;
        let result = match reply.map(|reply| first_error(&reply)) {
            Ok(None) => commit(&mut transaction).await.map(|()| None),
            refused => {
                transaction.abort().await;
                refused
            }
        };
        self.sessions.push(transaction);
        result
    }
}

fn insertions(collection: &str, documents: &[RawDocumentBuf]) -> Result<RawDocumentBuf> {
    let mut updates = RawArrayBuf::new();
    for document in documents {
        updates.push(insertion(document)?);
    }
    let mut command = rawdoc! {"update": collection};
    command.append(bson::cstr!("updates"), updates);
    command.append(bson::cstr!("bypassDocumentValidation"), true);
    Ok(command)
}

/// Commits, and again under the same number where the answer was lost: a new transaction
/// would conflict with what this one has done.
async fn commit(transaction: &mut Transactions) -> mongodb::error::Result<()> {
    let mut failures = 0;
    loop {
        match transaction.commit_once().await {
            // It was done; what comes next waits for a majority anyway.
            Err(error) if is_not_on_majority(&error) => return Ok(()),
            Err(error) if is_transient(&error) && !is_given_up(&error) && failures < ATTEMPTS => {
                failures += 1;
                tokio::time::sleep(RECONNECTING).await;
            }
            result => return result.map(drop),
        }
    }
}

fn first_error(reply: &Document) -> Option<Bson> {
    reply.get_array("writeErrors").ok().and_then(|errors| errors.first()).cloned()
}

/// Whether a unique value stands in another document, which is newer or older; it
/// is there.
fn is_duplicate(refusal: &Bson) -> bool {
    let code = refusal.as_document().and_then(|refusal| refusal.get("code"));
    code.and_then(whole_number) == Some(DUPLICATE_KEY)
}

/// Whether the server no longer has what was at that moment.
fn is_too_old(error: &DriverError, moment: Timestamp) -> bool {
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    let is_long_ago = now.saturating_sub(u64::from(moment.time)) >= SHORTEST_HISTORY.as_secs();
    is_long_ago
        && matches!(error.kind.as_ref(), ErrorKind::Command(command) if NO_SNAPSHOT.contains(&command.code))
}

fn is_conflict(error: &DriverError) -> bool {
    matches!(error.kind.as_ref(), ErrorKind::Command(command) if command.code == WRITE_CONFLICT)
}
