//! Reading a quarantine in order, to put its documents back byte for byte.

pub mod progress;

use bson::{Bson, Document, RawDocumentBuf, doc};
use mongodb::options::Hint;

use super::Mongo;
use super::command::retrying;
use super::insertion::Insertion;
use super::lane::Lane;
use super::quarantine::{self, Read};
use crate::config::values::Namespace;
use crate::error::{Error, Result};

/// Bytes of documents per batch.
const MOST_BYTES: usize = 8 * 1024 * 1024;
/// Documents per batch.
const MOST_DOCUMENTS: usize = 1000;

/// Puts a quarantine back.
#[derive(Debug)]
pub struct Restore {
    mongo: Mongo,
    quarantine: Namespace,
    /// Writes to the collection.
    pub insertion: Insertion,
}

impl Restore {
    /// Puts the documents of a quarantine into a collection.
    ///
    /// # Errors
    /// A refusal where there is no such quarantine.
    pub async fn new(lane: Lane, quarantine: &Namespace, into: &Namespace) -> Result<Self> {
        let mongo = lane.mongo().clone();
        if mongo.describe(quarantine).await?.is_none() {
            return Err(Error::refused(format!("there is no quarantine {quarantine} to put back")));
        }
        let insertion = Insertion::new(lane, into);
        Ok(Self { mongo, quarantine: quarantine.clone(), insertion })
    }

    /// The next documents in the order of `_id`, as they were, and the last `_id`;
    /// none where there are no more.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn batch(&self, after: Option<&Bson>) -> Result<(Vec<RawDocumentBuf>, Option<Bson>)> {
        // `$expr` sees all types, where `{_id: {$gt}}` sees one only.
        let filter = after.map_or_else(Document::new, |after| {
            doc! {"$expr": {"$gt": ["$_id", {"$literal": after.clone()}]}}
        });
        let stored = retrying(format!("reading {}", self.quarantine), || self.read(filter.clone())).await?;
        let position = match stored.last().and_then(|last| last.get("_id").ok().flatten()) {
            Some(id) => Some(super::source::to_bson(&id.into())?),
            None => None,
        };
        let mut documents = Vec::with_capacity(stored.len());
        for stored in &stored {
            documents.push(self.mongo.unwrap_quarantined(&self.quarantine, stored).await?);
        }
        Ok((documents, position))
    }

    async fn read(&self, filter: Document) -> mongodb::error::Result<Vec<RawDocumentBuf>> {
        let collection = self.mongo.collection(&self.quarantine);
        let limit = i64::try_from(MOST_DOCUMENTS).unwrap_or(i64::MAX);
        let find = collection.find(filter).sort(doc! {"_id": 1}).limit(limit);
        let mut cursor = find.hint(Hint::Keys(doc! {"_id": 1})).await?;
        let (mut stored, mut bytes) = (Vec::new(), 0);
        while bytes < MOST_BYTES && cursor.advance().await? {
            let document = cursor.current();
            // One in parts is as large as a batch by itself.
            let is_whole = matches!(quarantine::read(document), Ok(Read::Whole(_)));
            bytes += if is_whole { document.as_bytes().len() } else { MOST_BYTES };
            stored.push(document.to_owned());
        }
        Ok(stored)
    }
}
