//! `backfill --from-key-map`: what is known already is filled within the
//! database, without a call and without moving a document to this machine.
//!
//! The found answers are copied beside each target once, because a join sees
//! one database only; then the candidates are filled by ranges of `_id`, each in
//! one operation. A range that the server refuses as a whole, for one document
//! that breaks a validator, is written document by document, and so is a
//! collection with a collation, where a join would take one key for another.
//!
//! There is nothing to resume: what is filled is no candidate any more. An
//! operation that outlived its process is ended by the next start, which finds
//! its session in the job.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bson::{Bson, Document, RawBson, doc};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::beside::steer;
use super::counts::{ApiCounters, Documents, add};
use super::plan::{Options, default_job, identity};
use crate::Context;
use crate::config::Target;
use crate::config::values::{Namespace, ReadPreference};
use crate::error::{Context as _, Error, Result, describe_mongo};
use crate::event::Progress;
use crate::job::{Job, JobState};
use crate::key_map::{Answer, KeyMap};
use crate::mongo::Mongo;
use crate::mongo::command::is_transient;
use crate::mongo::operation::Operation;
use crate::mongo::sink::{Update, Written};
use crate::mongo::source::{Candidate, TargetCollection};
use crate::report::outcome::Outcome;
use crate::throttle::pace::Pace;

/// Candidates per operation: one or two seconds of work, so that a signal, a
/// lost lease or an election costs little.
const RANGE: u64 = 20_000;
/// Candidates per read where documents are written one by one.
const CHUNK: usize = 1000;
/// Attempts per operation; elections and network errors pass.
const ATTEMPTS: u32 = 8;
/// How long an operation may go on after the first signal.
const GRACE: Duration = Duration::from_secs(5);
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
    let mut fill = Fill { context, job, key_map, pace, documents: Documents::default(), refused_in_a_row: 0 };
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

/// A fill under way.
struct Fill<'a> {
    context: &'a Context,
    job: Job,
    key_map: KeyMap,
    /// Holds the next piece of work off.
    pace: Arc<Pace>,
    documents: Documents,
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
        let mut copied: Vec<Namespace> = Vec::new();
        for collection in waiting {
            let copy = copy_beside(&collection.target, &plan.job);
            if !collection.has_collation && !copied.contains(&copy) && !self.is_stopped() {
                self.copy_keys(&copy).await?;
                copied.push(copy.clone());
            }
            self.collection(collection, &copy.collection, plan.limit).await?;
        }
        Ok(())
    }

    /// A killed client does not stop its operation.
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

    async fn copy_keys(&self, copy: &Namespace) -> Result<()> {
        let from = self.key_map.namespace();
        self.context.events.note(format!("copying the found keys to {copy}, for as long as this run takes"));
        let run = async |operation: &mut Operation| {
            self.mongo().copy_found_keys(operation, &from, copy, self.job.name()).await
        };
        match self.operation(run).await? {
            Some(Err(error)) => Err(error).during(format!("copying the key map to {copy}")),
            _ => Ok(()),
        }
    }

    /// Runs an operation on a session that is recorded before. It is sent again
    /// after what passes; other failures are given back. `None`: a signal came.
    async fn operation(
        &self,
        mut run: impl AsyncFnMut(&mut Operation) -> mongodb::error::Result<()>,
    ) -> Result<Option<mongodb::error::Result<()>>> {
        for attempt in 1.. {
            self.job.lease().valid().await?;
            let mut operation = self.mongo().operation().await?;
            let session = operation.id();
            self.job.save(doc! {"operation": session.clone()}).await?;
            let (result, interrupted) = self.until_stopped(run(&mut operation), &session).await;
            match result {
                Err(_) if interrupted => return Ok(None),
                Err(error) if is_transient(&error) => {
                    // It may still run, without anybody who waits for it.
                    self.mongo().end_operations(&[session]).await?;
                    if attempt == ATTEMPTS {
                        return Ok(Some(Err(error)));
                    }
                    let error = describe_mongo(&error);
                    tracing::warn!(error, "the operation is sent again");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                result => return Ok(Some(result)),
            }
        }
        Ok(None)
    }

    /// After a signal an operation may finish within a moment, else its session
    /// is killed. Either way it is awaited.
    async fn until_stopped(
        &self,
        run: impl Future<Output = mongodb::error::Result<()>>,
        session: &Document,
    ) -> (mongodb::error::Result<()>, bool) {
        let mut run = std::pin::pin!(run);
        tokio::select! {
            result = &mut run => return (result, false),
            () = async { self.context.stop.cancelled().await; tokio::time::sleep(GRACE).await } => {}
        }
        let (killed, result) = tokio::join!(self.mongo().end_operations(std::slice::from_ref(session)), run);
        if let Err(error) = killed {
            tracing::warn!(%error, "the interrupted operation could not be ended");
        }
        (result, true)
    }

    /// Fills one collection, up to the last candidate that it has now.
    async fn collection(&mut self, collection: &TargetCollection, keys: &str, limit: u64) -> Result<()> {
        let Some(bound) = collection.highest().await? else { return Ok(()) };
        let mut last: Option<RawBson> = None;
        loop {
            self.pace.free(&self.context.stop).await;
            let left = limit.saturating_sub(self.documents.filled);
            if self.is_stopped() || left == 0 {
                return Ok(());
            }
            let next = collection.nth_after(last.as_ref(), &bound, RANGE.min(left)).await?;
            let is_last = next.is_none();
            let end = next.unwrap_or_else(|| bound.clone());
            self.range(collection, keys, last.as_ref(), &end).await?;
            self.show(collection);
            if is_last {
                return Ok(());
            }
            last = Some(end);
        }
    }

    async fn range(
        &mut self,
        collection: &TargetCollection,
        keys: &str,
        last: Option<&RawBson>,
        end: &RawBson,
    ) -> Result<()> {
        if collection.has_collation {
            return self.one_by_one(collection, last, end).await;
        }
        let before = collection.count_between(last, end).await?;
        let candidates = collection.between(last, end)?;
        let run = async |operation: &mut Operation| {
            let job = self.job.name();
            collection.fill_from(self.mongo(), operation, keys, candidates.clone(), job).await
        };
        let result = self.operation(run).await?;
        // `$merge` does not say what it wrote. What the application filled within
        // the same second counts as ours.
        let after = collection.count_between(last, end).await?;
        self.documents.filled += before.saturating_sub(after);
        match result {
            Some(Err(error)) => {
                let (namespace, error) = (&collection.target.namespace, describe_mongo(&error));
                tracing::info!(error, %namespace, "a range was refused as a whole; writing one by one");
                self.one_by_one(collection, last, end).await
            }
            Some(Ok(())) | None => Ok(()),
        }
    }

    async fn one_by_one(
        &mut self,
        collection: &TargetCollection,
        last: Option<&RawBson>,
        end: &RawBson,
    ) -> Result<()> {
        let mut position = last.cloned();
        loop {
            self.pace.free(&self.context.stop).await;
            if self.is_stopped() {
                break;
            }
            self.job.lease().valid().await?;
            let (candidates, next) = collection.chunk(position.as_ref(), end, CHUNK, true).await?;
            let Some(next) = next else { break };
            let updates = self.known(candidates).await?;
            let results = collection.write(&updates, self.job.name()).await?;
            for (update, written) in updates.iter().zip(results) {
                self.count(collection, update, written)?;
            }
            position = Some(next);
        }
        Ok(())
    }

    /// The updates for candidates whose key is known.
    async fn known(&self, candidates: Vec<Candidate>) -> Result<Vec<Update>> {
        let texts: Vec<(String, Candidate)> = candidates
            .into_iter()
            .filter(|candidate| candidate.writable)
            .filter_map(|candidate| Some((candidate.legacy.text()?, candidate)))
            .collect();
        let keys: Vec<&str> = texts.iter().map(|(text, _)| text.as_str()).collect();
        let known = self.key_map.look_up(&keys).await?;
        let update = |(text, candidate): (String, Candidate)| match known.get(&text) {
            Some(remembered) if !remembered.held => match &remembered.answer {
                found @ Answer::Found(_) => Some(Update { candidate, write: found.write() }),
                Answer::NotFound | Answer::Rejected => None,
            },
            _ => None,
        };
        Ok(texts.into_iter().filter_map(update).collect())
    }

    fn count(&mut self, collection: &TargetCollection, update: &Update, written: Written) -> Result<()> {
        let Written::Refused { code, message } = written else {
            self.refused_in_a_row = 0;
            match written {
                Written::AlreadyFilled => self.documents.already_filled += 1,
                Written::Changed => self.documents.changed += 1,
                _ => self.documents.filled += 1,
            }
            return Ok(());
        };
        self.documents.fail("write_refused");
        self.refused_in_a_row += 1;
        let namespace = &collection.target.namespace;
        if self.documents.failed <= SHOWN_FAILURES {
            let id = crate::report::json::extended(update.candidate.id.as_raw_bson_ref());
            self.context.events.warn(format!("{namespace} {id}: write_refused: error {code}: {message}"));
        }
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
        for collection in &plan.collections {
            self.documents.candidates_left += collection.count().await.unwrap_or(0);
        }
        let state = match &result {
            Err(_) => JobState::Stopped,
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
        format!("  candidates left {:>12}", documents.candidates_left),
    ];
    if documents.candidates_left > 0 {
        lines.push("next: `mongorekey backfill` asks for what the key map does not know".into());
    }
    lines.join("\n")
}
