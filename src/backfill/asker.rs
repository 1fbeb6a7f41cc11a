//! Asks for one key: permit, call, and again where the outcome allows it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::counts::ApiCounters;
use crate::job::lease::LeaseWatch;
use crate::key_api::classify::{OUTCOME_NAMES, Outcome};
use crate::key_api::client::Client;
use crate::key_api::retry::{Attempts, Next, jittered};
use crate::key_map::Answer;
use crate::throttle::pacer::Pacer;

/// What every call shares.
#[derive(Debug)]
pub struct Asker {
    /// The API.
    pub client: Client,
    /// Hands out permits to call it.
    pub pacer: Pacer,
    /// No call leaves while it is not known to be held.
    pub lease: LeaseWatch,
    /// Counts calls.
    pub counters: ApiCounters,
    /// Keys whose first call has been started and has not left yet.
    pub queued: AtomicUsize,
    /// Cancelled when no further call may start.
    pub stop: CancellationToken,
}

/// What asking for one key came to.
#[derive(Debug)]
pub enum Asked {
    /// A final answer.
    Answer(Answer),
    /// All attempts failed; the kind of the last failure and its description.
    Failed(&'static str, String),
    /// The run was stopped before the key was answered.
    NotAsked,
    /// No call can succeed any more.
    Fatal(String),
}

/// A key, what asking for it came to, and the concurrency slot, which is kept
/// until the answer is durable.
#[derive(Debug)]
pub struct Settled {
    /// The legacy key.
    pub key: String,
    /// What asking came to.
    pub asked: Asked,
    /// Held until the answer is durable: a crash repeats at most as many calls
    /// as there are slots.
    pub slot: OwnedSemaphorePermit,
}

impl Asker {
    /// Asks until there is an answer, the attempts are used up or the run stops.
    pub async fn ask(self: Arc<Self>, key: String, slot: OwnedSemaphorePermit) -> Settled {
        let first = self.turn().await;
        self.queued.fetch_sub(1, Ordering::Relaxed);
        let asked = if first { self.ask_until_settled(&key).await } else { Asked::NotAsked };
        Settled { key, asked, slot }
    }

    /// Calls until there is an answer; the first call may leave at once.
    async fn ask_until_settled(&self, key: &str) -> Asked {
        let mut attempts = Attempts::default();
        let mut is_retry = false;
        loop {
            if is_retry && !self.turn().await {
                return Asked::NotAsked;
            }
            self.counters.sent(is_retry);
            let call = self.client.call(key).await;
            self.counters.received(&call.outcome);
            let next = attempts.next(&call.outcome, self.client.api().max_attempts);
            if let Some(pause) = call.outcome.retry_after() {
                self.pacer.hold_for(pause);
            }
            match next {
                Next::Settle => return settle(call.outcome),
                Next::GiveUp => {
                    return Asked::Failed(OUTCOME_NAMES[call.outcome.index()], call.outcome.describe());
                }
                Next::StopJob => return Asked::Fatal(call.outcome.describe()),
                Next::RetryWithin(bound) => {
                    let pause = jittered(bound, rand::random());
                    tracing::debug!(outcome = %call.outcome.describe(), ?pause, "asking again");
                    tokio::select! {
                        () = self.stop.cancelled() => return Asked::NotAsked,
                        () = tokio::time::sleep(pause) => {}
                    }
                }
            }
            is_retry = true;
        }
    }

    /// Waits until a call may leave; false where none may any more. The lease is
    /// looked at again after the pacer: a permit that was waited with would be
    /// used later, in a burst.
    async fn turn(&self) -> bool {
        let turn = async {
            loop {
                // Without the lease another process may be calling by now; the
                // engine finds out too and ends the run.
                if self.lease.valid().await.is_err() {
                    return false;
                }
                self.pacer.permit().await;
                if self.lease.is_valid() {
                    return true;
                }
            }
        };
        tokio::select! {
            biased;
            () = self.stop.cancelled() => false,
            turn = turn => turn,
        }
    }
}

fn settle(outcome: Outcome) -> Asked {
    match outcome {
        Outcome::Found(key) => Asked::Answer(Answer::Found(key)),
        Outcome::NotFound => Asked::Answer(Answer::NotFound),
        Outcome::Rejected => Asked::Answer(Answer::Rejected),
        other => Asked::Failed(OUTCOME_NAMES[other.index()], other.describe()),
    }
}
