//! Who a document belongs to while two collections are written to, durable before
//! the position in the change stream that told it is.

use std::collections::HashSet;

use bson::{RawBson, RawDocumentBuf};

use crate::cleanse::follow::Direction;
use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::notes::{Note, Notes};
use crate::mongo::sink::value_bytes;

/// Up to here every whole number is a double.
const EXACT: f64 = 9_007_199_254_740_992.0;
/// Notes that are read at once.
const PAGE: i64 = 500;

/// The collections of the state database, for the clearing away.
pub const COLLECTIONS: [&str; 4] =
    ["switch_owned", "switch_conflicts", "switch_owned_back", "switch_conflicts_back"];

/// `_id`s of documents of one job, of which something is to be remembered.
#[derive(Debug, Clone)]
pub struct Ids {
    notes: Notes,
}

impl Ids {
    /// The documents that others have written to, on the side that is brought up to date.
    pub fn owned(mongo: &Mongo, job: &str, direction: Direction) -> Self {
        let collection = if direction == Direction::Forward { COLLECTIONS[0] } else { COLLECTIONS[2] };
        Self { notes: Notes::of(mongo, collection, job) }
    }

    /// The owned documents about which both sides differ.
    pub fn conflicts(mongo: &Mongo, job: &str, direction: Direction) -> Self {
        let collection = if direction == Direction::Forward { COLLECTIONS[1] } else { COLLECTIONS[3] };
        Self { notes: Notes::of(mongo, collection, job) }
    }

    /// Remembers documents.
    ///
    /// # Errors
    /// A stop where that can't be made durable.
    pub async fn add(&self, ids: &[RawBson]) -> Result<()> {
        let contents: Vec<Vec<u8>> = ids.iter().map(bytes).collect();
        self.notes.add(&contents).await
    }

    /// Those that are remembered, and the others.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn part(&self, ids: Vec<RawBson>) -> Result<(Vec<RawBson>, Vec<RawBson>)> {
        let contents: Vec<Vec<u8>> = ids.iter().flat_map(equals).collect();
        let known: HashSet<Vec<u8>> = self.notes.among(&contents).await?;
        Ok(ids.into_iter().partition(|id| equals(id).iter().any(|bytes| known.contains(bytes))))
    }

    /// Some of them, in their own order, from after the given one on.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn page(&self, after: Option<&RawBson>) -> Result<Vec<RawBson>> {
        let after = after.map(bytes);
        self.notes.page(after.as_deref(), PAGE).await?.iter().map(id_of).collect()
    }

    /// Forgets documents.
    ///
    /// # Errors
    /// A stop where they can't be forgotten.
    pub async fn forget(&self, ids: &[RawBson]) -> Result<()> {
        let contents: Vec<Vec<u8>> = ids.iter().map(bytes).collect();
        self.notes.forget(&contents).await
    }

    /// How many there are.
    ///
    /// # Errors
    /// A stop where they can't be counted.
    pub async fn count(&self) -> Result<u64> {
        self.notes.count().await
    }
}

fn bytes(id: &RawBson) -> Vec<u8> {
    value_bytes(id.as_raw_bson_ref())
}

/// The same for all that is one `_id` to the server: numbers are equal across types.
fn equals(id: &RawBson) -> Vec<Vec<u8>> {
    let whole = match id {
        RawBson::Int32(number) => Some(i64::from(*number)),
        RawBson::Int64(number) => Some(*number),
        #[expect(clippy::cast_possible_truncation, reason = "within the whole numbers that it holds exactly")]
        RawBson::Double(number) if number.fract() == 0.0 && number.abs() <= EXACT => Some(*number as i64),
        _ => None,
    };
    let Some(whole) = whole else { return vec![bytes(id)] };
    #[expect(clippy::cast_precision_loss, reason = "one that is not exact belongs to nobody")]
    let double = RawBson::Double(whole as f64);
    let small = i32::try_from(whole).ok().map(RawBson::Int32);
    let minus_zero = (whole == 0).then_some(RawBson::Double(-0.0));
    [RawBson::Int64(whole), double].iter().chain(&small).chain(&minus_zero).map(bytes).collect()
}

/// What [`bytes`] was made from.
fn id_of(note: &Note) -> Result<RawBson> {
    let document = RawDocumentBuf::from_bytes(note.content.clone()).ok();
    let id = document.as_ref().and_then(|document| document.get("").ok().flatten());
    id.map(RawBson::from).ok_or_else(|| Error::stopped("a remembered `_id` can't be read"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_numbers_are_one_id() {
        let same = |one: RawBson, other: RawBson| equals(&one).contains(&bytes(&other));
        assert!(same(5.into(), 5_i64.into()) && same(5_i64.into(), 5.0.into()) && same(5.0.into(), 5.into()));
        assert!(same(0.into(), (-0.0).into()) && same((-0.0).into(), 0.into()));
        assert!(!same(5.into(), 6.into()) && !same(5.5.into(), 5.into()) && !same("5".into(), 5.into()));
        assert!(same(i64::MAX.into(), i64::MAX.into()));
    }

    #[test]
    fn a_note_tells_its_id() {
        let id = RawBson::from("x");
        let note = RawDocumentBuf::from_bytes(bytes(&id)).expect("a document");
        assert_eq!(note.get("").expect("valid").map(RawBson::from), Some(id));
    }
}
