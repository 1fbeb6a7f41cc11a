//! `backfill --from-key-map`: what is known already is filled without a call.
//!
//! The candidates are read by chunks in the order of `_id`, their keys looked up
//! in the key map and written by the same guarded updates as after a call, a few
//! chunks side by side. The server would do it alone by a join and a `$merge`;
//! but that rebuilds every document, and a backfill changes one field of it.
//!
//! There is nothing to resume: what is filled is no candidate any more. Earlier
//! versions did it by `$merge`: what one of them left behind, an operation and a
//! copy of the keys, is removed by the next start.

use std::sync::Arc;
use std::time::Instant;

use bson::{Bson, Document, RawBson, doc};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

use super::beside::steer;
use super::counts::{ApiCounters, Documents, add, shown};
use super::failures::Failures;
use super::plan::{Options, default_job, identity};
use super::worker::candidates_left;
use crate::Context;
use crate::config::Target;
use crate::config::values::{Namespace, ReadPreference};
use crate::error::{Error, Result, joined};
use crate::event::Progress;
use crate::job::{Job, JobState};
use crate::key_map::{Answer, KeyMap};
use crate::mongo::Mongo;
use crate::mongo::sink::{Update, Written};
use crate::mongo::source::{Candidate, Obstacle, TargetCollection};
use crate::report::outcome::Outcome;
use crate::throttle::pace::Pace;

/// Candidates per read, and updates per command.
const CHUNK: usize = 1000;
/// Chunks whose keys are looked up and written at once.
const SIDE_BY_SIDE: usize = 4;
/// So many write refusals in a row mean that no document can be written.
const REFUSALS_IN_A_ROW: u64 = 20;
/// Failures that are shown one by one.
const SHOWN_FAILURES: u64 = 10;

/// Everything decided before the job starts.
struct Plan {
    job: String,
    identity: Document,
    collections: Vec<Arc<TargetCollection>>,
    limit: u64,
}

/// Runs the command.
///
/// # Errors
/// Usage errors and refusals; what happens after the job has started is part
/// of the outcome.
pub async fn run(context: &Context, options: &Options) -> Result<Outcome> {
    let plan = context.unless_interrupted(prepare(context, options)).await?;
    let start = Job::start(&context.mongo, &plan.job, "backfill", &plan.identity);
    let job = context.unless_interrupted(start).await?;
    let started = Instant::now();
    let key_map = KeyMap::open(&context.mongo, context.settings.key_api()?, job.name());
    let (context, pace) = (&context.of_one_run(), Arc::new(Pace::new(0)));
    let _beside = steer(context, &job, &pace);
    let failures = Failures::new(&context.mongo, job.name(), job.run(), &job.member());
    let documents = Documents::default();
    let mut fill = Fill { context, job, key_map, pace, documents, failures, refused_in_a_row: 0 };
    let result = fill.all(&plan).await;
    // Without the lease the copies may be those of whoever has it now.
    let cleared = if fill.job.lease().is_valid() { fill.drop_copies(&plan).await } else { Ok(()) };
    fill.finish(&plan, result.and(cleared), started.elapsed().as_secs_f64()).await
}

async fn prepare(context: &Context, options: &Options) -> Result<Plan> {
    let settings = &context.settings;
    let api = settings.key_api()?;
    if !settings.backfill.key_map {
        return Err(settings.error_at("backfill.key_map", "is false: there is no key map to fill from"));
    }
    let targets: Vec<Target> = settings.targets(options.target.as_deref())?;
    let mut collections = Vec::new();
    for target in &targets {
        let collection = TargetCollection::open(
            &context.mongo,
            target,
            ReadPreference::Primary,
            options.allow_collection_scan,
        )
        .await?;
        collections.push(Arc::new(collection));
    }
    Ok(Plan {
        job: options.job.clone().unwrap_or_else(|| default_job(&targets)),
        identity: identity(&targets, api),
        collections,
        limit: options.limit.unwrap_or(u64::MAX),
    })
}

/// Where the answers are copied to in a target's database: a name of this
/// job's own, so that whoever runs it next knows what to drop.
fn copy_beside(target: &Target, job: &str) -> Namespace {
    let hash: String = Sha256::digest(job).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    Namespace { database: target.namespace.database.clone(), collection: format!("mongorekey_keys_{hash}") }
}

/// Updates with what became of them.
type Chunk = Vec<(Update, Written)>;

/// Chunks that are looked up and written.
#[derive(Default)]
struct UnderWay {
    tasks: JoinSet<(u64, Result<Chunk>)>,
    /// Their documents.
    candidates: u64,
}

impl UnderWay {
    fn start(
        &mut self,
        collection: Arc<TargetCollection>,
        key_map: KeyMap,
        candidates: Vec<Candidate>,
        job: &str,
    ) {
        let (count, job) = (u64::try_from(candidates.len()).unwrap_or(u64::MAX), job.to_owned());
        self.candidates += count;
        self.tasks.spawn(async move { (count, fill(&collection, &key_map, candidates, &job).await) });
    }

    async fn next(&mut self) -> Option<Result<Chunk>> {
        let (count, chunk) = match joined(self.tasks.join_next().await?) {
            Ok(done) => done,
            Err(error) => return Some(Err(error)),
        };
        self.candidates -= count;
        Some(chunk)
    }
}

/// Writes the keys that are known.
async fn fill(
    collection: &TargetCollection,
    key_map: &KeyMap,
    candidates: Vec<Candidate>,
    job: &str,
) -> Result<Chunk> {
    let updates = known(key_map, candidates).await?;
    let results = collection.write(&updates, job).await?;
    Ok(updates.into_iter().zip(results).collect())
}

/// The updates for candidates whose key is known.
async fn known(key_map: &KeyMap, candidates: Vec<Candidate>) -> Result<Vec<Update>> {
    let texts: Vec<(String, Candidate)> =
        candidates.into_iter().filter_map(|candidate| Some((candidate.legacy.text()?, candidate))).collect();
    let keys: Vec<&str> = texts.iter().map(|(text, _)| text.as_str()).collect();
    let known = key_map.look_up(&keys).await?;
    let update = |(text, candidate): (String, Candidate)| match known.get(&text) {
        Some(remembered) if !remembered.held => match &remembered.answer {
            found @ Answer::Found(_) => Some(Update { candidate, write: found.write() }),
            Answer::NotFound | Answer::Rejected => None,
        },
        _ => None,
    };
    Ok(texts.into_iter().filter_map(update).collect())
}

/// A fill under way.
struct Fill<'a> {
    context: &'a Context,
    job: Job,
    key_map: KeyMap,
    /// Holds the next piece of work off.
    pace: Arc<Pace>,
    documents: Documents,
    failures: Failures,
    refused_in_a_row: u64,
}

impl Fill<'_> {
    fn mongo(&self) -> &Mongo {
        &self.context.mongo
    }

    fn is_stopped(&self) -> bool {
        self.context.stop.is_cancelled()
    }

    async fn all(&mut self, plan: &Plan) -> Result<()> {
        self.end_earlier_operation().await?;
        self.drop_copies(plan).await?;
        let mut waiting = Vec::new();
        for collection in &plan.collections {
            let count = collection.count().await?;
            self.documents.candidates += count;
            if count > 0 {
                waiting.push(collection);
            }
        }
        for collection in waiting {
            self.collection(collection, plan.limit).await?;
        }
        Ok(())
    }

    /// A killed client of an earlier version does not stop its operation.
    async fn end_earlier_operation(&self) -> Result<()> {
        match self.job.stored("operation") {
            Some(Bson::Document(session)) => self.mongo().end_operations(std::slice::from_ref(session)).await,
            _ => Ok(()),
        }
    }

    async fn drop_copies(&self, plan: &Plan) -> Result<()> {
        for collection in &plan.collections {
            self.mongo().drop_collection(&copy_beside(&collection.target, &plan.job)).await?;
        }
        Ok(())
    }

    /// Fills one collection, up to the last candidate that it has now.
    async fn collection(&mut self, collection: &Arc<TargetCollection>, limit: u64) -> Result<()> {
        let Some(bound) = collection.highest().await? else { return Ok(()) };
        let mut under_way = UnderWay::default();
        let result = self.chunks(collection, &bound, limit, &mut under_way).await;
        // What is under way is written, whatever happened: it counts.
        let mut last = Ok(());
        while let Some(chunk) = under_way.next().await {
            last = last.and(chunk.and_then(|chunk| self.take(collection, chunk)));
        }
        result.and(last)
    }

    async fn chunks(
        &mut self,
        collection: &Arc<TargetCollection>,
        bound: &RawBson,
        limit: u64,
        under_way: &mut UnderWay,
    ) -> Result<()> {
        let mut position: Option<RawBson> = None;
        loop {
            self.pace.free(&self.context.stop).await;
            // Each of those under way may come to be filled.
            let left = limit.saturating_sub(self.documents.filled + under_way.candidates);
            if self.is_stopped() || (left == 0 && under_way.tasks.is_empty()) {
                return Ok(());
            }
            if left == 0 || under_way.tasks.len() >= SIDE_BY_SIDE {
                if let Some(chunk) = under_way.next().await {
                    self.take(collection, chunk?)?;
                    self.show(collection);
                }
                continue;
            }
            self.job.lease().valid().await?;
            let most = CHUNK.min(usize::try_from(left).unwrap_or(CHUNK));
            let (candidates, next) = collection.chunk(position.as_ref(), bound, most, true).await?;
            let Some(next) = next else { return Ok(()) };
            position = Some(next);
            let (candidates, hindered): (Vec<_>, Vec<_>) =
                candidates.into_iter().partition(|candidate| candidate.obstacle.is_none());
            for candidate in &hindered {
                self.fail_for_obstacle(collection, candidate);
            }
            under_way.start(collection.clone(), self.key_map.clone(), candidates, self.job.name());
        }
    }

    fn take(&mut self, collection: &TargetCollection, chunk: Chunk) -> Result<()> {
        let mut result = Ok(());
        for (update, written) in chunk {
            result = result.and(self.count(collection, &update, written));
        }
        result
    }

    fn fail_for_obstacle(&mut self, collection: &TargetCollection, candidate: &Candidate) {
        if let Some(obstacle) = candidate.obstacle {
            self.fail(collection, candidate, obstacle.reason(), obstacle.description());
        }
    }

    fn fail(
        &mut self,
        collection: &TargetCollection,
        candidate: &Candidate,
        reason: &str,
        description: &str,
    ) {
        let namespace = collection.target.namespace.to_string();
        self.documents.fail(reason);
        self.failures.record(&namespace, candidate, reason, description);
        if self.documents.failed <= SHOWN_FAILURES {
            let id = crate::report::json::extended(candidate.id.as_raw_bson_ref());
            self.context.events.warn(format!("{namespace} {id}: {reason}: {description}"));
        }
    }

    fn count(&mut self, collection: &TargetCollection, update: &Update, written: Written) -> Result<()> {
        let Written::Refused { code, message } = written else {
            self.refused_in_a_row = 0;
            match written {
                Written::AlreadyFilled => self.documents.already_filled += 1,
                Written::Changed => self.documents.changed += 1,
                Written::Unwritable => {
                    let obstacle = Obstacle::UnwritablePath;
                    self.fail(collection, &update.candidate, obstacle.reason(), obstacle.description());
                }
                _ => self.documents.filled += 1,
            }
            return Ok(());
        };
        self.fail(collection, &update.candidate, "write_refused", &format!("error {code}: {message}"));
        self.refused_in_a_row += 1;
        let namespace = &collection.target.namespace;
        if self.refused_in_a_row < REFUSALS_IN_A_ROW {
            return Ok(());
        }
        Err(Error::stopped(format!(
            "{REFUSALS_IN_A_ROW} writes to {namespace} in a row were refused; the last with error {code}: {message}"
        ))
        .hint("a validator or a unique index that the keys break?"))
    }

    fn show(&self, collection: &TargetCollection) {
        self.context.events.progress(Progress {
            phase: format!("fill {}", collection.target.namespace),
            unit: "documents",
            done: self.documents.filled,
            total: Some(self.documents.candidates.max(self.documents.filled)),
            limited_by: Some("database".into()),
            detail: "from the key map, without a call".into(),
        });
    }

    async fn finish(mut self, plan: &Plan, result: Result<()>, elapsed: f64) -> Result<Outcome> {
        self.documents.candidates_left = candidates_left(self.context, &plan.collections).await;
        let result = result.and(self.failures.flush().await);
        let state = match &result {
            Err(error) => JobState::of_failure(error),
            Ok(()) if self.is_stopped() => JobState::Interrupted,
            Ok(()) if self.documents.failed > 0 => JobState::Incomplete,
            Ok(()) => JobState::Completed,
        };
        let api = ApiCounters::default().snapshot(self.documents.filled);
        let earlier = self.job.stored("totals").and_then(Bson::as_document);
        let mut this_run = self.documents.totals();
        this_run.extend(api.totals());
        let totals = add(earlier, &this_run);
        let json = json!({
            "schema": 1,
            "command": "backfill",
            "job": plan.job,
            "status": state.as_str(),
            "from_key_map": true,
            "documents": self.documents,
            "api": api,
            "elapsed_seconds": elapsed,
            "job_totals": Bson::Document(totals.clone()).into_relaxed_extjson(),
        });
        let text = text(plan, state, &self.documents, elapsed);
        let fields = doc! {
            "totals": totals,
            "documents": bson::serialize_to_bson(&self.documents).unwrap_or(Bson::Null),
            "operation": Bson::Null,
        };
        let saved = self.job.finish(state, fields).await;
        Ok(match (result.and(saved), state) {
            (Err(error), _) => Outcome::failed(json, text, error),
            (Ok(()), JobState::Interrupted) => {
                let error = self.context.interrupted("interrupted; what is filled stays filled");
                Outcome::failed(json, text, error.hint("start the same command again to go on"))
            }
            (Ok(()), JobState::Incomplete) => Outcome::not_reached(json, text),
            (Ok(()), _) => Outcome::reached(json, text),
        })
    }
}

fn text(plan: &Plan, state: JobState, documents: &Documents, elapsed: f64) -> String {
    let mut lines = vec![
        format!("backfill from the key map {} in {elapsed:.1} s, job {}", state.as_str(), plan.job),
        format!("  candidates      {:>12}", documents.candidates),
        format!("  filled          {:>12}", documents.filled),
        format!("  failed          {:>12}", documents.failed),
        format!("  candidates left {:>12}", shown(documents.candidates_left)),
    ];
    if documents.candidates_left > 0 {
        lines.push("next: `mongorekey backfill` asks for what the key map does not know".into());
    }
    lines.join("\n")
}
