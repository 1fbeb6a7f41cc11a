//! What a feed is about: one collection, or one together with the collections
//! that must know its documents.
//!
//! With others the feed is that of the database, so that all changes have one
//! order and one position. Which value of another collection came or went is told
//! by an event itself where the value is the `_id`. Otherwise an update or a
//! delete no longer tells the value that was lost: that collection must keep
//! pre-images. Between the value before a change and the one that stands now lie
//! only values that were lost by later changes, whose own events tell them.

use bson::{Bson, Document, RawArrayBuf, RawBson, RawDocument, RawDocumentBuf, doc, rawdoc};

use super::exact;
use super::valid::Membership;
use crate::config::values::Namespace;

/// The document as it was before a change.
const BEFORE: &str = "fullDocumentBeforeChange";
/// What an insert or a replacement has put in its place.
const AFTER: &str = "fullDocument";
/// The names of the fields that an update has changed.
const CHANGED: &str = "changed";
/// Events that touch a document.
const TOUCHES: [&str; 4] = ["insert", "update", "replace", "delete"];

/// What a feed is about.
#[derive(Debug, Clone)]
pub struct Watched {
    /// The collection whose documents are followed.
    pub source: Namespace,
    /// The collections of the same database that must know them.
    pub memberships: Vec<Membership>,
}

/// A document of another collection that was touched.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Which membership it is about, by number.
    pub membership: usize,
    /// Values of `foreign` that came or went.
    pub values: Vec<RawBson>,
    /// Its `_id`, where the value that it has now must be looked up.
    pub look_up: Option<RawBson>,
}

impl Watched {
    /// A collection by itself.
    pub fn only(source: &Namespace) -> Self {
        Self { source: source.clone(), memberships: Vec::new() }
    }

    /// The events and their fields that are needed: a changed document may have
    /// megabytes.
    pub fn pipeline(&self) -> Vec<Document> {
        let mut fields = doc! {"operationType": 1, "documentKey._id": 1, "clusterTime": 1, "lsid.id": 1};
        if self.memberships.is_empty() {
            return vec![doc! {"$project": fields}];
        }
        fields.insert("ns.coll", 1);
        for membership in self.memberships.iter().filter(|membership| membership.needs_images()) {
            // Also what tells that there is one at all.
            fields.insert(format!("{BEFORE}._id"), 1);
            for side in [BEFORE, AFTER] {
                fields.insert(format!("{side}.{}", membership.foreign), 1);
            }
            fields.insert(CHANGED, changed());
        }
        let names: Vec<&str> = self.collections().collect();
        let ours = doc! {"$match": {"$or": [
            {"ns.coll": {"$in": &names}},
            {"to.coll": {"$in": &names}},
            {"operationType": {"$in": ["dropDatabase", "invalidate"]}},
        ]}};
        vec![ours, doc! {"$project": fields}]
    }

    /// Whether documents as they were before a change are asked for.
    pub fn needs_images(&self) -> bool {
        self.memberships.iter().any(Membership::needs_images)
    }

    /// What happened, and to which collection where several are watched.
    pub fn named(&self, kind: &str, event: &RawDocument) -> String {
        match collection_of(event) {
            Some(collection) if !self.memberships.is_empty() => format!("{kind} of {collection}"),
            _ => kind.to_owned(),
        }
    }

    /// The full names of the collections.
    pub fn namespaces(&self) -> Vec<String> {
        self.collections().map(|name| format!("{}.{name}", self.source.database)).collect()
    }

    fn collections(&self) -> impl Iterator<Item = &str> {
        let members = self.memberships.iter().map(|membership| membership.collection.as_str());
        std::iter::once(self.source.collection.as_str()).chain(members)
    }

    /// Whether an event is about a document of the followed collection.
    pub fn is_of_source(&self, event: &RawDocument) -> bool {
        self.memberships.is_empty() || collection_of(event) == Some(&self.source.collection)
    }

    /// What an event says about members.
    ///
    /// # Errors
    /// Why the event does not say it.
    pub fn members(&self, event: &RawDocument) -> Result<Vec<Member>, String> {
        let kind = event.get_str("operationType").unwrap_or_default();
        if !TOUCHES.contains(&kind) {
            return Ok(Vec::new());
        }
        let collection = collection_of(event);
        let id = || exact::id_of(event.get_document("documentKey").ok()?);
        let mut members = Vec::new();
        for (number, membership) in self.memberships.iter().enumerate() {
            if collection != Some(membership.collection.as_str()) {
                continue;
            }
            if !membership.needs_images() {
                // An `_id` comes and goes with its document, and never changes.
                if matches!(kind, "insert" | "delete") {
                    let values = id().into_iter().collect();
                    members.push(Member { membership: number, values, look_up: None });
                }
                continue;
            }
            if leaves_alone(kind, event, &membership.foreign) {
                continue;
            }
            let before = event.get_document(BEFORE).ok();
            if before.is_none() && kind != "insert" {
                return Err(format!("{} no longer keeps pre-images", membership.collection));
            }
            let values = before.map(|before| values_at(before, &membership.foreign)).unwrap_or_default();
            members.push(Member { membership: number, values, look_up: id() });
        }
        Ok(members)
    }
}

impl Membership {
    /// Whether an event does not tell by itself which value came or went.
    pub fn needs_images(&self) -> bool {
        self.foreign != "_id"
    }
}

/// The names of the fields that an update has changed, as an expression: their values may have
/// megabytes.
fn changed() -> Document {
    let names = |of: Document, name: &str| doc! {"$map": {"input": of, "in": format!("$$this.{name}")}};
    let description =
        |part: &str, otherwise: Bson| doc! {"$ifNull": [format!("$updateDescription.{part}"), otherwise]};
    let nothing = || Bson::Array(Vec::new());
    let updated = doc! {"$objectToArray": description("updatedFields", Document::new().into())};
    doc! {"$concatArrays": [
        names(updated, "k"),
        description("removedFields", nothing()),
        names(description("truncatedArrays", nothing()), "field"),
    ]}
}

/// Whether a change has left what stands at a path as it was.
fn leaves_alone(kind: &str, event: &RawDocument, path: &str) -> bool {
    let top = |path: &str| path.split('.').next().map(ToOwned::to_owned);
    match (kind, event.get_array(CHANGED), event.get_document(BEFORE), event.get_document(AFTER)) {
        // What is within it is changed by a path that begins with the same field.
        ("update", Ok(changed), ..) => exact::elements(changed)
            .iter()
            .all(|name| name.as_str().is_some_and(|name| top(name) != top(path))),
        ("replace", _, Ok(before), Ok(after)) => {
            let bytes = |document| -> Vec<Vec<u8>> {
                values_at(document, path)
                    .iter()
                    .map(|value| exact::bytes_of(value.as_raw_bson_ref()))
                    .collect()
            };
            bytes(before) == bytes(after)
        }
        _ => false,
    }
}

fn collection_of(event: &RawDocument) -> Option<&str> {
    event.get_document("ns").ok()?.get_str("coll").ok()
}

/// The values by which a document is found at a path: what stands there, and the
/// elements of arrays. Null and nothing are no values.
pub fn values_at(document: &RawDocument, path: &str) -> Vec<RawBson> {
    let mut values = Vec::new();
    collect(document, path, &mut values);
    values
}

fn collect(document: &RawDocument, path: &str, values: &mut Vec<RawBson>) {
    let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
    let Some(value) = exact::field(document, name) else { return };
    match (value, rest) {
        (RawBson::Document(inner), Some(rest)) => collect(&inner, rest, values),
        (RawBson::Array(items), Some(rest)) => {
            for item in exact::elements(&items) {
                if let RawBson::Document(inner) = item {
                    collect(&inner, rest, values);
                }
            }
        }
        (_, Some(_)) | (RawBson::Null | RawBson::Undefined, None) => {}
        (value, None) => {
            let items = value.as_array().map(exact::elements).unwrap_or_default();
            let is_value = |item: &RawBson| !matches!(item, RawBson::Null | RawBson::Undefined);
            values.push(value);
            values.extend(items.into_iter().filter(is_value));
        }
    }
}

/// The condition for documents that one of these values answers for.
pub fn asks_for(local: &str, values: &[RawBson]) -> RawDocumentBuf {
    // In a list a pattern would match, and a document with a `$` be refused.
    let (single, listed): (Vec<&RawBson>, Vec<&RawBson>) = values
        .iter()
        .partition(|value| matches!(value, RawBson::RegularExpression(_) | RawBson::Document(_)));
    let asks = |condition: RawDocumentBuf| exact::single(local, condition.as_ref().into());
    let mut any: Vec<RawDocumentBuf> = single.into_iter().map(|value| asks(exact::equal(value))).collect();
    any.push(asks(exact::one_of(listed)));
    match any.as_slice() {
        [only] => only.clone(),
        _ => rawdoc! {"$or": RawArrayBuf::from_iter(any)},
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::rawdoc;

    fn watched(foreign: &str) -> Watched {
        let membership =
            Membership { collection: "members".into(), local: "l".into(), foreign: foreign.into() };
        Watched { source: "app.users".parse().expect("a namespace"), memberships: vec![membership] }
    }

    #[test]
    fn an_id_that_came_or_went_is_told_by_the_event() {
        let event = |coll: &str| {
            rawdoc! {"operationType": "delete", "ns": {"db": "app", "coll": coll}, "documentKey": {"_id": 7}}
        };
        let watched = watched("_id");
        let expected = Member { membership: 0, values: vec![7.into()], look_up: None };
        assert_eq!(watched.members(&event("members")), Ok(vec![expected]));
        assert_eq!(watched.members(&event("users")), Ok(vec![]));
        assert!(watched.is_of_source(&event("users")) && !watched.is_of_source(&event("members")));
    }

    #[test]
    fn any_other_value_is_told_by_the_document_before_the_change() {
        let watched = watched("a.b");
        let event = |kind: &str| {
            rawdoc! {"operationType": kind, "ns": {"coll": "members"}, "documentKey": {"_id": 7}}
        };
        assert!(watched.members(&event("update")).is_err());
        let inserted = watched.members(&event("insert")).expect("needs nothing");
        assert_eq!((inserted[0].values.len(), &inserted[0].look_up), (0, &Some(7.into())));
        let mut updated = event("update");
        updated.append(bson::cstr!("changed"), ["x", "a.b"].into_iter().collect::<RawArrayBuf>());
        updated.append(bson::cstr!("fullDocumentBeforeChange"), rawdoc! {"_id": 7, "a": {"b": 3}});
        assert_eq!(watched.members(&updated).expect("told")[0].values, [RawBson::Int32(3)]);
    }

    #[test]
    fn a_change_that_leaves_the_value_alone_says_nothing() {
        let event = |kind: &str, changed: &[&str], after: RawDocumentBuf| {
            rawdoc! {
                "operationType": kind,
                "ns": {"coll": "members"},
                "documentKey": {"_id": 7},
                "changed": changed.iter().copied().collect::<RawArrayBuf>(),
                "fullDocumentBeforeChange": {"_id": 7, "a": {"b": 3}},
                "fullDocument": after,
            }
        };
        let told = |foreign: &str, kind: &str, changed: &[&str], after: RawDocumentBuf| {
            watched(foreign).members(&event(kind, changed, after)).expect("told").len()
        };
        let same = || rawdoc! {"_id": 7, "a": {"b": 3}};
        assert_eq!(told("a.b", "update", &["lastLogin", "b", "ab.b"], rawdoc! {}), 0);
        for changed in ["a", "a.b", "a.b.0", "a.0.b"] {
            assert_eq!(told("a.b", "update", &["x", changed], rawdoc! {}), 1, "{changed}");
        }
        assert_eq!(told("a.b", "replace", &[], same()), 0);
        assert_eq!(told("a.b", "replace", &[], rawdoc! {"_id": 7, "a": {"b": 3_i64}}), 1);
        assert_eq!(told("a.b", "replace", &[], rawdoc! {"_id": 7}), 1);
        assert_eq!((told("_id", "update", &["x"], same()), told("_id", "replace", &[], same())), (0, 0));
        assert_eq!((told("_id", "delete", &[], same()), told("_id", "insert", &[], same())), (1, 1));
    }

    #[test]
    fn a_document_is_found_by_the_elements_of_its_arrays() {
        let document = rawdoc! {"a": [{"b": 1}, {"b": [2, null]}, {"c": 3}, 4], "n": null};
        let nested: RawBson = bson::rawbson!([2, null]);
        assert_eq!(values_at(&document, "a.b"), [1.into(), nested, 2.into()]);
        assert!(values_at(&document, "n").is_empty() && values_at(&document, "x").is_empty());
    }
}
