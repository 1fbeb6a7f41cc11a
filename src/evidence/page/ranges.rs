//! The hashes of both sides, as a whole and range by range, and how to get them
//! again. Pure.

use serde_json::{Value, json};

use super::html::{escape, grouped, list, section as section_of, shown, table};

/// Rows on the page; those that differ come first where there are more.
const MOST_ROWS: usize = 120;

pub(super) fn section(document: &Value) -> Option<String> {
    let body: String = list(&document["comparisons"]).iter().map(comparison).collect();
    if body.is_empty() {
        return None;
    }
    let body = format!("{body}{HOW}");
    Some(section_of("ranges", "Hashes of both sides", &body))
}

/// Said once, for a person who wants to check it without this tool.
const HOW: &str = "<p class=\"note\">The digest is the sum modulo 2<sup>128</sup> of the first 128 bits (big-endian) \
of SHA-256 over the BSON bytes of each document. It is the same in whatever order documents are read, and the \
digests of ranges add up to that of the whole, however it is cut: two runs over unchanged data agree in the whole \
always, and range by range where the bounds are the same, as they are when the same job compares the same \
collections again. Of a source with rules only the documents that the rules keep are counted. Where documents were \
read again, because they were written to meanwhile, the digest is that of the first reading.</p>\n";

fn comparison(comparison: &Value) -> String {
    let (source, target) = (&comparison["source"], &comparison["target"]);
    let whole = [("source", source), ("target", target)].map(|(side, tally)| {
        vec![
            escape(side),
            format!("<code>{}</code>", shown(&comparison["identity"][side])),
            shown(&tally["documents"]),
            shown(&tally["bytes"]),
            digest(tally),
        ]
    });
    let ranges = list(&comparison["ranges"]);
    let shown_ranges = chosen(ranges);
    let rows: Vec<Vec<String>> = shown_ranges.iter().map(|range| row(range)).collect();
    let left_out = ranges.len() - shown_ranges.len();
    let rest = if left_out == 0 {
        String::new()
    } else {
        format!(
            "<p class=\"note\">… and {} more ranges, all of them equal or not compared, in the JSON document.</p>\n",
            grouped(left_out as u64)
        )
    };
    format!(
        "<h3>Comparison <code>{}</code>: ranges equal: {}, differing: {}, not compared: {}</h3>\n{}{}{rest}",
        shown(&comparison["job"]),
        shown(&comparison["ranges_equal"]),
        shown(&comparison["ranges_differing"]),
        shown(&comparison["ranges_not_compared"]),
        table("As a whole", &["Side@10", "Collection@27", "#Documents@13", "#Bytes@16", "Digest@34"], &whole),
        table(
            "Range by range",
            &[
                "#No.@5",
                "From <code>_id</code>@20",
                "Below <code>_id</code>@20",
                "#Documents@11",
                "Digest@30",
                "State@14"
            ],
            &rows
        ),
    )
}

/// All, or where there are too many those that differ and the first of the others,
/// in their order.
fn chosen(ranges: &[Value]) -> Vec<&Value> {
    let differs = |range: &&Value| range["state"] == json!("differs");
    let others = MOST_ROWS.saturating_sub(ranges.iter().filter(differs).count());
    let mut taken = 0;
    ranges
        .iter()
        .filter(|range| {
            taken += usize::from(!differs(range));
            differs(range) || taken <= others
        })
        .collect()
}

fn row(range: &Value) -> Vec<String> {
    let (source, target) = (&range["source"], &range["target"]);
    let is_same = source == target;
    let both = |of: &dyn Fn(&Value) -> String| {
        if is_same { of(source) } else { format!("{}<br>{}", of(source), of(target)) }
    };
    let digests = if is_same {
        digest(source)
    } else {
        format!("<small>source</small> {}<br><small>target</small> {}", digest(source), digest(target))
    };
    vec![
        shown(&range["number"]),
        bound(range.get("from"), "the lowest"),
        bound(range.get("below"), "the end"),
        both(&|tally| shown(&tally["documents"])),
        digests,
        state(range),
    ]
}

fn digest(tally: &Value) -> String {
    format!("<code class=\"digest\">{}</code>", shown(&tally["digest"]))
}

/// An absent bound is open; one that is null is the value null.
fn bound(bound: Option<&Value>, open: &str) -> String {
    bound.map_or_else(
        || format!("<em>{open}</em>"),
        |bound| format!("<code>{}</code>", escape(&bound.to_string())),
    )
}

fn state(range: &Value) -> String {
    let count = |name: &str| range[name].as_u64().unwrap_or(0);
    let mut parts = vec![match range["state"].as_str() {
        Some("equal") => "<span class=\"mark good\">✓ equal</span>".to_owned(),
        Some("differs") => "<span class=\"mark bad\">✗ differs</span>".to_owned(),
        _ => "<span class=\"mark warn\">… not compared</span>".to_owned(),
    }];
    for name in ["missing", "extra", "different"] {
        if count(name) > 0 {
            parts.push(format!("{} {name}", grouped(count(name))));
        }
    }
    if count("read_again") > 0 {
        parts.push(format!("{} read again", grouped(count("read_again"))));
    }
    parts.join("<br>")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(number: usize, state: &str) -> Value {
        json!({"number": number, "state": state, "source": {"digest": "aa"}, "target": {"digest": "aa"}})
    }

    #[test]
    fn ranges_that_differ_are_never_left_out() {
        let ranges: Vec<Value> = (0..1000)
            .map(|number| range(number, if number % 100 == 99 { "differs" } else { "equal" }))
            .collect();
        let chosen = chosen(&ranges);
        assert_eq!(chosen.len(), MOST_ROWS);
        assert_eq!(chosen.iter().filter(|range| range["state"] == json!("differs")).count(), 10);
        assert_eq!(super::chosen(&ranges[..5]).len(), 5);
    }

    #[test]
    fn sides_that_are_not_the_same_show_both_digests() {
        let mut range = range(0, "differs");
        range["target"] = json!({"digest": "bb", "documents": 3});
        let cells = row(&range);
        assert!(cells[4].contains("source</small> <code class=\"digest\">aa"), "{}", cells[4]);
        assert!(cells[4].contains("target</small> <code class=\"digest\">bb"), "{}", cells[4]);
        assert!(row(&self::range(0, "")).last().is_some_and(|state| state.contains("not compared")));
    }
}
