//! Transactions as of a moment of the past: whatever was done since to a document
//! that they write makes them fail, without anybody having to look.
//!
//! They are sent as commands, because the driver's own transactions can't be told
//! the moment. One conflicts with what its own session has committed since its
//! moment, too.

use bson::{Document, RawDocumentBuf, Timestamp, doc, rawdoc};
use mongodb::ClientSession;
use mongodb::error::{Error as DriverError, ErrorKind};

use super::command::Attempts;
use super::{Mongo, WRITE_TIMEOUT, majority_document};
use crate::error::{Context, Error, Result};

/// The server's codes for something newer (or an open transaction that may become it),
/// for a lock not had in time, for a moment that can't be read (any more), and for a
/// transaction that was given up in an election.
const GIVEN_UP: [i32; 5] = [112, 24, 239, 246, 251];

/// The transactions of one session, one after the other.
#[derive(Debug)]
pub struct Past {
    mongo: Mongo,
    database: String,
    session: ClientSession,
    number: i64,
    /// The moment of a transaction of which nothing was sent yet.
    begins_at: Option<Timestamp>,
}

impl Past {
    /// Transactions on a database. `mongo` must have sessions of its own
    /// ([`Mongo::apart`]): whoever got this one later would be refused for its numbers.
    ///
    /// # Errors
    /// The driver's error where no session can be had.
    pub async fn of(mongo: &Mongo, database: &str) -> mongodb::error::Result<Self> {
        // Causal consistency would ask for a later moment than the given one.
        let session = mongo.client().start_session().causal_consistency(false).await?;
        Ok(Self { mongo: mongo.clone(), database: database.into(), session, number: 0, begins_at: None })
    }

    /// The session, to be recorded before the first write.
    pub fn session(&self) -> Document {
        self.session.id().clone()
    }

    /// Begins a transaction as of a moment, which a majority must have.
    pub fn begin(&mut self, at: Timestamp) {
        self.number += 1;
        self.begins_at = Some(at);
    }

    /// Sends a command within the transaction.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide.
    pub async fn send(&mut self, mut command: RawDocumentBuf) -> mongodb::error::Result<Document> {
        if let Some(at) = self.begins_at.take() {
            command.append(bson::cstr!("startTransaction"), true);
            let concern = rawdoc! {"level": "snapshot", "atClusterTime": at};
            command.append(bson::cstr!("readConcern"), concern);
        }
        command.append(bson::cstr!("txnNumber"), self.number);
        command.append(bson::cstr!("autocommit"), false);
        let limit = i64::try_from(WRITE_TIMEOUT.as_millis()).unwrap_or(i64::MAX);
        command.append(bson::cstr!("maxTimeMS"), limit);
        let database = self.mongo.database(&self.database);
        database.run_raw_command(command).session(&mut self.session).await
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
