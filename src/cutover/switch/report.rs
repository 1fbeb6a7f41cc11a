//! What a switch and its way back report.

use std::time::Duration;

use bson::Bson;
use serde_json::{Value, json};

use super::sync::Done;
use crate::cutover::gates::Gate;

/// What is reported.
#[derive(Debug, Default)]
pub struct Report {
    /// The command.
    pub command: &'static str,
    /// The word for what it came to.
    pub outcome: &'static str,
    /// What had to hold.
    pub gates: Vec<Gate>,
    /// What was brought to the new collection.
    pub forward: Done,
    /// What was brought back.
    pub back: Option<Done>,
    /// Documents that belong to the side that was written to.
    pub owned: u64,
    /// The first `_id`s about which both sides differ, and how many there are.
    pub conflicts: (Vec<Bson>, u64),
    /// The collection that the application leaves.
    pub old_collection: String,
}

impl Report {
    /// Whether it came to what was asked for.
    pub fn is_reached(&self) -> bool {
        self.conflicts.1 == 0
    }

    /// As the JSON result.
    pub fn json(&self, job: &str, elapsed: Duration) -> Value {
        let done =
            |done: &Done| json!({"changes": done.changes, "written": done.written, "removed": done.removed});
        let ids: Vec<Value> = self.conflicts.0.iter().cloned().map(Bson::into_canonical_extjson).collect();
        json!({
            "schema": 1,
            "command": self.command,
            "job": job,
            "mode": "switch",
            "outcome": self.outcome,
            "pause_ms": 0,
            "residual_deletes": 0,
            "followed": done(&self.forward),
            "feed_back": self.back.as_ref().map(done),
            "owned": self.owned,
            "conflicts": {"count": self.conflicts.1, "documents": ids},
            "old_collection": self.old_collection,
            "gates": self.gates.iter().map(Gate::json).collect::<Vec<_>>(),
            "elapsed_seconds": elapsed.as_secs_f64(),
        })
    }

    /// As the result for people.
    pub fn text(&self, job: &str) -> String {
        let mut lines: Vec<String> = self.gates.iter().map(Gate::text).collect();
        lines.push(format!("{} of {job} by switch: {}", self.command, self.outcome.replace('_', " ")));
        for (what, done) in [("brought along", Some(self.forward)), ("brought back", self.back)] {
            if let Some(Done { changes, written, removed }) = done.filter(|done| done.changes > 0) {
                lines.push(format!("  {what}: {changes} changes, {written} written, {removed} removed"));
            }
        }
        lines.push(format!("  written to by the application itself: {} documents", self.owned));
        let (first, count) = &self.conflicts;
        if *count > 0 {
            let shown: Vec<String> = first.iter().take(10).map(ToString::to_string).collect();
            lines.push(format!(
                "  {count} documents were written to on both sides and differ; each side keeps its own: {}",
                shown.join(", ")
            ));
        }
        lines.push(format!("  the old collection is {}, as it was left", self.old_collection));
        lines.join("\n")
    }
}
