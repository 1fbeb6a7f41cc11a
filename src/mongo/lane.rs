//! The right to write documents, in a form that the server compares.
//!
//! A lane has a document that bears the epoch of its holder, and every batch of writes is a
//! transaction that begins with a change of that document *if it bears the holder's epoch*. Whoever
//! takes over raises the epoch of all lanes first. From then on the server refuses whatever the
//! former holder sends, however late it arrives: its transaction begins with an upsert that is a
//! duplicate, and comes to nothing. What was committed before the raising is seen by whoever
//! reads after it.

use std::ops::Range;

use bson::{Bson, Document, RawDocumentBuf, Timestamp, doc, rawdoc};
use mongodb::error::Error as DriverError;

use super::command::{Attempts, is_transient_code};
use super::index::whole_number;
use super::transaction::{Transactions, is_given_up};
use super::{Mongo, command};
use crate::config::values::Namespace;
use crate::crash;
use crate::error::{Context, Error, Result};
use crate::job::lease::{LeaseWatch, lost};

/// The server's code for a duplicate key.
const DUPLICATE_KEY: u64 = 11000;
/// Statements of the next command after one of a command was refused.
const FEW: usize = 8;

/// What a transaction of a lane begins with.
#[derive(Debug, Clone)]
pub struct Gate {
    database: String,
    collection: &'static str,
    id: RawDocumentBuf,
    epoch: i64,
}

impl Gate {
    /// The document of a lane, and the epoch that it must bear.
    pub fn new(database: &str, collection: &'static str, id: RawDocumentBuf, epoch: i64) -> Self {
        Self { database: database.into(), collection, id, epoch }
    }

    pub(super) fn database(&self) -> &str {
        &self.database
    }

    /// Where the document bears another epoch it is not found, and its `_id` can't be inserted.
    pub(super) fn statement(&self) -> RawDocumentBuf {
        let change = rawdoc! {
            "q": {"_id": self.id.clone(), "epoch": self.epoch},
            "u": {"$inc": {"transactions": 1_i64}},
            "upsert": true,
        };
        rawdoc! {"update": self.collection, "updates": [change]}
    }

    /// Where the lane's document was inserted, somebody has removed it: nothing proves the right.
    pub(super) fn judge(&self, reply: &Document) -> mongodb::error::Result<()> {
        let error = errors(reply).next().map(|(_, error)| error);
        let is_refused = error.as_ref().is_some_and(|error| code(error) == DUPLICATE_KEY);
        if is_refused || reply.contains_key("upserted") {
            return Err(DriverError::custom(Overtaken));
        }
        error.map_or(Ok(()), |error| Err(DriverError::custom(message(&error).to_owned())))
    }
}

/// The holder of a lane is not its holder any more.
#[derive(Debug, Clone, Copy)]
struct Overtaken;

impl std::fmt::Display for Overtaken {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("another process has taken the job over")
    }
}

/// Whether the server has refused a transaction because somebody else has the right to write by now.
pub fn is_overtaken(error: &DriverError) -> bool {
    error.get_custom::<Overtaken>().is_some()
}

/// Writes of one holder, one batch after the other.
#[derive(Debug)]
pub struct Lane {
    transactions: Transactions,
    lease: LeaseWatch,
}

/// The first statement that the server has refused; the whole transaction came to nothing.
#[derive(Debug)]
pub struct Refused {
    /// Which of the commands.
    pub command: usize,
    /// Which of its statements.
    pub statement: usize,
    /// The server's write error.
    pub error: Document,
}

impl Refused {
    /// The server's code.
    pub fn code(&self) -> u64 {
        code(&self.error)
    }

    /// The server's words.
    pub fn message(&self) -> &str {
        message(&self.error)
    }
}

/// How an attempt ended that the server has not refused for good.
enum Ended {
    Done,
    Refused(Refused),
}

impl Lane {
    /// Writes by transactions behind a gate, and none unless the lease is held.
    pub fn new(transactions: Transactions, lease: &LeaseWatch) -> Self {
        Self { transactions, lease: lease.clone() }
    }

    /// The connection.
    pub fn mongo(&self) -> &Mongo {
        self.transactions.mongo()
    }

    /// The session of the writes, by which their events are told from those of others.
    pub fn session(&self) -> Document {
        self.transactions.session()
    }

    /// Begins a transaction as of a moment, which a majority must have.
    ///
    /// # Errors
    /// A stop where somebody else has the right to write by now.
    pub(super) async fn begin_at(&mut self, moment: Timestamp) -> Result<()> {
        self.lease.valid().await?;
        self.transactions.begin_at(moment);
        Ok(())
    }

    /// Sends a command within the transaction; the driver's error is for the caller to decide.
    ///
    /// # Errors
    /// A stop where somebody else has the right to write by now.
    pub(super) async fn send(
        &mut self,
        database: &str,
        command: RawDocumentBuf,
    ) -> Result<mongodb::error::Result<Document>> {
        match self.transactions.send(database, command).await {
            Err(error) if is_overtaken(&error) => {
                self.transactions.abort().await;
                Err(lost(self.lease.job()))
            }
            result => Ok(result),
        }
    }

    /// Commits; returns when it was done, at the latest, and `None` where it was not.
    ///
    /// # Errors
    /// A stop where that can't be found out.
    pub(super) async fn commit(&mut self) -> Result<Option<Timestamp>> {
        self.lease.valid().await?;
        self.transactions.commit().await
    }

    /// Gives the transaction up.
    pub(super) async fn abort(&mut self) {
        self.transactions.abort().await;
    }

    /// Carries out these commands, all of them or none, until that is durable on a majority; tells
    /// the statement because of which it was none. `operation` says what is done, for errors.
    ///
    /// # Errors
    /// A stop where somebody else has the right to write by now, or the server refuses a
    /// command as a whole.
    pub async fn write(
        &mut self,
        operation: &str,
        database: &str,
        commands: &[RawDocumentBuf],
    ) -> Result<Option<Refused>> {
        self.repeat(operation, database, commands, false).await
    }

    /// The same, but does nothing where the first of them finds no document.
    ///
    /// # Errors
    /// As [`Lane::write`].
    pub async fn write_if_first(
        &mut self,
        operation: &str,
        database: &str,
        commands: &[RawDocumentBuf],
    ) -> Result<Option<Refused>> {
        self.repeat(operation, database, commands, true).await
    }

    async fn repeat(
        &mut self,
        operation: &str,
        database: &str,
        commands: &[RawDocumentBuf],
        if_first: bool,
    ) -> Result<Option<Refused>> {
        let mut attempts = Attempts::default();
        loop {
            self.lease.valid().await?;
            self.transactions.begin();
            match self.attempt(database, commands, if_first).await {
                Ok(Ended::Refused(refused)) if is_passing(&refused) => {
                    self.transactions.abort().await;
                    let error = DriverError::from(std::io::Error::other(refused.message().to_owned()));
                    if !attempts.again(&operation, &error).await {
                        return Ok(Some(refused));
                    }
                }
                Ok(Ended::Refused(refused)) => {
                    self.transactions.abort().await;
                    return Ok(Some(refused));
                }
                Ok(Ended::Done) => return Ok(None),
                Err(error) if is_overtaken(&error) => {
                    self.transactions.abort().await;
                    return Err(lost(self.lease.job()));
                }
                Err(error) if may_pass(&error) && attempts.again(&operation, &error).await => {}
                Err(error) => {
                    self.transactions.abort().await;
                    return Err(error).during(operation);
                }
            }
        }
    }

    async fn attempt(
        &mut self,
        database: &str,
        commands: &[RawDocumentBuf],
        if_first: bool,
    ) -> mongodb::error::Result<Ended> {
        for (index, command) in commands.iter().enumerate() {
            self.is_held()?;
            crash::point("lane_lease_seen");
            let reply = self.transactions.send(database, command.clone()).await?;
            if let Some((statement, error)) = errors(&reply).next() {
                return Ok(Ended::Refused(Refused { command: index, statement, error }));
            }
            if if_first && index == 0 && reply.get("n").and_then(whole_number) == Some(0) {
                self.transactions.abort().await;
                return Ok(Ended::Done);
            }
            crash::point("lane_statement");
        }
        self.is_held()?;
        crash::point("lane_committing");
        self.commit_all().await?;
        crash::point("lane_committed");
        Ok(Ended::Done)
    }

    /// Commits, again and again under the same number: the server does it once. Whoever has taken over
    /// has waited for it or prevented it, so that this needs no lease.
    async fn commit_all(&mut self) -> mongodb::error::Result<()> {
        let mut attempts = Attempts::default();
        loop {
            match self.transactions.commit_once().await {
                Err(error) if !is_given_up(&error) && attempts.again(&"committing", &error).await => {}
                result => return result.map(drop),
            }
        }
    }

    fn is_held(&self) -> mongodb::error::Result<()> {
        if self.lease.is_valid() {
            Ok(())
        } else {
            Err(std::io::Error::other("the lease has run out").into())
        }
    }

    /// Deletes all documents of a collection that meet a condition.
    ///
    /// # Errors
    /// As [`Lane::write`].
    pub async fn delete_all(
        &mut self,
        operation: &str,
        namespace: &Namespace,
        condition: &Document,
    ) -> Result<Option<Refused>> {
        let command = doc! {
            "delete": &namespace.collection,
            "deletes": [{"q": condition, "limit": 0}],
        };
        let command = RawDocumentBuf::try_from(&command)
            .map_err(|error| Error::stopped(format!("{operation} failed: {error}")))?;
        self.write(operation, &namespace.database, &[command]).await
    }

    /// Carries out a command for all of these items but for those that the server refuses; tells
    /// which and why.
    ///
    /// # Errors
    /// As [`Lane::write`].
    pub async fn write_each<T>(
        &mut self,
        namespace: &Namespace,
        items: &[T],
        command: impl Fn(&[T]) -> Result<RawDocumentBuf>,
    ) -> Result<Vec<(usize, Document)>> {
        let operation = format!("writing to {namespace}");
        let (mut parts, mut refusals) = (Parts::of(items.len()), Vec::new());
        while let Some(part) = parts.next() {
            let commands = [command(items.get(part.clone()).unwrap_or_default())?];
            match self.write(&operation, &namespace.database, &commands).await? {
                None => parts.done(),
                Some(refused) => {
                    parts.refused(refused.statement);
                    refusals.push((part.start + refused.statement, refused.error));
                }
            }
        }
        Ok(refusals)
    }
}

/// Parts of a list that are tried one after the other, where one refused item brings a whole part to
/// nothing: what is before that item is tried again, then what is behind it, in small parts at first.
#[derive(Debug)]
pub(super) struct Parts {
    start: usize,
    all: usize,
    most: usize,
    /// An item that is left out, and ends the part before it.
    out: Option<usize>,
}

impl Parts {
    pub(super) fn of(all: usize) -> Self {
        Self { start: 0, all, most: usize::MAX, out: None }
    }

    /// The items to try next.
    pub(super) fn next(&self) -> Option<Range<usize>> {
        let end = self.out.unwrap_or(self.all).min(self.start.saturating_add(self.most));
        (self.start < end).then_some(self.start..end)
    }

    /// The last part is done.
    pub(super) fn done(&mut self) {
        self.start = self.next().map_or(self.start, |part| part.end);
        self.most = self.most.saturating_mul(4);
        self.pass();
    }

    /// Nothing of the last part is done because of that item of it, which is left out.
    pub(super) fn refused(&mut self, item: usize) {
        self.out = Some(self.start + item);
        self.most = FEW;
        self.pass();
    }

    fn pass(&mut self) {
        if self.out == Some(self.start) {
            self.start += 1;
            self.out = None;
        }
    }
}

/// The errors of single statements, by their place in the command.
pub(super) fn errors(reply: &Document) -> impl Iterator<Item = (usize, Document)> {
    let errors = reply.get_array("writeErrors").map(Vec::as_slice).unwrap_or_default();
    let index = |error: &Document| error.get("index").and_then(whole_number);
    errors
        .iter()
        .filter_map(Bson::as_document)
        .map(move |error| (index(error).and_then(|at| usize::try_from(at).ok()).unwrap_or(0), error.clone()))
}

fn code(error: &Document) -> u64 {
    error.get("code").and_then(whole_number).unwrap_or(0)
}

fn message(error: &Document) -> &str {
    error.get_str("errmsg").unwrap_or("no reason given")
}

fn is_passing(refused: &Refused) -> bool {
    i32::try_from(refused.code()).is_ok_and(is_transient_code)
}

/// Whether the same transaction may succeed when it is begun again: 251 is one that an election,
/// or whoever looked for a dead process, has given up.
fn may_pass(error: &DriverError) -> bool {
    is_given_up(error) || command::is_transient(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_refused_item_leaves_the_others() {
        let mut parts = Parts::of(10);
        assert_eq!(parts.next(), Some(0..10));
        parts.refused(4);
        assert_eq!(parts.next(), Some(0..4));
        parts.done();
        assert_eq!(parts.next(), Some(5..10));
        parts.refused(0);
        assert_eq!(parts.next(), Some(6..10));
        parts.refused(3);
        assert_eq!(parts.next(), Some(6..9));
        parts.done();
        assert_eq!(parts.next(), None);
        assert_eq!(Parts::of(0).next(), None);
    }

    #[test]
    fn where_all_are_refused_parts_stay_small() {
        let (mut parts, mut tried) = (Parts::of(1_000), 0);
        while let Some(part) = parts.next() {
            tried += part.len();
            parts.refused(0);
        }
        assert!(tried <= 1_000 + 1_000 * FEW, "{tried}");
        let (mut parts, mut rounds) = (Parts::of(100_000), 0);
        parts.refused(0);
        while parts.next().is_some() {
            rounds += 1;
            parts.done();
        }
        assert!(rounds < 10, "{rounds}");
    }

    #[test]
    fn a_lane_whose_epoch_is_another_one_is_overtaken() {
        let gate = Gate::new("state", "lanes", rawdoc! {"job": "a"}, 7);
        let judged = |reply: Document| gate.judge(&reply);
        assert!(judged(doc! {"n": 1, "nModified": 1}).is_ok());
        let error = doc! {"index": 0, "code": 11000, "errmsg": "E11000"};
        assert!(is_overtaken(&judged(doc! {"n": 0, "writeErrors": [error]}).expect_err("refused")));
        let upserted = doc! {"n": 1, "upserted": [{"index": 0, "_id": 1}]};
        assert!(is_overtaken(&judged(upserted).expect_err("nobody has made it")));
        let other = doc! {"index": 0, "code": 121, "errmsg": "invalid"};
        assert!(!is_overtaken(&judged(doc! {"writeErrors": [other]}).expect_err("refused")));
    }
}
