//! Who may call the key API: one at a time, or the ceiling would not hold.

use bson::{Bson, Document, doc};

use crate::Context;
use crate::backfill::{default_job, identity};
use crate::config::Target;
use crate::config::file::KeyApi;
use crate::error::{Error, Result};
use crate::job::{Job, JobState, store};
use crate::key_map::shown_api;
use crate::mongo::Mongo;

/// The lease under which calls are made.
#[derive(Debug)]
pub struct Turn {
    /// The job: that of the backfill where there is one, so that none begins
    /// meanwhile.
    pub job: Job,
    /// Whether that is the backfill's.
    is_borrowed: bool,
}

impl Turn {
    /// Takes the lease.
    ///
    /// # Errors
    /// A refusal where calls to the same API are made already.
    pub async fn take(
        context: &Context,
        name: Option<&str>,
        targets: &[Target],
        api: &KeyApi,
    ) -> Result<Self> {
        let mongo = &context.mongo;
        let name = name_of(name, targets);
        let what = identity(targets, api);
        check_free(mongo, &name, api).await?;
        if store::find(mongo, &name).await?.is_none() {
            let name = format!("verify-keys-{}", name.strip_prefix("backfill-").unwrap_or(&name));
            let job = Job::restart(mongo, &name, "verify", &what, Document::new()).await?;
            return Ok(Self { job, is_borrowed: false });
        }
        Ok(Self { job: Job::borrow(mongo, &name, "backfill", &what).await?, is_borrowed: true })
    }

    /// Gives the lease back; the job is what it was. `calls_of_day` are what the day
    /// has seen, where that is limited.
    ///
    /// # Errors
    /// A stop where the job can't be written.
    pub async fn give_back(self, calls_of_day: Option<Document>) -> Result<()> {
        let mut fields = Document::new();
        fields.extend(calls_of_day.map(|calls| ("calls_of_day".to_owned(), Bson::Document(calls))));
        if self.is_borrowed {
            return self.job.give_back(fields).await;
        }
        self.job.finish(JobState::Completed, fields).await
    }
}

/// Makes sure that nobody calls the API, so that the calls of two don't pass its
/// ceiling together.
///
/// # Errors
/// A refusal where a job that calls it is being run.
pub async fn check_turn(mongo: &Mongo, name: Option<&str>, targets: &[Target], api: &KeyApi) -> Result<()> {
    check_free(mongo, &name_of(name, targets), api).await
}

fn name_of(name: Option<&str>, targets: &[Target]) -> String {
    name.map_or_else(|| default_job(targets), str::to_owned)
}

async fn check_free(mongo: &Mongo, name: &str, api: &KeyApi) -> Result<()> {
    let api = shown_api(api);
    let is_ours =
        |job: &Document| job.get_str("_id").is_ok_and(|known| known == name) && store::is_running(job);
    let jobs = store::list(mongo, None).await?;
    let running = jobs.iter().find(|job| is_ours(job) || store::calls(job, &api));
    let Some(running) = running else { return Ok(()) };
    let running = running.get_str("_id").unwrap_or_default();
    Err(Error::refused(format!(
        "the job {running} is being run: its calls and those of --keys would pass the ceiling together"
    ))
    .hint("wait for its end or stop it by `mongorekey control`, then start again"))
}

/// The calls of the day, as a job stores them.
pub fn calls_of_day((day, calls): (jiff::civil::Date, u64)) -> Document {
    doc! {"day": day.to_string(), "calls": crate::mongo::index::stored_count(calls)}
}
