//! `report JOB`: the report of a backfill or a cleanse, from what is stored of it.
//!
//! It can be made at any time and from any machine: of a job that runs, one that is
//! done, and one that an earlier version has run, which lacks what was not kept then.

use std::path::PathBuf;

use bson::{Bson, Document};
use serde_json::{Value, json};

use super::files::Files;
use super::gather::{self, in_time, moment, relaxed};
use super::page::{grouped, moment as moment_of, text};
use super::{KIND, SCHEMA, comparisons, series, words};
use crate::Context;
use crate::backfill::counts::{ANSWERED, FLAGGED, add};
use crate::cli::cutover::Mode;
use crate::cli::report::ReportArgs;
use crate::config::values::Namespace;
use crate::cutover::gates::passed_since;
use crate::cutover::record::mode_word;
use crate::cutover::situation::Situation;
use crate::cutover::switch::stage::Stage;
use crate::error::{Error, Result};
use crate::job::{BORROWED, RAN, RESULT, store};
use crate::mongo::index::whole_number;
use crate::report::outcome::Outcome;
use crate::verify::full::job_name;

/// The files that are asked for.
///
/// # Errors
/// A usage error for a name that no report can have.
pub fn files(args: &ReportArgs) -> Result<Option<Files>> {
    let Some(job) = &args.job else { return Ok(None) };
    // A job may be called anything; its file may not leave the folder.
    let name: String =
        job.chars().map(|character| if "/\\\0".contains(character) { '_' } else { character }).collect();
    let path = args.to.clone().unwrap_or_else(|| PathBuf::from(format!("{name}.html")));
    Files::named(&path).map(Some)
}

/// Runs the command.
///
/// # Errors
/// A refusal where there is no such job or it has no report of its own; a stop where
/// the report can't be written.
pub async fn run(context: &Context, args: &ReportArgs) -> Result<Outcome> {
    let (Some(name), Some(files)) = (&args.job, files(args)?) else {
        return Err(
            Error::usage("`report` needs the name of a job").hint("`mongorekey status` lists all jobs")
        );
    };
    let job = store::find(&context.mongo, name).await?.ok_or_else(|| {
        Error::refused(format!("there is no job `{name}`")).hint("`mongorekey status` lists all jobs")
    })?;
    let document = match job.get_str("command") {
        Ok("backfill") => document(context, &job, backfill(&job)).await,
        Ok("cleanse") => document(context, &job, cleanse(context, &job).await).await,
        other => {
            let command = other.unwrap_or("an unknown command");
            return Err(Error::refused(format!(
                "the job {name} is one of `{command}`, which leaves no report"
            ))
            .hint("`verify --report FILE.html` writes the report of a verification"));
        }
    };
    let verdict = document["verdict"].clone();
    let written = files.write(document)?;
    let text = format!(
        "{}\nreport: {} and {}\nsha256: {}",
        verdict["sentence"].as_str().unwrap_or_default(),
        files.html.display(),
        files.json.display(),
        written["sha256"].as_str().unwrap_or_default()
    );
    let json = json!({
        "schema": 1,
        "command": "report",
        "job": name,
        "verdict": verdict,
        "report": written,
    });
    Ok(Outcome::reached(json, text))
}

/// What only one kind of job has.
struct Kind {
    title: String,
    /// Collections by what they are to the job.
    collections: Vec<(&'static str, String)>,
    words: Vec<String>,
    rules: Value,
    /// The end of the sentence about a job that has reached its goal.
    reached: String,
    /// Why it has not, where it ran to its end.
    not_reached: String,
    /// What says otherwise, although it ran to its end and reached its goal.
    contradiction: Option<String>,
    members: Value,
}

async fn document(context: &Context, job: &Document, kind: Kind) -> Value {
    let mongo = &context.mongo;
    let mut collections = Vec::new();
    for (role, namespace) in &kind.collections {
        let Ok(namespace) = namespace.parse::<Namespace>() else { continue };
        let mut found = gather::collection(mongo, role, &namespace).await;
        let then = job.get(format!("{role}_uuid")).and_then(gather::uuid_text);
        found["uuid_in_job"] = json!(then);
        collections.push(found);
    }
    let ran = job.get_document(RAN).cloned().unwrap_or_default();
    let name = job.get_str("_id").unwrap_or_default();
    let mut document = json!({
        "schema": SCHEMA,
        "kind": KIND,
        "about": {"command": job.get_str("command").ok(), "title": kind.title, "job": name, "jobs": [name]},
        "verdict": verdict(job, &kind),
        "time": {
            "begun_at": moment(job, "created_at"),
            "started_at": moment(job, "started_at"),
            "ended_at": moment(job, "updated_at"),
            "elapsed_seconds": elapsed(job),
            "written_at": gather::now(),
            "runs": runs(job),
        },
        "place": gather::place(mongo).await,
        "subject": {
            "collections": collections,
            "identity": job.get_document("identity").ok().map(relaxed),
            "words": kind.words,
            "rules": kind.rules,
        },
        "run": {
            "command_line": ran.get_str("command_line").ok(),
            "host": ran.get_str("host").ok(),
            "process": ran.get("pid").and_then(whole_number),
            "tool": ran.get_str("version").ok().map(|version| format!("mongorekey {version}")),
            "settings": job.get_document("settings").ok().map(relaxed),
            "limited_by_seconds": job.get_document("limited_by_seconds").ok().map(relaxed),
        },
    });
    for (name, member) in kind.members.as_object().into_iter().flatten() {
        document[name] = member.clone();
    }
    document
}

/// How often the job was run.
fn runs(job: &Document) -> Option<u64> {
    let borrowed = job.get(BORROWED).and_then(whole_number).unwrap_or(0);
    job.get("fence").and_then(whole_number)?.checked_sub(borrowed)
}

/// Seconds of the last run.
fn elapsed(job: &Document) -> Option<f64> {
    let at = |field: &str| job.get_datetime(field).ok().map(|at| at.timestamp_millis());
    let milliseconds = at("updated_at")?.checked_sub(at("started_at")?)?;
    (milliseconds >= 0).then_some(milliseconds as f64 / 1000.0)
}

fn verdict(job: &Document, kind: &Kind) -> Value {
    let state = job.get_str("state").unwrap_or("unknown");
    let (passed, sentence) = match state {
        "completed" => match &kind.contradiction {
            None => (Some(true), format!("Finished: {}", kind.reached)),
            Some(found) => (Some(false), format!("Finished, but {found} {}", kind.reached)),
        },
        "incomplete" => (Some(false), format!("Not reached: {}", kind.not_reached)),
        "running" if store::is_running(job) => {
            (None, "Not finished: the job is running now; this is how far it was.".into())
        }
        "running" => {
            (None, "Not finished: the process that ran the job died; starting it again goes on.".into())
        }
        other => (None, format!("Not finished: the last run was {other}; starting it again goes on.")),
    };
    json!({"finished": passed.is_some(), "passed": passed, "state": state, "sentence": sentence, "error": null})
}

fn count(document: &Document, name: &str) -> u64 {
    document.get(name).and_then(whole_number).unwrap_or(0)
}

/// An entry of the outcomes.
fn outcome(name: &str, count: u64, tone: &str) -> Value {
    json!({"name": name, "count": count, "tone": tone})
}

/// Counts whose names begin with a prefix.
fn named(totals: &Document, prefix: &str, tone: impl Fn(&str) -> &'static str) -> Vec<Value> {
    let found = totals.iter().filter_map(|(name, value)| {
        let name = name.strip_prefix(prefix)?;
        Some(outcome(&name.replace('_', " "), whole_number(value)?, tone(name)))
    });
    found.collect()
}

fn backfill(job: &Document) -> Kind {
    let part = |name: &str| job.get_document(name).cloned().unwrap_or_default();
    let (run, totals) = (part("documents"), add(Some(&part("joined_totals")), &part("totals")));
    let failed = run.get_document("failed_by").cloned().unwrap_or_default();
    let mut documents = vec![outcome("received their key", count(&totals, "filled"), "good")];
    let by_reason = named(&totals, FLAGGED, |_| "plain");
    if by_reason.is_empty() {
        documents.push(outcome("flagged", count(&totals, "flagged"), "plain"));
    }
    documents.extend(by_reason.into_iter().map(|mut entry| {
        entry["name"] = json!(format!("flagged: {}", entry["name"].as_str().unwrap_or_default()));
        entry
    }));
    documents.push(outcome("filled by somebody else", count(&totals, "already_filled"), "plain"));
    documents.push(outcome("changed or deleted meanwhile", count(&totals, "changed"), "plain"));
    let failures = named(&failed, "", |_| "bad").into_iter().map(|mut entry| {
        entry["name"] = json!(format!("failed: {}", entry["name"].as_str().unwrap_or_default()));
        entry
    });
    documents.extend(failures);
    documents.push(outcome("candidates left", count(&run, "candidates_left"), "warn"));
    let calls = named(&totals, ANSWERED, |name| match name {
        "found" => "good",
        "not_found" | "rejected" => "plain",
        _ => "bad",
    });
    let left = count(&run, "candidates_left");
    let targets = targets(job);
    Kind {
        title: format!(
            "Backfill of {}",
            targets.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
        ),
        collections: targets.iter().map(|(name, _)| ("filled", name.clone())).collect(),
        words: targets.into_iter().map(|(_, words)| words).collect(),
        rules: Value::Null,
        reached: format!(
            "{} documents received their key and {} were flagged; candidates left: {}.",
            grouped(count(&totals, "filled")),
            grouped(count(&totals, "flagged")),
            grouped(left)
        ),
        not_reached: format!(
            "{} documents failed and still are candidates; {} received their key, {} were flagged.",
            grouped(count(&run, "failed")),
            grouped(count(&totals, "filled")),
            grouped(count(&totals, "flagged"))
        ),
        contradiction: None,
        members: json!({
            "outcomes": [
                {"title": "Documents, over all runs", "entries": documents},
                {"title": "Answers of the key API, over all runs", "entries": calls},
            ],
            "totals": relaxed(&totals),
            "last_run": relaxed(&run),
            "series": series::of_job(job, "documents settled", "calls to the key API"),
        }),
    }
}

/// The collections of a backfill, each with what is done to it in words.
fn targets(job: &Document) -> Vec<(String, String)> {
    let identity = job.get_document("identity").cloned().unwrap_or_default();
    let targets = identity.get_array("targets").map(Vec::as_slice).unwrap_or_default();
    let api = identity.get_str("api").unwrap_or("the key API");
    let of = |target: &Document| {
        let word = |name: &str| target.get_str(name).unwrap_or("?").to_owned();
        let filter = word("filter");
        let only =
            if filter == "{}" { String::new() } else { format!(" Only documents that match {filter}.") };
        let [collection, key, flag, legacy] =
            ["collection", "key_field", "flag_field", "legacy_field"].map(word);
        let words = format!(
            "Documents of {collection} without {key} and without {flag} receive in {key} the key that {api} gives \
             for their {legacy}, or in {flag} the reason why there is none.{only}"
        );
        (word("collection"), words)
    };
    targets.iter().filter_map(Bson::as_document).map(of).collect()
}

async fn cleanse(context: &Context, job: &Document) -> Kind {
    let identity = job.get_document("identity").cloned().unwrap_or_default();
    let word = |name: &str| identity.get_str(name).unwrap_or("?").to_owned();
    let (source, target) = (word("source"), word("target"));
    let result: Value =
        job.get_str(RESULT).ok().and_then(|text| serde_json::from_str(text).ok()).unwrap_or(Value::Null);
    let (documents, ledger) = (&result["documents"], &result["ledger"]);
    let rules = relaxed(&identity.get_document("rules").cloned().unwrap_or_default());
    let mut collections = vec![("source", source.clone()), ("target", target.clone())];
    collections.extend(identity.get_str("quarantine").ok().map(|name| ("quarantine", name.to_owned())));
    let name = job.get_str("_id").unwrap_or_default();
    let (verified, compared) =
        in_time(async { Some(verified(context, job, job_name(name)).await) }).await.unwrap_or_default();
    let situation =
        Situation::of(job).ok().flatten().map_or(String::new(), |told| format!(" {}", told.sentence()));
    let (contradiction, verified) = match verified {
        Verified::Said(said) => (None, said),
        Verified::Failed => (Some("the last full comparison FAILED.".to_owned()), String::new()),
    };
    let balanced = match ledger["balanced"].as_bool() {
        Some(true) => " The ledger balances.",
        Some(false) => " The ledger does NOT balance.",
        None => "",
    };
    Kind {
        title: format!("Cleanse of {source} to {target}"),
        collections,
        words: words::of_rules(&rules),
        rules: words::json_of_rules(&rules),
        reached: format!(
            "{target} holds {} documents of the {} of {source}; {} were rejected.{balanced}{verified}{situation}",
            text(&documents["kept"]),
            text(&documents["source"]),
            text(&documents["rejected"])
        ),
        not_reached: format!(
            "{target} is not what the rules make of {source}, or not all of it was caught up with.{balanced}{situation}"
        ),
        contradiction,
        members: json!({
            "outcomes": [{"title": "Documents of the source", "entries": kept_and_rejected(documents)}],
            "ledger": ledger,
            "result": result,
            "comparisons": compared,
            "cutover": cutover(job),
            "series": series::of_job(job, "documents copied", "changes applied"),
        }),
    }
}

/// How far the exchange of names, or the switch, of a copy is.
fn cutover(job: &Document) -> Option<Value> {
    if let Some(stage) = Stage::of(job) {
        return Some(json!({"mode": mode_word(Mode::Switch), "state": stage.as_str()}));
    }
    let record = job.get_document("cutover").ok()?;
    Some(json!({"mode": record.get_str("mode").ok(), "state": record.get_str("state").ok()}))
}

/// What the last full comparison of a copy came to.
enum Verified {
    /// Nothing against the copy; in a sentence.
    Said(String),
    /// The copy is not what it should be.
    Failed,
}

impl Default for Verified {
    fn default() -> Self {
        Self::Said(String::new())
    }
}

/// What the last full comparison of a copy came to, in a sentence, and its figures
/// unless they are of an earlier copy.
async fn verified(context: &Context, job: &Document, comparison: String) -> (Verified, Vec<Value>) {
    let stored = comparisons::stored(&context.mongo, &comparison).await;
    let verdict = stored.as_ref().and_then(|stored| stored.get_document("verdict").ok());
    let passed = verdict.map(|verdict| verdict.get_bool("passed").unwrap_or(false));
    let counts_still = stored.as_ref().is_some_and(|stored| passed_since(job, stored).is_some());
    let sentence = match (passed, verdict) {
        (Some(true), Some(verdict)) if counts_still => {
            Verified::Said(format!(" A full comparison passed at {}.", moment_of(&moment(verdict, "at"))))
        }
        (Some(true), _) => {
            return (
                Verified::Said(
                    " The full comparison that passed is of an earlier state of this copy: `verify --full` \
                     compares what it is now."
                        .into(),
                ),
                Vec::new(),
            );
        }
        (Some(false), _) => Verified::Failed,
        (None, _) => Verified::Said(" No full comparison has passed: `verify --full` does that.".into()),
    };
    (sentence, comparisons::of_jobs(&context.mongo, &[comparison]).await)
}

fn kept_and_rejected(documents: &Value) -> Vec<Value> {
    let count = |name: &str| documents[name].as_u64().unwrap_or(0);
    if documents.is_null() {
        return Vec::new();
    }
    let mut entries = vec![outcome("kept", count("kept"), "good")];
    let by_rule = documents["rejected_by"].as_object().filter(|rules| !rules.is_empty());
    match by_rule {
        Some(rules) => entries.extend(rules.iter().map(|(rule, count)| {
            outcome(&format!("rejected by {rule}"), count.as_u64().unwrap_or(0), "plain")
        })),
        None => entries.push(outcome("rejected", count("rejected"), "plain")),
    }
    if count("validator_violations") > 0 {
        entries.push(outcome("violate the validator", count("validator_violations"), "warn"));
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::doc;

    fn job(state: &str) -> Document {
        doc! {
            "_id": "j", "command": "backfill", "state": state,
            "identity": {"api": "http://h/{key}", "targets": [{
                "collection": "app.users", "legacy_field": "legacyKey", "key_field": "newKey",
                "flag_field": "newKeyFlag", "filter": "{}",
            }]},
            "documents": {"failed": 1, "failed_by": {"timeout": 1}, "candidates_left": 2},
            "totals": {"filled": 5_i64, "flagged": 3_i64, "flagged_not_found": 3_i64, "answered_found": 4_i64},
            "joined_totals": {"filled": 2_i64, "answered_found": 2_i64, "answered_timeout": 9_i64},
        }
    }

    #[test]
    fn a_backfill_counts_over_all_runs_and_workers() {
        let kind = backfill(&job("completed"));
        let entries = |group: usize| kind.members["outcomes"][group]["entries"].clone();
        let named = |group: usize, name: &str| {
            let entries = entries(group);
            let found = entries.as_array().expect("a list").iter().find(|entry| entry["name"] == json!(name));
            found.unwrap_or_else(|| panic!("no {name} in {entries}"))["count"].clone()
        };
        assert_eq!(named(0, "received their key"), json!(7));
        assert_eq!(named(0, "flagged: not found"), json!(3));
        assert_eq!(named(0, "failed: timeout"), json!(1));
        assert_eq!((named(1, "found"), named(1, "timeout")), (json!(6), json!(9)));
        assert!(kind.words[0].contains("receive in newKey the key that http://h/{key}"), "{:?}", kind.words);
    }

    #[test]
    fn only_what_ran_to_its_end_is_finished() {
        for (state, passed) in [("completed", json!(true)), ("incomplete", json!(false))] {
            let verdict = verdict(&job(state), &backfill(&job(state)));
            assert_eq!((&verdict["passed"], &verdict["finished"]), (&passed, &json!(true)), "{state}");
        }
        for state in ["running", "interrupted", "stopped"] {
            let verdict = verdict(&job(state), &backfill(&job(state)));
            assert_eq!((&verdict["passed"], &verdict["finished"]), (&Value::Null, &json!(false)), "{state}");
            assert!(verdict["sentence"].as_str().is_some_and(|text| text.starts_with("Not finished")));
        }
    }
}
