//! Reading documents in bulk, as the bytes that are stored.
//!
//! A reply of the server is walked where it lies: nothing is copied or decoded
//! per document.

use bson::{Document, RawBson, RawDocument, RawDocumentBuf, rawdoc};
use futures_util::StreamExt;
use mongodb::Cursor;
use mongodb::error::Error as DriverError;
use mongodb::options::{Hint, ReadConcern};
use tokio_util::sync::CancellationToken;

use super::valid::Valid;
use super::{Mongo, exact};
use crate::config::values::Namespace;

/// Documents whose groups are looked at together.
const MOST_JUDGED: usize = 1_000;

/// What to read.
#[derive(Debug, Clone)]
pub struct Scan {
    /// The collection.
    pub namespace: Namespace,
    /// Which documents.
    pub filter: Document,
    /// Of these, which: a condition of it belongs into the filter.
    pub valid: Valid,
    /// Whether to follow the `_id` index, whatever else the filter asks for.
    pub by_id: bool,
    /// Documents per reply.
    pub batch: u32,
}

impl Mongo {
    /// Hands over every document that a majority has, reply after reply, until
    /// `each` is false; whether it was read to its end. Once `stop` is
    /// cancelled no further reply is asked for.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide: what was handed over until
    /// then comes again where this is repeated.
    pub async fn scan(
        &self,
        scan: &Scan,
        stop: &CancellationToken,
        mut each: impl FnMut(&[&RawDocument]) -> bool,
    ) -> mongodb::error::Result<bool> {
        let collection = self.collection(&scan.namespace);
        if !scan.valid.is_condition() {
            return self.scan_valid(scan, stop, each).await;
        }
        let mut find =
            collection.find(scan.filter.clone()).batch_size(scan.batch).read_concern(ReadConcern::majority());
        if scan.by_id {
            find = find.hint(Hint::Keys(bson::doc! {"_id": 1}));
        }
        let mut cursor = find.batch().await?;
        while !stop.is_cancelled() {
            let Some(reply) = cursor.next().await else { return Ok(true) };
            let reply = reply?;
            let documents: Vec<&RawDocument> = reply
                .doc_slices()?
                .into_iter()
                .map(|document| document.map(|document| document.as_document()))
                .collect::<Result<Option<_>, _>>()?
                .ok_or_else(|| mongodb::error::Error::custom("a reply that holds no documents"))?;
            if !each(&documents) {
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// The same for the documents with these `_id`s among them, whatever their bytes, and others
    /// that the server takes for equal.
    ///
    /// # Errors
    /// As [`Mongo::scan`].
    pub async fn scan_ids(
        &self,
        scan: &Scan,
        ids: &[RawBson],
        stop: &CancellationToken,
        each: impl FnMut(&[&RawDocument]) -> bool,
    ) -> mongodb::error::Result<bool> {
        let name = scan.namespace.collection.as_str();
        let rest = exact::encoded(&scan.filter).map_err(DriverError::custom)?;
        let filter = rawdoc! {"$and": [exact::with_ids(ids), rest]};
        let concern = rawdoc! {"level": "majority"};
        let command = if scan.valid.is_condition() {
            let batch = i64::from(scan.batch);
            rawdoc! {"find": name, "filter": filter, "batchSize": batch, "readConcern": concern}
        } else {
            let pipeline = exact::pipeline(filter, &scan.valid.stages()).map_err(DriverError::custom)?;
            rawdoc! {"aggregate": name, "pipeline": pipeline, "cursor": {}, "readConcern": concern}
        };
        let cursor = self.database(&scan.namespace.database).run_raw_cursor_command(command).await?;
        self.judge(scan, cursor.with_type(), stop, each).await
    }

    /// The same where the rules look at other documents: reply after reply is
    /// asked for its winners.
    async fn scan_valid(
        &self,
        scan: &Scan,
        stop: &CancellationToken,
        each: impl FnMut(&[&RawDocument]) -> bool,
    ) -> mongodb::error::Result<bool> {
        let collection = self.collection(&scan.namespace);
        let mut aggregate = collection
            .aggregate(scan.valid.candidates(scan.filter.clone()))
            .batch_size(scan.batch)
            .allow_disk_use(true)
            .read_concern(ReadConcern::majority());
        if scan.by_id {
            aggregate = aggregate.hint(Hint::Keys(bson::doc! {"_id": 1}));
        }
        let cursor = aggregate.await?.with_type();
        self.judge(scan, cursor, stop, each).await
    }

    async fn judge(
        &self,
        scan: &Scan,
        mut cursor: Cursor<RawDocumentBuf>,
        stop: &CancellationToken,
        mut each: impl FnMut(&[&RawDocument]) -> bool,
    ) -> mongodb::error::Result<bool> {
        let batch = usize::try_from(scan.batch).unwrap_or(1).min(MOST_JUDGED);
        let mut documents = Vec::new();
        while !stop.is_cancelled() {
            let goes_on = cursor.advance().await?;
            if goes_on {
                documents.push(cursor.current().to_owned());
            }
            if documents.len() >= batch || !goes_on {
                let found: Vec<&RawDocument> = documents.iter().map(AsRef::as_ref).collect();
                let are_valid = self.are_valid(&scan.namespace, &scan.valid, &found).await?;
                let valid: Vec<&RawDocument> = found
                    .iter()
                    .zip(are_valid)
                    .filter(|(_, is_valid)| *is_valid)
                    .map(|(document, _)| *document)
                    .collect();
                if !each(&valid) {
                    return Ok(false);
                }
                documents.clear();
            }
            if !goes_on {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
