//! Random documents of one side looked up on the other.

use bson::RawBson;
use serde_json::json;
use tokio::time::Instant;

use super::check::Check;
use super::confidence::Sampled;
use super::full::matching::{Id, Pair, Side};
use super::full::outcome;
use super::full::sides::{Sides as Both, Sizes};
use super::full::suspects::{Suspect, Suspects, digests};
use super::sides::Sides;
use crate::Context;
use crate::cli::verify::VerifyArgs;
use crate::config::values::Namespace;
use crate::error::Result;
use crate::event::{Events, Progress};
use crate::mongo::Mongo;
use crate::mongo::catalog::Description;
use crate::mongo::draw::Draw;

/// Documents that are sampled where the options don't say.
pub(super) const DEFAULT_SAMPLE: u32 = 1000;
/// Documents that are looked up at once.
const BATCH: usize = 200;

/// From which side documents are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    /// Drawn from the source, looked up in the target: finds missing ones.
    Forward,
    /// Drawn from the target, looked up in the source: finds extra ones.
    Backward,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Forward => "sample source to target",
            Self::Backward => "sample target to source",
        }
    }

    /// Whether a document that was drawn belongs to this direction: an invalid one
    /// of the source says nothing about the target.
    fn concerns(self, pair: &Pair) -> bool {
        match self {
            Self::Forward => pair.source.is_some(),
            Self::Backward => pair.target.is_some(),
        }
    }
}

/// Compares so many random documents of each side with the other side.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn check(
    context: &Context,
    args: &VerifyArgs,
    sides: &Sides,
    size: u32,
    seed: u64,
) -> Result<Vec<Check>> {
    let mongo = &context.mongo;
    let described = [mongo.describe(&sides.source).await?, mongo.describe(&sides.target).await?];
    let [Some(source), Some(target)] = described else {
        let what = format!("{} or {} is missing", sides.source, sides.target);
        return Ok([Direction::Forward, Direction::Backward]
            .map(|direction| Check::nothing(direction.name(), &what))
            .into());
    };
    let sizes = Sizes::of(mongo, [&sides.source, &sides.target]).await?;
    let valid = sides.predicate.valid();
    let both =
        Both::new(mongo, &context.stop, (&sides.source, &source, valid), (&sides.target, &target), sizes);
    let wanted = Wanted { size: u64::from(size), seed };
    let sample = Sample { context, args, sides, both: &both, wanted };
    Ok(vec![
        sample.check(Direction::Forward, &source).await?,
        sample.check(Direction::Backward, &target).await?,
    ])
}

/// What to draw.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    size: u64,
    seed: u64,
}

struct Sample<'a> {
    context: &'a Context,
    args: &'a VerifyArgs,
    sides: &'a Sides,
    both: &'a Both,
    wanted: Wanted,
}

impl Sample<'_> {
    async fn check(&self, direction: Direction, drawn_from: &Description) -> Result<Check> {
        let namespace = match direction {
            Direction::Forward => &self.sides.source,
            Direction::Backward => &self.sides.target,
        };
        let numbers = self.numbers(direction).await;
        let by_id = drawn_from.index("_id_").is_some();
        let mut draw = Draw::new(&self.context.mongo, namespace, by_id, self.wanted.seed, numbers);
        let (compared, is_all, mut suspects) = self.compare(direction, &mut draw).await?;
        if compared == 0 {
            return Ok(Check::nothing(direction.name(), &nothing(namespace)));
        }
        if !suspects.settle(self.both, self.args.settle.0, |_| {}).await? {
            return Err(self.context.interrupted("interrupted"));
        }
        let beyond: u64 = suspects.beyond().values().map(|mismatches| mismatches.total()).sum();
        let different = suspects.kept().len() as u64 + beyond;
        let sampled = Sampled { compared, different, is_all };
        let differences = outcome::differences(self.both, &suspects, self.args.max_differences).await?;
        let check = Check::of(direction.name(), json!(compared), json!(compared - different), differences);
        let check = check.remark(sampled.text()).with("confidence", sampled.json());
        Ok(Check { passed: different == 0, ..check.with("seed", json!(self.wanted.seed)) })
    }

    /// About how many documents must be drawn, and of how many.
    async fn numbers(&self, direction: Direction) -> (u64, u64) {
        let source = estimate(&self.context.mongo, &self.sides.source).await;
        let target = estimate(&self.context.mongo, &self.sides.target).await;
        let size = self.wanted.size;
        match direction {
            Direction::Backward => (size, target),
            // About as many are valid as the target has: for one of them several are drawn.
            Direction::Forward if self.sides.predicate.valid().is_everything() => (size, source),
            Direction::Forward => {
                let per_valid = source as f64 / target.clamp(1, source.max(1)) as f64;
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a number of documents"
                )]
                let wanted = (size as f64 * per_valid) as u64;
                (wanted, source)
            }
        }
    }

    /// How many were compared, whether that was all, and what was not the same.
    async fn compare(&self, direction: Direction, draw: &mut Draw) -> Result<(u64, bool, Suspects)> {
        let (mut compared, mut suspects) = (0, Suspects::default());
        while compared < self.wanted.size {
            let ids = batch(draw).await?;
            if ids.is_empty() {
                return Ok((compared, true, suspects));
            }
            for (id, pair) in self.look_up(&ids).await? {
                if compared == self.wanted.size {
                    // This one, for a start, is not looked at.
                    return Ok((compared, false, suspects));
                }
                if !direction.concerns(&pair) {
                    continue;
                }
                compared += 1;
                if pair.source != pair.target {
                    suspects.add(Suspect::new(id, pair, Instant::now(), 0));
                }
            }
            show(&self.context.events, direction.name(), compared, self.wanted.size);
        }
        // One more that there is, valid or not, may be one that was not seen.
        let is_all = draw.next().await?.is_none();
        Ok((compared, is_all, suspects))
    }

    /// What stands on both sides, in the order in which they were drawn.
    async fn look_up(&self, ids: &[Id]) -> Result<Vec<(Id, Pair)>> {
        let values: Vec<RawBson> = ids.iter().filter_map(Id::value).collect();
        let interrupted = || self.context.interrupted("interrupted");
        let source = digests(self.both, Side::Source, &values).await?.ok_or_else(interrupted)?;
        let target = digests(self.both, Side::Target, &values).await?.ok_or_else(interrupted)?;
        let pair = |id: &Id| Pair { source: source.get(id).copied(), target: target.get(id).copied() };
        Ok(ids.iter().map(|id| (id.clone(), pair(id))).collect())
    }
}

/// The next documents that are drawn; none where there are no more.
///
/// # Errors
/// A stop where the server can't be read.
pub(super) async fn batch(draw: &mut Draw) -> Result<Vec<Id>> {
    let mut ids = Vec::new();
    while ids.len() < BATCH {
        let Some(drawn) = draw.next().await? else { break };
        ids.push(Id::from_value(&drawn.id));
    }
    Ok(ids)
}

fn nothing(namespace: &Namespace) -> String {
    format!("{namespace} is empty or has no valid documents")
}

async fn estimate(mongo: &Mongo, namespace: &Namespace) -> u64 {
    mongo.collection(namespace).estimated_document_count().await.unwrap_or(0)
}

fn show(events: &Events, phase: &str, done: u64, total: u64) {
    events.progress(Progress {
        phase: phase.into(),
        unit: "documents",
        done,
        total: Some(total),
        limited_by: Some("database".into()),
        detail: String::new(),
    });
}
