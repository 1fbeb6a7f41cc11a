//! `key-map import|export|stats|drop`: what is known about keys, in and out.

mod export;
mod import;

use serde_json::{Value, json};

use crate::Context;
use crate::cli::key_map::{DropArgs, KeyMapAction, KeyMapArgs};
use crate::error::Result;
use crate::job::running;
use crate::key_map::upkeep::{Figures, Selection};
use crate::key_map::{KeyMap, shown_api};
use crate::report::outcome::{Format, Outcome};
use crate::report::terminal;

/// Runs the command.
///
/// # Errors
/// Usage errors and refusals, before anything is touched; a stop where the key
/// map can't be read or written.
pub async fn run(context: &Context, args: &KeyMapArgs, format: Format) -> Result<Outcome> {
    match &args.action {
        KeyMapAction::Import(args) => import::run(context, args).await,
        KeyMapAction::Export(args) => export::run(context, args, format).await,
        KeyMapAction::Stats => stats(context).await,
        KeyMapAction::Drop(args) => drop_all(context, args).await,
    }
}

fn open(context: &Context, job: &str) -> Result<KeyMap> {
    Ok(KeyMap::open(&context.mongo, context.settings.key_api()?, job))
}

/// What every result begins with.
fn result(action: &str, key_map: &KeyMap) -> Value {
    json!({
        "schema": 1,
        "command": "key-map",
        "action": action,
        "job": null,
        "collection": key_map.collection_name(),
    })
}

async fn stats(context: &Context) -> Result<Outcome> {
    let key_map = open(context, "stats")?;
    let api = shown_api(context.settings.key_api()?);
    let figures = key_map.figures().await?;
    let time = |at: Option<bson::DateTime>| at.and_then(|at| at.try_to_rfc3339_string().ok());
    let examples: Vec<Value> = figures
        .examples
        .iter()
        .map(|shared| json!({"new_key": shared.new_key, "count": shared.count, "legacy_keys": shared.legacy_keys}))
        .collect();
    let mut answers = json!({"total": figures.total(), "found": 0, "not_found": 0, "rejected": 0});
    for (outcome, count) in &figures.outcomes {
        answers[outcome.as_str()] = json!(count);
    }
    answers["held"] = json!(figures.held);
    let jobs: Vec<Value> =
        figures.jobs.iter().map(|(job, count)| json!({"job": job, "answers": count})).collect();
    let mut json = result("stats", &key_map);
    json["api"] = json!(api);
    json["answers"] = answers;
    json["jobs"] = json!(jobs);
    json["oldest"] = json!(time(figures.oldest));
    json["newest"] = json!(time(figures.newest));
    json["shared_new_keys"] = json!({"count": figures.shared, "examples": examples});
    Ok(Outcome::reached(json, stats_text(&api, &key_map, &figures)))
}

fn stats_text(api: &str, key_map: &KeyMap, figures: &Figures) -> String {
    let mut lines = vec![format!("{}: {} answers of {api}", key_map.collection_name(), figures.total())];
    for (outcome, count) in &figures.outcomes {
        lines.push(format!("  {outcome:<12} {count:>12}"));
    }
    if figures.held > 0 {
        lines.push(format!("  {} of them are held: no guard has judged them yet", figures.held));
    }
    for (job, count) in &figures.jobs {
        lines.push(format!("by {job}: {count}"));
    }
    let time = |at: bson::DateTime| at.try_to_rfc3339_string().unwrap_or_default();
    if let (Some(oldest), Some(newest)) = (figures.oldest, figures.newest) {
        lines.push(format!("from {} to {}", time(oldest), time(newest)));
    }
    if figures.shared > 0 {
        lines.push(format!("{} new keys stand for more than one legacy key, such as", figures.shared));
    }
    for shared in &figures.examples {
        let more = if usize::try_from(shared.count).is_ok_and(|count| count > shared.legacy_keys.len()) {
            ", …"
        } else {
            ""
        };
        lines.push(format!(
            "  {} for {} legacy keys: {}{more}",
            shared.new_key,
            shared.count,
            shared.legacy_keys.join(", ")
        ));
    }
    lines.join("\n")
}

async fn drop_all(context: &Context, args: &DropArgs) -> Result<Outcome> {
    let key_map = open(context, "drop")?;
    running::refuse_beside_backfills(&context.mongo, |_| true).await?;
    let count = key_map.count(Selection { outcome: None, with_held: true }).await?;
    let api = shown_api(context.settings.key_api()?);
    let question = format!("{count} answers of {api} are forgotten and will be asked for again. Drop them?");
    terminal::confirm(question, args.yes).await?;
    // The answer may have taken its time.
    running::refuse_beside_backfills(&context.mongo, |_| true).await?;
    key_map.drop_all().await?;
    let mut json = result("drop", &key_map);
    json["answers_dropped"] = json!(count);
    Ok(Outcome::reached(json, format!("{count} answers of {api} are forgotten")))
}
