//! How fast it went over time. Pure.

use serde_json::Value;

use super::html::{duration, escape, grouped, list, moment, section as section_of, shown, table, text};
use super::over_time::{Line, draw};

pub(super) fn section(document: &Value) -> Option<String> {
    let series = &document["series"];
    let samples = list(&series["samples"]);
    if samples.is_empty() {
        return None;
    }
    let title = "Throughput over time";
    let lines = [
        Line { name: "documents", class: "one", is_area: true, value: |sample| rate(sample, "documents") },
        Line {
            name: "calls or changes",
            class: "two",
            is_area: false,
            value: |sample| rate(sample, "operations"),
        },
    ];
    let operations = text(&series["operations_are"]);
    let body = format!(
        "<figure>{}<figcaption>Solid: {}. Dashed: {}. A sample stands for about {} and more; times are UTC; a \
         line ends where nothing ran.</figcaption></figure>\n\
         <details><summary>The samples as a table</summary>\n{}</details>\n",
        draw("throughput", title, "per second", samples, &lines),
        shown(&series["documents_are"]),
        escape(&operations),
        duration(&series["interval_seconds"]),
        table(
            "",
            &["Until", "#Seconds", "#Documents", "#Operations", "#p50 ms", "#p95 ms", "#p99 ms"],
            &rows(samples)
        )
    );
    Some(section_of("throughput", title, &body))
}

fn rate(sample: &Value, name: &str) -> Option<f64> {
    let seconds = sample["seconds"].as_f64().filter(|seconds| *seconds > 0.0)?;
    Some(sample[name].as_f64()? / seconds)
}

fn rows(samples: &[Value]) -> Vec<Vec<String>> {
    samples
        .iter()
        .map(|sample| {
            let count = |name: &str| grouped(sample[name].as_u64().unwrap_or(0));
            let number = |name: &str| {
                sample[name].as_f64().map_or_else(|| "–".into(), |number| format!("{number:.1}"))
            };
            vec![
                moment(&sample["at"]),
                number("seconds"),
                count("documents"),
                count("operations"),
                number("p50_ms"),
                number("p95_ms"),
                number("p99_ms"),
            ]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rates_are_those_of_the_time_that_a_sample_stands_for() {
        assert_eq!(rate(&json!({"seconds": 4.0, "documents": 10}), "documents"), Some(2.5));
        assert_eq!(rate(&json!({"seconds": 0.0, "documents": 10}), "documents"), None);
        let sample =
            json!({"at": "2026-01-01T00:00:02Z", "seconds": 2.0, "documents": 2000, "operations": 5});
        let drawn = section(&json!({"series": {"documents_are": "copied", "samples": [sample]}}));
        let drawn = drawn.expect("a section");
        assert!(
            drawn.contains("Solid: copied") && drawn.contains("2,000") && drawn.contains("<svg"),
            "{drawn}"
        );
        assert_eq!(section(&json!({"series": null})), None);
    }
}
