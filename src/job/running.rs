//! Which jobs are being run right now, as far as their leases tell.

use std::collections::BTreeSet;

use bson::Document;

use super::store;
use crate::error::{Error, Result};
use crate::mongo::Mongo;

/// Whether a backfill is about one of these collections.
pub fn is_about(job: &Document, collections: &BTreeSet<String>) -> bool {
    let identity = job.get_document("identity").ok();
    let targets = identity.and_then(|identity| identity.get_array("targets").ok()).into_iter().flatten();
    let mut theirs = targets.filter_map(|target| target.as_document()?.get_str("collection").ok());
    theirs.any(|collection| collections.contains(collection))
}

/// Makes sure that no backfill runs that the condition picks.
///
/// # Errors
/// A refusal that names the job and who runs it.
pub async fn refuse_beside_backfills(mongo: &Mongo, concerns: impl Fn(&Document) -> bool) -> Result<()> {
    let jobs = store::list(mongo, None).await?;
    let is_backfill = |job: &&Document| job.get_str("command").is_ok_and(|command| command == "backfill");
    let Some(job) = jobs.iter().filter(is_backfill).find(|job| store::is_running(job) && concerns(job))
    else {
        return Ok(());
    };
    let holder = job.get_document("lease").ok().and_then(store::holder_of);
    let who = holder.map_or("another process".into(), |holder| holder.to_string());
    Err(Error::refused(format!("the job {} is being run by {who}", job.get_str("_id").unwrap_or("unknown")))
        .hint("stop that process first, or look at it with `mongorekey status`"))
}
