//! What became of documents and calls, as bars and numbers. Pure.

use serde_json::Value;

use super::bars::{Bar, Tone, draw};
use super::html::{escape, list, section as section_of, shown, table, text};

pub(super) fn section(document: &Value) -> Option<String> {
    let groups = list(&document["outcomes"]);
    let drawn: String = groups.iter().enumerate().map(|(number, group)| one(number, group)).collect();
    (!drawn.is_empty()).then(|| section_of("outcomes", "Outcomes", &drawn))
}

fn one(number: usize, group: &Value) -> String {
    let entries = list(&group["entries"]);
    if entries.is_empty() {
        return String::new();
    }
    let title = text(&group["title"]);
    let bars: Vec<Bar> = entries
        .iter()
        .map(|entry| Bar {
            name: text(&entry["name"]),
            count: entry["count"].as_u64().unwrap_or(0),
            tone: Tone::of(entry["tone"].as_str().unwrap_or_default()),
        })
        .collect();
    let rows: Vec<Vec<String>> =
        entries.iter().map(|entry| vec![shown(&entry["name"]), shown(&entry["count"])]).collect();
    format!(
        "<h3>{}</h3>\n<figure>{}</figure>\n<details><summary>The same as a table</summary>\n{}</details>\n",
        escape(&title),
        draw(&format!("outcomes-{number}"), &title, &bars),
        table("", &["Outcome", "#Count"], &rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn groups_without_entries_are_left_out() {
        let group = json!({"title": "Documents", "entries": [{"name": "kept", "count": 5, "tone": "good"}]});
        let drawn =
            section(&json!({"outcomes": [group, {"title": "Calls", "entries": []}]})).expect("a section");
        assert!(drawn.contains("Documents") && !drawn.contains("Calls"), "{drawn}");
        assert!(drawn.contains("kept: 5") && drawn.contains("<td class=\"number\">5</td>"), "{drawn}");
        assert_eq!(section(&json!({"outcomes": [{"title": "x", "entries": []}]})), None);
    }
}
