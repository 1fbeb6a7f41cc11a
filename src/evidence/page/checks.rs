//! Each check with what was expected and what was found. Pure.

use serde_json::Value;

use super::html::{escape, list, section as section_of, shown, table};

/// Members of a check that have a place of their own.
const KNOWN: [&str; 7] = ["name", "about", "passed", "expected", "found", "differences", "remark"];

pub(super) fn section(document: &Value) -> Option<String> {
    let checks = list(&document["checks"]);
    if checks.is_empty() {
        return None;
    }
    let rows: Vec<Vec<String>> = checks.iter().map(row).collect();
    let body = table("", &["Result", "Check", "#Expected", "#Found", "What it says"], &rows);
    Some(section_of("checks", "Checks", &body))
}

fn row(check: &Value) -> Vec<String> {
    let mark = match check["passed"].as_bool() {
        Some(true) => "<span class=\"mark good\">✓ passed</span>",
        _ => "<span class=\"mark bad\">✗ failed</span>",
    };
    vec![
        mark.into(),
        shown(&check["name"]),
        amount(&check["expected"]),
        amount(&check["found"]),
        remarks(check),
    ]
}

/// Numbers as they are, lists as lists.
fn amount(value: &Value) -> String {
    match value {
        Value::Array(items) if items.is_empty() => "none".into(),
        Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join(", "),
        Value::Object(members) => members
            .iter()
            .map(|(name, value)| format!("{}: {}", escape(name), shown(value)))
            .collect::<Vec<_>>()
            .join(", "),
        plain => shown(plain),
    }
}

/// The remark, and whatever else a check tells.
fn remarks(check: &Value) -> String {
    let mut parts: Vec<String> = check["remark"].as_str().map(escape).into_iter().collect();
    let further = check.as_object().into_iter().flatten();
    let further = further.filter(|(name, value)| !KNOWN.contains(&name.as_str()) && !value.is_null());
    parts.extend(
        further.map(|(name, value)| format!("{}: {}", escape(&name.replace('_', " ")), amount(value))),
    );
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn whatever_a_check_tells_is_told() {
        let check = json!({"name": "sample", "passed": true, "expected": 5000, "found": [], "differences": [],
            "remark": "0 of 5000 differ", "seed": 42, "by_reason": {"not_found": 3}});
        let section = section(&json!({"checks": [check]})).expect("a section");
        assert!(section.contains("0 of 5000 differ; seed: 42; by reason: not_found: 3"), "{section}");
        assert!(section.contains("5,000") && section.contains("none"), "{section}");
    }

    #[test]
    fn what_does_not_say_that_it_passed_has_failed() {
        assert!(row(&json!({"passed": null}))[0].contains("failed"));
    }
}
