//! `verify --full --repair`: documents of a cleanse's target that differ are made
//! what the source says.
//!
//! What is wrong is not written from here: a document that differs, and still does
//! when it is read again, is marked like one that was touched during the copy, and
//! the catch-up of the job works the marks off. So it is read anew in the source by
//! the job's own rules, written or removed under the job's lease by the sessions
//! that the job records, and a kill at any moment leaves marks that the next repair
//! or `cleanse` works off.

use std::sync::Arc;
use std::time::Duration;

use bson::{Bson, DateTime, Document, RawBson, doc};
use serde_json::{Value, json};

use super::full;
use super::full::progress::{Ranges, StoredRange};
use super::full::sides::{Sides as Both, Sizes};
use super::sides::Sides;
use crate::Context;
use crate::cleanse::follow::{Direction, Followed, Follower, stored_position};
use crate::cleanse::marks::Marks;
use crate::cleanse::plan::Plan;
use crate::cleanse::steer;
use crate::cli::cutover::CopyArgs;
use crate::cli::verify::VerifyArgs;
use crate::config::values::Namespace;
use crate::crash;
use crate::cutover::gates::{self, CHANGED_AT};
use crate::cutover::record::Record;
use crate::cutover::run::{forward, prepare_copy, stored_job, stored_position_of};
use crate::cutover::switch::stage::Stage;
use crate::error::{Error, Result};
use crate::job::{Job, store};
use crate::mongo::Mongo;
use crate::mongo::lanes::Lanes;
use crate::report::terminal::confirm;

/// Documents that are marked at once.
const MARKS: usize = 1_000;
/// Looks at one range: where more differ than memory holds, the rest is found by another.
const LOOKS: usize = 1_000;

/// What may be repaired, decided before anything is done.
#[derive(Debug)]
pub struct Repair {
    plan: Plan,
}

/// What was repaired.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Repaired {
    /// Documents that still differed when they were read again.
    pub differing: u64,
    /// What was done about them.
    pub followed: Followed,
}

impl Repaired {
    /// For the result.
    pub fn json(&self) -> Value {
        json!({
            "differing": self.differing,
            "written": self.followed.applied.written,
            "removed": self.followed.applied.removed,
        })
    }
}

/// Makes sure that the target may be repaired.
///
/// # Errors
/// A refusal where it is not the finished copy of a cleanse that nobody else works on.
pub async fn prepare(context: &Context, args: &VerifyArgs, sides: &Sides) -> Result<Repair> {
    let stored = stored_job(context, &sides.job)
        .await
        .map_err(|error| error.hint("--repair is for the target of a `cleanse`; name its job with --job"))?;
    let identity = stored.get_document("identity").cloned().unwrap_or_default();
    if identity.get_bool("dual_write").unwrap_or(false) {
        return Err(Error::refused(format!(
            "the application writes to {} itself: what differs may be newer there",
            sides.target
        ))
        .hint("`cleanse --dual-write` repairs what stands still, `verify --dual-write` watches the rest"));
    }
    check_before_cutover(&stored, &sides.source, &sides.target)?;
    if store::is_running(&stored) {
        let holder = stored.get_document("lease").ok().and_then(store::holder_of);
        let who = holder.map_or("another process".into(), |holder| holder.to_string());
        return Err(Error::refused(format!("the job {} is being run by {who}", sides.job)).hint(
            "stop that process first (`mongorekey control JOB stop`): two must not write to the same target",
        ));
    }
    let copy = CopyArgs {
        source: args.source.clone(),
        to: Some(sides.target.to_string()),
        job: Some(sides.job.clone()),
    };
    let plan = prepare_copy(context, &copy).await?;
    if identity != plan.identity {
        return Err(Error::refused(format!(
            "the job {} was begun with other rules or collections",
            sides.job
        ))
        .hint("change the config back, or copy anew by `cleanse --restart`"));
    }
    gates::check_collections(&context.mongo, &plan, &stored).await?;
    Ok(Repair { plan })
}

/// Makes sure that the application does not use the target yet, as far as the job tells.
fn check_before_cutover(job: &Document, source: &Namespace, target: &Namespace) -> Result<()> {
    if let Some(record) = Record::of(job)?
        && (record.is_done() || record.is_rollback || record.fence.is_some())
    {
        return Err(Error::refused(format!("{source} was cut over: its former target is not repaired"))
            .hint("compare with the kept collection by --source and --to, and mend by hand what differs"));
    }
    if Stage::of(job).is_some() {
        return Err(Error::refused(format!(
            "the application is being switched to {target}: what differs may be newer there"
        ))
        .hint("`cutover --mode switch` tells what both sides have written differently"));
    }
    Ok(())
}

impl Repair {
    /// Repairs what a full comparison found, after asking. `verified` is the name of
    /// the comparison's job.
    ///
    /// # Errors
    /// A refusal where the answer is no or somebody else took the job meanwhile; a
    /// stop where a document can't be brought up to date.
    pub async fn run(
        self,
        context: &Context,
        args: &VerifyArgs,
        verified: &str,
        differing: u64,
    ) -> Result<Repaired> {
        let Self { plan } = self;
        context.events.settled().await;
        confirm(
            format!(
                "{differing} documents of {} differ. Those that still do will be written as {} has them, or removed. \
                 Go on?",
                plan.target, plan.source
            ),
            args.yes,
        )
        .await?;
        let ranges = differing_ranges(&context.mongo, verified).await?;
        let job = Job::borrow(&context.mongo, &plan.job, "cleanse", &plan.identity).await?;
        let result = repair(context, &plan, &job, &ranges).await;
        let given_back = job.give_back(Document::new()).await;
        result.and_then(|repaired| given_back.map(|()| repaired))
    }
}

/// The ranges in which the comparison found differences.
async fn differing_ranges(mongo: &Mongo, verified: &str) -> Result<Vec<StoredRange>> {
    let stored = store::find(mongo, verified).await?;
    let layout = stored.and_then(|stored| stored.get("layout").and_then(Bson::as_i64));
    let ranges = match layout {
        Some(layout) => Ranges::of(mongo, verified, layout).load().await?,
        None => Vec::new(),
    };
    if ranges.is_empty() {
        return Err(Error::refused(
            "a side has no documents: there is nothing to repair by single documents",
        )
        .hint("copy anew by `cleanse --restart`"));
    }
    Ok(ranges.into_iter().filter(|range| !range.is_done).collect())
}

async fn repair(context: &Context, plan: &Plan, job: &Job, ranges: &[StoredRange]) -> Result<Repaired> {
    gates::check_copied(job, &plan.source)?;
    // Again, now that nobody else has the job: a cutover may have had it since.
    check_before_cutover(job.document(), &plan.source, &plan.target)?;
    gates::check_collections(&context.mongo, plan, job.document()).await?;
    stored_position_of(job, Direction::Forward)?;
    let steered = steer::start(context, job, None).await?;
    let context = &steered.context;
    let follower = forward(&steered, plan, job);
    // From here on an earlier verdict is about something else.
    job.save(doc! {CHANGED_AT: DateTime::now()}).await?;
    let lanes = follower.catch_up().await?;
    let both = both(context, plan).await?;
    let mut work = Work { context, follower: &follower, both, lanes, repaired: Repaired::default() };
    for range in ranges {
        work.range(range).await?;
    }
    job.save(doc! {CHANGED_AT: DateTime::now()}).await?;
    Ok(work.repaired)
}

async fn both(context: &Context, plan: &Plan) -> Result<Arc<Both>> {
    let mongo = &context.mongo;
    let target = mongo.describe(&plan.target).await?;
    let target = target.ok_or_else(|| Error::stopped(format!("{} is gone", plan.target)))?;
    let sizes = Sizes::of(mongo, [&plan.source, &plan.target]).await?;
    Ok(Arc::new(Both::new(
        mongo,
        &context.stop,
        (&plan.source, &plan.description, plan.predicate.valid()),
        (&plan.target, &target),
        sizes,
    )))
}

struct Work<'a> {
    context: &'a Context,
    follower: &'a Follower<'a>,
    both: Arc<Both>,
    lanes: Lanes,
    repaired: Repaired,
}

impl Work<'_> {
    async fn range(&mut self, range: &StoredRange) -> Result<()> {
        for _ in 0..LOOKS {
            let found = self.both.compare(range.number, &range.range).await?;
            let mut suspects = found.ok_or_else(|| self.interrupted())?.suspects;
            let has_more = !suspects.beyond().is_empty();
            // Nobody follows while the job is ours: waiting would make nothing agree.
            if !suspects.settle(&self.both, Duration::ZERO, |_| {}).await? {
                return Err(self.interrupted());
            }
            let ids: Vec<RawBson> = suspects.kept().iter().filter_map(|suspect| suspect.id.value()).collect();
            self.mend(&ids).await?;
            if !has_more || ids.is_empty() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Marks documents and works the marks off.
    async fn mend(&mut self, ids: &[RawBson]) -> Result<()> {
        let job = self.follower.job;
        let marks = Marks::of(self.follower.mongo, job.name());
        let mut position = stored_position(job, Direction::Forward)
            .ok_or_else(|| Error::stopped(format!("the job {} has no position", job.name())))?;
        for part in ids.chunks(MARKS) {
            job.lease().valid().await?;
            marks.set(part).await?;
            crash::point("repair_marked");
            let stop = &self.context.stop;
            let followed = &mut self.repaired.followed;
            self.follower.work_off_marks(&mut self.lanes, &mut position, stop, followed).await?;
            crash::point("repair_applied");
            if stop.is_cancelled() {
                return Err(self.interrupted());
            }
            self.repaired.differing += part.len() as u64;
        }
        Ok(())
    }

    fn interrupted(&self) -> Error {
        self.context
            .interrupted("interrupted; what was repaired is kept")
            .hint("start the same command again to go on")
    }
}

/// Documents that a full comparison found to differ.
pub fn differing(full: &full::Full) -> u64 {
    ["missing", "extra", "different"].iter().filter_map(|kind| full.summary[*kind].as_u64()).sum()
}
