//! Documents drawn from a quarantine are in the source, byte for byte, and rejected
//! by the rule that they are kept under.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bson::{Document, RawBson, RawDocument, RawDocumentBuf};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Quarantined;
use crate::Context;
use crate::cleanse::count;
use crate::cli::verify::VerifyArgs;
use crate::config::values::Namespace;
use crate::error::Result;
use crate::mongo::Mongo;
use crate::mongo::draw::Draw;
use crate::mongo::exact;
use crate::mongo::quarantine::rule;
use crate::report::json::extended;
use crate::verify::check::Check;
use crate::verify::compare;
use crate::verify::confidence::Sampled;
use crate::verify::counts::PAUSE;
use crate::verify::differences::different;
use crate::verify::full::matching::{Digest, Id, digest_of};
use crate::verify::full::sides::Sizes;
use crate::verify::sample::batch;

/// The name of the check.
const NAME: &str = "sample quarantine to source";
/// Documents that are looked up at once, unless they are large.
const AT_ONCE: usize = 200;
/// Bytes of the documents that are looked up at once, about; both sides have them.
const BYTES_AT_ONCE: u64 = 4 << 20;
/// Documents that are read again where they differ; more are only counted.
const MOST_SUSPECTS: usize = 10_000;

/// A document that differed when it was read last.
#[derive(Debug, Clone)]
struct Suspect {
    id: Id,
    seen: Seen,
    /// Since when it has been just that.
    since: Instant,
}

/// How a document differed.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    /// As an entry of the result.
    difference: Value,
    /// What stood in the quarantine and in the source.
    bytes: [Option<Digest>; 2],
}

/// What has been compared.
#[derive(Debug, Default)]
struct Tally {
    compared: u64,
    is_all: bool,
    suspects: Vec<Suspect>,
    /// Documents that differ and are only counted.
    beyond: u64,
}

impl Tally {
    fn add(&mut self, suspects: impl IntoIterator<Item = Suspect>) {
        for suspect in suspects {
            if self.suspects.len() < MOST_SUSPECTS {
                self.suspects.push(suspect);
            } else {
                self.beyond += 1;
            }
        }
    }

    fn check(&self, most: usize, seed: u64) -> Check {
        let different = self.suspects.len() as u64 + self.beyond;
        let differences = self.suspects.iter().take(most).map(Suspect::json).collect();
        let sampled = Sampled { compared: self.compared, different, is_all: self.is_all };
        let mut remark = sampled.text();
        if self.beyond > 0 {
            remark += &format!("; {} were not read again", self.beyond);
        }
        let check = Check::of(NAME, json!(self.compared), json!(self.compared - different), differences);
        let check = check.remark(remark).with("confidence", sampled.json()).with("seed", json!(seed));
        Check { passed: different == 0 && self.compared > 0, ..check }
    }
}

impl Suspect {
    fn json(&self) -> Value {
        let mut entry = self.seen.difference.clone();
        entry["age_seconds"] = json!(self.since.elapsed().as_secs_f64());
        entry
    }
}

impl Quarantined<'_> {
    /// Compares so many documents, and again for a while those that differ.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub(super) async fn sample(
        &self,
        context: &Context,
        args: &VerifyArgs,
        size: u64,
        seed: u64,
    ) -> Result<Check> {
        let mongo = &context.mongo;
        let population = count::exactly(mongo, self.quarantine, &Document::new()).await?;
        if population == 0 {
            // Whether that is right is told by the counts.
            return Ok(Check::of(NAME, json!(0), json!(0), Vec::new()).remark("nothing is quarantined"));
        }
        let by_id = mongo.describe(self.quarantine).await?.is_some_and(|found| found.index("_id_").is_some());
        let mut draw = Draw::new(mongo, self.quarantine, by_id, seed, (size, population));
        let sizes = Sizes::of(mongo, [self.quarantine, &self.sides.source]).await?;
        let at_once = usize::try_from(BYTES_AT_ONCE / sizes.average).unwrap_or(AT_ONCE).clamp(1, AT_ONCE);
        let mut tally = self.compare(mongo, &mut draw, size, at_once).await?;
        self.settle(mongo, &mut tally.suspects, args.settle.0, at_once).await?;
        Ok(tally.check(args.max_differences, seed))
    }

    async fn compare(&self, mongo: &Mongo, draw: &mut Draw, size: u64, at_once: usize) -> Result<Tally> {
        let mut tally = Tally::default();
        while tally.compared < size {
            let mut ids = batch(draw).await?;
            if ids.is_empty() {
                return Ok(Tally { is_all: true, ..tally });
            }
            let left = usize::try_from(size - tally.compared).unwrap_or(usize::MAX);
            let has_more = ids.len() > left;
            ids.truncate(left);
            for part in ids.chunks(at_once) {
                let looked_up = self.look_up(mongo, part).await?;
                tally.compared += looked_up.documents;
                let since = Instant::now();
                tally.add(looked_up.different.into_iter().map(|(id, seen)| Suspect { id, seen, since }));
            }
            if has_more && tally.compared == size {
                return Ok(tally);
            }
        }
        let is_all = draw.next().await?.is_none();
        Ok(Tally { is_all, ..tally })
    }

    /// Reads them again for so long, or until none is left.
    async fn settle(
        &self,
        mongo: &Mongo,
        suspects: &mut Vec<Suspect>,
        time: Duration,
        at_once: usize,
    ) -> Result<()> {
        let deadline = Instant::now() + time;
        while !suspects.is_empty() {
            let mut left = Vec::new();
            for chunk in suspects.chunks(at_once) {
                let ids: Vec<Id> = chunk.iter().map(|suspect| suspect.id.clone()).collect();
                let mut now = self.look_up(mongo, &ids).await?.different;
                left.extend(
                    chunk.iter().filter_map(|suspect| Some(judge(suspect, now.remove(&suspect.id)?))),
                );
            }
            *suspects = left;
            if suspects.is_empty() || Instant::now() + PAUSE > deadline {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    /// Reads these documents of the quarantine and what the source has of them.
    async fn look_up(&self, mongo: &Mongo, ids: &[Id]) -> Result<LookedUp> {
        let stored = stored(mongo, self.quarantine, ids).await?;
        let mut looked_up = LookedUp { documents: stored.len() as u64, different: HashMap::new() };
        let mut by_rule: HashMap<&str, Vec<RawDocumentBuf>> = HashMap::new();
        for stored in &stored {
            match mongo.unwrap_quarantined(self.quarantine, stored).await {
                Ok(document) => by_rule.entry(rule(stored).unwrap_or_default()).or_default().push(document),
                Err(error) => looked_up.add(stored, || {
                    let shown = exact::id_of(stored).map(|id| extended(id.as_raw_bson_ref()));
                    let difference = json!({"_id": shown, "kind": "unreadable", "detail": error.message()});
                    Some(Seen { difference, bytes: [Some(digest_of(stored)), None] })
                }),
            }
        }
        let hits = self.sides.predicate.first_hits();
        for (rule, documents) in by_rule {
            let others = match hits.iter().find(|(name, _)| name == rule) {
                Some((_, condition)) => rejected(mongo, &self.sides.source, condition, &documents).await?,
                None => HashMap::new(),
            };
            for document in &documents {
                let other = Id::of(document).and_then(|id| others.get(&id));
                looked_up.add(document, || seen(document, other));
            }
        }
        Ok(looked_up)
    }
}

/// What was read of some documents.
struct LookedUp {
    /// Those that the quarantine has.
    documents: u64,
    different: HashMap<Id, Seen>,
}

impl LookedUp {
    fn add(&mut self, document: &RawDocumentBuf, seen: impl FnOnce() -> Option<Seen>) {
        if let Some((id, seen)) = Id::of(document).zip(seen()) {
            self.different.insert(id, seen);
        }
    }
}

/// What is left of a suspicion when that was seen; what changed is as old as this.
fn judge(suspect: &Suspect, seen: Seen) -> Suspect {
    let since = if seen == suspect.seen { suspect.since } else { Instant::now() };
    Suspect { id: suspect.id.clone(), seen, since }
}

/// How a quarantined document differs from what the source has.
fn seen(document: &RawDocumentBuf, other: Option<&RawDocumentBuf>) -> Option<Seen> {
    let shown = extended(exact::id_of(document)?.as_raw_bson_ref());
    let difference = match other {
        None => json!({"_id": shown, "kind": "extra"}),
        Some(other) => different(shown, &compare::difference(other, document))?,
    };
    Some(Seen { difference, bytes: [Some(digest_of(document)), other.map(|other| digest_of(other))] })
}

/// The documents with exactly these `_id`s, as they are stored.
async fn stored(mongo: &Mongo, quarantine: &Namespace, ids: &[Id]) -> Result<Vec<RawDocumentBuf>> {
    let values: Vec<RawBson> = ids.iter().filter_map(Id::value).collect();
    let asked_for: HashSet<&Id> = ids.iter().collect();
    let found = mongo.by_ids(quarantine, &values, &Document::new(), None, RawDocument::to_owned).await?;
    let is_asked_for = |document: &RawDocumentBuf| Id::of(document).is_some_and(|id| asked_for.contains(&id));
    Ok(found.into_iter().filter(is_asked_for).collect())
}

/// Those of these documents that a collection has and that meet a condition, by the
/// bytes of their `_id`s.
async fn rejected(
    mongo: &Mongo,
    namespace: &Namespace,
    condition: &Document,
    documents: &[RawDocumentBuf],
) -> Result<HashMap<Id, RawDocumentBuf>> {
    let ids: Vec<RawBson> = documents.iter().filter_map(|document| exact::id_of(document)).collect();
    let found = mongo.by_ids(namespace, &ids, condition, None, RawDocument::to_owned).await?;
    Ok(found.into_iter().filter_map(|document| Some((Id::of(&document)?, document))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::rawdoc;

    #[test]
    fn what_stays_keeps_its_age_and_what_changes_is_as_old_as_that() {
        let (stored, other) = (rawdoc! {"_id": 1, "n": 2}, rawdoc! {"_id": 1, "n": 3});
        assert!(seen(&stored, Some(&stored)).is_none());
        let extra = seen(&stored, None).expect("a difference");
        assert_eq!(extra.difference["kind"], "extra");
        let since = Instant::now() - Duration::from_secs(5);
        let suspect = Suspect { id: Id::of(&stored).expect("an _id"), seen: extra.clone(), since };
        assert_eq!(judge(&suspect, extra).since, since);
        assert!(suspect.json()["age_seconds"].as_f64().is_some_and(|age| age >= 5.0));
        let changed = seen(&stored, Some(&other)).expect("a difference");
        assert!(judge(&suspect, changed).since > since);
    }

    #[test]
    fn only_so_many_are_read_again_and_all_are_counted() {
        let document = rawdoc! {"_id": 1};
        let (id, seen) = (Id::of(&document).expect("an _id"), seen(&document, None).expect("a difference"));
        let suspect = Suspect { id, seen, since: Instant::now() };
        let mut tally = Tally { compared: 20_000, ..Tally::default() };
        tally.add(std::iter::repeat_n(suspect, MOST_SUSPECTS + 7));
        assert_eq!((tally.suspects.len(), tally.beyond), (MOST_SUSPECTS, 7));
        let check = tally.check(3, 1);
        assert_eq!((check.differences.len(), check.found), (3, json!(20_000 - MOST_SUSPECTS - 7)));
    }
}
