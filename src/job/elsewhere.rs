//! What failed in the hands of workers that have joined a run: the job is not
//! completed then, although its runner has seen no failure.

use bson::{Document, doc};

use super::store::{Job, JobState};
use crate::error::Result;
use crate::mongo::command::retrying;
use crate::mongo::index::{stored_count, whole_number};

/// The field of the job document with what failed so, until it is added to what the
/// runner tells.
pub(super) const FAILED_ELSEWHERE: &str = "failed_elsewhere";

impl Job {
    /// Once the runner has left, what failed in other hands is added to what it has
    /// told: the job is not completed then, whoever was the last to leave.
    pub(super) async fn add_failures_of_others(&self) -> Result<()> {
        let filter = doc! {
            "_id": self.name(),
            "lease": {"$exists": false},
            "state": {"$in": [JobState::Completed.as_str(), JobState::Incomplete.as_str()]},
            FAILED_ELSEWHERE: {"$exists": true},
        };
        let number = |path: &str| doc! {"$ifNull": [path, 0_i64]};
        let ours = format!("${FAILED_ELSEWHERE}.by");
        let known = doc! {"$ifNull": ["$documents.failed_by", {}]};
        // The count of one reason on the other side; no operator reads a field by a computed name
        // on all servers.
        let theirs = doc! {"$sum": {"$map": {
            "input": {"$filter": {
                "input": {"$objectToArray": known.clone()},
                "as": "known",
                "cond": {"$eq": ["$$known.k", "$$ours.k"]},
            }},
            "as": "known",
            "in": "$$known.v",
        }}};
        let sums = doc! {"$arrayToObject": {"$map": {
            "input": {"$objectToArray": ours},
            "as": "ours",
            "in": {"k": "$$ours.k", "v": {"$add": ["$$ours.v", theirs]}},
        }}};
        let update = vec![
            doc! {"$set": {
                "state": JobState::Incomplete.as_str(),
                "documents.failed": {"$add": [
                    number("$documents.failed"),
                    number(&format!("${FAILED_ELSEWHERE}.failed")),
                ]},
                "documents.failed_by": {"$mergeObjects": [known, sums]},
            }},
            doc! {"$unset": FAILED_ELSEWHERE},
        ];
        retrying(format!("saving the job {}", self.name()), || {
            let update = self.collection().update_one(filter.clone(), update.clone());
            async move { update.await }
        })
        .await
        .map(|_| ())
    }
}

/// Adds what failed in the hands of a worker that leaves; nothing where nothing did.
pub(super) fn failing(documents: Option<&Document>) -> Option<Document> {
    let documents = documents?;
    let failed = documents.get("failed").and_then(whole_number).filter(|failed| *failed > 0)?;
    let sum = |path: &str, count: u64| doc! {"$add": [{"$ifNull": [format!("${path}"), 0_i64]}, stored_count(count)]};
    let path = format!("{FAILED_ELSEWHERE}.failed");
    let mut sums = doc! {&path: sum(&path, failed)};
    for (reason, count) in documents.get_document("failed_by").into_iter().flatten() {
        let path = format!("{FAILED_ELSEWHERE}.by.{reason}");
        sums.insert(path.clone(), sum(&path, whole_number(count).unwrap_or(0)));
    }
    Some(doc! {"$set": sums})
}
