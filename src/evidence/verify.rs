//! `verify --report FILE`: the report of what a verification has found.
//!
//! It is written whenever something was looked at, passed or not. Where the run
//! was interrupted or stopped it says that it is not finished; where it was refused
//! there is nothing to tell, and no report. A killed process leaves none either:
//! what stands under that name is then an earlier one, with an earlier date.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use serde_json::{Value, json};

use super::comparisons;
use super::exact;
use super::files::Files;
use super::gather::{self, in_time};
use super::words;
use super::{KIND, SCHEMA, page};
use crate::cli::options;
use crate::cli::verify::VerifyArgs;
use crate::error::{Class, Result};
use crate::report::outcome::Outcome;
use crate::verify::result::{BACKFILL, COPY};
use crate::verify::sides::Sides;
use crate::{Context, command_line};

/// The group of what compares a copy with its source, document by document.
pub(super) const DOCUMENTS: &str = "documents";

/// Verifies, and writes the report where one is asked for.
///
/// # Errors
/// Those of `verify`, where nothing was looked at.
pub async fn run(context: &Context, args: &VerifyArgs) -> Result<Outcome> {
    let Some(path) = &args.report else { return crate::verify::run::run(context, args).await };
    let files = Files::named(path)?;
    let (started_at, start) = (gather::now(), Instant::now());
    let outcome = match crate::verify::run::run(context, args).await {
        Ok(outcome) => outcome,
        Err(error) if matches!(error.class(), Class::Interrupted(_) | Class::Stopped) => {
            Outcome::from_error("verify", None, error)
        }
        Err(error) => return Err(error),
    };
    let mut document = document(context, args, outcome.json()).await;
    document["time"] = json!({
        "started_at": started_at,
        "ended_at": gather::now(),
        "elapsed_seconds": start.elapsed().as_secs_f64(),
    });
    Ok(match files.write(document) {
        Ok(written) => {
            let line = format!(
                "report: {} and {}, sha256 {}",
                files.html.display(),
                files.json.display(),
                written["sha256"].as_str().unwrap_or_default()
            );
            outcome.with("report", written, &line)
        }
        Err(error) => outcome.and_failed(error),
    })
}

async fn document(context: &Context, args: &VerifyArgs, result: &Value) -> Value {
    let mongo = &context.mongo;
    let jobs: Vec<String> =
        list(&result["jobs"]).iter().filter_map(|job| job.as_str().map(str::to_owned)).collect();
    let comparisons = in_time(async { Some(comparisons::of_jobs(mongo, &jobs).await) }).await;
    let checks = list(&result["checks"]);
    let looked_at = LookedAt::of(checks, args);
    let sides = in_time(async { Sides::of(context, args).await.ok().flatten() }).await;
    let sides = sides.filter(|_| looked_at.copy);
    json!({
        "schema": SCHEMA,
        "kind": KIND,
        "about": {
            "command": "verify",
            "title": title(sides.as_ref(), looked_at),
            "job": result["job"],
            "jobs": jobs,
        },
        "verdict": verdict(result, sides.as_ref()),
        "place": gather::place(mongo).await,
        "subject": subject(context, args, sides.as_ref(), looked_at).await,
        "run": {
            "command_line": command_line::shown(),
            "options": options::of_this_process(),
            "seeds": seeds(result),
        },
        "checks": exact::checks(checks),
        "differences": differences(checks, &result["full"]),
        "full": result["full"],
        "dual_write": result["dual_write"],
        "comparisons": comparisons,
    })
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// What the verification was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LookedAt {
    /// A copy and its source.
    copy: bool,
    /// What a backfill has filled.
    backfill: bool,
}

impl LookedAt {
    /// As the checks that were made tell; where none came to its end, as it was asked for.
    fn of(checks: &[Value], args: &VerifyArgs) -> Self {
        let is_about = |what: &str| checks.iter().any(|check| check["about"] == json!(what));
        if !checks.is_empty() {
            return Self { copy: is_about(COPY), backfill: is_about(BACKFILL) };
        }
        let of_copy = args.counts || args.sample.is_some() || args.full || args.dual_write;
        let of_backfill = args.unique || args.keys.is_some();
        Self { copy: of_copy || !of_backfill, backfill: of_backfill }
    }
}

fn title(sides: Option<&Sides>, looked_at: LookedAt) -> String {
    match (sides, looked_at.backfill) {
        (Some(Sides { source, target, .. }), false) => format!("Verification of {target} against {source}"),
        (Some(Sides { source, target, .. }), true) => {
            format!("Verification of {target} against {source}, and of a backfill")
        }
        (None, _) => "Verification of a backfill".into(),
    }
}

async fn subject(context: &Context, args: &VerifyArgs, sides: Option<&Sides>, looked_at: LookedAt) -> Value {
    let mongo = &context.mongo;
    let mut collections = Vec::new();
    let (mut rules, mut in_words) = (Value::Null, Vec::new());
    if let Some(Sides { source, target, predicate, .. }) = sides {
        collections.push(gather::collection(mongo, "source", source).await);
        collections.push(gather::collection(mongo, "target", target).await);
        let identity = gather::relaxed(&predicate.identity());
        in_words = words::of_rules(&identity);
        rules = words::json_of_rules(&identity);
    }
    let filled = context.settings.targets(args.targets.target.as_deref()).unwrap_or_default();
    for target in filled.iter().filter(|_| looked_at.backfill) {
        collections.push(gather::collection(mongo, "filled", &target.namespace).await);
    }
    json!({"collections": collections, "words": in_words, "rules": rules})
}

/// What it came to, in one sentence. Pure but for what it is given.
fn verdict(result: &Value, sides: Option<&Sides>) -> Value {
    let error = &result["error"];
    let passed = result["passed"] == json!(true) && error.is_null();
    let names = sides.map(|sides| (sides.source.to_string(), sides.target.to_string()));
    let names = names.as_ref().map(|(source, target)| (source.as_str(), target.as_str()));
    json!({
        "finished": error.is_null(),
        "passed": if error.is_null() { json!(passed) } else { Value::Null },
        "state": if !error.is_null() { "not finished" } else if passed { "passed" } else { "failed" },
        "sentence": sentence(result, names),
        "error": error,
    })
}

fn sentence(result: &Value, names: Option<(&str, &str)>) -> String {
    if let Some(message) = result["error"]["message"].as_str() {
        return format!(
            "The verification was not finished: {message}. It proves nothing about what it did not look at."
        );
    }
    let checks = list(&result["checks"]);
    let failed = checks.iter().filter(|check| check["passed"] != json!(true)).count();
    let full = &result["full"];
    let count = |name: &str| page::text(&full[name]);
    if failed == 0 && result["passed"] == json!(true) {
        let all = match names {
            Some((source, target)) if full.is_object() => format!(
                "{target} holds each of the {} documents of {source} that belong in it, equal to the last byte, \
                 and no other.",
                page::text(&full["source"]["documents"])
            ),
            _ => "no check found a difference; no more was looked at than the checks say.".into(),
        };
        return format!("Passed: {all} Checks passed: {} of {}.", checks.len(), checks.len());
    }
    let documents = if full.is_object() {
        format!(
            " Documents missing: {}, extra: {}, different: {}.",
            count("missing"),
            count("extra"),
            count("different")
        )
    } else {
        String::new()
    };
    format!(
        "Failed: {failed} of {} checks found something that is not as it should be.{documents}",
        checks.len()
    )
}

/// The seeds of checks that drew at random, so that they can draw the same again.
fn seeds(result: &Value) -> Vec<Value> {
    let of_all = std::iter::once((json!("all"), &result["seed"]));
    let of_each = list(&result["checks"]).iter().map(|check| (check["name"].clone(), &check["seed"]));
    let known = of_all.chain(of_each).filter(|(_, seed)| !seed.is_null());
    known.map(|(check, seed)| json!({"check": check, "seed": seed})).collect()
}

/// How many differences of each kind there are: all that a full comparison counted, and
/// of those that are listed how they differ, by what was looked at. What several checks
/// of the same list counts once, and beside a full comparison that alone counts: a
/// sample finds the same again.
fn differences(checks: &[Value], full: &Value) -> Value {
    let mut groups: BTreeMap<&str, BTreeMap<String, u64>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let is_full = |check: &Value| name_of(check).starts_with("full");
    let compared: BTreeSet<&str> = checks.iter().filter(|check| is_full(check)).map(group_of).collect();
    for check in checks.iter().filter(|check| is_full(check) || !compared.contains(group_of(check))) {
        let group = group_of(check);
        for difference in list(&check["differences"]) {
            let Some(kind) = difference["kind"].as_str() else { continue };
            if seen.insert((group, kind, identity_of(difference))) {
                *groups.entry(group).or_default().entry(kind_of(difference, kind)).or_default() += 1;
            }
        }
    }
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
    for (kind, count) in groups.values().flatten() {
        *kinds.entry(kind).or_default() += count;
    }
    let counted = full
        .is_object()
        .then(|| json!({"missing": full["missing"], "extra": full["extra"], "different": full["different"]}));
    let listed: Vec<Value> =
        groups.iter().map(|(group, kinds)| json!({"of": group, "listed_by_kind": kinds})).collect();
    json!({"listed": seen.len(), "listed_by_kind": kinds, "counted_by_full": counted, "groups": listed})
}

fn name_of(check: &Value) -> &str {
    check["name"].as_str().unwrap_or_default()
}

/// What a check has looked at: those of one group find the same differences.
fn group_of(check: &Value) -> &str {
    let name = name_of(check);
    let compares = name.starts_with("full") || name.starts_with("sample");
    match compares {
        true if name.contains("quarantine") => "quarantine",
        true => DOCUMENTS,
        false => name,
    }
}

/// What differs, apart from how: a document, of one of several collections, two of
/// them, an index or an option.
fn identity_of(difference: &Value) -> String {
    ["collection", "_id", "between", "index", "option"].map(|part| difference[part].to_string()).join(" ")
}

fn kind_of(difference: &Value, kind: &str) -> String {
    match difference["difference"].as_str() {
        Some(how) if kind == "different" => format!("{kind}: {how}"),
        _ => kind.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_is_one_sentence_for_everybody() {
        let full = json!({"source": {"documents": 5}, "missing": 1, "extra": 0, "different": 2});
        let result = json!({"passed": true, "checks": [{"passed": true}], "full": full});
        let passed = sentence(&result, Some(("app.a", "app.b")));
        assert!(passed.starts_with("Passed: app.b holds each of the 5 documents of app.a"), "{passed}");
        let result = json!({"passed": false, "checks": [{"passed": false}, {"passed": true}], "full": full});
        let failed = sentence(&result, None);
        assert!(failed.starts_with("Failed: 1 of 2 checks") && failed.contains("missing: 1"), "{failed}");
        let result = json!({"passed": false, "checks": [], "error": {"message": "interrupted"}});
        let verdict = verdict(&result, None);
        assert_eq!((&verdict["finished"], &verdict["passed"]), (&json!(false), &Value::Null));
        assert!(verdict["sentence"].as_str().is_some_and(|text| text.contains("not finished: interrupted")));
    }

    #[test]
    fn a_pass_with_an_error_is_none() {
        let verdict = verdict(&json!({"passed": true, "checks": [], "error": {"message": "x"}}), None);
        assert_eq!((&verdict["passed"], &verdict["state"]), (&Value::Null, &json!("not finished")));
    }

    #[test]
    fn every_seed_is_told() {
        let result = json!({"seed": 7, "checks": [{"name": "counts"}, {"name": "sample", "seed": 8}]});
        assert_eq!(
            seeds(&result),
            [json!({"check": "all", "seed": 7}), json!({"check": "sample", "seed": 8})]
        );
        assert!(seeds(&json!({"checks": [{"name": "full"}]})).is_empty());
    }

    #[test]
    fn differences_are_counted_by_kind() {
        let checks = [
            json!({"name": "full", "differences": [
                {"_id": 1, "kind": "missing"},
                {"_id": 2, "kind": "different", "difference": "order"},
                {"_id": 3, "kind": "different", "difference": "order"},
            ]}),
            json!({"name": "indexes", "differences": ["_id_"]}),
            json!({"name": "sample", "differences": [
                {"_id": 2, "kind": "different", "difference": "order"},
                {"_id": 4, "kind": "extra"},
            ]}),
        ];
        let found = differences(&checks, &json!({"missing": 9, "extra": 0, "different": 2}));
        assert_eq!(found["groups"][0]["of"], json!("documents"));
        assert_eq!(found["listed_by_kind"], json!({"different: order": 2, "missing": 1}));
        assert_eq!((&found["listed"], &found["counted_by_full"]["missing"]), (&json!(3), &json!(9)));
        let sampled = differences(&checks[1..], &Value::Null);
        assert_eq!(sampled["listed_by_kind"], json!({"different: order": 1, "extra": 1}));
    }

    #[test]
    fn differences_without_an_id_and_of_several_collections_do_not_collapse() {
        let between =
            |n: i32| json!({"kind": "new key of two legacy keys", "between": [{"_id": n}, {"_id": -n}]});
        let wrong = |collection: &str| json!({"collection": collection, "_id": 1, "kind": "wrong"});
        let checks = [
            json!({"name": "full", "differences": [{"_id": 1, "kind": "extra"}]}),
            json!({"name": "full quarantine", "differences": [{"_id": 1, "kind": "extra"}]}),
            json!({"name": "sample quarantine to source", "differences": [{"_id": 1, "kind": "extra"}]}),
            json!({"name": "unique new keys", "differences": (0..57).map(between).collect::<Vec<_>>()}),
            json!({"name": "keys", "differences": [wrong("app.a"), wrong("app.b")]}),
        ];
        let found = differences(&checks, &json!({"missing": 0, "extra": 1, "different": 0}));
        assert_eq!(
            found["listed_by_kind"],
            json!({"extra": 2, "new key of two legacy keys": 57, "wrong": 2})
        );
        assert_eq!(found["listed"], json!(61));
        let of = |name: &str| {
            let groups = list(&found["groups"]).iter();
            let mut groups = groups.filter(|group| group["of"] == json!(name));
            groups.next().map(|group| group["listed_by_kind"].clone())
        };
        assert_eq!(of("documents"), Some(json!({"extra": 1})));
        assert_eq!(of("quarantine"), Some(json!({"extra": 1})));
        assert_eq!(of("keys"), Some(json!({"wrong": 2})));
    }
}
