//! What a run came to: of one worker, of all together, for people and programs.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::counts::{Api, Documents, UNKNOWN, shown};
use super::engine::Recorded;
use crate::error::Error;
use crate::job::JobState;
use crate::throttle::limits;

/// What one worker, or several together, have done.
#[derive(Debug)]
pub struct Report {
    /// How it ended.
    pub state: JobState,
    /// Why, where it ended by an error.
    pub error: Option<Error>,
    /// Documents of this run.
    pub documents: Documents,
    /// Calls of this run.
    pub api: Api,
    /// Seconds by what limited the speed, over all workers.
    pub limits: Vec<(&'static str, f64)>,
    /// Documents with what became of them, where that was asked for.
    pub recorded: Vec<Recorded>,
    /// Whether the worker joined somebody who was gone before he had given
    /// anything away.
    pub was_left_alone: bool,
}

impl Report {
    /// Nothing done yet.
    pub fn empty(state: JobState) -> Self {
        Self {
            state,
            error: None,
            documents: Documents::default(),
            api: Api::default(),
            limits: Vec::new(),
            recorded: Vec::new(),
            was_left_alone: false,
        }
    }

    /// Both together. The first one's count of candidates holds: every worker
    /// counts the same ones.
    pub fn merge(&mut self, other: Self) {
        self.state = worse(self.state, other.state);
        self.error = self.error.take().or(other.error);
        self.documents.add(&other.documents);
        self.api.add(&other.api);
        let mut seconds: BTreeMap<&'static str, f64> = self.limits.drain(..).collect();
        other.limits.into_iter().for_each(|(limit, spent)| *seconds.entry(limit).or_default() += spent);
        self.limits = seconds.into_iter().collect();
        self.limits.sort_by(|(_, first), (_, second)| second.total_cmp(first));
        self.recorded.extend(other.recorded);
    }

    /// This run and the one that followed it, which has tried again what failed
    /// here and seen what was left.
    #[must_use]
    pub fn followed_by(mut self, rest: Self) -> Self {
        self.documents.forget_failures_since(&Documents::default());
        self.documents.candidates_left = UNKNOWN;
        self.state = rest.state;
        self.merge(rest);
        self
    }

    /// The JSON result.
    pub fn json(&self, job: &str, elapsed: f64) -> Value {
        let limits: serde_json::Map<String, Value> =
            self.limits.iter().map(|(limit, spent)| ((*limit).to_owned(), json!(spent))).collect();
        json!({
            "schema": 1,
            "command": "backfill",
            "job": job,
            "status": self.state.as_str(),
            "documents": self.documents,
            "api": self.api,
            "limited_by_seconds": limits,
            "canary": if self.recorded.is_empty() { Value::Null } else { json!(self.recorded) },
            "elapsed_seconds": elapsed,
        })
    }

    /// The result for people.
    pub fn text(&self, job: &str, elapsed: f64) -> String {
        let (documents, api) = (&self.documents, &self.api);
        let mut lines = vec![
            format!("backfill {} in {elapsed:.1} s, job {job}", self.state.as_str()),
            format!("  candidates      {:>12}", documents.candidates),
            format!("  filled          {:>12}", documents.filled),
            format!("  flagged         {:>12}{}", documents.flagged, reasons(&documents.flagged_by)),
            format!("  already filled  {:>12}", documents.already_filled),
            format!("  failed          {:>12}{}", documents.failed, reasons(&documents.failed_by)),
            format!("  candidates left {:>12}", shown(documents.candidates_left)),
            format!(
                "  API calls       {:>12}  ({} of them retries; {} keys answered by the key map)",
                api.calls, api.retries, api.from_key_map
            ),
        ];
        if documents.changed > 0 {
            lines.push(format!(
                "  changed         {:>12}  (deleted, or another legacy key meanwhile)",
                documents.changed
            ));
        }
        lines.push(format!("  why not faster  {}", limits::describe(&self.limits)));
        if documents.failed > 0 {
            lines.push(format!("`mongorekey status {job} --failed` lists the failed documents"));
        }
        lines.join("\n")
    }
}

fn reasons(counts: &BTreeMap<String, u64>) -> String {
    let parts: Vec<String> = counts.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    if parts.is_empty() { String::new() } else { format!("  ({})", parts.join(", ")) }
}

/// The state of a whole of which both are parts.
fn worse(one: JobState, other: JobState) -> JobState {
    let rank = |state: JobState| match state {
        JobState::Completed => 0,
        JobState::Incomplete => 1,
        JobState::Running => 2,
        JobState::Interrupted => 3,
        JobState::Stopped => 4,
    };
    if rank(other) > rank(one) { other } else { one }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(state: JobState, filled: u64, limits: Vec<(&'static str, f64)>) -> Report {
        let documents = Documents { candidates: 10, filled, ..Documents::default() };
        Report {
            state,
            error: None,
            documents,
            api: Api { calls: filled, ..Api::default() },
            limits,
            recorded: Vec::new(),
            was_left_alone: false,
        }
    }

    #[test]
    fn a_canary_and_the_rest_are_one_run_whose_end_counts() {
        let mut canary = report(JobState::Incomplete, 4, vec![]);
        canary.documents.fail("timeout");
        canary.documents.candidates_left = 5;
        let mut rest = report(JobState::Completed, 6, vec![]);
        rest.documents.candidates_left = 7;
        let both = canary.followed_by(rest);
        assert_eq!((both.state, both.documents.filled, both.documents.failed), (JobState::Completed, 10, 0));
        assert_eq!((both.documents.candidates_left, both.api.calls), (7, 10));
        assert!(both.documents.failed_by.is_empty());
    }

    #[test]
    fn workers_add_up_and_the_worst_end_counts() {
        let mut all = report(JobState::Completed, 4, vec![("tps", 1.0)]);
        all.merge(report(JobState::Interrupted, 3, vec![("tps", 1.0), ("window", 5.0)]));
        assert_eq!(all.state, JobState::Interrupted);
        assert_eq!((all.documents.candidates, all.documents.filled, all.api.calls), (10, 7, 7));
        assert_eq!(all.limits, [("window", 5.0), ("tps", 2.0)]);
    }
}
