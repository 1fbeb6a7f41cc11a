//! The samples of a job for its report. Pure.

use bson::Document;
use serde_json::{Value, json};

use super::gather::text_of;
use crate::job::series::Series;

/// The samples that are stored with a job; null where none are.
pub(super) fn of_job(job: &Document, documents: &str, operations: &str) -> Value {
    let series = Series::stored(job);
    if series.samples().is_empty() {
        return Value::Null;
    }
    let samples: Vec<Value> = series
        .samples()
        .iter()
        .map(|sample| {
            let latency = |which: usize| sample.latency.map(|latency| latency[which]);
            json!({
                "at": text_of(sample.at),
                "seconds": sample.seconds,
                "documents": sample.documents,
                "operations": sample.operations,
                "p50_ms": latency(0),
                "p95_ms": latency(1),
                "p99_ms": latency(2),
            })
        })
        .collect();
    json!({
        "documents_are": documents,
        "operations_are": operations,
        "interval_seconds": series.interval().as_secs_f64(),
        "samples": samples,
    })
}
