//! Indexes and options of two collections compared.

use std::collections::BTreeSet;

use bson::{Bson, Document};
use serde_json::{Map, Value, json};

use super::check::Check;
use crate::config::values::Namespace;
use crate::error::Result;
use crate::mongo::Mongo;
use crate::mongo::catalog::Description;

/// What the server adds by itself and may differ between versions of it.
const NOT_COMPARED: [&str; 5] = ["v", "ns", "background", "uuid", "autoIndexId"];

/// Compares what the collections have besides documents.
///
/// # Errors
/// A stop where the server can't be asked.
pub async fn check(mongo: &Mongo, source: &Namespace, target: &Namespace) -> Result<Vec<Check>> {
    let (Some(expected), Some(found)) = (mongo.describe(source).await?, mongo.describe(target).await?) else {
        let what = format!("{source} or {target} is missing");
        return Ok(["indexes", "options"].map(|name| Check::nothing(name, &what)).into());
    };
    Ok(vec![indexes(&expected, &found), options(&expected, &found)])
}

fn indexes(expected: &Description, found: &Description) -> Check {
    let name = |index: &Document| index.get_str("name").unwrap_or("unnamed").to_owned();
    let named = |description: &Description| -> Vec<(String, Bson)> {
        description.indexes.iter().map(|index| (name(index), Bson::Document(index.clone()))).collect()
    };
    compared("indexes", "index", &named(expected), &named(found))
}

fn options(expected: &Description, found: &Description) -> Check {
    let named = |description: &Description| -> Vec<(String, Bson)> {
        let options = description.options.iter();
        options
            .filter(|(name, value)| !NOT_COMPARED.contains(&name.as_str()) && !is_default(name, value))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    };
    compared("options", "option", &named(expected), &named(found))
}

/// Whether an option says what holds without it: a fence that was lifted leaves
/// such ones behind.
fn is_default(name: &str, value: &Bson) -> bool {
    match name {
        "validationLevel" => value.as_str() == Some("strict"),
        "validationAction" => value.as_str() == Some("error"),
        "validator" => value.as_document().is_some_and(Document::is_empty),
        _ => false,
    }
}

/// What differs, in a few words; `None` where nothing does.
pub fn told(checks: &[Check]) -> Option<String> {
    let differences = checks.iter().flat_map(|check| {
        let words = |difference: &Value| {
            let name = ["index", "option"].iter().find_map(|what| difference[*what].as_str());
            format!("{} `{}`", difference["kind"].as_str().unwrap_or("other"), name.unwrap_or("unnamed"))
        };
        let all: Vec<String> = check.differences.iter().map(words).collect();
        (!check.passed).then(|| format!("{}: {}", check.name, all.join(", ")))
    });
    let told: Vec<String> = differences.collect();
    (!told.is_empty()).then(|| told.join("; "))
}

fn compared(name: &str, what: &str, expected: &[(String, Bson)], found: &[(String, Bson)]) -> Check {
    let entry = |name: &str, kind: &str, expected: Option<&Bson>, found: Option<&Bson>| {
        let mut entry = Map::new();
        entry.insert(what.into(), json!(name));
        entry.insert("kind".into(), json!(kind));
        for (side, value) in [("expected", expected), ("found", found)] {
            if let Some(value) = value {
                entry.insert(side.into(), value.clone().into_relaxed_extjson());
            }
        }
        entry.insert("advice".into(), json!(advice(what, name, kind)));
        Value::Object(entry)
    };
    let look_up = |list: &'_ [(String, Bson)], name: &str| -> Option<Bson> {
        list.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone())
    };
    let mut differences = Vec::new();
    for (name, value) in expected {
        match look_up(found, name) {
            None => differences.push(entry(name, "missing", Some(value), None)),
            Some(other) if !is_same(value, &other) => {
                differences.push(entry(name, "different", Some(value), Some(&other)));
            }
            Some(_) => {}
        }
    }
    for (name, value) in found.iter().filter(|(name, _)| look_up(expected, name).is_none()) {
        differences.push(entry(name, "extra", None, Some(value)));
    }
    let names = |list: &[(String, Bson)]| json!(list.iter().map(|(name, _)| name).collect::<Vec<_>>());
    let check = Check::of(name, names(expected), names(found), differences);
    // The order in which they were made does not matter.
    Check { passed: check.differences.is_empty(), ..check }
}

/// What to do about a difference: what is no document is not repaired.
fn advice(what: &str, name: &str, kind: &str) -> String {
    match (what, kind) {
        ("index", "missing") => format!("make `{name}` in the target by createIndexes, as it is expected"),
        ("index", "extra") => format!("drop `{name}` from the target, or make it in the source too"),
        ("index", _) => format!("drop `{name}` from the target and make it as it is expected"),
        (_, "extra") => format!("take `{name}` away from the target by collMod, or copy anew"),
        _ => format!("set `{name}` of the target by collMod, or copy anew where that can't"),
    }
}

/// Whether two definitions mean the same: the order of their own fields does
/// not matter, that of what stands in them does.
fn is_same(left: &Bson, right: &Bson) -> bool {
    let (Bson::Document(left), Bson::Document(right)) = (left, right) else {
        return is_same_value(left, right);
    };
    let fields = |document: &Document| {
        document
            .keys()
            .filter(|name| !NOT_COMPARED.contains(&name.as_str()))
            .cloned()
            .collect::<BTreeSet<_>>()
    };
    let names = fields(left);
    let is_same_field = |name: &String| match (left.get(name), right.get(name)) {
        (Some(left), Some(right)) => is_same_value(left, right),
        _ => false,
    };
    names == fields(right) && names.iter().all(is_same_field)
}

/// The type of a number does not matter.
fn is_same_value(left: &Bson, right: &Bson) -> bool {
    let number = |value: &Bson| match value {
        Bson::Int32(number) => Some(f64::from(*number)),
        Bson::Int64(number) => Some(*number as f64),
        Bson::Double(number) => Some(*number),
        _ => None,
    };
    match (left, right) {
        (Bson::Document(left), Bson::Document(right)) => {
            left.len() == right.len()
                && left
                    .iter()
                    .zip(right)
                    .all(|((name, value), (other, found))| name == other && is_same_value(value, found))
        }
        (Bson::Array(left), Bson::Array(right)) => {
            left.len() == right.len()
                && left.iter().zip(right).all(|(left, right)| is_same_value(left, right))
        }
        #[expect(clippy::float_cmp, reason = "equal or not is the question")]
        _ => match (number(left), number(right)) {
            (Some(left), Some(right)) => left == right,
            _ => left == right,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::doc;

    fn description(options: Document, indexes: &[Document]) -> Description {
        Description { kind: "collection".into(), options, uuid: None, indexes: indexes.to_vec() }
    }

    fn kinds(check: &Check) -> Vec<String> {
        let kind = |difference: &Value| difference["kind"].as_str().expect("a kind").to_owned();
        check.differences.iter().map(kind).collect()
    }

    #[test]
    fn indexes_are_compared_by_name_and_definition() {
        let id = doc! {"v": 2, "key": {"_id": 1}, "name": "_id_"};
        let email = doc! {"v": 2, "key": {"email": 1, "at": -1}, "name": "email", "unique": true};
        let of = |indexes: &[Document]| description(doc! {}, indexes);
        let same = doc! {"name": "email", "unique": true, "v": 1, "key": {"email": 1.0, "at": -1_i64}};
        assert!(indexes(&of(&[id.clone(), email.clone()]), &of(&[same, id.clone()])).passed);
        for (found, kind) in [
            (vec![id.clone()], "missing"),
            (vec![id.clone(), email.clone(), doc! {"name": "x", "key": {"x": 1}}], "extra"),
            (vec![id.clone(), doc! {"name": "email", "key": {"email": 1, "at": -1}}], "different"),
            (
                vec![id.clone(), doc! {"name": "email", "key": {"at": -1, "email": 1}, "unique": true}],
                "different",
            ),
        ] {
            let check = indexes(&of(&[id.clone(), email.clone()]), &of(&found));
            assert!(!check.passed);
            assert_eq!(kinds(&check), [kind]);
        }
    }

    #[test]
    fn a_missing_or_other_validator_is_found() {
        let of = |options: Document| description(options, &[]);
        let strict = doc! {"validator": {"a": {"$type": "int"}}, "validationLevel": "strict"};
        assert!(options(&of(strict.clone()), &of(strict.clone())).passed);
        assert_eq!(kinds(&options(&of(strict.clone()), &of(doc! {}))), ["missing"]);
        let lifted = doc! {"validator": {}, "validationLevel": "strict", "validationAction": "error"};
        assert!(options(&of(doc! {}), &of(lifted)).passed, "what holds anyway");
        let lax = doc! {"validator": {"a": {"$type": "int"}}, "validationLevel": "moderate"};
        let checks = [options(&of(strict.clone()), &of(lax))];
        assert_eq!(told(&checks), Some("options: extra `validationLevel`".into()));
        assert_eq!(told(&[]), None);
        let other = doc! {"validator": {"a": {"$type": "long"}}, "validationLevel": "strict"};
        assert_eq!(kinds(&options(&of(strict), &of(other))), ["different"]);
    }
}
