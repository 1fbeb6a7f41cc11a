//! The quarantine: where rejected documents go instead of being left behind, so
//! that what is kept and what is quarantined together are the source.
//!
//! It belongs to the job like the target does: made by it, recorded with its
//! identity, dropped by `--restart`.

use bson::{Bson, Document, doc};
use mongodb::error::ErrorKind;

use super::build;
use super::names;
use super::plan::{Plan, target_of};
use super::target::PENDING;
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result};
use crate::job::Job;
use crate::mongo::Mongo;
use crate::mongo::catalog::Description;
use crate::mongo::quarantine::{AROUND, LARGEST, parts_of};

/// The field of the job document with the name of the collection.
pub const NAME: &str = "quarantine";
/// The field with its identity.
pub const UUID: &str = "quarantine_uuid";

/// How rejected documents are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As they are, with a mark instead of those that don't fit.
    Documents,
    /// All of them as marks: one is nested too deeply to be copied by a pipeline,
    /// which can't tell them apart.
    Marks,
}

/// What happens to one that is in the quarantine already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Nothing should be: the quick way.
    Fails,
    /// It is replaced. A document that another rule hits since it was copied comes
    /// once more; which state counts is settled by the catch-up.
    IsReplaced,
}

/// The collection that `--quarantine` names.
///
/// # Errors
/// A usage error for a name that can't be used.
pub fn named(source: &Namespace, target: &Namespace, name: &str) -> Result<Namespace> {
    let quarantine = target_of(source, name)?;
    let parts = parts_of(&quarantine);
    for (other, what) in [(source, "source"), (target, "target")] {
        if *other == quarantine {
            return Err(Error::usage(format!("{what} and quarantine are both {quarantine}")));
        }
        if *other == parts {
            return Err(Error::usage(format!(
                "the {what} {other} has the name under which {quarantine} keeps very large documents"
            ))
            .hint("choose another name with --quarantine"));
        }
    }
    Ok(quarantine)
}

/// The quarantine of a stored job, where it has one.
pub fn of_job(job: &Document) -> Option<Namespace> {
    job.get_document("identity").ok()?.get_str(NAME).ok()?.parse().ok()
}

/// The quarantine must be absent or this job's own, before anything is touched.
///
/// # Errors
/// A refusal where it is not.
pub async fn check(mongo: &Mongo, plan: &Plan, job: Option<&Document>, begins_anew: bool) -> Result<()> {
    let stored = |field: &str| job.and_then(|job| job.get(field)).filter(|value| **value != Bson::Null);
    let owned = owned(job);
    if let Some((namespace, uuid)) = owned.as_ref().filter(|_| begins_anew)
        && names::find(mongo, namespace, Some(uuid)).await?.and_then(|(_, found)| found.uuid).as_ref()
            == Some(uuid)
        && stored("source_uuid").is_some_and(|uuid| plan.description.uuid.as_ref() != Some(uuid))
    {
        return Err(Error::refused(format!(
            "{namespace} holds documents of a collection that {} no longer is: they may be nowhere else",
            plan.source
        ))
        .hint("rename it to keep it, or drop it yourself, and start again"));
    }
    let Some(quarantine) = &plan.quarantine else { return Ok(()) };
    let ours = owned.as_ref().map(|(_, uuid)| uuid);
    let exists = names::find(mongo, quarantine, ours).await?.and_then(|(_, found)| found.uuid);
    let is_begun = stored("phase").is_some() && job.and_then(of_job).as_ref() == Some(quarantine);
    match (exists, owned) {
        (None, Some((owned, _))) if !begins_anew && owned == *quarantine => {
            Err(Error::refused(format!("{quarantine}, which the job {} had made, is gone", plan.job))
                .hint("copy anew with --restart"))
        }
        (Some(uuid), Some((_, owned))) if uuid == owned => Ok(()),
        (Some(_), None) if plan.dual_write && is_begun && build::is_empty(mongo, quarantine).await? => Ok(()),
        (Some(_), _) => Err(not_ours(quarantine)),
        (None, _) => {
            // Ours go before the quarantine that they belong to.
            let parts = parts_of(quarantine);
            if uuid_of(mongo, &parts).await?.is_some() { Err(not_ours(&parts)) } else { Ok(()) }
        }
    }
}

fn not_ours(namespace: &Namespace) -> Error {
    Error::refused(format!("{namespace} exists already and is not this job's"))
        .hint("choose another name with --quarantine, or drop it yourself")
}

/// What the job has recorded: the collection and its identity.
fn owned(job: Option<&Document>) -> Option<(Namespace, Bson)> {
    let job = job?;
    let namespace = job.get_str(NAME).ok()?.parse().ok()?;
    let uuid = job.get(UUID).filter(|uuid| **uuid != Bson::Null)?;
    Some((namespace, uuid.clone()))
}

async fn uuid_of(mongo: &Mongo, namespace: &Namespace) -> Result<Option<Bson>> {
    Ok(mongo.describe(namespace).await?.and_then(|description| description.uuid))
}

/// Makes the quarantine under a name of the copy's, or takes the empty one that an interrupted start
/// has made, and records it by the name that the operator gave.
///
/// # Errors
/// A stop where the server refuses.
pub async fn create(
    mongo: &Mongo,
    quarantine: &Namespace,
    working: &Namespace,
    source: &Description,
    job: &Job,
) -> Result<()> {
    let uuid = match uuid_of(mongo, working).await? {
        Some(uuid) => uuid,
        None => build::create(mongo, working, &creation(source)).await?,
    };
    job.save(doc! {NAME: quarantine.to_string(), UUID: uuid}).await?;
    build::index_pending(mongo, working).await
}

/// Of the options of the source only the collation counts: ranges of `_id` must
/// hold the same documents on both sides.
fn creation(source: &Description) -> Description {
    let mut options = Document::new();
    if let Some(collation) = source.collation() {
        options.insert("collation", collation.clone());
    }
    Description { kind: source.kind.clone(), options, uuid: None, indexes: Vec::new() }
}

/// Drops the quarantine that an earlier copy of this job has made.
///
/// # Errors
/// A stop where the server refuses.
pub async fn clear(mongo: &Mongo, plan: &Plan, job: &Job) -> Result<()> {
    if let (Some(Bson::String(name)), Some(uuid)) = (job.stored(NAME), job.stored(UUID))
        && let Ok(namespace) = name.parse::<Namespace>()
        && let Some((found, description)) = names::find(mongo, &namespace, Some(uuid)).await?
        && description.uuid.as_ref() == Some(uuid)
    {
        // The parts first: without the quarantine nobody would know whose they are.
        for namespace in [parts_of(&namespace), found] {
            mongo.collection(&namespace).drop().await.during(format!("dropping {namespace}"))?;
        }
    }
    if let Some(quarantine) = plan.quarantine.as_ref().filter(|_| plan.dual_write)
        && uuid_of(mongo, quarantine).await?.is_some()
        && build::is_empty(mongo, quarantine).await?
    {
        mongo.collection(quarantine).drop().await.during(format!("dropping {quarantine}"))?;
    }
    job.save(doc! {NAME: Bson::Null, UUID: Bson::Null}).await
}

/// The stages that copy what a rule is the first to hit. One whose `_id` is null,
/// which `$merge` refuses, is fetched afterwards, and so is one that does not fit.
pub fn copy_stages(
    range: Document,
    (rule, hit): &(String, Document),
    into: &str,
    form: Form,
    existing: Existing,
) -> Vec<Document> {
    let mark = doc! {"_id": "$_id", PENDING: true};
    let stored = doc! {"_id": "$_id", "rule": {"$literal": rule}, "document": "$$ROOT"};
    let size = doc! {"$add": [{"$bsonSize": "$$ROOT"}, {"$bsonSize": {"_id": "$_id"}}]};
    let largest = LARGEST.saturating_sub(AROUND + rule.len());
    let (room, when_matched) = match existing {
        Existing::Fails => (largest, "fail"),
        // A replacement names the `_id` once more.
        Existing::IsReplaced => (largest / 2, "replace"),
    };
    let room = i64::try_from(room).unwrap_or(0);
    let replacement = match form {
        Form::Documents => doc! {"$cond": [{"$lte": [size, room]}, stored, mark]},
        Form::Marks => mark,
    };
    let mut stages: Vec<Document> = [range, hit.clone(), doc! {"_id": {"$ne": Bson::Null}}]
        .into_iter()
        .filter(|condition| !condition.is_empty())
        .map(|condition| doc! {"$match": condition})
        .collect();
    stages.push(doc! {"$replaceWith": replacement});
    stages.push(doc! {"$merge": {"into": into, "whenMatched": when_matched, "whenNotMatched": "insert"}});
    stages
}

/// Whether a pipeline failed for a document that is nested too deeply with
/// anything around it.
pub fn is_too_deep(error: &mongodb::error::Error) -> bool {
    const OVERFLOW: i32 = 15;
    matches!(error.kind.as_ref(), ErrorKind::Command(command) if command.code == OVERFLOW)
}

/// Whether a pipeline failed for a document that is in the quarantine already.
pub fn is_duplicate(error: &mongodb::error::Error) -> bool {
    const DUPLICATE_KEY: i32 = 11000;
    matches!(error.kind.as_ref(), ErrorKind::Command(command) if command.code == DUPLICATE_KEY)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(name: &str) -> Namespace {
        name.parse().expect("a namespace")
    }

    #[test]
    fn the_three_collections_are_distinct() {
        let (source, target) = (namespace("app.users"), namespace("app.users_v2"));
        assert_eq!(named(&source, &target, "rejected").expect("a name"), namespace("app.rejected"));
        assert_eq!(named(&source, &target, "app.rejected").expect("a name"), namespace("app.rejected"));
        for name in ["users", "app.users", "users_v2"] {
            assert!(named(&source, &target, name).is_err(), "{name}");
        }
        assert!(named(&source, &namespace("app.x.parts"), "x").is_err());
    }

    #[test]
    fn a_pipeline_writes_whole_documents() {
        let hit = ("$rule".to_owned(), doc! {"a": 1});
        for form in [Form::Documents, Form::Marks] {
            for (existing, word) in [(Existing::Fails, "fail"), (Existing::IsReplaced, "replace")] {
                let stages = copy_stages(Document::new(), &hit, "rejected", form, existing);
                assert_eq!(stages.len(), 4);
                let merge = stages[3].get_document("$merge").expect("a merge");
                assert_eq!(merge.get_str("whenMatched").ok(), Some(word));
                // The name of a rule is never an expression.
                let is_literal = stages[2].to_string().contains(r#""$literal": "$rule""#);
                assert_eq!(is_literal, form == Form::Documents, "{}", stages[2]);
            }
        }
    }

    #[test]
    fn the_collation_of_the_source_is_all_that_is_taken_over() {
        let source = Description {
            kind: "collection".into(),
            options: doc! {"collation": {"locale": "en"}, "clusteredIndex": true, "validator": {"a": 1}},
            uuid: None,
            indexes: Vec::new(),
        };
        assert_eq!(creation(&source).options, doc! {"collation": {"locale": "en"}});
    }
}
