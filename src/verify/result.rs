//! The result of all checks together.

use serde_json::{Value, json};

use super::check::Check;
use crate::error::Error;
use crate::report::outcome::Outcome;

/// What a check is about that compares a copy with its source.
pub const COPY: &str = "copy";
/// What a check is about that looks at what a backfill has filled.
pub const BACKFILL: &str = "backfill";

/// What was found so far.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// The jobs that the checks are about.
    pub(super) jobs: Vec<String>,
    /// Checks of a copy, the most telling first.
    pub(super) of_sides: Vec<Check>,
    /// Checks of what a backfill has filled.
    pub(super) of_targets: Vec<Check>,
    /// What decided which documents were drawn.
    pub(super) seed: Option<u64>,
    /// Figures beside the checks, by their name in the result.
    pub(super) figures: Vec<(&'static str, Value)>,
    /// What ended it before its time.
    pub(super) error: Option<Error>,
}

impl Findings {
    /// Whether there was nothing to check.
    pub(super) fn is_empty(&self) -> bool {
        self.of_sides.is_empty() && self.of_targets.is_empty()
    }

    /// A check of the copy that failed; one that was cut short has not.
    pub(super) fn failed_of_sides(&self) -> Option<&Check> {
        let is_whole = |check: &&Check| self.error.is_none() || !check.name.starts_with("full");
        self.of_sides.iter().filter(is_whole).find(|check| !check.passed)
    }

    /// What the command came to.
    pub(super) fn outcome(self) -> Outcome {
        let Self { jobs, of_sides, of_targets, seed, figures, error } = self;
        let of_sides = of_sides.into_iter().map(|check| check.with("about", json!(COPY)));
        let of_targets = of_targets.into_iter().map(|check| check.with("about", json!(BACKFILL)));
        let checks: Vec<Check> = of_sides.chain(of_targets).collect();
        let passed = error.is_none() && checks.iter().all(|check| check.passed);
        let mut json = json!({
            "schema": 1,
            "command": "verify",
            "job": if let [job] = jobs.as_slice() { json!(job) } else { Value::Null },
            "jobs": jobs,
            "passed": passed,
            "checks": checks.iter().map(Check::json).collect::<Vec<_>>(),
        });
        if let Some(seed) = seed {
            json["seed"] = json!(seed);
        }
        for (name, figure) in figures {
            json[name] = figure;
        }
        let mut lines: Vec<String> = checks.iter().map(Check::text).collect();
        lines.extend(seed.map(|seed| format!("drawn by --seed {seed}")));
        lines.push(match (passed, &error) {
            (true, _) => "verification passed".into(),
            (false, None) => "verification FAILED".into(),
            (false, Some(_)) => "verification NOT DONE".into(),
        });
        let text = lines.join("\n");
        match error {
            Some(error) => Outcome::failed(json, text, error),
            None if passed => Outcome::reached(json, text),
            None => Outcome::not_reached(json, text),
        }
    }
}
