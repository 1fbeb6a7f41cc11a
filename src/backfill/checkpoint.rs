//! What a run under way stores and shows, again and again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bson::{Bson, Document, doc};

use super::counts::{Api, Documents, add};
use super::engine::Engine;
use crate::error::Result;
use crate::event::{Events, Progress};
use crate::job::Job;

/// How often counters are stored while a run is under way.
const INTERVAL: Duration = Duration::from_secs(2);

/// How far the workers of this process are, for the one picture of all.
#[derive(Debug, Clone, Default)]
pub struct Board(Arc<Mutex<BTreeMap<String, (Documents, Api)>>>);

impl Board {
    /// Notes how far a worker is; returns the sum of all.
    fn update(&self, worker: String, engine: &Engine) -> (Documents, Api) {
        // Plain counts: a panic elsewhere can't leave them half changed.
        let mut board = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        board.insert(worker, (engine.documents().clone(), engine.api()));
        let mut sum = (Documents::default(), Api::default());
        for (documents, api) in board.values() {
            sum.0.add(documents);
            sum.1.add(api);
        }
        sum
    }
}

/// Stores and shows how far an engine is.
#[derive(Debug)]
pub struct Checkpoints<'a> {
    job: &'a Job,
    /// What earlier runs of the job had done.
    earlier: &'a Document,
    board: &'a Board,
    events: &'a Events,
    saved: Instant,
}

impl<'a> Checkpoints<'a> {
    /// For the run of a job that had done so much before.
    pub fn new(job: &'a Job, earlier: &'a Document, board: &'a Board, events: &'a Events) -> Self {
        Self { job, earlier, board, events, saved: Instant::now() }
    }

    /// Shows how far the engine is, and stores it where that is due.
    ///
    /// # Errors
    /// A stop where the lease is lost or the job can't be saved.
    pub async fn tick(&mut self, engine: &mut Engine) -> Result<()> {
        self.job.lease().valid().await?;
        let (documents, api) = self.board.update(self.job.member(), engine);
        show(self.events, engine, &documents, &api);
        if self.saved.elapsed() >= INTERVAL {
            self.saved = Instant::now();
            engine.flush_failures().await?;
            self.job.save(fields(engine, self.earlier)).await?;
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
