//! The result of all checks together.

use serde_json::{Value, json};

use super::check::Check;
use super::{dual_write, full};
use crate::report::outcome::Outcome;

/// What the command came to.
pub(super) fn report(
    jobs: &[String],
    checks: &[Check],
    full: Option<full::Full>,
    watched: Option<dual_write::DualWrite>,
) -> Outcome {
    let (summary, error) = full.map_or((None, None), |full| (Some(full.summary), full.error));
    let (writes, broken) = watched.map_or((None, None), |watched| (Some(watched.summary), watched.error));
    let error = error.or(broken);
    let passed = error.is_none() && checks.iter().all(|check| check.passed);
    let mut json = json!({
        "schema": 1,
        "command": "verify",
        "job": if let [job] = jobs { json!(job) } else { Value::Null },
        "jobs": jobs,
        "passed": passed,
        "checks": checks.iter().map(Check::json).collect::<Vec<_>>(),
    });
    if let Some(summary) = summary {
        json["full"] = summary;
    }
    if let Some(writes) = writes {
        json["dual_write"] = writes;
    }
    let mut lines: Vec<String> = checks.iter().map(Check::text).collect();
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
