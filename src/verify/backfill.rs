//! What a backfill left behind: candidates, keys and flags.

use std::collections::BTreeMap;

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;
use serde_json::{Map, Value, json};

use super::check::Check;
use crate::config::Target;
use crate::error::Result;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::index::whole_number;
use crate::mongo::source::candidate_filter;

/// What stands in a collection, all of it read at once.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counted {
    total: u64,
    left: u64,
    filled: u64,
    /// Flags of documents without a key, by reason.
    flags: BTreeMap<String, u64>,
    /// Documents without key and flag that the target's own filter leaves out.
    outside: u64,
}

/// Whether any candidate is left, and how often each flag was set.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn check(mongo: &Mongo, target: &Target) -> Result<Vec<Check>> {
    let namespace = &target.namespace;
    let Counted { total, left, filled, flags, outside } = count(mongo, target).await?;
    if total == 0 {
        return Ok(vec![Check::nothing(
            format!("candidates {namespace}"),
            "the collection is missing or empty",
        )]);
    }
    let flagged: u64 = flags.values().sum();
    let concerned = filled + flagged + left;
    let mut found = Map::new();
    found.insert("filled".into(), json!(filled));
    found.insert("flagged".into(), json!(flags));
    found.insert("candidates".into(), json!(left));
    let mut accounted =
        Check::of(format!("accounted {namespace}"), json!(total), json!(concerned + outside), Vec::new());
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

/// Counts in one scan, so that a document is counted in one state only, whoever
/// writes meanwhile.
async fn count(mongo: &Mongo, target: &Target) -> Result<Counted> {
    let namespace = &target.namespace;
    let collection = mongo.collection(namespace).clone_with_type::<Document>();
    let reply: Option<Document> = retrying(format!("counting {namespace}"), || {
        let cursor = collection.aggregate(pipeline(target)).allow_disk_use(true);
        async move { cursor.await?.try_next().await }
    })
    .await?;
    let reply = reply.unwrap_or_default();
    let of = |name: &str| groups(&reply, name).map(number).sum();
    let mut flags = BTreeMap::new();
    for group in groups(&reply, "flags") {
        let reason = group.get_str("_id").unwrap_or("(no reason)").to_owned();
        *flags.entry(reason).or_default() += number(group);
    }
    Ok(Counted { total: of("total"), left: of("left"), filled: of("filled"), flags, outside: of("outside") })
}

fn pipeline(target: &Target) -> Vec<Document> {
    let (key, flag) = (target.key_field.as_str(), target.flag_field.as_str());
    let counted = |filter: Document| vec![doc! {"$match": filter}, doc! {"$count": "n"}];
    let mut facets = doc! {
        "total": counted(doc! {}),
        "left": counted(candidate_filter(target)),
        "filled": counted(doc! {key: {"$ne": Bson::Null}}),
        "flags": [
            {"$match": {key: Bson::Null, flag: {"$ne": Bson::Null}}},
            {"$group": {"_id": format!("${flag}.reason"), "n": {"$sum": 1}}},
        ],
    };
    if !target.filter.0.is_empty() {
        let outside = doc! {key: Bson::Null, flag: Bson::Null, "$nor": [target.filter.0.clone()]};
        facets.insert("outside", counted(outside));
    }
    vec![doc! {"$facet": facets}]
}

fn groups<'a>(reply: &'a Document, name: &str) -> impl Iterator<Item = &'a Document> {
    let groups = reply.get_array(name).map(Vec::as_slice).unwrap_or_default();
    groups.iter().filter_map(Bson::as_document)
}

fn number(group: &Document) -> u64 {
    group.get("n").and_then(whole_number).unwrap_or(0)
}
