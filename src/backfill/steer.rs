//! What may change while a run is under way: what operators change by live control.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bson::Document;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::asker::Asker;
use super::plan::Plan;
use crate::config::values::Tps;
use crate::event::Events;
use crate::job::control::{Control, last_wish_by};
use crate::throttle::pacer::Waiting;

/// Settings that reader and engine look up again and again.
#[derive(Debug)]
pub struct LiveSettings {
    chunk: AtomicUsize,
    slots: AtomicUsize,
}

impl LiveSettings {
    /// Settings to begin with: candidates per read, calls in flight.
    pub fn new(chunk: usize, slots: usize) -> Self {
        Self { chunk: AtomicUsize::new(chunk), slots: AtomicUsize::new(slots) }
    }

    /// Candidates per read.
    pub fn chunk(&self) -> usize {
        self.chunk.load(Ordering::Relaxed)
    }

    /// Calls in flight.
    pub fn slots(&self) -> usize {
        self.slots.load(Ordering::Relaxed)
    }
}

/// Follows what operators want, until it is dropped or the run ends.
pub(super) struct Steering {
    pub(super) plan: Arc<Plan>,
    /// Whether the job's settings are those of this run, and not of one that it joins.
    pub(super) is_runner: bool,
    pub(super) asker: Arc<Asker>,
    pub(super) live: Arc<LiveSettings>,
    pub(super) stop: CancellationToken,
    pub(super) events: Events,
}

impl Steering {
    /// Applies every change of the job document.
    pub(super) async fn follow(self, mut documents: watch::Receiver<Document>) {
        let mut before = Control::default();
        loop {
            let mut document = documents.borrow_and_update().clone();
            if self.is_runner {
                // The lease was taken before they were stored: until it is renewed the job
                // still shows those of the run before, a higher ceiling among them.
                document.extend(self.plan.settings());
            }
            let control = Control::read(&document);
            self.adopt_ceiling(&document, &control);
            if control != before {
                self.apply(&control);
                self.tell(&document, &before, &control);
                before = control;
            }
            if documents.changed().await.is_err() {
                return;
            }
        }
    }

    /// The ceiling is the job's: who joins with another one in mind keeps to it
    /// all the same.
    fn adopt_ceiling(&self, document: &Document, control: &Control) {
        let settings = document.get_document("settings").ok();
        let started_with = settings.and_then(|settings| settings.get_f64("tps").ok());
        let started_with = started_with.and_then(|tps| Tps::new(tps).ok()).unwrap_or(self.plan.tps);
        self.asker.pacer.set_tps(control.tps.unwrap_or(started_with));
    }

    fn apply(&self, control: &Control) {
        let tps = self.asker.pacer.tps();
        let concurrency = control.concurrency.unwrap_or(self.plan.concurrency);
        self.asker.pacer.pause(Waiting::Paused, control.paused);
        self.live.chunk.store(control.chunk.unwrap_or(self.plan.chunk), Ordering::Relaxed);
        self.live.slots.store(self.plan.slots(concurrency, tps), Ordering::Relaxed);
        if control.stop {
            self.stop.cancel();
        }
    }

    fn tell(&self, document: &Document, before: &Control, now: &Control) {
        let mut changes = Vec::new();
        if before.paused != now.paused {
            changes.push(if now.paused { "paused".into() } else { "resumed".into() });
        }
        if before.tps != now.tps {
            changes.push(format!("{} TPS", self.asker.pacer.tps().per_second()));
        }
        if before.chunk != now.chunk {
            changes.push(format!("chunk {}", now.chunk.unwrap_or(self.plan.chunk)));
        }
        if before.concurrency != now.concurrency {
            changes.push(format!("concurrency {}", now.concurrency.unwrap_or(self.plan.concurrency)));
        }
        if now.stop {
            changes.push("stopping".into());
        }
        let who = last_wish_by(document);
        self.events.warn(format!("control by {who}: {}", changes.join(", ")));
    }
}
