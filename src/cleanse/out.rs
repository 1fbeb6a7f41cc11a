//! The copy by one `$out`, for maintenance windows: one shot that nothing slows
//! and nothing resumes, of a source that nobody writes.
//!
//! `$out` puts a new collection in the place of the target, with another
//! identity. So the target bears an index of a name that only this job knows,
//! which `$out` takes along: by it the result is known to be ours, even where
//! the server finished it after we had died.

use std::time::Duration;

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;

use super::build;
use super::copy::Copied;
use super::follow::Follower;
use super::names::TARGET_UUID;
use super::plan::Plan;
use super::run::Phase;
use super::target::PENDING;
use crate::Context;
use crate::cli::cleanse::Method;
use crate::config::values::Namespace;
use crate::crash;
use crate::error::{Context as _, Error, Result};
use crate::event::Progress;
use crate::job::Job;
use crate::mongo::Mongo;
use crate::mongo::catalog::Description;
use crate::mongo::door;
use crate::mongo::feed::Position;
use crate::mongo::valid::Valid;

/// The field of the job document with the method of the copy.
pub const METHOD: &str = "method";
/// The field with the session of the operation.
pub const SESSION: &str = "out_session";
/// The field with the name of the index that shows whose the target is.
const MARK: &str = "out_mark";
/// How often progress is looked at.
const TICK: Duration = Duration::from_secs(1);
/// In sources up to this size the documents that `$out` changes are counted.
const CHEAP_TO_COUNT: u64 = 200_000;

/// What became of the shot.
#[derive(Debug)]
pub struct Shot {
    /// How it ended.
    pub copied: Copied,
    /// Changes of the source while it ran.
    pub touched: u64,
}

/// Whether the stored copy of a job is one by `$out`.
pub fn is_out(job: &Document) -> bool {
    job.get_str(METHOD).is_ok_and(|method| method == Method::Out.as_str())
}

/// Whether a stored copy by `$out` was cut short, so that it is begun anew.
pub fn is_interrupted(job: &Document) -> bool {
    is_out(job) && job.get_str("phase").is_ok_and(|phase| phase == Phase::Copy.as_str())
}

/// Whether a collection is what this job's `$out` has made.
pub fn is_made_by(job: &Document, target: &Description) -> bool {
    job.get_str(MARK).is_ok_and(|mark| target.index(mark).is_some())
}

/// An unfinished copy goes on by the method by which it was begun.
///
/// # Errors
/// A refusal where another one is asked for.
pub fn check_method(job: &Document, asked: Method) -> Result<()> {
    let is_copying = job.get_str("phase").is_ok_and(|phase| phase == Phase::Copy.as_str());
    let fits = match asked {
        Method::Auto => true,
        Method::Merge => !is_out(job),
        Method::Out => is_out(job),
    };
    if fits || !is_copying {
        return Ok(());
    }
    let name = job.get_str("_id").unwrap_or("unknown");
    Err(Error::refused(format!("the copy of the job {name} was begun by another method"))
        .hint("leave --method away to go on with it, or copy anew with --restart"))
}

/// The method of a run: an interrupted copy is begun anew by its own one.
pub fn method(job: &Document, asked: Method) -> Method {
    match asked {
        Method::Auto if is_interrupted(job) => Method::Out,
        Method::Auto => Method::Merge,
        asked => asked,
    }
}

/// Ends what an interrupted shot has left running.
///
/// # Errors
/// A stop where that can't be made sure.
pub async fn end_former(mongo: &Mongo, job: &Job) -> Result<()> {
    match job.stored(SESSION) {
        Some(Bson::Document(session)) => mongo.end_operations(std::slice::from_ref(session)).await,
        _ => Ok(()),
    }
}

/// Marks the still empty target as ours in a way that `$out` takes along.
///
/// # Errors
/// A stop where the server refuses.
pub async fn mark(mongo: &Mongo, job: &Job, target: &Namespace) -> Result<()> {
    let name = format!("mongorekey_out_{:016x}", rand::random::<u64>());
    job.save(doc! {MARK: &name, METHOD: Method::Out.as_str()}).await?;
    let index =
        doc! {"name": name, "key": {PENDING: 1}, "partialFilterExpression": {PENDING: {"$exists": true}}};
    mongo.build_indexes(target, vec![index], |_| {}).await
}

/// Removes the mark from a finished target. Repeatable.
///
/// # Errors
/// A stop where the server refuses.
pub async fn unmark(mongo: &Mongo, target: &Namespace) -> Result<()> {
    let Some(description) = mongo.describe(target).await? else { return Ok(()) };
    let is_mark = |name: &&str| name.starts_with("mongorekey_out_");
    for name in description.indexes.iter().filter_map(|index| index.get_str("name").ok()).filter(is_mark) {
        mongo.collection(target).drop_index(name).await.during(format!("dropping {name}"))?;
    }
    Ok(())
}

/// Copies everything, and counts what was written to the source meanwhile.
///
/// # Errors
/// A stop where the server refuses or fails: the next run begins anew.
pub async fn copy(
    context: &Context,
    plan: &Plan,
    job: &Job,
    follower: &Follower<'_>,
    from: &Position,
) -> Result<Shot> {
    let mongo = &context.mongo;
    warn(context, plan).await?;
    job.lease().valid().await?;
    let mut operation = mongo.operation().await?;
    let session = operation.id();
    job.save(doc! {SESSION: session.clone()}).await?;
    crash::point("copy_sending");
    let stages = stages(&plan.predicate.valid(), &plan.target.collection);
    let run = mongo.run_writing_pipeline(&mut operation, &plan.source, stages, None, job.name());
    let (result, is_killed) = beside_progress(context, plan, run, &session).await;
    match result {
        Ok(()) => {}
        Err(_) if is_killed => return Ok(Shot { copied: Copied::Interrupted, touched: 0 }),
        Err(error) => {
            mongo.end_operations(&[session]).await?;
            return Err(error).during(format!("copying {} by $out", plan.source)).map_err(|error| {
                error.hint("mend the cause and start the same command again: the copy is begun anew")
            });
        }
    }
    let uuid = build::identity(mongo, &plan.target).await?;
    job.save(doc! {TARGET_UUID: uuid, SESSION: Bson::Null, "phase": Phase::Finish.as_str()}).await?;
    crash::point("after_out");
    let now = mongo.last_write_time().await?;
    let (touched, _) = follower.look_ahead(from.clone(), now).await?;
    Ok(Shot { copied: Copied::All, touched })
}

fn stages(valid: &Valid, into: &str) -> Vec<Document> {
    let mut stages = valid.stages();
    stages.push(doc! {"$out": into});
    stages
}

/// Says what nobody would expect of a copy.
async fn warn(context: &Context, plan: &Plan) -> Result<()> {
    let zero = Bson::Timestamp(bson::Timestamp { time: 0, increment: 0 });
    // An `_id` stays what it is.
    let others =
        doc! {"$filter": {"input": {"$objectToArray": "$$ROOT"}, "cond": {"$ne": ["$$this.k", "_id"]}}};
    let values = doc! {"$map": {"input": others, "in": "$$this.v"}};
    let has_zero = doc! {"$expr": {"$in": [{"$literal": zero}, values]}};
    let documents =
        context.mongo.collection(&plan.source).estimated_document_count().await.unwrap_or(u64::MAX);
    let affected = if documents > CHEAP_TO_COUNT {
        "any such document was not looked for".to_owned()
    } else {
        let mut valid = plan.predicate.valid();
        valid.condition =
            super::predicate::all_of(vec![Bson::Document(valid.condition), Bson::Document(has_zero)]);
        match super::count::candidates(&context.mongo, &plan.source, &valid).await? {
            0 => return Ok(()),
            count => format!("{count} documents have one"),
        }
    };
    context.events.warn(format!(
        "$out changes a Timestamp(0, 0) at the top level of a document to the time of day: {affected}; --method merge keeps it"
    ));
    Ok(())
}

/// Awaits the operation; a signal kills it after a while. Tells whether it did.
async fn beside_progress(
    context: &Context,
    plan: &Plan,
    run: impl Future<Output = mongodb::error::Result<()>>,
    session: &Document,
) -> (mongodb::error::Result<()>, bool) {
    let mut run = std::pin::pin!(run);
    let mut given_up = std::pin::pin!(door::grace_is_over(&context.stop));
    let mut ticks = tokio::time::interval(TICK);
    let total = context.mongo.collection(&plan.source).estimated_document_count().await.ok();
    loop {
        tokio::select! {
            result = &mut run => return (result, false),
            () = &mut given_up => break,
            _ = ticks.tick() => {}
        }
        // Not within the select, where it could be dropped half-asked.
        let done = written(&context.mongo, &plan.target).await;
        context.events.progress(Progress {
            phase: "$out".into(),
            unit: "documents",
            done,
            total: total.filter(|_| plan.predicate.valid().is_everything()),
            limited_by: Some("database".into()),
            detail: "one operation, which nothing slows or resumes".into(),
        });
    }
    let (killed, result) = tokio::join!(context.mongo.end_operations(std::slice::from_ref(session)), run);
    if let Err(error) = killed {
        tracing::warn!(%error, "the interrupted $out could not be ended");
    }
    // One that was done before it was killed counts all the same.
    let is_killed = result.is_err();
    (result, is_killed)
}

/// Documents in the temporary collections of `$out`, for a picture.
async fn written(mongo: &Mongo, target: &Namespace) -> u64 {
    let database = mongo.database(&target.database);
    let filter = doc! {"name": {"$regex": "^tmp\\.agg_out\\."}};
    let Ok(cursor) = database.list_collections().filter(filter).await else { return 0 };
    let names: Vec<_> = cursor.try_collect().await.unwrap_or_default();
    let mut written = 0;
    for specification in names {
        let collection = database.collection::<Document>(&specification.name);
        written += collection.estimated_document_count().await.unwrap_or(0);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfinished_copy_keeps_its_method() {
        let job = |method: &str, phase: &str| doc! {"_id": "j", "method": method, "phase": phase};
        assert!(check_method(&job("out", "copy"), Method::Auto).is_ok());
        assert!(check_method(&job("out", "copy"), Method::Out).is_ok());
        assert!(check_method(&job("out", "copy"), Method::Merge).is_err());
        assert!(check_method(&job("merge", "copy"), Method::Out).is_err());
        assert!(check_method(&job("out", "done"), Method::Merge).is_ok());
        assert!(check_method(&doc! {"_id": "j", "phase": "copy"}, Method::Merge).is_ok());
        assert_eq!(method(&job("out", "copy"), Method::Auto), Method::Out);
        assert_eq!(method(&job("out", "done"), Method::Auto), Method::Merge);
        assert_eq!(method(&doc! {}, Method::Out), Method::Out);
        assert!(is_interrupted(&job("out", "copy")) && !is_interrupted(&job("out", "finish")));
    }

    #[test]
    fn only_the_index_of_this_job_makes_a_target_ours() {
        let target = |name: &str| Description {
            kind: "collection".into(),
            options: Document::new(),
            uuid: None,
            indexes: vec![doc! {"name": name}],
        };
        let job = doc! {"out_mark": "mongorekey_out_1"};
        assert!(is_made_by(&job, &target("mongorekey_out_1")));
        assert!(!is_made_by(&job, &target("mongorekey_out_2")));
        assert!(!is_made_by(&doc! {}, &target("mongorekey_out_1")));
    }
}
