//! Writes that can't arrive late: on one session with rising transaction
//! numbers, of which the server executes each once and none that is lower than
//! one it has seen.

use std::time::{SystemTime, UNIX_EPOCH};

use bson::{Document, RawDocumentBuf};
use mongodb::{ClientSession, Database};

use super::command::Attempts;
use super::sink::check_write_concern;
use super::{Mongo, WRITE_TIMEOUT, majority_document};
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result};

/// A session for writes.
#[derive(Debug)]
pub struct NumberedWrites {
    mongo: Mongo,
    session: ClientSession,
    number: i64,
}

impl NumberedWrites {
    /// A session of a connection that is used for nothing else
    /// ([`Mongo::apart`]): the driver hands sessions on, and whoever got one of
    /// these would be refused for its numbers.
    ///
    /// # Errors
    /// A stop where no session can be had.
    pub async fn on(apart: &Mongo) -> Result<Self> {
        let session = apart.client().start_session().await.during("starting a session")?;
        // One that the driver hands on to us has numbers of an earlier moment.
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let number = i64::try_from(since_epoch.as_micros()).unwrap_or(0);
        Ok(Self { mongo: apart.clone(), session, number })
    }

    /// The connection.
    pub fn mongo(&self) -> &Mongo {
        &self.mongo
    }

    /// The session, to be recorded before the first write: whoever comes next
    /// ends what still runs on it.
    pub fn session(&self) -> Document {
        self.session.id().clone()
    }

    /// Sends a write until it is durable on a majority; it is executed once.
    ///
    /// # Errors
    /// A stop where the server refuses the command as a whole.
    pub async fn send(&mut self, namespace: &Namespace, mut command: RawDocumentBuf) -> Result<Document> {
        self.number += 1;
        command.append(bson::cstr!("txnNumber"), self.number);
        command
            .append(bson::cstr!("maxTimeMS"), i64::try_from(WRITE_TIMEOUT.as_millis()).unwrap_or(i64::MAX));
        let concern = RawDocumentBuf::try_from(&majority_document())
            .map_err(|error| Error::stopped(format!("a command could not be encoded: {error}")))?;
        command.append(bson::cstr!("writeConcern"), concern);
        let database = self.mongo.database(&namespace.database);
        let (operation, mut attempts) = (format!("writing to {namespace}"), Attempts::default());
        loop {
            match run(&database, &command, &mut self.session).await {
                Err(error) if attempts.again(&operation, &error).await => {}
                result => return result.during(&operation),
            }
        }
    }
}

async fn run(
    database: &Database,
    command: &RawDocumentBuf,
    session: &mut ClientSession,
) -> mongodb::error::Result<Document> {
    let reply = database.run_raw_command(command.clone()).session(session).await?;
    check_write_concern(&reply)?;
    Ok(reply)
}
