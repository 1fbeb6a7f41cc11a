//! From answers and updates to durable writes, and what became of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::Engine;
use super::keys::Failure;
use crate::crash;
use crate::error::{Error, Result};
use crate::key_map::unique::Conflict;
use crate::key_map::{KeyMap, Remembered};
use crate::mongo::sink::{Update, Write, Written};
use crate::mongo::source::{Obstacle, TargetCollection};

/// Writes under way at once: one is prepared by the server while the next
/// gathers its documents.
const WRITES_IN_FLIGHT: usize = 2;
/// When no write was done for so long nothing more is asked: what was answered is not durable,
/// and would be asked for again if this process ended now.
const STALL: Duration = Duration::from_secs(2);
/// So many write refusals in a row mean that no document can be written.
const REFUSALS_IN_A_ROW: u32 = 20;

/// The reason of documents whose new key belongs to another legacy key.
const SHARED_KEY: &str = "shared_new_key";

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
    /// Keys whose answer the key map refused, because their new key stands for
    /// another legacy key.
    conflicts: Vec<Conflict>,
    results: Vec<(Arc<TargetCollection>, Update, Written)>,
}

/// Where answers and updates go.
#[derive(Debug, Clone)]
pub(super) struct Destination {
    pub(super) key_map: Option<KeyMap>,
    pub(super) collection: Arc<TargetCollection>,
    /// Other targets whose documents can be found by their legacy key.
    pub(super) siblings: Vec<Arc<TargetCollection>>,
    pub(super) job: String,
}

impl Engine {
    pub(super) fn start_writes(&mut self) {
        let empty = self.outbox.updates.is_empty() && self.outbox.answers.is_empty();
        // Without the lease these keys may be another worker's by now; the next
        // tick waits for it, or ends the run.
        if empty || self.writes.len() >= WRITES_IN_FLIGHT || !self.parts.asker.lease.is_valid() {
            return;
        }
        let outbox = std::mem::take(&mut self.outbox);
        let siblings = self.parts.siblings.iter().filter(|sibling| !Arc::ptr_eq(sibling, &self.collection));
        let destination = Destination {
            key_map: self.parts.key_map.clone(),
            collection: self.collection.clone(),
            siblings: siblings.cloned().collect(),
            job: self.parts.job.clone(),
        };
        self.waits_since.get_or_insert_with(Instant::now);
        self.writes.spawn(async move { write(outbox, destination).await });
    }

    /// Whether answers can't be made durable, for longer than a busy server takes.
    pub(super) fn is_stalled(&self) -> bool {
        self.waits_since.is_some_and(|since| since.elapsed() > STALL)
    }

    pub(super) async fn take_written(&mut self, done: Result<WriteDone>) -> Result<()> {
        self.waits_since = (!self.writes.is_empty()).then(Instant::now);
        let done = done?;
        for conflict in &done.conflicts {
            self.failed_keys.insert(conflict.legacy_key.clone(), shared_key(conflict));
        }
        for key in done.keys {
            self.release_late(&key);
            self.keys.forget(&key);
        }
        for (collection, update, written) in done.results {
            self.count_written(&collection, &update, written);
        }
        Ok(())
    }

    /// Documents that came while the answer of their key was on its way to a key
    /// map that may refuse it.
    fn release_late(&mut self, key: &str) {
        let Some(candidates) = self.late.remove(key) else { return };
        if let Some(failure) = self.failed_keys.get(key).cloned() {
            candidates
                .iter()
                .for_each(|candidate| self.fail(candidate, failure.reason, &failure.description));
        } else if let Some(answer) = self.keys.answer(key) {
            self.deliver(&answer, candidates);
        }
    }

    fn count_written(&mut self, collection: &Arc<TargetCollection>, update: &Update, written: Written) {
        let namespace = &collection.target.namespace;
        if !matches!(written, Written::Refused { .. }) {
            self.refusals_in_a_row = 0;
        }
        match written {
            Written::Done => match &update.write {
                Write::Key(key) => {
                    self.documents.filled += 1;
                    self.keep_record(namespace, &update.candidate, "filled", key.clone());
                }
                Write::Flag(reason) => {
                    self.documents.flag(reason.as_str());
                    self.keep_record(namespace, &update.candidate, "flagged", reason.as_str().into());
                }
            },
            Written::AlreadyFilled => {
                self.documents.already_filled += 1;
                self.keep_record(namespace, &update.candidate, "already_filled", String::new());
            }
            Written::Changed => {
                self.documents.changed += 1;
                self.keep_record(namespace, &update.candidate, "changed", String::new());
            }
            Written::SharedKey { owner } => {
                self.fail_in(namespace, &update.candidate, SHARED_KEY, &shared_with(&owner));
            }
            Written::Unwritable => {
                let obstacle = Obstacle::UnwritablePath;
                self.fail_in(namespace, &update.candidate, obstacle.reason(), obstacle.description());
            }
            Written::Refused { code, message } => {
                let description = format!("error {code}: {message}");
                self.fail_in(namespace, &update.candidate, "write_refused", &description);
                self.refusals_in_a_row += 1;
                if self.refusals_in_a_row == REFUSALS_IN_A_ROW {
                    self.stop_for(
                        Error::stopped(format!(
                            "{REFUSALS_IN_A_ROW} writes to {namespace} in a row were refused; the last with error {code}: {message}"
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
pub(super) async fn write(outbox: Outbox, destination: Destination) -> Result<WriteDone> {
    let Outbox { answers, mut slots, mut updates } = outbox;
    let mut conflicts = Vec::new();
    if let Some(key_map) = &destination.key_map {
        conflicts = key_map.remember(&answers).await?;
        slots.clear();
        crash::point("after_key_map");
    }
    let shared: HashSet<&str> = conflicts.iter().map(|conflict| conflict.legacy_key.as_str()).collect();
    let is_shared = |update: &Update| {
        matches!(update.write, Write::Key(_))
            && update.candidate.legacy.text().is_some_and(|key| shared.contains(key.as_str()))
    };
    let refused: Vec<Update> = updates.extract_if(.., |update| is_shared(update)).collect();
    let mut results = refuse(&destination.collection, refused, &conflicts);
    let collection = &destination.collection;
    let written = collection.write(&updates, &destination.job).await?;
    crash::point("after_documents");
    drop(slots);
    results.extend(
        updates.into_iter().zip(written).map(|(update, written)| (collection.clone(), update, written)),
    );
    let settled: HashMap<&str, Write> = answers
        .iter()
        .filter(|(key, remembered)| !remembered.held && !shared.contains(key.as_str()))
        .map(|(key, remembered)| (key.as_str(), remembered.answer.write()))
        .collect();
    for sibling in &destination.siblings {
        results.extend(fill_sibling(sibling, &settled, &destination.job).await?);
    }
    let keys = answers.into_iter().map(|(key, _)| key).collect();
    Ok(WriteDone { keys, conflicts, results })
}

/// Documents of another target that wait for the same keys, as far as its index
/// finds them.
async fn fill_sibling(
    sibling: &Arc<TargetCollection>,
    answers: &HashMap<&str, Write>,
    job: &str,
) -> Result<Vec<(Arc<TargetCollection>, Update, Written)>> {
    let keys: Vec<&str> = answers.keys().copied().collect();
    let candidates = sibling.candidates_of(&keys).await?;
    let updates: Vec<Update> = candidates
        .into_iter()
        .filter_map(|candidate| {
            let write = answers.get(candidate.legacy.text()?.as_str())?.clone();
            Some(Update { candidate, write })
        })
        .collect();
    let written = sibling.write(&updates, job).await?;
    Ok(updates.into_iter().zip(written).map(|(update, written)| (sibling.clone(), update, written)).collect())
}

fn refuse(
    collection: &Arc<TargetCollection>,
    updates: Vec<Update>,
    conflicts: &[Conflict],
) -> Vec<(Arc<TargetCollection>, Update, Written)> {
    let of = |update: &Update| {
        let key = update.candidate.legacy.text()?;
        conflicts.iter().find(|conflict| conflict.legacy_key == key)
    };
    updates
        .into_iter()
        .map(|update| {
            let written = of(&update)
                .map_or(Written::Changed, |conflict| Written::SharedKey { owner: conflict.owner.clone() });
            (collection.clone(), update, written)
        })
        .collect()
}

fn shared_key(conflict: &Conflict) -> Failure {
    Failure { reason: SHARED_KEY, description: shared_with(&conflict.owner) }
}

fn shared_with(owner: &str) -> String {
    format!("the new key stands for the legacy key {owner} already, and `key_api.unique_keys` is set")
}
