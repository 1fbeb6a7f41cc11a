//! Full comparisons for a report: what was read of each side, range by range.
//!
//! The digest of a range is the sum modulo 2^128 of the first 128 bits of SHA-256
//! of each document's bytes. SHA-256, because no two documents should pass for one
//! another; a sum, because it is the same in whatever order documents arrive, needs
//! no memory, and the sums of ranges are the sum of the whole, however it was cut.
//! (With XOR a document that is there twice would vanish.) The sum itself is no
//! defence against somebody who can choose documents by the million; it is there to
//! compare runs. The verdict rests on the comparison of each single document.

use bson::{Bson, Document};
use serde_json::{Value, json};

use crate::job::store;
use crate::mongo::Mongo;
use crate::report::json::extended;
use crate::verify::full::matching::Tally;
use crate::verify::full::progress::{Figures, Ranges, StoredRange};

use super::gather::{moment, relaxed, text_of};

/// The full comparisons among jobs of these names, as they are stored.
pub(super) async fn of_jobs(mongo: &Mongo, names: &[String]) -> Vec<Value> {
    let mut found = Vec::new();
    for name in names {
        let Some(job) = stored(mongo, name).await else { continue };
        if job.get_str("command").is_ok_and(|command| command == "verify")
            && let Some(layout) = job.get("layout").and_then(Bson::as_i64)
            && let Ok(ranges) = Ranges::of(mongo, name, layout).load().await
        {
            found.push(comparison(name, &job, &ranges));
        }
    }
    found
}

/// The job of that name.
pub(super) async fn stored(mongo: &Mongo, name: &str) -> Option<Document> {
    store::find(mongo, name).await.ok()?
}

fn comparison(name: &str, job: &Document, ranges: &[StoredRange]) -> Value {
    let mut total = Figures::default();
    ranges.iter().for_each(|range| total.add(&range.figures));
    let state = |wanted: &str| ranges.iter().filter(|range| state_of(range) == wanted).count();
    let verdict = job.get_document("verdict").ok();
    json!({
        "job": name,
        "identity": job.get_document("identity").ok().map(|what| json!({
            "source": what.get_str("source").ok(),
            "target": what.get_str("target").ok(),
        })),
        "verdict": verdict.map(relaxed),
        "begun_at": moment(job, "begun_at"),
        "started_at": moment(job, "started_at"),
        "ranges_equal": state("equal"),
        "ranges_differing": state("differs"),
        "ranges_not_compared": state("not compared"),
        "source": tally(&total.source),
        "target": tally(&total.target),
        "ranges": ranges.iter().map(range).collect::<Vec<_>>(),
    })
}

fn range(range: &StoredRange) -> Value {
    let Figures { source, target, rechecked, missing, extra, different } = &range.figures;
    let mut entry = json!({
        "number": range.number,
        "state": state_of(range),
        "at": range.at.and_then(text_of),
        "source": tally(source),
        "target": tally(target),
        "read_again": rechecked,
        "missing": missing,
        "extra": extra,
        "different": different,
    });
    // An absent bound is open; one that is null is the value null.
    for (name, bound) in [("from", &range.range.lower), ("below", &range.range.upper)] {
        if let Some(Ok(bound)) = bound.clone().map(bson::RawBson::try_from) {
            entry[name] = extended(bound.as_raw_bson_ref());
        }
    }
    entry
}

fn state_of(range: &StoredRange) -> &'static str {
    let was_read = range.figures.source.documents + range.figures.target.documents > 0;
    match (range.is_done, was_read) {
        (true, _) => "equal",
        (false, true) => "differs",
        (false, false) => "not compared",
    }
}

fn tally(tally: &Tally) -> Value {
    json!({
        "documents": tally.documents,
        "bytes": tally.bytes,
        "digest": format!("{:032x}", tally.digest),
    })
}
