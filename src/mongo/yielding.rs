//! Writes that yield: to a collection that others write to, as of a moment up to
//! which one knows what the others have written. Where anything newer is there,
//! nothing is written.
//!
//! Each write is a transaction that reads as of that moment, so that the server
//! finds out by itself. All of them are on one session, by which their events are
//! told from those of others; a transaction of the past conflicts with what its
//! session has done since, so the moment must not be before the last commit.

use std::time::Duration;

use bson::{Document, RawArrayBuf, RawBson, RawDocumentBuf, Timestamp, doc, rawdoc};
use mongodb::ClientSession;
use mongodb::error::{Error as DriverError, ErrorKind};
use tokio::time::Instant;

use super::catch_up::statement;
use super::command::is_transient;
use super::index::whole_number;
use super::{Mongo, WRITE_TIMEOUT, majority_document};
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result};

/// The server's code for a value that is in a unique index already.
const DUPLICATE_KEY: i64 = 11000;
/// The server's codes for something newer, and for a moment that it can't read at any more.
const NEWER: [i32; 5] = [112, 239, 246, 251, 24];
/// How long a commit is asked for again, through elections.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two attempts at a commit.
const PAUSE: Duration = Duration::from_millis(200);

/// Writes that yield to those of others.
#[derive(Debug)]
pub struct Yielding {
    mongo: Mongo,
    namespace: Namespace,
    session: ClientSession,
    number: i64,
}

/// What became of a write.
#[derive(Debug, Clone, PartialEq)]
pub enum Yielded {
    /// It was committed at or before that moment.
    Done(Timestamp),
    /// Nothing was written, because something newer is there.
    Newer,
    /// Nothing was written, because the document with that number has unique values
    /// that stand in another one.
    Taken {
        /// Which of the documents.
        index: usize,
        /// The values.
        values: Document,
    },
}

impl Yielding {
    /// Writes to that collection.
    ///
    /// # Errors
    /// A stop where no session can be had.
    pub async fn to(mongo: &Mongo, namespace: &Namespace) -> Result<Self> {
        // Whoever got the session after us would be refused for its numbers.
        let mongo = mongo.apart()?;
        let session = mongo.client().start_session().causal_consistency(false);
        let session = session.await.during("starting a session")?;
        Ok(Self { mongo, namespace: namespace.clone(), session, number: 0 })
    }

    /// The session, to be recorded before the first write.
    pub fn session(&self) -> Document {
        self.session.id().clone()
    }

    /// Removes documents, then writes others as they are: all at once or not at all.
    /// `at` must be in the past of a majority, not before the last [`Yielded::Done`].
    ///
    /// # Errors
    /// A stop where the server refuses for another reason than what others wrote.
    pub async fn write(
        &mut self,
        at: Timestamp,
        removed: &[RawBson],
        written: &[RawDocumentBuf],
    ) -> Result<Yielded> {
        self.number += 1;
        let mut commands = Vec::new();
        if !removed.is_empty() {
            commands.push(self.removal(removed));
        }
        if !written.is_empty() {
            commands.push(self.upserts(written)?);
        }
        for (index, mut command) in commands.into_iter().enumerate() {
            if index == 0 {
                command.append(bson::cstr!("startTransaction"), true);
                let concern = rawdoc! {"level": "snapshot", "atClusterTime": at};
                command.append(bson::cstr!("readConcern"), concern);
            }
            if let Some(yielded) = self.send(command).await? {
                self.abort().await;
                return Ok(yielded);
            }
        }
        self.commit().await
    }

    fn removal(&self, ids: &[RawBson]) -> RawDocumentBuf {
        let mut deletes = RawArrayBuf::new();
        for id in ids {
            deletes.push(rawdoc! {"q": {"_id": {"$eq": id.clone()}}, "limit": 1});
        }
        let mut command = rawdoc! {"delete": self.namespace.collection.as_str()};
        command.append(bson::cstr!("deletes"), deletes);
        command
    }

    fn upserts(&self, documents: &[RawDocumentBuf]) -> Result<RawDocumentBuf> {
        let mut updates = RawArrayBuf::new();
        for document in documents {
            updates.push(statement(document)?);
        }
        let mut command = rawdoc! {
            "update": self.namespace.collection.as_str(),
            "ordered": true,
            // What the other side holds is right, whatever the validator says.
            "bypassDocumentValidation": true,
        };
        command.append(bson::cstr!("updates"), updates);
        Ok(command)
    }

    /// Sends one command of the transaction; tells why it can't be committed, if so.
    async fn send(&mut self, mut command: RawDocumentBuf) -> Result<Option<Yielded>> {
        command.append(bson::cstr!("txnNumber"), self.number);
        command.append(bson::cstr!("autocommit"), false);
        let limit = i64::try_from(WRITE_TIMEOUT.as_millis()).unwrap_or(i64::MAX);
        command.append(bson::cstr!("maxTimeMS"), limit);
        let database = self.mongo.database(&self.namespace.database);
        match database.run_raw_command(command).session(&mut self.session).await {
            Ok(reply) => self.judge(&reply),
            Err(error) if is_newer(&error) || is_transient(&error) => Ok(Some(Yielded::Newer)),
            Err(error) => Err(error).during(format!("writing to {}", self.namespace)),
        }
    }

    fn judge(&self, reply: &Document) -> Result<Option<Yielded>> {
        let errors = reply.get_array("writeErrors").map(Vec::as_slice).unwrap_or_default();
        let Some(error) = errors.first().and_then(bson::Bson::as_document) else { return Ok(None) };
        let code = error.get("code").and_then(whole_number).and_then(|code| i64::try_from(code).ok());
        if code == Some(DUPLICATE_KEY) {
            let values = error.get_document("keyValue").cloned().unwrap_or_default();
            // Somebody has inserted that very document since.
            if values.contains_key("_id") {
                return Ok(Some(Yielded::Newer));
            }
            let index = error.get("index").and_then(whole_number);
            let index = index.and_then(|index| usize::try_from(index).ok()).unwrap_or(0);
            return Ok(Some(Yielded::Taken { index, values }));
        }
        if code.and_then(|code| i32::try_from(code).ok()).is_some_and(|code| NEWER.contains(&code)) {
            return Ok(Some(Yielded::Newer));
        }
        let message = error.get_str("errmsg").unwrap_or("no reason given");
        Err(Error::stopped(format!("a document can't be written to {}: {message}", self.namespace))
            .hint("mend the cause and start the same command again"))
    }

    /// Commits; asked again under the same number, the server tells what became of it.
    async fn commit(&mut self) -> Result<Yielded> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.end("commitTransaction").await {
                Ok(reply) => {
                    let at = reply.get_timestamp("operationTime");
                    return at.map(Yielded::Done).map_err(|_| {
                        Error::stopped("the server does not tell when a transaction was committed")
                    });
                }
                Err(error) if is_newer(&error) => return Ok(Yielded::Newer),
                Err(error) if is_transient(&error) && Instant::now() < deadline => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => return Err(error).during(format!("committing to {}", self.namespace)),
            }
        }
    }

    async fn abort(&mut self) {
        // Most often the server has aborted it already.
        if let Err(error) = self.end("abortTransaction").await {
            tracing::debug!(error = crate::error::describe_mongo(&error), "nothing to abort");
        }
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

fn is_newer(error: &DriverError) -> bool {
    matches!(error.kind.as_ref(), ErrorKind::Command(command) if NEWER.contains(&command.code))
}
