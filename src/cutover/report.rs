//! What a cutover and a rollback by an exchange of names report.

use std::time::Duration;

use bson::Bson;
use serde_json::{Value, json};

use super::exchange::{Exchange, Exchanged, Swapped};
use super::gap::Merged;
use super::gates::Gate;
use super::record::{Record, State, mode_word};
use super::residual::Residue;
use crate::cleanse::follow::Followed;
use crate::cli::cutover::Mode;
use crate::error::Error;

/// What is reported.
#[derive(Debug, Clone)]
pub struct Report {
    /// The command.
    pub command: &'static str,
    /// The word for what it came to.
    pub outcome: &'static str,
    /// What had to hold.
    pub gates: Vec<Gate>,
    /// For how long writes were held off.
    pub pause: Option<Duration>,
    /// What came at the last moment.
    pub residue: Residue,
    /// Where the former collection is now.
    pub old_collection: Option<String>,
    /// Why it was not done.
    pub reason: Option<String>,
    /// `_id`s of rejected documents that gave way to newer ones on the way back.
    pub displaced: Vec<Bson>,
    /// What was brought back into the former collection afterwards, where that was asked for.
    pub feed_back: Option<Followed>,
}

impl Default for Report {
    fn default() -> Self {
        Self {
            command: "cutover",
            outcome: "",
            gates: Vec::new(),
            pause: None,
            residue: Residue::default(),
            old_collection: None,
            reason: None,
            displaced: Vec::new(),
            feed_back: None,
        }
    }
}

/// `_id`s in canonical Extended JSON.
pub fn extended(ids: &[Bson]) -> Vec<Value> {
    ids.iter().cloned().map(Bson::into_canonical_extjson).collect()
}

/// What was written in the gap, in the JSON result.
pub fn gap(gap: &Merged) -> Value {
    json!({"merged": gap.merged, "deleted": gap.deleted, "conflicts": extended(&gap.conflicts)})
}

impl Report {
    /// Notes what an exchange came to; `done` is the word for one that happened.
    pub fn exchanged(&mut self, exchange: &Exchange<'_>, exchanged: Exchanged, done: &'static str) {
        match exchanged {
            Exchanged::No(reason) => {
                self.outcome = "given_up";
                self.reason = Some(reason);
            }
            Exchanged::Yes(Swapped { pause, residue }) => {
                self.outcome = done;
                self.pause = Some(pause);
                self.residue = residue;
                self.old_collection = exchange.renames.retired.as_ref().map(ToString::to_string);
            }
        }
    }

    /// Notes what a command came to that an error has ended, by what is on record. Pure.
    pub fn ended_by(&mut self, error: &Error, record: Option<&Record>) {
        self.outcome = match record {
            Some(record) if self.command == "cutover" && record.is_done() => "cut_over",
            Some(record) if self.command == "rollback" && record.state == State::RolledBack => "rolled_back",
            _ => error.class().code(),
        };
    }

    /// Whether it came to what was asked for.
    pub fn is_reached(&self) -> bool {
        self.outcome != "given_up" && self.residue.is_whole() && self.displaced.is_empty()
    }

    /// As the JSON result.
    pub fn json(&self, job: &str, mode: Mode, elapsed: Duration) -> Value {
        json!({
            "schema": 1,
            "command": self.command,
            "job": job,
            "mode": mode_word(mode),
            "outcome": self.outcome,
            "reason": self.reason,
            "pause_ms": self.pause.map(|pause| pause.as_secs_f64() * 1000.0),
            "residual_deletes": self.residue.deletes,
            "lost_writes": extended(&self.residue.lost),
            "gap": gap(&self.residue.gap),
            "displaced": extended(&self.displaced),
            "old_collection": self.old_collection,
            "feed_back": self.feed_back.map(|followed| json!({
                "changes": followed.changes,
                "written": followed.applied.written,
                "removed": followed.applied.removed,
            })),
            "gates": self.gates.iter().map(Gate::json).collect::<Vec<_>>(),
            "elapsed_seconds": elapsed.as_secs_f64(),
        })
    }

    /// As the result for people.
    pub fn text(&self, job: &str, mode: Mode) -> String {
        let mut lines: Vec<String> = self.gates.iter().map(Gate::text).collect();
        let outcome = self.outcome.replace('_', " ");
        lines.push(format!("{} of {job} by {}: {outcome}", self.command, mode_word(mode)));
        if let Some(reason) = &self.reason {
            lines.push(format!("  {reason}; the collection is live that was"));
        }
        if let Some(pause) = self.pause {
            lines.push(format!("  writes were held off for {pause:.0?}"));
        }
        let Residue { deletes, lost, gap } = &self.residue;
        if *deletes > 0 {
            lines.push(format!("  brought along from the last moment: {deletes} deletes"));
        }
        if gap.merged > 0 {
            lines.push(format!("  merged from the gap between the renames: {} documents", gap.merged));
        }
        if gap.deleted > 0 {
            lines.push(format!("  deleted in the gap between the renames: {} documents", gap.deleted));
        }
        for (ids, what) in [
            (lost, "written past validation at the last moment: the new collection does not have that"),
            (
                &self.displaced,
                "hold a unique value that a newer document has; kept in the state database (displaced)",
            ),
            (
                &gap.conflicts,
                "written into the gap though they exist; kept in the state database (gap_writes)",
            ),
        ] {
            if !ids.is_empty() {
                let shown: Vec<String> = ids.iter().take(10).map(ToString::to_string).collect();
                lines.push(format!("  {} documents {what}: {}", ids.len(), shown.join(", ")));
            }
        }
        if let Some(followed) = &self.feed_back {
            lines.push(format!("  fed back since: {} changes", followed.changes));
        }
        if let Some(old) = &self.old_collection {
            lines.push(format!("  the former collection is {old}"));
        }
        lines.join("\n")
    }
}
