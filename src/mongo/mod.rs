//! The only door to the MongoDB driver.
//!
//! The layers above see collections in terms of this product (candidates,
//! guarded updates, ranges) and never a cursor, a session or a write concern.

pub mod ahead;
pub mod by_id;
pub mod catalog;
pub mod catch_up;
pub mod command;
pub mod door;
pub mod draw;
pub mod element;
pub mod exact;
pub mod exchange;
pub mod feed;
pub mod fill;
pub mod flags;
pub mod giving_way;
pub mod groups;
pub mod health;
pub mod identified;
pub mod index;
pub mod insertion;
pub mod keeping;
pub mod lane;
pub mod lanes;
pub mod name_history;
pub mod notes;
pub mod operation;
pub mod oplog;
pub mod others;
pub mod outlook;
pub mod preflight;
pub mod quarantine;
pub mod range;
pub mod renaming;
pub mod restore;
pub mod same_id;
pub mod scan;
pub mod sink;
pub mod source;
mod state;
pub mod ticket;
pub mod transaction;
pub mod valid;
pub mod watched;
pub mod yielding;

use std::time::Duration;

use bson::{Document, RawDocumentBuf, doc};
use mongodb::options::{ClientOptions, ReadConcern, WriteConcern};
use mongodb::{Client, Collection, Database};

use crate::config::values::{Namespace, Secret};
use crate::error::{Class, Context, Error, Result};

/// Waiting longer for a server at the start only delays the message.
const START_SELECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// A write that is not majority-durable within this time is sent again.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to a deployment, with the database of our own state.
#[derive(Debug, Clone)]
pub struct Mongo {
    client: Client,
    options: ClientOptions,
    state_database: String,
}

impl Mongo {
    /// Connects and makes sure that a primary answers.
    ///
    /// # Errors
    /// A usage error for a bad URI, a refusal where no server answers. Neither
    /// repeats the URI.
    pub async fn connect(uri: &Secret, state_database: &str) -> Result<Self> {
        let mut options = ClientOptions::parse(uri.expose()).await.map_err(|error| {
            Error::usage(format!("the MongoDB URI can't be used: {}", scrub(&error.to_string(), uri)))
        })?;
        options.app_name.get_or_insert_with(|| "mongorekey".into());
        options.server_selection_timeout.get_or_insert(START_SELECTION_TIMEOUT);
        // Counters, guards and "nothing left" are decided on what can't roll back.
        options.write_concern = Some(majority());
        options.read_concern = Some(ReadConcern::local());
        options.selection_criteria = None;
        let client = Client::with_options(options.clone()).map_err(|error| {
            Error::usage(format!("the MongoDB URI can't be used: {}", scrub(&error.to_string(), uri)))
        })?;
        let mongo = Self { client, options, state_database: state_database.into() };
        mongo.admin().run_command(doc! {"ping": 1}).await.during("connecting to MongoDB").map_err(
            |error| {
                error
                    .with_class(Class::Refused)
                    .hint("is the server running, and do host, port and credentials fit?")
            },
        )?;
        Ok(mongo)
    }

    /// The same deployment by connections and sessions of its own.
    ///
    /// # Errors
    /// A stop where the client can't be made.
    pub fn apart(&self) -> Result<Self> {
        let client = Client::with_options(self.options.clone()).during("connecting once more")?;
        Ok(Self { client, ..self.clone() })
    }

    /// The database of that name.
    pub fn database(&self, name: &str) -> Database {
        self.client.database(name)
    }

    /// The admin database.
    pub fn admin(&self) -> Database {
        self.client.database("admin")
    }

    /// A collection, read as raw documents.
    pub fn collection(&self, namespace: &Namespace) -> Collection<RawDocumentBuf> {
        self.database(&namespace.database).collection(&namespace.collection)
    }

    /// A collection of our own state.
    pub fn state<T: Send + Sync>(&self, name: &str) -> Collection<T> {
        self.database(&self.state_database).collection(name)
    }

    /// The database of our own state.
    pub(crate) fn state_database(&self) -> &str {
        &self.state_database
    }

    /// The driver's client, for sessions.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Closes every connection and cursor.
    pub async fn close(self) {
        self.client.shutdown().await;
    }

    /// The server's answer to `hello`: topology and its clock.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn hello(&self) -> Result<Document> {
        let admin = self.admin();
        command::retrying("asking the server for its topology", || {
            let hello = admin.run_command(doc! {"hello": 1});
            async move { hello.await }
        })
        .await
    }
}

/// Durable on a majority, so that no failover takes a write back.
fn majority() -> WriteConcern {
    WriteConcern::builder().w(mongodb::options::Acknowledgment::Majority).w_timeout(WRITE_TIMEOUT).build()
}

/// The same as a command field.
pub(crate) fn majority_document() -> Document {
    doc! {"w": "majority", "wtimeout": i64::try_from(WRITE_TIMEOUT.as_millis()).unwrap_or(i64::MAX)}
}

/// Takes the URI and its credentials out of a message of the driver.
fn scrub(message: &str, uri: &Secret) -> String {
    let mut scrubbed = message.replace(uri.expose(), "[uri]");
    let secrets = uri.credentials().into_iter().flat_map(|credentials| credentials.split(':'));
    for secret in secrets.filter(|secret| !secret.is_empty()) {
        scrubbed = scrubbed.replace(secret, "[secret]");
    }
    scrubbed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_scrubbed_from_messages() {
        let uri = Secret::new("mongodb://root:hunter2@h:1/?bad=1");
        let message = scrub("bad option in mongodb://root:hunter2@h:1/?bad=1 for hunter2", &uri);
        assert!(!message.contains("hunter2"), "{message}");
    }
}
