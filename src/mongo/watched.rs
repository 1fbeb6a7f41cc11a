//! What a feed is about: one collection, or one together with the collections
//! that must know its documents.
//!
//! With others the feed is that of the database, so that all changes have one
//! order and one position. Which value of another collection came or went is told
//! by an event itself where the value is the `_id`. Otherwise an update or a
//! delete no longer tells the value that was lost: that collection must keep
//! pre-images. Between the value before a change and the one that stands now lie
//! only values that were lost by later changes, whose own events tell them.

use bson::{Bson, Document, RawArray, RawBson, RawBsonRef, RawDocument, doc};

use super::valid::Membership;
use crate::config::values::Namespace;

/// What stands for a path in the fields that are asked for.
const BEFORE: &str = "fullDocumentBeforeChange";
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
            fields.insert(format!("{BEFORE}.{}", membership.foreign), 1);
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
        let id = || event.get_document("documentKey").ok()?.get("_id").ok()?.map(RawBson::from);
        let mut members = Vec::new();
        for (number, membership) in self.memberships.iter().enumerate() {
            if collection != Some(membership.collection.as_str()) {
                continue;
            }
            if !membership.needs_images() {
                // Whether it came or went: an update changes nothing, but costs little.
                members.push(Member {
                    membership: number,
                    values: id().into_iter().collect(),
                    look_up: None,
                });
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
    let Ok(Some(value)) = document.get(name) else { return };
    match (value, rest) {
        (RawBsonRef::Document(inner), Some(rest)) => collect(inner, rest, values),
        (RawBsonRef::Array(items), Some(rest)) => {
            for inner in elements(items).filter_map(|item| item.as_document()) {
                collect(inner, rest, values);
            }
        }
        (_, Some(_)) | (RawBsonRef::Null | RawBsonRef::Undefined, None) => {}
        (value, None) => {
            values.push(value.into());
            let items = value.as_array().into_iter().flat_map(elements);
            let is_value = |item: &RawBsonRef<'_>| !matches!(item, RawBsonRef::Null | RawBsonRef::Undefined);
            values.extend(items.filter(is_value).map(RawBson::from));
        }
    }
}

fn elements(items: &RawArray) -> impl Iterator<Item = RawBsonRef<'_>> {
    items.into_iter().filter_map(std::result::Result::ok)
}

/// The condition for documents that one of these values answers for.
pub fn asks_for(local: &str, values: &[Bson]) -> Document {
    // In a list a pattern would match, and a document with a `$` be refused.
    let (single, listed): (Vec<&Bson>, Vec<&Bson>) =
        values.iter().partition(|value| matches!(value, Bson::RegularExpression(_) | Bson::Document(_)));
    let mut any: Vec<Bson> =
        single.into_iter().map(|value| Bson::Document(doc! {local: {"$eq": value.clone()}})).collect();
    let listed: Vec<Bson> = listed.into_iter().cloned().collect();
    any.push(doc! {local: {"$in": listed}}.into());
    match any.as_slice() {
        [Bson::Document(only)] => only.clone(),
        _ => doc! {"$or": any},
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
        updated.append(bson::cstr!("fullDocumentBeforeChange"), rawdoc! {"_id": 7, "a": {"b": 3}});
        assert_eq!(watched.members(&updated).expect("told")[0].values, [RawBson::Int32(3)]);
    }

    #[test]
    fn a_document_is_found_by_the_elements_of_its_arrays() {
        let document = rawdoc! {"a": [{"b": 1}, {"b": [2, null]}, {"c": 3}, 4], "n": null};
        let nested: RawBson = bson::rawbson!([2, null]);
        assert_eq!(values_at(&document, "a.b"), [1.into(), nested, 2.into()]);
        assert!(values_at(&document, "n").is_empty() && values_at(&document, "x").is_empty());
    }
}
