//! Who a document belongs to while two collections are written to, durable before
//! the position in the change stream that told it is.

use std::collections::HashSet;

use bson::{RawBson, RawDocumentBuf};

use crate::cleanse::follow::Direction;
use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::notes::{Note, Notes};
use crate::mongo::same_id::key_of_id;
use crate::mongo::sink::value_bytes;

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
        let notes: Vec<_> = ids.iter().map(|id| (key_of_id(id), value_bytes(id.as_raw_bson_ref()))).collect();
        self.notes.add_made_from(&notes).await
    }

    /// Those that are remembered, and the others: by what is one `_id` to the server.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn part(&self, ids: Vec<RawBson>) -> Result<(Vec<RawBson>, Vec<RawBson>)> {
        let keys: Vec<Vec<u8>> = ids.iter().map(key_of_id).collect();
        let known: HashSet<Vec<u8>> = self.notes.among(&keys).await?;
        Ok(ids.into_iter().partition(|id| known.contains(&key_of_id(id))))
    }

    /// Some of them, in their own order, from after the given one on.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn page(&self, after: Option<&RawBson>) -> Result<Vec<RawBson>> {
        let after = after.map(key_of_id);
        self.notes.page(after.as_deref(), PAGE).await?.iter().map(id_of).collect()
    }

    /// Forgets documents.
    ///
    /// # Errors
    /// A stop where they can't be forgotten.
    pub async fn forget(&self, ids: &[RawBson]) -> Result<()> {
        let keys: Vec<Vec<u8>> = ids.iter().map(key_of_id).collect();
        self.notes.forget(&keys).await
    }

    /// How many there are.
    ///
    /// # Errors
    /// A stop where they can't be counted.
    pub async fn count(&self) -> Result<u64> {
        self.notes.count().await
    }
}

/// The `_id` that a note was made from.
fn id_of(note: &Note) -> Result<RawBson> {
    let document = note.original.clone().and_then(|bytes| RawDocumentBuf::from_bytes(bytes).ok());
    let id = document.as_ref().and_then(|document| document.get("").ok().flatten());
    id.map(RawBson::from).ok_or_else(|| Error::stopped("a remembered `_id` can't be read"))
}
