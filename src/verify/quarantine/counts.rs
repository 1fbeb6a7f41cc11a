//! Every document of the source is kept or quarantined, by count and by rule.
//!
//! As between a source and its copy, all is counted at one moment, and what the
//! follower had not applied at that moment is counted by itself and left out.

use std::collections::BTreeMap;
use std::time::Duration;

use bson::{Document, Timestamp, doc};
use serde_json::json;
use tokio::time::Instant;

use super::Quarantined;
use crate::cleanse::count;
use crate::cleanse::ledger::at_moment;
use crate::cleanse::predicate::Predicate;
use crate::config::values::Namespace;
use crate::error::{Result, describe_mongo};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::index::whole_number;
use crate::verify::check::Check;
use crate::verify::counts::{PAUSE, is_at_work, is_of};
use crate::verify::on_their_way::OnTheirWay;

/// The name of the check.
const NAME: &str = "quarantine";

/// What the three collections hold of some documents, or of all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Figures {
    source: u64,
    /// Documents of the source by the rule that rejects them; without those that
    /// reject none.
    rejected_by: BTreeMap<String, u64>,
    target: u64,
    /// Documents of the quarantine by the rule that they are kept under.
    quarantined: BTreeMap<String, u64>,
}

impl Figures {
    fn add(&mut self, other: &Self) {
        self.source += other.source;
        self.target += other.target;
        for (sums, counts) in
            [(&mut self.rejected_by, &other.rejected_by), (&mut self.quarantined, &other.quarantined)]
        {
            counts.iter().for_each(|(rule, count)| *sums.entry(rule.clone()).or_default() += count);
        }
    }

    fn without(&self, other: &Self) -> Self {
        let fewer = |from: &BTreeMap<String, u64>, these: &BTreeMap<String, u64>| {
            let left = from.iter().map(|(rule, count)| {
                (rule.clone(), count.saturating_sub(these.get(rule).copied().unwrap_or(0)))
            });
            left.filter(|(_, count)| *count > 0).collect()
        };
        Self {
            source: self.source.saturating_sub(other.source),
            rejected_by: fewer(&self.rejected_by, &other.rejected_by),
            target: self.target.saturating_sub(other.target),
            quarantined: fewer(&self.quarantined, &other.quarantined),
        }
    }

    /// Kept and quarantined together.
    fn found(&self) -> u64 {
        self.target + self.quarantined.values().sum::<u64>()
    }

    /// Three empty collections agree, which proves nothing.
    fn agree(&self) -> bool {
        self.source > 0 && self.source == self.found() && self.rejected_by == self.quarantined
    }
}

/// The three collections at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Counted {
    all: Figures,
    /// Documents that were on their way.
    moved: u64,
    /// What the collections held of those.
    of_moved: Figures,
}

impl Counted {
    fn settled(&self) -> Figures {
        self.all.without(&self.of_moved)
    }

    fn check(&self, quarantined: &Quarantined<'_>) -> Check {
        let (settled, sides) = (self.settled(), quarantined.sides);
        let mut remark = format!(
            "documents of {}, and of {} and {} together",
            sides.source, sides.target, quarantined.quarantine
        );
        if self.moved > 0 {
            remark += &format!("; {} moved and are left out", self.moved);
        }
        let check = Check::of(
            NAME,
            json!({"documents": settled.source, "rejected_by": settled.rejected_by}),
            json!({"documents": settled.found(), "rejected_by": settled.quarantined}),
            Vec::new(),
        );
        let check = check.remark(remark).with("moved", json!(self.moved));
        Check { passed: settled.agree(), ..check }
    }
}

impl Quarantined<'_> {
    /// Compares the numbers, again for a while where they are not the same.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub(super) async fn counts(&self, mongo: &Mongo, settle: Duration) -> Result<Check> {
        let deadline = Instant::now() + settle;
        loop {
            let counted = self.count(mongo).await?;
            if counted.settled().agree() || Instant::now() + PAUSE > deadline {
                return Ok(counted.check(self));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn count(&self, mongo: &Mongo) -> Result<Counted> {
        // In this order: what is no longer marked is applied before the moment.
        let copy = Some(self.copy).filter(|copy| is_of(copy, self.sides));
        let (job, on_their_way) = OnTheirWay::marked(mongo, self.sides, copy).await?;
        let moment = mongo.majority_time().await?;
        let all = match self.at(mongo, moment, &Document::new()).await {
            Ok(all) => all,
            Err(error) => {
                let error = describe_mongo(&error);
                tracing::info!(error, "the collections can't be counted at one moment");
                let all = self.one_after_the_other(mongo).await?;
                return Ok(Counted { all, ..Counted::default() });
            }
        };
        // Without a follower nothing is on its way: what is lacking is lacking.
        match job.filter(|job| is_at_work(job, moment)) {
            Some(job) => self.without_moved(mongo, all, (&job, on_their_way), moment).await,
            None => Ok(Counted { all, ..Counted::default() }),
        }
    }

    async fn without_moved(
        &self,
        mongo: &Mongo,
        all: Figures,
        (job, mut on_their_way): (&Document, OnTheirWay),
        moment: Timestamp,
    ) -> Result<Counted> {
        on_their_way.follow(mongo, self.sides, job, moment).await;
        let mut of_moved = Figures::default();
        for condition in on_their_way.conditions()?.unwrap_or_default() {
            match self.at(mongo, moment, &condition).await {
                Ok(some) => of_moved.add(&some),
                Err(error) => {
                    let error = describe_mongo(&error);
                    tracing::info!(error, "what moved can't be counted, so nothing is left out");
                    return Ok(Counted { all, ..Counted::default() });
                }
            }
        }
        Ok(Counted { all, moved: on_their_way.documents(), of_moved })
    }

    /// What the collections held at a moment of the documents that meet a condition.
    async fn at(
        &self,
        mongo: &Mongo,
        moment: Timestamp,
        condition: &Document,
    ) -> mongodb::error::Result<Figures> {
        let of = |stages: Vec<Document>| [vec![doc! {"$match": condition.clone()}], stages].concat();
        let predicate = &self.sides.predicate;
        let target = at_moment(mongo, &self.sides.target, of(vec![doc! {"$count": "n"}]), moment).await?;
        let quarantined = at_moment(mongo, self.quarantine, of(by_rule()), moment).await?;
        let source =
            at_moment(mongo, &self.sides.source, of(count::rule_pipeline(predicate, 0)), moment).await?;
        Ok(figures(predicate, &source, number(&target), read_by_rule(&quarantined)))
    }

    /// The same where the server keeps no moment for so long.
    async fn one_after_the_other(&self, mongo: &Mongo) -> Result<Figures> {
        let counts = count::by_rule(mongo, &self.sides.source, &self.sides.predicate, 0).await?;
        Ok(Figures {
            source: counts.source,
            rejected_by: without_zeros(counts.rejected_by),
            target: count::exactly(mongo, &self.sides.target, &Document::new()).await?,
            quarantined: count_by_rule(mongo, self.quarantine).await?,
        })
    }
}

fn figures(
    predicate: &Predicate,
    source: &Document,
    target: u64,
    quarantined: BTreeMap<String, u64>,
) -> Figures {
    let counts = count::read_rule_counts(predicate, source);
    let rejected_by = without_zeros(counts.rejected_by);
    Figures { source: counts.source, rejected_by, target, quarantined }
}

fn without_zeros(counts: BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    counts.into_iter().filter(|(_, count)| *count > 0).collect()
}

/// How many documents stand in the quarantine under each rule, in one document.
fn by_rule() -> Vec<Document> {
    vec![
        doc! {"$group": {"_id": "$rule", "n": {"$sum": 1_i64}}},
        doc! {"$group": {"_id": null, "rules": {"$push": {"rule": "$_id", "n": "$n"}}}},
    ]
}

fn read_by_rule(reply: &Document) -> BTreeMap<String, u64> {
    let rules = reply.get_array("rules").map(Vec::as_slice).unwrap_or_default();
    let mut counts = BTreeMap::new();
    for group in rules.iter().filter_map(|group| group.as_document()) {
        let name = group.get_str("rule").unwrap_or("(none)").to_owned();
        *counts.entry(name).or_default() += number(group);
    }
    counts
}

async fn count_by_rule(mongo: &Mongo, quarantine: &Namespace) -> Result<BTreeMap<String, u64>> {
    use futures_util::TryStreamExt as _;
    let collection = mongo.collection(quarantine).clone_with_type::<Document>();
    let reply: Option<Document> = retrying(format!("counting {quarantine} by rule"), || {
        let cursor = collection.aggregate(by_rule());
        async move { cursor.await?.try_next().await }
    })
    .await?;
    Ok(read_by_rule(&reply.unwrap_or_default()))
}

fn number(reply: &Document) -> u64 {
    reply.get("n").and_then(whole_number).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(source: u64, rejected: u64, target: u64, quarantined: u64) -> Figures {
        let by_rule = |count| without_zeros(BTreeMap::from([("old".to_owned(), count)]));
        Figures { source, rejected_by: by_rule(rejected), target, quarantined: by_rule(quarantined) }
    }

    #[test]
    fn every_document_is_kept_or_quarantined_under_its_rule() {
        assert!(of(10, 4, 6, 4).agree());
        assert!(!of(10, 4, 6, 3).agree(), "one is in neither");
        assert!(!of(10, 4, 5, 5).agree(), "one stands on the wrong side");
        let other = BTreeMap::from([("new".to_owned(), 4)]);
        assert!(!Figures { quarantined: other, ..of(10, 4, 6, 4) }.agree(), "under another rule");
        assert!(!Figures::default().agree(), "nothing proves nothing");
    }

    #[test]
    fn what_is_on_its_way_is_left_out_of_all_three() {
        let counted = Counted { all: of(10, 4, 6, 3), moved: 1, of_moved: of(1, 1, 0, 0) };
        assert!(counted.settled().agree());
        let lost = Counted { all: of(10, 4, 6, 2), ..counted };
        assert!(!lost.settled().agree(), "one that did not move is lacking");
        let all_moved = Counted { all: of(2, 1, 1, 1), moved: 2, of_moved: of(2, 1, 1, 1) };
        assert!(!all_moved.settled().agree(), "nothing is left that was compared");
        let mut sum = of(1, 1, 0, 0);
        sum.add(&of(3, 1, 2, 1));
        assert_eq!(sum, of(4, 2, 2, 1));
    }
}
