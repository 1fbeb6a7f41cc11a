//! Makes the target before the copy and finishes it afterwards.

use bson::{Bson, Document, doc};

use super::target::{self, PENDING, PENDING_INDEX, index_name};
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result};
use crate::event::{Events, Progress};
use crate::mongo::Mongo;
use crate::mongo::catalog::Description;
use crate::mongo::index::BuildProgress;

/// Describes the source, if it can be cleansed.
///
/// # Errors
/// A refusal where it can't.
pub async fn describe_source(mongo: &Mongo, source: &Namespace) -> Result<Description> {
    let Some(description) = mongo.describe(source).await? else {
        return Err(Error::refused(format!("there is no collection {source}"))
            .hint("check `cleanse.source`; names are case-sensitive"));
    };
    match target::refusal(&description, is_sharded(mongo, source).await?) {
        Some(reason) => Err(Error::refused(format!("{source} {reason}"))),
        None => Ok(description),
    }
}

/// Whether a collection is spread over shards.
///
/// # Errors
/// A stop where the server can't be asked.
pub(super) async fn is_sharded(mongo: &Mongo, namespace: &Namespace) -> Result<bool> {
    if mongo.hello().await?.get_str("msg").ok() != Some("isdbgrid") {
        return Ok(false);
    }
    let entries = mongo.database("config").collection::<Document>("collections");
    let filter = doc! {"_id": namespace.to_string(), "dropped": {"$ne": true}};
    Ok(entries.find_one(filter).await.during("looking whether the source is sharded")?.is_some())
}

/// Creates the target with the options of the source; returns its identity.
///
/// # Errors
/// A stop where the server refuses.
pub async fn create(mongo: &Mongo, namespace: &Namespace, source: &Description) -> Result<Bson> {
    let mut command = doc! {"create": &namespace.collection};
    command.extend(target::creation_options(source));
    command.insert("writeConcern", crate::mongo::majority_document());
    mongo.database(&namespace.database).run_command(command).await.during(format!("creating {namespace}"))?;
    identity(mongo, namespace).await
}

/// The identity of an existing target.
///
/// # Errors
/// A stop where it is gone.
pub async fn identity(mongo: &Mongo, namespace: &Namespace) -> Result<Bson> {
    let description = mongo.describe(namespace).await?;
    description
        .and_then(|description| description.uuid)
        .ok_or_else(|| Error::stopped(format!("{namespace} was just created and is gone")))
}

/// Whether a collection holds nothing.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn is_empty(mongo: &Mongo, namespace: &Namespace) -> Result<bool> {
    Ok(super::count::exactly(mongo, namespace, &Document::new()).await? == 0)
}

/// Builds the index that finds marked documents, on the still empty target.
///
/// # Errors
/// A stop where the server refuses.
pub async fn index_pending(mongo: &Mongo, namespace: &Namespace) -> Result<()> {
    let index = doc! {
        "name": PENDING_INDEX,
        "key": {PENDING: 1},
        "partialFilterExpression": {PENDING: true},
    };
    mongo.build_indexes(namespace, vec![index], |_| {}).await
}

/// When an index is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// After the copy.
    Copied,
    /// Once the target is a moment of the source, which breaks no unique index:
    /// the copy alone is many moments.
    CaughtUp,
    /// When nothing is copied any more: it deletes documents.
    Last,
}

impl When {
    fn of(index: &Document) -> Self {
        if index.contains_key("expireAfterSeconds") {
            Self::Last
        } else if index.get_bool("unique").unwrap_or(false) {
            Self::CaughtUp
        } else {
            Self::Copied
        }
    }
}

/// Builds those indexes of the source on the target whose time it is.
///
/// # Errors
/// A stop where one can't be built.
pub async fn indexes(
    mongo: &Mongo,
    namespace: &Namespace,
    source: &Description,
    when: When,
    events: &Events,
) -> Result<()> {
    match try_indexes(mongo, namespace, source, when, events).await? {
        None => Ok(()),
        Some((_, error)) => Err(error),
    }
}

/// The same; returns the values of documents that stand in each other's way under
/// a unique index, and what is to be said of them.
///
/// # Errors
/// As [`indexes`].
pub async fn try_indexes(
    mongo: &Mongo,
    namespace: &Namespace,
    source: &Description,
    when: When,
    events: &Events,
) -> Result<Option<(Document, Error)>> {
    let due: Vec<Document> =
        target::indexes(source).into_iter().filter(|index| When::of(index) == when).collect();
    if due.is_empty() {
        return Ok(None);
    }
    let names = due.iter().map(index_name).collect::<Vec<_>>().join(", ");
    let show = |seen: BuildProgress| {
        events.progress(Progress {
            phase: "indexes".into(),
            unit: "documents",
            done: seen.done,
            total: Some(seen.total),
            limited_by: Some("database".into()),
            detail: names.clone(),
        });
    };
    mongo.try_build_indexes(namespace, due, show).await
}

/// Sets what must not hold while the copy runs: validator and expiry. Returns
/// the number of documents that violate the validator.
///
/// # Errors
/// A stop where the server refuses.
pub async fn late_options(mongo: &Mongo, namespace: &Namespace, source: &Description) -> Result<u64> {
    let options = target::late_options(source);
    if options.is_empty() {
        return Ok(0);
    }
    let violations = match options.get_document("validator") {
        Ok(validator) if !validator.is_empty() => {
            super::count::exactly(mongo, namespace, &doc! {"$nor": [validator.clone()]}).await?
        }
        _ => 0,
    };
    let mut command = doc! {"collMod": &namespace.collection};
    command.extend(options);
    command.insert("writeConcern", crate::mongo::majority_document());
    mongo
        .database(&namespace.database)
        .run_command(command)
        .await
        .during(format!("setting the validator of {namespace}"))?;
    Ok(violations)
}
