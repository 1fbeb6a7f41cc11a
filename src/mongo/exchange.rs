//! What a cutover asks of the server: names exchanged, writes held off, and
//! writes that give way to anything newer.
//!
//! Nothing here is sent again by itself: whoever asks must know whether the
//! first attempt counts, and finds out by the identities of the collections.

use std::collections::HashSet;
use std::time::Duration;

use bson::{Bson, Document, RawBson, RawDocumentBuf, Timestamp, doc};
use mongodb::error::{Error as DriverError, ErrorKind};

use super::by_id::deletion;
use super::command::{is_transient, retrying};
use super::operation::Operation;
use super::sink::{check_write_concern, id_bytes, is_not_on_majority, value_bytes};
use super::state::write_states;
use super::ticket::Ticket;
use super::transaction::{Transactions, is_given_up};
use super::{Mongo, majority_document};
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result};
use futures_util::TryStreamExt;

/// The server's code where a lock could not be had, or was not had in time.
const NOT_IN_TIME: [i32; 3] = [24, 46, 50];
/// The server's codes for a missing privilege and for what only itself may do.
const NOT_PERMITTED: [i32; 2] = [13, 371];
/// The server's code for a name that is taken.
const NAMESPACE_EXISTS: i32 = 48;
/// The server's code for a document that something newer was written to.
const WRITE_CONFLICT: i32 = 112;
/// What needs a lock on everything must not wait for it, or everybody waits.
const SHORT: Duration = Duration::from_millis(50);
/// Attempts at a write, of those that conflict and of those that fail.
const ATTEMPTS: u32 = 5;
/// The server's code for a value that is in a unique index already.
const DUPLICATE_KEY: u64 = 11000;
/// The server's codes where it no longer knows a moment of the past, or not yet.
const NO_SNAPSHOT: [i32; 2] = [239, 246];
/// A server knows the moments of so long at least, unless it was told to forget
/// them sooner.
const SHORTEST_HISTORY: Duration = Duration::from_secs(60);
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(100);
/// Before a commit is sent again whose answer was lost.
const RECONNECTING: Duration = Duration::from_millis(20);
/// Deletes per transaction.
const DELETES: usize = 500;
/// What the server reports where writes of users are blocked.
const BLOCKED: i64 = 2;

/// Before the name of the attempt, in the validator that is a fence.
const FENCED_BY: &str = "mongorekey holds writes off for attempt ";

/// What decides which writes to a collection are refused.
#[derive(Debug, Clone, PartialEq)]
pub struct Validation {
    validator: Document,
    level: String,
    action: String,
}

impl Validation {
    /// Refuses every insert and update, for that attempt at an exchange: whoever looks at
    /// the collection sees whose fence it is.
    pub fn refusing(attempt: &str) -> Self {
        let validator = doc! {"$expr": false, "$comment": format!("{FENCED_BY}{attempt}")};
        Self { validator, level: "strict".into(), action: "error".into() }
    }

    /// Whether it refuses every insert and update.
    pub fn is_refusing(&self) -> bool {
        self.validator.get("$expr") == Some(&Bson::Boolean(false))
            && (self.level.as_str(), self.action.as_str()) == ("strict", "error")
    }

    /// Whether it is the fence of that attempt, or one that does not say whose it is.
    pub fn is_fence_of(&self, attempt: &str) -> bool {
        let whose = self.validator.get_str("$comment").ok().and_then(|text| text.strip_prefix(FENCED_BY));
        self.is_refusing() && whose.is_none_or(|whose| whose == attempt)
    }

    /// As a collection with these options has it.
    pub fn of(options: &Document) -> Self {
        let text = |name: &str, default: &str| options.get_str(name).unwrap_or(default).to_owned();
        Self {
            validator: options.get_document("validator").cloned().unwrap_or_default(),
            level: text("validationLevel", "strict"),
            action: text("validationAction", "error"),
        }
    }

    /// As it is stored.
    pub fn to_document(&self) -> Document {
        // As text: a validator may hold what no stored field name may.
        let validator = Bson::Document(self.validator.clone()).into_canonical_extjson().to_string();
        doc! {"validator": validator, "validationLevel": &self.level, "validationAction": &self.action}
    }

    /// Reads what [`Validation::to_document`] made.
    pub fn from_document(document: &Document) -> Option<Self> {
        let parsed: serde_json::Value = serde_json::from_str(document.get_str("validator").ok()?).ok()?;
        let validator = Bson::try_from(parsed).ok()?.as_document()?.clone();
        let level = document.get_str("validationLevel").ok()?.to_owned();
        let action = document.get_str("validationAction").ok()?.to_owned();
        Some(Self { validator, level, action })
    }

    fn fields(&self) -> Document {
        doc! {
            "validator": self.validator.clone(),
            "validationLevel": &self.level,
            "validationAction": &self.action,
        }
    }
}

/// Why the server did not do what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// Somebody holds the collection, such as an open transaction.
    NotInTime,
    /// It was done, but a majority did not have it in time.
    NotOnMajority,
    /// This user may not.
    NotPermitted,
    /// The name is taken.
    NameTaken,
    /// Anything else; whether it was done must be looked at.
    Other,
}

impl Obstacle {
    /// What stood in the way, by the server's code.
    pub fn of(error: &DriverError) -> Self {
        match error.kind.as_ref() {
            ErrorKind::Command(command) if NOT_IN_TIME.contains(&command.code) => Self::NotInTime,
            ErrorKind::Command(command) if NOT_PERMITTED.contains(&command.code) => Self::NotPermitted,
            ErrorKind::Command(command) if command.code == NAMESPACE_EXISTS => Self::NameTaken,
            _ if is_not_on_majority(error) => Self::NotOnMajority,
            _ => Self::Other,
        }
    }
}

/// What became of a write that gives way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guarded {
    /// It was done, or there was nothing to do.
    Done,
    /// Something newer was there.
    GaveWay,
    /// The server no longer knows the moment, so that it can't tell.
    TooLate,
}

impl Mongo {
    /// Sets what decides which writes are refused, of the collection with that
    /// identity only; returns the moment from which it holds.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide.
    pub async fn set_validation(
        &self,
        namespace: &Namespace,
        uuid: &Bson,
        validation: &Validation,
        limit: Duration,
    ) -> mongodb::error::Result<Option<Timestamp>> {
        let mut command = doc! {"collMod": &namespace.collection, "collectionUUID": uuid.clone()};
        command.extend(validation.fields());
        command.insert("maxTimeMS", milliseconds(limit));
        command.insert("writeConcern", majority_document());
        let reply = self.database(&namespace.database).run_command(command).await?;
        // What a failover may take back does not hold.
        check_write_concern(&reply)?;
        Ok(reply.get_timestamp("operationTime").ok())
    }

    /// Blocks or lets through the writes of all users of the deployment who may
    /// not bypass that; returns the moment from which it holds.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide.
    pub async fn block_writes(&self, on: bool) -> mongodb::error::Result<Option<Timestamp>> {
        let command = doc! {"setUserWriteBlockMode": 1, "global": on};
        let reply = self.admin().run_command(command).await?;
        Ok(reply.get_timestamp("operationTime").ok())
    }

    /// Whether writes of users are blocked now.
    ///
    /// # Errors
    /// A stop where this user may not see it.
    pub async fn are_writes_blocked(&self) -> Result<bool> {
        let status = doc! {"serverStatus": 1};
        let status = self.admin().run_command(status).await.during("looking whether writes are blocked")?;
        let mode = status.get_document("repl").ok().and_then(|repl| repl.get("userWriteBlockMode"));
        Ok(mode.and_then(super::index::whole_number) == u64::try_from(BLOCKED).ok())
    }

    /// Whether this user may block writes and goes on writing meanwhile.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn may_bypass_write_block(&self) -> Result<bool> {
        let command = doc! {"connectionStatus": 1, "showPrivileges": true};
        let status =
            self.admin().run_command(command).await.during("asking for the privileges of this user")?;
        let privileges = status
            .get_document("authInfo")
            .and_then(|info| info.get_array("authenticatedUserPrivileges"))
            .map(Vec::as_slice)
            .unwrap_or_default();
        let may = |action: &str| {
            privileges.iter().filter_map(Bson::as_document).any(|privilege| {
                let actions = privilege.get_array("actions").map(Vec::as_slice).unwrap_or_default();
                actions.iter().any(
                    |known| matches!(known.as_str(), Some(name) if name == action || name == "anyAction"),
                )
            })
        };
        Ok(may("setUserWriteBlockMode") && may("bypassWriteBlockingMode"))
    }

    /// Gives the collection with that identity another name, in the place of the
    /// collection with the identity `replacing`, which is dropped.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide.
    pub async fn rename(
        &self,
        operation: &mut Operation,
        from: &Namespace,
        uuid: &Bson,
        to: &Namespace,
        replacing: Option<&Bson>,
        limit: Duration,
    ) -> mongodb::error::Result<()> {
        let command = doc! {
            "renameCollection": from.to_string(),
            "to": to.to_string(),
            "dropTarget": replacing.cloned().unwrap_or(Bson::Boolean(false)),
            "collectionUUID": uuid.clone(),
            "maxTimeMS": milliseconds(limit),
            "writeConcern": majority_document(),
        };
        let reply = self.admin().run_command(command).session(operation.session()).await?;
        check_write_concern(&reply)
    }

    /// Gives several collections other names, one after the other under one lock, unless
    /// the ticket was taken.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide.
    pub async fn rename_together(
        &self,
        operation: &mut Operation,
        renames: &[(&Namespace, &Namespace)],
        ticket: &Ticket,
        limit: Duration,
    ) -> mongodb::error::Result<()> {
        let entries = ticket.around(rename_entries(renames));
        check_write_concern(&self.apply_ops(operation, entries, limit).await?)
    }

    async fn apply_ops(
        &self,
        operation: &mut Operation,
        entries: Vec<Document>,
        limit: Duration,
    ) -> mongodb::error::Result<Document> {
        let command = doc! {
            "applyOps": entries,
            "maxTimeMS": milliseconds(limit),
            "writeConcern": majority_document(),
        };
        self.admin().run_command(command).session(operation.session()).await
    }

    /// Whether this user may rename several collections under one lock. Tried on
    /// collections that do not exist.
    ///
    /// # Errors
    /// A stop where that can't be found out.
    pub async fn may_rename_together(&self, database: &str) -> Result<bool> {
        let absent = |number: u8| Namespace {
            database: database.to_owned(),
            collection: format!("mongorekey_absent_{number}"),
        };
        let mut operation = self.operation().await?;
        match self.apply_ops(&mut operation, rename_entries(&[(&absent(1), &absent(2))]), SHORT).await {
            // Nothing was written, so no majority has to have it.
            Ok(_) => Ok(true),
            // It was permitted, and waited for the lock.
            Err(error) if Obstacle::of(&error) == Obstacle::NotInTime => Ok(true),
            // Refused by a router, or for want of a privilege.
            Err(error) if matches!(error.kind.as_ref(), ErrorKind::Command(_)) => {
                let is_absent =
                    matches!(error.kind.as_ref(), ErrorKind::Command(command) if command.code == 26);
                Ok(is_absent)
            }
            Err(error) => Err(error).during("trying whether collections can be renamed together"),
        }
    }

    /// The name of the collection with that identity; `None` where there is none.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn name_of(&self, database: &str, uuid: &Bson) -> Result<Option<Namespace>> {
        let filter = doc! {"info.uuid": uuid.clone()};
        let collections = self.database(database);
        let found: Vec<_> = retrying(format!("looking for a collection of {database}"), || {
            let list = collections.list_collections().filter(filter.clone());
            async move { list.await?.try_collect().await }
        })
        .await?;
        let name = |found: &mongodb::results::CollectionSpecification| Namespace {
            database: database.to_owned(),
            collection: found.name.clone(),
        };
        Ok(found.first().map(name))
    }

    /// The identity of whatever bears a name.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn bearer(&self, namespace: &Namespace) -> Result<Option<Bson>> {
        Ok(self.describe(namespace).await?.and_then(|description| description.uuid))
    }
}

fn rename_entries(renames: &[(&Namespace, &Namespace)]) -> Vec<Document> {
    let entry = |(from, to): &(&Namespace, &Namespace)| {
        doc! {
            "op": "c",
            "ns": format!("{}.$cmd", from.database),
            "o": {"renameCollection": from.to_string(), "to": to.to_string()},
        }
    };
    renames.iter().map(entry).collect()
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

    /// Deletes documents: all at once, or one by one where something newer is there.
    /// Returns those of which it is too late to tell whether something is.
    ///
    /// # Errors
    /// A stop where the server refuses for another reason than something newer.
    pub async fn delete(&mut self, ids: &[RawBson]) -> Result<Vec<RawBson>> {
        let mut left = Vec::new();
        for part in ids.chunks(DELETES) {
            match self.attempt(&[deletion(&self.namespace.collection, part)], 1).await? {
                Guarded::Done => {}
                Guarded::TooLate => left.extend_from_slice(part),
                Guarded::GaveWay => {
                    // What is gone already needs no attempts that the application waits for.
                    for id in &self.still_there(part).await? {
                        let one = deletion(&self.namespace.collection, std::slice::from_ref(id));
                        if self.attempt(&[one], ATTEMPTS).await? == Guarded::TooLate {
                            left.push(id.clone());
                        }
                    }
                }
            }
        }
        Ok(left)
    }

    async fn still_there(&self, ids: &[RawBson]) -> Result<Vec<RawBson>> {
        let found = self.mongo.existing_ids(&self.namespace, ids, id_bytes).await?;
        let found: HashSet<Vec<u8>> = found.into_iter().flatten().collect();
        let is_there = |id: &&RawBson| found.contains(&value_bytes(id.as_raw_bson_ref()));
        Ok(ids.iter().filter(is_there).cloned().collect())
    }

    /// Writes a document as it is.
    ///
    /// # Errors
    /// A stop where the server refuses for another reason than something newer.
    pub async fn write(&mut self, document: &bson::RawDocument) -> Result<Guarded> {
        // Removed first: an `_id` may be equal to another one without being the same.
        let document = [document.to_owned()];
        let mut commands = write_states(&self.namespace.collection, &document, |_| true)?;
        if let Some(command) = commands.last_mut() {
            command.append(bson::cstr!("bypassDocumentValidation"), true);
        }
        self.attempt(&commands, ATTEMPTS).await
    }

    async fn attempt(&mut self, commands: &[RawDocumentBuf], most: u32) -> Result<Guarded> {
        let operation = format!("writing to {} what came during the cutover", self.namespace);
        let (mut conflicts, mut failures) = (0, 0);
        loop {
            let error = match self.try_once(commands).await {
                Ok(None) => return Ok(Guarded::Done),
                Ok(Some(refusal)) if is_duplicate(&refusal) => return Ok(Guarded::GaveWay),
                Ok(Some(refusal)) => return Err(Error::stopped(format!("{operation} failed: {refusal}"))),
                Err(error) => error,
            };
            if is_conflict(&error) {
                conflicts += 1;
            } else if is_transient(&error) && failures < ATTEMPTS {
                failures += 1;
            } else if is_too_old(&error, self.moment) {
                return Ok(Guarded::TooLate);
            } else {
                return Err(error).during(operation);
            }
            if conflicts == most {
                return Ok(Guarded::GaveWay);
            }
            // What conflicts may be a transaction that is going to be aborted.
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Returns what the server has against the statement, if anything.
    async fn try_once(&mut self, commands: &[RawDocumentBuf]) -> mongodb::error::Result<Option<Bson>> {
        let mut transaction = Transactions::on(&self.mongo).await?;
        transaction.begin_at(self.moment);
        let mut result = Ok(None);
        for command in commands {
            let reply = transaction.send(&self.namespace.database, command.clone()).await;
            result = reply.map(|reply| first_error(&reply));
            if !matches!(result, Ok(None)) {
                break;
            }
        }
        let result = match result {
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
    code.and_then(super::index::whole_number) == Some(DUPLICATE_KEY)
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

fn milliseconds(duration: Duration) -> i64 {
    // The server takes 0 for no limit.
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_stored_is_what_is_restored() {
        let options = doc! {"validator": {"$jsonSchema": {"required": ["a"]}}, "validationLevel": "moderate", "uuid": 1};
        let validation = Validation::of(&options);
        assert_eq!(Validation::from_document(&validation.to_document()), Some(validation));
        let none = Validation::of(&doc! {});
        assert_eq!(
            none.fields(),
            doc! {"validator": {}, "validationLevel": "strict", "validationAction": "error"}
        );
        assert!(!none.is_refusing());
    }

    #[test]
    fn a_fence_says_whose_it_is() {
        let fence = Validation::refusing("a1");
        assert!(fence.is_refusing() && fence.is_fence_of("a1") && !fence.is_fence_of("a2"));
        let nameless = Validation::of(&doc! {"validator": {"$expr": false}});
        assert!(nameless.is_fence_of("a1"), "as earlier versions made it");
        let warning = Validation::of(&doc! {"validator": {"$expr": false}, "validationAction": "warn"});
        assert!(!warning.is_refusing());
    }
}
