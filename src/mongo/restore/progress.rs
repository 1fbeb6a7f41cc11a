//! How far a quarantine is put back, and what became of its documents, as it is
//! stored.

use bson::spec::BinarySubtype;
use bson::{Binary, Bson, Document, RawBson, doc};

use crate::mongo::exact;
use crate::mongo::index::{stored_count, whole_number};

/// `_id`s of documents that stay as the application has written them, of which is told.
const KEPT_LISTED: usize = 20;
/// Documents that could not be put back, of which is told.
const REFUSALS_LISTED: usize = 1000;
/// Where the position is stored, as bytes: an `_id` may be what no stored value of ours can be.
const POSITION: &str = "position_bytes";
/// Letters of a reason.
const REASON: usize = 300;

/// A document that could not be put back.
#[derive(Debug, Clone, PartialEq)]
pub struct Refusal {
    /// Its `_id`.
    pub id: Bson,
    /// What the server has against it.
    pub reason: String,
}

/// What was put back so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Restored {
    /// Documents that were put back.
    pub restored: u64,
    /// Documents that the application has written anew under their `_id`; that stays.
    pub kept: u64,
    /// Some of their `_id`s.
    pub kept_ids: Vec<Bson>,
    /// Documents that the application has written anew and deleted again.
    pub deleted_since: u64,
    /// Documents that the collection refuses, such as for a value that a unique
    /// index allows only once.
    pub refused: u64,
    /// Which they are, but for a very long list.
    pub refusals: Vec<Refusal>,
    /// The `_id` up to which everything was looked at, in the order of `_id`: to go
    /// on from there.
    pub position: Option<RawBson>,
    /// Whether the whole quarantine was looked at.
    pub is_complete: bool,
}

impl Restored {
    /// As it is stored.
    pub fn to_document(&self) -> Document {
        let refusals: Vec<Document> = self
            .refusals
            .iter()
            .map(|refusal| doc! {"_id": refusal.id.clone(), "reason": &refusal.reason})
            .collect();
        let mut document = doc! {
            "restored": stored_count(self.restored),
            "kept": stored_count(self.kept),
            "kept_ids": self.kept_ids.clone(),
            "deleted_since": stored_count(self.deleted_since),
            "refused": stored_count(self.refused),
            "refusals": refusals,
            "is_complete": self.is_complete,
        };
        // Absent at the start; an `_id` may itself be null.
        if let Some(position) = &self.position {
            let bytes = exact::bytes_of(position.as_raw_bson_ref());
            document.insert(POSITION, Binary { subtype: BinarySubtype::Generic, bytes });
        }
        document
    }

    /// Reads what [`Restored::to_document`] made.
    pub fn from_document(document: &Document) -> Self {
        let count = |name: &str| document.get(name).and_then(whole_number).unwrap_or(0);
        let refusals = document.get_array("refusals").map(Vec::as_slice).unwrap_or_default();
        let refusals = refusals.iter().filter_map(Bson::as_document).map(|refusal| Refusal {
            id: refusal.get("_id").cloned().unwrap_or(Bson::Null),
            reason: refusal.get_str("reason").unwrap_or_default().to_owned(),
        });
        Self {
            restored: count("restored"),
            kept: count("kept"),
            kept_ids: document.get_array("kept_ids").cloned().unwrap_or_default(),
            deleted_since: count("deleted_since"),
            refused: count("refused"),
            refusals: refusals.collect(),
            position: position_in(document),
            is_complete: document.get_bool("is_complete").unwrap_or(false),
        }
    }

    /// Notes a document that the application has written anew.
    pub fn keep(&mut self, id: Bson) {
        self.kept += 1;
        if self.kept_ids.len() < KEPT_LISTED {
            self.kept_ids.push(id);
        }
    }

    /// Notes a document that is not put back, for that reason.
    pub fn refuse(&mut self, id: Bson, reason: &str) {
        self.refused += 1;
        if self.refusals.len() < REFUSALS_LISTED {
            self.refusals.push(Refusal { id, reason: reason.chars().take(REASON).collect() });
        }
    }
}

fn position_in(document: &Document) -> Option<RawBson> {
    match document.get_binary_generic(POSITION) {
        Ok(bytes) => exact::from_bytes(bytes),
        // As it was stored by an earlier version.
        Err(_) => document.get("position").and_then(|position| RawBson::try_from(position.clone()).ok()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_of_a_restoration_is_read_again() {
        let restored = Restored {
            restored: 5,
            kept: 2,
            kept_ids: vec!["a".into()],
            deleted_since: 3,
            refused: 1,
            refusals: vec![Refusal { id: Bson::Int32(7), reason: "a duplicate".into() }],
            position: Some(RawBson::Null),
            is_complete: true,
        };
        for restored in [restored, Restored::default()] {
            assert_eq!(Restored::from_document(&restored.to_document()), restored);
        }
    }
}
