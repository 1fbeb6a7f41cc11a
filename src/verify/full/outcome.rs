//! What a full comparison came to.

use bson::{DateTime, Document, doc};
use serde_json::{Value, json};

use super::matching::Side;
use super::progress::Figures;
use super::sides::Sides;
use super::suspects::{self, Suspect, Suspects};
use crate::error::{Error, Result};
use crate::mongo::index::stored_count;
use crate::report::json::extended;
use crate::verify::check::Check;
use crate::verify::compare;
use crate::verify::differences::different;

/// The result, whole or as far as it came.
#[derive(Debug)]
pub struct Full {
    /// The check, as it goes among the others.
    pub check: Check,
    /// Figures beside it.
    pub summary: Value,
    /// Name of the job.
    pub job: String,
    /// What ended it before its time.
    pub error: Option<Error>,
}

/// What was counted over all ranges and runs.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Totals {
    /// Ranges in all.
    pub ranges: u64,
    /// Ranges whose sides were compared.
    pub compared: u64,
    /// Ranges that an earlier run had done.
    pub resumed: u64,
    /// Documents that differed and were not read again, for there were too many.
    pub not_rechecked: u64,
    /// Sums over the compared ranges.
    pub figures: Figures,
    /// Seconds of all runs.
    pub seconds: f64,
}

impl Totals {
    /// Whether all was compared and nothing differs; never where there was nothing.
    pub fn passed(&self) -> bool {
        let figures = &self.figures;
        self.compared == self.ranges
            && figures.mismatches() == 0
            && figures.source.documents > 0
            && figures.target.documents > 0
    }

    /// The check with these differences.
    pub fn check(&self, differences: Vec<Value>) -> Check {
        let figures = &self.figures;
        let expected = figures.source.documents;
        let equal = expected.saturating_sub(figures.missing + figures.different);
        let check = Check::of("full", json!(expected), json!(equal), differences);
        Check { passed: self.passed(), ..check.remark(self.remark()) }
    }

    fn remark(&self) -> String {
        let figures = &self.figures;
        let mut parts = vec![format!(
            "{} missing, {} extra, {} different; {} ranges in {:.1} s",
            figures.missing, figures.extra, figures.different, self.compared, self.seconds
        )];
        if self.compared < self.ranges {
            parts.push(format!("{} ranges not compared", self.ranges - self.compared));
        }
        if figures.source.documents == 0 || figures.target.documents == 0 {
            parts.push("a side has no documents".into());
        }
        if figures.rechecked > 0 {
            parts.push(format!("{} read again", figures.rechecked));
        }
        if self.not_rechecked > 0 {
            parts.push(format!("{} too many to be read again", self.not_rechecked));
        }
        parts.join("; ")
    }

    /// As it stands beside the checks.
    pub fn json(&self) -> Value {
        let figures = &self.figures;
        let side = |tally: &super::matching::Tally| {
            json!({
                "documents": tally.documents,
                "bytes": tally.bytes,
                "digest": format!("{:032x}", tally.digest),
            })
        };
        let read = figures.source.documents.max(figures.target.documents);
        json!({
            "ranges": self.ranges,
            "ranges_compared": self.compared,
            "ranges_of_earlier_runs": self.resumed,
            "documents": read,
            "bytes": figures.source.bytes + figures.target.bytes,
            "seconds": self.seconds,
            "documents_per_second": if self.seconds > 0.0 { read as f64 / self.seconds } else { 0.0 },
            "rechecked": figures.rechecked,
            "converged": figures.rechecked.saturating_sub(figures.mismatches() - self.not_rechecked),
            "not_rechecked": self.not_rechecked,
            "missing": figures.missing,
            "extra": figures.extra,
            "different": figures.different,
            "source": side(&figures.source),
            "target": side(&figures.target),
        })
    }

    /// As it is stored with the job.
    pub fn stored(&self) -> Document {
        let figures = &self.figures;
        doc! {
            "source": stored_count(figures.source.documents),
            "target": stored_count(figures.target.documents),
            "missing": stored_count(figures.missing),
            "extra": stored_count(figures.extra),
            "different": stored_count(figures.different),
            "rechecked": stored_count(figures.rechecked),
        }
    }

    /// The verdict, as it is stored with the job: a later one replaces it.
    pub fn verdict(&self) -> Document {
        doc! {"passed": self.passed(), "at": DateTime::now()}
    }
}

/// The first differences in the order of ranges, each with its fields and its age.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn differences(sides: &Sides, suspects: &Suspects, most: usize) -> Result<Vec<Value>> {
    let mut shown: Vec<&Suspect> = suspects.kept().iter().collect();
    shown.sort_by(|left, right| (left.range, &left.id).cmp(&(right.range, &right.id)));
    let mut differences = Vec::new();
    for suspect in shown.into_iter().take(most) {
        differences.push(difference(sides, suspect).await?);
    }
    Ok(differences)
}

async fn difference(sides: &Sides, suspect: &Suspect) -> Result<Value> {
    let id = suspect.id.value().map_or(json!("(invalid BSON)"), |id| extended(id.as_raw_bson_ref()));
    let mut entry = match (suspect.pair.source, suspect.pair.target) {
        (Some(_), None) => json!({"_id": id, "kind": "missing"}),
        (None, _) => json!({"_id": id, "kind": "extra"}),
        (Some(_), Some(_)) => {
            let source = suspects::fetch(sides, Side::Source, &suspect.id).await?;
            let target = suspects::fetch(sides, Side::Target, &suspect.id).await?;
            let fields = match (&source, &target) {
                (Some(source), Some(target)) => compare::difference(source, target),
                _ => Vec::new(),
            };
            // Where it has changed once more in this moment, its fields can't be told.
            different(id.clone(), &fields)
                .unwrap_or_else(|| json!({"_id": id, "kind": "different", "fields": [], "details": []}))
        }
    };
    entry["age_seconds"] = json!(suspect.since.elapsed().as_secs_f64());
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::full::matching::Tally;

    fn totals(source: u64, target: u64) -> Totals {
        let tally = |documents| Tally { documents, bytes: 100 * documents, digest: 5 };
        let figures = Figures { source: tally(source), target: tally(target), ..Figures::default() };
        Totals { ranges: 2, compared: 2, figures, ..Totals::default() }
    }

    #[test]
    fn it_passes_only_where_all_was_compared_and_something_was_there() {
        assert!(totals(5, 5).passed());
        assert!(!totals(0, 0).passed() && !totals(0, 5).passed() && !totals(5, 0).passed());
        assert!(!Totals { compared: 1, ..totals(5, 5) }.passed());
        assert!(!Totals { ranges: 0, compared: 0, ..totals(0, 0) }.passed());
        for (missing, extra, different) in [(1, 0, 0), (0, 1, 0), (0, 0, 1)] {
            let mut totals = totals(5, 5);
            totals.figures = Figures { missing, extra, different, ..totals.figures };
            assert!(!totals.passed() && !totals.check(Vec::new()).passed);
        }
    }
}
