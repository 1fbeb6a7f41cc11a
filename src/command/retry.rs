//! `retry`: flags taken back, so that the next backfill asks again.
//!
//! The answers behind a page of flags are forgotten before the flags are
//! cleared. Killed in between, the flags still stand and a second start finds
//! them; the other way round the documents would be candidates that the key map
//! answers with the old no.

use std::collections::BTreeSet;

use bson::Document;
use serde_json::json;

use crate::Context;
use crate::cli::retry::RetryArgs;
use crate::config::Target;
use crate::error::{Class, Result};
use crate::event::Progress;
use crate::job::running;
use crate::key_map::{KeyMap, StoredOutcome};
use crate::mongo::flags::{Flagged, Flags};
use crate::mongo::sink::FlagReason;
use crate::report::outcome::Outcome;
use crate::report::terminal;

/// Flags per page.
const PAGE: i64 = 1000;

/// What became of one target.
struct Cleared {
    collection: String,
    flags: u64,
}

/// Runs the command.
///
/// # Errors
/// Usage errors and refusals, before anything is touched; a stop where the
/// database can't be written, or a backfill was started meanwhile.
pub async fn run(context: &Context, args: &RetryArgs) -> Result<Outcome> {
    let targets = context.settings.targets(args.targets.target.as_deref())?;
    let outcome = outcome_behind(args.reason);
    let key_map = match outcome {
        Some(_) => Some(KeyMap::open(&context.mongo, context.settings.key_api()?, "retry")),
        None => None,
    };
    for target in &targets {
        context.mongo.describe_target(target).await?.check_fillable(&target.namespace)?;
    }
    refuse_beside_the_job(context, args, &targets).await?;
    terminal::confirm(question(args, &targets), args.yes).await?;
    let mut retry =
        Retry { context, args, targets: &targets, key_map, outcome, cleared: Vec::new(), forgotten: 0 };
    for target in &targets {
        retry.target(target).await?;
    }
    Ok(retry.report())
}

/// The answer that leads to flags of that reason.
fn outcome_behind(reason: FlagReason) -> Option<StoredOutcome> {
    match reason {
        FlagReason::NotFound => Some(StoredOutcome::NotFound),
        FlagReason::Rejected => Some(StoredOutcome::Rejected),
        FlagReason::NoLegacyKey => None,
    }
}

/// A backfill of the same collections would write the flags that are cleared.
async fn refuse_beside_the_job(context: &Context, args: &RetryArgs, targets: &[Target]) -> Result<()> {
    let ours: BTreeSet<String> = targets.iter().map(|target| target.namespace.to_string()).collect();
    let named =
        |job: &Document| args.job.as_deref().is_some_and(|name| job.get_str("_id").ok() == Some(name));
    let concerns = |job: &Document| named(job) || running::is_about(job, &ours);
    running::refuse_beside_backfills(&context.mongo, concerns).await
}

fn question(args: &RetryArgs, targets: &[Target]) -> String {
    let names: Vec<String> = targets.iter().map(|target| target.namespace.to_string()).collect();
    let by = args.job.as_ref().map_or(String::new(), |job| format!(" by the job {job}"));
    format!(
        "The flags {}{by} in {} are cleared and asked for again by the next backfill. Clear them?",
        args.reason.as_str(),
        names.join(", ")
    )
}

/// A retry under way.
struct Retry<'a> {
    context: &'a Context,
    args: &'a RetryArgs,
    targets: &'a [Target],
    key_map: Option<KeyMap>,
    outcome: Option<StoredOutcome>,
    cleared: Vec<Cleared>,
    forgotten: u64,
}

impl Retry<'_> {
    async fn target(&mut self, target: &Target) -> Result<()> {
        let mongo = &self.context.mongo;
        let flags = Flags { reason: self.args.reason, job: self.args.job.as_deref() };
        let mut cleared = 0;
        let mut after = None;
        loop {
            let page = mongo.flagged(target, flags, after.as_ref(), PAGE).await?;
            let Some(last) = page.last() else { break };
            refuse_beside_the_job(self.context, self.args, self.targets)
                .await
                .map_err(|error| error.with_class(Class::Stopped))?;
            self.forgotten += self.forget(&page).await?;
            cleared += mongo.clear_flags(target, flags, &page).await?;
            after = Some(last.id.clone());
            self.context.events.progress(Progress {
                phase: format!("retry {}", target.namespace),
                unit: "flags",
                done: cleared,
                total: None,
                limited_by: None,
                detail: format!("{} answers forgotten", self.forgotten),
            });
        }
        self.cleared.push(Cleared { collection: target.namespace.to_string(), flags: cleared });
        Ok(())
    }

    async fn forget(&self, page: &[Flagged]) -> Result<u64> {
        let (Some(key_map), Some(outcome)) = (&self.key_map, self.outcome) else { return Ok(0) };
        let keys: BTreeSet<String> = page.iter().filter_map(|flagged| flagged.legacy.text()).collect();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        key_map.forget(&keys, outcome).await
    }

    fn report(&self) -> Outcome {
        let targets: Vec<_> = self
            .cleared
            .iter()
            .map(|target| json!({"collection": target.collection, "cleared": target.flags}))
            .collect();
        let json = json!({
            "schema": 1,
            "command": "retry",
            "reason": self.args.reason.as_str(),
            "job": self.args.job,
            "targets": targets,
            "answers_forgotten": self.forgotten,
        });
        let reason = self.args.reason.as_str();
        let mut lines: Vec<String> = self
            .cleared
            .iter()
            .map(|target| format!("{}: {} flags {reason} cleared", target.collection, target.flags))
            .collect();
        lines.push(format!("{} answers forgotten", self.forgotten));
        if self.cleared.iter().any(|target| target.flags > 0) {
            lines.push(
                "next: `mongorekey backfill` asks again; where most of these keys still have none, its guard \
                 stops it unless `backfill.max_not_found_share` is raised for that run"
                    .into(),
            );
        }
        Outcome::reached(json, lines.join("\n"))
    }
}
