//! Whether each legacy key has one new key, and each new key one legacy key.
//!
//! The database groups all documents that have a key and keeps the lowest and the
//! highest of the other key for each group: where these two are not the same,
//! there are several, and the two documents are the proof. So nothing grows with
//! the number of documents that share a key.

use bson::{Bson, Decimal128, Document, doc};
use futures_util::TryStreamExt;
use mongodb::options::Collation;
use serde_json::{Value, json};

use super::check::Check;
use crate::config::Target;
use crate::config::values::FieldPath;
use crate::error::{Context as _, Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::index::whole_number;

/// Doubles from here on no longer tell whole numbers apart.
const FIRST_INEXACT_DOUBLE: f64 = 9_007_199_254_740_992.0;

/// By what documents are grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Grouped {
    ByNewKey,
    ByLegacyKey,
}

impl Grouped {
    fn name(self) -> &'static str {
        match self {
            Self::ByNewKey => "unique new keys",
            Self::ByLegacyKey => "unique legacy keys",
        }
    }

    /// The field to group by, and the one of which there should be one.
    fn fields(self) -> (&'static str, &'static str) {
        match self {
            Self::ByNewKey => ("new", "legacy"),
            Self::ByLegacyKey => ("legacy", "new"),
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::ByNewKey => "new key of two legacy keys",
            Self::ByLegacyKey => "legacy key with two new keys",
        }
    }
}

/// What to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Whether a new key may stand for one legacy key only.
    pub new_keys: bool,
    /// Whether it was asked for by name: then nothing, or what can't be seen, is no pass.
    pub by_name: bool,
    /// Differences to list.
    pub most: usize,
}

/// Looks at the documents of all targets together.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn check(mongo: &Mongo, targets: &[Target], asked: Asked) -> Result<Vec<Check>> {
    let both = [Grouped::ByLegacyKey, Grouped::ByNewKey];
    let wanted = &both[..if asked.new_keys { 2 } else { 1 }];
    let mut keyed = Keyed::default();
    for target in targets {
        keyed.add(Keyed::of(mongo, target).await?);
    }
    let mut checks = Vec::new();
    for grouped in wanted {
        match (keyed.documents, keyed.with_both, asked.by_name) {
            // A backfill whose keys were all unknown to the API.
            (0, _, false) => {}
            (0, _, true) => checks.push(Check::nothing(grouped.name(), "no document has a new key")),
            (_, 0, _) => checks.push(Check::nothing(
                grouped.name(),
                "no document with a new key has a legacy key that can be read: is `legacy_field` right?",
            )),
            _ => checks.push(keyed.told(group(mongo, targets, *grouped, asked).await?)),
        }
    }
    Ok(checks)
}

/// Documents that have a new key.
#[derive(Debug, Clone, Copy, Default)]
struct Keyed {
    documents: u64,
    /// Those of them whose legacy key can be read; only these are grouped.
    with_both: u64,
}

impl Keyed {
    async fn of(mongo: &Mongo, target: &Target) -> Result<Self> {
        let is_read = doc! {"$ne": [identity(&target.legacy_field), Bson::Null]};
        let pipeline = vec![
            doc! {"$match": has_new_key(target)},
            doc! {"$group": {
                "_id": Bson::Null,
                "documents": {"$sum": 1_i64},
                "with_both": {"$sum": {"$cond": [is_read, 1_i64, 0_i64]}},
            }},
        ];
        let collection = mongo.collection(&target.namespace);
        let counted = retrying(format!("counting the keys of {}", target.namespace), || {
            let aggregate = collection.aggregate(pipeline.clone());
            async move { aggregate.await?.with_type::<Document>().try_next().await }
        })
        .await?;
        let count = |name: &str| {
            counted.as_ref().and_then(|counted| counted.get(name)).and_then(whole_number).unwrap_or(0)
        };
        Ok(Self { documents: count("documents"), with_both: count("with_both") })
    }

    fn add(&mut self, other: Self) {
        self.documents += other.documents;
        self.with_both += other.with_both;
    }

    /// The check, with what it is about.
    fn told(self, check: Check) -> Check {
        let left_out = self.documents - self.with_both;
        let check = check.with("documents", json!(self.documents)).with("left_out", json!(left_out));
        if left_out == 0 {
            return check;
        }
        let told = format!("{left_out} documents with a new key have no legacy key that can be read");
        let remark = check.remark.as_ref().map_or(told.clone(), |remark| format!("{remark}; {told}"));
        check.remark(remark)
    }
}

fn has_new_key(target: &Target) -> Document {
    doc! {target.key_field.as_str(): {"$ne": Bson::Null}}
}

async fn group(mongo: &Mongo, targets: &[Target], grouped: Grouped, asked: Asked) -> Result<Check> {
    let (mut found, mut differences) = (0_u64, Vec::new());
    let mut databases: Vec<&str> = targets.iter().map(|target| target.namespace.database.as_str()).collect();
    databases.sort_unstable();
    databases.dedup();
    for database in &databases {
        let of_database: Vec<&Target> =
            targets.iter().filter(|target| target.namespace.database == *database).collect();
        found += group_in(mongo, &of_database, grouped, asked.most, &mut differences).await?;
    }
    let check = Check::of(grouped.name(), json!(0), json!(found), differences);
    if databases.len() < 2 {
        return Ok(Check { passed: found == 0, ..check });
    }
    // The server groups within one database; what it can't see may not pass where it was asked for.
    Ok(Check { passed: found == 0 && !asked.by_name, ..check }.remark(
        "the targets are of several databases, which the server can't group together: each was looked at by itself",
    ))
}

async fn group_in(
    mongo: &Mongo,
    targets: &[&Target],
    grouped: Grouped,
    most: usize,
    differences: &mut Vec<Value>,
) -> Result<u64> {
    let Some((first, others)) = targets.split_first() else { return Ok(0) };
    let pipeline = pipeline(first, others, grouped);
    let collection = mongo.collection(&first.namespace);
    let operation = format!("grouping the keys of {}", first.namespace);
    let mut cursor = retrying(&operation, || {
        let aggregate = collection.aggregate(pipeline.clone()).allow_disk_use(true);
        // Not the collection's own: two keys that differ in case are two keys.
        let aggregate = aggregate.collation(Collation::builder().locale("simple").build());
        async move { aggregate.await }
    })
    .await?
    .with_type::<Document>();
    let mut found = 0;
    while cursor.advance().await.during(&operation)? {
        found += 1;
        if differences.len() < most {
            let group = cursor.deserialize_current().during(&operation)?;
            differences.push(difference(&group, grouped)?);
        }
    }
    Ok(found)
}

fn pipeline(first: &Target, others: &[&Target], grouped: Grouped) -> Vec<Document> {
    let mut pipeline = keys_of(first);
    for other in others {
        pipeline.push(doc! {"$unionWith": {"coll": &other.namespace.collection, "pipeline": keys_of(other)}});
    }
    let (by, one) = grouped.fields();
    let with_document = doc! {"key": format!("${one}"), "at": "$at"};
    pipeline.push(doc! {"$group": {
        "_id": format!("${by}"),
        "documents": {"$sum": 1_i64},
        "low": {"$min": with_document.clone()},
        "high": {"$max": with_document},
    }});
    pipeline.push(doc! {"$match": {"$expr": {"$ne": ["$low.key", "$high.key"]}}});
    pipeline
}

/// New key, legacy key and whereabouts of the documents that have both.
fn keys_of(target: &Target) -> Vec<Document> {
    let namespace = target.namespace.to_string();
    vec![
        doc! {"$match": has_new_key(target)},
        doc! {"$project": {
            "_id": 0,
            "new": format!("${}", target.key_field),
            "legacy": identity(&target.legacy_field),
            "at": {"collection": {"$literal": namespace}, "_id": "$_id"},
        }},
        doc! {"$match": {"legacy": {"$ne": Bson::Null}}},
    ]
}

/// The identity of a legacy key as an expression, see [`crate::legacy_key`]: its
/// text, but for UUIDs, which no expression turns into text; null for what is no
/// usable key.
fn identity(field: &FieldPath) -> Document {
    let value = format!("${field}");
    let is = |name: &str| doc! {"$eq": [{"$type": &value}, name]};
    let between = |low: Bson, high: Bson| doc! {"$and": [{"$gt": [&value, low]}, {"$lt": [&value, high]}]};
    let infinity = |sign: &str| -> Bson {
        format!("{sign}Infinity").parse::<Decimal128>().map_or(Bson::Null, Bson::Decimal128)
    };
    let whole = doc! {"$and": [
        between((-FIRST_INEXACT_DOUBLE).into(), FIRST_INEXACT_DOUBLE.into()),
        {"$eq": [&value, {"$trunc": &value}]},
    ]};
    let branch = |case: Document, then: Bson| Bson::Document(doc! {"case": case, "then": then});
    let text = || Bson::Document(doc! {"$toString": &value});
    doc! {"$switch": {
        "branches": [
            branch(is("string"), doc! {"$cond": [{"$eq": [&value, ""]}, Bson::Null, &value]}.into()),
            branch(doc! {"$in": [{"$type": &value}, ["int", "long", "objectId"]]}, text()),
            // By way of a whole number, which has no sign of zero.
            branch(is("double"), doc! {"$cond": [whole, {"$toString": {"$toLong": &value}}, Bson::Null]}.into()),
            branch(
                is("decimal"),
                doc! {"$cond": [between(infinity("-"), infinity("")), text(), Bson::Null]}.into(),
            ),
            branch(is("binData"), (&value).into()),
        ],
        "default": Bson::Null,
    }}
}

fn difference(group: &Document, grouped: Grouped) -> Result<Value> {
    let at = |name: &str| {
        let at = group
            .get_document(name)
            .and_then(|end| end.get_document("at"))
            .map_err(|error| Error::stopped(format!("a group of keys can't be read: {error}")))?;
        Ok(json!({
            "collection": at.get_str("collection").unwrap_or_default(),
            "_id": at.get("_id").cloned().unwrap_or(Bson::Null).into_canonical_extjson(),
        }))
    };
    Ok(json!({
        "kind": grouped.kind(),
        "documents": group.get("documents").and_then(whole_number).unwrap_or(0),
        "between": [at("low")?, at("high")?],
    }))
}
