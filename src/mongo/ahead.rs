//! A change feed that is read ahead: while one batch is worked on, the next is
//! fetched. Its position is that of what was handed out, not of what was read.

use bson::Timestamp;
use tokio::sync::mpsc;

use super::feed::{Changes, Feed, Position};
use crate::error::{Error, Result};

/// Batches that wait.
const WAITING: usize = 1;

/// A feed with a reader of its own, which ends with it.
#[derive(Debug)]
pub struct Ahead {
    batches: mpsc::Receiver<Result<(Changes, Position)>>,
    position: Position,
}

impl Feed {
    /// Reads on in the background, at most so many changes at once.
    pub fn ahead(mut self, most: usize) -> Ahead {
        let position = self.position().clone();
        let (sender, batches) = mpsc::channel(WAITING);
        tokio::spawn(async move {
            // A read under way is never dropped: the end is noticed between two.
            while !sender.is_closed() {
                let batch = self.next(most).await;
                let batch = batch.map(|changes| (changes, self.position().clone()));
                let failed = batch.is_err();
                if sender.send(batch).await.is_err() || failed {
                    return;
                }
            }
        });
        Ahead { batches, position }
    }
}

impl Ahead {
    /// The next changes, as [`Feed::next`].
    ///
    /// # Errors
    /// A refusal where the oplog no longer holds what comes next.
    pub async fn next(&mut self) -> Result<Changes> {
        let batch = self.batches.recv().await;
        let (changes, position) =
            batch.unwrap_or_else(|| Err(Error::stopped("the change feed has ended")))?;
        self.position = position;
        Ok(changes)
    }

    /// Where one has to go on to miss nothing after what was handed out.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// Whether everything up to that moment was handed out.
    pub fn has_reached(&self, time: Timestamp) -> bool {
        self.position.has_reached(time)
    }
}
