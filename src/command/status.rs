//! `status`: jobs as their documents tell them.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::time::Duration;

use bson::{Bson, Document};
use serde_json::{Value, json};

use crate::Context;
use crate::backfill::failures;
use crate::cli::status::StatusArgs;
use crate::cutover::situation::Situation;
use crate::error::{Error, Result};
use crate::job::{RESULT, series, store};
use crate::report::outcome::Outcome;
use crate::throttle::limits;

/// Between two pictures of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);
/// Failed documents that are listed on the terminal.
const LISTED: usize = 100;
/// Failed documents that a JSON result holds; a file takes all.
const LISTED_IN_JSON: usize = 1_000;
/// Changes by live control that are shown.
const CHANGES: usize = 3;

/// Runs the command.
///
/// # Errors
/// A refusal where there is no job of that name.
pub async fn run(context: &Context, args: &StatusArgs) -> Result<Outcome> {
    if args.failed {
        return failed(context, args).await;
    }
    loop {
        let jobs = read(context, args.job.as_deref()).await?;
        let is_over = !jobs.iter().any(store::is_running);
        let text = if jobs.is_empty() {
            "no jobs yet".into()
        } else {
            jobs.iter().map(job_text).collect::<Vec<_>>().join("\n\n")
        };
        if !args.watch || is_over {
            let jobs: Vec<Value> = jobs.into_iter().map(job_json).collect();
            let json = json!({"schema": 1, "command": "status", "job": args.job, "jobs": jobs});
            return Ok(Outcome::reached(json, text));
        }
        context.events.announce(text);
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

async fn read(context: &Context, name: Option<&str>) -> Result<Vec<Document>> {
    let jobs = store::list(&context.mongo, name).await?;
    match name {
        Some(name) if jobs.is_empty() => {
            Err(Error::refused(format!("there is no job `{name}`"))
                .hint("`mongorekey status` lists all jobs"))
        }
        _ => Ok(jobs),
    }
}

/// Lists the documents that failed, in the result or in a file.
async fn failed(context: &Context, args: &StatusArgs) -> Result<Outcome> {
    let jobs = read(context, args.job.as_deref()).await?;
    let [job] = jobs.as_slice() else {
        return Err(
            Error::usage("--failed needs the name of one job").hint("`mongorekey status` lists all jobs")
        );
    };
    let name = job.get_str("_id").unwrap_or_default().to_owned();
    let mut file = args.file.as_deref().map(create).transpose()?;
    let mut listed: Vec<Value> = Vec::new();
    let total = failures::list(&context.mongo, &name, |failure| {
        let entry = failure_json(failure);
        if let Some((file, path)) = &mut file {
            writeln!(file, "{entry}").map_err(|error| unwritable(path, &error))?;
        } else if listed.len() < LISTED_IN_JSON {
            listed.push(entry);
        }
        Ok(())
    })
    .await?;
    if let Some((file, path)) = &mut file {
        file.flush().map_err(|error| unwritable(path, &error))?;
    }
    let text = failed_text(&name, total, &listed, args.file.as_deref());
    let json = json!({
        "schema": 1,
        "command": "status",
        "job": name,
        "failed_total": total,
        "failed": listed,
        "file": args.file,
    });
    Ok(Outcome::reached(json, text))
}

fn create(path: &Path) -> Result<(BufWriter<File>, &Path)> {
    let file = File::create(path).map_err(|error| unwritable(path, &error))?;
    Ok((BufWriter::new(file), path))
}

fn unwritable(path: &Path, error: &std::io::Error) -> Error {
    Error::usage(format!("{} can't be written: {error}", path.display()))
}

fn failure_json(mut failure: Document) -> Value {
    // The `_id` keeps its type; everything else is for people.
    let id = failure.remove("document").unwrap_or(Bson::Null).into_canonical_extjson();
    let at = failure.get_datetime("at").ok().and_then(|at| at.try_to_rfc3339_string().ok());
    let mut json = Bson::Document(failure).into_relaxed_extjson();
    json["document"] = id;
    json["at"] = json!(at);
    json
}

fn failed_text(job: &str, total: u64, listed: &[Value], file: Option<&Path>) -> String {
    if let Some(file) = file {
        return format!("{job}: {total} failed documents written to {}", file.display());
    }
    let mut lines = vec![format!("{job}: {total} failed documents")];
    lines.extend(listed.iter().take(LISTED).map(|failure| {
        let word = |name: &str| failure[name].as_str().unwrap_or("-").to_owned();
        format!(
            "  {} {} key {}: {}",
            word("collection"),
            failure["document"],
            word("legacy_key"),
            word("description")
        )
    }));
    if total > LISTED as u64 {
        lines.push(format!("  … and {} more; --file FILE writes all of them", total - LISTED as u64));
    }
    lines.join("\n")
}

fn job_json(mut job: Document) -> Value {
    let runs_now = store::is_running(&job);
    // What only a report is made of would bury the rest.
    for of_report in [series::FIELD, RESULT] {
        job.remove(of_report);
    }
    let mut value = Bson::Document(job).into_relaxed_extjson();
    value["running_now"] = json!(runs_now);
    value
}

fn job_text(job: &Document) -> String {
    let word = |name: &str| job.get_str(name).unwrap_or("unknown").to_owned();
    let runs_now = store::is_running(job);
    let is_paused =
        job.get_document("control").is_ok_and(|control| control.get_bool("paused").unwrap_or(false));
    let state = match (word("state").as_str(), runs_now) {
        ("running", false) => "died (start it again to go on)".to_owned(),
        (state, _) if is_paused => {
            format!("{state}, paused (`mongorekey control {} resume` ends it)", word("_id"))
        }
        (state, _) => state.to_owned(),
    };
    let mut lines = vec![format!("{}: {} {state}", word("_id"), word("command"))];
    if runs_now {
        lines.extend(holders(job));
    }
    if let Ok(at) = job.get_datetime("updated_at") {
        lines.push(format!("  updated {}", at.try_to_rfc3339_string().unwrap_or_default()));
    }
    for (title, name) in
        [("this run", "documents"), ("all runs", "totals"), ("phase", "phase"), ("limited by", "limited_by")]
    {
        match job.get(name) {
            Some(Bson::Document(figures)) => lines.push(format!("  {title}: {}", figures_text(figures))),
            Some(Bson::String(text)) => lines.push(format!("  {title}: {text}")),
            _ => {}
        }
    }
    if let Ok(Some(situation)) = Situation::of(job) {
        lines.push(format!("  {}", situation.sentence()));
    }
    lines.extend(why_not_faster(job));
    lines.extend(changes(job));
    lines.join("\n")
}

/// Who runs the job, and who has joined.
fn holders(job: &Document) -> Vec<String> {
    let shown =
        |title: &str, lease: &Document| store::holder_of(lease).map(|holder| format!("  {title} {holder}"));
    let runner = job.get_document("lease").ok().and_then(|lease| shown("run by", lease));
    let joined = job.get_document("workers").into_iter().flat_map(Document::values);
    let joined = joined.filter_map(|worker| shown("joined by", worker.as_document()?));
    runner.into_iter().chain(joined).collect()
}

fn why_not_faster(job: &Document) -> Option<String> {
    let spent = job.get_document("limited_by_seconds").ok()?;
    let seconds: Vec<(&str, f64)> =
        spent.iter().filter_map(|(limit, spent)| Some((limit.as_str(), spent.as_f64()?))).collect();
    Some(format!("  why not faster: {}", limits::describe(&seconds)))
}

fn changes(job: &Document) -> Vec<String> {
    let audit = job.get_array("audit").map(Vec::as_slice).unwrap_or_default();
    let entries = audit.iter().rev().take(CHANGES).filter_map(Bson::as_document);
    entries
        .map(|entry| {
            let at = entry.get_datetime("at").ok().and_then(|at| at.try_to_rfc3339_string().ok());
            format!(
                "  control: {} by {} at {}",
                super::control::entry_text(entry),
                entry.get_str("who").unwrap_or("unknown"),
                at.unwrap_or_default()
            )
        })
        .collect()
}

fn figures_text(figures: &Document) -> String {
    let shown: Vec<String> = figures
        .iter()
        .filter(|(_, value)| crate::mongo::index::whole_number(value).is_some_and(|number| number > 0))
        .map(|(name, value)| format!("{} {value}", name.replace('_', " ")))
        .collect();
    if shown.is_empty() { "nothing yet".into() } else { shown.join(", ") }
}
