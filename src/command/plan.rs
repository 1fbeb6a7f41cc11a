//! `plan`: how much there is to do and how long it takes. Reads only.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use bson::{Bson, Document, RawDocumentBuf, doc};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::Context;
use crate::cli::PlanArgs;
use crate::config::values::{Namespace, Tps};
use crate::config::{Target, template};
use crate::error::{Context as _, Error, Result};
use crate::event::{Events, Progress};
use crate::key_map::KeyMap;
use crate::legacy_key;
use crate::mongo::catalog::Description;
use crate::mongo::index::{self, IndexState, whole_number};
use crate::mongo::source::{candidate_filter, legacy_projection};
use crate::report::outcome::Outcome;
use crate::report::progress::duration;
use crate::throttle::window::{Schedule, TimeZoneName};

/// Keys that are looked up in the key map at once.
const KEYS_PER_LOOKUP: usize = 1000;
/// Distinct keys are counted in memory up to this many bytes of text; beyond
/// it the calls of several targets are summed up without finding shared keys.
const MOST_KEY_BYTES: usize = 512 * 1024 * 1024;

/// What one target needs.
#[derive(Debug, Default)]
struct Need {
    candidates: u64,
    distinct_keys: u64,
    unusable: BTreeMap<String, u64>,
    /// Documents whose key can't be sent: they will be counted as failed.
    unsendable: u64,
}

/// Runs the command.
///
/// # Errors
/// A refusal where a collection is missing.
pub async fn run(context: &Context, args: &PlanArgs) -> Result<Outcome> {
    let settings = &context.settings;
    let targets = settings.targets(args.targets.target.as_deref())?;
    let tps = args.tps.unwrap_or(settings.backfill.tps);
    let windows =
        if args.windows.is_empty() { settings.backfill.windows.clone() } else { args.windows.clone() };
    let zone = args.time_zone.clone().unwrap_or_else(|| settings.backfill.time_zone.clone());
    let mut calls = Calls::new(context);
    let mut needs = Vec::new();
    for target in &targets {
        needs.push(count_target(context, target, &mut calls).await?);
    }
    calls.look_up_rest().await?;
    let schedule = Schedule::new(windows, zone.clone());
    let estimate = Estimate::new(calls.needed, tps, schedule.as_ref(), Timestamp::now());
    let (needed, known) = (calls.needed, calls.known);
    let summary = Summary { targets: &targets, needs: &needs, needed, known, tps, estimate, zone };
    Ok(Outcome::reached(summary.json(), summary.text()))
}

/// The time that a number of calls takes.
#[derive(Debug, PartialEq)]
struct Estimate {
    nonstop: Duration,
    /// Until the last call within the windows, and when that is; `None`
    /// without windows or where it never is.
    in_windows: Option<(Duration, Timestamp)>,
    has_windows: bool,
    ends_nonstop: Option<Timestamp>,
}

impl Estimate {
    fn new(calls: u64, tps: Tps, windows: Option<&Schedule>, now: Timestamp) -> Self {
        let nonstop = Duration::try_from_secs_f64(calls as f64 / tps.per_second()).unwrap_or(Duration::MAX);
        let in_windows = windows.and_then(|windows| {
            let end = windows.finish(now, nonstop)?;
            Some((Duration::try_from(end.duration_since(now)).ok()?, end))
        });
        let ends_nonstop =
            jiff::SignedDuration::try_from(nonstop).ok().and_then(|span| now.checked_add(span).ok());
        Self { nonstop, in_windows, has_windows: windows.is_some(), ends_nonstop }
    }
}

/// Counts the distinct keys over all targets that the key map does not know.
struct Calls<'a> {
    key_map: Option<KeyMap>,
    events: &'a Events,
    seen: HashSet<String>,
    seen_bytes: usize,
    pending: Vec<String>,
    needed: u64,
    known: u64,
}

impl<'a> Calls<'a> {
    fn new(context: &'a Context) -> Self {
        let settings = &context.settings;
        let key_map = settings
            .key_api
            .as_ref()
            .filter(|_| settings.backfill.key_map)
            .map(|api| KeyMap::open(&context.mongo, api, "plan"));
        Self {
            key_map,
            events: &context.events,
            seen: HashSet::new(),
            seen_bytes: 0,
            pending: Vec::new(),
            needed: 0,
            known: 0,
        }
    }

    /// Counts a key unless another target had it before.
    async fn add(&mut self, key: String, several_targets: bool) -> Result<()> {
        if several_targets && self.seen_bytes < MOST_KEY_BYTES {
            self.seen_bytes += key.len() + 32;
            if !self.seen.insert(key.clone()) {
                return Ok(());
            }
        }
        self.pending.push(key);
        if self.pending.len() >= KEYS_PER_LOOKUP { self.look_up_rest().await } else { Ok(()) }
    }

    async fn look_up_rest(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let known = match &self.key_map {
            Some(key_map) => {
                let keys: Vec<&str> = pending.iter().map(String::as_str).collect();
                key_map.look_up(&keys).await?.len()
            }
            None => 0,
        };
        self.known += u64::try_from(known).unwrap_or(0);
        self.needed += u64::try_from(pending.len() - known).unwrap_or(0);
        Ok(())
    }
}

/// Groups the candidates by legacy value on the server and streams the groups.
async fn count_target(context: &Context, target: &Target, calls: &mut Calls<'_>) -> Result<Need> {
    let namespace = &target.namespace;
    let description = context.mongo.describe_target(target).await?;
    let several = context.settings.targets.len() > 1;
    let collection = context.mongo.collection(namespace);
    let mut aggregate = collection
        .aggregate(group_pipeline(target))
        .allow_disk_use(true)
        // Not the collection's own: two keys that differ in case are two keys.
        .collation(mongodb::options::Collation::builder().locale("simple").build());
    if index::compare(target, &description) == IndexState::Ready && !has_collation(&description) {
        aggregate = aggregate.hint(mongodb::options::Hint::Name(index::name(target)));
    }
    let operation = format!("grouping the candidates of {namespace}");
    let mut cursor = aggregate.await.during(&operation)?.with_type::<RawDocumentBuf>();
    let mut need = Need::default();
    let mut last_text: HashSet<String> = HashSet::new();
    while cursor.advance().await.during(&operation)? {
        let group = cursor.current();
        let count =
            group.get("n").ok().flatten().map(bson::RawBson::from).and_then(|n| Bson::try_from(n).ok());
        let count = count.as_ref().and_then(whole_number).unwrap_or(0);
        need.candidates += count;
        show(calls.events, namespace, need.candidates);
        let id = group.get_document("_id").during_bson(&operation)?;
        let type_name = id.get_str("t").unwrap_or("missing").to_owned();
        let value = id.get("v").ok().flatten();
        let text =
            value.and_then(legacy_key::text_of).filter(|text| legacy_key::is_text_of(&type_name, text));
        match text {
            None => *need.unusable.entry(unusable_name(&type_name)).or_default() += count,
            Some(text) if !context.can_send(&text) => need.unsendable += count,
            Some(text) => {
                // One key may be stored in several types and then has several groups.
                if type_name == "string" && !looks_numeric(&text) || last_text.insert(text.clone()) {
                    need.distinct_keys += 1;
                    calls.add(text, several).await?;
                }
            }
        }
    }
    Ok(need)
}

/// Only texts of this kind can also be the text of another type.
fn looks_numeric(text: &str) -> bool {
    text.len() <= 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || b"-.+E".contains(&byte))
}

fn unusable_name(type_name: &str) -> String {
    if type_name == "string" { "empty string".into() } else { type_name.into() }
}

fn has_collation(description: &Description) -> bool {
    description.collation().is_some()
}

fn group_pipeline(target: &Target) -> Vec<Document> {
    vec![
        doc! {"$match": candidate_filter(target)},
        doc! {"$group": {"_id": distinct_values(target), "n": {"$sum": 1}}},
    ]
}

/// Like the projection of a backfill, but decimals as text: 42 and 42.0 compare
/// as equal and are two keys.
fn distinct_values(target: &Target) -> Document {
    let mut projection = legacy_projection(&target.legacy_field);
    let field = format!("${}", target.legacy_field);
    let is_decimal = doc! {"$eq": [{"$type": &field}, "decimal"]};
    let value = projection.remove("v").unwrap_or(Bson::Null);
    projection.insert("v", doc! {"$cond": [is_decimal, {"$toString": &field}, value]});
    projection
}

impl Context {
    fn can_send(&self, legacy_key: &str) -> bool {
        let api = self.settings.key_api.as_ref();
        api.is_none_or(|api| template::is_sendable(&api.url, legacy_key))
    }
}

fn show(events: &Events, namespace: &Namespace, done: u64) {
    events.progress(Progress {
        phase: format!("plan {namespace}"),
        unit: "documents",
        done,
        total: None,
        limited_by: Some("database".into()),
        detail: String::new(),
    });
}

/// Everything that the result tells.
struct Summary<'a> {
    targets: &'a [Target],
    needs: &'a [Need],
    needed: u64,
    known: u64,
    tps: Tps,
    estimate: Estimate,
    zone: TimeZoneName,
}

impl Summary<'_> {
    fn json(&self) -> Value {
        let targets = self.targets.iter().zip(self.needs).map(|(target, need)| {
            json!({
                "collection": target.namespace.to_string(),
                "candidates": need.candidates,
                "distinct_keys": need.distinct_keys,
                "unusable": need.unusable,
                "unsendable": need.unsendable,
            })
        });
        let estimate = &self.estimate;
        let end = estimate.in_windows.map(|(_, end)| end).or(estimate.ends_nonstop);
        json!({
            "schema": 1,
            "command": "plan",
            "targets": targets.collect::<Vec<_>>(),
            "calls": self.needed,
            "known_keys": self.known,
            "tps": self.tps.per_second(),
            "seconds_nonstop": estimate.nonstop.as_secs_f64(),
            "seconds_in_windows": estimate.in_windows.map(|(needed, _)| needed.as_secs_f64()),
            "finished_at": end.map(|end| end.to_string()),
        })
    }

    fn text(&self) -> String {
        let mut lines = Vec::new();
        for (target, need) in self.targets.iter().zip(self.needs) {
            lines.push(format!(
                "{}: {} candidates, {} distinct legacy keys",
                target.namespace, need.candidates, need.distinct_keys
            ));
            for (kind, count) in &need.unusable {
                lines.push(format!("  {count} will be flagged no_legacy_key: {kind}"));
            }
            if need.unsendable > 0 {
                lines.push(format!("  {} will fail: `.` and `..` can't be sent in a path", need.unsendable));
            }
        }
        lines.push(format!("{} calls needed, {} keys are in the key map already", self.needed, self.known));
        let estimate = &self.estimate;
        let end = estimate.ends_nonstop.map_or(String::new(), |end| format!(", until {}", self.date(end)));
        lines.push(format!("at {} TPS non-stop: {}{end}", self.tps.per_second(), duration(estimate.nonstop)));
        match estimate.in_windows {
            Some((needed, end)) => {
                lines.push(format!("within the windows: {}, until {}", duration(needed), self.date(end)));
            }
            None if estimate.has_windows => {
                lines.push("within the windows: not within a hundred years".into())
            }
            None => {}
        }
        lines.join("\n")
    }

    fn date(&self, at: Timestamp) -> String {
        at.to_zoned(self.zone.zone().clone()).strftime("%A %-d %B %Y, %H:%M %Z").to_string()
    }
}

/// Names the operation for a reply that is not what it should be.
trait DuringBson<T> {
    fn during_bson(self, operation: &str) -> Result<T>;
}

impl<T> DuringBson<T> for bson::error::Result<T> {
    fn during_bson(self, operation: &str) -> Result<T> {
        self.map_err(|error| Error::stopped(format!("{operation}: the reply can't be read: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tps(value: f64) -> Tps {
        Tps::new(value).expect("a valid rate")
    }

    #[test]
    fn ten_million_calls_at_ten_a_second_take_eleven_and_a_half_days() {
        let now: Timestamp = "2026-11-22T12:00:00+09:00".parse().expect("a time");
        let windows = Schedule::new(
            vec!["22:00-06:00".parse().expect("a window")],
            "Asia/Seoul".parse().expect("a zone"),
        );
        let estimate = Estimate::new(10_000_000, tps(10.0), windows.as_ref(), now);
        assert_eq!(duration(estimate.nonstop), "11 d 13 h 46 m");
        let (_, end) = estimate.in_windows.expect("an end");
        assert_eq!(end, "2026-12-27T03:46:40+09:00".parse().expect("a time"));
    }

    #[test]
    fn no_windows_mean_no_second_figure() {
        let estimate = Estimate::new(10, tps(0.5), None, Timestamp::UNIX_EPOCH);
        assert_eq!((estimate.nonstop, estimate.in_windows), (Duration::from_secs(20), None));
    }

    #[test]
    fn only_texts_of_other_types_are_remembered() {
        for text in
            ["42", "-7", "5.0", "1E+3", "507f1f77bcf86cd799439011", "00112233-4455-6677-8899-aabbccddeeff"]
        {
            assert!(looks_numeric(text), "{text}");
        }
        assert!(!looks_numeric("K-123x") && !looks_numeric("홍길동"));
    }
}
