//! The number of documents on both sides, by rule, at one moment.
//!
//! While a follower is alive the target is always a little behind. What it has
//! not applied yet is known, document by document: what the change stream says
//! from the job's position up to the moment of counting, and what is marked. All
//! other documents must agree to the last one; only these are left out, and told.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bson::{Bson, Document, RawBson, Timestamp, doc};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::check::Check;
use super::sides::Sides;
use crate::Context;
use crate::cleanse::count;
use crate::cleanse::ledger::{Tally, at_moment};
use crate::cleanse::marks::Marks;
use crate::cleanse::predicate::all_of;
use crate::error::{Result, describe_mongo};
use crate::job::store;
use crate::mongo::Mongo;
use crate::mongo::feed::{Position, after, nudge};
use crate::mongo::index::whole_number;
use crate::mongo::sink::value_bytes;
use crate::mongo::source::to_bson;
use crate::mongo::watched::Watched;

/// The name of the check.
const NAME: &str = "counts";
/// More documents than this on their way are no lag but a backlog.
const MOST_MOVED: usize = 100_000;
/// A follower that has got no further for so long is stuck: what it has not applied is lacking.
const OLDEST_POSITION: u32 = 30;
/// Changes that are read at once.
const BATCH: usize = 4_000;
/// Documents that are counted at once.
const AT_ONCE: usize = 1_000;
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
    let (job, mut on_their_way) = OnTheirWay::marked(mongo, copy).await?;
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
    if is_at_work(&job, moment) && sides.predicate.valid().is_condition() {
        counted.moved = on_their_way.counted(mongo, sides, moment).await.unwrap_or_default();
    }
    Ok(counted)
}

/// Whether somebody follows the source for that job and is little behind.
pub(super) fn is_at_work(job: &Document, moment: Timestamp) -> bool {
    store::is_running(job) && is_near(position_of(job), moment)
}

fn position_of(job: &Document) -> Option<Position> {
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

/// Documents whose last change may not be applied yet; too many where there is no list.
#[derive(Debug)]
pub(super) struct OnTheirWay(Option<HashMap<Vec<u8>, RawBson>>);

impl Default for OnTheirWay {
    fn default() -> Self {
        Self(Some(HashMap::new()))
    }
}

impl OnTheirWay {
    /// What is marked for the job of a copy, where that is running, and the job as it
    /// is stored now.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub(super) async fn marked(mongo: &Mongo, copy: Option<&Document>) -> Result<(Option<Document>, Self)> {
        let job = match copy.and_then(|copy| copy.get_str("_id").ok()) {
            Some(name) => store::list(mongo, Some(name)).await?.into_iter().next(),
            None => None,
        };
        let mut on_their_way = Self::default();
        if let Some(job) = job.as_ref().filter(|job| store::is_running(job)) {
            on_their_way.add_marked(mongo, job).await?;
        }
        Ok((job, on_their_way))
    }

    fn add(&mut self, ids: impl IntoIterator<Item = RawBson>) {
        if let Some(known) = &mut self.0 {
            known.extend(ids.into_iter().map(|id| (value_bytes(id.as_raw_bson_ref()), id)));
            if known.len() > MOST_MOVED {
                self.0 = None;
            }
        }
    }

    async fn add_marked(&mut self, mongo: &Mongo, job: &Document) -> Result<()> {
        let marks = Marks::of(mongo, job.get_str("_id").unwrap_or_default());
        let mut last = None;
        while self.0.is_some() {
            let some = marks.following(last.as_ref(), i64::try_from(BATCH).unwrap_or(i64::MAX)).await?;
            let Some(end) = some.last().cloned() else { break };
            self.add(some.into_iter().map(|mark| mark.id));
            last = Some(end);
        }
        Ok(())
    }

    /// Adds what changed between the position of a job and a moment; returns what came
    /// and went since its copy began, where that is known.
    pub(super) async fn follow(
        &mut self,
        mongo: &Mongo,
        sides: &Sides,
        job: &Document,
        until: Timestamp,
    ) -> Option<(u64, u64)> {
        let followed = self.try_follow(mongo, sides, job, until).await;
        followed
            .inspect_err(|error| {
                // Nothing can be said about what moved, so nothing is left out.
                tracing::info!(%error, "the changes since the copy can't be read");
                self.0 = Some(HashMap::new());
            })
            .ok()
            .flatten()
    }

    async fn try_follow(
        &mut self,
        mongo: &Mongo,
        sides: &Sides,
        job: &Document,
        until: Timestamp,
    ) -> Result<Option<(u64, u64)>> {
        let Some(position) = position_of(job) else { return Ok(None) };
        let mut tally = Tally::stored(job);
        nudge(mongo).await?;
        let mut feed = mongo.feed(&Watched::only(&sides.source), position).await?;
        let beyond = after(until);
        let mut changes = 0;
        while !feed.has_reached(beyond) && changes <= MOST_MOVED {
            let read = feed.next(BATCH).await?;
            changes += read.len();
            tally.add(&read.came_or_went, Some(until));
            self.add(read.touched);
            if read.ended_by.is_some() {
                return Ok(None);
            }
        }
        if changes > MOST_MOVED {
            self.0 = None;
            return Ok(None);
        }
        Ok(tally.came_and_went())
    }

    /// Conditions that each match some of them, and together all; `None` where there
    /// are too many.
    ///
    /// # Errors
    /// A stop where an `_id` can't be read.
    pub(super) fn conditions(&self) -> Result<Option<Vec<Document>>> {
        let Some(known) = &self.0 else { return Ok(None) };
        let ids: Vec<&RawBson> = known.values().collect();
        let condition = |part: &[&RawBson]| {
            let ids = part.iter().map(|id| to_bson(id)).collect::<Result<Vec<Bson>>>()?;
            Ok(doc! {"_id": {"$in": ids}})
        };
        ids.chunks(AT_ONCE).map(condition).collect::<Result<Vec<_>>>().map(Some)
    }

    /// How many they are; none where they are too many to know.
    pub(super) fn documents(&self) -> u64 {
        self.0.as_ref().map_or(0, |known| known.len() as u64)
    }

    /// What both sides had of them at that moment; `None` where there are too many.
    async fn counted(&self, mongo: &Mongo, sides: &Sides, moment: Timestamp) -> Result<Option<Moved>> {
        use crate::error::Context as _;
        let Some(conditions) = self.conditions()? else { return Ok(None) };
        let valid = sides.predicate.valid().condition;
        let mut moved = Moved { documents: self.documents(), ..Moved::default() };
        for by_id in conditions {
            let is_valid = all_of(vec![Bson::Document(by_id.clone()), Bson::Document(valid.clone())]);
            for (namespace, condition, count) in
                [(&sides.source, is_valid, &mut moved.kept), (&sides.target, by_id, &mut moved.target)]
            {
                let pipeline = vec![doc! {"$match": condition}, doc! {"$count": "n"}];
                let reply = at_moment(mongo, namespace, pipeline, moment).await;
                *count += number(&reply.during(format!("counting {namespace}"))?, "n");
            }
        }
        Ok(Some(moved))
    }
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
