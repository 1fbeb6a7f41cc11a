//! What a backfill left behind: candidates, keys and flags.

use std::collections::BTreeMap;

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;
use serde_json::{Map, Value, json};

use super::check::Check;
use crate::cleanse::count;
use crate::config::Target;
use crate::error::Result;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::index::whole_number;
use crate::mongo::source::candidate_filter;

/// Whether any candidate is left, and how often each flag was set.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn check(mongo: &Mongo, target: &Target) -> Result<Vec<Check>> {
    let namespace = &target.namespace;
    let total = count::exactly(mongo, namespace, &Document::new()).await?;
    if total == 0 {
        return Ok(vec![Check::nothing(
            format!("candidates {namespace}"),
            "the collection is missing or empty",
        )]);
    }
    let left = count::exactly(mongo, namespace, &candidate_filter(target)).await?;
    let filled =
        count::exactly(mongo, namespace, &doc! {target.key_field.as_str(): {"$ne": Bson::Null}}).await?;
    let flags = flags(mongo, target).await?;
    let flagged: u64 = flags.values().sum();
    let concerned = filled + flagged + left;
    let mut found = Map::new();
    found.insert("filled".into(), json!(filled));
    found.insert("flagged".into(), json!(flags));
    found.insert("candidates".into(), json!(left));
    let mut accounted = Check::of(
        format!("accounted {namespace}"),
        json!(total),
        json!(concerned + outside(mongo, target).await?),
        Vec::new(),
    );
    accounted.remark =
        Some(format!("keys, flags by reason and candidates: {}", Value::Object(found.clone())));
    accounted.more.extend(found);
    if concerned == 0 {
        accounted.passed = false;
        accounted.remark =
            Some("the target's filter matches nothing, and nothing has a key or a flag".into());
    }
    Ok(vec![Check::of(format!("candidates {namespace}"), json!(0), json!(left), Vec::new()), accounted])
}

/// Documents without key and flag that the target's own filter leaves out.
async fn outside(mongo: &Mongo, target: &Target) -> Result<u64> {
    if target.filter.0.is_empty() {
        return Ok(0);
    }
    let filter = doc! {
        target.key_field.as_str(): Bson::Null,
        target.flag_field.as_str(): Bson::Null,
        "$nor": [target.filter.0.clone()],
    };
    count::exactly(mongo, &target.namespace, &filter).await
}

/// Flags of documents without a key, by reason.
async fn flags(mongo: &Mongo, target: &Target) -> Result<BTreeMap<String, u64>> {
    let namespace = &target.namespace;
    let pipeline = vec![
        doc! {"$match": {
            target.key_field.as_str(): Bson::Null,
            target.flag_field.as_str(): {"$ne": Bson::Null},
        }},
        doc! {"$group": {"_id": format!("${}.reason", target.flag_field), "n": {"$sum": 1}}},
        doc! {"$sort": {"_id": 1}},
    ];
    let collection = mongo.collection(namespace).clone_with_type::<Document>();
    let groups: Vec<Document> = retrying(format!("counting the flags of {namespace}"), || {
        let cursor = collection.aggregate(pipeline.clone()).allow_disk_use(true);
        async move { cursor.await?.try_collect().await }
    })
    .await?;
    let mut flags = BTreeMap::new();
    for group in &groups {
        let reason = group.get_str("_id").unwrap_or("(no reason)").to_owned();
        *flags.entry(reason).or_default() += group.get("n").and_then(whole_number).unwrap_or(0);
    }
    Ok(flags)
}
