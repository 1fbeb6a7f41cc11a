//! `status`: jobs as their documents tell them.

use bson::{Bson, Document};
use serde_json::{Value, json};

use crate::Context;
use crate::error::{Error, Result};
use crate::job::running::is_running;
use crate::job::store;
use crate::report::outcome::Outcome;

/// Runs the command.
///
/// # Errors
/// A refusal where there is no job of that name.
pub async fn run(context: &Context, job: Option<&str>) -> Result<Outcome> {
    let jobs = store::list(&context.mongo, job).await?;
    if let (Some(name), true) = (job, jobs.is_empty()) {
        return Err(
            Error::refused(format!("there is no job `{name}`")).hint("`mongorekey status` lists all jobs")
        );
    }
    let text = if jobs.is_empty() {
        "no jobs yet".into()
    } else {
        jobs.iter().map(job_text).collect::<Vec<_>>().join("\n\n")
    };
    let jobs: Vec<Value> = jobs.into_iter().map(job_json).collect();
    Ok(Outcome::reached(json!({"schema": 1, "command": "status", "job": job, "jobs": jobs}), text))
}

fn job_json(job: Document) -> Value {
    let runs_now = is_running(&job);
    let mut value = Bson::Document(job).into_relaxed_extjson();
    value["running_now"] = json!(runs_now);
    value
}

fn job_text(job: &Document) -> String {
    let word = |name: &str| job.get_str(name).unwrap_or("unknown").to_owned();
    let state = match (word("state").as_str(), is_running(job)) {
        ("running", false) => "died (start it again to go on)".to_owned(),
        (state, _) => state.to_owned(),
    };
    let mut lines = vec![format!("{}: {} {state}", word("_id"), word("command"))];
    if let (true, Ok(lease)) = (is_running(job), job.get_document("lease"))
        && let Ok(holder) = lease.get_document("holder")
    {
        let host = holder.get_str("host").unwrap_or("unknown host");
        lines.push(format!("  run by process {} on {host}", holder.get_i64("pid").unwrap_or(0)));
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
    lines.join("\n")
}

fn figures_text(figures: &Document) -> String {
    let shown: Vec<String> = figures
        .iter()
        .filter(|(_, value)| crate::mongo::index::whole_number(value).is_some_and(|number| number > 0))
        .map(|(name, value)| format!("{} {value}", name.replace('_', " ")))
        .collect();
    if shown.is_empty() { "nothing yet".into() } else { shown.join(", ") }
}
