//! Flags that a backfill has written: found, and taken back.
//!
//! No index knows the flags, so a collection is read from end to end, in the
//! order of `_id`, a page at a time. Whatever else stands in a flag field is the
//! application's and stays.

use bson::{Document, RawBson, RawDocument, doc};

use super::Mongo;
use super::command::retrying;
use super::sink::FlagReason;
use super::source::{LegacyValue, collect, legacy_projection, to_bson, to_bson_array};
use crate::config::Target;
use crate::error::Result;

/// Which flags are meant.
#[derive(Debug, Clone, Copy)]
pub struct Flags<'a> {
    /// Why they were written.
    pub reason: FlagReason,
    /// By which job, where that matters.
    pub job: Option<&'a str>,
}

/// A flagged document.
#[derive(Debug, Clone, PartialEq)]
pub struct Flagged {
    /// The `_id`, any type.
    pub id: RawBson,
    /// The legacy value as it is now.
    pub legacy: LegacyValue,
}

impl Mongo {
    /// The next flagged documents whose key is still missing after an `_id`, in
    /// the order of `_id`; an empty page is the end. As the primary sees them.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn flagged(
        &self,
        target: &Target,
        flags: Flags<'_>,
        after: Option<&RawBson>,
        limit: i64,
    ) -> Result<Vec<Flagged>> {
        let filter = filter(target, flags, after)?;
        let mut projection = legacy_projection(&target.legacy_field);
        projection.insert("_id", 1);
        let collection = self.collection(&target.namespace);
        let is_clustered = self.describe_target(target).await?.is_clustered();
        let documents = retrying(format!("looking for flags in {}", target.namespace), || {
            let mut find = collection
                .find(filter.clone())
                .sort(doc! {"_id": 1})
                .limit(limit)
                .projection(projection.clone());
            if !is_clustered {
                // Any other plan would sort what it finds, for each page.
                find = find.hint(mongodb::options::Hint::Keys(doc! {"_id": 1}));
            }
            collect(find)
        })
        .await?;
        Ok(documents.iter().filter_map(|document| read(document)).collect())
    }

    /// Takes the flags of these documents back, durable on a majority; says how
    /// many. Those that are no longer what they were are left alone, so it may
    /// be sent twice.
    ///
    /// # Errors
    /// A stop where the server can't be written.
    pub async fn clear_flags(&self, target: &Target, flags: Flags<'_>, flagged: &[Flagged]) -> Result<u64> {
        let mut filter = filter(target, flags, None)?;
        filter.insert("_id", doc! {"$in": to_bson_array(flagged.iter().map(|flagged| &flagged.id))?});
        let unset = doc! {"$unset": {target.flag_field.as_str(): ""}};
        let collection = self.collection(&target.namespace);
        let updated = retrying(format!("clearing flags in {}", target.namespace), || {
            let update = collection.update_many(filter.clone(), unset.clone());
            async move { update.await }
        })
        .await?;
        Ok(updated.modified_count)
    }
}

fn filter(target: &Target, flags: Flags<'_>, after: Option<&RawBson>) -> Result<Document> {
    let flag = &target.flag_field;
    let mut conditions = Vec::new();
    if let Some(after) = after {
        conditions.push(doc! {"$gt": ["$_id", {"$literal": to_bson(after)?}]});
    }
    conditions.push(is_ours(target, flags));
    let mut filter = doc! {format!("{flag}.reason"): flags.reason.as_str(), "$expr": {"$and": conditions}};
    if !target.filter.0.is_empty() {
        filter.insert("$and", vec![target.filter.0.clone()]);
    }
    Ok(filter)
}

/// A flag of the shape that only a backfill writes, beside a missing key.
fn is_ours(target: &Target, flags: Flags<'_>) -> Document {
    let flag = format!("${}", target.flag_field);
    let is_type = |path: String, name: &str| doc! {"$eq": [{"$type": path}, name]};
    let mut conditions = vec![
        same_bytes(&format!("{flag}.reason"), flags.reason.as_str()),
        is_type(format!("{flag}.at"), "date"),
        is_type(format!("{flag}.job"), "string"),
        doc! {"$in": [{"$type": format!("${}", target.key_field)}, ["null", "missing"]]},
    ];
    if let Some(job) = flags.job {
        conditions.push(same_bytes(&format!("{flag}.job"), job));
    }
    // `$cond` keeps the conditions away from arrays, whose paths mean something else.
    doc! {"$cond": [is_type(flag, "object"), {"$and": conditions}, false]}
}

/// Whether a field is just this text, whatever the collation thinks is equal.
fn same_bytes(path: &str, text: &str) -> Document {
    let length = i64::try_from(text.len()).unwrap_or(i64::MAX);
    let same = doc! {"$and": [
        {"$eq": [{"$strLenBytes": path}, length]},
        {"$eq": [{"$indexOfBytes": [path, {"$literal": text}]}, 0]},
    ]};
    doc! {"$cond": [{"$eq": [{"$type": path}, "string"]}, same, false]}
}

fn read(document: &RawDocument) -> Option<Flagged> {
    let value = |name: &str| document.get(name).ok().flatten().map(RawBson::from);
    let type_name = document.get_str("t").unwrap_or("missing").to_owned();
    Some(Flagged { id: value("_id")?, legacy: LegacyValue { type_name, value: value("v") } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::Bson;

    use crate::config::values::ExtendedJson;

    #[test]
    fn the_key_must_be_missing_and_the_job_is_compared_only_where_it_is_given() {
        let target = Target {
            name: "users".into(),
            namespace: "app.users".parse().expect("a namespace"),
            legacy_field: "legacyKey".parse().expect("a path"),
            key_field: "a.newKey".parse().expect("a path"),
            flag_field: "a.flag".parse().expect("a path"),
            filter: ExtendedJson(doc! {"x": 1}),
        };
        let flags = Flags { reason: FlagReason::NotFound, job: None };
        let any = filter(&target, flags, None).expect("a filter");
        assert_eq!(any.get("a.flag.reason"), Some(&Bson::from("not_found")));
        assert!(any.contains_key("$and") && any.to_string().contains("$a.newKey"), "{any}");
        let one = filter(&target, Flags { job: Some("j"), ..flags }, None).expect("a filter");
        assert_ne!(any, one);
    }
}
