//! Fractions that must not be rounded, as text. Pure.
//!
//! A report rounds its fractions, so that every language prints them alike. What was
//! measured loses nothing by that; a bound of a few in ten thousand would say that
//! nothing differs, and a definition would be another one.

use serde_json::{Value, json};

/// Checks for a report: bounds as decimal text, doubles of definitions as in canonical
/// extended JSON.
pub(super) fn checks(checks: &[Value]) -> Vec<Value> {
    checks.iter().cloned().map(check).collect()
}

fn check(mut check: Value) -> Value {
    for bound in ["share_from", "share_to"] {
        if let Some(share) = check["confidence"][bound].as_f64() {
            check["confidence"][bound] = json!(decimal(share));
        }
    }
    for difference in check["differences"].as_array_mut().into_iter().flatten() {
        for side in ["expected", "found"] {
            if let Some(definition) = difference.get_mut(side) {
                keep_doubles(definition);
            }
        }
    }
    check
}

/// Six digits that count, without an exponent.
fn decimal(share: f64) -> String {
    format!("{share:.5e}").parse().unwrap_or(share).to_string()
}

fn keep_doubles(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(keep_doubles),
        Value::Object(members) => members.iter_mut().for_each(|(_, member)| keep_doubles(member)),
        Value::Number(number) if number.is_f64() => {
            *value = json!({"$numberDouble": number.to_string()});
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::canonical::seal;
    use super::*;
    use crate::verify::confidence::Sampled;

    #[test]
    fn a_bound_survives_the_seal_however_small() {
        for (compared, expected) in [(10_000, "0.000299528"), (10_000_000, "0.000000299573")] {
            let sampled = Sampled { compared, different: 0, is_all: false };
            let found = checks(&[json!({"name": "sample", "confidence": sampled.json()})]);
            let mut document = json!({"checks": found});
            seal(&mut document);
            assert_eq!(document["checks"][0]["confidence"]["share_to"], json!(expected));
            assert_eq!(document["checks"][0]["confidence"]["share_from"], json!("0"));
            assert_eq!(document["checks"][0]["confidence"]["compared"], json!(compared));
        }
    }

    #[test]
    fn a_definition_is_told_as_it_is() {
        let index = json!({"key": {"n": 1}, "partialFilterExpression": {"n": {"$gt": [0.00025, 3.0, 4]}}});
        let check = json!({"name": "indexes", "differences": [{"index": "n_1", "found": index}, "n_2"]});
        let mut document = json!({"checks": checks(&[check])});
        seal(&mut document);
        let found = &document["checks"][0]["differences"][0]["found"];
        let double = |text: &str| json!({"$numberDouble": text});
        assert_eq!(
            found["partialFilterExpression"]["n"]["$gt"],
            json!([double("0.00025"), double("3.0"), 4])
        );
        assert_eq!(found["key"], json!({"n": 1}));
    }
}
