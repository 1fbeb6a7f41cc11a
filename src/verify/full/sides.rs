//! The two collections and how a range of both is read.

use std::sync::{Mutex, PoisonError};

use bson::{Bson, Document, RawDocument, RawDocumentBuf, doc};
use futures_util::TryStreamExt;
use futures_util::future::join;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::matching::{Id, Matcher, Pair, Share, Side, Tally};
use super::suspects::{Suspect, Suspects};
use crate::cleanse::predicate::all_of;
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::catalog::Description;
use crate::mongo::command::retrying;
use crate::mongo::index::whole_number;
use crate::mongo::quarantine::{self, Read};
use crate::mongo::range::Range;
use crate::mongo::scan::Scan;
use crate::mongo::valid::Valid;

/// A reply of the server has about so many bytes.
const REPLY_BYTES: u64 = 1 << 20;
/// And not more documents than this.
const MOST_PER_REPLY: u64 = 10_000;
/// Documents that are looked at to learn how large they are.
const SIZE_SAMPLE: i32 = 200;
/// Each time too many documents wait, a range is read in so many more shares.
const MORE_SHARES: u64 = 8;
/// More shares than this mean that it will never fit.
const MOST_SHARES: u64 = 8 * 8 * 8 * 8;

/// The two collections.
#[derive(Debug, Clone)]
pub struct Sides {
    /// The connection.
    pub mongo: Mongo,
    /// Cancelled when the run is to end.
    pub stop: CancellationToken,
    source: Scan,
    target: Scan,
    is_quarantine: bool,
}

/// What was found in a range.
#[derive(Debug, Default)]
pub struct Compared {
    /// Read of the source.
    pub source: Tally,
    /// Read of the target.
    pub target: Tally,
    /// Documents that were not the same.
    pub suspects: Suspects,
}

/// How reading a range, or a share of it, ended.
enum Attempt<T> {
    Read(T),
    TooMany,
    Stopped,
}

/// How large documents are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of a document on average, at least 1.
    pub average: u64,
    /// Bytes of the largest one seen.
    pub largest: u64,
}

impl Sides {
    /// The valid documents of the source, and all of the target.
    pub fn new(
        mongo: &Mongo,
        stop: &CancellationToken,
        source: (&Namespace, &Description, Valid),
        target: (&Namespace, &Description),
        sizes: Sizes,
    ) -> Self {
        let batch = u32::try_from((REPLY_BYTES / sizes.average).clamp(1, MOST_PER_REPLY)).unwrap_or(1);
        let by_id = |description: &Description| description.index("_id_").is_some();
        let scan = |namespace: &Namespace, description: &Description, valid: Valid| Scan {
            namespace: namespace.clone(),
            filter: if valid.is_condition() { valid.condition.clone() } else { Document::new() },
            valid,
            by_id: by_id(description),
            batch,
        };
        Self {
            mongo: mongo.clone(),
            stop: stop.clone(),
            source: scan(source.0, source.1, source.2),
            target: scan(target.0, target.1, Valid::default()),
            is_quarantine: false,
        }
    }

    /// The same, where the target is a quarantine, whose documents are compared as
    /// they were.
    #[must_use]
    pub fn in_quarantine(self, is_quarantine: bool) -> Self {
        Self { is_quarantine, ..self }
    }

    /// The document that is to be compared, of one that was read. One that is kept
    /// in parts stays what it is and so differs, until it is looked at again.
    pub fn compared<'a>(&self, side: Side, document: &'a RawDocument) -> &'a RawDocument {
        match quarantine::read(document) {
            Ok(Read::Whole(inner)) if self.is_quarantine && side == Side::Target => inner,
            _ => document,
        }
    }

    /// The same with its parts put together, as far as they make it up: what
    /// stands for it differs from it otherwise.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn whole(&self, side: Side, document: RawDocumentBuf) -> Result<RawDocumentBuf> {
        let found = match quarantine::read(&document) {
            Ok(Read::InParts(head)) if self.is_quarantine && side == Side::Target => {
                self.mongo.quarantined_parts(&self.target.namespace, &head).await?
            }
            _ => Some(self.compared(side, &document).to_owned()),
        };
        Ok(found.unwrap_or(document))
    }

    /// Whether a document of that side is not yet the one to be compared.
    pub fn is_in_parts(&self, side: Side, document: &RawDocument) -> bool {
        self.is_quarantine
            && side == Side::Target
            && matches!(quarantine::read(document), Ok(Read::InParts(_)))
    }

    /// Documents per reply.
    pub fn batch(&self) -> u32 {
        self.source.batch
    }

    /// Reads those documents of a side that also meet a condition.
    pub fn scan(&self, side: Side, condition: Document) -> Scan {
        let all = if side == Side::Source { &self.source } else { &self.target };
        let filter = all_of(vec![Bson::Document(condition), Bson::Document(all.filter.clone())]);
        Scan { filter, ..all.clone() }
    }

    /// Whether a side has any document to compare.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn has_any(&self, side: Side) -> Result<bool> {
        let scan = Scan { batch: 1, ..self.scan(side, Document::new()) };
        retrying(format!("looking for documents of {}", scan.namespace), || async {
            let mut any = false;
            self.mongo
                .scan(&scan, &self.stop, |documents| {
                    any |= !documents.is_empty();
                    !any
                })
                .await?;
            Ok(any)
        })
        .await
    }

    /// Compares a range; `None` where the run is to stop.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn compare(&self, number: i32, range: &Range) -> Result<Option<Compared>> {
        let mut shares = 1;
        loop {
            match self.compare_in(number, range, shares).await? {
                Attempt::Read(compared) => return Ok(Some(compared)),
                Attempt::Stopped => return Ok(None),
                Attempt::TooMany if shares < MOST_SHARES => shares *= MORE_SHARES,
                Attempt::TooMany => {
                    return Err(Error::stopped("the `_id`s of a range are too large to be matched")
                        .hint("compare the collections with --sample"));
                }
            }
        }
    }

    async fn compare_in(&self, number: i32, range: &Range, shares: u64) -> Result<Attempt<Compared>> {
        let mut compared = Compared::default();
        for index in 0..shares {
            let share = Share { index, of: shares };
            let operation = format!("comparing a range of {}", self.source.namespace);
            match retrying(operation, || self.pass(range, share)).await? {
                Attempt::TooMany => return Ok(Attempt::TooMany),
                Attempt::Stopped => return Ok(Attempt::Stopped),
                Attempt::Read((source, target, found)) => {
                    (compared.source, compared.target) = (source, target);
                    let since = Instant::now();
                    for (id, pair) in found {
                        compared.suspects.add(Suspect::new(id, pair, since, number));
                    }
                }
            }
        }
        Ok(Attempt::Read(compared))
    }

    /// Reads both sides at once; whatever fails is read again from the start.
    async fn pass(&self, range: &Range, share: Share) -> mongodb::error::Result<Attempt<Matched>> {
        let matcher = Mutex::new(Matcher::new(share));
        // Where too many wait on one side, the other need not be read on.
        let stop = self.stop.child_token();
        let take = |side: Side| {
            let (matcher, stop) = (&matcher, &stop);
            move |documents: &[&RawDocument]| {
                let mut matcher = matcher.lock().unwrap_or_else(PoisonError::into_inner);
                let goes_on =
                    documents.iter().all(|document| matcher.take(side, self.compared(side, document)));
                if !goes_on {
                    stop.cancel();
                }
                goes_on
            }
        };
        let scans = [Side::Source, Side::Target].map(|side| self.scan(side, range.filter()));
        let (source, target) = join(
            self.mongo.scan(&scans[0], &stop, take(Side::Source)),
            self.mongo.scan(&scans[1], &stop, take(Side::Target)),
        )
        .await;
        let is_whole = source? && target?;
        let matcher = matcher.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(match (is_whole, matcher.is_full()) {
            (_, true) => Attempt::TooMany,
            (true, false) => Attempt::Read(matcher.finish()),
            (false, false) => Attempt::Stopped,
        })
    }
}

/// What was read of both sides, and what is not the same.
type Matched = (Tally, Tally, Vec<(Id, Pair)>);

impl Sizes {
    /// Those of a few random documents of both collections.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn of(mongo: &Mongo, namespaces: [&Namespace; 2]) -> Result<Self> {
        let mut sizes = Self { average: 1, largest: 1 };
        for namespace in namespaces {
            let size = doc! {"$bsonSize": "$$ROOT"};
            let pipeline = [
                doc! {"$sample": {"size": SIZE_SAMPLE}},
                doc! {"$group": {"_id": Bson::Null, "average": {"$avg": size.clone()}, "largest": {"$max": size}}},
            ];
            let collection = mongo.collection(namespace).clone_with_type::<Document>();
            let found: Vec<Document> = retrying(format!("measuring documents of {namespace}"), || {
                let cursor = collection.aggregate(pipeline.clone()).allow_disk_use(true);
                async move { cursor.await?.try_collect().await }
            })
            .await?;
            let figure = |name: &str| found.first()?.get(name).and_then(whole_number_of);
            sizes.average = sizes.average.max(figure("average").unwrap_or(1));
            sizes.largest = sizes.largest.max(figure("largest").unwrap_or(1));
        }
        Ok(sizes)
    }
}

fn whole_number_of(value: &Bson) -> Option<u64> {
    match value {
        Bson::Double(number) => whole_number(&Bson::Double(number.trunc())),
        other => whole_number(other),
    }
}
