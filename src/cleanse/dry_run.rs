//! Shows what a cleanse would do, without a single write.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::count::{self, RuleCounts};
use super::outlook;
use super::plan::{Plan, range_count};
use super::target::{self, index_name};
use crate::Context;
use crate::error::{Error, Result};
use crate::report::outcome::Outcome;
use crate::report::progress::duration;

/// `_id`s that are shown per rule.
const SAMPLES: i64 = 5;

/// Runs the dry run; `refusal` is what the run itself would end with, and so does this.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn run(context: &Context, plan: &Plan, rate: u32, refusal: Option<Error>) -> Result<Outcome> {
    let started = std::time::Instant::now();
    let mongo = &context.mongo;
    context.events.note(format!("counting {} by rule; nothing is written", plan.source));
    let counts = count::by_rule(mongo, &plan.source, &plan.predicate, SAMPLES).await?;
    let average = average_size(context, plan).await;
    let indexes: Vec<String> = target::indexes(&plan.description).iter().map(index_name).collect();
    let mut warnings = Vec::new();
    warnings.extend(refusal.as_ref().map(|error| format!("the run would be refused: {error}")));
    if mongo.describe(&plan.target).await?.is_some() {
        warnings.push(format!("{} exists already", plan.target));
    }
    if let Some(quarantine) = &plan.quarantine
        && mongo.describe(quarantine).await?.is_some()
    {
        warnings.push(format!("{quarantine} exists already"));
    }
    let (outlook, notes) = outlook::look(context, plan, &counts, rate).await?;
    warnings.extend(notes);
    let mut steps = json!({
        "ranges": range_count(mongo, plan).await,
        "parallel": plan.parallel,
        "expected_documents": counts.kept,
        "expected_bytes": counts.kept * average,
        "indexes": indexes,
        "options": bson::Bson::Document(plan.description.options.clone()).into_relaxed_extjson(),
        "warnings": warnings,
    });
    if let (Value::Object(steps), Value::Object(outlook)) = (&mut steps, outlook) {
        steps.extend(outlook);
    }
    let samples: Map<String, Value> = counts
        .samples
        .iter()
        .map(|(rule, ids)| {
            (
                rule.clone(),
                ids.iter().map(|id| id.clone().into_canonical_extjson()).collect::<Vec<_>>().into(),
            )
        })
        .collect();
    let json = json!({
        "schema": 1,
        "command": "cleanse",
        "job": plan.job,
        "dry_run": true,
        "source": plan.source.to_string(),
        "target": plan.target.to_string(),
        "quarantine": plan.quarantine.as_ref().map(ToString::to_string),
        "documents": {
            "source": counts.source,
            "kept": counts.kept,
            "rejected": counts.rejected(),
            "rejected_by": counts.rejected_by,
            "copied": 0,
        },
        "samples": samples,
        "plan": steps,
        "elapsed_seconds": started.elapsed().as_secs_f64(),
    });
    let text = text(plan, &counts, &json);
    Ok(match refusal {
        Some(error) => Outcome::failed(json, text, error),
        None => Outcome::reached(json, text),
    })
}

/// Average size of a document in bytes; 0 where it can't be asked for.
pub(super) async fn average_size(context: &Context, plan: &Plan) -> u64 {
    let command = bson::doc! {"collStats": &plan.source.collection};
    let stats = context.mongo.database(&plan.source.database).run_command(command).await;
    stats
        .ok()
        .and_then(|stats| stats.get("avgObjSize").and_then(crate::mongo::index::whole_number))
        .unwrap_or(0)
}

fn text(plan: &Plan, counts: &RuleCounts, json: &Value) -> String {
    let mut lines = vec![
        format!("dry run: {} to {}, nothing was written", plan.source, plan.target),
        format!("  source    {:>12}", counts.source),
        format!("  kept      {:>12}", counts.kept),
        format!("  rejected  {:>12}", counts.rejected()),
    ];
    for (rule, count) in &counts.rejected_by {
        let samples = counts.samples.get(rule).map(Vec::as_slice).unwrap_or_default();
        let shown: Vec<String> = samples.iter().take(3).map(ToString::to_string).collect();
        let example =
            if shown.is_empty() { String::new() } else { format!("  such as {}", shown.join(", ")) };
        lines.push(format!("    {rule:<20} {count:>8}{example}"));
    }
    if let Some(quarantine) = &plan.quarantine {
        lines.push(format!(
            "rejected documents go to {quarantine}, which reads the source once more per rule"
        ));
    }
    let steps = &json["plan"];
    let indexes: Vec<&str> =
        steps["indexes"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    lines.push(format!(
        "plan: {} ranges, {} at once; about {} bytes in {}, by {}; indexes: {}",
        steps["ranges"],
        steps["parallel"],
        steps["expected_bytes"],
        duration(
            Duration::try_from_secs_f64(steps["expected_seconds"].as_f64().unwrap_or(0.0))
                .unwrap_or_default()
        ),
        steps["expected_seconds_from"].as_str().unwrap_or_default(),
        if indexes.is_empty() { "only _id".into() } else { indexes.join(", ") },
    ));
    for warning in steps["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        lines.push(format!("note: {warning}"));
    }
    lines.join("\n")
}
