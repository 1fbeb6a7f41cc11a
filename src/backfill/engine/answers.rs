//! From an answer to what documents receive, past the guard.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;

use super::Engine;
use super::writes::{Destination, Outbox, write};
use crate::backfill::guard::Verdict;
use crate::error::{Error, Result, joined};
use crate::key_map::{Answer, Remembered};
use crate::mongo::sink::{Update, Write};
use crate::mongo::source::{Candidate, TargetCollection};

/// A flag that waits for the guard, and where it belongs: the engine may have
/// gone on to another collection when it is released.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) collection: Arc<TargetCollection>,
    pub(super) update: Update,
}

/// Documents that wait for the guard, at most. It counts answers, and one may be
/// that of millions of documents: the others stay candidates until the next pass.
const MOST_HELD: usize = 20_000;

impl Engine {
    /// Lets the guard count keys that earlier runs found while it was undecided:
    /// the answers it held back then would make up a false picture without them.
    pub fn expect_answers(&mut self, found: u64) {
        (0..found).for_each(|_| {
            self.answer_guard.record(false);
        });
    }

    /// The slot of a call is free again once its answers are durable.
    pub(super) fn keep_until_durable(&mut self, slot: OwnedSemaphorePermit, has_keys: bool) {
        // Without a key map a held flag can't be made durable: it gives its
        // slot back, or a hundred held flags would stall a smaller job.
        let is_decided = self.answer_guard.verdict() != Verdict::Undecided;
        if self.parts.key_map.is_some() || has_keys || is_decided {
            self.outbox.slots.push(slot);
        }
    }

    pub(super) async fn take_answer(&mut self, key: String, answer: Answer) -> Result<()> {
        let waiting = self.keys.answered(&key, answer.clone());
        self.answer_guard.record(answer.is_negative());
        let held = self.is_held_back(&answer);
        if held {
            self.counted.insert(key.clone());
        }
        self.deliver(&answer, waiting);
        self.outbox.answers.push((key, Remembered { answer, held }));
        self.judge_answers().await
    }

    /// Whether an answer waits for the guard's first verdict.
    fn is_held_back(&self, answer: &Answer) -> bool {
        answer.is_negative() && !self.has_few_answers && self.answer_guard.verdict() == Verdict::Undecided
    }

    /// Sends documents to the writer, or lets them wait where a flag may not be
    /// written yet.
    pub(super) fn deliver(&mut self, answer: &Answer, candidates: Vec<Candidate>) {
        if self.is_held_back(answer) {
            let (write, collection) = (answer.write(), &self.collection);
            let room = MOST_HELD.saturating_sub(self.held_answers.len());
            self.held_answers.extend(candidates.into_iter().take(room).map(|candidate| Held {
                collection: collection.clone(),
                update: Update { candidate, write: write.clone() },
            }));
        } else {
            self.queue(answer, candidates);
        }
    }

    pub(super) fn queue(&mut self, answer: &Answer, candidates: Vec<Candidate>) {
        if answer.is_negative() && self.distrusts_flags {
            return;
        }
        let write = answer.write();
        self.outbox
            .updates
            .extend(candidates.into_iter().map(|candidate| Update { candidate, write: write.clone() }));
    }

    pub(super) async fn judge_answers(&mut self) -> Result<()> {
        match self.answer_guard.verdict() {
            Verdict::Undecided => Ok(()),
            Verdict::Fine => self.release_answers().await,
            Verdict::Tripped { bad, of } => {
                self.distrust_flags();
                self.stop_for(
                    Error::stopped(format!(
                        "the guard stopped the job: {bad} of the last {of} answers say that there is no key (limit {})",
                        self.parts.max_not_found_share
                    ))
                    .hint("is the API's address right, and do its answers mean what `not_found_status` says? If so, raise `backfill.max_not_found_share`"),
                );
                Ok(())
            }
        }
    }

    pub(super) fn stop_for_unusable(&mut self, bad: usize, of: usize) {
        self.distrust_flags();
        self.stop_for(
            Error::stopped(format!(
                "the guard stopped the job: {bad} of the last {of} documents have no usable legacy key (limit {})",
                self.parts.max_no_legacy_key_share
            ))
            .hint("is `legacy_field` right? If so, raise `backfill.max_no_legacy_key_share`"),
        );
    }

    /// Nothing that would become a flag is written from here on.
    fn distrust_flags(&mut self) {
        self.distrusts_flags = true;
        self.held_answers.clear();
        self.held_unusable.clear();
        self.outbox.updates.retain(|update| matches!(update.write, Write::Key(_)));
        self.outbox.answers.retain(|(_, remembered)| !remembered.answer.is_negative());
    }

    /// Whether the guard tripped over answers, which must be forgotten then.
    pub fn distrusts_answers(&self) -> bool {
        matches!(self.answer_guard.verdict(), Verdict::Tripped { .. })
    }

    /// Documents of the current collection whose flag waits for the guard's
    /// first verdict.
    pub fn held(&self) -> u64 {
        let all = self.held_answers.iter().chain(&self.held_unusable);
        let here = all.filter(|held| Arc::ptr_eq(&held.collection, &self.collection));
        u64::try_from(here.count()).unwrap_or(u64::MAX)
    }

    /// The same over all collections.
    pub fn held_everywhere(&self) -> u64 {
        u64::try_from(self.held_answers.len() + self.held_unusable.len()).unwrap_or(u64::MAX)
    }

    pub(super) async fn release_answers(&mut self) -> Result<()> {
        if self.held_answers.is_empty() {
            return Ok(());
        }
        self.outbox.answers.iter_mut().for_each(|(_, remembered)| remembered.held = false);
        // Those on their way to the key map must have arrived to be released.
        while let Some(done) = self.writes.join_next().await {
            self.take_written(joined(done)?).await?;
        }
        if let Some(key_map) = &self.parts.key_map {
            key_map.release_held().await?;
        }
        self.counted.clear();
        let held = std::mem::take(&mut self.held_answers);
        self.release(held);
        Ok(())
    }

    pub(super) fn release_unusable(&mut self) {
        let held = std::mem::take(&mut self.held_unusable);
        self.release(held);
    }

    fn release(&mut self, held: Vec<Held>) {
        let mut elsewhere: Vec<(Arc<TargetCollection>, Vec<Update>)> = Vec::new();
        for Held { collection, update } in held {
            if Arc::ptr_eq(&collection, &self.collection) {
                self.outbox.updates.push(update);
                continue;
            }
            match elsewhere.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &collection)) {
                Some((_, updates)) => updates.push(update),
                None => elsewhere.push((collection, vec![update])),
            }
        }
        for (collection, updates) in elsewhere {
            let outbox = Outbox { updates, ..Outbox::default() };
            let job = self.parts.job.clone();
            let destination = Destination { key_map: None, collection, siblings: Vec::new(), job };
            self.writes.spawn(async move { write(outbox, destination).await });
        }
    }

    pub(super) fn warn_about_share(&self) {
        for (guard, held, what) in [
            (&self.answer_guard, self.held_answers.len(), "answers say that there is no key"),
            (&self.unusable_guard, self.held_unusable.len(), "documents have no usable legacy key"),
        ] {
            if held > 0 && guard.exceeds_limit() {
                let (bad, of) = guard.share();
                self.parts.events.warn(format!(
                    "{bad} of {of} {what}: too few for the guard to judge, so they are flagged; look at some of them"
                ));
            }
        }
    }
}
