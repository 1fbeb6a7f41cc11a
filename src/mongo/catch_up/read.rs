//! Reading documents of the source again, no more at once than memory holds.

use std::collections::HashSet;

use bson::{RawBson, RawDocumentBuf, Timestamp, rawdoc};

use super::CatchUp;
use crate::error::Result;
use crate::mongo::command::retrying;
use crate::mongo::exact;
use crate::mongo::identified::{Read, not_before};
use crate::mongo::sink::{id_bytes, value_bytes};
use crate::mongo::valid::Valid;

impl CatchUp {
    /// The valid ones among these documents, as a majority has them now or later, at
    /// least as of `after`.
    ///
    /// # Errors
    /// A stop where the source can't be read.
    pub async fn read(&self, ids: &[RawBson], after: Option<Timestamp>) -> Result<Vec<RawDocumentBuf>> {
        self.read_where(ids, &self.valid, after).await
    }

    /// The same, but no more documents once there are so many bytes of them.
    ///
    /// # Errors
    /// A stop where the source can't be read.
    pub async fn read_within(&self, bytes: usize, ids: &[RawBson], after: Option<Timestamp>) -> Result<Read> {
        self.read_where_within(bytes, ids, &self.valid, after).await
    }

    /// The ones among these documents that are valid by that, as a majority has them.
    pub(super) async fn read_where(
        &self,
        ids: &[RawBson],
        valid: &Valid,
        after: Option<Timestamp>,
    ) -> Result<Vec<RawDocumentBuf>> {
        Ok(self.read_where_within(usize::MAX, ids, valid, after).await?.documents)
    }

    async fn read_where_within(
        &self,
        bytes: usize,
        ids: &[RawBson],
        valid: &Valid,
        after: Option<Timestamp>,
    ) -> Result<Read> {
        let all_at_once = i64::try_from(ids.len() + 1).unwrap_or(i64::MAX);
        let by_id = exact::with_ids(ids);
        let collection = self.source.collection.as_str();
        let command = if valid.is_condition() {
            let condition = rawdoc! {"$and": [by_id, exact::encoded(&valid.condition)?]};
            rawdoc! {"find": collection, "filter": condition, "batchSize": all_at_once}
        } else {
            let pipeline = exact::pipeline(by_id, &valid.stages())?;
            rawdoc! {"aggregate": collection, "pipeline": pipeline, "cursor": {}}
        };
        let identity = self.identities.source.as_ref();
        retrying(format!("re-reading documents of {}", self.source), || {
            self.mongo.documents_within(bytes, &self.source, command.clone(), not_before(after), identity)
        })
        .await
    }
}

/// The `_id`s of which it is known what has become; where not all were read, the
/// others are open still.
pub(super) fn part_read(ids: Vec<RawBson>, read: &Read, open: &mut Vec<RawBson>) -> Vec<RawBson> {
    if read.is_all {
        return ids;
    }
    let seen: HashSet<Vec<u8>> = read.documents.iter().filter_map(|document| id_bytes(document)).collect();
    let (known, unread) = ids.into_iter().partition(|id| seen.contains(&value_bytes(id.as_raw_bson_ref())));
    open.extend::<Vec<RawBson>>(unread);
    known
}
