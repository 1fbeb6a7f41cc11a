//! The number of documents on both sides, by rule, at one moment.
//!
//! While a follower is alive the target is always a little behind. What it has
//! not applied yet is known, document by document: what the change stream says
//! from the job's position up to the moment of counting, and what is marked. All
//! other documents must agree to the last one; only these are left out, and told.

use std::collections::BTreeMap;
use std::time::Duration;

use bson::{Document, Timestamp, doc};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::check::Check;
use super::on_their_way::OnTheirWay;
use super::sides::Sides;
use crate::Context;
use crate::cleanse::count;
use crate::cleanse::ledger::at_moment;
use crate::error::{Result, describe_mongo};
use crate::job::store;
use crate::mongo::Mongo;
use crate::mongo::feed::Position;
use crate::mongo::index::whole_number;

/// The name of the check.
const NAME: &str = "counts";
/// A follower that has got no further for so long is stuck: what it has not applied is lacking.
const OLDEST_POSITION: u32 = 30;
/// The pause between two counts.
pub(super) const PAUSE: Duration = Duration::from_millis(500);

/// Both sides at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Counted {
    source: u64,
    /// Valid documents of the source.
    kept: u64,
    rejected_by: BTreeMap<String, u64>,
    target: u64,
    /// What the target had not applied at that moment.
    moved: Option<Moved>,
    /// What came and went since the copy began.
    during: Option<(u64, u64)>,
}

/// Documents on their way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Moved {
    /// All of them.
    documents: u64,
    /// Those that are valid in the source.
    kept: u64,
    /// Those that the target has, in whatever version.
    target: u64,
}

impl Counted {
    fn without_moved(&self) -> (u64, u64) {
        let moved = self.moved.unwrap_or_default();
        (self.kept.saturating_sub(moved.kept), self.target.saturating_sub(moved.target))
    }

    /// Whether every document of the source is kept or rejected by one rule, and
    /// the target has as many as are kept. Two empty sides agree, which proves nothing,
    /// nor does it where every document moved and is left out.
    fn agrees(&self) -> bool {
        let (expected, found) = self.without_moved();
        let rejected: u64 = self.rejected_by.values().sum();
        expected == found && expected > 0 && self.source == self.kept + rejected
    }

    fn check(&self, sides: &Sides) -> Check {
        let (expected, found) = self.without_moved();
        let check = Check::of(NAME, json!(expected), json!(found), Vec::new());
        Check { passed: self.agrees(), ..check.remark(self.text(sides)) }.with("ledger", self.json()).with(
            "moved",
            self.moved.map_or(
                Value::Null,
                |moved| json!({"documents": moved.documents, "kept": moved.kept, "in_target": moved.target}),
            ),
        )
    }

    fn json(&self) -> Value {
        json!({
            "source_at_start": self.at_start(),
            "inserted_during": self.during.map(|(inserted, _)| inserted),
            "deleted_during": self.during.map(|(_, deleted)| deleted),
            "source": self.source,
            "kept": self.kept,
            "rejected": self.rejected_by.values().sum::<u64>(),
            "rejected_by": self.rejected_by,
            "in_target": self.target,
        })
    }

    /// What the source had when the copy began, where that was followed.
    fn at_start(&self) -> Option<u64> {
        let (inserted, deleted) = self.during?;
        (self.source + deleted).checked_sub(inserted)
    }

    fn text(&self, sides: &Sides) -> String {
        let mut text = match (self.at_start(), self.during) {
            (Some(start), Some((inserted, deleted))) => {
                format!("{start} at the start + {inserted} inserted - {deleted} deleted = ")
            }
            _ => String::new(),
        };
        text += &format!("{} in {} = {} kept", self.source, sides.source, self.kept);
        for (rule, count) in &self.rejected_by {
            text += &format!(" + {count} {rule}");
        }
        text += &format!("; {} in {}", self.target, sides.target);
        if let Some(moved) = self.moved.filter(|moved| moved.documents > 0) {
            text += &format!(
                "; {} moved and are left out, {} of them valid and {} in the target",
                moved.documents, moved.kept, moved.target
            );
        }
        text
    }
}

/// Compares the number of documents that should be in the target with what is
/// there, again for a while where it is not the same. `copy` is the job that has
/// made the target.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn check(
    context: &Context,
    sides: &Sides,
    copy: Option<&Document>,
    settle: Duration,
) -> Result<Check> {
    let copy = copy.filter(|copy| is_of(copy, sides));
    let deadline = Instant::now() + settle;
    loop {
        let counted = count(&context.mongo, sides, copy).await?;
        if counted.agrees() || Instant::now() + PAUSE > deadline {
            return Ok(counted.check(sides));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether the job is about these rules: another one's figures mean nothing.
pub(super) fn is_of(copy: &Document, sides: &Sides) -> bool {
    let rules = copy.get_document("identity").and_then(|identity| identity.get_document("rules"));
    rules.is_ok_and(|rules| *rules == sides.predicate.identity())
}

async fn count(mongo: &Mongo, sides: &Sides, copy: Option<&Document>) -> Result<Counted> {
    // In this order: what is before the position is applied or marked, and what is
    // marked no longer is applied, before the moment.
    let (job, mut on_their_way) = OnTheirWay::marked(mongo, sides, copy).await?;
    let moment = mongo.majority_time().await?;
    let mut counted = match at(mongo, sides, moment).await {
        Ok(counted) => counted,
        Err(error) => {
            let error = describe_mongo(&error);
            tracing::info!(error, "both collections can't be counted at one moment");
            return one_after_the_other(mongo, sides).await;
        }
    };
    let Some(job) = job else { return Ok(counted) };
    counted.during = on_their_way.follow(mongo, sides, &job, moment).await;
    // Without a follower nothing is on its way: what the target lacks, it lacks.
    // A document that moved decides about others of its group, of which no list is kept.
    if is_at_work(&job, moment) && sides.predicate.valid().grouping.is_none() {
        counted.moved = count_moved(mongo, sides, &on_their_way, moment).await.unwrap_or_default();
    }
    Ok(counted)
}

/// Whether somebody follows the source for that job and is little behind.
pub(super) fn is_at_work(job: &Document, moment: Timestamp) -> bool {
    store::is_running(job) && is_near(position_of(job), moment)
}

pub(super) fn position_of(job: &Document) -> Option<Position> {
    job.get_document("feed").ok().and_then(Position::from_document)
}

/// Whether a follower is so little behind that it is at work. Pure.
fn is_near(position: Option<Position>, moment: Timestamp) -> bool {
    let reached = position.and_then(|position| position.time());
    reached.is_some_and(|reached| moment.time.saturating_sub(reached.time) <= OLDEST_POSITION)
}

/// Both sides as they were at a moment.
async fn at(mongo: &Mongo, sides: &Sides, moment: Timestamp) -> mongodb::error::Result<Counted> {
    let all = vec![doc! {"$count": "n"}];
    let target = number(&at_moment(mongo, &sides.target, all, moment).await?, "n");
    let valid = sides.predicate.valid();
    let mut kept = valid.stages();
    match &valid.grouping {
        Some(grouping) => kept.extend(grouping.count_valid()),
        None => kept.push(doc! {"$count": "n"}),
    }
    // Counted by itself, not as the rest that no rule rejects.
    let pipeline = count::rule_pipeline_with(&sides.predicate, "kept", kept);
    let reply = at_moment(mongo, &sides.source, pipeline, moment).await?;
    let counts = count::read_rule_counts(&sides.predicate, &reply);
    Ok(Counted {
        source: counts.source,
        kept: count::facet(&reply, "kept"),
        rejected_by: counts.rejected_by,
        target,
        moved: None,
        during: None,
    })
}

/// The same where the server keeps no moment for so long.
async fn one_after_the_other(mongo: &Mongo, sides: &Sides) -> Result<Counted> {
    let counts = count::by_rule(mongo, &sides.source, &sides.predicate, 0).await?;
    Ok(Counted {
        source: counts.source,
        kept: counts.kept,
        rejected_by: counts.rejected_by,
        target: count::exactly(mongo, &sides.target, &Document::new()).await?,
        moved: None,
        during: None,
    })
}

/// What both sides had of the documents on their way at that moment; `None` where there are too many.
async fn count_moved(
    mongo: &Mongo,
    sides: &Sides,
    on_their_way: &OnTheirWay,
    moment: Timestamp,
) -> Result<Option<Moved>> {
    use crate::error::Context as _;
    let Some(conditions) = on_their_way.conditions()? else { return Ok(None) };
    let valid = sides.predicate.valid();
    let mut moved = Moved::default();
    for condition in conditions {
        let (kept, all) = (valid.candidates(condition.clone()), vec![doc! {"$match": condition}]);
        for (namespace, mut pipeline, count) in
            [(&sides.source, kept, &mut moved.kept), (&sides.target, all, &mut moved.target)]
        {
            pipeline.push(doc! {"$count": "n"});
            let reply = at_moment(mongo, namespace, pipeline, moment).await;
            *count += number(&reply.during(format!("counting {namespace}"))?, "n");
        }
    }
    // Documents whose member moved are not listed one by one.
    moved.documents = on_their_way.documents().max(moved.kept).max(moved.target);
    Ok(Some(moved))
}

fn number(reply: &Document, name: &str) -> u64 {
    reply.get(name).and_then(whole_number).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(kept: u64, target: u64) -> Counted {
        Counted {
            source: kept + 7,
            kept,
            rejected_by: BTreeMap::from([("keep".into(), 5), ("old".into(), 2)]),
            target,
            moved: None,
            during: Some((4, 1)),
        }
    }

    #[test]
    fn two_empty_sides_do_not_pass() {
        assert!(!counted(0, 0).agrees());
        assert!(counted(5, 5).agrees());
        assert!(!counted(5, 4).agrees());
    }

    #[test]
    fn a_follower_that_is_stuck_hides_nothing() {
        let at = |time| Timestamp { time, increment: 1 };
        let near = |time| is_near(Some(Position::Time(at(time))), at(1_000));
        assert!(near(1_000) && near(970) && near(1_001));
        assert!(!near(969));
        assert!(!is_near(None, at(1_000)));
    }

    #[test]
    fn every_document_of_the_source_is_kept_or_rejected() {
        let lost = Counted { source: 13, ..counted(5, 5) };
        assert!(!lost.agrees(), "one is neither");
        assert_eq!(counted(5, 5).at_start(), Some(9));
        assert_eq!(Counted { during: None, ..counted(5, 5) }.at_start(), None);
    }

    #[test]
    fn what_moved_is_left_out_on_both_sides() {
        let moved = |kept, target| Some(Moved { documents: 3, kept, target });
        let behind = Counted { moved: moved(3, 1), ..counted(10, 8) };
        assert!(behind.agrees());
        assert_eq!(behind.without_moved(), (7, 7));
        assert!(!Counted { moved: moved(3, 3), ..counted(3, 3) }.agrees(), "nothing was compared");
        let short = Counted { moved: moved(3, 1), ..counted(10, 7) };
        assert!(!short.agrees(), "one that did not move is lacking");
    }
}
