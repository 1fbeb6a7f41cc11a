//! What may change while a cleanse is under way: operators pause, slow and stop
//! it by live control.

use std::sync::Arc;

use bson::{Document, doc};
use tokio::sync::watch;

use crate::Context;
use crate::error::Result;
use crate::event::Events;
use crate::job::Job;
use crate::job::control::{Control, last_wish_by};
use crate::throttle::pace::Pace;
use crate::throttle::waiting::Waiting;

/// A run that does as it is told.
#[derive(Debug)]
pub struct Steered {
    /// Its `stop` is cancelled by live control too.
    pub context: Context,
    /// How fast it may go.
    pub pace: Arc<Pace>,
}

/// Follows what operators want of this run until its lease is given back.
/// `documents_per_second` is what it was started with.
///
/// # Errors
/// A stop where the job can't be written.
pub async fn start(context: &Context, job: &Job, documents_per_second: Option<u32>) -> Result<Steered> {
    let rate = documents_per_second.unwrap_or(0);
    let settings = doc! {"settings": {"documents_per_second": i64::from(rate)}};
    let mut at_first = job.lease().document().borrow().clone();
    at_first.extend(settings.clone());
    job.save(settings).await?;
    let steered = Steered { context: context.of_one_run(), pace: Arc::new(Pace::new(rate)) };
    let mut steering = Steering {
        context: steered.context.clone(),
        pace: steered.pace.clone(),
        rate,
        before: Control::default(),
    };
    // At once: nothing may be begun in spite of a pause that outlived a restart.
    steering.apply(&at_first);
    tokio::spawn(steering.follow(job.lease().document()));
    Ok(steered)
}

struct Steering {
    context: Context,
    pace: Arc<Pace>,
    /// What the run was started with.
    rate: u32,
    before: Control,
}

impl Steering {
    async fn follow(mut self, mut documents: watch::Receiver<Document>) {
        while documents.changed().await.is_ok() {
            let document = documents.borrow_and_update().clone();
            self.apply(&document);
        }
    }

    fn apply(&mut self, document: &Document) {
        let control = Control::read(document);
        if control == self.before {
            return;
        }
        self.pace.hold(Waiting::Paused, control.paused);
        self.pace.set_rate(control.documents_per_second.unwrap_or(self.rate));
        tell(&self.context.events, last_wish_by(document), &self.before, &control, self.pace.rate());
        if control.stop {
            self.context.stop_by_control();
        }
        self.before = control;
    }
}

fn tell(events: &Events, who: &str, before: &Control, now: &Control, rate: u32) {
    let mut changes: Vec<String> = Vec::new();
    match (before.paused, now.paused) {
        (false, true) => changes.push(
            "paused; ranges and index builds under way go on, changes of the source are remembered".into(),
        ),
        (true, false) => changes.push("resumed".into()),
        _ => {}
    }
    if before.documents_per_second != now.documents_per_second {
        changes.push(match rate {
            0 => "no limit of documents per second".into(),
            rate => format!("{rate} documents per second"),
        });
    }
    if now.stop {
        changes.push("stopping".into());
    }
    if !changes.is_empty() {
        events.warn(format!("control by {who}: {}", changes.join(", ")));
    }
}
