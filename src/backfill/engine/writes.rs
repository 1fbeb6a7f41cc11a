//! From answers and updates to durable writes, and what became of them.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;

use super::Engine;
use crate::error::{Error, Result};
use crate::key_map::{KeyMap, Remembered};
use crate::mongo::sink::{Update, Write, Written};
use crate::mongo::source::TargetCollection;

/// Writes under way at once: one is prepared by the server while the next
/// gathers its documents.
const WRITES_IN_FLIGHT: usize = 2;
/// So many write refusals in a row mean that no document can be written.
const REFUSALS_IN_A_ROW: u32 = 20;

/// What one write settles.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    pub(super) answers: Vec<(String, Remembered)>,
    pub(super) slots: Vec<OwnedSemaphorePermit>,
    pub(super) updates: Vec<Update>,
}

#[derive(Debug)]
pub(super) struct WriteDone {
    keys: Vec<String>,
    results: Vec<(Update, Written)>,
}

impl Engine {
    pub(super) fn start_writes(&mut self) {
        let empty = self.outbox.updates.is_empty() && self.outbox.answers.is_empty();
        if empty || self.writes.len() >= WRITES_IN_FLIGHT {
            return;
        }
        let outbox = std::mem::take(&mut self.outbox);
        let (key_map, collection, job) =
            (self.parts.key_map.clone(), self.collection.clone(), self.parts.job.clone());
        self.writes.spawn(async move { write(outbox, key_map, collection, &job).await });
    }

    pub(super) async fn take_written(&mut self, done: Result<WriteDone>) -> Result<()> {
        let done = done?;
        for key in done.keys {
            self.keys.forget(&key);
        }
        for (update, written) in done.results {
            self.count_written(&update, written);
        }
        Ok(())
    }

    fn count_written(&mut self, update: &Update, written: Written) {
        if !matches!(written, Written::Refused { .. }) {
            self.refusals_in_a_row = 0;
        }
        match written {
            Written::Done => match &update.write {
                Write::Key(key) => {
                    self.documents.filled += 1;
                    self.keep_record(&update.candidate, "filled", key.clone());
                }
                Write::Flag(reason) => {
                    self.documents.flag(reason.as_str());
                    self.keep_record(&update.candidate, "flagged", reason.as_str().into());
                }
            },
            Written::AlreadyFilled => {
                self.documents.already_filled += 1;
                self.keep_record(&update.candidate, "already_filled", String::new());
            }
            Written::Changed => {
                self.documents.changed += 1;
                self.keep_record(&update.candidate, "changed", String::new());
            }
            Written::Refused { code, message } => {
                self.fail(&update.candidate, "write_refused", &format!("error {code}: {message}"));
                self.refusals_in_a_row += 1;
                if self.refusals_in_a_row == REFUSALS_IN_A_ROW {
                    self.stop_for(
                        Error::stopped(format!(
                            "{REFUSALS_IN_A_ROW} writes to {} in a row were refused; the last with error {code}: {message}",
                            self.collection.target.namespace
                        ))
                        .hint("a validator or a unique index that the keys break? The answers are kept in the key map"),
                    );
                }
            }
        }
    }
}

/// Answers first, documents after: once the key map is durable the slots are
/// free, and a crash from here on costs no call.
pub(super) async fn write(
    outbox: Outbox,
    key_map: Option<KeyMap>,
    collection: Arc<TargetCollection>,
    job: &str,
) -> Result<WriteDone> {
    let mut slots = outbox.slots;
    if let Some(key_map) = &key_map {
        key_map.remember(&outbox.answers).await?;
        slots.clear();
    }
    let results = collection.write(&outbox.updates, job).await?;
    drop(slots);
    let keys = outbox.answers.into_iter().map(|(key, _)| key).collect();
    Ok(WriteDone { keys, results: outbox.updates.into_iter().zip(results).collect() })
}
