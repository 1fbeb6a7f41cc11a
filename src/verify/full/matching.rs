//! Matching the documents of one range by the bytes of their `_id`s, in
//! whatever order they come. Pure.
//!
//! A document waits here, as two small numbers and its `_id`, until the other
//! side has shown the same `_id`. Both sides are read at the same pace in about
//! the same order, so few wait at any moment; where many do, the range is read
//! again in shares, so that memory has a bound whatever the sides hold.

use std::collections::HashMap;

use bson::{RawBson, RawDocument};
use sha2::{Digest as _, Sha256};

use crate::mongo::{element, exact};

/// The first 128 bits of SHA-256 of a document's bytes.
pub type Digest = u128;

/// What an entry takes besides its `_id`, about.
const ENTRY_BYTES: usize = 96;
/// What may wait in one range at once.
const MOST_BYTES: usize = 6 << 20;

/// One of the two collections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that is right.
    Source,
    /// The one that should be like it.
    Target,
}

/// An `_id` by its bytes, comparable and small.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(Box<[u8]>);

impl Id {
    /// The value.
    pub fn value(&self) -> Option<RawBson> {
        exact::from_bytes(&self.0)
    }

    /// What an entry with it takes in memory, about.
    pub fn entry_bytes(&self) -> usize {
        self.0.len() + ENTRY_BYTES
    }

    /// The `_id` of a document.
    pub fn of(document: &RawDocument) -> Option<Self> {
        let mut bytes = Vec::new();
        write_id(document, &mut bytes)?;
        Some(Self(bytes.into_boxed_slice()))
    }

    /// That of a document with this `_id`.
    pub fn from_value(id: &RawBson) -> Self {
        Self(exact::bytes_of(id.as_raw_bson_ref()).into_boxed_slice())
    }
}

impl std::borrow::Borrow<[u8]> for Id {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

/// What stands on each side for an `_id`; at least one is there, and they differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// What should be in the target.
    pub source: Option<Digest>,
    /// What is there.
    pub target: Option<Digest>,
}

/// What was read of one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Documents.
    pub documents: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The sum of their digests modulo 2^128, whatever their order.
    pub digest: Digest,
}

impl Tally {
    /// Adds what was read elsewhere.
    pub fn add(&mut self, other: &Self) {
        self.documents += other.documents;
        self.bytes += other.bytes;
        self.digest = self.digest.wrapping_add(other.digest);
    }
}

/// Which documents of a range are matched, by a hash of their `_id`s; all are
/// tallied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Which one, from 0 on.
    pub index: u64,
    /// Of how many.
    pub of: u64,
}

impl Share {
    fn contains(self, id: &[u8]) -> bool {
        self.of < 2 || (first_128_bits(id) >> 64) % u128::from(self.of) == u128::from(self.index)
    }
}

/// Finds the `_id`s whose documents are not the same on both sides.
#[derive(Debug)]
pub struct Matcher {
    share: Share,
    waiting: HashMap<Id, (Side, Digest)>,
    different: Vec<(Id, Pair)>,
    bytes: usize,
    most_bytes: usize,
    is_full: bool,
    source: Tally,
    target: Tally,
    id: Vec<u8>,
}

impl Matcher {
    /// Matches this share of a range.
    pub fn new(share: Share) -> Self {
        Self {
            share,
            waiting: HashMap::new(),
            different: Vec::new(),
            bytes: 0,
            most_bytes: MOST_BYTES,
            is_full: false,
            source: Tally::default(),
            target: Tally::default(),
            id: Vec::new(),
        }
    }

    /// Takes a document of one side. False where too many wait: the range must
    /// be read again in shares.
    pub fn take(&mut self, side: Side, document: &RawDocument) -> bool {
        let digest = digest_of(document);
        let tally = if side == Side::Source { &mut self.source } else { &mut self.target };
        let bytes = document.as_bytes().len() as u64;
        tally.add(&Tally { documents: 1, bytes, digest });
        self.id.clear();
        // Every stored document has an `_id`.
        if write_id(document, &mut self.id).is_none() || !self.share.contains(&self.id) {
            return true;
        }
        match self.waiting.get(self.id.as_slice()) {
            Some((other, _)) if *other != side => self.meet(side, digest),
            _ => self.wait(side, digest),
        }
        self.is_full |= self.bytes > self.most_bytes;
        !self.is_full
    }

    /// Whether more waited at once than may.
    pub fn is_full(&self) -> bool {
        self.is_full
    }

    /// The other side has shown the `_id` already.
    fn meet(&mut self, side: Side, digest: Digest) {
        let Some((id, (_, other))) = self.waiting.remove_entry(self.id.as_slice()) else { return };
        if digest == other {
            self.bytes -= id.entry_bytes();
            return;
        }
        let (source, target) = if side == Side::Source { (digest, other) } else { (other, digest) };
        self.different.push((id, Pair { source: Some(source), target: Some(target) }));
    }

    fn wait(&mut self, side: Side, digest: Digest) {
        let id = Id(self.id.as_slice().into());
        let bytes = id.entry_bytes();
        // A document that comes twice was written meanwhile: the later one counts.
        if self.waiting.insert(id, (side, digest)).is_none() {
            self.bytes += bytes;
        }
    }

    /// What was read of the source and of the target, and the `_id`s whose
    /// documents are not the same.
    pub fn finish(self) -> (Tally, Tally, Vec<(Id, Pair)>) {
        let mut suspects = self.different;
        suspects.extend(self.waiting.into_iter().map(|(id, (side, digest))| {
            let pair = match side {
                Side::Source => Pair { source: Some(digest), target: None },
                Side::Target => Pair { source: None, target: Some(digest) },
            };
            (id, pair)
        }));
        (self.source, self.target, suspects)
    }
}

/// The digest of a document's bytes.
pub fn digest_of(document: &RawDocument) -> Digest {
    first_128_bits(document.as_bytes())
}

fn first_128_bits(bytes: &[u8]) -> u128 {
    let hash = Sha256::digest(bytes);
    hash.iter().take(16).fold(0, |sum, byte| sum << 8 | u128::from(*byte))
}

/// Appends the `_id` as a document with an empty field name.
fn write_id(document: &RawDocument, bytes: &mut Vec<u8>) -> Option<()> {
    // The server keeps it in front, so that this is the first element.
    let id = element::named(document, "_id")?;
    let length = i32::try_from(4 + 2 + id.value.len() + 1).ok()?;
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&[id.kind, 0]);
    bytes.extend_from_slice(id.value);
    bytes.push(0);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::rawdoc;
    use bson::{Bson, RawDocumentBuf, doc};

    /// All documents.
    const ALL: Share = Share { index: 0, of: 1 };

    fn matched(share: Share, source: &[RawDocumentBuf], target: &[RawDocumentBuf]) -> Vec<(Bson, Pair)> {
        let mut matcher = Matcher::new(share);
        assert!(source.iter().all(|document| matcher.take(Side::Source, document)));
        assert!(target.iter().all(|document| matcher.take(Side::Target, document)));
        let (_, _, suspects) = matcher.finish();
        suspects
            .into_iter()
            .map(|(id, pair)| (Bson::try_from(id.value().expect("an _id")).expect("plain"), pair))
            .collect()
    }

    fn raw(document: bson::Document) -> RawDocumentBuf {
        RawDocumentBuf::try_from(&document).expect("valid BSON")
    }

    #[test]
    fn ids_are_the_bytes_of_the_value_wherever_it_stands() {
        let oid = bson::oid::ObjectId::from_bytes([7; 12]);
        for value in [
            Bson::Int32(5),
            Bson::Int64(5),
            Bson::Double(f64::NAN),
            oid.into(),
            "텍스트".into(),
            doc! {"a": {"_id": 3}}.into(),
            Bson::Null,
            Bson::MinKey,
            Bson::Timestamp(bson::Timestamp { time: 3, increment: 1 }),
        ] {
            let front = raw(doc! {"_id": value.clone(), "a": 1});
            let back = raw(doc! {"a": {"_id": "not this"}, "b": [1, "x"], "_id": value.clone(), "c": 2});
            let expected = crate::mongo::sink::id_bytes(&front).expect("an _id");
            assert_eq!(Id::of(&front).expect("an _id").0.as_ref(), expected.as_slice());
            assert_eq!(Id::of(&front), Id::of(&back));
            let value = Id::of(&front).and_then(|id| id.value()).expect("a value");
            assert_eq!(rawdoc! {"": value}.into_bytes(), expected);
        }
        assert_eq!(Id::of(&rawdoc! {"a": 1}), None);
    }

    #[test]
    fn the_order_of_documents_does_not_matter() {
        let documents: Vec<_> = (0..50).map(|n| rawdoc! {"_id": n, "v": n * 2}).collect();
        let reversed: Vec<_> = documents.iter().rev().cloned().collect();
        assert_eq!(matched(ALL, &documents, &reversed), []);
        assert_eq!(matched(ALL, &[], &[]), []);
    }

    #[test]
    fn missing_extra_and_different_ones_are_left() {
        let source = [rawdoc! {"_id": 1, "v": 1}, rawdoc! {"_id": 2}, rawdoc! {"_id": 3}];
        let target = [rawdoc! {"_id": 3}, rawdoc! {"_id": 1, "v": 1_i64}, rawdoc! {"_id": 2_i64}];
        let mut found = matched(ALL, &source, &target);
        found.sort_by_key(|(id, _)| format!("{id:?}"));
        let digest = |document: &RawDocumentBuf| Some(digest_of(document));
        let expected = [
            (Bson::Int32(1), Pair { source: digest(&source[0]), target: digest(&target[1]) }),
            (Bson::Int32(2), Pair { source: digest(&source[1]), target: None }),
            (Bson::Int64(2), Pair { source: None, target: digest(&target[2]) }),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn tallies_do_not_depend_on_the_order_but_on_every_byte() {
        let tally = |documents: &[RawDocumentBuf]| {
            let mut matcher = Matcher::new(ALL);
            documents.iter().for_each(|document| assert!(matcher.take(Side::Source, document)));
            matcher.finish().0
        };
        let (a, b) = (rawdoc! {"_id": 1}, rawdoc! {"_id": 2});
        assert_eq!(tally(&[a.clone(), b.clone()]), tally(&[b.clone(), a.clone()]));
        assert_ne!(tally(&[a.clone(), b]).digest, tally(&[a, rawdoc! {"_id": 2_i64}]).digest);
    }

    #[test]
    fn too_many_that_wait_are_refused_and_shares_cover_everything_once() {
        let documents: Vec<_> = (0..1000).map(|n| rawdoc! {"_id": n}).collect();
        let mut matcher = Matcher { most_bytes: 5_000, ..Matcher::new(ALL) };
        assert!(!documents.iter().all(|document| matcher.take(Side::Source, document)));
        let shares: Vec<usize> =
            (0..8).map(|index| matched(Share { index, of: 8 }, &documents, &[]).len()).collect();
        assert_eq!(shares.iter().sum::<usize>(), 1000);
        assert!(shares.iter().all(|share| (60..200).contains(share)), "{shares:?}");
    }

    #[test]
    fn memory_is_given_back_when_documents_meet() {
        let mut matcher = Matcher { most_bytes: 5_000, ..Matcher::new(ALL) };
        for n in 0..10_000 {
            let document = rawdoc! {"_id": n};
            assert!(matcher.take(Side::Target, &document) && matcher.take(Side::Source, &document));
        }
        assert!(matcher.finish().2.is_empty());
    }
}
