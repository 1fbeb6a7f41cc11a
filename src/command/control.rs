//! `control`: steer a job by its document.

use bson::{Bson, Document};
use serde_json::json;

use crate::Context;
use crate::cli::control::ControlArgs;
use crate::error::Result;
use crate::job::control;
use crate::report::outcome::Outcome;

/// Runs the command.
///
/// # Errors
/// A refusal where there is no such job or it can't be steered now.
pub async fn run(context: &Context, args: &ControlArgs) -> Result<Outcome> {
    let changes = args.changes();
    let job = control::request(&context.mongo, &args.job, &changes).await?;
    let audit = job.get_array("audit").map(Vec::as_slice).unwrap_or_default();
    let written: Vec<&Document> =
        audit[audit.len().saturating_sub(changes.len())..].iter().filter_map(Bson::as_document).collect();
    let lines: Vec<String> = written.iter().map(|entry| entry_text(entry)).collect();
    let json = json!({
        "schema": 1,
        "command": "control",
        "job": args.job,
        "changes": written
            .into_iter()
            .map(|entry| Bson::Document(entry.clone()).into_relaxed_extjson())
            .collect::<Vec<_>>(),
    });
    Ok(Outcome::reached(json, format!("{}: {}", args.job, lines.join(", "))))
}

/// `tps 10 -> 20`
pub(super) fn entry_text(entry: &Document) -> String {
    let shown = |name: &str| match entry.get(name) {
        None | Some(Bson::Null) => "unset".to_owned(),
        Some(Bson::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    };
    format!("{} {} -> {}", shown("what"), shown("from"), shown("to"))
}
