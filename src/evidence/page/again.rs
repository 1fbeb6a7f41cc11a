//! How to run it again, how to see whether the report was changed, and who signs.
//! Pure.

use serde_json::Value;

use super::html::{escape, facts, list, section as section_of, shown, table};

pub(super) fn section(document: &Value) -> Option<String> {
    let run = &document["run"];
    let mut body = String::new();
    if let Some(line) = run["command_line"].as_str() {
        body.push_str(&format!(
            "<h3>The command</h3>\n<pre>{}</pre>\n<p class=\"note\">Without the connection string and the address of \
             the key API, which may hold secrets: bring your own config, or <code>MONGOREKEY_URI</code>.</p>\n",
            escape(line)
        ));
    }
    body.push_str(&facts(&[
        ("Last run by", shown(&run["tool"])),
        ("On", shown(&run["host"])),
        ("Process", run["process"].as_u64().map(|process| process.to_string()).unwrap_or_default()),
    ]));
    let options: Vec<Vec<String>> = list(&run["options"]).iter().map(option).chain(settings(run)).collect();
    if !options.is_empty() {
        body.push_str(&table("Options and settings", &["Name", "Value", "Given"], &options));
    }
    let seeds = list(&run["seeds"]);
    if !seeds.is_empty() {
        let rows: Vec<Vec<String>> =
            seeds.iter().map(|seed| vec![shown(&seed["check"]), escape(&seed["seed"].to_string())]).collect();
        body.push_str(&table(
            "Seeds: with the same one, by <code>--seed</code>, the same documents are drawn",
            &["Check", "Seed"],
            &rows,
        ));
    }
    body.push_str(&format!(
        "<h3>Whether it was changed</h3>\n<p>SHA-256 of the JSON document, in canonical form and without its member \
         <code>hash</code>:</p>\n<p><code class=\"hash\">{}</code></p>\n<p class=\"note\"><code>mongorekey report \
         --check FILE.json</code> computes it again and compares this page with the one that the document makes. \
         The hash is no signature: it protects where it is noted apart from the files, as on this sheet once it \
         is signed.</p>\n{SIGNATURES}",
        shown(&document["hash"]["value"])
    ));
    Some(section_of("again", "To run it again", &body))
}

const SIGNATURES: &str = "<div class=\"signatures\">\n<div><span>Made by (name, date, signature)</span></div>\n\
<div><span>Checked by (name, date, signature)</span></div>\n</div>\n";

fn option(option: &Value) -> Vec<String> {
    let given = if option["is_default"] == Value::Bool(true) { "default" } else { "given" };
    vec![
        format!("<code>{}</code>", shown(&option["name"])),
        format!("<code>{}</code>", shown(&option["value"])),
        given.into(),
    ]
}

/// What a job was started with.
fn settings(run: &Value) -> Vec<Vec<String>> {
    let settings = run["settings"].as_object().into_iter().flatten();
    settings
        .map(|(name, value)| {
            vec![
                format!("<code>{}</code>", escape(name)),
                format!("<code>{}</code>", escape(&super::html::text(value))),
                "of the last run".into(),
            ]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn options_seeds_and_the_hash_are_told() {
        let document = json!({
            "run": {
                "command_line": "mongorekey verify --full",
                "options": [{"name": "--settle", "value": "10s", "is_default": true}],
                "seeds": [{"check": "sample", "seed": 42}],
                "settings": {"tps": 10.5},
            },
            "hash": {"value": "abc"},
        });
        let section = section(&document).expect("a section");
        for told in ["mongorekey verify --full", "--settle", "default", "42", "10.5", "abc", "signature"] {
            assert!(section.contains(told), "{told}: {section}");
        }
    }
}
