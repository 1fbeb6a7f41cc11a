//! The stored form of a rejected document: as it is, beside its `_id` and the
//! name of the rule that rejected it. Pure, but for reading parts.
//!
//! A document that would no longer fit within the server's limits with that
//! around it is kept as its bytes, in parts that stand in a collection of their
//! own, so that none is lost and each comes back byte for byte.

use bson::spec::BinarySubtype;
use bson::{Binary, Document, RawBson, RawDocument, RawDocumentBuf, rawdoc};
use sha2::{Digest as _, Sha256};

use super::Mongo;
use super::element::{self, Nested};
use super::exact;
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::report::json::extended;

/// The largest document that the server stores.
pub const LARGEST: usize = 16 * 1024 * 1024;
/// What stands around a document besides its `_id` and the name of its rule:
/// lengths, types and names of the fields.
pub const AROUND: usize = 21;
/// Levels of nesting that are certain to be stored with one more around them;
/// the server's limit is 180.
const DEEPEST: usize = 160;
/// Bytes per part.
const PART: usize = 8 * 1024 * 1024;
/// Parts of a document at most.
pub const MOST_PARTS: i32 = 3;

/// A rejected document as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Stored {
    /// `{_id, rule, document}`.
    Whole(RawDocumentBuf),
    /// Its bytes, in parts.
    InParts {
        /// `{_id, rule, parts, size, sha256}`, in the quarantine.
        head: RawDocumentBuf,
        /// `{_id: {of, part}, bytes}`, in the collection of parts.
        parts: Vec<RawDocumentBuf>,
    },
}

/// What stands in the quarantine in place of a document that is kept in parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// The `_id` of the document.
    pub id: RawBson,
    /// How many parts there are.
    pub parts: i32,
    /// Bytes of the document.
    pub size: i64,
    /// The SHA-256 of its bytes.
    pub sha256: Vec<u8>,
}

/// A document of the quarantine, as it was read.
#[derive(Debug, Clone, PartialEq)]
pub enum Read<'a> {
    /// The rejected document.
    Whole(&'a RawDocument),
    /// It is kept in parts.
    InParts(Head),
}

/// The collection of parts that belongs to a quarantine.
pub fn parts_of(quarantine: &Namespace) -> Namespace {
    Namespace {
        database: quarantine.database.clone(),
        collection: format!("{}.parts", quarantine.collection),
    }
}

/// The form in which a document that this rule rejected is stored.
///
/// # Errors
/// A stop for a document without an `_id`.
pub fn wrap(rule: &str, document: &RawDocument) -> Result<Stored> {
    let id = exact::id_of(document).ok_or_else(|| Error::stopped("a document has no `_id`"))?;
    if !is_too_deep(document, DEEPEST) {
        let mut whole = exact::single("_id", id.as_raw_bson_ref());
        whole.append(bson::cstr!("rule"), rule);
        whole.append(bson::cstr!("document"), document.to_owned());
        if whole.as_bytes().len() <= LARGEST {
            return Ok(Stored::Whole(whole));
        }
    }
    Ok(in_parts(id, rule, document.as_bytes()))
}

fn in_parts(id: RawBson, rule: &str, bytes: &[u8]) -> Stored {
    let binary = |bytes: &[u8]| Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() };
    let parts: Vec<RawDocumentBuf> = (0..)
        .zip(bytes.chunks(PART))
        .map(|(part, bytes)| rawdoc! {"_id": part_id(&id, part), "bytes": binary(bytes)})
        .collect();
    let mut head = exact::single("_id", id.as_raw_bson_ref());
    head.append(bson::cstr!("rule"), rule);
    head.append(bson::cstr!("parts"), i32::try_from(parts.len()).unwrap_or(i32::MAX));
    head.append(bson::cstr!("size"), i64::try_from(bytes.len()).unwrap_or(i64::MAX));
    head.append(bson::cstr!("sha256"), binary(&Sha256::digest(bytes)));
    Stored::InParts { head, parts }
}

/// The `_id` of a part.
pub fn part_id(id: &RawBson, part: i32) -> RawDocumentBuf {
    let mut id = exact::single("of", id.as_raw_bson_ref());
    id.append(bson::cstr!("part"), part);
    id
}

/// Reads a document of the quarantine.
///
/// # Errors
/// A stop where it is none of the two forms.
pub fn read(stored: &RawDocument) -> Result<Read<'_>> {
    if let Ok(document) = stored.get_document("document") {
        return Ok(Read::Whole(document));
    }
    head(stored).map(Read::InParts).ok_or_else(|| unreadable(stored, "it is no rejected document"))
}

/// The name of the rule that rejected it.
pub fn rule(stored: &RawDocument) -> Option<&str> {
    stored.get_str("rule").ok()
}

fn head(stored: &RawDocument) -> Option<Head> {
    Some(Head {
        id: exact::id_of(stored)?,
        parts: stored.get_i32("parts").ok().filter(|parts| (1..=MOST_PARTS).contains(parts))?,
        size: stored.get_i64("size").ok()?,
        sha256: stored.get_binary("sha256").ok()?.bytes.to_vec(),
    })
}

fn unreadable(stored: &RawDocument, why: &str) -> Error {
    let id = exact::id_of(stored).map(|id| extended(id.as_raw_bson_ref())).unwrap_or_default();
    Error::stopped(format!("the document {id} of the quarantine can't be read: {why}"))
        .hint("has anybody else written to the quarantine?")
}

/// Puts the parts of a document together; `None` where they don't make it up.
fn assemble(head: &Head, parts: &[RawDocumentBuf]) -> Option<RawDocumentBuf> {
    let mut bytes = Vec::with_capacity(usize::try_from(head.size).unwrap_or(0).min(2 * LARGEST));
    for part in parts {
        bytes.extend_from_slice(part.get_binary("bytes").map_or(&[][..], |binary| binary.bytes));
    }
    let is_whole =
        i64::try_from(bytes.len()) == Ok(head.size) && Sha256::digest(&bytes)[..] == head.sha256[..];
    is_whole.then(|| RawDocumentBuf::from_bytes(bytes).ok()).flatten()
}

fn is_too_deep(document: &RawDocument, levels: usize) -> bool {
    element::elements(document).filter_map(|element| element.nested()).any(|nested| match nested {
        Nested::Document(inner) | Nested::Array(inner) => levels == 0 || is_too_deep(inner, levels - 1),
    })
}

impl Mongo {
    /// The rejected document of which this is kept.
    ///
    /// # Errors
    /// A stop where it can't be read or its parts don't make it up.
    pub async fn unwrap_quarantined(
        &self,
        quarantine: &Namespace,
        stored: &RawDocument,
    ) -> Result<RawDocumentBuf> {
        match read(stored)? {
            Read::Whole(document) => Ok(document.to_owned()),
            Read::InParts(head) => self.quarantined_parts(quarantine, &head).await?.ok_or_else(|| {
                unreadable(stored, "its parts don't make it up; it may be being written at this moment")
            }),
        }
    }

    /// The rejected document that is kept in these parts; `None` where they don't
    /// make it up.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn quarantined_parts(
        &self,
        quarantine: &Namespace,
        head: &Head,
    ) -> Result<Option<RawDocumentBuf>> {
        let parts = parts_of(quarantine);
        let ids: Vec<RawBson> = (0..head.parts).map(|part| part_id(&head.id, part).into()).collect();
        let (anything, owned) = (Document::new(), |part: &RawDocument| part.to_owned());
        let mut found = self.by_ids(&parts, &ids, &anything, None, owned).await?;
        found.sort_by_key(|part| part.get_document("_id").and_then(|id| id.get_i32("part")).unwrap_or(0));
        Ok(assemble(head, &found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(levels: usize) -> RawDocumentBuf {
        let mut document = rawdoc! {"x": 1};
        for _ in 0..levels {
            document = rawdoc! {"n": document};
        }
        let mut with_id = rawdoc! {"_id": 1};
        with_id.append(bson::cstr!("d"), document);
        with_id
    }

    fn sized(bytes: usize) -> RawDocumentBuf {
        let empty = rawdoc! {"_id": 1_i64, "s": ""}.as_bytes().len();
        rawdoc! {"_id": 1_i64, "s": "x".repeat(bytes - empty)}
    }

    #[test]
    fn a_document_stands_unchanged_beside_its_rule() {
        let document =
            rawdoc! {"_id": "a", "x.y": 1, "$z": -0.0, "t": bson::Timestamp { time: 0, increment: 0 }};
        let Stored::Whole(stored) = wrap("no_owner", &document).expect("a form") else { panic!("in parts") };
        assert_eq!(stored.get_str("_id").ok(), Some("a"));
        assert_eq!(rule(&stored), Some("no_owner"));
        assert_eq!(read(&stored).expect("readable"), Read::Whole(&document));
    }

    #[test]
    fn what_stands_around_a_document_is_known_to_the_byte() {
        for id in [RawBson::Int64(7), RawBson::String("가나".into()), RawBson::Null] {
            let mut document = rawdoc! {"a": [1, 2]};
            document.append(bson::cstr!("_id"), id.clone());
            let Stored::Whole(stored) = wrap("rule", &document).expect("a form") else { panic!("in parts") };
            let id_size = rawdoc! {"_id": id}.as_bytes().len();
            assert_eq!(stored.as_bytes().len(), document.as_bytes().len() + id_size + "rule".len() + AROUND);
        }
    }

    #[test]
    fn one_that_does_not_fit_with_its_rule_is_kept_in_parts() {
        let id_size = rawdoc! {"_id": 1_i64}.as_bytes().len();
        let fits = LARGEST - AROUND - "rule".len() - id_size;
        assert!(matches!(wrap("rule", &sized(fits)), Ok(Stored::Whole(_))));
        for size in [fits + 1, LARGEST] {
            let document = sized(size);
            let Ok(Stored::InParts { head, parts }) = wrap("rule", &document) else { panic!("whole") };
            assert_eq!((parts.len(), rule(&head)), (2, Some("rule")));
            let Ok(Read::InParts(head)) = read(&head) else { panic!("no head") };
            assert_eq!(assemble(&head, &parts), Some(document));
            assert!(assemble(&head, &parts[..1]).is_none());
            let other = rawdoc! {"_id": 1_i64, "s": "y".repeat(size - 100)};
            let Ok(Stored::InParts { parts: others, .. }) = wrap("rule", &other) else { return };
            assert!(assemble(&head, &[parts[0].clone(), others[1].clone()]).is_none());
        }
    }

    #[test]
    fn one_that_is_nested_too_deeply_is_kept_in_parts() {
        assert!(matches!(wrap("rule", &nested(150)), Ok(Stored::Whole(_))));
        assert!(matches!(wrap("rule", &nested(178)), Ok(Stored::InParts { .. })));
    }

    #[test]
    fn what_is_no_rejected_document_is_not_read_as_one() {
        for other in [rawdoc! {"_id": 1}, rawdoc! {"_id": 1, "parts": 9, "size": 1_i64}] {
            assert!(read(&other).is_err());
        }
    }
}
