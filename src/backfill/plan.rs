//! What a backfill is to do, decided before it touches anything.

use std::sync::Arc;
use std::time::Duration;

use bson::{Bson, Document, doc};
use jiff::Timestamp;

use crate::config::file::KeyApi;
use crate::config::values::{Concurrency, Tps};
use crate::config::{Backfill, Settings, Target};
use crate::error::{Error, Result};
use crate::key_api::client::Client;
use crate::key_map;
use crate::mongo::Mongo;
use crate::mongo::index::stored_count;
use crate::mongo::source::TargetCollection;
use crate::throttle::window::{Schedule, TimeZoneName, Window};

/// Keys are shared out in 64 parts; more workers than a quarter of that would
/// have uneven shares.
const MOST_WORKERS: usize = 16;

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
    /// Documents to do first, one by one for the operator to look at.
    pub canary: Option<u64>,
    /// Go on after the canary without asking.
    pub yes: bool,
    /// Workers in this process.
    pub workers: Option<usize>,
    /// Join those who run the job already.
    pub join: bool,
}

/// Everything decided before the job starts.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) job: String,
    pub(super) identity: Document,
    pub(super) api: KeyApi,
    pub(super) collections: Vec<Arc<TargetCollection>>,
    pub(super) tps: Tps,
    pub(super) chunk: usize,
    pub(super) concurrency: Concurrency,
    pub(super) windows: Option<Schedule>,
    pub(super) time_zone: TimeZoneName,
    pub(super) max_calls_per_day: u64,
    pub(super) limit: u64,
}

/// Decides everything; touches nothing.
///
/// # Errors
/// Usage errors and refusals.
pub(super) async fn prepare(mongo: &Mongo, settings: &Settings, options: &Options) -> Result<Plan> {
    let api = settings.key_api()?.clone();
    check_unique_keys(settings, &api)?;
    let targets = settings.targets(options.target.as_deref())?;
    let backfill = &settings.backfill;
    let chunk = options.chunk.unwrap_or(backfill.chunk);
    if !(1..=100_000).contains(&chunk) {
        return Err(Error::usage("--chunk must be from 1 to 100000"));
    }
    check_workers(options, backfill)?;
    // What can't be sent is found out before the job begins.
    Client::new(api.clone(), 1, "")?;
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
    let schedule = Schedule::new(windows, zone.clone());
    check_windows(schedule.as_ref(), api.timeout.0)?;
    Ok(Plan {
        job: options.job.clone().unwrap_or_else(|| default_job(&targets)),
        identity: identity(&targets, &api),
        concurrency: options.concurrency.unwrap_or(backfill.concurrency),
        api,
        collections,
        tps,
        chunk,
        windows: schedule,
        time_zone: zone,
        max_calls_per_day: backfill.max_calls_per_day,
        limit: options.limit.unwrap_or(u64::MAX),
    })
}

impl Plan {
    /// What the run is started with, for those who steer it.
    pub(super) fn settings(&self) -> Document {
        doc! {"settings": {
            "tps": self.tps.per_second(),
            "chunk": stored_count(u64::try_from(self.chunk).unwrap_or(u64::MAX)),
            "concurrency": self.concurrency.to_string(),
        }}
    }

    /// Calls in flight that a worker may have.
    pub(super) fn slots(&self, concurrency: Concurrency, tps: Tps) -> usize {
        concurrency.slots(tps, self.api.timeout.0)
    }
}

/// A call may take as long as its timeout: a shorter window never sees one.
fn check_windows(windows: Option<&Schedule>, timeout: Duration) -> Result<()> {
    match windows {
        Some(windows) if windows.next_opening(Timestamp::now(), timeout) == Timestamp::MAX => {
            Err(Error::usage("no window is longer than `key_api.timeout`: no call could ever be made")
                .hint("make the windows longer or the timeout shorter"))
        }
        _ => Ok(()),
    }
}

fn check_workers(options: &Options, backfill: &Backfill) -> Result<()> {
    let several = options.join || options.workers.is_some_and(|workers| workers > 1);
    if several && backfill.max_calls_per_day > 0 {
        return Err(Error::usage("`backfill.max_calls_per_day` is counted by one worker only")
            .hint("leave --workers and --join out, or set it to 0"));
    }
    if several && !backfill.key_map {
        return Err(Error::usage("--workers and --join need the key map: workers learn of answers by it")
            .hint("set `backfill.key_map = true`"));
    }
    if several && (options.limit.is_some() || options.canary.is_some()) {
        return Err(Error::usage("--limit and --canary are for a single worker"));
    }
    if options.workers.is_some_and(|workers| !(1..=MOST_WORKERS).contains(&workers)) {
        return Err(Error::usage(format!("--workers must be from 1 to {MOST_WORKERS}")));
    }
    Ok(())
}

/// A setting that is not acted upon would be a broken promise.
fn check_unique_keys(settings: &Settings, api: &KeyApi) -> Result<()> {
    if api.unique_keys && !settings.backfill.key_map {
        return Err(settings
            .error_at("key_api.unique_keys", "needs the key map, which tells whose new key it is")
            .hint("set `backfill.key_map = true`"));
    }
    Ok(())
}

/// The name under which the job of these targets is found again.
pub fn default_job(targets: &[Target]) -> String {
    let names: Vec<String> = targets.iter().map(|target| target.namespace.to_string()).collect();
    format!("backfill-{}", names.join("+"))
}

/// What the job does, as opposed to how fast.
pub fn identity(targets: &[Target], api: &KeyApi) -> Document {
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
