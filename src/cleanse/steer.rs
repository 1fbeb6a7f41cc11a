//! What may change while a cleanse is under way: operators pause, slow and stop
//! it by live control, and it pauses for the sake of the database.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bson::{Document, doc};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::Context;
use crate::config::file::default_max_replication_lag;
use crate::config::values::Namespace;
use crate::error::Result;
use crate::event::Events;
use crate::job::control::{Control, last_wish_by};
use crate::job::series::{self, Sampler, Series};
use crate::job::{Job, health};
use crate::throttle::limits::Limits;
use crate::throttle::pace::Pace;
use crate::throttle::waiting::Waiting;

/// How often it is looked at what limits the speed.
const TICK: Duration = Duration::from_millis(250);
/// The last sample may take no longer than this.
const SAVING: Duration = Duration::from_secs(2);
/// Looks until it is stored with the job, for who looks from afar.
const TICKS_PER_SAVE: u32 = 8;

/// A run that does as it is told.
#[derive(Debug)]
pub struct Steered {
    /// Its `stop` is cancelled by live control too.
    pub context: Context,
    /// How fast it may go.
    pub pace: Arc<Pace>,
    limits: Mutex<Limits>,
    _ended: DropGuard,
}

/// Documents per second that a run is started with; 0 is no limit.
pub fn rate(context: &Context, asked: Option<u32>) -> u32 {
    let config = context.settings.cleanse.as_ref();
    asked.or(config.map(|config| config.documents_per_second)).unwrap_or(0)
}

/// Follows what operators want of this run until its lease is given back.
/// `documents_per_second` is what it was started with.
///
/// # Errors
/// A stop where the job can't be written.
pub async fn start(context: &Context, job: &Job, documents_per_second: Option<u32>) -> Result<Steered> {
    let config = context.settings.cleanse.as_ref();
    let rate = rate(context, documents_per_second);
    let max_lag = config.map_or_else(default_max_replication_lag, |config| config.max_replication_lag);
    let settings = doc! {"settings": {"documents_per_second": i64::from(rate)}};
    let mut at_first = job.lease().document().borrow().clone();
    at_first.extend(settings.clone());
    job.save(settings).await?;
    let (run, pace) = (context.of_one_run(), Arc::new(Pace::new(rate)));
    let mut steering =
        Steering { context: run.clone(), pace: pace.clone(), rate, before: Control::default() };
    // At once: nothing may be begun in spite of a pause that outlived a restart.
    steering.apply(&at_first);
    tokio::spawn(steering.follow(job.lease().document()));
    let ended = CancellationToken::new();
    tokio::spawn(watch_health(run.clone(), max_lag.0, pace.clone(), ended.clone()));
    let limits = Mutex::new(Limits::new(Instant::now()));
    Ok(Steered { context: run, pace, limits, _ended: ended.drop_guard() })
}

/// Holds the pace while the database is in trouble.
async fn watch_health(context: Context, max_lag: Duration, pace: Arc<Pace>, ended: CancellationToken) {
    let hold = |reason, holds| pace.hold(reason, holds);
    tokio::select! {
        () = health::watch(context.mongo, max_lag, context.events, hold) => {}
        () = ended.cancelled() => {}
    }
}

impl Steered {
    /// Does the work, and shows meanwhile in the job what limits its speed.
    pub async fn beside<T>(&self, job: &Job, work: impl Future<Output = T>) -> T {
        let ended = CancellationToken::new();
        let work = async {
            let result = work.await;
            ended.cancel();
            result
        };
        tokio::join!(work, self.show(job, &ended)).0
    }

    /// Seconds by what limited the speed, the costliest first.
    pub fn limits(&self) -> Vec<(&'static str, f64)> {
        self.lock().seconds()
    }

    async fn show(&self, job: &Job, ended: &CancellationToken) {
        let mut tick = 0_u32;
        let mut sampler = Sampler::new(Series::stored(job.document()), self.in_target(job).await);
        while !ended.is_cancelled() {
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                () = ended.cancelled() => {}
            }
            self.lock().record(Instant::now(), self.pace.limited_by());
            tick += 1;
            if !tick.is_multiple_of(TICKS_PER_SAVE) || ended.is_cancelled() {
                continue;
            }
            let seconds: Document = self
                .limits()
                .into_iter()
                .map(|(limit, seconds)| (limit.to_owned(), seconds.into()))
                .collect();
            let mut fields = doc! {"limited_by": self.pace.limited_by(), "limited_by_seconds": seconds};
            if sampler.is_due() {
                fields.extend(self.sample(job, &mut sampler).await);
            }
            if let Err(error) = job.save(fields).await {
                tracing::info!(%error, "what limits the speed could not be stored");
            }
        }
        // The end of the run must not wait for it where the server is gone.
        let last = async { job.save(self.sample(job, &mut sampler).await).await };
        if !matches!(tokio::time::timeout(SAVING, last).await, Ok(Ok(()))) {
            tracing::info!("how the run went could not be stored to its end");
        }
    }

    async fn sample(&self, job: &Job, sampler: &mut Sampler) -> Document {
        sampler.take(self.in_target(job).await, self.pace.applied(), None);
        doc! {series::FIELD: sampler.to_document()}
    }

    /// Documents of the target, about: the server's own count costs nothing.
    async fn in_target(&self, job: &Job) -> u64 {
        let target = job.document().get_document("identity").and_then(|what| what.get_str("target"));
        let Some(target) = target.ok().and_then(|target| target.parse::<Namespace>().ok()) else { return 0 };
        let collection = self.context.mongo.collection(&target);
        let count = collection.estimated_document_count().into_future();
        tokio::time::timeout(SAVING, count).await.ok().and_then(Result::ok).unwrap_or(0)
    }

    /// Whoever panicked with the lock has left nothing half-done.
    fn lock(&self) -> MutexGuard<'_, Limits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
