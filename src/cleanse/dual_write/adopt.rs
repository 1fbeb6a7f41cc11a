//! The target of a dual write may be there already, with documents that are not
//! ours: it is taken as it is, and never dropped.

use bson::{Bson, Document};

use crate::cleanse::plan::Plan;
use crate::cleanse::{build, target};
use crate::error::{Error, Result};
use crate::job::store;
use crate::mongo::Mongo;
use crate::mongo::catalog::Description;

/// Set in the job document where the target was there before.
pub const ADOPTED: &str = "target_adopted";

/// Refuses to drop a target that the job did not create.
///
/// # Errors
/// A refusal that says what to do instead.
pub fn refuse_to_drop(
    plan: &Plan,
    job: Option<&Document>,
    target: Option<&Description>,
    restart: bool,
) -> Result<()> {
    let Some(target) = target.filter(|_| restart) else { return Ok(()) };
    let owned = job.and_then(|job| job.get("target_uuid")).filter(|uuid| **uuid != Bson::Null);
    let is_that = owned.is_some() && target.uuid.as_ref() == owned;
    let adopted = job.is_some_and(is_marked);
    if (is_that && adopted) || (!is_that && plan.dual_write) {
        return Err(Error::refused(format!(
            "{} was not created by the job {}, so --restart does not drop it",
            plan.target, plan.job
        ))
        .hint("give --job NAME for a new job that keeps what is there, or drop the target yourself"));
    }
    Ok(())
}

/// Whether an existing target can be written to beside the application.
///
/// # Errors
/// A refusal where it is no plain collection.
pub fn check(plan: &Plan, target: &Description) -> Result<()> {
    match target::refusal(target, false) {
        Some(reason) => Err(Error::refused(format!("{} {reason}", plan.target))),
        None => Ok(()),
    }
}

/// The identity of the target, which is created where there is none, and whether
/// it was there.
///
/// # Errors
/// A stop where it can't be created.
pub async fn take_or_create(mongo: &Mongo, plan: &Plan) -> Result<(Bson, bool)> {
    let exists = async || Ok::<bool, Error>(mongo.describe(&plan.target).await?.is_some());
    if !exists().await? {
        match build::create(mongo, &plan.target, &plan.description).await {
            Ok(uuid) => return Ok((uuid, false)),
            // The application has written to it for the first time just now.
            Err(_) if plan.dual_write && exists().await? => {}
            Err(error) => return Err(error),
        }
    }
    Ok((build::identity(mongo, &plan.target).await?, true))
}

/// Whether the target of a job was there before it.
///
/// # Errors
/// A stop where the job can't be read.
pub async fn is_adopted(mongo: &Mongo, job: &str) -> Result<bool> {
    Ok(store::find(mongo, job).await?.as_ref().is_some_and(is_marked))
}

fn is_marked(job: &Document) -> bool {
    job.get_bool(ADOPTED).unwrap_or(false)
}
