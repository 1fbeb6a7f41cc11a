//! What the report is about: collections with their identities, and the rules in
//! words and as they are. Pure.

use serde_json::Value;

use super::html::{escape, list, section as section_of, shown, table};

pub(super) fn section(document: &Value) -> Option<String> {
    let subject = &document["subject"];
    let collections: Vec<Vec<String>> = list(&subject["collections"]).iter().map(row).collect();
    let words: String =
        list(&subject["words"]).iter().map(|line| format!("<li>{}</li>\n", shown(line))).collect();
    let mut body = String::new();
    if !collections.is_empty() {
        body.push_str(&table(
            "",
            &["Role", "Collection", "Identity (UUID)", "#Documents now, about"],
            &collections,
        ));
    }
    if !words.is_empty() {
        body.push_str(&format!("<h3>In words</h3>\n<ul>\n{words}</ul>\n"));
    }
    if subject["rules"].is_object() {
        body.push_str(&format!("<h3>The rules as they are</h3>\n<pre>{}</pre>\n", rules(&subject["rules"])));
    }
    (!body.is_empty()).then(|| section_of("subject", "What it is about", &body))
}

/// A line for each rule, as JSON.
fn rules(rules: &Value) -> String {
    let members = rules.as_object().into_iter().flatten();
    let lines = members.flat_map(|(kind, rule)| match rule {
        Value::Array(several) => {
            several.iter().map(|one| escape(&format!("{kind}: {one}"))).collect::<Vec<_>>()
        }
        one => vec![escape(&format!("{kind}: {one}"))],
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn row(collection: &Value) -> Vec<String> {
    let uuid = match (&collection["uuid"], &collection["uuid_in_job"]) {
        (now, then) if then.is_string() && now != then => {
            format!("<code>{}</code><br>of the job: <code>{}</code>", shown(now), shown(then))
        }
        (Value::Null, _) if collection["exists"] == Value::Bool(false) => "there is none".into(),
        (now, _) => format!("<code>{}</code>", shown(now)),
    };
    vec![
        shown(&collection["role"]),
        format!("<code>{}</code>", shown(&collection["namespace"])),
        uuid,
        shown(&collection["documents_now"]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn another_identity_than_that_of_the_job_shows() {
        let collection = json!({"role": "target", "namespace": "a.b", "uuid": "1", "uuid_in_job": "2"});
        let section = section(&json!({"subject": {"collections": [collection]}})).expect("a section");
        assert!(section.contains("<code>1</code><br>of the job: <code>2</code>"), "{section}");
        assert_eq!(super::section(&json!({})), None);
    }
}
