//! What makes a document valid, in the terms of the database. Pure.
//!
//! Three parts: a condition on the document alone; memberships, which ask another
//! collection; and a grouping, of whose documents one is valid. The first two are
//! judged document by document and make a pipeline, the *candidates*; who wins a
//! group is asked of all its candidates at once (see [`super::groups`]).

use bson::{Bson, Document, RawArrayBuf, RawBson, RawDocument, RawDocumentBuf, doc, rawdoc};

use super::exact;

/// A document within a pipeline that has to keep it as it is.
const WHOLE: &str = "d";
/// Who answered for it.
const FOUND: &str = "m";
/// Types of a value by which nothing is grouped.
const NO_KEY: [&str; 4] = ["missing", "null", "undefined", "array"];

/// Which documents of a collection are valid.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Valid {
    /// Holds for the document itself.
    pub condition: Document,
    /// The collections that must know it.
    pub memberships: Vec<Membership>,
    /// Of the documents that pass the rest, one per group.
    pub grouping: Option<Grouping>,
}

/// A collection of the same database that must know a document.
#[derive(Debug, Clone, PartialEq)]
pub struct Membership {
    /// The collection.
    pub collection: String,
    /// The field of the document.
    pub local: String,
    /// The field of that collection with the same value.
    pub foreign: String,
}

/// Documents with equal values of which the newest is valid.
#[derive(Debug, Clone, PartialEq)]
pub struct Grouping {
    /// Fields whose values make a group. Where one of them is missing, null or an
    /// array, the document is in no group and valid.
    pub by: Vec<String>,
    /// The highest value of this field wins, in the order of BSON values; missing
    /// is like null, below all others. Of equal ones the highest `_id` wins.
    pub keep_latest: String,
}

/// The values that make a group.
#[derive(Debug, Clone, PartialEq)]
pub struct Key(pub Vec<RawBson>);

impl Valid {
    /// Documents that meet a condition.
    pub fn condition(condition: Document) -> Self {
        Self { condition, ..Self::default() }
    }

    /// Whether every document is valid.
    pub fn is_everything(&self) -> bool {
        self.condition.is_empty() && self.is_condition()
    }

    /// Whether the condition alone decides, so that a plain query will do.
    pub fn is_condition(&self) -> bool {
        self.memberships.is_empty() && self.grouping.is_none()
    }

    /// The stages that leave valid documents, as they are, where there is no
    /// grouping; with one, the candidates.
    pub fn stages(&self) -> Vec<Document> {
        let mut stages = Vec::new();
        if !self.condition.is_empty() {
            stages.push(doc! {"$match": self.condition.clone()});
        }
        if !self.memberships.is_empty() {
            stages.push(wrap());
            for membership in &self.memberships {
                stages.push(membership.lookup());
                stages.push(doc! {"$match": {FOUND: {"$ne": []}}});
            }
            stages.push(doc! {"$replaceWith": format!("${WHOLE}")});
        }
        stages
    }

    /// The candidates among the documents that meet a condition.
    pub fn candidates(&self, among: Document) -> Vec<Document> {
        let mut stages = Vec::new();
        if !among.is_empty() {
            stages.push(doc! {"$match": among});
        }
        stages.extend(self.stages());
        stages
    }
}

/// Puts a document aside, so that no field that a stage adds is in its way.
fn wrap() -> Document {
    doc! {"$replaceWith": {WHOLE: "$$ROOT"}}
}

impl Membership {
    /// Holds where nobody is asked for: for arrays, too, that hold null or nothing.
    fn nobody() -> Bson {
        vec![Bson::Null, Bson::Array(Vec::new())].into()
    }

    /// The condition that a document must meet to be asked for at all.
    pub fn asks(&self) -> Document {
        doc! {&self.local: {"$nin": Self::nobody()}}
    }

    /// One document is proof enough.
    fn lookup(&self) -> Document {
        doc! {"$lookup": {
            "from": &self.collection,
            "localField": format!("{WHOLE}.{}", self.local),
            "foreignField": &self.foreign,
            "pipeline": [{"$limit": 1}, {"$project": {"_id": 1}}],
            "as": FOUND,
        }}
    }

    /// The stages that leave the documents which nobody knows, as their `_id`.
    pub fn strangers(&self) -> Vec<Document> {
        let local = format!("{WHOLE}.{}", self.local);
        vec![
            wrap(),
            self.lookup(),
            doc! {"$match": {"$or": [{local: {"$in": Self::nobody()}}, {FOUND: []}]}},
            doc! {"$replaceWith": {"_id": format!("${WHOLE}._id")}},
        ]
    }
}

impl Grouping {
    /// The condition for documents that are in a group.
    pub fn in_a_group(&self) -> Document {
        let fields = self.by.iter().map(|field| {
            let kind = doc! {"$type": format!("${field}")};
            Bson::Document(doc! {"$not": [{"$in": [kind, NO_KEY.map(Bson::from).to_vec()]}]})
        });
        doc! {"$expr": {"$and": fields.collect::<Vec<_>>()}}
    }

    /// The values of a group, as an expression.
    pub fn key(&self) -> Document {
        let fields = self.by.iter().enumerate();
        fields.map(|(number, field)| (format!("k{number}"), format!("${field}").into())).collect()
    }

    /// What the documents of a group are compared by, as an expression.
    pub fn rank(&self) -> Document {
        doc! {"at": {"$ifNull": [format!("${}", self.keep_latest), Bson::Null]}, "id": "$_id"}
    }

    /// The stages that leave, of candidates, the `_id` of the winner per group.
    pub fn winners(&self) -> Vec<Document> {
        vec![
            doc! {"$match": self.in_a_group()},
            doc! {"$group": {"_id": self.key(), "w": {"$max": self.rank()}}},
            doc! {"$replaceWith": {"_id": "$w.id"}},
        ]
    }

    /// The stages that leave one `_id` for each group that has more documents.
    fn crowds(&self, which: Document) -> Vec<Document> {
        vec![
            doc! {"$match": self.in_a_group()},
            doc! {"$group": {"_id": self.key(), "n": {"$sum": 1_i64}, "x": which}},
            doc! {"$match": {"n": {"$gt": 1}}},
        ]
    }

    /// The same: the `_id` of any of its documents.
    pub fn crowded(&self) -> Vec<Document> {
        let mut stages = self.crowds(doc! {"$first": "$_id"});
        stages.push(doc! {"$replaceWith": {"_id": "$x"}});
        stages
    }

    /// The same: the `_id` of its lowest document.
    pub fn losers(&self) -> Vec<Document> {
        let mut stages = self.crowds(doc! {"$min": self.rank()});
        stages.push(doc! {"$replaceWith": {"_id": "$x.id"}});
        stages
    }

    /// The stages that count, of candidates, those that lose, as `n`.
    pub fn count_losers(&self) -> Vec<Document> {
        let mut stages = self.crowds(doc! {"$min": 1});
        stages.push(doc! {"$group": {"_id": Bson::Null, "n": {"$sum": {"$subtract": ["$n", 1]}}}});
        stages
    }

    /// The stages that count, of candidates, those that are valid, as `n`.
    pub fn count_valid(&self) -> Vec<Document> {
        let condition = self.in_a_group();
        let key = doc! {"$cond": [condition.get("$expr").cloned(), self.key(), Bson::Null]};
        vec![
            doc! {"$group": {"_id": key, "n": {"$sum": 1_i64}}},
            doc! {"$group": {"_id": Bson::Null, "n": {"$sum": {"$cond": [{"$eq": ["$_id", Bson::Null]}, "$n", 1_i64]}}}},
        ]
    }

    /// The condition that an index can follow to the documents of some groups. It
    /// holds for a few more: arrays with such a value.
    pub fn of_groups(&self, keys: &[Key]) -> RawDocumentBuf {
        // In a list a pattern would match, and a document with a `$` be refused.
        let is_plain =
            |key: &Key| !matches!(key.0.as_slice(), [RawBson::RegularExpression(_) | RawBson::Document(_)]);
        let (mut any, mut listed) = (Vec::new(), Vec::new());
        for key in keys {
            match (self.by.as_slice(), key.0.as_slice()) {
                ([_], [only]) if is_plain(key) => listed.push(only),
                (by, values) => {
                    let mut all = RawDocumentBuf::new();
                    for (field, found) in by.iter().zip(values) {
                        exact::append(&mut all, field, exact::equal(found).as_ref().into());
                    }
                    any.push(all);
                }
            }
        }
        if let ([field], false) = (self.by.as_slice(), listed.is_empty()) {
            any.push(exact::single(field, exact::one_of(listed).as_ref().into()));
        }
        match any.as_slice() {
            [only] => only.clone(),
            _ => rawdoc! {"$or": RawArrayBuf::from_iter(any)},
        }
    }

    /// The fields that tell the group of a document.
    pub fn projection(&self) -> Document {
        let mut fields = doc! {"_id": 1};
        for field in &self.by {
            // A path within another one would be refused.
            let is_within = self.by.iter().any(|other| field.starts_with(&format!("{other}.")));
            if !is_within {
                fields.insert(field, 1);
            }
        }
        fields
    }

    /// The group of a document; `None` where it is in none.
    pub fn key_of(&self, document: &RawDocument) -> Option<Key> {
        self.by.iter().map(|field| value_at(document, field)).collect::<Option<_>>().map(Key)
    }
}

/// The value at a path, as far as documents lead there; `None` for one by which
/// nothing is grouped.
fn value_at(document: &RawDocument, path: &str) -> Option<RawBson> {
    let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
    match (exact::field(document, name)?, rest) {
        (RawBson::Document(inner), Some(rest)) => value_at(&inner, rest),
        (_, Some(_)) | (RawBson::Null | RawBson::Undefined | RawBson::Array(_), None) => None,
        (value, None) => Some(value),
    }
}

impl Key {
    /// The values as bytes: what is equal here is the same group, though what
    /// differs may be it too, as 1 and 1.0.
    pub fn bytes(&self) -> Vec<u8> {
        let mut values = RawDocumentBuf::new();
        for (number, value) in self.0.iter().enumerate() {
            exact::append(&mut values, &number.to_string(), value.as_raw_bson_ref());
        }
        values.into_bytes()
    }

    /// Reads what [`Key::bytes`] made.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let values = RawDocument::from_bytes(bytes).ok()?;
        let names = values.iter_elements().map(|element| element.ok().map(|element| element.key().as_str()));
        names.map(|name| exact::field(values, name?)).collect::<Option<_>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grouping(by: &[&str]) -> Grouping {
        Grouping { by: by.iter().map(|field| (*field).into()).collect(), keep_latest: "at".into() }
    }

    #[test]
    fn a_condition_alone_is_a_plain_match() {
        assert!(Valid::default().is_everything() && Valid::default().stages().is_empty());
        let valid = Valid::condition(doc! {"a": 1});
        assert!(valid.is_condition() && !valid.is_everything());
        assert_eq!(
            valid.candidates(doc! {"_id": 1}),
            [doc! {"$match": {"_id": 1}}, doc! {"$match": {"a": 1}}]
        );
    }

    #[test]
    fn what_has_no_single_value_is_in_no_group() {
        let grouping = grouping(&["a.b", "c"]);
        assert!(grouping.key_of(&rawdoc! {"a": {"b": 1}, "c": "x"}).is_some());
        for none in [
            rawdoc! {"a": {"b": 1}},
            rawdoc! {"a": {"b": 1}, "c": null},
            rawdoc! {"a": {"b": 1}, "c": ["x"]},
            rawdoc! {"a": [{"b": 1}], "c": 1},
            rawdoc! {"a": 1, "c": 1},
            rawdoc! {"a.b": 1, "c": 1},
        ] {
            assert!(grouping.key_of(&none).is_none(), "{none:?}");
        }
    }

    #[test]
    fn keys_survive_being_stored() {
        let key = Key(vec![RawBson::Int32(1), "x".into(), rawdoc! {"$a": 1}.into()]);
        assert_eq!(Key::from_bytes(&key.bytes()), Some(key));
    }

    #[test]
    fn one_field_is_asked_for_by_a_list_and_patterns_are_taken_literally() {
        let pattern =
            bson::Regex { pattern: "^a".try_into().expect("text"), options: bson::cstr!("").to_owned() };
        let keys = [Key(vec![1.into()]), Key(vec!["a".into()])];
        assert_eq!(grouping(&["k"]).of_groups(&keys), rawdoc! {"k": {"$in": [1, "a"]}});
        let with_pattern = [Key(vec![RawBson::RegularExpression(pattern.clone())])];
        assert_eq!(grouping(&["k"]).of_groups(&with_pattern), rawdoc! {"k": {"$eq": pattern}});
        let two = [Key(vec![1.into(), 2.into()])];
        assert_eq!(grouping(&["k", "l"]).of_groups(&two), rawdoc! {"k": {"$eq": 1}, "l": {"$eq": 2}});
    }
}
