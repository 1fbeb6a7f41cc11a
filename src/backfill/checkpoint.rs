//! What a run under way stores and shows, again and again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bson::{Bson, Document, doc};

use super::counts::{Api, Documents, add};
use super::engine::Engine;
use super::latency::Counts;
use crate::error::Result;
use crate::event::{Events, Progress};
use crate::job::series::{self, Sampler, Series};
use crate::job::{Job, Role};

/// How often counters are stored while a run is under way.
const INTERVAL: Duration = Duration::from_secs(2);

/// How far a worker is, or all of them together: documents, calls, and how long those took.
pub type HowFar = (Documents, Api, Counts);

/// How far the workers of this process are, for the one picture of all.
#[derive(Debug, Clone, Default)]
pub struct Board(Arc<Mutex<BTreeMap<String, HowFar>>>);

impl Board {
    /// Notes how far a worker is; returns the sum of all.
    pub fn update(&self, worker: String, engine: &Engine) -> HowFar {
        // Plain counts: a panic elsewhere can't leave them half changed.
        let mut board = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        board.insert(worker, (engine.documents().clone(), engine.api(), engine.latencies()));
        let mut sum = (Documents::default(), Api::default(), Counts::default());
        for (documents, api, latencies) in board.values() {
            sum.0.add(documents);
            sum.1.add(api);
            sum.2.add(latencies);
        }
        sum
    }
}

/// How all workers of this process went over time; the runner of the job keeps it.
#[derive(Debug)]
pub struct Course {
    sampler: Sampler,
    latencies: Counts,
}

impl Course {
    /// Goes on with what is stored; `None` for who joined a runner.
    pub fn of(job: &Job) -> Option<Self> {
        let sampler = || Sampler::new(Series::stored(job.document()), 0);
        (*job.role() == Role::Runner).then(|| Self { sampler: sampler(), latencies: Counts::default() })
    }

    /// Takes a sample and returns what is to be stored of all.
    pub fn sample(&mut self, (documents, api, latencies): &HowFar) -> Document {
        let percentiles = latencies.percentiles_since(&self.latencies);
        self.latencies.clone_from(latencies);
        self.sampler.take(documents.settled(), api.calls, percentiles);
        doc! {series::FIELD: self.sampler.to_document()}
    }
}

/// Stores and shows how far an engine is.
#[derive(Debug)]
pub struct Checkpoints<'a> {
    job: &'a Job,
    /// What earlier runs of the job had done.
    earlier: &'a Document,
    board: &'a Board,
    course: Option<&'a mut Course>,
    events: &'a Events,
    saved: Instant,
}

impl<'a> Checkpoints<'a> {
    /// For the run of a job that had done so much before.
    pub fn new(
        job: &'a Job,
        earlier: &'a Document,
        board: &'a Board,
        course: Option<&'a mut Course>,
        events: &'a Events,
    ) -> Self {
        Self { job, earlier, board, course, events, saved: Instant::now() }
    }

    /// Shows how far the engine is, and stores it where that is due.
    ///
    /// # Errors
    /// A stop where the lease is lost or the job can't be saved.
    pub async fn tick(&mut self, engine: &mut Engine) -> Result<()> {
        self.job.lease().valid().await?;
        let all = self.board.update(self.job.member(), engine);
        show(self.events, engine, &all.0, &all.1);
        if self.saved.elapsed() >= INTERVAL {
            self.saved = Instant::now();
            engine.flush_failures().await?;
            let mut fields = fields(engine, self.earlier);
            if let Some(course) = self.course.as_mut().filter(|course| course.sampler.is_due()) {
                fields.extend(course.sample(&all));
            }
            self.job.save(fields).await?;
            crate::crash::point("after_checkpoint");
        }
        Ok(())
    }
}

/// What is stored of a run in its job document.
pub fn fields(engine: &Engine, earlier: &Document) -> Document {
    let mut this_run = engine.documents().totals();
    this_run.extend(engine.api().totals());
    let limits: Document =
        engine.limits().into_iter().map(|(limit, spent)| (limit.to_owned(), spent.into())).collect();
    let mut fields = doc! {
        "totals": add(Some(earlier), &this_run),
        "documents": bson::serialize_to_bson(engine.documents()).unwrap_or(Bson::Null),
        "limited_by": engine.limited_by(),
        "limited_by_seconds": limits,
    };
    // Those that may leave before the next checkpoint are counted already.
    if let Some(calls) = engine.calls_of_day(2 * INTERVAL.as_secs()) {
        fields.insert("calls_of_day", calls);
    }
    if let Some(position) = engine.position().and_then(|position| Bson::try_from(position.clone()).ok()) {
        fields.insert("position", position);
    }
    fields
}

fn show(events: &Events, engine: &Engine, documents: &Documents, api: &Api) {
    let retries = if api.retries > 0 { format!(", {} retries", api.retries) } else { String::new() };
    let failed = if documents.failed > 0 { format!(", {} failed", documents.failed) } else { String::new() };
    let until = engine.opens_at().map(|opens| format!("; calls again at {opens}")).unwrap_or_default();
    events.progress(Progress {
        phase: "backfill".into(),
        unit: "documents",
        done: documents.settled(),
        total: Some(documents.candidates.max(documents.settled())),
        limited_by: Some(engine.limited_by().into()),
        detail: format!(
            "{} filled, {} flagged{failed}; {} calls{retries}, {} keys from the key map{until}",
            documents.filled, documents.flagged, api.calls, api.from_key_map
        ),
    });
}
