//! The page for people, made of a report's document and of nothing else. Pure.
//!
//! It stands for itself: no script, no font, no picture from elsewhere, and a
//! content policy that would refuse them. Each section is a file; one that has
//! nothing to tell is absent. All text of others passes `html::escape`.

mod again;
mod bars;
mod checks;
mod differences;
mod html;
mod latency;
mod ledger;
mod outcomes;
mod over_time;
mod ranges;
mod subject;
mod svg;
mod throughput;
mod verdict;

use serde_json::Value;

pub(super) use html::{grouped, moment, text};

use html::escape;

/// How it looks, on a screen by day and night, and on paper.
const STYLE: &str = include_str!("style.css");

/// A section in the order of the page: what it says of a document.
type Section = fn(&Value) -> Option<String>;

const SECTIONS: [Section; 10] = [
    verdict::section,
    subject::section,
    outcomes::section,
    ledger::section,
    checks::section,
    differences::section,
    throughput::section,
    latency::section,
    ranges::section,
    again::section,
];

/// The page of a document.
pub fn of(document: &Value) -> String {
    let title = text(&document["about"]["title"]);
    let body: String = SECTIONS.iter().filter_map(|section| section(document)).collect();
    format!(
        r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{STYLE}</style>
</head>
<body>
<main>
{body}</main>
<footer>{foot}</footer>
</body>
</html>
"#,
        title = escape(&title),
        foot = foot(document),
    )
}

fn foot(document: &Value) -> String {
    format!(
        "Written by {} on {}. SHA-256 of the document: <code>{}</code>",
        escape(&text(&document["place"]["tool"])),
        escape(&text(&document["place"]["host"])),
        escape(&text(&document["hash"]["value"]))
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_empty_document_has_a_page_too() {
        for document in [json!({}), json!({"about": null, "checks": [null, 5], "comparisons": [{}]})] {
            let page = of(&document);
            assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
        }
    }

    #[test]
    fn nothing_of_the_data_is_taken_for_markup() {
        let evil = r#"<script>alert("x")</script>'"&"#;
        let document = json!({
            "about": {"title": evil, "command": evil, "job": evil},
            "verdict": {"passed": false, "finished": true, "sentence": evil, "state": evil},
            "time": {"started_at": evil},
            "place": {"tool": evil, "host": evil, "server": evil},
            "subject": {
                "collections": [{"role": evil, "namespace": evil, "uuid": evil}],
                "words": [evil], "rules": {evil: evil},
            },
            "run": {"command_line": evil, "options": [{"name": evil, "value": evil}], "seeds": [{"check": evil, "seed": evil}]},
            "checks": [{"name": evil, "passed": false, "expected": evil, "found": {evil: evil}, "remark": evil,
                "differences": [{"_id": evil, "kind": "different", "details": [{"path": evil, "detail": evil}]}, evil]}],
            "differences": {"groups": [{"of": evil, "listed_by_kind": {evil: 1}}]},
            "comparisons": [{"job": evil, "ranges": [{"from": evil, "below": evil, "state": evil,
                "source": {"digest": evil}, "target": {"digest": evil}}]}],
            "ledger": {"rejected_by": {evil: 1}, "source_now": 5},
            "outcomes": [{"title": evil, "entries": [{"name": evil, "count": 3, "tone": evil}]}],
            "series": {"documents_are": evil, "operations_are": evil, "samples": [
                {"at": evil, "seconds": 2.0, "documents": 3, "operations": 3, "p50_ms": 1.0, "p95_ms": 2.0, "p99_ms": 3.0},
            ]},
            "hash": {"value": evil},
        });
        let page = of(&document);
        assert!(!page.contains("<script"), "{page}");
        assert!(page.contains("&lt;script&gt;alert"), "{page}");
        for attribute in page.split('<').filter_map(|part| part.split_once('>')).map(|(tag, _)| tag) {
            assert!(!attribute.contains("alert"), "{attribute}");
        }
    }
}
