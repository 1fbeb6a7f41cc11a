//! Random documents that can be drawn again.
//!
//! The server's own `$sample` forgets what it has drawn. Here a hash of seed and
//! `_id` gives every document a place in an order that has nothing to do with
//! what is stored: the first so many by that order are a random sample without
//! replacement, and the same ones for whoever asks again with the same seed. A
//! document that comes or goes changes nothing for the others.
//!
//! Only the `_id` index is read, and only places below a bound are kept, so that
//! neither documents nor memory for them are needed, however many there are. Its
//! price is one pass over the index, and another one only where the first few
//! were not enough. The hash takes numbers within an `_id` that is a document for
//! what they are before the point: `{a: 1.2}` and `{a: 1.7}` are drawn together,
//! each as likely as any other.

use bson::{Bson, Document, RawBson, RawDocumentBuf, doc};
use mongodb::Cursor;

use super::Mongo;
use super::command::retrying;
use super::exact;
use crate::config::values::Namespace;
use crate::error::{Context, Result};

/// The number of places.
const PLACES: f64 = 18_446_744_073_709_551_616.0;
/// The last place and one.
const END: i128 = 1 << 63;
/// Where the first few were not enough, so many times as many are looked at.
const MORE: f64 = 8.0;
/// Documents to look at beyond those that are wanted: chance may place fewer than
/// expected below a bound.
const SPARE: f64 = 50.0;

/// A document that was drawn.
#[derive(Debug, Clone)]
pub struct Drawn {
    /// Its place in the order.
    pub place: i64,
    /// Its `_id`.
    pub id: RawBson,
}

/// Draws documents of a collection, one after the other.
#[derive(Debug)]
pub struct Draw {
    mongo: Mongo,
    namespace: Namespace,
    place: Document,
    by_id: bool,
    share: f64,
    lower: i128,
    cursor: Option<Cursor<RawDocumentBuf>>,
}

impl Draw {
    /// Draws from a collection of about `documents` documents, of which about
    /// `wanted` will be asked for. `by_id` tells whether it has an index of `_id`.
    pub fn new(
        mongo: &Mongo,
        namespace: &Namespace,
        by_id: bool,
        seed: u64,
        (wanted, documents): (u64, u64),
    ) -> Self {
        Self {
            mongo: mongo.clone(),
            namespace: namespace.clone(),
            place: place(seed, &namespace.collection),
            by_id,
            share: (wanted as f64).mul_add(1.2, SPARE) / documents.max(1) as f64,
            lower: i128::from(i64::MIN),
            cursor: None,
        }
    }

    /// The next document; `None` where all were drawn.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn next(&mut self) -> Result<Option<Drawn>> {
        let operation = format!("drawing documents of {}", self.namespace);
        loop {
            let cursor = match &mut self.cursor {
                Some(cursor) => cursor,
                None if self.lower >= END => return Ok(None),
                None => {
                    let opened = self.open(&operation).await?;
                    self.cursor.insert(opened)
                }
            };
            if !cursor.advance().await.during(&operation)? {
                self.cursor = None;
                continue;
            }
            let drawn = cursor.current();
            if let (Some(id), Ok(place)) = (exact::id_of(drawn), drawn.get_i64("place")) {
                return Ok(Some(Drawn { place, id }));
            }
        }
    }

    /// What lies between the bound that was reached and the next one.
    async fn open(&mut self, operation: &str) -> Result<Cursor<RawDocumentBuf>> {
        let upper = bound(self.lower, self.share);
        let mut places = doc! {"$gte": place_of(self.lower)};
        if upper < END {
            places.insert("$lt", place_of(upper));
        }
        let pipeline = [
            // By itself, so that the index alone is read.
            doc! {"$project": {"_id": 1}},
            doc! {"$project": {"place": self.place.clone()}},
            doc! {"$match": {"place": places}},
            doc! {"$sort": {"place": 1, "_id": 1}},
        ];
        let collection = self.mongo.collection(&self.namespace);
        let cursor = retrying(operation, || {
            let mut aggregate = collection.aggregate(pipeline.clone()).allow_disk_use(true);
            if self.by_id {
                aggregate = aggregate.hint(mongodb::options::Hint::Keys(doc! {"_id": 1}));
            }
            async move { aggregate.await }
        })
        .await?;
        (self.lower, self.share) = (upper, self.share * MORE);
        Ok(cursor.with_type())
    }
}

/// The expression for the place of a document.
fn place(seed: u64, salt: &str) -> Document {
    // The server's hash cuts numbers, so 0.2 and 0.7 would share a place.
    let id = doc! {"$cond": [{"$isNumber": "$_id"}, {"$toString": "$_id"}, "$_id"]};
    let seed = Bson::Int64(i64::from_ne_bytes(seed.to_ne_bytes()));
    doc! {"$toHashedIndexKey": {"seed": seed, "in": {"$literal": salt}, "_id": id}}
}

/// The place after that share of all, counted from another one. Pure.
fn bound(lower: i128, share: f64) -> i128 {
    #[expect(clippy::cast_possible_truncation, reason = "at most the number of places")]
    let width = (share.clamp(0.0, 1.0) * PLACES) as i128;
    (lower + width.max(1)).min(END)
}

fn place_of(bound: i128) -> i64 {
    i64::try_from(bound).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_cover_all_places_without_a_gap() {
        let (mut lower, mut share, mut steps) = (i128::from(i64::MIN), 0.001, 0);
        while lower < END {
            let upper = bound(lower, share);
            assert!(upper > lower);
            (lower, share, steps) = (upper, share * MORE, steps + 1);
        }
        assert_eq!((lower, steps), (END, 5));
        assert_eq!(bound(i128::from(i64::MIN), 0.5), 0);
        assert_eq!(bound(0, f64::INFINITY), END);
    }
}
