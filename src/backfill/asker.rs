//! Makes one call: waits for its permit, asks, tells what came back. Whether
//! and when to ask again is the engine's decision, so that a key that waits for
//! its retry keeps nothing busy.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::counts::ApiCounters;
use crate::job::lease::LeaseWatch;
use crate::key_api::batch::{Answers, BatchOutcome};
use crate::key_api::client::{BatchCall, Call, Client};
use crate::throttle::breaker::{Breaker, Pass};
use crate::throttle::pacer::Pacer;

/// What every call shares.
#[derive(Debug)]
pub struct Asker {
    /// The API.
    pub client: Client,
    /// Hands out permits to call it.
    pub pacer: Pacer,
    /// Stops calls while the API is out of order.
    pub breaker: Breaker,
    /// No call leaves while it is not known to be held.
    pub lease: LeaseWatch,
    /// Counts calls.
    pub counters: ApiCounters,
    /// Calls that have been started and have not left yet.
    pub queued: AtomicUsize,
    /// Cancelled when no further call may start.
    pub stop: CancellationToken,
}

/// A call that ended, and its concurrency slot, which is kept until the answer
/// is durable.
#[derive(Debug)]
pub struct Settled {
    /// The legacy keys asked for: one, or several where the API takes batches.
    pub keys: Vec<String>,
    /// With which leave the call was made.
    pub pass: Pass,
    /// What came back; `None` where no call was made after all.
    pub call: Option<BatchCall>,
    /// Held until the answer is durable: a crash repeats at most as many calls
    /// as there are slots.
    pub slot: OwnedSemaphorePermit,
}

impl Asker {
    /// Makes one call, unless the run stops or the breaker opens before it leaves.
    pub async fn ask(
        self: Arc<Self>,
        keys: Vec<String>,
        is_retry: bool,
        pass: Pass,
        slot: OwnedSemaphorePermit,
    ) -> Settled {
        let may_leave = self.turn(pass).await;
        self.queued.fetch_sub(1, Ordering::Relaxed);
        if !may_leave {
            self.breaker.abandon(pass);
            return Settled { keys, pass, call: None, slot };
        }
        self.counters.sent(is_retry);
        let call = self.call(&keys).await;
        self.counters.received(&call.outcome);
        self.counters.latencies.record(call.latency);
        crate::crash::point("after_call");
        if let BatchOutcome::Failed(outcome) = &call.outcome
            && let Some(pause) = outcome.retry_after()
        {
            self.pacer.hold_for(pause);
        }
        Settled { keys, pass, call: Some(call), slot }
    }

    /// A single call is a batch of one to everybody who reads the answer.
    async fn call(&self, keys: &[String]) -> BatchCall {
        match keys {
            [key] if self.client.api().batch.is_none() => {
                let Call { outcome, latency } = self.client.call(key).await;
                let outcome = if outcome.is_answer() {
                    BatchOutcome::Answered(Answers { outcomes: vec![outcome], stray: 0 })
                } else {
                    BatchOutcome::Failed(outcome)
                };
                BatchCall { outcome, latency }
            }
            keys => self.client.call_batch(keys).await,
        }
    }

    /// Waits until a call may leave; false where none may any more. Lease and
    /// breaker are looked at again after the pacer: a permit that was waited
    /// with would be used later, in a burst.
    async fn turn(&self, pass: Pass) -> bool {
        let turn = async {
            loop {
                // Without the lease another process may be calling by now; the
                // engine finds out too and ends the run.
                if self.lease.valid().await.is_err() || !self.breaker.honours(pass) {
                    return false;
                }
                self.pacer.permit().await;
                if self.lease.is_valid() {
                    return self.breaker.honours(pass);
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
