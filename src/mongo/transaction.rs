//! Transactions of one session, one after the other.
//!
//! They are sent as commands, because the driver's own can't be told the moment that they read,
//! and because a statement whose answer was lost is never sent again: the next transaction ends
//! the one before it.
//!
//! One as of a moment of the past fails where anything was done since to a document that it
//! writes, without anybody having to look; what its own session has committed since counts too.

use std::time::{SystemTime, UNIX_EPOCH};

use bson::{Document, RawDocumentBuf, Timestamp, doc, rawdoc};
use mongodb::ClientSession;
use mongodb::error::{Error as DriverError, ErrorKind};

use super::command::Attempts;
use super::exact;
use super::lane::Gate;
use super::{Mongo, WRITE_TIMEOUT, majority_document};
use crate::error::{Context, Error, Result};

/// The server's codes for something newer (or an open transaction that may become it),
/// for a lock not had in time, for a moment that can't be read (any more), and for a
/// transaction that was given up in an election.
const GIVEN_UP: [i32; 5] = [112, 24, 239, 246, 251];

/// The transactions of one session.
#[derive(Debug)]
pub struct Transactions {
    mongo: Mongo,
    session: ClientSession,
    number: i64,
    /// What the first statement says of a transaction of which nothing was sent yet.
    beginning: Option<RawDocumentBuf>,
    /// What each of them begins with: the server refuses it to whoever has lost the right.
    gate: Option<Gate>,
}

impl Transactions {
    /// A session of a connection that is used for nothing else ([`Mongo::apart`]): the
    /// driver hands sessions on, and whoever got this one would be refused for its numbers.
    ///
    /// # Errors
    /// The driver's error where no session can be had.
    pub async fn on(apart: &Mongo) -> mongodb::error::Result<Self> {
        // Causal consistency would ask for a later moment than the given one.
        let session = apart.client().start_session().causal_consistency(false).await?;
        // One that the driver hands on to us has numbers of an earlier moment.
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let number = i64::try_from(since_epoch.as_micros()).unwrap_or(0);
        Ok(Self { mongo: apart.clone(), session, number, beginning: None, gate: None })
    }

    /// Lets each of them begin with that.
    #[must_use]
    pub fn behind(self, gate: Gate) -> Self {
        Self { gate: Some(gate), ..self }
    }

    /// The session, to be recorded before the first write.
    pub fn session(&self) -> Document {
        self.session.id().clone()
    }

    /// The connection.
    pub fn mongo(&self) -> &Mongo {
        &self.mongo
    }

    /// Begins a transaction; ends the one before, should it be open still.
    pub fn begin(&mut self) {
        self.begin_with(rawdoc! {"startTransaction": true});
    }

    /// Begins one as of a moment, which a majority must have.
    pub fn begin_at(&mut self, moment: Timestamp) {
        let concern = rawdoc! {"level": "snapshot", "atClusterTime": moment};
        self.begin_with(rawdoc! {"startTransaction": true, "readConcern": concern});
    }

    fn begin_with(&mut self, beginning: RawDocumentBuf) {
        self.number += 1;
        self.beginning = Some(beginning);
    }

    /// Sends a command within the transaction; before the first one the gate.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide; [`super::lane::is_overtaken`] where the
    /// right is gone.
    pub async fn send(
        &mut self,
        database: &str,
        command: RawDocumentBuf,
    ) -> mongodb::error::Result<Document> {
        if let Some(gate) = self.gate.clone().filter(|_| self.beginning.is_some()) {
            let reply = self.statement(gate.database(), gate.statement()).await?;
            gate.judge(&reply)?;
        }
        self.statement(database, command).await
    }

    async fn statement(
        &mut self,
        database: &str,
        mut command: RawDocumentBuf,
    ) -> mongodb::error::Result<Document> {
        if let Some(beginning) = self.beginning.take() {
            for field in &beginning {
                let (name, value) = field.map_err(DriverError::custom)?;
                command.append(name, value);
            }
        }
        command.append(bson::cstr!("txnNumber"), self.number);
        command.append(bson::cstr!("autocommit"), false);
        let limit = i64::try_from(WRITE_TIMEOUT.as_millis()).unwrap_or(i64::MAX);
        command.append(bson::cstr!("maxTimeMS"), limit);
        let database = self.mongo.database(database);
        exact::answered(database.run_raw_command(command).session(&mut self.session).await)
    }

    /// Commits, again and again under the same number, so that the server tells what
    /// became of it. Returns when it was done, at the latest; `None` where it was not.
    ///
    /// # Errors
    /// A stop where that can't be found out.
    pub async fn commit(&mut self) -> Result<Option<Timestamp>> {
        let mut attempts = Attempts::default();
        let operation = "committing a transaction";
        loop {
            match self.commit_once().await {
                Ok(reply) => {
                    let at = reply.get_timestamp("operationTime");
                    return at.map(Some).map_err(|_| {
                        Error::stopped("the server does not tell when a transaction was committed")
                    });
                }
                Err(error) if is_given_up(&error) => return Ok(None),
                Err(error) if attempts.again(&operation, &error).await => {}
                Err(error) => return Err(error).during(operation),
            }
        }
    }

    /// Commits.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide.
    pub async fn commit_once(&mut self) -> mongodb::error::Result<Document> {
        self.end("commitTransaction").await
    }

    /// Gives the transaction up; most often the server has done that already.
    pub async fn abort(&mut self) {
        let _aborted = self.end("abortTransaction").await;
    }

    async fn end(&mut self, how: &str) -> mongodb::error::Result<Document> {
        let command = doc! {
            how: 1,
            "txnNumber": self.number,
            "autocommit": false,
            "writeConcern": majority_document(),
        };
        let reply = self.mongo.admin().run_command(command).session(&mut self.session).await?;
        super::sink::check_write_concern(&reply)?;
        Ok(reply)
    }
}

/// Whether a transaction came to nothing, so that it may be begun as of a later moment.
pub fn is_given_up(error: &DriverError) -> bool {
    matches!(error.kind.as_ref(), ErrorKind::Command(command) if is_given_up_code(command.code))
}

/// The same for a code.
pub fn is_given_up_code(code: i32) -> bool {
    GIVEN_UP.contains(&code)
}
