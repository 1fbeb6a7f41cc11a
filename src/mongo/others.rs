//! What others have written to a collection since a moment, whatever its name was meanwhile.

use std::time::Duration;

use bson::{Bson, Document, RawBson, RawDocumentBuf, Timestamp, doc};
use mongodb::change_stream::ChangeStream;
use mongodb::options::ReadConcern;

use super::Mongo;
use super::feed::{Position, after, nudge};
use crate::error::Result;

/// How long the server waits for a change before it answers that there is none.
const ANSWER: Duration = Duration::from_millis(50);
/// Deletes that are told one by one.
const MOST_DELETED: usize = 1_000;

/// What others have done to a collection.
#[derive(Debug, Clone, PartialEq)]
pub enum ByOthers {
    /// Nothing but removed these documents, as the server itself does by a TTL index.
    Removed(Vec<RawBson>),
    /// They have written documents, or removed very many.
    Written,
    /// The server can't tell: its oplog does not reach back that far, or it refuses to.
    Unknown,
}

impl Mongo {
    /// What was done to the collection with this identity in a database since a moment,
    /// but for what transactions of these sessions did.
    ///
    /// # Errors
    /// A stop where the server does not answer.
    pub async fn by_others(
        &self,
        database: &str,
        collection: &Bson,
        ours: &[Document],
        since: Timestamp,
    ) -> Result<ByOthers> {
        let beyond = after(self.last_write_time().await?);
        nudge(self).await?;
        let Ok(mut changes) = self.open_by_others(database, collection, ours, since).await else {
            return Ok(ByOthers::Unknown);
        };
        let mut removed = Vec::new();
        loop {
            match changes.next_if_any().await {
                Ok(Some(event)) => match deleted(&event) {
                    Some(id) if removed.len() < MOST_DELETED => removed.push(id),
                    _ => return Ok(ByOthers::Written),
                },
                Ok(None) if has_reached(&changes, beyond) => return Ok(ByOthers::Removed(removed)),
                Ok(None) if !changes.is_alive() => return Ok(ByOthers::Unknown),
                Ok(None) => {}
                Err(_) => return Ok(ByOthers::Unknown),
            }
        }
    }

    async fn open_by_others(
        &self,
        database: &str,
        collection: &Bson,
        ours: &[Document],
        since: Timestamp,
    ) -> mongodb::error::Result<ChangeStream<RawDocumentBuf>> {
        let ours: Vec<&Bson> = ours.iter().filter_map(|session| session.get("id")).collect();
        let wanted = doc! {
            "operationType": {"$in": ["insert", "update", "replace", "delete"]},
            "collectionUUID": collection.clone(),
            "lsid.id": {"$nin": ours},
        };
        let fields = doc! {"operationType": 1, "documentKey._id": 1};
        let database = self.database(database);
        let watch = database.watch().pipeline([doc! {"$match": wanted}, doc! {"$project": fields}]);
        let watch = watch
            .show_expanded_events(true)
            .read_concern(ReadConcern::majority())
            .max_await_time(ANSWER)
            .start_at_operation_time(since);
        Ok(watch.await?.with_type())
    }
}

fn deleted(event: &RawDocumentBuf) -> Option<RawBson> {
    let id = event.get_document("documentKey").ok()?.get("_id").ok()??;
    event.get_str("operationType").is_ok_and(|kind| kind == "delete").then(|| id.into())
}

fn has_reached(changes: &ChangeStream<RawDocumentBuf>, moment: Timestamp) -> bool {
    let token = changes.resume_token().and_then(|token| bson::serialize_to_bson(&token).ok());
    token.is_some_and(|token| Position::Token(token).has_reached(moment))
}
