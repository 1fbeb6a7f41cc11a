//! What both sides tell differently about a document that belongs to one of them.

use bson::{Bson, Document, RawBson};

use super::sync::Sync;
use crate::cleanse::follow::Follower;
use crate::error::Result;
use crate::mongo::same_id::{by_key, key_of_id};
use crate::mongo::source::to_bson;

impl Sync<'_> {
    /// Notes which of these owned documents the followed side tells differently.
    ///
    /// # Errors
    /// A stop where one of the sides can't be read.
    pub(super) async fn contest(&mut self, ids: &[RawBson]) -> Result<()> {
        let differing = self.differing(ids).await?;
        if !differing.is_empty() {
            self.conflicts.add(&differing).await?;
        }
        Ok(())
    }

    /// Those of the documents that are not the same on both sides.
    async fn differing(&mut self, ids: &[RawBson]) -> Result<Vec<RawBson>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let now = self.follower.mongo.last_write_time().await?;
        let followed = by_key(self.reader.read(ids, Some(now)).await?);
        let Follower { mongo, target, .. } = self.follower;
        let other = mongo.by_ids(target, ids, &Document::new(), Some(now), |found| found.to_owned()).await?;
        let other = by_key(other);
        let differs = |id: &&RawBson| {
            let key = key_of_id(id);
            followed.get(&key).map(|document| document.as_bytes())
                != other.get(&key).map(|document| document.as_bytes())
        };
        Ok(ids.iter().filter(differs).cloned().collect())
    }

    /// Tries again what others stood in the way of, and forgets the conflicts that
    /// are none any more.
    ///
    /// # Errors
    /// A stop where one of the sides can't be read or written.
    pub async fn settle_conflicts(&mut self) -> Result<()> {
        let mut last: Option<RawBson> = None;
        loop {
            let page = self.conflicts.page(last.as_ref()).await?;
            let Some(end) = page.last().cloned() else { return Ok(()) };
            let (_, free) = self.owned.part(page.clone()).await?;
            for id in &free {
                self.bring(std::slice::from_ref(id), None).await?;
            }
            let differing = self.differing(&page).await?;
            let settled: Vec<RawBson> = page.into_iter().filter(|id| !differing.contains(id)).collect();
            self.conflicts.forget(&settled).await?;
            last = Some(end);
        }
    }

    /// The first conflicts, and how many there are.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn first_conflicts(&self) -> Result<(Vec<Bson>, u64)> {
        let first = self.conflicts.page(None).await?;
        let ids = first.iter().take(100).map(to_bson).collect::<Result<Vec<Bson>>>()?;
        Ok((ids, self.conflicts.count().await?))
    }
}
