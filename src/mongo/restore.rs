//! Reading a quarantine in order, to put its documents back byte for byte.

pub mod progress;

use bson::{RawBson, RawDocumentBuf, rawdoc};

use super::Mongo;
use super::command::retrying;
use super::exact;
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
    pub async fn batch(&self, after: Option<&RawBson>) -> Result<(Vec<RawDocumentBuf>, Option<RawBson>)> {
        // `$expr` sees all types, where `{_id: {$gt}}` sees one only.
        let filter = after.map_or_else(RawDocumentBuf::new, |after| {
            let after = exact::single("$literal", after.as_raw_bson_ref());
            rawdoc! {"$expr": {"$gt": ["$_id", after]}}
        });
        let stored = retrying(format!("reading {}", self.quarantine), || self.read(filter.clone())).await?;
        let position = stored.last().and_then(|last| exact::id_of(last));
        let mut documents = Vec::with_capacity(stored.len());
        for stored in &stored {
            documents.push(self.mongo.unwrap_quarantined(&self.quarantine, stored).await?);
        }
        Ok((documents, position))
    }

    async fn read(&self, filter: RawDocumentBuf) -> mongodb::error::Result<Vec<RawDocumentBuf>> {
        let command = rawdoc! {
            "find": self.quarantine.collection.as_str(),
            "filter": filter,
            "sort": {"_id": 1},
            "hint": {"_id": 1},
            "limit": i64::try_from(MOST_DOCUMENTS).unwrap_or(i64::MAX),
        };
        let database = self.mongo.database(&self.quarantine.database);
        let mut cursor = database.run_raw_cursor_command(command).await?.with_type::<RawDocumentBuf>();
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
