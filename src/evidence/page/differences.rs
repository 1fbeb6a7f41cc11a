//! What differs: how many of each kind, and the documents that are listed. Pure.

use serde_json::Value;

use super::super::verify::DOCUMENTS;
use super::bars::{Bar, Tone, draw};
use super::html::{escape, grouped, list, section as section_of, shown, table, text};

/// Rows on the page for each check; the document has all that were listed.
const MOST_ROWS: usize = 50;

pub(super) fn section(document: &Value) -> Option<String> {
    let checks = list(&document["checks"]);
    let tables: String = checks.iter().filter_map(listed).collect();
    let bars = kinds(&document["differences"]);
    if tables.is_empty() && bars.iter().all(|bar| bar.count == 0) {
        // A verification that found nothing says so; a job has nothing to say here.
        return (!checks.is_empty()).then(|| {
            section_of("differences", "Differences", "<p>No check has found any difference.</p>\n")
        });
    }
    let mut body = String::new();
    if bars.iter().any(|bar| bar.count > 0) {
        body.push_str(&format!(
            "<figure>{}</figure>\n<details><summary>The same as a table</summary>\n{}</details>\n",
            draw("kinds", "Differences by kind", &bars),
            table("", &["Kind", "#Differences"], &rows_of(&bars))
        ));
    }
    body.push_str(&tables);
    body.push_str(
        "<p class=\"note\">Values are not shown: they may be nobody's business. Whether a field only stands in \
         another place (<em>order</em>), only has another number type (<em>numeric type</em>) or another \
         <em>value</em> is told for each path.</p>\n",
    );
    Some(section_of("differences", "Differences", &body))
}

fn rows_of(bars: &[Bar]) -> Vec<Vec<String>> {
    bars.iter().map(|bar| vec![escape(&bar.name), grouped(bar.count)]).collect()
}

/// All that were counted by kind; of different ones how they differ, as far as they
/// are listed. What was looked at besides the documents of a copy bears its name.
fn kinds(differences: &Value) -> Vec<Bar> {
    let groups = list(&differences["groups"]);
    let of_documents: Vec<(&str, u64)> =
        groups.iter().filter(|group| is_of_documents(group)).flat_map(listed_kinds).collect();
    let counted = &differences["counted_by_full"];
    let mut bars = if counted.is_object() {
        counted_kinds(counted, &of_documents)
    } else {
        of_documents.into_iter().map(|(kind, count)| bar(words(kind), count)).collect()
    };
    for group in groups.iter().filter(|group| !is_of_documents(group)) {
        let of = group["of"].as_str().unwrap_or_default();
        bars.extend(
            listed_kinds(group).into_iter().map(|(kind, count)| bar(format!("{of}: {}", words(kind)), count)),
        );
    }
    bars
}

fn bar(name: String, count: u64) -> Bar {
    Bar { name, count, tone: Tone::Bad }
}

fn is_of_documents(group: &Value) -> bool {
    group["of"].as_str() == Some(DOCUMENTS)
}

fn listed_kinds(group: &Value) -> Vec<(&str, u64)> {
    let kinds = group["listed_by_kind"].as_object().into_iter().flatten();
    kinds.map(|(kind, count)| (kind.as_str(), count.as_u64().unwrap_or(0))).collect()
}

fn counted_kinds(counted: &Value, listed: &[(&str, u64)]) -> Vec<Bar> {
    let count = |name: &str| counted[name].as_u64().unwrap_or(0);
    let mut bars = vec![bar("missing".into(), count("missing")), bar("extra".into(), count("extra"))];
    let mut classified = 0;
    for (kind, count) in listed.iter().filter(|(kind, _)| kind.starts_with("different:")) {
        classified += count;
        bars.push(bar(words(kind), *count));
    }
    let rest = count("different").saturating_sub(classified);
    if rest > 0 || classified == 0 {
        let name = if classified == 0 { "different" } else { "different, not listed" };
        bars.push(bar(name.into(), rest));
    }
    bars
}

fn words(kind: &str) -> String {
    kind.replace('_', " ")
}

/// The differences that a check lists; `None` where there is none.
fn listed(check: &Value) -> Option<String> {
    let differences = list(&check["differences"]);
    if differences.is_empty() {
        return None;
    }
    let rows: Vec<Vec<String>> = differences.iter().take(MOST_ROWS).map(row).collect();
    let mut out = format!("<h3>Listed by the check “{}”</h3>\n", shown(&check["name"]));
    out.push_str(&table("", &["Document@32", "Kind@12", "Fields and what differs@46", "#For@10"], &rows));
    if differences.len() > MOST_ROWS {
        let more = grouped((differences.len() - MOST_ROWS) as u64);
        out.push_str(&format!("<p class=\"note\">… and {more} more in the JSON document.</p>\n"));
    }
    Some(out)
}

fn row(difference: &Value) -> Vec<String> {
    let (Some(id), Some(kind)) = (difference.get("_id"), difference["kind"].as_str()) else {
        return vec![
            String::new(),
            String::new(),
            format!("<code>{}</code>", shown(difference)),
            String::new(),
        ];
    };
    let fields: Vec<String> = list(&difference["details"])
        .iter()
        .map(|field| {
            let how = field["kind"].as_str().map(|how| format!(" <small>{}</small>", escape(&words(how))));
            format!(
                "<code>{}</code>: {}{}",
                shown(&field["path"]),
                shown(&field["detail"]),
                how.unwrap_or_default()
            )
        })
        .collect();
    let age = difference["age_seconds"].as_f64().or(difference["late_seconds"].as_f64());
    vec![
        // As JSON, so that a text and a number are told apart.
        format!("<code>{}</code>", escape(&id.to_string())),
        escape(kind),
        if fields.is_empty() { further(difference) } else { fields.join("<br>") },
        age.map_or(String::new(), |age| format!("{age:.1} s")),
    ]
}

/// What a difference tells that has no fields.
fn further(difference: &Value) -> String {
    let known = ["_id", "kind", "difference", "details", "fields", "age_seconds", "late_seconds"];
    let members = difference.as_object().into_iter().flatten();
    let told: Vec<String> = members
        .filter(|(name, value)| !known.contains(&name.as_str()) && !value.is_null())
        .map(|(name, value)| escape(&format!("{}: {}", words(name), text(value))))
        .collect();
    told.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn counts(differences: &Value) -> Vec<(String, u64)> {
        kinds(differences).into_iter().map(|bar| (bar.name, bar.count)).collect()
    }

    #[test]
    fn what_is_not_listed_is_counted_all_the_same() {
        let of_documents =
            json!({"of": DOCUMENTS, "listed_by_kind": {"missing": 2, "different: numeric_type": 3}});
        let unique = json!({"of": "unique new keys", "listed_by_kind": {"new key of two legacy keys": 57}});
        let found = counts(&json!({
            "groups": [of_documents, unique],
            "counted_by_full": {"missing": 9, "extra": 0, "different": 5},
        }));
        let expected = [
            ("missing", 9),
            ("extra", 0),
            ("different: numeric type", 3),
            ("different, not listed", 2),
            ("unique new keys: new key of two legacy keys", 57),
        ];
        assert_eq!(found, expected.map(|(name, count)| (name.to_owned(), count)));
        let sampled = json!({"groups": [{"of": DOCUMENTS, "listed_by_kind": {"extra": 1}}]});
        assert_eq!(counts(&sampled), [("extra".to_owned(), 1)]);
    }

    #[test]
    fn a_difference_shows_its_paths_and_any_id() {
        let difference = json!({"_id": "<script>한글", "kind": "different", "difference": "order",
            "details": [{"path": "a.b", "kind": "order", "detail": "the same fields in another order"}],
            "age_seconds": 1.26});
        let row = row(&difference);
        assert_eq!(row[0], "<code>&quot;&lt;script&gt;한글&quot;</code>");
        assert_eq!((row[1].as_str(), row[3].as_str()), ("different", "1.3 s"));
        assert!(row[2].starts_with("<code>a.b</code>: the same fields"), "{}", row[2]);
        assert!(super::row(&json!("_id_"))[2].contains("_id_"));
    }

    #[test]
    fn a_long_list_is_cut_and_says_so() {
        let differences: Vec<Value> = (0..500).map(|id| json!({"_id": id, "kind": "missing"})).collect();
        let section = section(&json!({"checks": [{"name": "full", "differences": differences}]}));
        let section = section.expect("a section");
        assert!(section.contains("and 450 more"), "{section}");
        assert_eq!(section.matches("<tr>").count(), MOST_ROWS + 1);
    }
}
