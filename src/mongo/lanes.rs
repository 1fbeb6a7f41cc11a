//! Several catch-ups side by side, each with the documents whose `_id`s fall to
//! it: an `_id` is in one batch at a time, so that its states are written in the
//! order in which they were read.

use std::hash::{DefaultHasher, Hash, Hasher};

use bson::{Document, RawBson, RawBsonRef, RawDocument, Timestamp};
use futures_util::future::join_all;

use super::catch_up::quarantine::Quarantine;
use super::catch_up::{Applied, Attempt, CatchUp};
use super::element::{self, Nested};
use super::exact;
use super::identified::Identities;
use super::lane::Lane;
use super::sink::value_bytes;
use super::valid::Valid;
use crate::config::values::Namespace;
use crate::error::Result;

/// Stands for any text where texts may be equal that look different.
const TEXT: u8 = 2;

/// Catch-ups of one source and one target.
#[derive(Debug)]
pub struct Lanes {
    lanes: Vec<CatchUp>,
    has_collation: bool,
}

impl Lanes {
    /// How many lanes are of use, where there may be so many. Where a document decides
    /// about others it is one: a look at a group takes in whatever `_id`s are in it.
    pub fn count(valid: &Valid, most: usize) -> usize {
        if valid.grouping.is_some() { 1 } else { most.max(1) }
    }

    /// Catches up by these lanes; with a collation texts may be equal that look different.
    /// `owner` is whose notes are kept.
    pub fn new(
        lanes: Vec<Lane>,
        source: &Namespace,
        target: &Namespace,
        valid: &Valid,
        has_collation: bool,
        owner: &str,
    ) -> Self {
        let catch_up = |lane| CatchUp::new(lane, source, target, valid.clone(), owner);
        Self { lanes: lanes.into_iter().map(catch_up).collect(), has_collation }
    }

    /// Keeps this quarantine in step as well.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn with_quarantine(self, quarantine: &Quarantine) -> Result<Self> {
        let mut lanes = Vec::new();
        for lane in self.lanes {
            lanes.push(lane.with_quarantine(quarantine.clone()).await?);
        }
        Ok(Self { lanes, has_collation: self.has_collation })
    }

    /// Lets every read and write fail where a name is borne by another collection.
    #[must_use]
    pub fn only_between(self, identities: &Identities) -> Self {
        let lanes = self.lanes.into_iter().map(|lane| lane.only_between(identities.clone())).collect();
        Self { lanes, ..self }
    }

    /// The target, by the name that it has now.
    pub fn target(&self) -> Option<&Namespace> {
        self.lanes.first().map(CatchUp::target)
    }

    /// Goes on writing to the target, which has another name by now.
    pub fn retarget(&mut self, name: &Namespace) {
        self.lanes.iter_mut().for_each(|lane| lane.retarget(name));
    }

    /// Brings these documents up to the state that they have now or later, at
    /// least that of `after`.
    ///
    /// # Errors
    /// A stop where a document can't be written for good.
    pub async fn apply(&mut self, ids: &[RawBson], after: Option<Timestamp>) -> Result<Attempt> {
        let parts = self.divide(ids);
        let work = self.lanes.iter_mut().zip(&parts);
        // With groups there may be something to do although nothing was touched.
        let work = work
            .filter(|(lane, part)| lane.has_groups() || !part.is_empty())
            .map(|(lane, part)| lane.apply(part, after));
        let mut all = Attempt::default();
        // Every lane is awaited, whatever became of the others.
        for attempt in join_all(work).await {
            all.add(attempt?);
        }
        Ok(all)
    }

    /// Removes the copies of documents that stand in each other's way and looks at
    /// them and their groups anew.
    ///
    /// # Errors
    /// A stop where a document can't be written for good.
    pub async fn write_again(&mut self, ids: &[RawBson], after: Option<Timestamp>) -> Result<Applied> {
        match self.lanes.first_mut() {
            Some(lane) => lane.write_again(ids, after).await,
            None => Ok(Applied::default()),
        }
    }

    /// Removes documents from the target.
    ///
    /// # Errors
    /// A stop where the server refuses.
    pub async fn remove(&mut self, ids: &[RawBson]) -> Result<()> {
        let parts = self.divide(ids);
        let work = self.lanes.iter_mut().zip(&parts).map(|(lane, part)| lane.remove(part));
        join_all(work).await.into_iter().collect()
    }

    /// The documents of the target that hold these values of a unique index.
    ///
    /// # Errors
    /// A stop where the target can't be read.
    pub async fn holders(&self, values: &Document) -> Result<Vec<RawBson>> {
        match self.lanes.first() {
            Some(lane) => lane.holders(values).await,
            None => Ok(Vec::new()),
        }
    }

    fn divide(&self, ids: &[RawBson]) -> Vec<Vec<RawBson>> {
        let mut parts = vec![Vec::new(); self.lanes.len()];
        for id in ids {
            let lane = place(id.as_raw_bson_ref(), self.has_collation, parts.len());
            if let Some(part) = parts.get_mut(lane) {
                part.push(id.clone());
            }
        }
        parts
    }
}

/// The lane of an `_id`: the same one for all that the server takes for equal. Pure.
fn place(id: RawBsonRef<'_>, has_collation: bool, lanes: usize) -> usize {
    let mut hasher = DefaultHasher::new();
    hash(id, has_collation, &mut hasher);
    let lanes = u64::try_from(lanes.max(1)).unwrap_or(1);
    usize::try_from(hasher.finish() % lanes).unwrap_or(0)
}

/// Numbers are equal across their types, and so are documents that hold them.
fn hash(value: RawBsonRef<'_>, has_collation: bool, hasher: &mut impl Hasher) {
    if let Some(number) = as_number(value) {
        // The sign of zero and the bits of what is no number mean nothing.
        let bits = if number == 0.0 { 0 } else { number.to_bits() };
        let bits = if number.is_nan() { 1 } else { bits };
        return bits.hash(hasher);
    }
    match value {
        RawBsonRef::String(_) | RawBsonRef::Symbol(_) if has_collation => TEXT.hash(hasher),
        RawBsonRef::String(text) | RawBsonRef::Symbol(text) => text.hash(hasher),
        // A text that is not UTF-8, which may be equal to others too.
        _ if exact::is_carried(value) => TEXT.hash(hasher),
        RawBsonRef::Document(document) => hash_fields(document, has_collation, hasher),
        RawBsonRef::Array(array) => {
            if let Ok(items) = RawDocument::from_bytes(array.as_bytes()) {
                hash_fields(items, has_collation, hasher);
            }
        }
        other => value_bytes(other).hash(hasher),
    }
}

fn hash_fields(document: &RawDocument, has_collation: bool, hasher: &mut impl Hasher) {
    for element in element::elements(document) {
        element.name.hash(hasher);
        if let Some(Nested::Document(inner) | Nested::Array(inner)) = element.nested() {
            hash_fields(inner, has_collation, hasher);
            continue;
        }
        match element::readable(&element.alone()) {
            Some(value) => hash(value, has_collation, hasher),
            None => TEXT.hash(hasher),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "two that become equal share a lane, no more")]
fn as_number(value: RawBsonRef<'_>) -> Option<f64> {
    match value {
        RawBsonRef::Double(number) => Some(number),
        RawBsonRef::Int32(number) => Some(number.into()),
        RawBsonRef::Int64(number) => Some(number as f64),
        RawBsonRef::Decimal128(number) => Some(number.to_string().parse().unwrap_or(f64::NAN)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::{Bson, doc};

    fn lane(id: impl Into<Bson>, has_collation: bool) -> usize {
        let id = RawBson::try_from(id.into()).unwrap();
        place(id.as_raw_bson_ref(), has_collation, 1_000_000)
    }

    #[test]
    fn what_the_server_takes_for_equal_shares_a_lane() {
        let decimal = |text: &str| Bson::Decimal128(text.parse().unwrap());
        for same in [Bson::Int32(7), Bson::Int64(7), Bson::Double(7.0), decimal("7.00"), decimal("70E-1")] {
            assert_eq!(lane(same.clone(), false), lane(7, false), "{same}");
            assert_eq!(lane(doc! {"a": [same.clone()]}, false), lane(doc! {"a": [7]}, false), "{same}");
        }
        assert_eq!(lane(-0.0, false), lane(0, false));
        assert_eq!(lane(Bson::Symbol("a".into()), false), lane("a", false));
        assert_eq!(lane("a", true), lane("Ä", true));
        assert_eq!(lane(doc! {"a": ["a"]}, true), lane(doc! {"a": ["Ä"]}, true));
        assert_ne!(lane("a", false), lane("A", false));
        assert_ne!(lane(7, false), lane(8, false));
        assert_ne!(lane(doc! {"a": 1}, false), lane(doc! {"b": 1}, false));
    }

    #[test]
    fn ids_spread_over_the_lanes() {
        let mut counts = [0; 4];
        for number in 0..4_000 {
            let id = RawBson::Int32(number);
            counts[place(id.as_raw_bson_ref(), false, 4)] += 1;
        }
        assert!(counts.iter().all(|count| (800..1_200).contains(count)), "{counts:?}");
    }
}
