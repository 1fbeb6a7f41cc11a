//! What must hold before writes are held off.

use std::time::Duration;

use bson::{Bson, Document, doc};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::in_step::InStep;
use crate::Context;
use crate::cleanse::plan::Plan;
use crate::cleanse::run::is_copied;
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::job::{Job, lanes, store};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::others::ByOthers;
use crate::mongo::valid::Valid;
use crate::verify::{full, structure};

/// The job field that tells when what is verified was last made anew.
pub const CHANGED_AT: &str = "caught_up_at";
/// The new collection must not be further behind than this, or than the allowed pause.
const LONGEST_LAG: Duration = Duration::from_secs(2);
/// How often drawing level is measured.
const REHEARSALS: u32 = 5;
/// Commands during the pause that wait for a majority: the fence, the record, the renames.
const MAJORITY_WRITES: u32 = 4;
/// How long differences are read again before they count.
const SETTLE: Duration = Duration::from_secs(10);
/// Ranges that are verified at once.
const PARALLEL: usize = 2;
/// Differences that are listed.
const MOST_DIFFERENCES: usize = 10;
/// How often an empty quarantine is looked at beside a source that is written to.
const EMPTY_LOOKS: u32 = 3;

/// A condition and whether it holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Gate {
    /// `verify`, `verify quarantine`, `lag` or `predicted pause`.
    pub name: &'static str,
    /// Whether it holds.
    pub passed: bool,
    /// What was found.
    pub found: String,
}

impl Gate {
    /// As an entry of the JSON result.
    pub fn json(&self) -> Value {
        json!({"name": self.name, "passed": self.passed, "found": self.found})
    }

    /// As a line for people.
    pub fn text(&self) -> String {
        format!("{} gate {}: {}", if self.passed { "ok  " } else { "FAIL" }, self.name, self.found)
    }
}

/// Makes sure that a name is borne by the collection that the job knows.
///
/// # Errors
/// A refusal where it is not.
pub async fn check_known(mongo: &Mongo, namespace: &Namespace, uuid: Option<&Bson>) -> Result<()> {
    if uuid.is_some() && mongo.bearer(namespace).await?.as_ref() == uuid {
        return Ok(());
    }
    Err(Error::refused(format!("{namespace} is not the collection that this job knows")).hint(
        "was it dropped or renamed? A copy can be made anew with `cleanse --restart`, what was cut over \
         since then can't be taken back",
    ))
}

/// Makes sure that both collections are those that the job has copied from and to.
///
/// # Errors
/// A refusal where they are not.
pub async fn check_collections(mongo: &Mongo, plan: &Plan, job: &Document) -> Result<()> {
    let uuid = |field: &str| job.get(field).filter(|uuid| **uuid != Bson::Null);
    check_known(mongo, &plan.source, uuid("source_uuid")).await?;
    check_known(mongo, &plan.target, uuid("target_uuid")).await
}

/// Makes sure that the copy of a collection is finished.
///
/// # Errors
/// A refusal where it is not.
pub fn check_copied(job: &Job, source: &Namespace) -> Result<()> {
    if is_copied(job) {
        return Ok(());
    }
    Err(Error::refused(format!("the copy of {source} is not finished"))
        .hint("run `cleanse` to its end first"))
}

/// Whether everything was compared since it was last made anew, and agreed;
/// compares it now where that was not done.
///
/// # Errors
/// A stop where keeping step or comparing fails.
pub async fn verified(
    context: &Context,
    plan: &Plan,
    changed_at: Option<&Bson>,
    in_step: &mut InStep<'_>,
) -> Result<Gate> {
    const NAME: &str = "verify";
    if let Some(differing) = other_structure(&context.mongo, plan).await? {
        return Ok(Gate { name: NAME, passed: false, found: differing });
    }
    compared(context, &order(plan), NAME, changed_at, in_step).await
}

/// The same for the quarantine: whether it holds what the rules reject, so that the
/// cutover can be taken back. `None` where there is no quarantine.
///
/// # Errors
/// As [`verified`].
pub async fn quarantine_verified(
    context: &Context,
    plan: &Plan,
    changed_at: Option<&Bson>,
    in_step: &mut InStep<'_>,
) -> Result<Option<Gate>> {
    const NAME: &str = "verify quarantine";
    let Some(quarantine) = &plan.quarantine else { return Ok(None) };
    let order = order(plan);
    let rejected = doc! {"$nor": [order.valid.condition.clone()]};
    let (mongo, stop) = (&context.mongo, &context.stop);
    for _ in 0..EMPTY_LOOKS {
        if !is_empty(mongo, quarantine, &Document::new()).await? {
            let order = full::Order {
                target: quarantine,
                valid: Valid::condition(rejected),
                job: full::quarantine_job_name(&plan.job),
                is_quarantine: true,
                ..order
            };
            return compared(context, &order, NAME, changed_at, in_step).await.map(Some);
        }
        // A comparison with nothing proves nothing, but there may be nothing to reject.
        if is_empty(mongo, &plan.source, &rejected).await? {
            return Ok(Some(Gate { name: NAME, passed: true, found: "nothing is rejected".into() }));
        }
        in_step.draw_level(stop).await?;
    }
    Ok(Some(Gate { name: NAME, passed: false, found: format!("{quarantine} is empty") }))
}

async fn is_empty(mongo: &Mongo, namespace: &Namespace, filter: &Document) -> Result<bool> {
    let collection = mongo.collection(namespace);
    let found = retrying(format!("looking for a document of {namespace}"), || {
        let find = collection.find_one(filter.clone());
        async move { find.await }
    })
    .await?;
    Ok(found.is_none())
}

async fn compared(
    context: &Context,
    order: &full::Order<'_>,
    name: &'static str,
    changed_at: Option<&Bson>,
    in_step: &mut InStep<'_>,
) -> Result<Gate> {
    let halt = CancellationToken::new();
    let judge = async {
        let gate = judged(context, order, name, changed_at).await;
        halt.cancel();
        gate
    };
    let (gate, kept) = tokio::join!(judge, in_step.keep(&halt));
    kept?;
    gate
}

async fn judged(
    context: &Context,
    order: &full::Order<'_>,
    name: &'static str,
    changed_at: Option<&Bson>,
) -> Result<Gate> {
    let gate = |passed, found: String| Gate { name, passed, found };
    match earlier_pass(&context.mongo, order, changed_at).await? {
        Earlier::Passed(at) => return Ok(gate(true, format!("passed at {at}"))),
        Earlier::Void(why) => context.events.note(format!("the last comparison no longer counts: {why}")),
        Earlier::None => {}
    }
    context.events.note(format!("comparing {} with {} before the cutover", order.source, order.target));
    let full = full::run(context, order).await?;
    if let Some(error) = full.error {
        return Err(error);
    }
    Ok(gate(full.check.passed, full.check.remark.clone().unwrap_or_default()))
}

/// The indexes and options that are not those of the source; `None` where all are.
async fn other_structure(mongo: &Mongo, plan: &Plan) -> Result<Option<String>> {
    let checks = structure::check(mongo, &plan.source, &plan.target).await?;
    Ok(structure::told(&checks))
}

fn order(plan: &Plan) -> full::Order<'_> {
    full::Order {
        source: &plan.source,
        target: &plan.target,
        valid: plan.predicate.valid(),
        rules: plan.predicate.identity(),
        job: full::job_name(&plan.job),
        copy: &plan.job,
        parallel: PARALLEL,
        settle: SETTLE,
        restart: false,
        most: MOST_DIFFERENCES,
        is_quarantine: false,
    }
}

/// What became of an earlier comparison of these very collections.
enum Earlier {
    /// It passed at that time, and counts.
    Passed(Bson),
    /// It passed, and proves nothing any more, for this reason.
    Void(String),
    /// There is none that passed.
    None,
}

async fn earlier_pass(mongo: &Mongo, order: &full::Order<'_>, changed_at: Option<&Bson>) -> Result<Earlier> {
    let stored = store::find(mongo, &order.job).await?;
    let Some(stored) = stored else { return Ok(Earlier::None) };
    let uuids = doc! {
        "source": mongo.bearer(order.source).await?.unwrap_or(Bson::Null),
        "target": mongo.bearer(order.target).await?.unwrap_or(Bson::Null),
    };
    let Some(at) = counts(&stored, &uuids, &order.rules, changed_at) else { return Ok(Earlier::None) };
    Ok(match void(mongo, order, &stored, &uuids).await? {
        Some(why) => Earlier::Void(why),
        None => Earlier::Passed(at),
    })
}

/// Why a comparison says nothing about what is in the target by now; `None` where nobody but
/// the follower has written to it since.
async fn void(
    mongo: &Mongo,
    order: &full::Order<'_>,
    stored: &Document,
    uuids: &Document,
) -> Result<Option<String>> {
    let target = order.target;
    let copy = store::find(mongo, order.copy).await?.unwrap_or_default();
    let (Ok(since), Some(uuid)) = (stored.get_timestamp(full::SINCE), uuids.get("target")) else {
        return Ok(Some("it does not tell since when".into()));
    };
    let removed = match mongo.by_others(&target.database, uuid, &lanes::all_sessions(&copy), since).await? {
        ByOthers::Written => return Ok(Some(format!("others have written to {target} since"))),
        ByOthers::Unknown => return Ok(Some(format!("nobody knows who has written to {target} since"))),
        ByOthers::Removed(removed) => removed,
    };
    // As a TTL index does, on both sides.
    let condition = &order.valid.condition;
    let lost = mongo.by_ids(order.source, &removed, condition, None, |_| ()).await?.len();
    Ok((lost > 0).then(|| format!("others have removed documents of {target} since")))
}

/// When a stored comparison of the copy that a job has made passed, if that
/// counts still.
pub fn passed_since(job: &Document, comparison: &Document) -> Option<Bson> {
    let uuid = |field: &str| job.get(field).cloned().unwrap_or(Bson::Null);
    let uuids = doc! {"source": uuid("source_uuid"), "target": uuid("target_uuid")};
    let rules = job.get_document("identity").ok()?.get_document("rules").ok()?;
    counts(comparison, &uuids, rules, job.get(CHANGED_AT))
}

/// When a stored verdict was given, if it is about these collections and rules
/// and all of it was read after the last change of what it is about. Pure.
fn counts(stored: &Document, uuids: &Document, rules: &Document, changed_at: Option<&Bson>) -> Option<Bson> {
    let verdict = stored.get_document("verdict").ok()?;
    let is_same = stored.get_document("uuids").ok()? == uuids
        && stored.get_document("identity").ok()?.get_document("rules").ok()? == rules;
    let (at, begun) = (verdict.get_datetime("at").ok()?, stored.get_datetime("begun_at").ok()?);
    let is_newer =
        changed_at.and_then(|changed| changed.as_datetime()).is_some_and(|changed| begun > changed);
    (is_same && is_newer && verdict.get_bool("passed").unwrap_or(false)).then(|| Bson::DateTime(*at))
}

/// How far behind the new collection is, and how long writes would be held off.
///
/// # Errors
/// A stop where keeping step fails; an interruption.
pub async fn rehearsed(
    context: &Context,
    in_step: &mut InStep<'_>,
    max_pause: Duration,
) -> Result<[Gate; 2]> {
    let longest = longest_lag(context, in_step).await?;
    let begun = std::time::Instant::now();
    crate::mongo::feed::nudge(&context.mongo).await?;
    let predicted = longest + begun.elapsed() * MAJORITY_WRITES;
    let lag = lag_gate(longest, max_pause);
    let pause = Gate {
        name: "predicted pause",
        passed: predicted <= max_pause,
        found: format!("{predicted:.0?}, allowed {max_pause:.0?}"),
    };
    Ok([lag, pause])
}

/// How far behind the new collection is.
///
/// # Errors
/// A stop where keeping step fails; an interruption.
pub async fn lag(context: &Context, in_step: &mut InStep<'_>) -> Result<Gate> {
    Ok(lag_gate(longest_lag(context, in_step).await?, Duration::ZERO))
}

async fn longest_lag(context: &Context, in_step: &mut InStep<'_>) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    for _ in 0..REHEARSALS {
        let taken = in_step.draw_level(&context.stop).await?;
        longest =
            longest.max(taken.ok_or_else(|| context.interrupted("interrupted before writes were held off"))?);
    }
    Ok(longest)
}

fn lag_gate(longest: Duration, max_pause: Duration) -> Gate {
    Gate { name: "lag", passed: longest <= LONGEST_LAG.max(max_pause), found: format!("{longest:.0?}") }
}

/// The refusal of gates that do not hold; `None` where all do.
pub fn refusal(gates: &[Gate]) -> Option<Error> {
    let failed: Vec<String> = gates
        .iter()
        .filter(|gate| !gate.passed)
        .map(|gate| format!("{} ({})", gate.name, gate.found))
        .collect();
    (!failed.is_empty()).then(|| {
        Error::refused(format!("not cut over, a gate does not hold: {}", failed.join("; "))).hint(
            "a mismatch: see `mongorekey verify --full`; a pause that is too long: try again when there is \
             less to write, or allow more with --max-pause",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::DateTime;

    #[test]
    fn only_a_fresh_verdict_about_these_collections_counts() {
        let (uuids, rules) = (doc! {"source": 1, "target": 2}, doc! {"keep": "{}"});
        let stored = doc! {
            "uuids": uuids.clone(),
            "begun_at": DateTime::from_millis(2_000),
            "identity": {"rules": rules.clone()},
            "verdict": {"passed": true, "at": DateTime::from_millis(9_000)},
        };
        let changed = Bson::DateTime(DateTime::from_millis(1_000));
        assert!(counts(&stored, &uuids, &rules, Some(&changed)).is_some());
        // While it was compared.
        let later = Bson::DateTime(DateTime::from_millis(3_000));
        assert_eq!(counts(&stored, &uuids, &rules, Some(&later)), None);
        assert_eq!(counts(&stored, &uuids, &rules, None), None);
        assert_eq!(counts(&stored, &doc! {"source": 1, "target": 3}, &rules, Some(&changed)), None);
        assert_eq!(counts(&stored, &uuids, &doc! {"keep": "{\"a\":1}"}, Some(&changed)), None);
        let job = doc! {
            "source_uuid": 1, "target_uuid": 2, CHANGED_AT: changed.clone(), "identity": {"rules": rules.clone()},
        };
        assert!(passed_since(&job, &stored).is_some());
        let mut anew = job;
        anew.insert("target_uuid", 3);
        assert_eq!(passed_since(&anew, &stored), None, "the target was made anew");
        let mut failed = stored;
        failed.insert("verdict", doc! {"passed": false, "at": DateTime::from_millis(9_000)});
        assert_eq!(counts(&failed, &uuids, &rules, Some(&changed)), None);
    }

    #[test]
    fn a_failed_gate_is_named() {
        let gate = |passed| Gate { name: "lag", passed, found: "9s".into() };
        assert!(refusal(&[gate(true)]).is_none());
        let refusal = refusal(&[gate(true), gate(false)]).expect("refused");
        assert!(refusal.message().contains("lag (9s)"), "{refusal}");
    }
}
