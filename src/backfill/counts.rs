//! What a run has done, in numbers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use bson::{Document, doc};
use serde::Serialize;

use super::latency::Latencies;
use crate::key_api::batch::BatchOutcome;
use crate::key_api::classify::{OUTCOME_NAMES, Outcome};
use crate::mongo::index::{stored_count, whole_number};

/// What the totals of flags by reason begin with.
pub const FLAGGED: &str = "flagged_";
/// What the totals of calls by what they came to begin with.
pub const ANSWERED: &str = "answered_";

/// Documents, by what became of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Documents {
    /// Candidates found at the start.
    pub candidates: u64,
    /// Received their key.
    pub filled: u64,
    /// Received a flag.
    pub flagged: u64,
    /// Were filled or flagged by somebody else meanwhile.
    pub already_filled: u64,
    /// Were deleted or received another legacy key meanwhile.
    pub changed: u64,
    /// Still are candidates, for the reasons in `failed_by`.
    pub failed: u64,
    /// Flags by reason.
    pub flagged_by: BTreeMap<String, u64>,
    /// Failures by reason.
    pub failed_by: BTreeMap<String, u64>,
    /// Candidates at the end; [`UNKNOWN`] until they are counted.
    #[serde(serialize_with = "null_where_unknown")]
    pub candidates_left: u64,
}

/// Stands for a count that could not be taken; null for programs.
pub const UNKNOWN: u64 = u64::MAX;

impl Default for Documents {
    fn default() -> Self {
        Self {
            candidates: 0,
            filled: 0,
            flagged: 0,
            already_filled: 0,
            changed: 0,
            failed: 0,
            flagged_by: BTreeMap::new(),
            failed_by: BTreeMap::new(),
            candidates_left: UNKNOWN,
        }
    }
}

fn null_where_unknown<S: serde::Serializer>(count: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    if *count == UNKNOWN { serializer.serialize_none() } else { serializer.serialize_u64(*count) }
}

/// A count for people.
pub fn shown(count: u64) -> String {
    if count == UNKNOWN { "unknown".into() } else { count.to_string() }
}

impl Documents {
    /// Documents that are settled one way or another.
    pub fn settled(&self) -> u64 {
        self.filled + self.flagged + self.already_filled + self.changed + self.failed
    }

    /// Counts a failed document.
    pub fn fail(&mut self, reason: &str) {
        self.failed += 1;
        *self.failed_by.entry(reason.to_owned()).or_default() += 1;
    }

    /// Counts a flagged document.
    pub fn flag(&mut self, reason: &str) {
        self.flagged += 1;
        *self.flagged_by.entry(reason.to_owned()).or_default() += 1;
    }

    /// Adds what another worker has done to the same candidates.
    pub fn add(&mut self, other: &Self) {
        self.candidates = self.candidates.max(other.candidates);
        self.filled += other.filled;
        self.flagged += other.flagged;
        self.already_filled += other.already_filled;
        self.changed += other.changed;
        self.failed += other.failed;
        add_counts(&mut self.flagged_by, &other.flagged_by);
        add_counts(&mut self.failed_by, &other.failed_by);
        // Whoever counted last saw what the others had done.
        self.candidates_left = self.candidates_left.min(other.candidates_left);
    }

    /// Goes back to the failures of an earlier moment, because the documents
    /// that failed since are tried again.
    pub fn forget_failures_since(&mut self, earlier: &Self) {
        self.failed = earlier.failed;
        self.failed_by.clone_from(&earlier.failed_by);
    }

    /// The part that is summed up over the runs of a job.
    pub fn totals(&self) -> Document {
        let mut totals = doc! {
            "filled": stored_count(self.filled),
            "flagged": stored_count(self.flagged),
            "already_filled": stored_count(self.already_filled),
            "changed": stored_count(self.changed),
        };
        totals.extend(named(FLAGGED, &self.flagged_by));
        totals
    }
}

/// Calls to the key API, counted where they are made.
#[derive(Debug, Default)]
pub struct ApiCounters {
    calls: AtomicU64,
    retries: AtomicU64,
    outcomes: [AtomicU64; OUTCOME_NAMES.len()],
    /// How long calls took.
    pub latencies: Latencies,
    /// Calls under way.
    in_flight: AtomicU64,
}

impl ApiCounters {
    /// Counts a call that leaves now.
    pub fn sent(&self, is_retry: bool) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.retries.fetch_add(u64::from(is_retry), Ordering::Relaxed);
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts what a call came to: once for a call that failed as a whole, for
    /// each key where there were several.
    pub fn received(&self, outcome: &BatchOutcome) {
        let count = |outcome: &Outcome| self.outcomes[outcome.index()].fetch_add(1, Ordering::Relaxed);
        match outcome {
            BatchOutcome::Failed(outcome) => {
                count(outcome);
            }
            BatchOutcome::Refused(_) => {
                count(&Outcome::Rejected);
            }
            BatchOutcome::Answered(answers) => answers.outcomes.iter().for_each(|outcome| {
                count(outcome);
            }),
        }
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// Calls made.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Calls under way now.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// The figures so far.
    pub fn snapshot(&self, from_key_map: u64) -> Api {
        let outcomes = OUTCOME_NAMES
            .iter()
            .zip(&self.outcomes)
            .map(|(name, count)| ((*name).to_owned(), count.load(Ordering::Relaxed)))
            .collect();
        Api { calls: self.calls(), retries: self.retries.load(Ordering::Relaxed), outcomes, from_key_map }
    }
}

/// Calls to the key API.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Api {
    /// Calls made, retries included.
    pub calls: u64,
    /// Calls beyond the first for a key.
    pub retries: u64,
    /// Calls by what they came to.
    pub outcomes: BTreeMap<String, u64>,
    /// Keys answered by the key map instead of a call.
    pub from_key_map: u64,
}

impl Api {
    /// Adds the calls of another worker.
    pub fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.retries += other.retries;
        self.from_key_map += other.from_key_map;
        add_counts(&mut self.outcomes, &other.outcomes);
    }

    /// The part that is summed up over the runs of a job.
    pub fn totals(&self) -> Document {
        let mut totals = doc! {
            "calls": stored_count(self.calls),
            "retries": stored_count(self.retries),
            "from_key_map": stored_count(self.from_key_map),
        };
        totals.extend(named(ANSWERED, &self.outcomes));
        totals
    }
}

fn add_counts(sum: &mut BTreeMap<String, u64>, more: &BTreeMap<String, u64>) {
    for (name, count) in more {
        *sum.entry(name.clone()).or_default() += count;
    }
}

/// Counts by name as totals; those that are zero say nothing.
fn named(prefix: &str, counts: &BTreeMap<String, u64>) -> Document {
    let counts = counts.iter().filter(|(_, count)| **count > 0);
    counts.map(|(name, count)| (format!("{prefix}{name}"), stored_count(*count).into())).collect()
}

/// The sum of two documents of whole numbers.
pub fn add(earlier: Option<&Document>, now: &Document) -> Document {
    let mut sums = now.clone();
    for (key, before) in earlier.into_iter().flatten() {
        let sum = whole_number(before).unwrap_or(0) + now.get(key).and_then(whole_number).unwrap_or(0);
        sums.insert(key, stored_count(sum));
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_add_up_over_runs() {
        let first = doc! {"filled": 5_i64, "calls": 7_i32};
        assert_eq!(add(Some(&first), &doc! {"filled": 2_i64}), doc! {"filled": 7_i64, "calls": 7_i64});
        assert_eq!(add(None, &doc! {"filled": 2_i64}), doc! {"filled": 2_i64});
    }

    #[test]
    fn candidates_that_nobody_counted_are_null() {
        let documents = |left| Documents { candidates_left: left, ..Documents::default() };
        let json = |left| serde_json::to_value(documents(left)).expect("JSON")["candidates_left"].clone();
        assert_eq!((json(UNKNOWN), json(0)), (serde_json::Value::Null, 0.into()));
        assert!(bson::serialize_to_bson(&documents(UNKNOWN)).is_ok());
    }

    #[test]
    fn failures_are_forgotten_before_another_try() {
        let mut documents = Documents::default();
        documents.fail("timeout");
        let earlier = documents.clone();
        documents.fail("timeout");
        assert_eq!((documents.failed, documents.failed_by.get("timeout")), (2, Some(&2)));
        documents.forget_failures_since(&earlier);
        assert_eq!((documents.failed, documents.failed_by.get("timeout")), (1, Some(&1)));
    }
}
