//! The configuration file, key by key, as design and README describe it.
//!
//! Unknown keys are errors everywhere: a mistyped `max_not_found_shar` must not
//! silently leave a guard at its default.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::values::{
    Concurrency, ExtendedJson, FieldPath, HumanDuration, JsonPointer, Namespace, Pattern, ReadPreference,
    Secret, Share, Tps,
};
use crate::throttle::window::{TimeZoneName, Window};

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Where the data and our own state live.
    pub mongodb: Option<Mongodb>,
    /// The API that knows the keys.
    pub key_api: Option<KeyApi>,
    /// What to fill and how fast.
    #[serde(default)]
    pub backfill: Backfill,
    /// What to copy and what to leave behind.
    pub cleanse: Option<Cleanse>,
}

/// `[mongodb]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mongodb {
    /// Connection string.
    pub uri: Option<Secret>,
    /// Database of jobs, checkpoints and the key map.
    #[serde(default = "default_state_database")]
    pub state_database: String,
}

/// The default of `mongodb.state_database`.
pub fn default_state_database() -> String {
    "mongorekey".into()
}

/// `[key_api]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyApi {
    /// Address with `{key}` where the percent-encoded legacy key goes.
    pub url: String,
    /// `GET` or `POST`; with a batch always `POST`, and so by default.
    #[serde(default)]
    pub method: Method,
    /// Body of a POST, with `{key_json}` where the legacy key goes as a JSON string.
    pub body: Option<String>,
    /// Sent with every call; values are secrets.
    #[serde(default)]
    pub headers: BTreeMap<String, Secret>,
    /// Where the new key stands in a 2xx answer.
    #[serde(default = "default_key_pointer")]
    pub key_pointer: JsonPointer,
    /// Where the answer repeats the key it was asked for.
    pub echo_pointer: Option<JsonPointer>,
    /// What a new key looks like.
    pub key_pattern: Option<Pattern>,
    /// Statuses that mean "there is no new key"; not asked of the items of a batch.
    #[serde(default = "default_not_found_status")]
    pub not_found_status: Vec<u16>,
    /// Further proof of "there is no new key", any of which suffices.
    #[serde(default)]
    pub not_found_when: Vec<PointerEquals>,
    /// Limit of one call, from connecting to the last byte.
    #[serde(default = "default_timeout")]
    pub timeout: HumanDuration,
    /// Attempts per key and run before it counts as failed.
    #[serde(default = "default_max_attempts")]
    pub max_attempts: u32,
    /// Name of the header that carries a key's idempotency key.
    pub idempotency_header: Option<String>,
    /// Whether one new key for two legacy keys is an error.
    #[serde(default)]
    pub unique_keys: bool,
    /// PEM file with certificate authorities to trust besides the bundled ones.
    pub ca_file: Option<PathBuf>,
    /// PEM file with the certificate, and its chain, that we show to the API.
    pub client_cert_file: Option<PathBuf>,
    /// PEM file with the private key of that certificate.
    pub client_key_file: Option<PathBuf>,
    /// URL of a proxy for all calls, perhaps with credentials; none: no proxy,
    /// whatever the environment says.
    pub proxy: Option<Secret>,
    /// Many keys per call.
    pub batch: Option<Batch>,
}

impl KeyApi {
    /// A GET of the given URL template, everything else at its default.
    pub fn for_url(url: &str) -> Self {
        Self {
            url: url.into(),
            method: Method::Get,
            body: None,
            headers: BTreeMap::new(),
            key_pointer: default_key_pointer(),
            echo_pointer: None,
            key_pattern: None,
            not_found_status: default_not_found_status(),
            not_found_when: Vec::new(),
            timeout: default_timeout(),
            max_attempts: default_max_attempts(),
            idempotency_header: None,
            unique_keys: false,
            ca_file: None,
            client_cert_file: None,
            client_key_file: None,
            proxy: None,
            batch: None,
        }
    }
}

/// `[key_api.batch]`: the pointers of `[key_api]` apply within each item.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// Most keys per call, from 1 to 10,000.
    pub size: usize,
    /// Body with `{keys_json}`, where the legacy keys go as a JSON array of strings.
    pub body: String,
    /// Where the array of answers stands.
    pub items_pointer: JsonPointer,
}

/// One entry of `not_found_when`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointerEquals {
    /// Where to look in the answer.
    pub pointer: JsonPointer,
    /// What must stand there.
    pub equals: serde_json::Value,
}

/// HTTP methods that a key API may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Method {
    /// The key stands in the URL.
    #[default]
    Get,
    /// The key stands in the body.
    Post,
}

/// `[backfill]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Backfill {
    /// Collections to fill.
    pub targets: Vec<Target>,
    /// Ceiling of calls per second.
    pub tps: Tps,
    /// Candidates per read.
    pub chunk: usize,
    /// Calls in flight.
    pub concurrency: Concurrency,
    /// Times of day at which calls may be made; none: always.
    pub windows: Vec<Window>,
    /// Time zone of the windows.
    pub time_zone: TimeZoneName,
    /// Whether answers are remembered.
    pub key_map: bool,
    /// Where candidates are read.
    pub read_preference: ReadPreference,
    /// Lag above which to slow down.
    pub max_replication_lag: HumanDuration,
    /// 95th percentile of the API's latency above which to slow down.
    pub max_api_latency: HumanDuration,
    /// Share of not-found answers that stops the job.
    pub max_not_found_share: Share,
    /// Share of documents without a usable legacy key that stops the job.
    pub max_no_legacy_key_share: Share,
    /// Calls per day; 0 is no limit.
    pub max_calls_per_day: u64,
}

impl Default for Backfill {
    fn default() -> Self {
        Self {
            targets: Vec::new(),
            tps: Tps::new(10.0).expect("10 is a valid rate"),
            chunk: 1000,
            concurrency: Concurrency::Auto,
            windows: Vec::new(),
            time_zone: TimeZoneName::default(),
            key_map: true,
            read_preference: ReadPreference::default(),
            max_replication_lag: default_max_replication_lag(),
            max_api_latency: HumanDuration(Duration::from_secs(2)),
            max_not_found_share: Share(0.5),
            max_no_legacy_key_share: Share(0.5),
            max_calls_per_day: 0,
        }
    }
}

/// `[[backfill.targets]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Name of the target, used in the index's name and in `--target`.
    pub name: Option<String>,
    /// The collection to fill.
    pub collection: Namespace,
    /// Field that holds the legacy key.
    pub legacy_field: FieldPath,
    /// Field that receives the new key.
    pub key_field: FieldPath,
    /// Field that receives the flag of a document that can't have a new key.
    pub flag_field: FieldPath,
    /// Further condition on candidates.
    #[serde(default)]
    pub filter: ExtendedJson,
}

/// `[cleanse]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cleanse {
    /// The collection to copy from.
    pub source: Namespace,
    /// The collection to copy to, in the same database.
    pub to: Option<String>,
    /// Documents to keep; none: all.
    #[serde(default)]
    pub keep: ExtendedJson,
    /// Documents to leave behind, by named rules.
    #[serde(default)]
    pub reject: Vec<RejectRule>,
    /// Documents to leave behind because nothing refers to them.
    #[serde(default)]
    pub exists_in: Vec<ExistsIn>,
    /// Keep only the newest document per key.
    pub dedupe: Option<Dedupe>,
    /// Documents per second to copy and to catch up with; 0 is no limit.
    #[serde(default)]
    pub documents_per_second: u32,
    /// Lag above which to pause.
    #[serde(default = "default_max_replication_lag")]
    pub max_replication_lag: HumanDuration,
}

/// One entry of `cleanse.reject`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RejectRule {
    /// Name in counts and samples.
    pub name: String,
    /// Condition under which a document is left behind.
    pub when: ExtendedJson,
}

/// One entry of `cleanse.exists_in`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExistsIn {
    /// Name in counts and samples.
    pub name: String,
    /// The collection that must know the document.
    pub collection: Namespace,
    /// Field of the source.
    pub local: FieldPath,
    /// Field of the other collection; `_id` allowed.
    pub foreign: String,
}

/// `cleanse.dedupe`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dedupe {
    /// Fields that name the same thing.
    pub by: Vec<FieldPath>,
    /// The newest by this field stays.
    pub keep_latest: FieldPath,
}

fn default_key_pointer() -> JsonPointer {
    "/newKey".parse().expect("a valid pointer")
}

fn default_not_found_status() -> Vec<u16> {
    vec![404]
}

fn default_timeout() -> HumanDuration {
    HumanDuration(Duration::from_secs(5))
}

/// Lag above which work pauses, where the config does not say.
pub(crate) fn default_max_replication_lag() -> HumanDuration {
    HumanDuration(Duration::from_secs(5))
}

fn default_max_attempts() -> u32 {
    8
}
