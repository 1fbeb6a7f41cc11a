//! What a cleanse will need and meet: time, room, oplog, followers, documents in
//! each other's way. Shown by a dry run; what is clearly impossible is refused by
//! a real start.

use std::time::Duration;

use bson::{Document, doc};
use serde_json::{Value, json};

use super::count::RuleCounts;
use super::plan::Plan;
use super::target;
use crate::Context;
use crate::error::{Error, Result};
use crate::job::store;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::index::whole_number;
use crate::mongo::outlook::{Oplog, Size};
use crate::report::progress::duration;

/// Bytes of source documents that are copied per second, where no earlier copy
/// tells: a guess on the safe side.
const GUESSED_BYTES_PER_SECOND: u64 = 30_000_000;
/// The field of the job document with the speed of its copy.
pub const MEASURED: &str = "copied_per_second";
/// With an oplog that is full and reaches no further than this a copy can't be
/// followed: an election takes a third of it.
const HOPELESS_OPLOG: Duration = Duration::from_secs(30);
/// One that reaches no further than this is worth a warning.
const SHORT_OPLOG: Duration = Duration::from_secs(3600);
/// `_id`s that are shown per conflict.
const SAMPLES: i64 = 5;

/// What is known before a start.
#[derive(Debug, Default)]
pub struct Outlook {
    size: Option<Size>,
    free: Option<u64>,
    oplog: Option<Oplog>,
}

impl Outlook {
    /// Asks the server, which costs nothing.
    pub async fn of(mongo: &Mongo, plan: &Plan) -> Self {
        Self {
            size: mongo.size(&plan.source).await,
            free: mongo.free_bytes(&plan.source.database).await,
            oplog: mongo.oplog_reach().await,
        }
    }

    /// Bytes on the disk that a target with so many of the documents needs.
    fn needed(&self, kept: u64) -> Option<u64> {
        let size = self.size?;
        let bytes = u128::from(size.stored) * u128::from(kept.min(size.documents));
        u64::try_from(bytes.checked_div(u128::from(size.documents)).unwrap_or(0)).ok()
    }

    /// What speaks against a copy of so many documents, the impossible first.
    /// `kept` is `None` where nobody has counted.
    fn obstacles(&self, kept: Option<u64>) -> (Vec<String>, Vec<String>) {
        let (mut impossible, mut warnings) = (Vec::new(), Vec::new());
        let most = kept.or(self.size.map(|size| size.documents)).unwrap_or(0);
        if let (Some(free), Some(needed)) = (self.free, self.needed(most))
            && free < needed
        {
            let text =
                format!("{} are free on the disk, the copy needs about {}", shown(free), shown(needed));
            // Half of it for another compression; an index may turn out smaller, too.
            if kept.is_some() && free < needed / 2 { &mut impossible } else { &mut warnings }.push(text);
        }
        if let Some(oplog) = self.oplog.filter(|oplog| oplog.is_full && oplog.window < SHORT_OPLOG) {
            let text = format!("the oplog is full and reaches back only {}", duration(oplog.window));
            if oplog.window < HOPELESS_OPLOG { &mut impossible } else { &mut warnings }.push(text);
        }
        (impossible, warnings)
    }

    /// Refuses a start that can't end well, and tells what may go wrong.
    ///
    /// # Errors
    /// A refusal where there is clearly no room, or no oplog to speak of.
    pub fn check_start(&self, context: &Context, plan: &Plan) -> Result<()> {
        // Only where everything is kept it is known how much that is.
        let kept = self.size.map(|size| size.documents).filter(|_| plan.predicate.valid().is_everything());
        let (impossible, warnings) = self.obstacles(kept);
        for warning in warnings {
            context.events.warn(format!("{warning}; `cleanse --dry-run` tells more"));
        }
        match impossible.into_iter().next() {
            None => Ok(()),
            Some(reason) => Err(Error::refused(format!("{} can't be copied: {reason}", plan.source))
                .hint("make room, or enlarge the oplog with `replSetResizeOplog`")),
        }
    }
}

/// Looks at everything that concerns a copy, for a dry run: fields of the plan,
/// and what is worth a note.
///
/// # Errors
/// A stop where the source can't be read.
pub async fn look(
    context: &Context,
    plan: &Plan,
    counts: &RuleCounts,
    rate: u32,
) -> Result<(Value, Vec<String>)> {
    let mongo = &context.mongo;
    let outlook = Outlook::of(mongo, plan).await;
    let (mut notes, warnings) = outlook.obstacles(Some(counts.kept));
    notes.extend(warnings);
    let measured = measured(mongo, plan).await?;
    let (seconds, basis) = expected_time(outlook.size.unwrap_or_default(), measured, rate);
    let streams = mongo.streams(&plan.source).await;
    match &streams {
        None => {
            notes.push("who follows the source by change streams can't be told: that needs `inprog`".into())
        }
        Some(streams) if streams.is_empty() => {}
        Some(streams) => {
            let who: Vec<String> =
                streams.iter().map(|stream| format!("{} ({})", stream.who, stream.scope)).collect();
            notes.push(format!("a rename would end these change streams: {}", who.join(", ")));
        }
    }
    let violations = violations(mongo, plan).await?;
    if violations > 0 {
        notes.push(format!("{violations} documents to copy violate the validator, as they do in the source"));
    }
    let conflicts = conflicts(mongo, plan).await?;
    for conflict in conflicts.iter().filter(|conflict| conflict["documents"].as_u64() > Some(0)) {
        notes.push(format!(
            "{} documents to copy stand in the way of others in {} under its unique index {}",
            conflict["documents"],
            plan.target,
            conflict["index"].as_str().unwrap_or_default()
        ));
    }
    let streams = streams.map(|streams| {
        let json = |stream: &crate::mongo::outlook::Stream| json!({"scope": stream.scope, "who": stream.who});
        streams.iter().map(json).collect::<Vec<_>>()
    });
    let fields = json!({
        "expected_seconds": seconds,
        "expected_seconds_from": basis,
        "disk": {
            "free_bytes": outlook.free,
            "needed_bytes": outlook.needed(counts.kept),
            "fits": outlook.free.zip(outlook.needed(counts.kept)).map(|(free, needed)| free >= needed),
        },
        "oplog": {
            "window_seconds": outlook.oplog.map(|oplog| oplog.window.as_secs()),
            "is_full": outlook.oplog.map(|oplog| oplog.is_full),
        },
        "change_streams": streams,
        "validator_violations": violations,
        "unique_conflicts": conflicts,
    });
    Ok((fields, notes))
}

/// Source documents per second of an earlier copy of this job.
async fn measured(mongo: &Mongo, plan: &Plan) -> Result<Option<f64>> {
    let job = store::find(mongo, &plan.job).await?;
    Ok(job.and_then(|job| job.get_f64(MEASURED).ok()).filter(|rate| *rate > 0.0))
}

/// How long the copy of a source takes, and how that is known. Pure.
fn expected_time(size: Size, measured: Option<f64>, rate: u32) -> (f64, &'static str) {
    let (seconds, basis) = match measured {
        Some(measured) => (size.documents as f64 / measured, "an earlier copy"),
        None => (size.data as f64 / GUESSED_BYTES_PER_SECOND as f64, "a guess of 30 MB/s"),
    };
    let limited = if rate == 0 { 0.0 } else { size.documents as f64 / f64::from(rate) };
    if limited > seconds { (limited, "the documents/s limit") } else { (seconds, basis) }
}

/// Valid documents that violate the validator of the source.
async fn violations(mongo: &Mongo, plan: &Plan) -> Result<u64> {
    let Ok(validator) = plan.description.options.get_document("validator") else { return Ok(0) };
    if validator.is_empty() {
        return Ok(0);
    }
    let mut stages = plan.predicate.valid().stages();
    stages.extend([doc! {"$match": {"$nor": [validator.clone()]}}, doc! {"$count": "n"}]);
    Ok(first(mongo, plan, stages).await?.get("n").and_then(whole_number).unwrap_or(0))
}

/// What stands in the way under each unique index of the target. Of the source's
/// own indexes nothing can, for the source has them too; but a target that the
/// application writes to has documents and indexes of its own.
async fn conflicts(mongo: &Mongo, plan: &Plan) -> Result<Vec<Value>> {
    let existing = mongo.describe(&plan.target).await?.filter(|_| plan.dual_write);
    let Some(existing) = existing else {
        let unique = target::indexes(&plan.description).into_iter().filter(is_unique);
        let enforced = unique.map(|index| {
            json!({"index": target::index_name(&index), "documents": 0, "samples": [], "known": "the source has the same index"})
        });
        return Ok(enforced.collect());
    };
    let mut found = Vec::new();
    for index in target::indexes(&existing).iter().filter(|index| is_unique(index)) {
        found.push(conflicts_of(mongo, plan, index).await?);
    }
    Ok(found)
}

fn is_unique(index: &Document) -> bool {
    index.get_bool("unique").unwrap_or(false)
}

/// Documents to copy whose values another document of the target has.
async fn conflicts_of(mongo: &Mongo, plan: &Plan, index: &Document) -> Result<Value> {
    let name = target::index_name(index);
    let keys: Vec<&String> = index.get_document("key").into_iter().flat_map(Document::keys).collect();
    let [key] = keys.as_slice() else {
        return Ok(
            json!({"index": name, "documents": null, "samples": [], "known": "not looked for: more than one field"}),
        );
    };
    let mut stages = plan.predicate.valid().stages();
    // A partial index does not hold every document; nor does a sparse one.
    if let Ok(partial) = index.get_document("partialFilterExpression") {
        stages.push(doc! {"$match": partial.clone()});
    } else if index.get_bool("sparse").unwrap_or(false) {
        stages.push(doc! {"$match": {key.as_str(): {"$exists": true}}});
    }
    stages.extend([
        doc! {"$replaceWith": {"d": "$$ROOT"}},
        doc! {"$lookup": {
            "from": &plan.target.collection,
            "localField": format!("d.{key}"),
            "foreignField": key.as_str(),
            "let": {"id": "$d._id"},
            "pipeline": [{"$match": {"$expr": {"$ne": ["$_id", "$$id"]}}}, {"$limit": 1}, {"$project": {"_id": 1}}],
            "as": "other",
        }},
        doc! {"$match": {"other": {"$ne": []}}},
        doc! {"$facet": {
            "all": [{"$count": "n"}],
            "some": [{"$limit": SAMPLES}, {"$replaceWith": {"id": "$d._id"}}],
        }},
    ]);
    let reply = first(mongo, plan, stages).await?;
    let facet = |name: &str| reply.get_array(name).map(Vec::as_slice).unwrap_or_default();
    let field =
        |document: &bson::Bson, name: &str| document.as_document().and_then(|it| it.get(name).cloned());
    let ids = facet("some").iter().filter_map(|document| field(document, "id"));
    let samples: Vec<Value> = ids.map(bson::Bson::into_canonical_extjson).collect();
    let count = facet("all").first().and_then(|document| field(document, "n"));
    let documents = count.as_ref().and_then(whole_number).unwrap_or(0);
    Ok(json!({"index": name, "documents": documents, "samples": samples, "known": "looked for"}))
}

async fn first(mongo: &Mongo, plan: &Plan, stages: Vec<Document>) -> Result<Document> {
    use futures_util::TryStreamExt as _;
    let collection = mongo.collection(&plan.source).clone_with_type::<Document>();
    let reply: Vec<Document> = retrying(format!("looking at {}", plan.source), || {
        let cursor = collection.aggregate(stages.clone()).allow_disk_use(true);
        async move { cursor.await?.try_collect().await }
    })
    .await?;
    Ok(reply.into_iter().next().unwrap_or_default())
}

fn shown(bytes: u64) -> String {
    format!("{}.{} GB", bytes / 1_000_000_000, bytes / 100_000_000 % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outlook(free: u64, window: u64, is_full: bool) -> Outlook {
        Outlook {
            size: Some(Size { documents: 1000, data: 4_000_000_000, stored: 2_000_000_000 }),
            free: Some(free),
            oplog: Some(Oplog { window: Duration::from_secs(window), is_full }),
        }
    }

    fn kinds(outlook: &Outlook, kept: Option<u64>) -> (usize, usize) {
        let (impossible, warnings) = outlook.obstacles(kept);
        (impossible.len(), warnings.len())
    }

    #[test]
    fn only_what_is_clearly_impossible_is_refused() {
        assert_eq!(kinds(&outlook(9_000_000_000, 9_999, true), Some(1000)), (0, 0));
        assert_eq!(kinds(&outlook(1_500_000_000, 9_999, true), Some(1000)), (0, 1));
        assert_eq!(kinds(&outlook(500_000_000, 9_999, true), Some(1000)), (1, 0));
        assert_eq!(kinds(&outlook(500_000_000, 9_999, true), None), (0, 1), "nobody has counted");
        assert_eq!(kinds(&outlook(500_000_000, 9_999, true), Some(20)), (0, 0), "little is kept");
        assert_eq!(kinds(&outlook(9_000_000_000, 10, true), None), (1, 0));
        assert_eq!(kinds(&outlook(9_000_000_000, 600, true), None), (0, 1));
        assert_eq!(kinds(&outlook(9_000_000_000, 10, false), None), (0, 0), "a young server");
        assert_eq!(kinds(&Outlook::default(), Some(1000)), (0, 0), "nothing can be told");
    }

    #[test]
    fn the_time_is_that_of_the_slowest() {
        let size = Size { documents: 1000, data: 300_000_000, stored: 0 };
        assert_eq!(expected_time(size, None, 0), (10.0, "a guess of 30 MB/s"));
        assert_eq!(expected_time(size, Some(500.0), 0), (2.0, "an earlier copy"));
        assert_eq!(expected_time(size, Some(500.0), 10), (100.0, "the documents/s limit"));
        assert_eq!(expected_time(size, Some(500.0), 100_000), (2.0, "an earlier copy"));
    }
}
