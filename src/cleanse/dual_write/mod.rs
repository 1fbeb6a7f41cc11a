//! Cleansing while the application writes every change to both sides.
//!
//! What the application has written to the target is newer than anything the
//! copy has read, so the copy only adds what the target lacks ([`super::keep`]).
//! What was touched meanwhile is compared, and only where the sides still differ
//! when both have been quiet for a while the target is repaired: the application
//! has then missed one side, or the copy came between its two writes. Either is
//! worth knowing, so every repair is reported.

pub mod adopt;
mod compare;
mod repair;
mod suspect;

use std::time::Duration;

use bson::{DateTime, Document, doc};
use serde_json::{Value, json};

use self::compare::Comparison;
use super::build::{self, When};
use super::follow::Follower;
use super::keep::Keeping;
use super::plan::Plan;
use super::run::Phase;
use crate::Context;
use crate::cli::cleanse::CleanseArgs;
use crate::cutover::gates::CHANGED_AT;
use crate::error::Result;
use crate::mongo::feed::Position;
use crate::verify::structure;

/// What was found and done.
#[derive(Debug, Default)]
pub struct Figures {
    /// Marked documents that were compared.
    pub compared: u64,
    /// Documents that were brought to the state of the source.
    pub repaired: u64,
    /// Documents that could not be.
    pub not_repaired: u64,
    /// Documents that never stood still.
    pub unsettled: u64,
    /// Documents that the copy has added.
    pub inserted: u64,
    /// Documents that were there when the copy came to them.
    pub existing: u64,
    /// Documents of the source that the rules keep.
    pub valid: u64,
    /// Some of the documents that differed.
    pub differences: Vec<Value>,
    /// How a target that was there differs in indexes and options.
    pub structure: Vec<Value>,
    /// Violations of a validator that was set at the end.
    pub violations: u64,
}

impl Figures {
    /// As part of the JSON result.
    pub fn json(&self) -> Value {
        json!({
            "compared": self.compared,
            "repaired": self.repaired,
            "not_repaired": self.not_repaired,
            "unsettled": self.unsettled,
            "inserted": self.inserted,
            "existing": self.existing,
            "differences": self.differences,
            "structure": self.structure,
        })
    }

    /// As lines for people.
    pub fn text(&self) -> String {
        let mut lines = vec![
            format!("  compared  {:>12}  touched documents, {} repaired", self.compared, self.repaired),
            format!("  added     {:>12}  by the copy; {} were there already", self.inserted, self.existing),
        ];
        for (count, what) in [
            (self.not_repaired, "differ and could not be repaired"),
            (self.unsettled, "never stood still: start the same command again to look at them"),
        ] {
            if count > 0 {
                lines.push(format!("  {count} documents {what}"));
            }
        }
        for difference in self.differences.iter().take(20) {
            let word = |name: &str| difference[name].as_str().unwrap_or_default().to_owned();
            lines.push(format!("    {} {}: {}", word("kind"), difference["_id"], word("outcome")));
        }
        lines.extend(self.structure.iter().map(|difference| format!("    differs: {difference}")));
        lines.join("\n")
    }
}

/// Compares what was touched and finishes the target where that is still to be
/// done; false where a signal came first.
///
/// # Errors
/// A stop where something can't be read, written or built.
pub async fn catch_up(
    context: &Context,
    plan: &Plan,
    args: &CleanseArgs,
    follower: &Follower<'_>,
    position: &mut Position,
    is_to_finish: bool,
    figures: &mut Figures,
) -> Result<bool> {
    let (mongo, events, stop) = (&context.mongo, &context.events, &context.stop);
    let grace = args.grace.0;
    let adopted = adopt::is_adopted(mongo, follower.job.name()).await?;
    if adopted {
        figures.structure = structure_differences(context, plan).await?;
    } else if is_to_finish {
        build::indexes(mongo, &plan.target, &plan.description, When::Copied, events).await?;
    }
    // What the application has written to one side during the copy is on its way
    // to the other one.
    if !unless_stopped(context, grace).await {
        return Ok(false);
    }
    let goal = mongo.last_write_time().await?;
    if !follower.mark_up_to(goal, position, stop).await? {
        return Ok(false);
    }
    let lane = follower.job.right(mongo).lane("repair").await?;
    let comparison = Comparison::new(context, plan, follower.job, lane, (grace, position.time()), figures);
    if !comparison.run().await? {
        return Ok(false);
    }
    if is_to_finish {
        if !adopted {
            build::indexes(mongo, &plan.target, &plan.description, When::CaughtUp, events).await?;
            figures.violations = build::late_options(mongo, &plan.target, &plan.description).await?;
            build::indexes(mongo, &plan.target, &plan.description, When::Last, events).await?;
        }
        follower.job.save(doc! {"phase": Phase::Done.as_str(), CHANGED_AT: DateTime::now()}).await?;
    }
    figures.valid = super::count::valid(mongo, &plan.source, &plan.predicate.valid()).await?;
    Ok(true)
}

/// Adds all of it to the result of the run. The target may hold more than what
/// was copied, so that kept documents are those of the source.
pub fn add_to(json: &mut Value, text: &mut String, figures: &Figures) {
    let documents = &mut json["documents"];
    let source = documents["source"].as_u64().unwrap_or(0);
    documents["kept"] = json!(figures.valid);
    documents["rejected"] = json!(source.saturating_sub(figures.valid));
    documents["validator_violations"] = json!(figures.violations);
    json["dual_write"] = figures.json();
    text.push('\n');
    text.push_str(&figures.text());
}

/// Adds what the copy has counted.
pub fn count_copied(figures: &mut Figures, keeping: &Keeping) {
    (figures.inserted, figures.existing) = keeping.figures();
}

async fn structure_differences(context: &Context, plan: &Plan) -> Result<Vec<Value>> {
    let checks = structure::check(&context.mongo, &plan.source, &plan.target).await?;
    let differences: Vec<Value> = checks.into_iter().flat_map(|check| check.differences).collect();
    if !differences.is_empty() {
        context.events.warn(format!(
            "{} was there before and is left as it is: {} of its indexes and options are not those of {}",
            plan.target,
            differences.len(),
            plan.source
        ));
    }
    Ok(differences)
}

/// False where a signal came first.
async fn unless_stopped(context: &Context, time: Duration) -> bool {
    tokio::select! {
        () = tokio::time::sleep(time) => true,
        () = context.stop.cancelled() => false,
    }
}

/// Marks the identity of a job that expects dual writes: no other copy goes on
/// with what it has begun.
pub fn mark_identity(identity: &mut Document, dual_write: bool) {
    if dual_write {
        identity.insert("dual_write", true);
    }
}
