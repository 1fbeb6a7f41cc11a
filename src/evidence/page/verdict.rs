//! The head of the page: title, verdict in one sentence, and the facts that somebody
//! asks for first. Pure.

use serde_json::Value;

use super::html::{duration, escape, facts, moment, shown, text};

pub(super) fn section(document: &Value) -> Option<String> {
    let (verdict, time, place) = (&document["verdict"], &document["time"], &document["place"]);
    let (class, mark, word) = badge(verdict);
    let sentence = text(&verdict["sentence"]);
    let facts = facts(&[
        ("Job", code(&document["about"]["job"])),
        ("Begun", moment(&time["begun_at"])),
        ("Started", moment(&time["started_at"])),
        ("Ended", moment(&time["ended_at"])),
        ("Duration", duration(&time["elapsed_seconds"])),
        ("Runs", shown(&time["runs"])),
        ("Server", server(place)),
        ("Clock of the server", moment(&place["server_time"])),
        ("Tool", shown(&place["tool"])),
        ("Written on", host(place)),
        ("Written", moment(&time["written_at"])),
    ]);
    Some(format!(
        "<header class=\"{class}\">\n<p class=\"kind\">Evidence report</p>\n<h1>{title}</h1>\n\
         <p class=\"verdict\"><span class=\"badge\"><span aria-hidden=\"true\">{mark}</span> {word}</span></p>\n\
         <p class=\"sentence\">{sentence}</p>\n</header>\n{facts}",
        title = shown(&document["about"]["title"]),
        sentence = escape(&sentence),
    ))
}

fn badge(verdict: &Value) -> (&'static str, &'static str, &'static str) {
    match (verdict["finished"].as_bool(), verdict["passed"].as_bool()) {
        (Some(true), Some(true)) => ("passed", "✓", "Passed"),
        (Some(true), _) => ("failed", "✗", "Not passed"),
        _ => ("unfinished", "…", "Not finished"),
    }
}

fn code(value: &Value) -> String {
    value.as_str().map(|text| format!("<code>{}</code>", escape(text))).unwrap_or_default()
}

fn server(place: &Value) -> String {
    let parts = [&place["server"], &place["topology"]];
    let known: Vec<String> = parts.into_iter().filter(|part| !part.is_null()).map(shown).collect();
    if known.is_empty() { "could not be asked".into() } else { known.join(", ") }
}

fn host(place: &Value) -> String {
    match &place["process"] {
        Value::Null => shown(&place["host"]),
        process => format!("{}, process {}", shown(&place["host"]), escape(&process.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_what_was_finished_and_passed_has_passed() {
        for (finished, passed, word) in [
            (json!(true), json!(true), "passed"),
            (json!(true), json!(false), "failed"),
            (json!(true), json!(null), "failed"),
            (json!(false), json!(true), "unfinished"),
            (json!(null), json!(null), "unfinished"),
        ] {
            assert_eq!(badge(&json!({"finished": finished, "passed": passed})).0, word);
        }
    }
}
