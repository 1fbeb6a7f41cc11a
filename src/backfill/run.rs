//! The backfill from its first check to its last count: order and policy.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use bson::{Bson, DateTime, Document, doc};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::asker::Asker;
use super::counts::{Api, ApiCounters, Documents, add};
use super::engine::{Engine, Parts};
use super::reader::{Ending, Pass, read_ahead};
use crate::Context;
use crate::config::file::KeyApi;
use crate::config::values::{Concurrency, Tps};
use crate::config::{Settings, Target};
use crate::error::{Error, Result, joined};
use crate::event::{Events, Progress};
use crate::job::{Job, JobState};
use crate::key_api::client::Client;
use crate::key_map::{self, KeyMap};
use crate::mongo::Mongo;
use crate::mongo::source::TargetCollection;
use crate::report::outcome::Outcome;
use crate::throttle::pacer::Pacer;
use crate::throttle::window::{Schedule, TimeZoneName, Window};

/// How often counters are stored while a run is under way.
const CHECKPOINT: Duration = Duration::from_secs(2);
/// After a takeover no call leaves for this long: the dead holder's last calls
/// must be out of every window of a second.
const TAKEOVER_WAIT: Duration = Duration::from_secs(1);
/// The first pass, and one more over what appeared or failed meanwhile.
const PASSES: usize = 2;
/// A pass reads at most so many times the candidates at its start. Documents
/// inserted at random below its end are candidates too and are taken along, but
/// not without limit.
const LONGEST_PASS: u64 = 2;

/// What the options ask for; anything absent is as configured.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Name of the job.
    pub job: Option<String>,
    /// Calls per second.
    pub tps: Option<Tps>,
    /// Candidates per read.
    pub chunk: Option<usize>,
    /// Calls in flight.
    pub concurrency: Option<Concurrency>,
    /// Windows, replacing the configured ones.
    pub windows: Vec<Window>,
    /// Time zone of the windows.
    pub time_zone: Option<TimeZoneName>,
    /// One target only.
    pub target: Option<String>,
    /// Documents at most.
    pub limit: Option<u64>,
    /// Count only.
    pub dry_run: bool,
    /// Go on without the partial index.
    pub allow_collection_scan: bool,
    /// Fill from the key map alone, within the database.
    pub from_key_map: bool,
}

/// Everything decided before the job starts.
struct Plan {
    job: String,
    identity: Document,
    api: KeyApi,
    collections: Vec<Arc<TargetCollection>>,
    tps: Tps,
    chunk: usize,
    slots: usize,
    windows: Option<Schedule>,
    limit: u64,
}

/// Runs the command.
///
/// # Errors
/// Usage errors and refusals; what happens after the job has started is part
/// of the outcome.
pub async fn run(context: &Context, options: &Options) -> Result<Outcome> {
    if options.from_key_map && !options.dry_run {
        return super::from_key_map::run(context, options).await;
    }
    let plan = context.unless_interrupted(prepare(&context.mongo, &context.settings, options)).await?;
    if options.dry_run {
        return context.unless_interrupted(dry_run(&plan)).await;
    }
    let start = Job::start(&context.mongo, &plan.job, "backfill", &plan.identity);
    let job = context.unless_interrupted(start).await?;
    if job.was_taken_over() {
        context.events.note(format!("took over the job {} from a process that is gone", job.name()));
    }
    let mut run = Run::new(context, &plan, job)?;
    let result = run.all_targets(&plan).await;
    run.finish(&plan, result).await
}

async fn prepare(mongo: &Mongo, settings: &Settings, options: &Options) -> Result<Plan> {
    let api = settings.key_api()?.clone();
    refuse_unsupported(settings, &api)?;
    let targets = settings.targets(options.target.as_deref())?;
    let backfill = &settings.backfill;
    let chunk = options.chunk.unwrap_or(backfill.chunk);
    if !(1..=100_000).contains(&chunk) {
        return Err(Error::usage("--chunk must be from 1 to 100000"));
    }
    let mut collections = Vec::new();
    for target in &targets {
        let collection =
            TargetCollection::open(mongo, target, backfill.read_preference, options.allow_collection_scan)
                .await?;
        collections.push(Arc::new(collection));
    }
    let tps = options.tps.unwrap_or(backfill.tps);
    let windows = if options.windows.is_empty() { backfill.windows.clone() } else { options.windows.clone() };
    let zone = options.time_zone.clone().unwrap_or_else(|| backfill.time_zone.clone());
    Ok(Plan {
        job: options.job.clone().unwrap_or_else(|| default_job(&targets)),
        identity: identity(&targets, &api),
        slots: options.concurrency.unwrap_or(backfill.concurrency).slots(tps, api.timeout.0),
        api,
        collections,
        tps,
        chunk,
        windows: Schedule::new(windows, zone),
        limit: options.limit.unwrap_or(u64::MAX),
    })
}

/// A setting that is understood but not acted upon would be a broken promise.
fn refuse_unsupported(settings: &Settings, api: &KeyApi) -> Result<()> {
    for (is_set, key) in [
        (api.batch.is_some(), "key_api.batch"),
        (api.unique_keys, "key_api.unique_keys"),
        (settings.backfill.max_calls_per_day > 0, "backfill.max_calls_per_day"),
    ] {
        if is_set {
            return Err(settings
                .error_at(key, "is not supported by this version")
                .hint("remove it from the config"));
        }
    }
    Ok(())
}

/// The name under which the job of these targets is found again.
pub fn default_job(targets: &[Target]) -> String {
    let names: Vec<String> = targets.iter().map(|target| target.namespace.to_string()).collect();
    format!("backfill-{}", names.join("+"))
}

/// What the job does, as opposed to how fast.
pub(crate) fn identity(targets: &[Target], api: &KeyApi) -> Document {
    let targets: Vec<Bson> = targets
        .iter()
        .map(|target| {
            Bson::Document(doc! {
                "collection": target.namespace.to_string(),
                "legacy_field": target.legacy_field.as_str(),
                "key_field": target.key_field.as_str(),
                "flag_field": target.flag_field.as_str(),
                "filter": Bson::Document(target.filter.0.clone()).into_canonical_extjson().to_string(),
            })
        })
        .collect();
    doc! {"targets": targets, "api": key_map::shown_api(api)}
}

async fn dry_run(plan: &Plan) -> Result<Outcome> {
    let mut documents = Documents::default();
    for collection in &plan.collections {
        documents.candidates += collection.count().await?;
    }
    documents.candidates_left = documents.candidates;
    let text = format!(
        "dry run: {} candidates, nothing was called or written\n`mongorekey plan` tells how many calls they need",
        documents.candidates
    );
    let mut json = summary(plan, "completed", &documents, &Api::default(), 0.0);
    json["dry_run"] = json!(true);
    Ok(Outcome::reached(json, text))
}

/// A job under way.
struct Run<'a> {
    context: &'a Context,
    engine: Engine,
    job: Job,
    key_map: Option<KeyMap>,
    stop: CancellationToken,
    started: Instant,
    started_at: DateTime,
    /// What earlier runs of the job had done.
    earlier: Option<Document>,
}

impl<'a> Run<'a> {
    fn new(context: &'a Context, plan: &Plan, job: Job) -> Result<Self> {
        let settings = &context.settings;
        let first_wait = if job.was_taken_over() { TAKEOVER_WAIT } else { Duration::ZERO };
        let stop = context.stop.child_token();
        let asker = Arc::new(Asker {
            client: Client::new(plan.api.clone(), plan.slots, job.name())?,
            pacer: Pacer::new(plan.tps, first_wait, plan.windows.clone(), plan.api.timeout.0),
            lease: job.lease().clone(),
            queued: AtomicUsize::new(0),
            counters: ApiCounters::default(),
            stop: stop.child_token(),
        });
        let key_map = settings.backfill.key_map.then(|| KeyMap::open(&context.mongo, &plan.api, job.name()));
        let parts = Parts {
            asker,
            key_map: key_map.clone(),
            slots: plan.slots,
            job: job.name().to_owned(),
            max_not_found_share: settings.backfill.max_not_found_share.0,
            max_no_legacy_key_share: settings.backfill.max_no_legacy_key_share.0,
            tps: plan.tps.per_second(),
            events: context.events.clone(),
            stop: stop.clone(),
        };
        let first =
            plan.collections.first().cloned().ok_or_else(|| Error::usage("no target is configured"))?;
        Ok(Self {
            context,
            engine: Engine::new(parts, first),
            earlier: job.stored("totals").and_then(Bson::as_document).cloned(),
            job,
            key_map,
            stop,
            started: Instant::now(),
            started_at: DateTime::now(),
        })
    }

    async fn all_targets(&mut self, plan: &Plan) -> Result<()> {
        for collection in &plan.collections {
            self.engine.documents_mut().candidates += collection.count().await?;
        }
        for collection in &plan.collections {
            self.engine.switch_to(collection.clone());
            self.all_passes(plan, collection).await?;
            if self.stop.is_cancelled() {
                // Flags that the guard has not judged stay held; the next run judges them.
                return Ok(());
            }
        }
        self.engine.finish().await
    }

    /// What is inserted while a pass runs waits for the next; after the second
    /// it is left to a later run, so that the job ends however busy the
    /// application is.
    async fn all_passes(&mut self, plan: &Plan, collection: &Arc<TargetCollection>) -> Result<()> {
        let before = self.engine.documents().clone();
        let mut after = None;
        for pass in 1..=PASSES {
            let left = plan.limit.saturating_sub(self.engine.documents().settled());
            let count = collection.count().await?;
            let failed = self.engine.documents().failed - before.failed;
            // After the first pass the held flags and the failures still are candidates.
            let known = if pass == 1 { 0 } else { failed + self.engine.held() };
            if left == 0 || count <= known || self.stop.is_cancelled() {
                return Ok(());
            }
            if pass > 1 {
                self.engine.finish().await?;
                if after.is_none() {
                    self.engine.documents_mut().forget_failures_since(&before);
                }
            }
            let Some(bound) = collection.highest().await? else { return Ok(()) };
            let most = count.saturating_mul(LONGEST_PASS).min(left);
            // A pass that was cut goes on where it stopped: what was there first comes first.
            after = match self.pass(collection, Pass { after, bound, most, chunk: plan.chunk }).await? {
                Ending::Whole => None,
                Ending::Cut(position) => Some(position),
            };
        }
        Ok(())
    }

    async fn pass(&mut self, collection: &Arc<TargetCollection>, pass: Pass) -> Result<Ending> {
        let (chunks, reading) = read_ahead(collection.clone(), pass, self.stop.clone());
        let (job, earlier, events) = (&self.job, self.earlier.as_ref(), &self.context.events);
        let mut saved = Instant::now();
        self.engine
            .pass(chunks, async |engine: &Engine| {
                job.lease().valid().await?;
                show(events, engine);
                if saved.elapsed() >= CHECKPOINT {
                    saved = Instant::now();
                    job.save(checkpoint(engine, earlier)).await?;
                }
                Ok(())
            })
            .await?;
        joined(reading.await)
    }

    async fn finish(mut self, plan: &Plan, result: Result<()>) -> Result<Outcome> {
        if self.engine.distrusts_answers()
            && let Some(key_map) = &self.key_map
        {
            let forgotten = key_map.forget_negatives(self.started_at).await?;
            self.context
                .events
                .note(format!("{forgotten} distrusted answers were forgotten and will be asked for again"));
        }
        let mut left = 0;
        for collection in &plan.collections {
            left += collection.count().await.unwrap_or(0);
        }
        self.engine.documents_mut().candidates_left = left;
        let documents = self.engine.documents().clone();
        let state = match &result {
            Err(_) => JobState::Stopped,
            Ok(()) if self.context.stop.is_cancelled() => JobState::Interrupted,
            Ok(()) if documents.failed > 0 => JobState::Incomplete,
            Ok(()) => JobState::Completed,
        };
        let fields = checkpoint(&self.engine, self.earlier.as_ref());
        let totals = fields.get_document("totals").cloned().unwrap_or_default();
        let elapsed = self.started.elapsed().as_secs_f64();
        let mut json = summary(plan, state.as_str(), &documents, &self.engine.api(), elapsed);
        json["job_totals"] = Bson::Document(totals).into_relaxed_extjson();
        let text = text(&plan.job, state, &documents, &self.engine.api(), elapsed);
        let saved = self.job.finish(state, fields).await;
        Ok(match (result.and(saved), state) {
            (Err(error), _) => Outcome::failed(json, text, error),
            (Ok(()), JobState::Interrupted) => {
                let error = self.context.interrupted("interrupted; everything answered is written");
                Outcome::failed(json, text, error.hint("start the same command again to go on"))
            }
            (Ok(()), JobState::Incomplete) => Outcome::not_reached(json, text),
            (Ok(()), _) => Outcome::reached(json, text),
        })
    }
}

fn checkpoint(engine: &Engine, earlier: Option<&Document>) -> Document {
    let mut this_run = engine.documents().totals();
    this_run.extend(engine.api().totals());
    let mut fields = doc! {
        "totals": add(earlier, &this_run),
        "documents": bson::serialize_to_bson(engine.documents()).unwrap_or(Bson::Null),
        "limited_by": engine.limited_by(),
    };
    if let Some(position) = engine.position().and_then(|position| Bson::try_from(position.clone()).ok()) {
        fields.insert("position", position);
    }
    fields
}

fn show(events: &Events, engine: &Engine) {
    let (documents, api) = (engine.documents(), engine.api());
    let retries = if api.retries > 0 { format!(", {} retries", api.retries) } else { String::new() };
    let failed = if documents.failed > 0 { format!(", {} failed", documents.failed) } else { String::new() };
    events.progress(Progress {
        phase: "backfill".into(),
        unit: "documents",
        done: documents.settled(),
        total: Some(documents.candidates.max(documents.settled())),
        limited_by: Some(engine.limited_by()),
        detail: format!(
            "{} filled, {} flagged{failed}; {} calls{retries}, {} keys from the key map",
            documents.filled, documents.flagged, api.calls, api.from_key_map
        ),
    });
}

fn summary(plan: &Plan, status: &str, documents: &Documents, api: &Api, elapsed: f64) -> serde_json::Value {
    json!({
        "schema": 1,
        "command": "backfill",
        "job": plan.job,
        "status": status,
        "documents": documents,
        "api": api,
        "elapsed_seconds": elapsed,
    })
}

fn text(job: &str, state: JobState, documents: &Documents, api: &Api, elapsed: f64) -> String {
    let reasons = |counts: &std::collections::BTreeMap<String, u64>| {
        let parts: Vec<String> = counts.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        if parts.is_empty() { String::new() } else { format!("  ({})", parts.join(", ")) }
    };
    let mut lines = vec![
        format!("backfill {} in {elapsed:.1} s, job {job}", state.as_str()),
        format!("  candidates      {:>12}", documents.candidates),
        format!("  filled          {:>12}", documents.filled),
        format!("  flagged         {:>12}{}", documents.flagged, reasons(&documents.flagged_by)),
        format!("  already filled  {:>12}", documents.already_filled),
        format!("  failed          {:>12}{}", documents.failed, reasons(&documents.failed_by)),
        format!("  candidates left {:>12}", documents.candidates_left),
        format!(
            "  API calls       {:>12}  ({} of them retries; {} keys answered by the key map)",
            api.calls, api.retries, api.from_key_map
        ),
    ];
    if documents.changed > 0 {
        lines.push(format!(
            "  changed         {:>12}  (deleted, or another legacy key meanwhile)",
            documents.changed
        ));
    }
    lines.join("\n")
}
