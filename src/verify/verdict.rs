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
    let had_passed = doc! {"verdict.passed": true};
    store::amend(mongo, &full::job_name(copy), had_passed, doc! {"verdict": verdict}).await
}
