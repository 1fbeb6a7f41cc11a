//! The ranges of a full comparison as they are stored: what was read of each,
//! and whether it is done.
//!
//! A range is done when both sides were seen to be equal. Any other is compared
//! again by the run that follows, for what was different may have changed.

use bson::{Bson, DateTime, Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;
use mongodb::options::{Acknowledgment, WriteConcern};

use super::matching::Tally;
use crate::error::Result;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::index::{stored_count, whole_number};
use crate::mongo::range::Range;

/// The collection of ranges in the state database.
const COLLECTION: &str = "verify_ranges";
/// Ranges that are stored at once.
const BATCH: usize = 1_000;

/// A range and what is known about it.
#[derive(Debug, Clone)]
pub struct StoredRange {
    /// Its number, in the order of `_id`.
    pub number: i32,
    /// Its bounds.
    pub range: Range,
    /// Whether both sides were seen to be equal.
    pub is_done: bool,
    /// What was found.
    pub figures: Figures,
    /// When that was stored.
    pub at: Option<DateTime>,
}

/// What was found in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Figures {
    /// Read of the source.
    pub source: Tally,
    /// Read of the target.
    pub target: Tally,
    /// Documents that were read again because they differed at first.
    pub rechecked: u64,
    /// Documents that the target lacks.
    pub missing: u64,
    /// Documents that only the target has.
    pub extra: u64,
    /// Documents that are on both sides and differ.
    pub different: u64,
}

impl Figures {
    /// Adds those of another range.
    pub fn add(&mut self, other: &Self) {
        self.source.add(&other.source);
        self.target.add(&other.target);
        self.rechecked += other.rechecked;
        self.missing += other.missing;
        self.extra += other.extra;
        self.different += other.different;
    }

    /// All that is not as it should be.
    pub fn mismatches(&self) -> u64 {
        self.missing + self.extra + self.different
    }
}

/// The stored ranges of one comparison.
#[derive(Debug, Clone)]
pub struct Ranges {
    collection: Collection<Document>,
    job: String,
    /// Which tiling: a process that was replaced can't store into that of its
    /// successor.
    layout: i64,
}

impl Ranges {
    /// The ranges of that layout.
    pub fn of(mongo: &Mongo, job: &str, layout: i64) -> Self {
        Self { collection: mongo.state(COLLECTION), job: job.into(), layout }
    }

    /// Stores the ranges of a new comparison; those of earlier ones go.
    ///
    /// # Errors
    /// A stop where they can't be stored.
    pub async fn create(&self, ranges: &[Range]) -> Result<()> {
        let all = doc! {"_id.job": &self.job};
        retrying(format!("forgetting the ranges of {}", self.job), || {
            let delete = self.collection.delete_many(all.clone()).write_concern(acknowledged());
            async move { delete.await }
        })
        .await?;
        let numbered: Vec<Document> =
            (0..).zip(ranges).map(|(number, range)| self.encoded(number, range)).collect();
        for batch in numbered.chunks(BATCH) {
            self.insert(batch).await?;
        }
        Ok(())
    }

    fn encoded(&self, number: i32, range: &Range) -> Document {
        let mut document = doc! {"_id": self.id(number), "v": 1, "state": "pending"};
        // An absent bound is open; a bound may itself be null.
        for (name, bound) in [("lower", &range.lower), ("upper", &range.upper)] {
            if let Some(bound) = bound {
                document.insert(name, bound.clone());
            }
        }
        document
    }

    /// Sent again, it replaces what was stored the first time.
    async fn insert(&self, batch: &[Document]) -> Result<()> {
        let ids: Vec<Bson> = batch.iter().filter_map(|document| document.get("_id").cloned()).collect();
        let known = doc! {"_id": {"$in": ids}};
        let mut is_first = true;
        retrying(format!("storing the ranges of {}", self.job), || {
            let delete = (!std::mem::take(&mut is_first)).then(|| self.collection.delete_many(known.clone()));
            // On a majority: ranges that a failover took back would never be compared.
            let insert = self.collection.insert_many(batch);
            async move {
                if let Some(delete) = delete {
                    delete.await?;
                }
                insert.await
            }
        })
        .await
        .map(|_| ())
    }

    /// All ranges in their order.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn load(&self) -> Result<Vec<StoredRange>> {
        let filter = doc! {"_id.job": &self.job, "_id.layout": self.layout};
        let documents: Vec<Document> = retrying(format!("reading the ranges of {}", self.job), || {
            let find = self.collection.find(filter.clone()).sort(doc! {"_id.number": 1});
            async move { find.await?.try_collect().await }
        })
        .await?;
        Ok(documents.into_iter().map(read).collect())
    }

    /// Whether all ranges of this layout are there.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn is_whole(&self) -> Result<bool> {
        let tiles: Vec<Range> = self.load().await?.into_iter().map(|stored| stored.range).collect();
        Ok(is_tiling(&tiles))
    }

    /// The bounds of the last comparison, where they are known as a whole: who
    /// compares again by the same ones can compare range by range.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn former(mongo: &Mongo, job: &str) -> Result<Option<Vec<Range>>> {
        let collection: Collection<Document> = mongo.state(COLLECTION);
        let filter = doc! {"_id.job": job};
        let documents: Vec<Document> = retrying(format!("reading the ranges of {job}"), || {
            let find = collection.find(filter.clone()).sort(doc! {"_id.number": 1});
            async move { find.await?.try_collect().await }
        })
        .await?;
        let tiles: Vec<Range> = documents.into_iter().map(|document| read(document).range).collect();
        Ok(is_tiling(&tiles).then_some(tiles))
    }

    /// Stores what was found in a range.
    ///
    /// # Errors
    /// A stop where it can't be stored.
    pub async fn set(&self, number: i32, figures: &Figures, is_done: bool) -> Result<()> {
        let update = doc! {"$set": {
            "state": if is_done { "equal" } else { "differs" },
            "source": stored(&figures.source),
            "target": stored(&figures.target),
            "rechecked": stored_count(figures.rechecked),
            "missing": stored_count(figures.missing),
            "extra": stored_count(figures.extra),
            "different": stored_count(figures.different),
            "at": DateTime::now(),
        }};
        let filter = doc! {"_id": self.id(number)};
        retrying(format!("storing a range of {}", self.job), || {
            let update =
                self.collection.update_one(filter.clone(), update.clone()).write_concern(acknowledged());
            async move { update.await }
        })
        .await
        .map(|_| ())
    }

    fn id(&self, number: i32) -> Document {
        doc! {"job": &self.job, "layout": self.layout, "number": number}
    }
}

/// Whether ranges lie side by side from one end to the other. Pure.
fn is_tiling(ranges: &[Range]) -> bool {
    let ends = ranges.first().zip(ranges.last());
    let is_open = ends.is_some_and(|(first, last)| first.lower.is_none() && last.upper.is_none());
    is_open && ranges.windows(2).all(|pair| pair[0].upper.is_some() && pair[0].upper == pair[1].lower)
}

/// Not on a majority: of what is only compared again, or forgotten again, when a
/// failover takes it back.
fn acknowledged() -> WriteConcern {
    WriteConcern::builder().w(Acknowledgment::Nodes(1)).build()
}

fn stored(tally: &Tally) -> Document {
    doc! {
        "documents": stored_count(tally.documents),
        "bytes": stored_count(tally.bytes),
        "digest": format!("{:032x}", tally.digest),
    }
}

fn read(mut document: Document) -> StoredRange {
    let number = document.get_document("_id").and_then(|id| id.get_i32("number")).unwrap_or(0);
    let count = |document: &Document, name: &str| document.get(name).and_then(whole_number).unwrap_or(0);
    let tally = |side: &str| {
        let empty = Document::new();
        let side = document.get_document(side).unwrap_or(&empty);
        let digest = side.get_str("digest").ok().and_then(|digest| u128::from_str_radix(digest, 16).ok());
        Tally {
            documents: count(side, "documents"),
            bytes: count(side, "bytes"),
            digest: digest.unwrap_or_default(),
        }
    };
    let figures = Figures {
        source: tally("source"),
        target: tally("target"),
        rechecked: count(&document, "rechecked"),
        missing: count(&document, "missing"),
        extra: count(&document, "extra"),
        different: count(&document, "different"),
    };
    let is_done = document.get_str("state").is_ok_and(|state| state == "equal");
    let range = Range { lower: document.remove("lower"), upper: document.remove("upper") };
    let at = document.get_datetime("at").ok().copied();
    StoredRange { number, range, is_done, figures, at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ranges_without_gap_and_overlap_are_used_again() {
        let range = |lower: Option<i32>, upper: Option<i32>| Range {
            lower: lower.map(Bson::from),
            upper: upper.map(Bson::from),
        };
        let whole = [range(None, Some(1)), range(Some(1), Some(5)), range(Some(5), None)];
        assert!(is_tiling(&whole) && is_tiling(&[Range::all()]));
        assert!(!is_tiling(&[]) && !is_tiling(&whole[..2]) && !is_tiling(&whole[1..]));
        assert!(!is_tiling(&[whole[0].clone(), whole[2].clone()]));
        assert!(!is_tiling(&[Range::all(), Range::all()]), "of two comparisons");
    }
}
