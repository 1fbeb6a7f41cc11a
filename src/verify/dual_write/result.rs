//! What watching both sides came to.

use std::time::{Duration, Instant};

use bson::{Document, RawDocument, RawDocumentBuf};
use serde_json::{Value, json};

use super::watched::{Counts, Overdue, Watched};
use crate::error::{Error, Result};
use crate::report::json::extended;
use crate::verify::check::Check;
use crate::verify::compare;
use crate::verify::differences::different;
use crate::verify::full::matching::Id;
use crate::verify::pairs::{Kind, Pairs};

/// Name of the check.
pub(super) const NAME: &str = "dual write";
/// Fields are told of so many documents, each of which is read once more.
const MOST_DETAILED: usize = 20;

/// The result of watching.
#[derive(Debug)]
pub struct DualWrite {
    /// The check.
    pub check: Check,
    /// The figures.
    pub summary: Value,
    /// What ended it early.
    pub error: Option<Error>,
}

impl DualWrite {
    /// A result without anything to look at.
    pub(super) fn nothing(what: &str) -> Self {
        Self { check: Check::nothing(NAME, what), summary: Value::Null, error: None }
    }

    /// The result of what was watched until now.
    pub(super) fn of(
        watched: &Watched,
        differences: Vec<Value>,
        started: Instant,
        error: Option<Error>,
    ) -> Self {
        let counts = watched.counts;
        let (passed, remark) = verdict(&counts, watched.unsettled());
        let check = Check {
            name: NAME.into(),
            passed: passed && error.is_none(),
            expected: json!(counts.compared()),
            found: json!(counts.agreed),
            differences,
            remark: Some(remark),
            more: serde_json::Map::new(),
        };
        let summary = json!({
            "seconds": started.elapsed().as_secs_f64(),
            "source_writes": counts.source_writes,
            "target_writes": counts.target_writes,
            "compared": counts.compared(),
            "agreed": counts.agreed,
            "missing": counts.missing,
            "extra": counts.extra,
            "different": counts.different,
            "late": counts.late,
            "unsettled": watched.unsettled(),
        });
        Self { check, summary, error }
    }
}

/// Whether that passes, and why.
fn verdict(counts: &Counts, unsettled: u64) -> (bool, String) {
    let open = match unsettled {
        0 => String::new(),
        count => format!("; {count} were written until the end and are not judged"),
    };
    let nothing = match (counts.source_writes, counts.target_writes) {
        (0, 0) => Some("nothing was written to either side during that time"),
        (0, _) => Some("nothing was written to the source during that time"),
        (_, 0) => Some("nothing was written to the target during that time"),
        _ if counts.compared() == 0 => Some("no document stood still for long enough to be compared"),
        _ => None,
    };
    let bad = counts.differing() + counts.late;
    if let Some(nothing) = nothing.filter(|_| bad == 0) {
        return (false, format!("{nothing}{open}"));
    }
    let remark = format!(
        "{} writes to the source and {} to the target: {} missing, {} extra, {} different, {} late{open}",
        counts.source_writes,
        counts.target_writes,
        counts.missing,
        counts.extra,
        counts.different,
        counts.late
    );
    (bad == 0, remark)
}

/// The differences as entries of the result, at most so many.
///
/// # Errors
/// A stop where the server can't be read.
pub(super) async fn differences(watched: &Watched, pairs: &Pairs<'_>, most: usize) -> Result<Vec<Value>> {
    let mut entries = Vec::new();
    let mut detailed = 0;
    for (id, overdue) in watched.overdue().into_iter().take(most) {
        let fields = if overdue.kind == Kind::Different && detailed < MOST_DETAILED {
            detailed += 1;
            fields(&id, pairs).await?
        } else {
            None
        };
        entries.push(entry(&id, &overdue, fields));
    }
    let late = watched.late.iter().map(|(id, by)| late_entry(id, *by));
    entries.extend(late.take(most.saturating_sub(entries.len())));
    Ok(entries)
}

fn entry(id: &Id, overdue: &Overdue, fields: Option<Value>) -> Value {
    let mut entry = fields.unwrap_or_else(|| json!({"_id": shown(id)}));
    entry["kind"] = json!(overdue.kind.as_str());
    entry["age_seconds"] = json!(overdue.since.elapsed().as_secs_f64());
    entry
}

fn late_entry(id: &Id, by: Duration) -> Value {
    json!({"_id": shown(id), "kind": "late", "late_seconds": by.as_secs_f64()})
}

fn shown(id: &Id) -> Value {
    id.value().map_or(Value::Null, |value| extended(value.as_raw_bson_ref()))
}

/// In which fields a document differs now; `None` where it no longer does.
async fn fields(id: &Id, pairs: &Pairs<'_>) -> Result<Option<Value>> {
    let Some(value) = id.value() else { return Ok(None) };
    let ids = [value];
    let whole = |document: &RawDocument| (Id::of(document).as_ref() == Some(id)).then(|| document.to_owned());
    let source = pairs.mongo.by_ids(pairs.source, &ids, &pairs.valid, None, whole).await?;
    let target = pairs.mongo.by_ids(pairs.target, &ids, &Document::new(), None, whole).await?;
    let first = |found: Vec<Option<RawDocumentBuf>>| found.into_iter().flatten().next();
    let (Some(source), Some(target)) = (first(source), first(target)) else { return Ok(None) };
    Ok(different(shown(id), &compare::difference(&source, &target)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_that_saw_nothing_does_not_pass() {
        let passes = |counts: Counts| verdict(&counts, 0).0;
        let clean = Counts { source_writes: 5, target_writes: 5, agreed: 5, ..Counts::default() };
        assert!(passes(clean));
        assert!(!passes(Counts::default()));
        assert!(!passes(Counts { source_writes: 0, ..clean }));
        assert!(!passes(Counts { target_writes: 0, ..clean }));
        assert!(!passes(Counts { agreed: 0, ..clean }));
        for bad in [
            Counts { missing: 1, ..clean },
            Counts { extra: 1, ..clean },
            Counts { different: 1, ..clean },
            Counts { late: 1, ..clean },
        ] {
            assert!(!passes(bad), "{bad:?}");
        }
    }
}
