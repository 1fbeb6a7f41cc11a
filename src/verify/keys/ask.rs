//! Asking the key API within the ceiling, without any write.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use futures_util::StreamExt;
use futures_util::stream;
use tokio::sync::Semaphore;

use crate::backfill::asker::{Asker, Settled};
use crate::error::{Error, Result};
use crate::key_api::batch::{BatchOutcome, bisect};
use crate::key_api::classify::Outcome;
use crate::key_api::retry::{Attempts, Next, jittered};
use crate::throttle::breaker::Pass;

/// So many calls in a row whose attempts were used up mean that the API is out of
/// order: the rest is not asked.
const UNANSWERED: u32 = 5;

/// Asks for keys.
#[derive(Debug)]
pub struct Questions {
    asker: Arc<Asker>,
    slots: Arc<Semaphore>,
    size: usize,
    at_once: usize,
    max_attempts: u32,
    unanswered: AtomicU32,
}

/// Keys that are asked for together, and how often they were.
#[derive(Debug)]
struct Question {
    keys: Vec<String>,
    attempts: Attempts,
    is_retry: bool,
}

impl Questions {
    /// Asks by so many calls at once.
    pub fn new(asker: Arc<Asker>, at_once: usize) -> Self {
        let api = asker.client.api();
        let size = api.batch.as_ref().map_or(1, |batch| batch.size).max(1);
        let max_attempts = api.max_attempts;
        let slots = Arc::new(Semaphore::new(at_once));
        Self { asker, slots, size, at_once, max_attempts, unanswered: AtomicU32::new(0) }
    }

    /// Whether the API was found to be out of order.
    pub fn has_given_up(&self) -> bool {
        self.unanswered.load(Ordering::Relaxed) >= UNANSWERED
    }

    /// The answers for these distinct keys; those that the API does not answer for
    /// have none.
    ///
    /// # Errors
    /// A stop where the API refuses the credentials.
    pub async fn ask(&self, keys: &[String]) -> Result<HashMap<String, Outcome>> {
        let mut answers = HashMap::new();
        let mut asked = stream::iter(keys.chunks(self.size).map(<[String]>::to_vec))
            .map(|keys| self.settle(keys))
            .buffer_unordered(self.at_once);
        while let Some(settled) = asked.next().await {
            answers.extend(settled?);
        }
        Ok(answers)
    }

    /// Asks until each key has an answer or its attempts are used up.
    async fn settle(&self, keys: Vec<String>) -> Result<Vec<(String, Outcome)>> {
        let mut answers = Vec::new();
        let mut open = vec![Question { keys, attempts: Attempts::default(), is_retry: false }];
        while let Some(mut question) = open.pop() {
            if self.has_given_up() {
                break;
            }
            let Ok(slot) = self.slots.clone().acquire_owned().await else { break };
            let ask = self.asker.clone().ask(question.keys.clone(), question.is_retry, Pass::Normal, slot);
            let Settled { call: Some(call), .. } = ask.await else { break };
            let failed = match call.outcome {
                BatchOutcome::Refused(_) => {
                    let (left, right) = bisect(&question.keys);
                    for half in [left, right] {
                        let attempts = Attempts::default();
                        open.push(Question { keys: half.to_vec(), attempts, is_retry: true });
                    }
                    continue;
                }
                BatchOutcome::Answered(answered) => {
                    self.unanswered.store(0, Ordering::Relaxed);
                    let mut again = None;
                    let mut left = Vec::new();
                    for (key, outcome) in question.keys.into_iter().zip(answered.outcomes) {
                        if outcome.is_answer() {
                            answers.push((key, outcome));
                        } else {
                            left.push(key);
                            again = Some(outcome);
                        }
                    }
                    question.keys = left;
                    match again {
                        None => continue,
                        Some(outcome) => outcome,
                    }
                }
                BatchOutcome::Failed(outcome) => outcome,
            };
            match question.attempts.next(&failed, self.max_attempts) {
                Next::StopJob => return Err(refused(&failed)),
                Next::GiveUp => {
                    self.unanswered.fetch_add(1, Ordering::Relaxed);
                }
                Next::Settle => {}
                Next::RetryWithin(bound) => {
                    tokio::time::sleep(jittered(bound, rand::random())).await;
                    open.push(Question { is_retry: true, ..question });
                }
            }
        }
        Ok(answers)
    }
}

fn refused(outcome: &Outcome) -> Error {
    Error::stopped(format!("the key API refuses the credentials: {}", outcome.describe()))
        .hint("mend `key_api.headers`, then start the same command again")
}
