//! Ranges of `_id` that tile a collection, whatever types its `_id`s have.
//!
//! Comparison operators see one BSON type only, so a range between two types,
//! or open at an end, is compared by `$expr`. Within one type plain bounds are
//! used: they are faster.

use bson::{Bson, Document, RawDocument, RawDocumentBuf, doc};
use futures_util::TryStreamExt;
use mongodb::options::Hint;

use super::Mongo;
use super::command::retrying;
use super::exact;
use super::source;
use crate::config::values::Namespace;
use crate::error::Result;

/// Random `_id`s per range: the more, the more even the ranges.
const SAMPLES_PER_RANGE: usize = 40;
/// Random `_id`s at least: of a few ranges none may be much longer than the others,
/// or everybody waits for it in the end.
const FEWEST_SAMPLES: usize = 4_000;
/// Random `_id`s at most.
const MOST_SAMPLES: usize = 8_000;

/// A half-open range of `_id`s; an absent bound is open.
#[derive(Debug, Clone, PartialEq)]
pub struct Range {
    /// The lowest `_id` of the range.
    pub lower: Option<Bson>,
    /// The lowest `_id` above the range.
    pub upper: Option<Bson>,
}

impl Range {
    /// The range of everything.
    pub fn all() -> Self {
        Self { lower: None, upper: None }
    }

    /// The condition for documents within the range.
    pub fn filter(&self) -> Document {
        match (&self.lower, &self.upper) {
            (None, None) => Document::new(),
            (Some(lower), Some(upper)) if same_bracket(lower, upper) => {
                doc! {"_id": {"$gte": lower.clone(), "$lt": upper.clone()}}
            }
            (lower, upper) => {
                let mut conditions = Vec::new();
                for (operator, bound) in [("$gte", lower), ("$lt", upper)] {
                    if let Some(bound) = bound {
                        conditions.push(doc! {operator: ["$_id", {"$literal": bound.clone()}]});
                    }
                }
                doc! {"$expr": {"$and": conditions}}
            }
        }
    }
}

/// Tiles the whole key space at the given, sorted `_id`s.
fn tile(bounds: Vec<Bson>) -> Vec<Range> {
    let lowers = std::iter::once(None).chain(bounds.iter().cloned().map(Some));
    let uppers = bounds.iter().cloned().map(Some).chain(std::iter::once(None));
    lowers.zip(uppers).map(|(lower, upper)| Range { lower, upper }).collect()
}

/// About so many parts that tile the whole key space at some of the sorted `_id`s,
/// for what is not to be slower than one look at everything: only the ends, where
/// next to nothing is, are compared by `$expr`. One part where that can't be.
pub fn parts(ids: &[Bson], parts: usize) -> Vec<Range> {
    let bounds = pick(ids, parts);
    let is_plain = bounds.windows(2).all(|pair| same_bracket(&pair[0], &pair[1]));
    if bounds.len() > 1 && is_plain { tile(bounds) } else { vec![Range::all()] }
}

/// Evenly spaced ones of sorted `_id`s, with the first and the last, each only once.
///
/// The ends are bounds too: open ranges must be compared by `$expr`, which is
/// slower, and with them next to nothing is left for those.
fn pick(ids: &[Bson], ranges: usize) -> Vec<Bson> {
    let inner = (1..ranges).filter_map(|number| ids.get(number * ids.len() / ranges));
    let mut picked: Vec<Bson> = ids.first().into_iter().chain(inner).chain(ids.last()).cloned().collect();
    picked.dedup();
    picked
}

/// Whether plain comparison between the two bounds misses nothing: one type,
/// and none whose comparison is special.
fn same_bracket(lower: &Bson, upper: &Bson) -> bool {
    let number = |value: &Bson| match value {
        Bson::Int32(_) | Bson::Int64(_) => true,
        Bson::Double(number) => !number.is_nan(),
        _ => false,
    };
    let plain = |value: &Bson| {
        matches!(value, Bson::String(_) | Bson::ObjectId(_) | Bson::Binary(_) | Bson::DateTime(_))
    };
    (number(lower) && number(upper)) || (plain(lower) && lower.element_type() == upper.element_type())
}

impl Mongo {
    /// About so many ranges of similar size that tile a collection, and one before
    /// and one after them for what is beyond its ends.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn ranges(&self, namespace: &Namespace, ranges: usize) -> Result<Vec<Range>> {
        self.ranges_with(namespace, None, ranges).await
    }

    /// The same for two collections of one database: ranges that are of similar
    /// size where both are put together.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn ranges_of_both(
        &self,
        namespace: &Namespace,
        other: &Namespace,
        ranges: usize,
    ) -> Result<Vec<Range>> {
        self.ranges_with(namespace, Some(other), ranges).await
    }

    /// Counts up to so many documents of a range, in the order of `_id`; with the
    /// `_id` of the one after them, where there is one.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn cut(
        &self,
        namespace: &Namespace,
        range: &Range,
        documents: u64,
        hint: Option<Hint>,
    ) -> Result<(u64, Option<Bson>)> {
        let most = i64::try_from(documents).unwrap_or(i64::MAX - 1);
        let pipeline = [
            doc! {"$match": range.filter()},
            doc! {"$sort": {"_id": 1}},
            doc! {"$limit": most + 1},
            doc! {"$group": {"_id": Bson::Null, "n": {"$sum": 1_i64}, "last": {"$last": "$_id"}}},
        ];
        let collection = self.collection(namespace);
        let found: Vec<RawDocumentBuf> = retrying(format!("cutting a range of {namespace}"), || {
            let mut cursor = collection.aggregate(pipeline.clone());
            if let Some(hint) = hint.clone() {
                cursor = cursor.hint(hint);
            }
            async move { cursor.await?.with_type().try_collect().await }
        })
        .await?;
        let Some(found) = found.first() else { return Ok((0, None)) };
        let count = found.get_i64("n").ok().and_then(|count| u64::try_from(count).ok()).unwrap_or(0);
        if count <= documents {
            return Ok((count, None));
        }
        match bound_in(found, "last") {
            Some(last) => Ok((documents, Some(last))),
            // It can't be a bound, so one further on is.
            None => Box::pin(self.cut(namespace, range, documents.saturating_mul(2).max(1), hint)).await,
        }
    }

    async fn ranges_with(
        &self,
        namespace: &Namespace,
        other: Option<&Namespace>,
        ranges: usize,
    ) -> Result<Vec<Range>> {
        if ranges < 2 {
            return Ok(vec![Range::all()]);
        }
        let samples = i64::try_from((ranges * SAMPLES_PER_RANGE).clamp(FEWEST_SAMPLES, MOST_SAMPLES))
            .unwrap_or(i64::MAX);
        let id_only = doc! {"$project": {"_id": 1}};
        let end = |order: i32| vec![doc! {"$sort": {"_id": order}}, doc! {"$limit": 1}, id_only.clone()];
        let draws = [vec![doc! {"$sample": {"size": samples}}, id_only.clone()], end(1), end(-1)];
        let of = |namespace: &Namespace, pipeline: &[Document]| doc! {"$unionWith": {"coll": &namespace.collection, "pipeline": pipeline}};
        let [sample, ends @ ..] = &draws;
        let mut pipeline = sample.clone();
        pipeline.extend(ends.iter().map(|end| of(namespace, end)));
        if let Some(other) = other {
            pipeline.extend(draws.iter().map(|draw| of(other, draw)));
        }
        // The server sorts, because only it knows the order of mixed types and of a collation.
        pipeline.push(doc! {"$sort": {"_id": 1}});
        let collection = self.collection(namespace);
        let sampled: Vec<RawDocumentBuf> = retrying(format!("sampling `_id`s of {namespace}"), || {
            let cursor = collection.aggregate(pipeline.clone()).allow_disk_use(true);
            async move { cursor.await?.with_type().try_collect().await }
        })
        .await?;
        let ids: Vec<Bson> = sampled.iter().filter_map(|document| bound_in(document, "_id")).collect();
        Ok(tile(pick(&ids, ranges)))
    }
}

/// A value that may be a bound; `None` for one that can't be asked for exactly: ranges tile the
/// key space whatever their bounds are.
fn bound_in(document: &RawDocument, field: &str) -> Option<Bson> {
    source::exact(&exact::field(document, field)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_tile_the_key_space() {
        let ids: Vec<Bson> = (0..100).map(Bson::Int32).collect();
        let ranges = tile(pick(&ids, 4));
        assert_eq!(ranges.len(), 6, "four, and one beyond each end");
        assert_eq!((&ranges[0].lower, &ranges[5].upper), (&None, &None));
        assert!(ranges[1..5].iter().all(|range| range.filter().contains_key("_id")));
        for pair in ranges.windows(2) {
            assert_eq!(pair[0].upper, pair[1].lower);
        }
    }

    #[test]
    fn few_or_equal_samples_make_fewer_ranges() {
        assert_eq!(tile(pick(&[], 8)), [Range::all()]);
        assert_eq!(tile(pick(&[Bson::Int32(1)], 8)).len(), 2);
        assert_eq!(tile(pick(&vec![Bson::Null; 50], 8)).len(), 2);
    }

    #[test]
    fn parts_are_compared_plainly_but_for_the_ends() {
        let ids: Vec<Bson> = (0..100).map(Bson::Int32).collect();
        let found = parts(&ids, 2);
        assert_eq!(found, tile([0, 50, 99].map(Bson::Int32).to_vec()));
        assert!(found[1..3].iter().all(|part| part.filter().contains_key("_id")));
        let mixed = [Bson::Int32(1), Bson::Int32(2), Bson::String("a".into()), Bson::String("b".into())];
        for ids in [&mixed[..], &mixed[..1], &[]] {
            assert_eq!(parts(ids, 2), [Range::all()]);
        }
    }

    #[test]
    fn plain_bounds_are_used_within_one_type_only() {
        let range = |lower: Bson, upper: Bson| Range { lower: Some(lower), upper: Some(upper) }.filter();
        assert!(range(Bson::Int32(1), Bson::Double(2.5)).contains_key("_id"));
        assert!(range(Bson::String("a".into()), Bson::String("b".into())).contains_key("_id"));
        assert!(range(Bson::Int32(1), Bson::String("b".into())).contains_key("$expr"));
        assert!(range(Bson::Double(f64::NAN), Bson::Int32(5)).contains_key("$expr"));
        assert!(range(Bson::Null, Bson::Int32(5)).contains_key("$expr"));
        assert!(Range { lower: None, upper: Some(Bson::Int32(5)) }.filter().contains_key("$expr"));
        assert!(Range::all().filter().is_empty());
    }
}
