//! `index create|status|drop`: the partial index of every target.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::Context;
use crate::config::Target;
use crate::config::values::ReadPreference;
use crate::error::Result;
use crate::event::{Events, Progress};
use crate::job::running;
use crate::mongo::Mongo;
use crate::mongo::index::{self, IndexState};
use crate::mongo::source::{Explained, TargetCollection};
use crate::report::outcome::Outcome;

/// Documents that the explained query reads.
const EXPLAINED_CHUNK: usize = 100;

/// Builds the index of each target and proves that it is used.
///
/// # Errors
/// A refusal where a collection is missing or an index of the name is another one.
pub async fn create(context: &Context, targets: &[Target]) -> Result<Outcome> {
    let mut lines = Vec::new();
    for target in targets {
        let state = state(&context.mongo, target).await?;
        if let IndexState::Different(_) = state {
            return Err(index::refusal(target, &state));
        }
        if state == IndexState::Missing {
            context.events.note(format!("building {} on {}", index::name(target), target.namespace));
            context.mongo.create_index(target, |seen| show(&context.events, seen)).await?;
        }
        lines.push(describe(context, target).await?);
    }
    let proven = lines.iter().all(|line| line["used"] == json!(true));
    let outcome = report("create", &lines);
    Ok(if proven { outcome } else { outcome.with_exit(1) })
}

/// Shows the index of each target.
///
/// # Errors
/// A refusal where a collection is missing.
pub async fn status(context: &Context, targets: &[Target]) -> Result<Outcome> {
    let mut lines = Vec::new();
    for target in targets {
        lines.push(describe(context, target).await?);
    }
    let ready = lines.iter().all(|line| line["state"] == json!("ready"));
    let outcome = report("status", &lines);
    Ok(if ready { outcome } else { outcome.with_exit(1) })
}

/// Drops the index of each target.
///
/// # Errors
/// A refusal where a backfill runs that reads by one of them; a stop where the server refuses.
pub async fn drop(context: &Context, targets: &[Target]) -> Result<Outcome> {
    let ours: BTreeSet<String> = targets.iter().map(|target| target.namespace.to_string()).collect();
    running::refuse_beside_backfills(&context.mongo, |job| running::is_about(job, &ours)).await?;
    let mut lines = Vec::new();
    for target in targets {
        let dropped = context.mongo.drop_index(target).await?;
        lines.push(json!({
            "collection": target.namespace.to_string(),
            "index": index::name(target),
            "state": if dropped { "dropped" } else { "missing" },
        }));
    }
    Ok(report("drop", &lines))
}

async fn state(mongo: &Mongo, target: &Target) -> Result<IndexState> {
    let collection = mongo.describe_target(target).await?;
    collection.check_fillable(&target.namespace)?;
    Ok(index::compare(target, &collection))
}

async fn describe(context: &Context, target: &Target) -> Result<Value> {
    let mongo = &context.mongo;
    let mut line = json!({"collection": target.namespace.to_string(), "index": index::name(target)});
    let state = state(mongo, target).await?;
    line["state"] = match &state {
        IndexState::Ready => json!("ready"),
        IndexState::Missing => json!("missing"),
        IndexState::Different(_) => json!("different"),
    };
    match state {
        IndexState::Different(difference) => line["difference"] = json!(difference),
        IndexState::Missing => {}
        IndexState::Ready => {
            let collection = TargetCollection::open(mongo, target, ReadPreference::Primary, false).await?;
            let explained = collection.explain(None, EXPLAINED_CHUNK).await?;
            line["size_bytes"] = json!(mongo.index_size(target).await?);
            line["candidates"] = json!(collection.count().await?);
            line["used"] = json!(is_used(target, &explained));
            line["explain"] = json!({
                "index": explained.index,
                "keys_examined": explained.keys_examined,
                "returned": explained.returned,
                "sorted": explained.sorted,
            });
        }
    }
    Ok(line)
}

/// The proof: our index, no sort, no key for nothing. A filter of the target's
/// own may pass over keys.
fn is_used(target: &Target, explained: &Explained) -> bool {
    explained.index.as_deref() == Some(index::name(target).as_str())
        && !explained.sorted
        && (explained.keys_examined == explained.returned || !target.filter.0.is_empty())
}

fn show(events: &Events, seen: index::BuildProgress) {
    events.progress(Progress {
        phase: "index".into(),
        unit: "documents",
        done: seen.done,
        total: Some(seen.total),
        limited_by: Some("database".into()),
        detail: String::new(),
    });
}

fn report(action: &str, lines: &[Value]) -> Outcome {
    let text: Vec<String> = lines.iter().map(line_text).collect();
    let json = json!({"schema": 1, "command": "index", "action": action, "targets": lines});
    Outcome::reached(json, text.join("\n"))
}

fn line_text(line: &Value) -> String {
    let word = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
    let mut text = format!("{}: index {} {}", word("collection"), word("index"), word("state"));
    if let Some(difference) = line["difference"].as_str() {
        text.push_str(&format!("\n  {difference}"));
    }
    if line["state"] == json!("ready") {
        let explain = &line["explain"];
        text.push_str(&format!(
            "\n  {} candidates left, {} bytes\n  explain: {}, {} keys examined for {} documents, {}",
            line["candidates"],
            line["size_bytes"],
            if line["used"] == json!(true) { "used" } else { "NOT used" },
            explain["keys_examined"],
            explain["returned"],
            if explain["sorted"] == json!(true) { "sorted in memory" } else { "no sort" },
        ));
    }
    text
}
