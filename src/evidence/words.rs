//! The rules of a copy in words, for who signs and does not read queries. Pure.
//!
//! What can't be said in plain words is shown as it stands in the config: a rule
//! is never left out and never simplified.

use serde_json::{Map, Value, json};

/// What a document must be to belong in the target, one line per rule, from the
/// rules as they stand in the identity of a job.
pub fn of_rules(rules: &Value) -> Vec<String> {
    let mut words = Vec::new();
    let keep = condition(rules["keep"].as_str().unwrap_or("{}"));
    words.push(match keep.as_str() {
        "" => "Kept are all documents that no rule below rejects.".into(),
        keep => format!("Kept are documents for which holds: {keep}."),
    });
    for rule in list(rules, "reject") {
        let when = condition(rule["when"].as_str().unwrap_or("{}"));
        let when = if when.is_empty() { "always".to_owned() } else { when };
        words.push(format!("Rejected as “{}” where: {when}.", text(rule, "name")));
    }
    for rule in list(rules, "exists_in") {
        words.push(format!(
            "Rejected as “{}” where no document of {} has the value of {} in its {}.",
            text(rule, "name"),
            text(rule, "collection"),
            text(rule, "local"),
            text(rule, "foreign")
        ));
    }
    if rules["dedupe"].is_object() {
        let by: Vec<&str> = list(&rules["dedupe"], "by").iter().filter_map(Value::as_str).collect();
        words.push(format!(
            "Of documents with the same {} only the one with the latest {} is kept.",
            by.join(" and "),
            text(&rules["dedupe"], "keep_latest")
        ));
    }
    words
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or("?")
}

/// A condition in words, from its extended JSON; empty where everything meets it.
fn condition(json: &str) -> String {
    match serde_json::from_str::<Value>(json) {
        Ok(Value::Object(fields)) => {
            all(&fields).unwrap_or_else(|| format!("the document matches {}", Value::Object(fields)))
        }
        _ => format!("the document matches {json}"),
    }
}

fn all(fields: &Map<String, Value>) -> Option<String> {
    let parts: Option<Vec<String>> = fields.iter().map(|(name, value)| part(name, value)).collect();
    Some(parts?.join(" and "))
}

fn part(name: &str, value: &Value) -> Option<String> {
    match name {
        "$and" => joined(value, " and "),
        "$or" => joined(value, " or "),
        "$nor" => Some(format!("not ({})", joined(value, " or ")?)),
        _ if name.starts_with('$') => None,
        _ => field(name, value),
    }
}

fn joined(conditions: &Value, word: &str) -> Option<String> {
    let parts: Option<Vec<String>> =
        conditions.as_array()?.iter().map(|condition| all(condition.as_object()?)).collect();
    let parts = parts?;
    match parts.as_slice() {
        [only] => Some(only.clone()),
        _ => Some(format!("({})", parts.join(word))),
    }
}

fn field(name: &str, value: &Value) -> Option<String> {
    if let Some(shown) = scalar(value) {
        return Some(if value.is_null() {
            format!("{name} is null or missing")
        } else {
            format!("{name} is {shown}")
        });
    }
    let operators = value.as_object().filter(|operators| !operators.is_empty())?;
    let parts: Option<Vec<String>> =
        operators.iter().map(|(operator, operand)| compared(name, operator, operand)).collect();
    Some(parts?.join(" and "))
}

fn compared(name: &str, operator: &str, operand: &Value) -> Option<String> {
    let shown = || scalar(operand);
    Some(match operator {
        "$eq" if operand.is_null() => format!("{name} is null or missing"),
        "$ne" if operand.is_null() => format!("{name} is there and not null"),
        "$eq" => format!("{name} is {}", shown()?),
        "$ne" => format!("{name} is not {}", shown()?),
        "$gt" => format!("{name} is greater than {}", shown()?),
        "$gte" => format!("{name} is at least {}", shown()?),
        "$lt" => format!("{name} is less than {}", shown()?),
        "$lte" => format!("{name} is at most {}", shown()?),
        "$in" => format!("{name} is one of {}", several(operand)?),
        "$nin" => format!("{name} is none of {}", several(operand)?),
        "$type" => format!("{name} is of type {}", operand.as_str()?),
        "$not" => format!("not ({})", field(name, operand)?),
        "$exists" => match operand.as_bool()? {
            true => format!("{name} is there"),
            false => format!("{name} is missing"),
        },
        _ => return None,
    })
}

fn several(values: &Value) -> Option<String> {
    let shown: Option<Vec<String>> = values.as_array()?.iter().map(scalar).collect();
    Some(shown?.join(", "))
}

/// A plain value as it is written; `None` for what is none.
fn scalar(value: &Value) -> Option<String> {
    if !value.is_object() && !value.is_array() {
        return Some(value.to_string());
    }
    let (name, inner) = value.as_object().filter(|members| members.len() == 1)?.iter().next()?;
    let inner = match (name.as_str(), inner) {
        ("$date", inner) => {
            let milliseconds: i64 = inner["$numberLong"].as_str()?.parse().ok()?;
            return bson::DateTime::from_millis(milliseconds).try_to_rfc3339_string().ok();
        }
        ("$numberInt" | "$numberLong" | "$numberDouble" | "$numberDecimal" | "$oid", inner) => inner,
        _ => return None,
    };
    inner.as_str().map(str::to_owned)
}

/// The rules as they stand in an identity, with their texts as JSON.
pub fn json_of_rules(rules: &Value) -> Value {
    let parsed = |value: &Value| {
        value.as_str().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_else(|| value.clone())
    };
    let mut all = rules.clone();
    all["keep"] = parsed(&rules["keep"]);
    let reject: Vec<Value> = list(rules, "reject")
        .iter()
        .map(|rule| json!({"name": rule["name"], "when": parsed(&rule["when"])}))
        .collect();
    all["reject"] = json!(reject);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_conditions_are_said_in_words() {
        for (json, words) in [
            ("{}", ""),
            (r#"{"newKey": {"$type": "string"}}"#, "newKey is of type string"),
            (r#"{"ownerId": null}"#, "ownerId is null or missing"),
            (
                r#"{"n": {"$gte": {"$numberInt": "3"}, "$lt": {"$numberInt": "8"}}}"#,
                "n is at least 3 and n is less than 8",
            ),
            (r#"{"$or": [{"a": "x"}, {"b": {"$exists": false}}]}"#, r#"(a is "x" or b is missing)"#),
            (r#"{"n": {"$not": {"$gt": {"$numberInt": "6"}}}}"#, "not (n is greater than 6)"),
            (r#"{"$nor": [{"a": {"$in": ["x", "y"]}}]}"#, r#"not (a is one of "x", "y")"#),
            (r#"{"at": {"$lt": {"$date": {"$numberLong": "0"}}}}"#, "at is less than 1970-01-01T00:00:00Z"),
        ] {
            assert_eq!(condition(json), words, "{json}");
        }
    }

    #[test]
    fn what_has_no_words_is_shown_as_it_is() {
        for json in [r#"{"a":{"$regex":"^x"}}"#, r#"{"$expr":{"$gt":["$a","$b"]}}"#, r#"{"a":{"b":1}}"#] {
            assert_eq!(condition(json), format!("the document matches {json}"));
        }
    }

    #[test]
    fn every_rule_has_its_line() {
        let rules = json!({
            "keep": "{\"newKey\":{\"$type\":\"string\"}}",
            "reject": [{"name": "no_owner", "when": "{\"ownerId\":null}"}],
            "exists_in": [{"name": "gone", "collection": "app.members", "local": "memberId", "foreign": "_id"}],
            "dedupe": {"by": ["memberId", "kind"], "keep_latest": "updatedAt"},
        });
        let words = of_rules(&rules);
        assert_eq!(words.len(), 4, "{words:?}");
        assert_eq!(words[1], "Rejected as “no_owner” where: ownerId is null or missing.");
        assert!(words[3].contains("memberId and kind"), "{words:?}");
        assert_eq!(json_of_rules(&rules)["reject"][0]["when"], json!({"ownerId": null}));
    }
}
