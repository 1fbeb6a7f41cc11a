//! What goes on beside the work: operators change their mind, and the database may
//! fall behind.

use std::sync::Arc;

use bson::Document;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::Context;
use crate::job::control::{Control, last_wish_by};
use crate::job::{Job, health};
use crate::throttle::pace::Pace;
use crate::throttle::waiting::Waiting;

/// Tasks beside the work, ended with it.
pub(super) struct Beside(pub(super) Vec<AbortHandle>);

impl Drop for Beside {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// Follows what operators want, and how the database is, beside the work.
pub(super) fn steer(context: &Context, job: &Job, pace: &Arc<Pace>) -> Beside {
    let holding = pace.clone();
    let hold = move |reason, holds| holding.hold(reason, holds);
    let max_lag = context.settings.backfill.max_replication_lag.0;
    let health = health::watch(context.mongo.clone(), max_lag, context.events.clone(), hold);
    let control = follow_control(context.clone(), pace.clone(), job.lease().document());
    Beside(vec![tokio::spawn(health).abort_handle(), tokio::spawn(control).abort_handle()])
}

async fn follow_control(context: Context, pace: Arc<Pace>, mut documents: watch::Receiver<Document>) {
    let mut is_paused = false;
    loop {
        let document = documents.borrow_and_update().clone();
        let control = Control::read(&document);
        if control.paused != is_paused {
            is_paused = control.paused;
            pace.hold(Waiting::Paused, is_paused);
            let what = if is_paused { "paused" } else { "resumed" };
            context.events.warn(format!("control by {}: {what}", last_wish_by(&document)));
        }
        if control.stop {
            context.events.warn(format!("control by {}: stopping", last_wish_by(&document)));
            return context.stop_by_control();
        }
        if documents.changed().await.is_err() {
            return;
        }
    }
}
