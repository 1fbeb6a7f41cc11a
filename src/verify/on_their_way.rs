//! Documents whose last change a follower may not have applied yet: those that were
//! touched since its position, those that are marked, and those whose member came or went.

use std::collections::{BTreeMap, HashMap};

use bson::{Bson, Document, RawBson, RawDocumentBuf, Timestamp, doc};

use super::counts::position_of;
use super::sides::Sides;
use crate::cleanse::affected;
use crate::cleanse::ledger::{Tally, at_moment};
use crate::cleanse::marks::Marks;
use crate::config::values::Namespace;
use crate::error::{Context as _, Error, Result};
use crate::job::store;
use crate::mongo::Mongo;
use crate::mongo::feed::{after, nudge};
use crate::mongo::sink::value_bytes;
use crate::mongo::source::to_bson;
use crate::mongo::valid::Membership;
use crate::mongo::watched::{Member, Watched, asks_for, values_at};

/// More documents than this on their way are no lag but a backlog.
const MOST_MOVED: usize = 100_000;
/// More documents or values than this can't be told apart from each other in one condition.
const MOST_BESIDE: usize = 20_000;
/// Changes that are read at once.
const BATCH: usize = 4_000;
/// Documents, or values of members, that are counted at once.
const AT_ONCE: usize = 1_000;

/// Values by their bytes.
type Values = HashMap<Vec<u8>, RawBson>;

/// What is on its way.
#[derive(Debug)]
pub(super) struct OnTheirWay {
    /// Documents by their `_id`; too many where there is no list.
    documents: Option<Values>,
    /// Values of members that came or went, by the number of the membership.
    values: BTreeMap<usize, Values>,
    /// The same for members whose value is to be looked up, by their `_id`.
    to_look_up: BTreeMap<usize, Values>,
    memberships: Vec<Membership>,
}

fn by_bytes(values: impl IntoIterator<Item = RawBson>) -> impl Iterator<Item = (Vec<u8>, RawBson)> {
    values.into_iter().map(|value| (value_bytes(value.as_raw_bson_ref()), value))
}

impl OnTheirWay {
    /// What is marked for the job of a copy, where that is running, and the job as it
    /// is stored now.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub(super) async fn marked(
        mongo: &Mongo,
        sides: &Sides,
        copy: Option<&Document>,
    ) -> Result<(Option<Document>, Self)> {
        let job = match copy.and_then(|copy| copy.get_str("_id").ok()) {
            Some(name) => store::find(mongo, name).await?,
            None => None,
        };
        let mut on_their_way = Self::none(sides.predicate.valid().memberships);
        if let Some(job) = job.as_ref().filter(|job| store::is_running(job)) {
            on_their_way.add_marked(mongo, job).await?;
            if !on_their_way.memberships.is_empty() {
                let name = job.get_str("_id").unwrap_or_default();
                on_their_way.add_members(affected::noted_members(mongo, name, MOST_BESIDE).await?);
            }
        }
        Ok((job, on_their_way))
    }

    fn none(memberships: Vec<Membership>) -> Self {
        Self {
            documents: Some(Values::new()),
            values: BTreeMap::new(),
            to_look_up: BTreeMap::new(),
            memberships,
        }
    }

    fn add(&mut self, ids: impl IntoIterator<Item = RawBson>) {
        if let Some(known) = &mut self.documents {
            known.extend(by_bytes(ids));
            if known.len() > MOST_MOVED {
                self.documents = None;
            }
        }
    }

    fn add_members(&mut self, members: Vec<Member>) {
        for member in members {
            self.values.entry(member.membership).or_default().extend(by_bytes(member.values));
            self.to_look_up.entry(member.membership).or_default().extend(by_bytes(member.look_up));
        }
    }

    /// The values that members have at that moment whose change did not tell them.
    async fn look_up(&mut self, mongo: &Mongo, source: &Namespace, moment: Timestamp) -> Result<()> {
        for (number, ids) in std::mem::take(&mut self.to_look_up) {
            let Some(membership) = self.memberships.get(number).filter(|_| !ids.is_empty()) else { continue };
            let namespace =
                Namespace { database: source.database.clone(), collection: membership.collection.clone() };
            let ids = ids.values().map(to_bson).collect::<Result<Vec<Bson>>>()?;
            let pipeline = vec![
                doc! {"$match": {"_id": {"$in": ids}}},
                doc! {"$project": {&membership.foreign: 1}},
                doc! {"$group": {"_id": Bson::Null, "members": {"$push": "$$ROOT"}}},
            ];
            let reply = at_moment(mongo, &namespace, pipeline, moment).await;
            let reply = reply.during(format!("looking up members in {namespace}"))?;
            let members = reply.get_array("members").into_iter().flatten().filter_map(Bson::as_document);
            let known = self.values.entry(number).or_default();
            for member in members {
                let member = RawDocumentBuf::try_from(member)
                    .map_err(|error| Error::stopped(format!("a member of {namespace}: {error}")))?;
                known.extend(by_bytes(values_at(&member, &membership.foreign)));
            }
        }
        Ok(())
    }

    async fn add_marked(&mut self, mongo: &Mongo, job: &Document) -> Result<()> {
        let marks = Marks::of(mongo, job.get_str("_id").unwrap_or_default());
        let mut last = None;
        while self.documents.is_some() {
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
                *self = Self::none(Vec::new());
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
        let watched = Watched { source: sides.source.clone(), memberships: self.memberships.clone() };
        let mut feed = mongo.feed(&watched, position).await?;
        let beyond = after(until);
        let mut changes = 0;
        while !feed.has_reached(beyond) && changes <= MOST_MOVED {
            let read = feed.next(BATCH).await?;
            changes += read.len();
            tally.add(&read.came_or_went, Some(until));
            self.add(read.touched);
            self.add_members(read.members);
            if read.ended_by.is_some() {
                return Ok(None);
            }
        }
        if changes > MOST_MOVED {
            self.documents = None;
            return Ok(None);
        }
        self.look_up(mongo, &sides.source, until).await?;
        Ok(tally.came_and_went())
    }

    /// Conditions that each match others of them, and together all; `None` where there
    /// are too many.
    ///
    /// # Errors
    /// A stop where an `_id` or a value can't be read.
    pub(super) fn conditions(&self) -> Result<Option<Vec<Document>>> {
        let Some(known) = &self.documents else { return Ok(None) };
        let ids = known.values().map(to_bson).collect::<Result<Vec<Bson>>>()?;
        let mut conditions: Vec<Document> =
            ids.chunks(AT_ONCE).map(|part| doc! {"_id": {"$in": part.to_vec()}}).collect();
        let values: usize = self.values.values().map(HashMap::len).sum();
        if values == 0 {
            return Ok(Some(conditions));
        }
        if ids.len().max(values) > MOST_BESIDE {
            return Ok(None);
        }
        let mut others = vec![doc! {"_id": {"$in": ids}}];
        for asking in self.asking()? {
            conditions.push(doc! {"$and": [asking.clone(), {"$nor": others.clone()}]});
            others.push(asking);
        }
        Ok(Some(conditions))
    }

    /// The conditions for documents that members answer for which came or went.
    fn asking(&self) -> Result<Vec<Document>> {
        let mut asking = Vec::new();
        for (number, values) in &self.values {
            let Some(membership) = self.memberships.get(*number) else { continue };
            let values: Vec<RawBson> = values.values().cloned().collect();
            for part in values.chunks(AT_ONCE) {
                let condition = Document::try_from(asks_for(&membership.local, part));
                asking.push(condition.map_err(|error| {
                    Error::stopped(format!(
                        "a value of {} can't be asked for: {error}",
                        membership.collection
                    ))
                })?);
            }
        }
        Ok(asking)
    }

    /// How many documents were touched or are marked; none where they are too many to know.
    pub(super) fn documents(&self) -> u64 {
        self.documents.as_ref().map_or(0, |known| known.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_document_meets_two_conditions() {
        let membership =
            Membership { collection: "members".into(), local: "l".into(), foreign: "_id".into() };
        let mut on_their_way = OnTheirWay::none(vec![membership]);
        on_their_way.add([1.into(), 2.into(), 1.into()]);
        assert_eq!(on_their_way.conditions().expect("readable").expect("few").len(), 1);
        on_their_way.add_members(vec![Member { membership: 0, values: vec![7.into()], look_up: None }]);
        let conditions = on_their_way.conditions().expect("readable").expect("few");
        let asking = doc! {"l": {"$in": [7]}};
        assert_eq!(conditions.len(), 2);
        let and = conditions[1].get_array("$and").expect("both");
        assert_eq!(and[0].as_document(), Some(&asking));
        assert!(and[1].to_string().contains("$nor"));
        assert_eq!(on_their_way.documents(), 2);
    }

    #[test]
    fn more_than_fits_is_told() {
        let mut on_their_way = OnTheirWay::none(Vec::new());
        on_their_way.add((0..=i32::try_from(MOST_MOVED).expect("small")).map(RawBson::from));
        assert_eq!(on_their_way.conditions().expect("readable"), None);
        assert_eq!(on_their_way.documents(), 0);
    }
}
