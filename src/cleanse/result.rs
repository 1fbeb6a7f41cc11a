//! What a cleanse has done: counted at its end, and told.

use std::collections::BTreeMap;

use bson::{Document, doc};
use serde_json::json;

use super::copy::Copied;
use super::count::{self, RuleCounts};
use super::dual_write;
use super::follow::{Followed, Follower};
use super::ledger::{self, Ledger};
use super::plan::Plan;
use crate::Context;
use crate::error::Result;
use crate::job::{Job, JobState, RESULT};
use crate::mongo::Mongo;
use crate::mongo::feed::Position;
use crate::mongo::index::stored_count;
use crate::report::outcome::Outcome;

/// What a finished or interrupted copy has done.
#[derive(Debug, Default)]
pub(super) struct Figures {
    pub(super) source: u64,
    pub(super) copied: u64,
    pub(super) quarantined: u64,
    pub(super) rejected_by: BTreeMap<String, u64>,
    pub(super) violations: u64,
    pub(super) followed: Followed,
    pub(super) dual_write: dual_write::Figures,
    pub(super) limits: Vec<(&'static str, f64)>,
    /// Changes of the source during a copy that follows none.
    pub(super) touched: Option<u64>,
    pub(super) ledger: Option<Ledger>,
}

impl Figures {
    fn balance(&mut self, ledger: Ledger) {
        self.source = ledger.source_now;
        self.copied = ledger.in_target;
        self.quarantined = ledger.in_quarantine.unwrap_or(0);
        self.rejected_by.clone_from(&ledger.rejected_by);
        self.ledger = Some(ledger);
    }

    /// Whether the target is known to hold something else than what the rules keep.
    fn is_unbalanced(&self) -> bool {
        self.ledger.as_ref().and_then(Ledger::is_balanced) == Some(false)
    }
}

/// Counts when everything is done.
///
/// # Errors
/// A stop where the server can't be read.
pub(super) async fn count_at_the_end(
    plan: &Plan,
    follower: &Follower<'_>,
    position: &Position,
    by_rule: bool,
    figures: &mut Figures,
) -> Result<()> {
    let mongo = follower.mongo;
    if plan.dual_write {
        // The target holds what the application says, so no figures have to add up.
        return count_all(mongo, plan, by_rule, figures).await;
    }
    match ledger::take(mongo, plan, follower, position, by_rule).await? {
        Some(ledger) => figures.balance(ledger),
        None => count_all(mongo, plan, by_rule, figures).await?,
    }
    Ok(())
}

/// Counts what is in the target and in the quarantine.
///
/// # Errors
/// A stop where the server can't be read.
pub(super) async fn count_written(mongo: &Mongo, plan: &Plan, figures: &mut Figures) -> Result<()> {
    figures.copied = count::exactly(mongo, &plan.target, &Document::new()).await?;
    if let Some(quarantine) = &plan.quarantine {
        figures.quarantined = count::exactly(mongo, quarantine, &Document::new()).await?;
    }
    Ok(())
}

async fn count_all(mongo: &Mongo, plan: &Plan, by_rule: bool, figures: &mut Figures) -> Result<()> {
    count_written(mongo, plan, figures).await?;
    if by_rule {
        let RuleCounts { source, rejected_by, .. } =
            count::by_rule(mongo, &plan.source, &plan.predicate, 0).await?;
        figures.source = source;
        figures.rejected_by = rejected_by;
    } else {
        figures.source = count::exactly(mongo, &plan.source, &Document::new()).await?;
    }
    Ok(())
}

/// Ends the job and tells what was done, or what went wrong.
pub(super) async fn finish(
    context: &Context,
    plan: &Plan,
    job: Job,
    result: Result<Copied>,
    figures: &Figures,
    elapsed: f64,
) -> Result<Outcome> {
    let state = match &result {
        Ok(Copied::All) if figures.is_unbalanced() || figures.dual_write.not_repaired > 0 => {
            JobState::Incomplete
        }
        Ok(Copied::All) => JobState::Completed,
        Ok(Copied::Touched) => JobState::Incomplete,
        Ok(Copied::Interrupted) => JobState::Interrupted,
        Err(error) => JobState::of_failure(error),
    };
    let mut json = json!({
        "schema": 1,
        "command": "cleanse",
        "job": plan.job,
        "status": state.as_str(),
        "dry_run": false,
        "source": plan.source.to_string(),
        "target": plan.target.to_string(),
        "quarantine": plan.quarantine.as_ref().map(ToString::to_string),
        "documents": {
            "source": figures.source,
            "kept": figures.copied,
            "rejected": figures.source.saturating_sub(figures.copied),
            "rejected_by": figures.rejected_by,
            "copied": figures.copied,
            "quarantined": figures.quarantined,
            "validator_violations": figures.violations,
        },
        "job_totals": {"source": figures.source, "copied": figures.copied},
        "followed": {
            "changes": figures.followed.changes,
            "written": figures.followed.applied.written,
            "removed": figures.followed.applied.removed,
        },
        "touched_during_copy": figures.touched,
        "ledger": figures.ledger.as_ref().map(Ledger::json),
        "limited_by_seconds": figures.limits.iter().copied().collect::<BTreeMap<_, _>>(),
        "elapsed_seconds": elapsed,
    });
    let mut text = text(plan, state, figures, elapsed);
    if plan.dual_write {
        dual_write::add_to(&mut json, &mut text, &figures.dual_write);
    }
    let totals = doc! {"source": stored_count(figures.source), "copied": stored_count(figures.copied)};
    // As text: an `_id` may hold what no stored field name may.
    let saved = job.finish(state, doc! {"totals": totals, RESULT: json.to_string()}).await;
    Ok(match (result.and_then(|copied| saved.map(|()| copied)), state) {
        (Err(error), _) => Outcome::failed(json, text, error),
        (Ok(_), JobState::Interrupted) => {
            let error = context.interrupted("interrupted; what was copied and followed is kept");
            Outcome::failed(json, text, error.hint("start the same command again to go on"))
        }
        (Ok(_), JobState::Incomplete) => Outcome::not_reached(json, text),
        (Ok(_), _) => Outcome::reached(json, text),
    })
}

fn text(plan: &Plan, state: JobState, figures: &Figures, elapsed: f64) -> String {
    let mut lines = vec![format!(
        "cleanse of {} to {} {} in {elapsed:.1} s, job {}",
        plan.source,
        plan.target,
        state.as_str(),
        plan.job
    )];
    if state == JobState::Completed {
        lines.push(format!("  source    {:>12}", figures.source));
        // A target that the application writes to may hold more than was kept.
        let kept = if plan.dual_write { figures.dual_write.valid } else { figures.copied };
        lines.push(format!("  rejected  {:>12}", figures.source.saturating_sub(kept)));
        for (rule, count) in &figures.rejected_by {
            lines.push(format!("    {rule:<20} {count}"));
        }
    }
    lines.push(format!("  in target {:>12}", figures.copied));
    if let Some(quarantine) = &plan.quarantine {
        lines.push(format!("  rejected  {:>12}  kept in {quarantine}", figures.quarantined));
    }
    lines.extend(figures.ledger.as_ref().map(Ledger::text));
    if figures.followed.changes > 0 {
        let Followed { changes, applied } = figures.followed;
        lines.push(format!(
            "  followed  {changes:>12}  changes ({} documents written, {} removed)",
            applied.written, applied.removed
        ));
    }
    if let Some(touched) = figures.touched.filter(|touched| *touched > 0) {
        lines.push(format!(
            "  {touched} changes of the source while it was copied are not in the target, which has none of the other\n  indexes yet: start the same command again, and it catches up with them"
        ));
    }
    if figures.violations > 0 {
        lines.push(format!(
            "  {} of them violate the validator, as they did in the source",
            figures.violations
        ));
    }
    lines.join("\n")
}
