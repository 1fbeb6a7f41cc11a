//! How long the key API took over time. Pure.

use serde_json::Value;

use super::html::{list, section as section_of};
use super::over_time::{Line, draw};

pub(super) fn section(document: &Value) -> Option<String> {
    let samples = list(&document["series"]["samples"]);
    if samples.iter().all(|sample| sample["p50_ms"].is_null()) {
        return None;
    }
    let title = "Latency of the key API over time";
    let lines = [
        Line { name: "p50", class: "one", is_area: false, value: |sample| sample["p50_ms"].as_f64() },
        Line { name: "p95", class: "two", is_area: false, value: |sample| sample["p95_ms"].as_f64() },
        Line { name: "p99", class: "three", is_area: false, value: |sample| sample["p99_ms"].as_f64() },
    ];
    let body = format!(
        "<figure>{}<figcaption>Half of the calls took no longer than p50, 95 % no longer than p95, 99 % no longer \
         than p99, each to the next step of 9 %. Where samples were put together, p95 and p99 are the larger ones. \
         The numbers stand in the table above.</figcaption></figure>\n",
        draw("latency", title, "ms", samples, &lines)
    );
    Some(section_of("latency", title, &body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn without_calls_there_is_no_latency() {
        let sample = |p50: Value| json!({"at": "2026-01-01T00:00:02Z", "seconds": 2.0, "p50_ms": p50, "p95_ms": 20.0, "p99_ms": 30.0});
        assert_eq!(section(&json!({"series": {"samples": [sample(Value::Null)]}})), None);
        let drawn = section(&json!({"series": {"samples": [sample(json!(10.0)), sample(Value::Null)]}}));
        let drawn = drawn.expect("a section");
        assert!(drawn.contains("p99: from 30.0 to 30.0 ms"), "{drawn}");
    }
}
