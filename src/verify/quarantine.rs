//! Whether a quarantine holds what the rules reject: by count, all of it, and
//! by bytes, a sample.

use std::collections::{BTreeMap, HashMap};

use bson::{Document, RawDocumentBuf, doc};
use futures_util::TryStreamExt;
use serde_json::{Value, json};

use super::check::Check;
use super::sample::{DEFAULT_SAMPLE, Direction, confidence, difference, draw, look_up, to_draw};
use crate::Context;
use crate::cleanse::count;
use crate::cleanse::predicate::Predicate;
use crate::cli::verify::VerifyArgs;
use crate::config::values::Namespace;
use crate::error::Result;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::index::whole_number;
use crate::mongo::quarantine::rule;
use crate::mongo::valid::Valid;
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
    pub async fn checks(&self, context: &Context, args: &VerifyArgs, all: bool) -> Result<Vec<Check>> {
        let mut checks = Vec::new();
        if args.counts || args.full || all {
            checks.push(self.counts(&context.mongo).await?);
        }
        if let Some(size) = args.sample.or((args.full || all).then_some(DEFAULT_SAMPLE)) {
            checks.push(self.sample(context, size, args.max_differences).await?);
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
    pub async fn sample(&self, context: &Context, size: u32, most: usize) -> Result<Check> {
        let mongo = &context.mongo;
        let population = count::exactly(mongo, self.quarantine, &Document::new()).await?;
        if population == 0 {
            // Whether that is right is told by the counts.
            return Ok(Check::of(NAME, json!(0), json!(0), Vec::new()).remark("nothing is quarantined"));
        }
        let drawn = to_draw(mongo, self.quarantine, &Valid::default(), size, population).await?;
        let mut drawn = draw(mongo, self.quarantine, &Valid::default(), drawn).await?;
        let (mut differences, mut different, mut compared) = (Vec::new(), 0_u64, 0_u64);
        while let Some(batch) = drawn.next_batch().await? {
            compared += batch.len() as u64;
            for found in self.differences(mongo, &batch).await? {
                different += 1;
                if differences.len() < most {
                    differences.push(found);
                }
            }
        }
        let check = Check::of(NAME, json!(compared), json!(compared - different), differences);
        let passed = different == 0 && compared > 0;
        Ok(Check { passed, ..check.remark(confidence(compared, different, population)) })
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
                Some((_, condition)) => {
                    look_up(mongo, self.source, &Valid::condition(condition.clone()), &documents).await?
                }
                None => HashMap::new(),
            };
            differences.extend(
                documents.iter().filter_map(|document| difference(document, &others, Direction::Backward)),
            );
        }
        Ok(differences)
    }
}

/// The name of the check of bytes.
const NAME: &str = "sample quarantine to source";

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
