//! The partial index that holds exactly the candidates of a target.
//!
//! An index on `_id`, key and flag, partial on both being null or missing: its
//! size is the work that is left, and a chunk costs as many keys as it has
//! documents. A hint on a partial index that is not what we think silently
//! hides documents, so the stored definition is compared before every use.

use std::time::Duration;

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;

use super::Mongo;
use super::catalog::Description;
use super::command::retrying;
use crate::config::Target;
use crate::config::values::{FieldPath, Namespace};
use crate::error::{Context, Error, Result};

/// How the stored index relates to the one that a target needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IndexState {
    /// There is no index of the name.
    Missing,
    /// It is what it should be.
    Ready,
    /// There is one of the name with another definition; the difference.
    Different(String),
}

/// Progress of an index build, in documents or keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuildProgress {
    /// Done so far in the current phase.
    pub done: u64,
    /// In all in the current phase.
    pub total: u64,
}

/// The values that two documents share where a unique index can't be built.
fn duplicate_values(error: &mongodb::error::Error) -> Option<Document> {
    let reply = Document::try_from(error.server_response()?.as_ref()).ok()?;
    reply.get_document("keyValue").ok().cloned()
}

/// Name of a target's index.
pub fn name(target: &Target) -> String {
    format!("mongorekey_{}", target.name)
}

fn keys(target: &Target) -> Document {
    doc! {"_id": 1, target.key_field.as_str(): 1, target.flag_field.as_str(): 1}
}

fn partial_filter(target: &Target) -> Document {
    doc! {target.key_field.as_str(): Bson::Null, target.flag_field.as_str(): Bson::Null}
}

/// Compares what is stored with what the target needs.
pub fn compare(target: &Target, collection: &Description) -> IndexState {
    let Some(stored) = collection.index(&name(target)) else { return IndexState::Missing };
    match difference(target, collection, stored) {
        None => IndexState::Ready,
        Some(difference) => IndexState::Different(difference),
    }
}

fn difference(target: &Target, collection: &Description, stored: &Document) -> Option<String> {
    let shown = |value: Option<&Document>| value.map_or("none".into(), ToString::to_string);
    let stored_keys = stored.get_document("key").ok();
    if !stored_keys.is_some_and(|stored| same_key_pattern(stored, &keys(target))) {
        return Some(format!("its keys are {}, needed are {}", shown(stored_keys), keys(target)));
    }
    let stored_filter = stored.get_document("partialFilterExpression").ok();
    if !stored_filter.is_some_and(|stored| same_conditions(stored, &partial_filter(target))) {
        return Some(format!(
            "its partial filter is {}, needed is {}",
            shown(stored_filter),
            partial_filter(target)
        ));
    }
    let stored_collation = stored.get_document("collation").ok();
    if stored_collation != collection.collation() {
        return Some(format!(
            "its collation is {}, the collection's is {}",
            shown(stored_collation),
            shown(collection.collation())
        ));
    }
    let set = |option: &str| stored.get_bool(option).unwrap_or(false);
    if set("hidden") {
        return Some("it is hidden".into());
    }
    if set("sparse") || stored.contains_key("expireAfterSeconds") {
        return Some("it is sparse or a TTL index".into());
    }
    None
}

fn same_key_pattern(stored: &Document, needed: &Document) -> bool {
    let one = |value: &Bson| matches!(value, Bson::Int32(1) | Bson::Int64(1)) || value.as_f64() == Some(1.0);
    stored.keys().eq(needed.keys()) && stored.values().all(one)
}

fn same_conditions(stored: &Document, needed: &Document) -> bool {
    let is_null =
        |value: &Bson| *value == Bson::Null || value.as_document() == Some(&doc! {"$eq": Bson::Null});
    stored.len() == needed.len() && needed.keys().all(|key| stored.get(key).is_some_and(is_null))
}

impl Mongo {
    /// Builds the index of a target, telling `progress` about it every second.
    ///
    /// # Errors
    /// A stop where the server refuses or the build fails.
    pub async fn create_index(&self, target: &Target, progress: impl Fn(BuildProgress)) -> Result<()> {
        let index = doc! {
            "name": name(target),
            "key": keys(target),
            "partialFilterExpression": partial_filter(target),
        };
        self.build_indexes(&target.namespace, vec![index], progress).await
    }

    /// Builds indexes, telling `progress` about it every second. Those that
    /// exist already are left as they are.
    ///
    /// # Errors
    /// A stop where the server refuses or the build fails.
    pub async fn build_indexes(
        &self,
        namespace: &Namespace,
        indexes: Vec<Document>,
        progress: impl Fn(BuildProgress),
    ) -> Result<()> {
        match self.try_build_indexes(namespace, indexes, progress).await? {
            None => Ok(()),
            Some((_, error)) => Err(error),
        }
    }

    /// The same; returns the values of the first two documents that stand in each
    /// other's way under a unique index, and what is to be said of them.
    ///
    /// # Errors
    /// As [`Mongo::build_indexes`].
    pub async fn try_build_indexes(
        &self,
        namespace: &Namespace,
        indexes: Vec<Document>,
        progress: impl Fn(BuildProgress),
    ) -> Result<Option<(Document, Error)>> {
        let names: Vec<String> =
            indexes.iter().filter_map(|index| index.get_str("name").ok()).map(Into::into).collect();
        let command = doc! {
            "createIndexes": &namespace.collection,
            "indexes": indexes,
            "writeConcern": {"w": "majority"},
            "comment": "mongorekey index build",
        };
        let database = self.database(&namespace.database);
        let operation = format!("building {} on {namespace}", names.join(", "));
        let build = retrying(&operation, || {
            let build = database.run_command(command.clone());
            async move {
                match build.await {
                    Err(error) => {
                        duplicate_values(&error).map(|values| Some((values, error.clone()))).ok_or(error)
                    }
                    Ok(_) => Ok(None),
                }
            }
        });
        let watch = self.watch_build(&names, progress);
        let duplicate = tokio::select! {
            result = build => result?,
            never = watch => match never {},
        };
        Ok(duplicate.map(|(values, error)| {
            let failed: Result<()> = Err(error).during(&operation);
            (values, failed.err().unwrap_or_else(|| Error::stopped(operation)))
        }))
    }

    /// Drops the target's index; says whether there was one.
    ///
    /// # Errors
    /// A stop where the server refuses.
    pub async fn drop_index(&self, target: &Target) -> Result<bool> {
        let Some(collection) = self.describe(&target.namespace).await? else { return Ok(false) };
        if collection.index(&name(target)).is_none() {
            return Ok(false);
        }
        self.collection(&target.namespace).drop_index(name(target)).await.during(format!(
            "dropping the index {} on {}",
            name(target),
            target.namespace
        ))?;
        Ok(true)
    }

    /// Bytes that the target's index takes on disk.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn index_size(&self, target: &Target) -> Result<u64> {
        let pipeline = vec![doc! {"$collStats": {"storageStats": {}}}];
        let collection = self.collection(&target.namespace).clone_with_type::<Document>();
        let stats: Vec<Document> =
            retrying(format!("reading the statistics of {}", target.namespace), || {
                let cursor = collection.aggregate(pipeline.clone());
                async move { cursor.await?.try_collect().await }
            })
            .await?;
        let size = stats
            .first()
            .and_then(|stats| stats.get_document("storageStats").ok())
            .and_then(|storage| storage.get_document("indexSizes").ok())
            .and_then(|sizes| sizes.get(name(target)))
            .and_then(whole_number);
        Ok(size.unwrap_or(0))
    }

    async fn watch_build(
        &self,
        indexes: &[String],
        progress: impl Fn(BuildProgress),
    ) -> std::convert::Infallible {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            // Without the privilege to see operations the build goes on unseen.
            if let Ok(Some(seen)) = self.build_progress(indexes).await {
                progress(seen);
            }
        }
    }

    async fn build_progress(&self, indexes: &[String]) -> mongodb::error::Result<Option<BuildProgress>> {
        let pipeline = [
            doc! {"$currentOp": {"allUsers": true}},
            doc! {"$match": {"progress": {"$exists": true}, "$or": [
                {"command.indexes.name": {"$in": indexes}},
                {"msg": {"$regex": "^Index Build"}},
            ]}},
        ];
        let operations: Vec<Document> = self.admin().aggregate(pipeline).await?.try_collect().await?;
        Ok(operations.iter().find_map(|operation| {
            let progress = operation.get_document("progress").ok()?;
            Some(BuildProgress {
                done: whole_number(progress.get("done")?)?,
                total: whole_number(progress.get("total")?)?,
            })
        }))
    }
}

/// A refusal for a target whose index is not ready.
pub fn refusal(target: &Target, state: &IndexState) -> Error {
    let name = name(target);
    let namespace = &target.namespace;
    match state {
        IndexState::Different(difference) => Error::refused(format!(
            "the index {name} on {namespace} is not the one that is needed: {difference}"
        ))
        .hint("drop it with `mongorekey index drop`, then run `mongorekey index create`"),
        _ => {
            Error::refused(format!("{namespace} has no index {name}: every chunk would scan the collection"))
                .hint("run `mongorekey index create` first (or pass --allow-collection-scan)")
        }
    }
}

/// A count as it is stored; [`whole_number`] reads it back.
pub(crate) fn stored_count(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A whole number of any numeric type, not below zero.
pub(crate) fn whole_number(value: &Bson) -> Option<u64> {
    match value {
        Bson::Int32(number) => u64::try_from(*number).ok(),
        Bson::Int64(number) => u64::try_from(*number).ok(),
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be a count")]
        Bson::Double(number) if (0.0..9e15).contains(number) => Some(*number as u64),
        _ => None,
    }
}

/// The name of an index that finds every document by that field's value; `None`
/// where there is none, or a collation makes different keys equal.
pub fn finds_by(field: &FieldPath, description: &Description) -> Option<String> {
    if description.collation().is_some() {
        return None;
    }
    let usable = |index: &&Document| {
        let leads = index
            .get_document("key")
            .ok()
            .and_then(|keys| keys.iter().next())
            .is_some_and(|(name, order)| name == field.as_str() && whole_number_or_negative(order));
        leads
            && !index.contains_key("partialFilterExpression")
            && !index.contains_key("collation")
            && !index.get_bool("hidden").unwrap_or(false)
    };
    description.indexes.iter().find(usable).and_then(|index| index.get_str("name").ok()).map(Into::into)
}

/// Ascending or descending, as opposed to hashed, text and others.
fn whole_number_or_negative(order: &Bson) -> bool {
    matches!(order, Bson::Int32(_) | Bson::Int64(_) | Bson::Double(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> Target {
        Target {
            name: "users".into(),
            namespace: "app.users".parse().expect("a namespace"),
            legacy_field: "legacyKey".parse().expect("a path"),
            key_field: "newKey".parse().expect("a path"),
            flag_field: "newKeyFlag".parse().expect("a path"),
            filter: crate::config::values::ExtendedJson::default(),
        }
    }

    fn state(index: Document, options: Document) -> IndexState {
        let collection = Description { kind: "collection".into(), options, uuid: None, indexes: vec![index] };
        compare(&target(), &collection)
    }

    fn good() -> Document {
        doc! {
            "name": "mongorekey_users",
            "key": {"_id": 1, "newKey": 1, "newKeyFlag": 1},
            "partialFilterExpression": {"newKey": Bson::Null, "newKeyFlag": Bson::Null},
        }
    }

    #[test]
    fn the_index_we_build_is_accepted() {
        assert_eq!(state(good(), Document::new()), IndexState::Ready);
        let mut as_doubles = good();
        as_doubles.insert("key", doc! {"_id": 1.0, "newKey": 1.0, "newKeyFlag": 1.0});
        assert_eq!(state(as_doubles, Document::new()), IndexState::Ready);
    }

    #[test]
    fn any_other_definition_is_refused_with_the_difference() {
        let variants = [
            ("key", Bson::Document(doc! {"newKey": 1, "_id": 1, "newKeyFlag": 1})),
            ("key", Bson::Document(doc! {"_id": -1, "newKey": 1, "newKeyFlag": 1})),
            ("partialFilterExpression", Bson::Document(doc! {"newKey": Bson::Null})),
            ("partialFilterExpression", Bson::Document(doc! {"newKey": Bson::Null, "newKeyFlag": true})),
            (
                "partialFilterExpression",
                Bson::Document(doc! {"newKey": Bson::Null, "newKeyFlag": Bson::Null, "a": 1}),
            ),
            ("collation", Bson::Document(doc! {"locale": "en"})),
            ("hidden", Bson::Boolean(true)),
            ("sparse", Bson::Boolean(true)),
        ];
        for (field, value) in variants {
            let mut index = good();
            index.insert(field, value);
            assert!(matches!(state(index.clone(), Document::new()), IndexState::Different(_)), "{index}");
        }
        let mut other_name = good();
        other_name.insert("name", "other");
        assert_eq!(state(other_name, Document::new()), IndexState::Missing);
    }

    #[test]
    fn the_collation_must_be_the_collections_own() {
        let collation = doc! {"locale": "en", "strength": 2};
        let mut index = good();
        index.insert("collation", collation.clone());
        assert_eq!(state(index, doc! {"collation": collation.clone()}), IndexState::Ready);
        assert!(matches!(state(good(), doc! {"collation": collation}), IndexState::Different(_)));
    }
}
