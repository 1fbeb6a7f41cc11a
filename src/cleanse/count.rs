//! Counting a collection by the rules.

use std::collections::BTreeMap;

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;

use super::predicate::{Hits, Predicate};
use crate::config::values::Namespace;
use crate::error::Result;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::index::whole_number;
use crate::mongo::valid::Valid;

/// A collection by its rules.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RuleCounts {
    /// All documents.
    pub source: u64,
    /// Valid documents.
    pub kept: u64,
    /// Documents per rule that was the first to hit them.
    pub rejected_by: BTreeMap<String, u64>,
    /// Some `_id`s per rule.
    pub samples: BTreeMap<String, Vec<Bson>>,
}

impl RuleCounts {
    /// Documents that are left behind.
    pub fn rejected(&self) -> u64 {
        self.source - self.kept
    }
}

/// Counts documents by rule in one scan, with so many sample `_id`s each.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn by_rule(
    mongo: &Mongo,
    namespace: &Namespace,
    predicate: &Predicate,
    samples: i64,
) -> Result<RuleCounts> {
    let pipeline = rule_pipeline(predicate, samples);
    let collection = mongo.collection(namespace).clone_with_type::<Document>();
    let reply: Vec<Document> = retrying(format!("counting {namespace} by rule"), || {
        let cursor = collection.aggregate(pipeline.clone()).allow_disk_use(true);
        async move { cursor.await?.try_collect().await }
    })
    .await?;
    Ok(read_rule_counts(predicate, &reply.into_iter().next().unwrap_or_default()))
}

/// The pipeline that counts by rule, to one document.
pub fn rule_pipeline(predicate: &Predicate, samples: i64) -> Vec<Document> {
    let hits = predicate.hits();
    let mut facets = doc! {"all": [{"$count": "n"}]};
    for (index, hits) in hits.iter().enumerate() {
        // By number: a facet's name may not hold a dot or a dollar, a rule's may.
        facets.insert(format!("count{index}"), hits.count.clone());
        if samples > 0 {
            let mut sample = hits.sample.clone();
            sample.extend([doc! {"$limit": samples}, doc! {"$project": {"_id": 1}}]);
            facets.insert(format!("sample{index}"), sample);
        }
    }
    vec![doc! {"$facet": facets}]
}

/// The same with one more count, under a name of its own.
pub fn rule_pipeline_with(predicate: &Predicate, name: &str, stages: Vec<Document>) -> Vec<Document> {
    let mut pipeline = rule_pipeline(predicate, 0);
    if let Some(facets) = pipeline.first_mut().and_then(|stage| stage.get_document_mut("$facet").ok()) {
        facets.insert(name, stages);
    }
    pipeline
}

/// What was counted under that name.
pub fn facet(reply: &Document, name: &str) -> u64 {
    count(reply, name)
}

/// Reads what the pipeline of the rules has counted.
pub fn read_rule_counts(predicate: &Predicate, reply: &Document) -> RuleCounts {
    let mut counts = RuleCounts { source: count(reply, "all"), ..RuleCounts::default() };
    for (index, Hits { rule: name, .. }) in predicate.hits().iter().enumerate() {
        counts.rejected_by.insert(name.clone(), count(reply, &format!("count{index}")));
        counts.samples.insert(name.clone(), ids(reply, &format!("sample{index}")));
    }
    counts.kept = counts.source.saturating_sub(counts.rejected_by.values().sum());
    counts
}

/// Counts the documents that meet a condition, exactly.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn exactly(mongo: &Mongo, namespace: &Namespace, condition: &Document) -> Result<u64> {
    let collection = mongo.collection(namespace);
    retrying(format!("counting {namespace}"), || {
        let count = collection.count_documents(condition.clone());
        async move { count.await }
    })
    .await
}

/// Counts the valid documents, exactly.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn valid(mongo: &Mongo, namespace: &Namespace, valid: &Valid) -> Result<u64> {
    if valid.is_condition() {
        return exactly(mongo, namespace, &valid.condition).await;
    }
    let mut pipeline = valid.stages();
    match &valid.grouping {
        Some(grouping) => pipeline.extend(grouping.count_valid()),
        None => pipeline.push(doc! {"$count": "n"}),
    }
    number(mongo, namespace, pipeline).await
}

/// Counts the documents that pass everything but the grouping, exactly.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn candidates(mongo: &Mongo, namespace: &Namespace, valid: &Valid) -> Result<u64> {
    if valid.memberships.is_empty() {
        return exactly(mongo, namespace, &valid.condition).await;
    }
    let mut pipeline = valid.stages();
    pipeline.push(doc! {"$count": "n"});
    number(mongo, namespace, pipeline).await
}

/// What a pipeline leaves as `n`; nothing is zero.
async fn number(mongo: &Mongo, namespace: &Namespace, pipeline: Vec<Document>) -> Result<u64> {
    let collection = mongo.collection(namespace).clone_with_type::<Document>();
    let reply: Vec<Document> = retrying(format!("counting {namespace}"), || {
        let cursor = collection.aggregate(pipeline.clone()).allow_disk_use(true);
        async move { cursor.await?.try_collect().await }
    })
    .await?;
    Ok(reply.first().and_then(|reply| reply.get("n")).and_then(whole_number).unwrap_or(0))
}

fn count(reply: &Document, facet: &str) -> u64 {
    first(reply, facet).and_then(|document| document.get("n")).and_then(whole_number).unwrap_or(0)
}

fn first<'a>(reply: &'a Document, facet: &str) -> Option<&'a Document> {
    reply.get_array(facet).ok()?.first()?.as_document()
}

fn ids(reply: &Document, facet: &str) -> Vec<Bson> {
    let documents = reply.get_array(facet).map(Vec::as_slice).unwrap_or_default();
    documents.iter().filter_map(|document| document.as_document()?.get("_id").cloned()).collect()
}
