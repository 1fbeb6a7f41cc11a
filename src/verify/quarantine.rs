//! Whether a quarantine holds what the rules reject: by count, all of it, and
//! by bytes, a sample.

use std::collections::{BTreeMap, HashMap};

use bson::{Bson, Document, RawDocumentBuf, doc};
use futures_util::TryStreamExt;
use serde_json::{Value, json};

use super::check::Check;
use super::compare;
use super::confidence::Sampled;
use super::differences::different;
use super::full::matching::Id;
use super::sample::{DEFAULT_SAMPLE, batch};
use super::wanted::Wanted;
use crate::Context;
use crate::cleanse::count;
use crate::cleanse::predicate::{Predicate, all_of};
use crate::cli::verify::VerifyArgs;
use crate::config::values::Namespace;
use crate::error::Result;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::draw::Draw;
use crate::mongo::index::whole_number;
use crate::mongo::quarantine::rule;
use crate::mongo::source::collect;
use crate::report::json::extended;

/// The three collections and the rules between them.
#[derive(Debug)]
pub struct Quarantined<'a> {
    /// The collection that was cleansed.
    pub source: &'a Namespace,
    /// What was kept of it.
    pub target: &'a Namespace,
    /// What was rejected.
    pub quarantine: &'a Namespace,
    /// The rules.
    pub predicate: &'a Predicate,
}

impl Quarantined<'_> {
    /// The checks that the options ask for, or all of them.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn checks(
        &self,
        context: &Context,
        args: &VerifyArgs,
        wanted: Wanted,
        seed: u64,
    ) -> Result<Vec<Check>> {
        let mut checks = Vec::new();
        if wanted.counts || wanted.full {
            checks.push(self.counts(&context.mongo).await?);
        }
        if let Some(size) = wanted.sample.or(wanted.full.then_some(DEFAULT_SAMPLE)) {
            checks.push(self.sample(context, u64::from(size), seed, args.max_differences).await?);
        }
        Ok(checks)
    }

    /// Every document of the source is kept or quarantined, by count and by rule.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn counts(&self, mongo: &Mongo) -> Result<Check> {
        let expected = count::by_rule(mongo, self.source, self.predicate, 0).await?;
        let kept = count::exactly(mongo, self.target, &Document::new()).await?;
        let found = by_rule(mongo, self.quarantine).await?;
        let rejected: BTreeMap<&String, &u64> =
            expected.rejected_by.iter().filter(|(_, count)| **count > 0).collect();
        let check = Check::of(
            "quarantine",
            json!({"documents": expected.source, "rejected_by": rejected}),
            json!({"documents": kept + found.values().sum::<u64>(), "rejected_by": found}),
            Vec::new(),
        );
        let check = check.remark(format!(
            "documents of {}, and of {} and {} together",
            self.source, self.target, self.quarantine
        ));
        // Three empty collections agree, which proves nothing.
        Ok(Check { passed: check.passed && expected.source > 0, ..check })
    }

    /// Documents drawn from the quarantine are in the source, byte for byte, and
    /// rejected by the rule that they are kept under.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn sample(&self, context: &Context, size: u64, seed: u64, most: usize) -> Result<Check> {
        let mongo = &context.mongo;
        let population = count::exactly(mongo, self.quarantine, &Document::new()).await?;
        if population == 0 {
            // Whether that is right is told by the counts.
            return Ok(Check::of(NAME, json!(0), json!(0), Vec::new()).remark("nothing is quarantined"));
        }
        let by_id = mongo.describe(self.quarantine).await?.is_some_and(|found| found.index("_id_").is_some());
        let mut draw = Draw::new(mongo, self.quarantine, by_id, seed, (size, population));
        let (mut differences, mut different, mut compared) = (Vec::new(), 0_u64, 0_u64);
        while compared < size {
            let mut ids = batch(&mut draw).await?;
            ids.truncate(usize::try_from(size - compared).unwrap_or(usize::MAX));
            if ids.is_empty() {
                break;
            }
            let stored = stored(mongo, self.quarantine, &ids).await?;
            compared += stored.len() as u64;
            for found in self.differences(mongo, &stored).await? {
                different += 1;
                if differences.len() < most {
                    differences.push(found);
                }
            }
        }
        let check = Check::of(NAME, json!(compared), json!(compared - different), differences);
        let sampled = Sampled { compared, different, is_all: compared >= population };
        let check = check.remark(sampled.text()).with("confidence", sampled.json());
        Ok(Check { passed: different == 0 && compared > 0, ..check.with("seed", json!(seed)) })
    }

    async fn differences(&self, mongo: &Mongo, batch: &[RawDocumentBuf]) -> Result<Vec<Value>> {
        let mut differences = Vec::new();
        let mut by_rule: HashMap<&str, Vec<RawDocumentBuf>> = HashMap::new();
        for stored in batch {
            match mongo.unwrap_quarantined(self.quarantine, stored).await {
                Ok(document) => by_rule.entry(rule(stored).unwrap_or_default()).or_default().push(document),
                Err(error) => {
                    let id = stored.get("_id").ok().flatten().map(extended);
                    differences.push(json!({"_id": id, "kind": "unreadable", "detail": error.message()}));
                }
            }
        }
        let hits = self.predicate.first_hits();
        for (rule, documents) in by_rule {
            let others = match hits.iter().find(|(name, _)| name == rule) {
                Some((_, condition)) => look_up(mongo, self.source, condition, &documents).await?,
                None => HashMap::new(),
            };
            differences.extend(documents.iter().filter_map(|document| difference(document, &others)));
        }
        Ok(differences)
    }
}

/// The name of the check of bytes.
const NAME: &str = "sample quarantine to source";

/// The documents with exactly these `_id`s, as they are stored.
async fn stored(mongo: &Mongo, quarantine: &Namespace, ids: &[Id]) -> Result<Vec<RawDocumentBuf>> {
    let values: Vec<Bson> = ids.iter().filter_map(Id::bson).collect();
    let found = find(mongo, quarantine, doc! {"_id": {"$in": values}}).await?;
    let is_asked_for = |document: &RawDocumentBuf| Id::of(document).is_some_and(|id| ids.contains(&id));
    Ok(found.into_iter().filter(is_asked_for).collect())
}

/// Those of these documents that a collection has and that meet a condition, by the
/// bytes of their `_id`s.
async fn look_up(
    mongo: &Mongo,
    namespace: &Namespace,
    condition: &Document,
    documents: &[RawDocumentBuf],
) -> Result<HashMap<Id, RawDocumentBuf>> {
    let ids: Vec<Bson> = documents.iter().filter_map(|document| Id::of(document)?.bson()).collect();
    let by_id = doc! {"_id": {"$in": ids}};
    let filter = all_of(vec![Bson::Document(by_id), Bson::Document(condition.clone())]);
    let found = find(mongo, namespace, filter).await?;
    Ok(found.into_iter().filter_map(|document| Some((Id::of(&document)?, document))).collect())
}

async fn find(mongo: &Mongo, namespace: &Namespace, filter: Document) -> Result<Vec<RawDocumentBuf>> {
    let collection = mongo.collection(namespace);
    let operation = format!("looking up documents of {namespace}");
    retrying(operation, || collect(collection.find(filter.clone()))).await
}

/// How a quarantined document differs from what the source has.
fn difference(document: &RawDocumentBuf, others: &HashMap<Id, RawDocumentBuf>) -> Option<Value> {
    let id = Id::of(document)?;
    let shown = extended(document.get("_id").ok().flatten()?);
    match others.get(&id) {
        None => Some(json!({"_id": shown, "kind": "extra"})),
        Some(other) => different(shown, &compare::difference(other, document)),
    }
}

/// How many documents stand in the quarantine under each rule.
async fn by_rule(mongo: &Mongo, quarantine: &Namespace) -> Result<BTreeMap<String, u64>> {
    let pipeline = [doc! {"$group": {"_id": "$rule", "n": {"$sum": 1}}}];
    let collection = mongo.collection(quarantine).clone_with_type::<Document>();
    let groups: Vec<Document> = retrying(format!("counting {quarantine} by rule"), || {
        let cursor = collection.aggregate(pipeline.clone());
        async move { cursor.await?.try_collect().await }
    })
    .await?;
    let count = |group: &Document| group.get("n").and_then(whole_number).unwrap_or(0);
    let name = |group: &Document| group.get_str("_id").unwrap_or("(none)").to_owned();
    Ok(groups.iter().map(|group| (name(group), count(group))).collect())
}
