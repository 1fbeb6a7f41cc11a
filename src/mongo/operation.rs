//! Server-side operations that outlive their client.
//!
//! A killed client does not stop its `$merge`. So every such operation runs on
//! a session whose id is recorded before it starts, and whoever comes next
//! kills that session and waits until its operations are gone.

use std::time::Duration;

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;
use mongodb::ClientSession;
use mongodb::options::{Hint, ReadConcern, WriteConcern};
use tokio::time::Instant;

use super::Mongo;
use super::command::retrying;
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result};

/// No single range may take longer than this on the server.
const LONGEST_OPERATION: Duration = Duration::from_secs(6 * 3600);
/// A killed operation ends at its next yield, which takes milliseconds.
const KILL_TIMEOUT: Duration = Duration::from_secs(120);

/// An operation's session, to run it on and to find it again.
#[derive(Debug)]
pub struct Operation {
    session: ClientSession,
}

impl Operation {
    /// The id of the session, to be recorded before anything runs on it.
    pub fn id(&self) -> Document {
        self.session.id().clone()
    }

    /// To run something on it.
    pub(super) fn session(&mut self) -> &mut ClientSession {
        &mut self.session
    }
}

impl Mongo {
    /// A session of its own for one operation.
    ///
    /// # Errors
    /// A stop where no session can be had.
    pub async fn operation(&self) -> Result<Operation> {
        let session = self.client().start_session().await.during("starting a session")?;
        Ok(Operation { session })
    }

    /// Runs a pipeline that writes, once; it is never sent again by itself.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide.
    pub async fn run_writing_pipeline(
        &self,
        operation: &mut Operation,
        namespace: &Namespace,
        stages: Vec<Document>,
        hint: Option<Hint>,
        comment: &str,
    ) -> mongodb::error::Result<()> {
        let collection = self.collection(namespace);
        let mut aggregate = collection
            .aggregate(stages)
            .allow_disk_use(true)
            .max_time(LONGEST_OPERATION)
            // What a failover takes back must not be copied.
            .read_concern(ReadConcern::majority())
            .write_concern(WriteConcern::majority())
            .comment(Bson::String(comment.into()));
        if let Some(hint) = hint {
            aggregate = aggregate.hint(hint);
        }
        aggregate.session(&mut operation.session).await.map(|_| ())
    }

    /// Kills the given sessions and waits until nothing runs on them any more.
    ///
    /// # Errors
    /// A stop where they can't be killed or don't end in time.
    pub async fn end_operations(&self, sessions: &[Document]) -> Result<()> {
        if sessions.is_empty() {
            return Ok(());
        }
        let ids: Vec<Bson> = sessions.iter().filter_map(|session| session.get("id").cloned()).collect();
        let patterns: Vec<Document> = ids.iter().map(|id| doc! {"id": id.clone()}).collect();
        let command = doc! {"killSessions": patterns};
        retrying("killing the sessions of an interrupted run", || {
            let admin = self.admin();
            let command = command.clone();
            async move { admin.run_command(command).await }
        })
        .await?;
        let deadline = Instant::now() + KILL_TIMEOUT;
        while self.is_running(&ids).await? {
            if Instant::now() > deadline {
                return Err(Error::stopped("an operation of an interrupted run does not end")
                    .hint("look for it with db.currentOp() and end it with db.killOp(), then start again"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    async fn is_running(&self, ids: &[Bson]) -> Result<bool> {
        let pipeline = |all_users: bool| {
            [
                doc! {"$currentOp": {"allUsers": all_users, "idleSessions": false}},
                doc! {"$match": {"active": true, "lsid.id": {"$in": ids.to_vec()}}},
                doc! {"$limit": 1},
            ]
        };
        // Without the privilege to see everybody's operations, our own are enough.
        let cursor = match self.admin().aggregate(pipeline(true)).await {
            Ok(cursor) => cursor,
            Err(_) => {
                self.admin().aggregate(pipeline(false)).await.during("looking for running operations")?
            }
        };
        let found: Vec<Document> = cursor.try_collect().await.during("looking for running operations")?;
        Ok(!found.is_empty())
    }
}
