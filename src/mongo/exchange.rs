//! What a cutover asks of the server: names exchanged and writes held off.
//!
//! Nothing here is sent again by itself: whoever asks must know whether the
//! first attempt counts, and finds out by the identities of the collections.

use std::time::Duration;

use bson::{Bson, Document, Timestamp, doc};
use futures_util::TryStreamExt;
use mongodb::error::{Error as DriverError, ErrorKind};

use super::command::retrying;
use super::operation::Operation;
use super::sink::{check_write_concern, is_not_on_majority};
use super::ticket::Ticket;
use super::{Mongo, majority_document};
use crate::config::values::Namespace;
use crate::error::{Context, Result};

/// The server's code where a lock could not be had, or was not had in time.
const NOT_IN_TIME: [i32; 3] = [24, 46, 50];
/// The server's codes for a missing privilege and for what only itself may do.
const NOT_PERMITTED: [i32; 2] = [13, 371];
/// The server's code for a name that is taken.
const NAMESPACE_EXISTS: i32 = 48;
/// What needs a lock on everything must not wait for it, or everybody waits.
const SHORT: Duration = Duration::from_millis(50);
/// What the server reports where writes of users are blocked.
const BLOCKED: i64 = 2;

/// Before the name of the attempt, in the fences of earlier versions.
const FENCED_BY: &str = "mongorekey holds writes off for attempt ";
/// Who has made it, in the validator that is a fence.
const BY: &str = "mongorekey";

/// What decides which writes to a collection are refused.
#[derive(Debug, Clone, PartialEq)]
pub struct Validation {
    validator: Document,
    level: String,
    action: String,
}

impl Validation {
    /// Refuses every insert and update, for that attempt at an exchange: whoever looks at
    /// the collection sees whose fence it is, and all that it takes to lift it.
    pub fn refusing(attempt: &str, about: Document) -> Self {
        let comment = doc! {"by": BY, "attempt": attempt, "about": about};
        let validator = doc! {"$expr": false, "$comment": comment};
        Self { validator, level: "strict".into(), action: "error".into() }
    }

    /// Whether it refuses every insert and update.
    pub fn is_refusing(&self) -> bool {
        self.validator.get("$expr") == Some(&Bson::Boolean(false))
            && (self.level.as_str(), self.action.as_str()) == ("strict", "error")
    }

    /// Whether it is the fence of that attempt, or one that does not say whose it is.
    pub fn is_fence_of(&self, attempt: &str) -> bool {
        let earlier = self.validator.get_str("$comment").ok().and_then(|text| text.strip_prefix(FENCED_BY));
        let whose = self.comment().and_then(|comment| comment.get_str("attempt").ok()).or(earlier);
        self.is_refusing() && whose.is_none_or(|whose| whose == attempt)
    }

    /// What a fence of ours says about the exchange that it is for.
    pub fn about(&self) -> Option<&Document> {
        self.comment().filter(|_| self.is_refusing())?.get_document("about").ok()
    }

    fn comment(&self) -> Option<&Document> {
        let comment = self.validator.get_document("$comment").ok()?;
        (comment.get_str("by").ok() == Some(BY)).then_some(comment)
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

    /// The fences of ours that stand in a database, each by what it says.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn fences(&self, database: &str) -> Result<Vec<Document>> {
        let database = self.database(database);
        let list = doc! {"listCollections": 1, "filter": {"options.validator": {"$exists": true}}};
        let found: Vec<Document> = retrying("looking for collections that refuse writes", || {
            let cursor = database.run_cursor_command(list.clone());
            async move { cursor.await?.try_collect().await }
        })
        .await?;
        let about = |entry: &Document| Validation::of(entry.get_document("options").ok()?).about().cloned();
        Ok(found.iter().filter_map(about).collect())
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
        let fence = Validation::refusing("a1", doc! {"job": "j"});
        assert_eq!(fence.about(), Some(&doc! {"job": "j"}));
        let earlier = doc! {"validator": {"$expr": false, "$comment": format!("{FENCED_BY}a1")}};
        let earlier = Validation::of(&earlier);
        assert!(earlier.is_fence_of("a1") && !earlier.is_fence_of("a2") && earlier.about().is_none());
        assert!(fence.is_refusing() && fence.is_fence_of("a1") && !fence.is_fence_of("a2"));
        let nameless = Validation::of(&doc! {"validator": {"$expr": false}});
        assert!(nameless.is_fence_of("a1"), "as earlier versions made it");
        let warning = Validation::of(&doc! {"validator": {"$expr": false}, "validationAction": "warn"});
        assert!(!warning.is_refusing());
    }
}
