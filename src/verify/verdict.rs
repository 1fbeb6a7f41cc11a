//! The verdict of the last full comparison, which the cutover asks for.

use bson::{DateTime, doc};

use super::check::Check;
use super::full;
use crate::error::Result;
use crate::job::store;
use crate::mongo::Mongo;

/// Takes back the pass that an earlier comparison of this copy gave, where a check
/// failed.
///
/// # Errors
/// A stop where the job can't be written.
pub async fn take_back(mongo: &Mongo, copy: &str, failed: Option<&Check>) -> Result<()> {
    let Some(failed) = failed else { return Ok(()) };
    let verdict = doc! {"passed": false, "at": DateTime::now(), "failed": &failed.name};
    // What failed may lie in the target or in the quarantine, and the cutover needs both.
    for job in [full::job_name(copy), full::quarantine_job_name(copy)] {
        let had_passed = doc! {"verdict.passed": true};
        store::amend(mongo, &job, had_passed, doc! {"verdict": verdict.clone()}).await?;
    }
    Ok(())
}
