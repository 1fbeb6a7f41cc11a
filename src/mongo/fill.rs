//! Filling keys from a collection of answers, within the database.
//!
//! The text of a legacy key is computed by the server, by the rule of
//! [`legacy_key`](crate::legacy_key), for the types whose text is the same there
//! and here. `$merge` writes by a pipeline that is guarded like every write: key
//! and flag are still missing, the path can be written, and the legacy value
//! still has the text that was looked up.

use bson::{Bson, Decimal128, Document, RawBson, doc};
use mongodb::Collection;

use super::Mongo;
use super::command::retrying;
use super::index::whole_number;
use super::operation::Operation;
use super::source::{TargetCollection, collect};
use crate::config::values::{FieldPath, Namespace};
use crate::error::Result;

/// Doubles from here on no longer tell whole numbers apart.
const FIRST_INEXACT_DOUBLE: f64 = 9_007_199_254_740_992.0;

impl Mongo {
    /// Copies the answers that are keys beside the collections that they go to,
    /// because `$lookup` sees one database only. What was there is replaced once
    /// the copy is whole. It is never sent again by itself.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide.
    pub async fn copy_found_keys(
        &self,
        operation: &mut Operation,
        key_map: &Namespace,
        to: &Namespace,
        comment: &str,
    ) -> mongodb::error::Result<()> {
        let stages = vec![
            doc! {"$match": {"outcome": "found", "newKey": {"$type": "string"}, "held": {"$ne": true}}},
            doc! {"$project": {"newKey": 1}},
            doc! {"$out": {"db": &to.database, "coll": &to.collection}},
        ];
        self.run_writing_pipeline(operation, key_map, stages, None, comment).await
    }

    /// Drops a collection, where it exists.
    ///
    /// # Errors
    /// A stop where it can't be dropped.
    pub async fn drop_collection(&self, namespace: &Namespace) -> Result<()> {
        let collection = self.collection(namespace);
        retrying(format!("dropping {namespace}"), || {
            let drop = collection.drop();
            async move { drop.await }
        })
        .await
    }
}

impl TargetCollection {
    /// The `_id` of the candidate so many places after `last`, up to `bound`;
    /// `None` where there are fewer.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn nth_after(
        &self,
        last: Option<&RawBson>,
        bound: &RawBson,
        count: u64,
    ) -> Result<Option<RawBson>> {
        let filter = self.range_filter(last, Some(bound))?;
        let namespace = &self.target.namespace;
        let found = retrying(format!("looking ahead in {namespace}"), || {
            let mut find = self
                .primary()
                .find(filter.clone())
                .sort(doc! {"_id": 1})
                .skip(count.saturating_sub(1))
                .limit(1)
                .projection(doc! {"_id": 1});
            if let Some(hint) = self.hint() {
                find = find.hint(hint);
            }
            collect(find)
        })
        .await?;
        Ok(found.first().and_then(|document| document.get("_id").ok().flatten()).map(Into::into))
    }

    /// Candidates after `last`, up to and including `end`, as the primary sees
    /// them.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn count_between(&self, last: Option<&RawBson>, end: &RawBson) -> Result<u64> {
        let pipeline = vec![doc! {"$match": self.range_filter(last, Some(end))?}, doc! {"$count": "n"}];
        let collection: Collection<Document> = self.primary().clone_with_type();
        let counted = retrying(format!("counting candidates of {}", self.target.namespace), || {
            let mut aggregate = collection.aggregate(pipeline.clone());
            if let Some(hint) = self.hint() {
                aggregate = aggregate.hint(hint);
            }
            async move {
                let mut cursor = aggregate.await?;
                Ok(if cursor.advance().await? { Some(cursor.deserialize_current()?) } else { None })
            }
        })
        .await?;
        Ok(counted.and_then(|counted| counted.get("n").and_then(whole_number)).unwrap_or(0))
    }

    /// Fills the candidates after `last`, up to and including `end`, whose key
    /// stands in `keys`, a collection of the same database. It is never sent
    /// again by itself, but may be: every write is guarded.
    ///
    /// Not for collections with a collation, where equal is not the same.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide: the documents before the
    /// one that was refused may be written.
    pub async fn fill_from(
        &self,
        mongo: &Mongo,
        operation: &mut Operation,
        keys: &str,
        candidates: Document,
        comment: &str,
    ) -> mongodb::error::Result<()> {
        let stages = self.fill_stages(keys, candidates);
        mongo.run_writing_pipeline(operation, &self.target.namespace, stages, self.hint(), comment).await
    }

    /// The condition for candidates of a range, for [`Self::fill_from`].
    ///
    /// # Errors
    /// A stop where an `_id` can't be encoded.
    pub fn between(&self, last: Option<&RawBson>, end: &RawBson) -> Result<Document> {
        self.range_filter(last, Some(end))
    }

    fn fill_stages(&self, keys: &str, candidates: Document) -> Vec<Document> {
        let target = &self.target;
        let text = legacy_text(&target.legacy_field);
        let mut usable = self.writable_conditions();
        // `$merge` refuses an `_id` that is null, and with it the whole range.
        usable.push(doc! {"$not": [{"$in": [{"$type": "$_id"}, ["null", "undefined"]]}]});
        let absent = |field: &FieldPath| doc! {"$in": [{"$type": format!("${field}")}, ["null", "missing"]]};
        let mut guard = self.writable_conditions();
        guard.extend([absent(&target.key_field), absent(&target.flag_field)]);
        guard.push(doc! {"$eq": [text.clone(), "$$new.k"]});
        let filled = with_field(&target.key_field, "$$new.n".into());
        vec![
            doc! {"$match": candidates},
            doc! {"$project": {"k": {"$cond": [{"$and": usable}, text, "$$REMOVE"]}}},
            doc! {"$match": {"k": {"$type": "string", "$ne": ""}}},
            doc! {"$lookup": {"from": keys, "localField": "k", "foreignField": "_id", "as": "m"}},
            doc! {"$match": {"m.0": {"$exists": true}}},
            doc! {"$project": {"k": 1, "n": {"$arrayElemAt": ["$m.newKey", 0]}}},
            doc! {"$merge": {
                "into": &target.namespace.collection,
                "on": "_id",
                // Not `$set`: it would write into the elements of an array on the way.
                "whenMatched": [{"$replaceWith": {"$cond": [{"$and": guard}, filled, "$$ROOT"]}}],
                "whenNotMatched": "discard",
            }},
        ]
    }
}

/// The text of a legacy key, as an expression; missing where the server can't
/// tell it or the value is no usable key.
fn legacy_text(field: &FieldPath) -> Document {
    let field = format!("${field}");
    let type_in = |names: &[&str]| doc! {"$in": [{"$type": &field}, names.to_vec()]};
    let between = |low: Bson, high: Bson| vec![doc! {"$gt": [&field, low]}, doc! {"$lt": [&field, high]}];
    let infinite = |text: &str| text.parse::<Decimal128>().map_or(Bson::Null, Bson::Decimal128);
    let finite = between(infinite("-Infinity"), infinite("Infinity"));
    let mut whole = between((-FIRST_INEXACT_DOUBLE).into(), FIRST_INEXACT_DOUBLE.into());
    whole.push(doc! {"$eq": [{"$trunc": &field}, &field]});
    let is = |name: &str, mut conditions: Vec<Document>| {
        conditions.insert(0, type_in(&[name]));
        doc! {"$and": conditions}
    };
    doc! {"$switch": {
        "branches": [
            {"case": type_in(&["string"]), "then": &field},
            {"case": type_in(&["int", "long", "objectId"]), "then": {"$toString": &field}},
            // As a whole number, because a double has other forms: 1e+15, -0.
            {"case": is("double", whole), "then": {"$toString": {"$toLong": &field}}},
            {"case": is("decimal", finite), "then": {"$toString": &field}},
        ],
        "default": "$$REMOVE",
    }}
}

/// The document with one field set, as an expression that leaves all other
/// fields as they are, whatever their names.
fn with_field(path: &FieldPath, value: Bson) -> Document {
    let mut expression = value;
    let mut path = path.as_str();
    loop {
        let (parent, name) =
            path.rsplit_once('.').map_or((None, path), |(parent, name)| (Some(parent), name));
        let above = parent.map_or("$$ROOT".into(), |parent| format!("${parent}"));
        let merged = doc! {"$mergeObjects": [above, {name: expression}]};
        match parent {
            None => return merged,
            Some(parent) => path = parent,
        }
        expression = merged.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dotted_field_is_set_within_its_parents() {
        let path: FieldPath = "a.b".parse().expect("a path");
        assert_eq!(
            with_field(&path, "x".into()),
            doc! {"$mergeObjects": ["$$ROOT", {"a": {"$mergeObjects": ["$a", {"b": "x"}]}}]}
        );
        let path: FieldPath = "k".parse().expect("a path");
        assert_eq!(with_field(&path, "x".into()), doc! {"$mergeObjects": ["$$ROOT", {"k": "x"}]});
    }
}
