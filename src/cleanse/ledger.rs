//! The ledger at the end of a cleanse: where every document of the source went.
//!
//! Its figures are those of one moment, so that they add up while the source is
//! written to: source and target are counted in one snapshot, and what came and
//! went since the start is counted from the change stream up to just that
//! moment, kept with the stream's position so that no kill counts twice.

use std::collections::BTreeMap;

use bson::{Bson, Document, Timestamp, doc};
use futures_util::future::try_join_all;
use mongodb::error::{Error as DriverError, ErrorKind};
use serde_json::{Value, json};

use super::count::{self, RuleCounts};
use super::follow::Follower;
use super::plan::Plan;
use super::ranges::Ranges;
use crate::config::values::Namespace;
use crate::error::{Context as _, Result, describe_mongo};
use crate::mongo::Mongo;
use crate::mongo::command::is_transient;
use crate::mongo::feed::Position;
use crate::mongo::index::{stored_count, whole_number};
use crate::mongo::range::{Range, parts};

/// The field of the job document with what came and went.
pub const TALLY: &str = "tally";
/// Tries to count within one snapshot; elections and busy servers pass.
const ATTEMPTS: u32 = 3;

/// What came and went in the source since a moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tally {
    /// `None` where nobody counted from the start.
    since: Option<Timestamp>,
    inserted: u64,
    deleted: u64,
}

impl Tally {
    /// Nothing so far.
    pub fn since(moment: Option<Timestamp>) -> Self {
        Self { since: moment, ..Self::default() }
    }

    /// As it was stored with a job.
    pub fn stored(job: &Document) -> Self {
        let Ok(stored) = job.get_document(TALLY) else { return Self::default() };
        let count = |name: &str| stored.get(name).and_then(whole_number).unwrap_or(0);
        Self {
            since: stored.get_timestamp("since").ok(),
            inserted: count("inserted"),
            deleted: count("deleted"),
        }
    }

    /// As it is stored.
    pub fn to_document(&self) -> Document {
        doc! {
            "since": self.since.map_or(Bson::Null, Bson::Timestamp),
            "inserted": stored_count(self.inserted),
            "deleted": stored_count(self.deleted),
        }
    }

    /// What came and what went, where somebody counted from the start.
    pub fn came_and_went(&self) -> Option<(u64, u64)> {
        self.since.map(|_| (self.inserted, self.deleted))
    }

    /// Counts what came (true) and went, after the start and up to a moment.
    pub fn add(&mut self, came_or_went: &[(Timestamp, bool)], until: Option<Timestamp>) {
        let order = |time: Timestamp| (time.time, time.increment);
        for (time, came) in came_or_went {
            let is_early = self.since.is_some_and(|since| order(*time) <= order(since));
            let is_late = until.is_some_and(|until| order(*time) > order(until));
            match (is_early || is_late, came) {
                (true, _) => {}
                (false, true) => self.inserted += 1,
                (false, false) => self.deleted += 1,
            }
        }
    }
}

/// Where every document of the source went.
#[derive(Debug, Clone, PartialEq)]
pub struct Ledger {
    /// Documents of the source at the moment of the ledger.
    pub source_now: u64,
    /// Documents in the target at the same moment.
    pub in_target: u64,
    /// Documents in the quarantine at the same moment, where there is one.
    pub in_quarantine: Option<u64>,
    /// Documents per rule, where they were counted.
    pub rejected_by: BTreeMap<String, u64>,
    /// Documents that the rules keep, where that was counted.
    kept_by_rules: Option<u64>,
    /// Changes of the source that were not applied at that moment.
    behind: u64,
    /// Whether source and target let documents expire, at moments of their own.
    expires: bool,
    tally: Tally,
}

impl Ledger {
    fn rejected(&self) -> u64 {
        self.source_now.saturating_sub(self.in_target)
    }

    /// What the source had when the copy began, from what came and went since.
    fn source_at_start(&self) -> Option<u64> {
        self.tally.since?;
        (self.source_now + self.tally.deleted).checked_sub(self.tally.inserted)
    }

    /// Whether the target holds just what the rules keep; `None` where that
    /// can't be told: nobody counted by the rules, or the target was behind.
    pub fn is_balanced(&self) -> Option<bool> {
        if self.behind > 0 {
            return None;
        }
        let rejected: u64 = self.rejected_by.values().sum();
        let by_rules =
            self.kept_by_rules.map(|kept| kept == self.in_target && kept + rejected == self.source_now);
        let by_place = self.in_quarantine.map(|count| count + self.in_target == self.source_now);
        let by_place = by_place.filter(|fits| *fits || !self.expires);
        [by_rules, by_place].into_iter().flatten().reduce(|one, other| one && other)
    }

    /// For the result.
    pub fn json(&self) -> Value {
        json!({
            "source_at_start": self.source_at_start(),
            "inserted_during": self.tally.since.map(|_| self.tally.inserted),
            "deleted_during": self.tally.since.map(|_| self.tally.deleted),
            "source_now": self.source_now,
            "kept": self.in_target,
            "rejected": self.rejected(),
            "quarantined": self.in_quarantine,
            "rejected_by": self.rejected_by,
            "changes_not_applied": self.behind,
            "balanced": self.is_balanced(),
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        let came_and_went = self.source_at_start().map_or(String::new(), |start| {
            format!(
                "{start} at the start + {} inserted - {} deleted = ",
                self.tally.inserted, self.tally.deleted
            )
        });
        let verdict = match self.is_balanced() {
            Some(true) => "balanced",
            Some(false) => "NOT balanced: the target holds something else than what the rules keep",
            None if self.behind > 0 => "the source was written to: these are two figures of one moment",
            None => "--count-rules checks that by rule",
        };
        format!(
            "  ledger: {came_and_went}{} in the source = {} kept + {} rejected; {verdict}",
            self.source_now,
            self.in_target,
            self.rejected()
        )
    }
}

/// Takes the ledger after everything was caught up with up to `position`; `None`
/// where the server can't count both collections at one moment.
///
/// # Errors
/// A stop where the changes or the ranges of the copy can't be read.
pub async fn take(
    mongo: &Mongo,
    plan: &Plan,
    follower: &Follower<'_>,
    position: &Position,
    by_rule: bool,
) -> Result<Option<Ledger>> {
    let parts = parts_of_source(mongo, plan, follower.job.name()).await?;
    for attempt in 1..=ATTEMPTS {
        // Everything in the target was written by a majority, so before this.
        let moment = mongo.majority_time().await?;
        match count_all(mongo, plan, &parts, moment, by_rule).await {
            Ok(mut ledger) => {
                (ledger.behind, ledger.tally) = follower.look_ahead(position.clone(), moment).await?;
                return Ok(Some(ledger));
            }
            Err(error) if attempt < ATTEMPTS && is_transient(&error) => {}
            Err(error) if is_unauthorized(&error) => {
                return Err(error).during(format!("counting {}", plan.source));
            }
            Err(error) => {
                let error = describe_mongo(&error);
                tracing::info!(error, "both collections can't be counted at one moment");
                return Ok(None);
            }
        }
    }
    Ok(None)
}

fn is_unauthorized(error: &DriverError) -> bool {
    matches!(error.kind.as_ref(), ErrorKind::Command(command) if command.code == 13)
}

/// The parts in which the source is counted side by side, by the bounds of the copy.
async fn parts_of_source(mongo: &Mongo, plan: &Plan, job: &str) -> Result<Vec<Range>> {
    if plan.description.is_clustered() {
        return Ok(vec![Range::all()]);
    }
    let ranges = Ranges::of(mongo, job).load().await?;
    let bounds: Vec<Bson> = ranges.into_iter().filter_map(|range| range.range.upper).collect();
    Ok(parts(&bounds, plan.parallel))
}

async fn count_all(
    mongo: &Mongo,
    plan: &Plan,
    parts: &[Range],
    moment: Timestamp,
    by_rule: bool,
) -> mongodb::error::Result<Ledger> {
    // Source and target are clustered both or neither.
    let has_id_index = !plan.description.is_clustered();
    let source = async {
        if by_rule {
            let pipeline = count::rule_pipeline(&plan.predicate, 0);
            let reply = at_moment(mongo, &plan.source, pipeline, moment).await?;
            return Ok(count::read_rule_counts(&plan.predicate, &reply));
        }
        let counts = parts.iter().map(|part| count_at(mongo, &plan.source, part, moment, has_id_index));
        let source = try_join_all(counts).await?.into_iter().sum();
        Ok(RuleCounts { source, ..RuleCounts::default() })
    };
    let quarantine = async {
        match &plan.quarantine {
            Some(quarantine) => count_at(mongo, quarantine, &Range::all(), moment, true).await.map(Some),
            None => Ok(None),
        }
    };
    let target = async { count_at(mongo, &plan.target, &Range::all(), moment, has_id_index).await };
    let (source, in_target, in_quarantine) = tokio::try_join!(source, target, quarantine)?;
    // Without rules everything is kept, which costs no further look.
    let kept = if by_rule {
        Some(source.kept)
    } else {
        plan.predicate.valid().is_everything().then_some(source.source)
    };
    let expires = expires(plan);
    Ok(Ledger {
        source_now: source.source,
        in_target,
        in_quarantine,
        rejected_by: source.rejected_by,
        kept_by_rules: kept.filter(|kept| !expires || *kept == in_target),
        behind: 0,
        expires,
        tally: Tally::default(),
    })
}

/// The number of documents of a range at a moment, told by the `_id` index where there is one:
/// it is a fraction of the documents.
async fn count_at(
    mongo: &Mongo,
    namespace: &Namespace,
    range: &Range,
    moment: Timestamp,
    has_id_index: bool,
) -> mongodb::error::Result<u64> {
    let stages = vec![doc! {"$match": range.filter()}, doc! {"$count": "n"}];
    let mut command = command_at(namespace, stages, moment);
    if has_id_index {
        command.insert("hint", doc! {"_id": 1});
    }
    let reply = first_of(mongo, namespace, command).await?;
    Ok(reply.get("n").and_then(whole_number).unwrap_or(0))
}

fn expires(plan: &Plan) -> bool {
    let source = &plan.description;
    source.options.contains_key("expireAfterSeconds")
        || source.indexes.iter().any(|index| index.contains_key("expireAfterSeconds"))
}

/// The one document that a pipeline makes of a collection as it was then.
///
/// # Errors
/// The driver's error: the server may keep no moment for so long.
pub async fn at_moment(
    mongo: &Mongo,
    namespace: &Namespace,
    pipeline: Vec<Document>,
    moment: Timestamp,
) -> mongodb::error::Result<Document> {
    first_of(mongo, namespace, command_at(namespace, pipeline, moment)).await
}

fn command_at(namespace: &Namespace, pipeline: Vec<Document>, moment: Timestamp) -> Document {
    doc! {
        "aggregate": &namespace.collection,
        "pipeline": pipeline,
        "cursor": {},
        "allowDiskUse": true,
        "readConcern": {"level": "snapshot", "atClusterTime": moment},
    }
}

async fn first_of(
    mongo: &Mongo,
    namespace: &Namespace,
    command: Document,
) -> mongodb::error::Result<Document> {
    let reply = mongo.database(&namespace.database).run_command(command).await?;
    let batch = reply.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
    let first = batch.ok().and_then(|batch| batch.first()).and_then(Bson::as_document);
    Ok(first.cloned().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: u32) -> Timestamp {
        Timestamp { time, increment: 1 }
    }

    #[test]
    fn what_came_and_went_is_counted_between_two_moments() {
        let mut tally = Tally::since(Some(at(10)));
        let events = [(at(9), true), (at(10), true), (at(11), true), (at(12), false), (at(13), true)];
        tally.add(&events, Some(at(12)));
        assert_eq!((tally.inserted, tally.deleted), (1, 1));
        assert_eq!(Tally::stored(&doc! {TALLY: tally.to_document()}), tally);
        assert_eq!(Tally::stored(&doc! {}), Tally::default());
    }

    fn ledger(kept_by_rules: Option<u64>, behind: u64) -> Ledger {
        Ledger {
            source_now: 100,
            in_target: 60,
            in_quarantine: None,
            rejected_by: BTreeMap::from([("keep".into(), 30), ("old".into(), 10)]),
            kept_by_rules,
            behind,
            expires: false,
            tally: Tally { since: Some(at(1)), inserted: 7, deleted: 2 },
        }
    }

    #[test]
    fn a_ledger_says_what_can_be_told_and_nothing_else() {
        assert_eq!(ledger(Some(60), 0).is_balanced(), Some(true));
        assert_eq!(ledger(Some(61), 0).is_balanced(), Some(false));
        assert_eq!(ledger(Some(61), 3).is_balanced(), None, "the target was behind");
        assert_eq!(ledger(None, 0).is_balanced(), None, "nobody counted by the rules");
        let quarantined = |count| Ledger { in_quarantine: Some(count), ..ledger(None, 0) }.is_balanced();
        assert_eq!((quarantined(40), quarantined(41)), (Some(true), Some(false)));
        assert_eq!((ledger(None, 0).source_at_start(), ledger(None, 0).rejected()), (Some(95), 40));
        let uncounted = Ledger { tally: Tally::default(), ..ledger(None, 0) };
        assert_eq!(uncounted.source_at_start(), None);
        let text = ledger(Some(60), 0).text();
        assert!(
            text.contains("95 at the start + 7 inserted - 2 deleted = 100 in the source = 60 kept"),
            "{text}"
        );
    }
}
