//! Documents that the copy has only marked, because it would change them or they don't
//! fit beside their rule: brought to where they belong like documents that were touched.

use bson::{RawBson, Timestamp, doc};
use mongodb::options::Hint;

use super::follow::Follower;
use super::target::{PENDING, PENDING_INDEX};
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result};
use crate::mongo::exact;
use crate::mongo::lanes::Lanes;

/// Brings the documents that are marked in a collection up to date, so many at once, and drops
/// the index that finds them. Repeatable.
///
/// # Errors
/// A stop where the server can't be read or written.
pub async fn resolve(
    follower: &Follower<'_>,
    namespace: &Namespace,
    lanes: &mut Lanes,
    after: Option<Timestamp>,
    at_once: usize,
) -> Result<()> {
    let mongo = follower.mongo;
    // Nothing can mark one whose `_id` is null.
    follower.apply(lanes, &[RawBson::Null], after).await?;
    let has_index =
        mongo.describe(namespace).await?.is_some_and(|found| found.index(PENDING_INDEX).is_some());
    if !has_index {
        return Ok(());
    }
    let operation = format!("fetching the marked documents of {namespace}");
    let collection = mongo.collection(namespace);
    let mut marked = collection
        .find(doc! {PENDING: true})
        .projection(doc! {"_id": 1})
        .hint(Hint::Name(PENDING_INDEX.into()))
        .await
        .during(&operation)?;
    let mut ids = Vec::new();
    while marked.advance().await.during(&operation)? {
        let id = exact::id_of(marked.current());
        ids.push(id.ok_or_else(|| Error::stopped(format!("a document of {namespace} has no `_id`")))?);
        if ids.len() >= at_once {
            follower.apply(lanes, &std::mem::take(&mut ids), after).await?;
        }
    }
    follower.apply(lanes, &ids, after).await?;
    collection.drop_index(PENDING_INDEX).await.during(format!("dropping {PENDING_INDEX}"))
}
