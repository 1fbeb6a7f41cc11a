//! One form of a JSON document, whoever writes it, and its hash. Pure.
//!
//! Members are sorted by their names, nothing stands between them, text is UTF-8
//! and escaped only where JSON demands it. Fractions are rounded to thousandths
//! before, so that every language prints them alike. In Python the hash is that of
//! `json.dumps(d, sort_keys=True, separators=(",", ":"), ensure_ascii=False)`
//! without the member `hash`.
//!
//! The hash is a checksum, no signature: who changes a report can make a new one.
//! It protects once it is noted where the report is not kept, on the signed paper
//! for example.

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

/// The member that holds the hash and is not part of what is hashed.
const HASH: &str = "hash";

/// The canonical text of a value.
pub fn canonical(value: &Value) -> String {
    let mut text = String::new();
    write(value, &mut text);
    text
}

fn write(value: &Value, text: &mut String) {
    match value {
        Value::Array(items) => {
            text.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                write(item, text);
            }
            text.push(']');
        }
        Value::Object(members) => {
            let mut sorted: Vec<_> = members.iter().collect();
            sorted.sort_by_key(|(name, _)| *name);
            text.push('{');
            for (index, (name, member)) in sorted.into_iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                text.push_str(&Value::from(name.as_str()).to_string());
                text.push(':');
                write(member, text);
            }
            text.push('}');
        }
        plain => text.push_str(&plain.to_string()),
    }
}

/// Rounds fractions and adds the hash of everything else; returns it.
pub fn seal(document: &mut Value) -> String {
    round(document);
    let hash = hash_of(document);
    document[HASH] = json!({
        "algorithm": "SHA-256",
        "of": "this document without the member `hash`, as canonical JSON",
        "value": hash,
    });
    hash
}

/// The hash that a document tells of itself, and the one that it has.
pub fn hashes(document: &Value) -> (Option<&str>, String) {
    (document[HASH]["value"].as_str(), hash_of(document))
}

fn hash_of(document: &Value) -> String {
    let rest: Map<String, Value> = document
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, _)| *name != HASH)
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    hex(&Sha256::digest(canonical(&Value::Object(rest))))
}

/// Hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn round(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(round),
        Value::Object(members) => members.iter_mut().for_each(|(_, member)| round(member)),
        Value::Number(number) if number.is_f64() => {
            *value = json!(number.as_f64().map(|number| (number * 1000.0).round() / 1000.0));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_members_does_not_matter() {
        let one: Value = serde_json::from_str(r#"{"b": [1, {"z": null, "a": "가\n"}], "a": 1.5}"#).unwrap();
        let other: Value = serde_json::from_str(r#"{"a": 1.5, "b": [1, {"a": "가\n", "z": null}]}"#).unwrap();
        assert_eq!(canonical(&one), r#"{"a":1.5,"b":[1,{"a":"가\n","z":null}]}"#);
        assert_eq!(canonical(&one), canonical(&other));
    }

    #[test]
    fn whatever_is_changed_shows() {
        let mut document = json!({"a": {"n": 1.23456}, "b": [1, 2]});
        let hash = seal(&mut document);
        assert_eq!(document["a"]["n"], json!(1.235));
        assert_eq!(hashes(&document), (Some(hash.as_str()), hash.clone()));
        let read: Value = serde_json::from_str(&document.to_string()).unwrap();
        assert_eq!(hashes(&read), (Some(hash.as_str()), hash.clone()));
        for change in [
            |document: &mut Value| document["b"] = json!([2, 1]),
            |document: &mut Value| document["c"] = json!(null),
            |document: &mut Value| document["a"]["n"] = json!(1.234),
        ] {
            let mut other = document.clone();
            change(&mut other);
            assert_ne!(hashes(&other).1, hash);
        }
    }
}
