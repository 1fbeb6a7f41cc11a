//! One worker of a backfill: its passes over the targets, its share of the
//! keys, and what it leaves behind.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use bson::{Bson, DateTime, Document};
use tokio_util::sync::CancellationToken;

use super::asker::Asker;
use super::beside::Beside;
use super::checkpoint::{Board, Checkpoints, Course, fields};
use super::counts::{ApiCounters, UNKNOWN};
use super::engine::{Engine, Parts};
use super::failures::Failures;
use super::plan::Plan;
use super::reader::{Ending, Pass, read_ahead};
use super::steer::{LiveSettings, Steering};
use super::summary::Report;
use crate::Context;
use crate::error::{Error, Result, joined};
use crate::job::crew::{Crew, News};
use crate::job::{Job, JobState, Role, health};
use crate::key_api::client::Client;
use crate::key_map::KeyMap;
use crate::mongo::index::whole_number;
use crate::mongo::source::TargetCollection;
use crate::throttle::breaker::Breaker;
use crate::throttle::daily::DailyBudget;
use crate::throttle::pacer::Pacer;

/// After a takeover no call leaves for this long: the dead holder's last calls
/// must be out of every window of a second.
const TAKEOVER_WAIT: Duration = Duration::from_secs(1);
/// The first pass, and one more over what appeared or failed meanwhile.
const PASSES: usize = 2;
/// A pass reads at most so many times the candidates at its start. Documents
/// inserted at random below its end are candidates too and are taken along, but
/// not without limit.
const LONGEST_PASS: u64 = 2;
/// How often a worker that is done looks whether the others leave it more.
const LOOK: Duration = Duration::from_millis(100);

/// A worker under way.
pub(super) struct Worker {
    context: Context,
    plan: Arc<Plan>,
    engine: Engine,
    job: Job,
    crew: Crew,
    key_map: Option<KeyMap>,
    live: Arc<LiveSettings>,
    /// Ends this worker, and with it nobody else.
    stop: CancellationToken,
    started_at: DateTime,
    /// What earlier runs of the job had done.
    earlier: Document,
    _beside: Beside,
    /// How far all workers of this process are.
    board: Board,
    /// How they went over time, where this worker keeps that.
    course: Option<Course>,
    limit: u64,
    /// Candidates of the first target, just counted.
    of_first_target: Option<u64>,
}

impl Worker {
    /// A worker on a job whose lease was just taken; `stop` ends it, `board` is
    /// shared with the other workers of this process.
    ///
    /// # Errors
    /// Usage errors that only show when the client is built.
    pub(super) fn new(
        context: &Context,
        plan: &Arc<Plan>,
        job: Job,
        board: Board,
        stop: CancellationToken,
    ) -> Result<Self> {
        let settings = &context.settings;
        let first_wait = if job.was_taken_over() { TAKEOVER_WAIT } else { Duration::ZERO };
        let slots = plan.slots(plan.concurrency, plan.tps);
        let asker = Arc::new(Asker {
            client: Client::new(plan.api.clone(), slots, job.name())?,
            pacer: Pacer::new(plan.tps, first_wait, plan.windows.clone(), plan.api.timeout.0)
                .with_daily_budget(daily_budget(plan, &job)),
            breaker: Breaker::default(),
            lease: job.lease().clone(),
            queued: AtomicUsize::new(0),
            counters: ApiCounters::default(),
            stop: stop.child_token(),
        });
        let sharing = asker.clone();
        let crew = Crew::start(&job, move |budget| sharing.pacer.keep_to(budget));
        let live = Arc::new(LiveSettings::new(plan.chunk, slots));
        let key_map = settings.backfill.key_map.then(|| KeyMap::open(&context.mongo, &plan.api, job.name()));
        let beside = start_beside(context, plan, &job, &asker, &live, &stop);
        let parts = Parts {
            asker,
            siblings: plan.collections.iter().filter(|target| target.finds_by_key()).cloned().collect(),
            key_map: key_map.clone(),
            slots,
            live: live.clone(),
            ownership: crew.ownership.clone(),
            job: job.name().to_owned(),
            failures: Failures::new(&context.mongo, job.name(), job.run(), &job.member()),
            max_not_found_share: settings.backfill.max_not_found_share.0,
            max_no_legacy_key_share: settings.backfill.max_no_legacy_key_share.0,
            max_api_latency: settings.backfill.max_api_latency.0,
            events: context.events.clone(),
            stop: stop.clone(),
        };
        let first =
            plan.collections.first().cloned().ok_or_else(|| Error::usage("no target is configured"))?;
        let mut engine = Engine::new(parts, first);
        if plan.limit < u64::MAX {
            engine.stay_with_one_target();
        }
        Ok(Self {
            context: context.clone(),
            engine,
            earlier: earlier_totals(&job),
            course: Course::of(&job),
            job,
            crew,
            key_map,
            live,
            stop,
            started_at: DateTime::now(),
            _beside: beside,
            board,
            limit: plan.limit,
            of_first_target: None,
            plan: plan.clone(),
        })
    }

    /// Settles at most so many documents, and keeps what became of each.
    pub(super) fn only(mut self, limit: u64) -> Self {
        self.limit = limit;
        self.engine.record();
        self.engine.stay_with_one_target();
        self
    }

    /// Works until everything is done, the run is stopped or can't go on; what
    /// happens is part of the report.
    pub(super) async fn run(mut self) -> Report {
        let result = self.work().await;
        match self.finish(result).await {
            (report, Ok(())) => report,
            (mut report, Err(error)) => {
                report.state = JobState::of_failure(&error);
                report.error = report.error.or(Some(error));
                report
            }
        }
    }

    async fn work(&mut self) -> Result<()> {
        if self.plan.max_calls_per_day > 0 {
            // Before the first call: a kill must not make the day forget it.
            self.job.save(fields(&self.engine, &self.earlier)).await?;
        }
        for collection in &self.plan.collections {
            let count = collection.count().await?;
            self.engine.documents_mut().candidates += count;
            // Who joins may wait for long before he is given a share.
            let begins_at_once = *self.job.role() == Role::Runner;
            self.of_first_target = self.of_first_target.or(begins_at_once.then_some(count));
        }
        if let Some(key_map) = &self.key_map {
            key_map.prepare(&self.context.mongo).await?;
            self.engine.expect_answers(key_map.found_beside_held().await?);
        }
        // Who joins has nothing to do before he is given a share.
        let mut has_work = *self.job.role() == Role::Runner || self.gets_more().await?;
        while has_work {
            self.crew.set_done(false);
            self.crew.ownership.take_gained();
            self.all_targets().await?;
            if self.stop.is_cancelled() {
                // Flags that the guard has not judged stay held; the next run judges them.
                return Ok(());
            }
            self.engine.finish().await?;
            has_work = self.gets_more().await?;
        }
        Ok(())
    }

    /// Waits until the other workers leave this one a further share of the
    /// keys, or nothing is left to be had.
    async fn gets_more(&self) -> Result<bool> {
        let news = self.crew.news();
        let is_alone = {
            let now = news.borrow();
            *self.job.role() == Role::Runner && !now.shared && now.others == 0
        };
        if self.left() == 0 || is_alone {
            return Ok(false);
        }
        self.crew.set_done(true);
        loop {
            self.job.lease().valid().await?;
            if self.crew.ownership.has_gained() {
                return Ok(true);
            }
            if self.is_over(&news.borrow()) || self.stop.is_cancelled() {
                return Ok(false);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether there is nothing to wait for any more. As long as another worker
    /// has keys they may become ours: he may die.
    fn is_over(&self, news: &News) -> bool {
        let is_left_alone = match self.job.role() {
            Role::Runner => news.others == 0,
            Role::Joined(_) => !news.has_runner,
        };
        news.all_done || (news.is_known && !news.shared && is_left_alone)
    }

    /// Documents that may still be settled; those whose flag is held back will be.
    fn left(&self) -> u64 {
        self.limit.saturating_sub(self.engine.documents().settled() + self.engine.held_everywhere())
    }

    async fn all_targets(&mut self) -> Result<()> {
        for collection in self.plan.collections.clone() {
            self.engine.switch_to(collection.clone());
            self.all_passes(&collection).await?;
            if self.stop.is_cancelled() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// What is inserted while a pass runs waits for the next; after the second
    /// it is left to a later run, so that the job ends however busy the
    /// application is.
    async fn all_passes(&mut self, collection: &Arc<TargetCollection>) -> Result<()> {
        let before = self.engine.documents().clone();
        let mut after = None;
        for pass in 1..=PASSES {
            let left = self.left();
            if left == 0 || self.stop.is_cancelled() {
                return Ok(());
            }
            // Counting millions takes seconds: not twice in a row.
            let count = match self.of_first_target.take() {
                Some(count) => count,
                None => collection.count().await?,
            };
            let failed = self.engine.documents().failed - before.failed;
            // After the first pass the held flags and the failures still are candidates.
            let known = if pass == 1 { 0 } else { failed + self.engine.held() };
            if count <= known {
                return Ok(());
            }
            if pass > 1 {
                self.engine.finish().await?;
                if after.is_none() {
                    self.engine.forget_failures_since(&before, &collection.target.namespace).await?;
                }
            }
            let Some(bound) = collection.highest().await? else { return Ok(()) };
            let most = count.saturating_mul(LONGEST_PASS).min(left);
            let live = self.live.clone();
            // What a lagging member did not show yet is there in the second pass.
            let range = Pass { after, bound, most, on_primary: pass > 1, live };
            // A pass that was cut goes on where it stopped: what was there first comes first.
            after = match self.pass(collection, range, pass < PASSES).await? {
                Ending::Cut(position) if !self.engine.has_deferred() => Some(position),
                _ => None,
            };
        }
        Ok(())
    }

    async fn pass(
        &mut self,
        collection: &Arc<TargetCollection>,
        pass: Pass,
        may_defer: bool,
    ) -> Result<Ending> {
        let (chunks, reading) = read_ahead(collection.clone(), pass, self.stop.clone());
        let course = self.course.as_mut();
        let mut checkpoints =
            Checkpoints::new(&self.job, &self.earlier, &self.board, course, &self.context.events);
        self.engine.pass(chunks, may_defer, &mut checkpoints).await?;
        joined(reading.await)
    }

    async fn finish(mut self, result: Result<()>) -> (Report, Result<()>) {
        let state = self.state(&result);
        let cleared = self.clear_up(state).await;
        self.engine.documents_mut().candidates_left =
            candidates_left(&self.context, &self.plan.collections).await;
        let mut fields = fields(&self.engine, &self.earlier);
        if let Some(calls) = self.engine.calls_of_day(0) {
            fields.insert("calls_of_day", calls);
        }
        if let Some(course) = &mut self.course {
            fields.extend(course.sample(&self.board.update(self.job.member(), &self.engine)));
        }
        let report = Report {
            state,
            error: result.err(),
            documents: self.engine.documents().clone(),
            api: self.engine.api(),
            limits: self.engine.limits(),
            recorded: self.engine.take_recorded(),
            was_left_alone: !self.crew.ownership.had_a_share() && !self.crew.news().borrow().all_done,
        };
        let left = self.job.finish(state, fields).await;
        (report, cleared.and(left))
    }

    fn state(&self, result: &Result<()>) -> JobState {
        match result {
            Err(error) => JobState::of_failure(error),
            Ok(()) if self.stop.is_cancelled() => JobState::Interrupted,
            Ok(()) if self.engine.documents().failed > 0 => JobState::Incomplete,
            Ok(()) => JobState::Completed,
        }
    }

    /// Forgets answers that the guard distrusts, and brings the list of
    /// failures up to date.
    async fn clear_up(&mut self, state: JobState) -> Result<()> {
        if self.engine.distrusts_answers()
            && let Some(key_map) = &self.key_map
        {
            let forgotten = key_map.forget_negatives(self.started_at).await?;
            self.context
                .events
                .note(format!("{forgotten} distrusted answers were forgotten and will be asked for again"));
        }
        if state == JobState::Stopped {
            self.job.stop_everybody().await?;
        }
        self.engine.flush_failures().await?;
        let has_tried_all = matches!(state, JobState::Completed | JobState::Incomplete) && self.left() > 0;
        if has_tried_all && *self.job.role() == Role::Runner {
            self.engine.forget_earlier_failures().await?;
        }
        Ok(())
    }
}

/// Candidates that are left; unknown, with a reason for people, where they
/// can't be counted.
pub(super) async fn candidates_left(context: &Context, collections: &[Arc<TargetCollection>]) -> u64 {
    let mut left = 0;
    for collection in collections {
        match collection.count().await {
            Ok(count) => left += count,
            Err(error) => {
                context.events.warn(format!("how many candidates are left is unknown: {error}"));
                return UNKNOWN;
            }
        }
    }
    left
}

/// The calls that may still be made today; the job remembers those that were.
fn daily_budget(plan: &Plan, job: &Job) -> DailyBudget {
    let stored = job.stored("calls_of_day").and_then(Bson::as_document).and_then(|stored| {
        let day = stored.get_str("day").ok()?.parse().ok()?;
        Some((day, stored.get("calls").and_then(whole_number)?))
    });
    DailyBudget::new(plan.max_calls_per_day, &plan.time_zone, stored)
}

/// The job's totals so far; a joined worker keeps its own, which are added to
/// the job's when it leaves.
fn earlier_totals(job: &Job) -> Document {
    match job.role() {
        Role::Runner => job.stored("totals").and_then(Bson::as_document).cloned().unwrap_or_default(),
        Role::Joined(_) => Document::new(),
    }
}

fn start_beside(
    context: &Context,
    plan: &Arc<Plan>,
    job: &Job,
    asker: &Arc<Asker>,
    live: &Arc<LiveSettings>,
    stop: &CancellationToken,
) -> Beside {
    let steering = Steering {
        plan: plan.clone(),
        is_runner: *job.role() == Role::Runner,
        asker: asker.clone(),
        live: live.clone(),
        stop: stop.clone(),
        events: context.events.clone(),
    };
    let max_lag = context.settings.backfill.max_replication_lag.0;
    let pacer = asker.clone();
    let health =
        health::watch(context.mongo.clone(), max_lag, context.events.clone(), move |reason, holds| {
            pacer.pacer.pause(reason, holds);
        });
    Beside(vec![
        tokio::spawn(steering.follow(job.lease().document())).abort_handle(),
        tokio::spawn(health).abort_handle(),
    ])
}
