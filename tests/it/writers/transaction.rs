//! Multi-document transactions of a writer.

use bson::{Document, doc};
use mongodb::Collection;
use mongodb::error::{Error, UNKNOWN_TRANSACTION_COMMIT_RESULT};
use mongodb::options::WriteConcern;
use tokio::time::Instant;

use super::operation::{Answer, Change, identity};
use super::reply::answer;
use super::writer::{ATTEMPTS, BACK_OFF, FENCES, Writer};

enum Failed {
    Refused(String),
    Unknown(String),
}

impl Failed {
    #[expect(clippy::needless_pass_by_value, reason = "as an argument of map_err")]
    fn refused(error: Error) -> Self {
        Self::Refused(error.to_string())
    }
}

impl Writer {
    /// Several writes in a transaction; returns how many documents it was about.
    pub(super) async fn transact(&mut self, changes: Vec<(i32, Change)>, aborts: bool) -> u32 {
        let written = u32::try_from(changes.len()).expect("few");
        for _ in 0..3 {
            self.waiting.get_or_insert_with(Instant::now);
            let sent = Instant::now();
            let (answers, error) = match self.attempt(&changes, aborts).await {
                Ok(answers) if aborts => {
                    self.note_aborted(&changes);
                    self.note_acknowledged(answers.len());
                    return written;
                }
                Ok(answers) => (answers, None),
                Err(Failed::Unknown(reason)) => {
                    self.note_unknown(&changes, &reason);
                    return written;
                }
                Err(Failed::Refused(reason)) => (Vec::new(), Some(reason)),
            };
            if let Some(reason) = error {
                self.note_refused(&changes, &reason);
                tokio::time::sleep(BACK_OFF).await;
                continue;
            }
            for ((number, change), answer) in changes.iter().zip(&answers) {
                self.journal.acknowledged(&identity(*number), change, *answer, sent);
            }
            self.note_acknowledged(answers.len());
            return written;
        }
        written
    }

    fn note_aborted(&mut self, changes: &[(i32, Change)]) {
        for (number, change) in changes {
            self.journal.refused(&identity(*number), change, "aborted by the writer");
        }
    }

    async fn attempt(&mut self, changes: &[(i32, Change)], aborts: bool) -> Result<Vec<Answer>, Failed> {
        let session = &mut self.transactions;
        session.start_transaction().write_concern(WriteConcern::majority()).await.map_err(Failed::refused)?;
        let mut answers = Vec::new();
        for (number, change) in changes {
            let command = change.kind().command(&self.live, vec![change.statement(&identity(*number))]);
            let reply = self.database.run_command(command).session(&mut *session).await;
            // Nothing of it holds before it is committed.
            let answer = match reply {
                Ok(reply) => answer(&reply, change).ok_or_else(|| Failed::Refused(reply.to_string())),
                Err(error) => Err(Failed::refused(error)),
            };
            match answer {
                Ok(answer) => answers.push(answer),
                Err(failed) => {
                    drop(session.abort_transaction().await);
                    return Err(failed);
                }
            }
        }
        if aborts {
            // One that does not get through is as good: it is never committed.
            drop(session.abort_transaction().await);
            return Ok(answers);
        }
        let mut last = String::new();
        for _ in 0..ATTEMPTS {
            match session.commit_transaction().await {
                Ok(()) => return Ok(answers),
                Err(error) if error.contains_label(UNKNOWN_TRANSACTION_COMMIT_RESULT) => {
                    last = error.to_string()
                }
                Err(error) => return Err(Failed::refused(error)),
            }
        }
        Err(Failed::Unknown(last))
    }

    /// Makes sure that no earlier transaction is committed any more.
    pub(super) async fn fence_transactions(&mut self) -> bool {
        let fences: Collection<Document> = self.database.collection(FENCES);
        let session = &mut self.transactions;
        if session.start_transaction().write_concern(WriteConcern::majority()).await.is_err() {
            return false;
        }
        let filter = doc! {"_id": self.number};
        let update = fences.update_one(filter, doc! {"$inc": {"n": 1}}).session(&mut *session).await;
        match update {
            Ok(_) => session.commit_transaction().await.is_ok(),
            Err(_) => {
                drop(session.abort_transaction().await);
                false
            }
        }
    }
}
