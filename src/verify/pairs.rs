//! Single documents on both sides: what the rules want in the target, and what
//! is there.

use std::collections::HashMap;

use bson::{Document, RawBson, RawDocument, Timestamp};

use super::full::matching::{Digest, Id, digest_of};
use crate::config::values::Namespace;
use crate::error::Result;
use crate::mongo::Mongo;

/// Documents that are looked up at once.
const AT_ONCE: usize = 1_000;

/// A source, and the target that it is compared with.
#[derive(Debug)]
pub struct Pairs<'a> {
    /// The connection.
    pub mongo: &'a Mongo,
    /// The collection that is right.
    pub source: &'a Namespace,
    /// The collection that should be like it.
    pub target: &'a Namespace,
    /// Which documents of the source should be in the target.
    pub valid: Document,
}

/// One version of a document, small enough to be remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// Stands for its bytes.
    pub digest: Digest,
    /// How many those are.
    pub bytes: usize,
}

/// What was seen of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seen {
    /// The valid one of the source.
    pub source: Option<Version>,
    /// That of the target.
    pub target: Option<Version>,
}

/// How the sides differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Valid in the source, and not in the target.
    Missing,
    /// In the target, and not valid in the source or not there.
    Extra,
    /// On both sides with other bytes.
    Different,
}

impl Kind {
    /// The word in results.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Extra => "extra",
            Self::Different => "different",
        }
    }
}

impl Seen {
    /// How the sides differ; `None` where they don't.
    pub fn kind(&self) -> Option<Kind> {
        match (self.source, self.target) {
            (Some(_), None) => Some(Kind::Missing),
            (None, Some(_)) => Some(Kind::Extra),
            (Some(source), Some(target)) if source != target => Some(Kind::Different),
            _ => None,
        }
    }
}

impl Version {
    /// The version that a document is.
    pub fn of(document: &RawDocument) -> Self {
        Self { digest: digest_of(document), bytes: document.as_bytes().len() }
    }
}

impl Pairs<'_> {
    /// What stands on both sides for each of these `_id`s, and for others that
    /// the server holds to be equal to one of them, as of `after` or later. The
    /// source is read first: what follows it has a moment more.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn look_up(&self, ids: &[Id], after: Option<Timestamp>) -> Result<HashMap<Id, Seen>> {
        let mut seen: HashMap<Id, Seen> = ids.iter().map(|id| (id.clone(), Seen::default())).collect();
        for part in ids.chunks(AT_ONCE) {
            let values: Vec<RawBson> = part.iter().filter_map(Id::value).collect();
            let version = |document: &RawDocument| Some((Id::of(document)?, Version::of(document)));
            let source = self.mongo.by_ids(self.source, &values, &self.valid, after, version).await?;
            let target = self.mongo.by_ids(self.target, &values, &Document::new(), after, version).await?;
            for (id, version) in source.into_iter().flatten() {
                seen.entry(id).or_default().source = Some(version);
            }
            for (id, version) in target.into_iter().flatten() {
                seen.entry(id).or_default().target = Some(version);
            }
        }
        Ok(seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::rawdoc;

    #[test]
    fn each_difference_has_its_kind() {
        let one = Some(Version::of(&rawdoc! {"_id": 1}));
        let other = Some(Version::of(&rawdoc! {"_id": 1, "a": 1}));
        let kind = |source, target| Seen { source, target }.kind();
        assert_eq!(kind(one, None), Some(Kind::Missing));
        assert_eq!(kind(None, one), Some(Kind::Extra));
        assert_eq!(kind(one, other), Some(Kind::Different));
        assert_eq!(kind(one, one), None);
        assert_eq!(kind(None, None), None);
    }
}
