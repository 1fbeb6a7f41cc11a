//! Random documents of one side looked up on the other.

use std::collections::HashMap;

use bson::{Bson, RawDocument, RawDocumentBuf, doc};
use serde_json::{Value, json};

use super::check::Check;
use super::compare;
use super::differences::different;
use super::sides::Sides;
use crate::Context;
use crate::cleanse::count;
use crate::cleanse::predicate::all_of;
use crate::config::values::Namespace;
use crate::error::Result;
use crate::event::{Events, Progress};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::sink::id_bytes;
use crate::mongo::source::collect;
use crate::mongo::valid::Valid;
use crate::report::json::extended;

/// Documents that are sampled where the options don't say.
pub(super) const DEFAULT_SAMPLE: u32 = 1000;
/// Documents that are fetched from the other side at once.
const BATCH: usize = 200;

/// From which side documents are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// Drawn from the source, looked up in the target: finds missing ones.
    Forward,
    /// Drawn from the target, looked up in the source: finds extra ones.
    Backward,
}

/// Looks so many random documents of one side up on the other.
///
/// # Errors
/// A stop where the server can't be read.
pub(super) async fn sample(
    context: &Context,
    sides: &Sides,
    direction: Direction,
    size: u32,
    population: u64,
    most: usize,
) -> Result<Check> {
    let name = match direction {
        Direction::Forward => "sample source to target",
        Direction::Backward => "sample target to source",
    };
    if population == 0 {
        let side = if direction == Direction::Forward { &sides.source } else { &sides.target };
        return Ok(Check::nothing(name, &format!("{side} is missing or has no valid documents")));
    }
    let mongo = &context.mongo;
    let valid = sides.predicate.valid();
    let (from, from_valid, to, to_valid) = match direction {
        Direction::Forward => (&sides.source, valid, &sides.target, Valid::default()),
        Direction::Backward => (&sides.target, Valid::default(), &sides.source, valid),
    };
    let to_draw = to_draw(mongo, from, &from_valid, size, population).await?;
    let mut drawn = draw(mongo, from, &from_valid, to_draw).await?;
    let (mut differences, mut different, mut compared) = (Vec::new(), 0_u64, 0_u64);
    while let Some(batch) = drawn.next_batch().await? {
        let batch = only_valid(mongo, from, &from_valid, batch).await?;
        let others = look_up(mongo, to, &to_valid, &batch).await?;
        for document in &batch {
            compared += 1;
            if let Some(difference) = difference(document, &others, direction) {
                different += 1;
                if differences.len() < most {
                    differences.push(difference);
                }
            }
        }
        show(&context.events, name, compared, u64::from(size).min(population));
    }
    let passed = different == 0 && compared > 0;
    let check = Check::of(name, json!(compared), json!(compared - different), differences);
    Ok(Check { passed, ..check.remark(confidence(compared, different, population)) })
}

/// Documents drawn at random, as a cursor.
pub(super) struct Drawn {
    cursor: mongodb::Cursor<RawDocumentBuf>,
    operation: String,
    ended: bool,
}

/// How many candidates make about a sample of that size; `None` for all of them.
pub(super) async fn to_draw(
    mongo: &Mongo,
    from: &Namespace,
    valid: &Valid,
    size: u32,
    population: u64,
) -> Result<Option<u64>> {
    let size = u64::from(size);
    if size >= population {
        return Ok(None);
    }
    if valid.grouping.is_none() {
        return Ok(Some(size));
    }
    let candidates = count::candidates(mongo, from, valid).await?;
    Ok(Some(size.saturating_mul(candidates).div_ceil(population)))
}

/// Those that win their group.
async fn only_valid(
    mongo: &Mongo,
    namespace: &Namespace,
    valid: &Valid,
    batch: Vec<RawDocumentBuf>,
) -> Result<Vec<RawDocumentBuf>> {
    if valid.grouping.is_none() {
        return Ok(batch);
    }
    let documents: Vec<&RawDocument> = batch.iter().map(AsRef::as_ref).collect();
    let are_valid = retrying(format!("looking at groups of {namespace}"), || {
        mongo.are_valid(namespace, valid, &documents)
    })
    .await?;
    Ok(batch
        .into_iter()
        .zip(are_valid)
        .filter(|(_, is_valid)| *is_valid)
        .map(|(document, _)| document)
        .collect())
}

pub(super) async fn draw(mongo: &Mongo, from: &Namespace, valid: &Valid, size: Option<u64>) -> Result<Drawn> {
    use crate::error::Context as _;
    let mut pipeline = valid.stages();
    if let Some(size) = size {
        pipeline.push(doc! {"$sample": {"size": i64::try_from(size).unwrap_or(i64::MAX)}});
    }
    let operation = format!("drawing a sample of {from}");
    let cursor = mongo
        .collection(from)
        .aggregate(pipeline)
        .allow_disk_use(true)
        .await
        .during(&operation)?
        .with_type::<RawDocumentBuf>();
    Ok(Drawn { cursor, operation, ended: false })
}

impl Drawn {
    pub(super) async fn next_batch(&mut self) -> Result<Option<Vec<RawDocumentBuf>>> {
        use crate::error::Context as _;
        let mut batch = Vec::new();
        while !self.ended && batch.len() < BATCH {
            if self.cursor.advance().await.during(&self.operation)? {
                batch.push(self.cursor.current().to_owned());
            } else {
                self.ended = true;
            }
        }
        Ok((!batch.is_empty()).then_some(batch))
    }
}

/// The documents of the other side, by the bytes of their `_id`s.
pub(super) async fn look_up(
    mongo: &Mongo,
    namespace: &Namespace,
    valid: &Valid,
    batch: &[RawDocumentBuf],
) -> Result<HashMap<Vec<u8>, RawDocumentBuf>> {
    let ids: Vec<Bson> = batch
        .iter()
        .filter_map(|document| document.get("_id").ok().flatten())
        .filter_map(|id| Bson::try_from(bson::RawBson::from(id)).ok())
        .collect();
    let by_id = doc! {"_id": {"$in": ids}};
    let collection = mongo.collection(namespace);
    let operation = format!("looking up documents of {namespace}");
    let found = if valid.is_condition() {
        let filter = all_of(vec![Bson::Document(by_id), Bson::Document(valid.condition.clone())]);
        retrying(operation, || collect(collection.find(filter.clone()))).await?
    } else {
        let pipeline = valid.candidates(by_id);
        let found = retrying(operation, || async {
            let mut cursor = collection.aggregate(pipeline.clone()).await?.with_type::<RawDocumentBuf>();
            let mut found = Vec::new();
            while cursor.advance().await? {
                found.push(cursor.current().to_owned());
            }
            Ok(found)
        })
        .await?;
        only_valid(mongo, namespace, valid, found).await?
    };
    Ok(found.into_iter().filter_map(|document| Some((id_bytes(&document)?, document))).collect())
}

pub(super) fn difference(
    document: &RawDocumentBuf,
    others: &HashMap<Vec<u8>, RawDocumentBuf>,
    direction: Direction,
) -> Option<Value> {
    let id = document.get("_id").ok().flatten()?;
    match id_bytes(document).and_then(|bytes| others.get(&bytes)) {
        None => {
            let kind = if direction == Direction::Forward { "missing" } else { "extra" };
            Some(json!({"_id": extended(id), "kind": kind}))
        }
        Some(other) => {
            let differences = match direction {
                Direction::Forward => compare::difference(document, other),
                Direction::Backward => compare::difference(other, document),
            };
            different(extended(id), &differences)
        }
    }
}

/// What a sample proves: with no difference among n, the share of differing
/// documents is below 3/n with 95% confidence (rule of three).
pub(super) fn confidence(compared: u64, different: u64, population: u64) -> String {
    if different > 0 {
        return format!("{different} of {compared} differ");
    }
    if compared >= population {
        return format!("0 of {compared} differ; that is all of them");
    }
    let bound = 300.0 / compared as f64;
    format!("0 of {compared} differ: below {bound:.2}% of all at 95% confidence")
}

fn show(events: &Events, phase: &str, done: u64, total: u64) {
    events.progress(Progress {
        phase: phase.into(),
        unit: "documents",
        done,
        total: Some(total),
        limited_by: Some("database".into()),
        detail: String::new(),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confidence_is_the_rule_of_three() {
        assert_eq!(confidence(5000, 0, 1_000_000), "0 of 5000 differ: below 0.06% of all at 95% confidence");
        assert_eq!(confidence(10, 0, 10), "0 of 10 differ; that is all of them");
        assert_eq!(confidence(10, 2, 100), "2 of 10 differ");
    }
}
