//! From one drawn document to the next.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use bson::{Bson, RawBson};
use serde_json::{Map, Value, json};

use super::ask::Questions;
use super::filled::{Filled, FilledDraw, look_up};
use super::job::{Turn, calls_of_day};
use super::judge::{Verdict, judge};
use crate::Context;
use crate::backfill::asker::Asker;
use crate::backfill::counts::ApiCounters;
use crate::cli::verify::VerifyArgs;
use crate::config::Target;
use crate::config::file::KeyApi;
use crate::error::{Error, Result};
use crate::event::Progress;
use crate::job::Job;
use crate::key_api::classify::Outcome;
use crate::key_api::client::Client;
use crate::key_map::{KeyMap, Remembered};
use crate::mongo::index::whole_number;
use crate::mongo::sink::value_bytes;
use crate::report::json::extended;
use crate::throttle::breaker::Breaker;
use crate::throttle::daily::DailyBudget;
use crate::throttle::pacer::Pacer;
use crate::throttle::window::Schedule;
use crate::verify::check::Check;
use crate::verify::confidence::Sampled;

/// The name of the check.
const NAME: &str = "keys";
/// Documents whose keys are asked for before the next are read.
const BATCH: usize = 500;
/// After a takeover no call leaves for this long: the dead holder's last calls
/// must be out of every window of a second.
const TAKEOVER_WAIT: Duration = Duration::from_secs(1);

/// What asking again came to, whole or as far as it came.
#[derive(Debug)]
pub struct Keys {
    /// The check.
    pub check: Check,
    /// What ended it before its time.
    pub error: Option<Error>,
}

/// What was counted.
#[derive(Debug, Default)]
struct Tally {
    verdicts: BTreeMap<&'static str, u64>,
    /// Documents that changed while the API was asked.
    moved: u64,
    /// Documents with a key whose legacy key can't be asked for.
    not_asked: u64,
    differences: Vec<Value>,
    is_all: bool,
}

impl Tally {
    fn of(&self, verdict: Verdict) -> u64 {
        self.verdicts.get(verdict.as_str()).copied().unwrap_or(0)
    }

    /// Whether every document with a key was judged: what could not be asked for, what
    /// changed meanwhile and what got no answer was not.
    fn saw_all(&self) -> bool {
        self.is_all && self.not_asked + self.moved + self.of(Verdict::Unanswered) == 0
    }

    fn asked(&self) -> u64 {
        self.verdicts.values().sum()
    }
}

/// Asks the API again for so many filled documents of all targets.
///
/// # Errors
/// Usage errors and refusals before the first call; what happens later stands in
/// the result.
pub async fn check(context: &Context, args: &VerifyArgs, wanted: u32, seed: u64) -> Result<Keys> {
    let settings = &context.settings;
    let api = settings.key_api()?;
    let targets = settings.targets(args.targets.target.as_deref())?;
    let take = Turn::take(context, args.job.as_deref(), &targets, api);
    let turn = context.unless_interrupted(take).await?;
    let asker = match asker(context, api, &turn.job) {
        Ok(asker) => Arc::new(asker),
        Err(error) => {
            turn.give_back(None).await?;
            return Err(error);
        }
    };
    let slots = settings.backfill.concurrency.slots(settings.backfill.tps, api.timeout.0);
    let key_map = settings.backfill.key_map.then(|| KeyMap::open(&context.mongo, api, turn.job.name()));
    let mut run = Run {
        context,
        targets: &targets,
        questions: Questions::new(asker.clone(), slots),
        asker: &asker,
        key_map,
        most: args.max_differences,
        wanted: u64::from(wanted),
        tally: Tally::default(),
    };
    let result = context.unless_interrupted(run.all(seed)).await;
    let result =
        result.and_then(|()| if turn.job.lease().is_valid() { Ok(()) } else { Err(lost(&turn.job)) });
    let check = run.finish(seed);
    let given_back = turn.give_back(asker.pacer.calls_of_day(0).map(calls_of_day)).await;
    let error = result.and(given_back).err();
    Ok(Keys { check: Check { passed: check.passed && error.is_none(), ..check }, error })
}

fn lost(job: &Job) -> Error {
    Error::stopped(format!("the lease of the job {} was lost", job.name()))
        .hint("start the same command again")
}

/// The same calls as those of the backfill, under the same ceiling.
fn asker(context: &Context, api: &KeyApi, job: &Job) -> Result<Asker> {
    let backfill = &context.settings.backfill;
    let stored = job.stored("calls_of_day").and_then(Bson::as_document).and_then(|stored| {
        let day = stored.get_str("day").ok()?.parse().ok()?;
        Some((day, stored.get("calls").and_then(whole_number)?))
    });
    let daily = DailyBudget::new(backfill.max_calls_per_day, &backfill.time_zone, stored);
    let windows = Schedule::new(backfill.windows.clone(), backfill.time_zone.clone());
    let first_wait = if job.was_taken_over() { TAKEOVER_WAIT } else { Duration::ZERO };
    let slots = backfill.concurrency.slots(backfill.tps, api.timeout.0);
    Ok(Asker {
        client: Client::new(api.clone(), slots, job.name())?,
        pacer: Pacer::new(backfill.tps, first_wait, windows, api.timeout.0).with_daily_budget(daily),
        breaker: Breaker::default(),
        lease: job.lease().clone(),
        counters: ApiCounters::default(),
        queued: AtomicUsize::new(0),
        stop: context.stop.child_token(),
    })
}

struct Run<'a> {
    context: &'a Context,
    targets: &'a [Target],
    questions: Questions,
    asker: &'a Asker,
    key_map: Option<KeyMap>,
    most: usize,
    wanted: u64,
    tally: Tally,
}

impl Run<'_> {
    async fn all(&mut self, seed: u64) -> Result<()> {
        let mut draw = FilledDraw::new(&self.context.mongo, self.targets, self.wanted, seed).await?;
        while self.tally.asked() + self.tally.moved < self.wanted && !self.questions.has_given_up() {
            let left = self.wanted - self.tally.asked() - self.tally.moved;
            let documents = self.draw(&mut draw, left).await?;
            if documents.is_empty() {
                self.tally.is_all = true;
                break;
            }
            self.ask(documents).await?;
            self.show();
        }
        Ok(())
    }

    /// The next documents whose legacy keys can be asked for.
    async fn draw(&mut self, draw: &mut FilledDraw, left: u64) -> Result<Vec<Filled>> {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(BATCH);
        let mut documents = Vec::new();
        while documents.len() < most {
            let Some(document) = draw.next().await? else { break };
            let can_be_asked =
                document.legacy.as_deref().is_some_and(|legacy| self.asker.client.is_sendable(legacy));
            if can_be_asked {
                documents.push(document);
            } else {
                self.tally.not_asked += 1;
            }
        }
        Ok(documents)
    }

    async fn ask(&mut self, documents: Vec<Filled>) -> Result<()> {
        let mut keys: Vec<String> = documents.iter().filter_map(|document| document.legacy.clone()).collect();
        keys.sort_unstable();
        keys.dedup();
        let answers = self.questions.ask(&keys).await?;
        let remembered = match &self.key_map {
            Some(key_map) => key_map.look_up(&keys.iter().map(String::as_str).collect::<Vec<_>>()).await?,
            None => HashMap::new(),
        };
        let mut doubtful = Vec::new();
        for document in documents {
            match verdict(&document, &answers, &remembered) {
                Verdict::Right => self.count(Verdict::Right),
                _ => doubtful.push(document),
            }
        }
        self.look_again(doubtful, &answers, &remembered).await
    }

    /// What changed since it was read is not judged by an answer for what it was.
    async fn look_again(
        &mut self,
        doubtful: Vec<Filled>,
        answers: &HashMap<String, Outcome>,
        remembered: &HashMap<String, Remembered>,
    ) -> Result<()> {
        for (number, target) in self.targets.iter().enumerate() {
            let of_target: Vec<&Filled> =
                doubtful.iter().filter(|document| document.target == number).collect();
            let ids: Vec<RawBson> = of_target.iter().map(|document| document.id.clone()).collect();
            if ids.is_empty() {
                continue;
            }
            let now = look_up(&self.context.mongo, target, number, &ids).await?;
            for document in of_target {
                let is_same = now
                    .get(&value_bytes(document.id.as_raw_bson_ref()))
                    .is_some_and(|now| (&now.legacy, &now.key) == (&document.legacy, &document.key));
                if is_same {
                    self.report(target, document, verdict(document, answers, remembered));
                } else {
                    self.tally.moved += 1;
                }
            }
        }
        Ok(())
    }

    fn report(&mut self, target: &Target, document: &Filled, verdict: Verdict) {
        self.count(verdict);
        if self.tally.differences.len() < self.most {
            self.tally.differences.push(json!({
                "_id": extended(document.id.as_raw_bson_ref()),
                "collection": target.namespace.to_string(),
                "kind": verdict.as_str(),
            }));
        }
    }

    fn count(&mut self, verdict: Verdict) {
        *self.tally.verdicts.entry(verdict.as_str()).or_default() += 1;
    }

    fn show(&self) {
        self.context.events.progress(Progress {
            phase: "ask again".into(),
            unit: "documents",
            done: self.tally.asked(),
            total: Some(self.wanted),
            limited_by: self.asker.pacer.waiting().map(|waiting| waiting.to_string()),
            detail: format!("calls {}", self.asker.counters.calls()),
        });
    }

    fn finish(&self, seed: u64) -> Check {
        let tally = &self.tally;
        let (asked, right) = (tally.asked(), tally.of(Verdict::Right));
        if asked == 0 && tally.moved == 0 {
            let check = Check::nothing(NAME, "no document has a key and a legacy key that can be asked for");
            return check.with("seed", json!(seed)).with("api", self.api());
        }
        let check = Check::of(NAME, json!(asked), json!(right), tally.differences.clone());
        let unanswered = tally.of(Verdict::Unanswered);
        let compared = asked - unanswered;
        let sampled = Sampled { compared, different: compared - right, is_all: tally.saw_all() };
        Check { passed: right > 0 && right == asked, ..check }
            .remark(self.remark(&sampled))
            .with("keys", self.counts())
            .with("api", self.api())
            .with("confidence", sampled.json())
            .with("seed", json!(seed))
    }

    fn remark(&self, sampled: &Sampled) -> String {
        let mut parts = vec![sampled.text()];
        let counted = |verdict: Verdict| (self.tally.of(verdict), verdict.as_str());
        let wrong = Verdict::ALL.into_iter().filter(|verdict| *verdict != Verdict::Right).map(counted);
        let others = [
            (self.tally.moved, "changed by others meanwhile"),
            (self.tally.not_asked, "with a legacy key that can't be asked for"),
        ];
        parts.extend(
            wrong
                .chain(others)
                .filter(|(count, _)| *count > 0)
                .map(|(count, what)| format!("{count} {what}")),
        );
        if self.questions.has_given_up() {
            parts.push("the key API does not answer".into());
        }
        parts.push(format!("{} calls", self.asker.counters.calls()));
        parts.join("; ")
    }

    fn counts(&self) -> Value {
        let mut counts = Map::new();
        for verdict in Verdict::ALL {
            counts.insert(verdict.as_str().into(), json!(self.tally.of(verdict)));
        }
        counts.insert("moved".into(), json!(self.tally.moved));
        counts.insert("not_asked".into(), json!(self.tally.not_asked));
        Value::Object(counts)
    }

    fn api(&self) -> Value {
        json!(self.asker.counters.snapshot(0))
    }
}

fn verdict(
    document: &Filled,
    answers: &HashMap<String, Outcome>,
    remembered: &HashMap<String, Remembered>,
) -> Verdict {
    let legacy = document.legacy.as_deref().unwrap_or_default();
    judge(document.key.as_deref(), answers.get(legacy), remembered.get(legacy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_judged_is_all_that_there_is() {
        let all = || Tally { is_all: true, ..Tally::default() };
        assert!(all().saw_all());
        assert!(!Tally::default().saw_all());
        assert!(!Tally { not_asked: 1, ..all() }.saw_all());
        assert!(!Tally { moved: 1, ..all() }.saw_all());
        let unanswered = BTreeMap::from([(Verdict::Unanswered.as_str(), 1)]);
        assert!(!Tally { verdicts: unanswered, ..all() }.saw_all());
    }
}
