//! Documents that nobody touched and that are decided about anew all the same:
//! those whose member came or went, and groups that were copied as a whole.
//!
//! A member decides about the documents that ask for its value. Those that ask
//! for it when the change is worked off are looked up and brought up to date; one that
//! began or ceased to ask for it later has been touched itself. While the copy
//! runs, members are noted instead, as durably as touched documents are.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bson::{RawBson, RawDocument, RawDocumentBuf, Timestamp, doc, rawdoc};
use mongodb::Cursor;
use tokio_util::sync::CancellationToken;

use super::follow::{Followed, Follower};
use super::marks::Marks;
use crate::config::values::Namespace;
use crate::error::{Context, Result};
use crate::mongo::Mongo;
use crate::mongo::catch_up::Applied;
use crate::mongo::command::{is_transient, retrying};
use crate::mongo::exact;
use crate::mongo::groups;
use crate::mongo::lanes::Lanes;
use crate::mongo::notes::Notes;
use crate::mongo::sink::value_bytes;
use crate::mongo::watched::{Member, asks_for, values_at};
use crate::throttle::waiting::Waiting;

/// The collection of noted members in the state database.
pub const MEMBERS: &str = "members";
/// Values that are asked for at once.
const VALUES: usize = 200;
/// Documents that are brought up to date at once.
const DOCUMENTS: usize = 1_000;
/// How often it is looked at whether documents may be brought up to date again.
const LOOK: Duration = Duration::from_millis(200);
/// Tries to read the documents of a value to their end.
const TRIES: u32 = 8;

impl Follower<'_> {
    /// Forgets what an earlier copy has left.
    ///
    /// # Errors
    /// A stop where the notes can't be removed.
    pub(super) async fn forget_affected(&self) -> Result<()> {
        self.member_notes().clear().await?;
        Notes::of(self.mongo, groups::NOTES, self.job.name()).clear().await
    }

    /// Remembers members until the copy is done.
    ///
    /// # Errors
    /// A stop where the notes can't be written.
    pub(super) async fn note_members(&self, members: &[Member]) -> Result<()> {
        let notes: Vec<Vec<u8>> = members.iter().flat_map(encode).collect();
        self.member_notes().add(&notes).await
    }

    /// Works off the members that were noted; false where some may be left.
    ///
    /// # Errors
    /// A stop where a document can't be brought up to date.
    pub(super) async fn work_off_members(
        &self,
        catch_up: &mut Lanes,
        after: Option<Timestamp>,
        stop: &CancellationToken,
        followed: &mut Followed,
    ) -> Result<bool> {
        if self.valid.memberships.is_empty() {
            return Ok(true);
        }
        let notes = self.member_notes();
        while !stop.is_cancelled() {
            self.job.lease().valid().await?;
            let some = notes.some(i64::try_from(VALUES).unwrap_or(i64::MAX)).await?;
            if some.is_empty() {
                return Ok(true);
            }
            let members: Vec<Member> = some.iter().filter_map(|note| decode(&note.content)).collect();
            let Some(applied) = self.bring_members(catch_up, &members, after, stop).await? else {
                return Ok(false);
            };
            followed.applied.add(applied);
            followed.changes += u64::try_from(some.len()).unwrap_or(0);
            notes.remove(&some).await?;
        }
        Ok(false)
    }

    /// Marks a document of each group of the target that has more than one, so
    /// that it is looked at.
    ///
    /// # Errors
    /// A stop where the target can't be read.
    pub(super) async fn mark_crowded(&self) -> Result<()> {
        let Some(grouping) = &self.valid.grouping else { return Ok(()) };
        self.events.note(format!("looking for documents of {} of which only one is kept", self.target));
        let marks = Marks::of(self.mongo, self.job.name());
        for attempt in 1.. {
            let operation = format!("looking for groups of {}", self.target);
            let mut cursor = retrying(&operation, || self.mongo.crowded(self.target, grouping)).await?;
            loop {
                self.job.lease().valid().await?;
                match next_ids(&mut cursor).await {
                    Ok(ids) if ids.is_empty() => return Ok(()),
                    Ok(ids) => marks.set(&ids).await?,
                    Err(error) if attempt < TRIES && is_transient(&error) => break,
                    Err(error) => return Err(error).during(&operation),
                }
            }
        }
        Ok(())
    }

    /// Brings the documents up to date that ask for what came or went; `None` where
    /// it must be done again.
    ///
    /// # Errors
    /// A stop where one can't be.
    pub(crate) async fn bring_members(
        &self,
        catch_up: &mut Lanes,
        members: &[Member],
        after: Option<Timestamp>,
        stop: &CancellationToken,
    ) -> Result<Option<Applied>> {
        let mut applied = Applied::default();
        for (number, values) in self.values_of(members, after).await? {
            let Some(membership) = self.valid.memberships.get(number) else { continue };
            for part in values.chunks(VALUES) {
                let asking = asks_for(&membership.local, part);
                let Some(those) = self.bring_those(catch_up, &asking, after, stop).await? else {
                    return Ok(None);
                };
                applied.add(those);
            }
        }
        Ok(Some(applied))
    }

    /// The values that came or went, and those that stand there now, by membership.
    async fn values_of(
        &self,
        members: &[Member],
        after: Option<Timestamp>,
    ) -> Result<BTreeMap<usize, Vec<RawBson>>> {
        let mut distinct: BTreeMap<usize, HashMap<Vec<u8>, RawBson>> = BTreeMap::new();
        let mut to_look_up: BTreeMap<usize, Vec<RawBson>> = BTreeMap::new();
        for member in members {
            let values = distinct.entry(member.membership).or_default();
            values.extend(
                member.values.iter().map(|value| (value_bytes(value.as_raw_bson_ref()), value.clone())),
            );
            if let Some(id) = &member.look_up {
                to_look_up.entry(member.membership).or_default().push(id.clone());
            }
        }
        for (number, ids) in to_look_up {
            let Some(membership) = self.valid.memberships.get(number) else { continue };
            let namespace = Namespace {
                database: self.source.database.clone(),
                collection: membership.collection.clone(),
            };
            let filter = exact::with_ids(&ids);
            let projection = exact::encoded(&doc! {&membership.foreign: 1})?;
            let documents = retrying(format!("looking up members in {namespace}"), || async {
                let mut cursor = find(self.mongo, &namespace, &filter, &projection, after).await?;
                let mut documents = Vec::new();
                while cursor.advance().await? {
                    documents.push(cursor.current().to_owned());
                }
                Ok(documents)
            })
            .await?;
            let values = documents.iter().flat_map(|document| values_at(document, &membership.foreign));
            let known = distinct.entry(number).or_default();
            known.extend(values.map(|value| (value_bytes(value.as_raw_bson_ref()), value)));
        }
        let is_value = |value: &RawBson| !matches!(value, RawBson::Null | RawBson::Undefined);
        let values = distinct.into_iter();
        Ok(values.map(|(number, values)| (number, values.into_values().filter(is_value).collect())).collect())
    }

    /// As few as there may be of most values, there may be millions of one.
    async fn bring_those(
        &self,
        catch_up: &mut Lanes,
        asking: &RawDocumentBuf,
        after: Option<Timestamp>,
        stop: &CancellationToken,
    ) -> Result<Option<Applied>> {
        let mut applied = Applied::default();
        let operation = format!("looking up documents of {} by their members", self.source);
        for attempt in 1.. {
            let only_id = rawdoc! {"_id": 1};
            let mut cursor =
                retrying(&operation, || find(self.mongo, self.source, asking, &only_id, after)).await?;
            loop {
                self.job.lease().valid().await?;
                match next_ids(&mut cursor).await {
                    Ok(ids) if ids.is_empty() => return Ok(Some(applied)),
                    Ok(ids) if !self.may_bring(ids.len(), stop).await => return Ok(None),
                    Ok(ids) => applied.add(self.apply(catch_up, &ids, after).await?),
                    Err(error) if attempt < TRIES && is_transient(&error) => break,
                    Err(error) => return Err(error).during(&operation),
                }
            }
        }
        Ok(Some(applied))
    }

    /// Waits until so many documents may be brought up to date; false where the run
    /// is to end, or is paused: members are noted meanwhile. Anything else passes
    /// soon, and to begin anew each time might never come to an end.
    async fn may_bring(&self, documents: usize, stop: &CancellationToken) -> bool {
        while !self.pace.turn(documents as u64, stop).await {
            if stop.is_cancelled() || self.pace.held_by() == Some(Waiting::Paused) {
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
        true
    }

    fn member_notes(&self) -> Notes {
        Notes::of(self.mongo, MEMBERS, self.job.name())
    }
}

/// What a majority has, not before a moment.
async fn find(
    mongo: &Mongo,
    namespace: &Namespace,
    filter: &RawDocumentBuf,
    projection: &RawDocumentBuf,
    after: Option<Timestamp>,
) -> mongodb::error::Result<Cursor<RawDocumentBuf>> {
    let mut concern = rawdoc! {"level": "majority"};
    if let Some(after) = after {
        concern.append(bson::cstr!("afterClusterTime"), after);
    }
    let command = rawdoc! {
        "find": namespace.collection.as_str(),
        "filter": filter.clone(),
        "projection": projection.clone(),
        "readConcern": concern,
    };
    let cursor = mongo.database(&namespace.database).run_raw_cursor_command(command).await?;
    Ok(cursor.with_type())
}

async fn next_ids(cursor: &mut Cursor<RawDocumentBuf>) -> mongodb::error::Result<Vec<RawBson>> {
    let mut ids = Vec::new();
    while ids.len() < DOCUMENTS && cursor.advance().await? {
        ids.extend(exact::id_of(cursor.current()));
    }
    Ok(ids)
}

/// Members that a job has noted and not worked off, about so many where there are more.
///
/// # Errors
/// A stop where the notes can't be read.
pub async fn noted_members(mongo: &Mongo, job: &str, most: usize) -> Result<Vec<Member>> {
    let notes = Notes::of(mongo, MEMBERS, job);
    let mut members = Vec::new();
    let mut last: Option<Vec<u8>> = None;
    while members.len() <= most {
        let page = notes.page(last.as_deref(), i64::try_from(DOCUMENTS).unwrap_or(i64::MAX)).await?;
        let Some(end) = page.last() else { break };
        last = Some(end.content.clone());
        members.extend(page.iter().filter_map(|note| decode(&note.content)));
    }
    Ok(members)
}

/// A note for each value, and one for what must be looked up.
fn encode(member: &Member) -> Vec<Vec<u8>> {
    let number = i32::try_from(member.membership).unwrap_or(i32::MAX);
    let note = |name: &str, value: &RawBson| {
        let mut note = rawdoc! {"n": number};
        exact::append(&mut note, name, value.as_raw_bson_ref());
        note.into_bytes()
    };
    let values = member.values.iter().map(|value| note("value", value));
    values.chain(member.look_up.iter().map(|id| note("id", id))).collect()
}

fn decode(note: &[u8]) -> Option<Member> {
    let note = RawDocument::from_bytes(note).ok()?;
    let field = |name: &str| exact::field(note, name);
    let membership = usize::try_from(note.get_i32("n").ok()?).ok()?;
    Some(Member { membership, values: field("value").into_iter().collect(), look_up: field("id") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noted_members_are_read_as_they_were() {
        let member = Member { membership: 1, values: vec![7.into(), "x".into()], look_up: Some(3.into()) };
        let read: Vec<Member> = encode(&member).iter().filter_map(|note| decode(note)).collect();
        let one = |values: Vec<RawBson>, look_up| Member { membership: 1, values, look_up };
        assert_eq!(
            read,
            [one(vec![7.into()], None), one(vec!["x".into()], None), one(vec![], Some(3.into()))]
        );
    }
}
