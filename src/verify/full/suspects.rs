//! Documents that were seen to differ, until it is known whether they do.
//!
//! Both sides can't be read at the same moment. What differs while writers are
//! live is read again until it agrees or the time for that is over.

use std::collections::HashMap;
use std::time::Duration;

use bson::{Bson, RawDocumentBuf, doc};
use tokio::time::Instant;

use super::matching::{Digest, Id, Pair, Side, digest_of};
use super::sides::Sides;
use crate::error::Result;
use crate::mongo::command::retrying;

/// What all suspects together may take in memory.
const MOST_BYTES: usize = 8 << 20;
/// Documents that are looked up at once.
const MOST_LOOKED_UP: usize = 200;
/// The first pause between two looks; each is twice as long as the one before.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A document that differed when it was read last.
#[derive(Debug, Clone)]
pub struct Suspect {
    /// Its `_id`.
    pub id: Id,
    /// What stood on both sides.
    pub pair: Pair,
    /// Since when it has been just that.
    pub since: Instant,
    /// The range that it was found in.
    pub range: i32,
}

/// How many documents of each kind differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mismatches {
    /// Lacking in the target.
    pub missing: u64,
    /// Only in the target.
    pub extra: u64,
    /// On both sides.
    pub different: u64,
}

impl Mismatches {
    /// Counts one.
    pub fn count(&mut self, pair: &Pair) {
        match (pair.source, pair.target) {
            (Some(_), None) => self.missing += 1,
            (None, _) => self.extra += 1,
            (Some(_), Some(_)) => self.different += 1,
        }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.missing + self.extra + self.different
    }
}

/// Suspects within a bound: those beyond it are only counted.
#[derive(Debug, Default)]
pub struct Suspects {
    kept: Vec<Suspect>,
    bytes: usize,
    beyond: HashMap<i32, Mismatches>,
}

impl Suspects {
    /// Adds one.
    pub fn add(&mut self, suspect: Suspect) {
        self.bytes += suspect.id.entry_bytes();
        if self.bytes <= MOST_BYTES {
            self.kept.push(suspect);
        } else {
            self.beyond.entry(suspect.range).or_default().count(&suspect.pair);
        }
    }

    /// Adds those of a range.
    pub fn append(&mut self, other: Self) {
        for (range, mismatches) in other.beyond {
            let sum = self.beyond.entry(range).or_default();
            sum.missing += mismatches.missing;
            sum.extra += mismatches.extra;
            sum.different += mismatches.different;
        }
        other.kept.into_iter().for_each(|suspect| self.add(suspect));
    }

    /// Those that are kept.
    pub fn kept(&self) -> &[Suspect] {
        &self.kept
    }

    /// Those that are only counted, by range.
    pub fn beyond(&self) -> &HashMap<i32, Mismatches> {
        &self.beyond
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.beyond.is_empty()
    }

    /// Reads them again for so long, or until none is left. False where the run
    /// is to stop before that is known.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn settle(
        &mut self,
        sides: &Sides,
        time: Duration,
        mut show: impl FnMut(usize),
    ) -> Result<bool> {
        let deadline = Instant::now() + time;
        let mut pause = SHORTEST_PAUSE;
        while !self.kept.is_empty() {
            if !self.look_again(sides).await? {
                return Ok(false);
            }
            show(self.kept.len());
            let now = Instant::now();
            if self.kept.is_empty() || now >= deadline {
                break;
            }
            tokio::select! {
                () = tokio::time::sleep(pause.min(deadline - now)) => {}
                () = sides.stop.cancelled() => return Ok(false),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Ok(true)
    }

    /// One look; those that agree are let go.
    async fn look_again(&mut self, sides: &Sides) -> Result<bool> {
        let mut left = Vec::new();
        let size = usize::try_from(sides.batch()).unwrap_or(1).clamp(1, MOST_LOOKED_UP);
        for chunk in self.kept.chunks(size) {
            // The source first: whatever follows it has a moment more.
            let ids = || chunk.iter().filter_map(|suspect| suspect.id.bson()).collect();
            let Some(source) = digests(sides, Side::Source, ids()).await? else { return Ok(false) };
            let Some(target) = digests(sides, Side::Target, ids()).await? else { return Ok(false) };
            left.extend(chunk.iter().filter_map(|suspect| {
                let pair = Pair {
                    source: source.get(&suspect.id).copied(),
                    target: target.get(&suspect.id).copied(),
                };
                judge(suspect, pair)
            }));
        }
        self.kept = left;
        Ok(true)
    }
}

/// What is left of a suspicion when that was seen. Pure but for the time of a
/// new state.
fn judge(suspect: &Suspect, seen: Pair) -> Option<Suspect> {
    if suspect.id.bson().is_none() {
        // An `_id` that can't be asked for: what the comparison saw stands.
        return Some(suspect.clone());
    }
    if seen.source == seen.target {
        return None;
    }
    let since = if seen == suspect.pair { suspect.since } else { Instant::now() };
    Some(Suspect { pair: seen, since, ..suspect.clone() })
}

/// What stands on a side for these `_id`s and others that the server takes for equal;
/// `None` where the run is to stop.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn digests(sides: &Sides, side: Side, ids: Vec<Bson>) -> Result<Option<HashMap<Id, Digest>>> {
    let scan = sides.scan(side, doc! {"_id": {"$in": ids}});
    let read = retrying(format!("reading differing documents of {} again", scan.namespace), || async {
        let (mut found, mut in_parts) = (HashMap::new(), Vec::new());
        let is_whole = sides
            .mongo
            .scan(&scan, &sides.stop, |documents| {
                for document in documents {
                    if sides.is_in_parts(side, document) {
                        in_parts.push((*document).to_owned());
                    }
                    if let Some(id) = Id::of(document) {
                        found.insert(id, digest_of(sides.compared(side, document)));
                    }
                }
                true
            })
            .await?;
        Ok(is_whole.then_some((found, in_parts)))
    })
    .await?;
    let Some((mut found, in_parts)) = read else { return Ok(None) };
    for document in in_parts {
        let Some(id) = Id::of(&document) else { continue };
        found.insert(id, digest_of(&sides.whole(side, document).await?));
    }
    Ok(Some(found))
}

/// The document with exactly that `_id`, as it stands now.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn fetch(sides: &Sides, side: Side, id: &Id) -> Result<Option<RawDocumentBuf>> {
    let Some(value) = id.bson() else { return Ok(None) };
    let scan = sides.scan(side, doc! {"_id": {"$in": [value]}});
    let found = retrying(format!("reading a differing document of {}", scan.namespace), || async {
        let mut found = None;
        sides
            .mongo
            .scan(&scan, &sides.stop, |documents| {
                // Under a collation others may be equal to it.
                found = documents
                    .iter()
                    .find(|document| Id::of(document).as_ref() == Some(id))
                    .map(|document| (*document).to_owned());
                found.is_none()
            })
            .await?;
        Ok(found)
    })
    .await?;
    match found {
        Some(document) => sides.whole(side, document).await.map(Some),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::rawdoc;

    fn suspect(id: i32, pair: Pair) -> Suspect {
        let id = Id::of(&rawdoc! {"_id": id}).expect("an _id");
        Suspect { id, pair, since: Instant::now() - Duration::from_secs(5), range: 3 }
    }

    #[test]
    fn what_agrees_is_let_go_and_what_stays_keeps_its_age() {
        let pair = Pair { source: Some(1), target: Some(2) };
        let suspect = suspect(1, pair);
        assert!(judge(&suspect, Pair { source: Some(1), target: Some(1) }).is_none());
        assert!(judge(&suspect, Pair { source: None, target: None }).is_none());
        assert_eq!(judge(&suspect, pair).expect("still there").since, suspect.since);
        let moved = judge(&suspect, Pair { source: Some(3), target: Some(2) }).expect("still there");
        assert!(moved.since > suspect.since, "another mismatch than before");
        let gone = judge(&suspect, Pair { source: Some(1), target: None }).expect("still there");
        assert_eq!(gone.pair.target, None);
    }

    #[test]
    fn those_beyond_the_bound_are_counted_by_range_and_kind() {
        let mut suspects = Suspects::default();
        let kinds = [(Some(1), None), (None, Some(1)), (Some(1), Some(2))];
        for (id, (source, target)) in (0..200_000).zip(kinds.into_iter().cycle()) {
            suspects.add(suspect(id, Pair { source, target }));
        }
        let beyond = suspects.beyond()[&3];
        assert_eq!(suspects.kept().len() as u64 + beyond.total(), 200_000);
        assert!((20_000..100_000).contains(&suspects.kept().len()));
        assert!(beyond.missing.abs_diff(beyond.extra) < 2 && beyond.extra.abs_diff(beyond.different) < 2);
        let mut others = Suspects::default();
        others.append(suspects);
        assert_eq!(others.beyond()[&3], beyond);
    }
}
