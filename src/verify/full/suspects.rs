//! Documents that were seen to differ, until it is known whether they do.
//!
//! Both sides can't be read at the same moment. What differs while writers are
//! live is read again until it agrees or the time for that is over. A document that
//! is written all the time is never seen to agree: it is judged by what the source
//! held a moment before.

use std::collections::HashMap;
use std::time::Duration;

use bson::{Document, RawBson, RawDocumentBuf};
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
/// Before the time is over, those that never rest are looked at without a pause for
/// so long, to see as many as possible of the states that the target may come to hold.
const CHASE: Duration = Duration::from_secs(2);
/// What the source held earlier is remembered for so many changes of one document,
const MOST_EARLIER: usize = 256;
/// and of all of them together for about so many.
const MOST_EARLIER_OF_ALL: usize = 50_000;

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
    /// When it was seen last.
    looked: Instant,
    /// What stood in the target at first.
    first_target: Option<Digest>,
    /// What stood in the source earlier, and until when it was seen there.
    earlier: Vec<(Option<Digest>, Instant)>,
    /// Until when the source was seen to hold what the target was seen to hold later,
    /// and not at first.
    in_step: Option<Instant>,
}

impl Suspect {
    /// One that is seen for the first time.
    pub fn new(id: Id, pair: Pair, since: Instant, range: i32) -> Self {
        let (first_target, earlier) = (pair.target, Vec::new());
        Self { id, pair, since, range, looked: since, first_target, earlier, in_step: None }
    }

    /// What is left of the suspicion when that is seen; remembers so many earlier states.
    fn again(&self, seen: Pair, now: Instant, most_earlier: usize) -> Option<Self> {
        if seen.source == seen.target {
            return None;
        }
        let mut next = Self { pair: seen, looked: now, ..self.clone() };
        if seen != self.pair {
            next.since = now;
        }
        if seen.source != self.pair.source {
            next.earlier.push((self.pair.source, self.looked));
            let surplus = next.earlier.len().saturating_sub(most_earlier);
            next.earlier.drain(..surplus);
        }
        if seen.target != self.first_target {
            let held = next.earlier.iter().rfind(|(digest, _)| *digest == seen.target);
            next.in_step = next.in_step.max(held.map(|(_, until)| *until));
        }
        Some(next)
    }

    /// Whether the target keeps in step with a source that does not rest: it came to
    /// hold what the source held, and not before that moment.
    fn is_in_step(&self, not_before: Instant) -> bool {
        self.in_step.is_some_and(|until| until >= not_before)
    }
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
        self.bytes += size_of::<Suspect>() + suspect.id.entry_bytes();
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

    /// Reads them again for so long, or until none is left. At the end those are let
    /// go whose target is no further behind the source than half of that time. False
    /// where the run is to stop before that is known.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn settle(
        &mut self,
        sides: &Sides,
        time: Duration,
        mut show: impl FnMut(usize),
    ) -> Result<bool> {
        let begun = Instant::now();
        let (halfway, deadline) = (begun + time / 2, begun + time);
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
            let chase = if self.are_few_and_move() { deadline - CHASE.min(time / 4) } else { deadline };
            tokio::select! {
                () = tokio::time::sleep(pause.min(chase.saturating_duration_since(now))) => {}
                () = sides.stop.cancelled() => return Ok(false),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        self.kept.retain(|suspect| !suspect.is_in_step(halfway));
        Ok(true)
    }

    /// Whether one look sees them all, and the source of one does not rest.
    fn are_few_and_move(&self) -> bool {
        self.kept.len() <= MOST_LOOKED_UP && self.kept.iter().any(|suspect| !suspect.earlier.is_empty())
    }

    /// One look; those that agree are let go.
    async fn look_again(&mut self, sides: &Sides) -> Result<bool> {
        let mut left = Vec::new();
        let size = usize::try_from(sides.batch()).unwrap_or(1).clamp(1, MOST_LOOKED_UP);
        let most_earlier = (MOST_EARLIER_OF_ALL / self.kept.len().max(1)).clamp(2, MOST_EARLIER);
        for chunk in self.kept.chunks(size) {
            // The source first: whatever follows it has a moment more.
            let ids: Vec<RawBson> = chunk.iter().filter_map(|suspect| suspect.id.value()).collect();
            let Some(source) = digests(sides, Side::Source, &ids).await? else { return Ok(false) };
            let Some(target) = digests(sides, Side::Target, &ids).await? else { return Ok(false) };
            let now = Instant::now();
            left.extend(chunk.iter().filter_map(|suspect| {
                let pair = Pair {
                    source: source.get(&suspect.id).copied(),
                    target: target.get(&suspect.id).copied(),
                };
                suspect.again(pair, now, most_earlier)
            }));
        }
        self.kept = left;
        Ok(true)
    }
}

/// What stands on a side for these `_id`s and others that the server takes for equal;
/// `None` where the run is to stop.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn digests(sides: &Sides, side: Side, ids: &[RawBson]) -> Result<Option<HashMap<Id, Digest>>> {
    let scan = sides.scan(side, Document::new());
    let read = retrying(format!("reading differing documents of {} again", scan.namespace), || async {
        let (mut found, mut in_parts) = (HashMap::new(), Vec::new());
        let is_whole = sides
            .mongo
            .scan_ids(&scan, ids, &sides.stop, |documents| {
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
    let Some(value) = id.value() else { return Ok(None) };
    let scan = sides.scan(side, Document::new());
    let found = retrying(format!("reading a differing document of {}", scan.namespace), || async {
        let mut found = None;
        sides
            .mongo
            .scan_ids(&scan, std::slice::from_ref(&value), &sides.stop, |documents| {
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
        Suspect::new(id, pair, Instant::now() - Duration::from_secs(5), 3)
    }

    fn pair(source: u64, target: u64) -> Pair {
        let digest = |number: u64| (number > 0).then_some(number.into());
        Pair { source: digest(source), target: digest(target) }
    }

    #[test]
    fn what_agrees_is_let_go_and_what_stays_keeps_its_age() {
        let (suspect, now) = (suspect(1, pair(1, 2)), Instant::now());
        assert!(suspect.again(pair(1, 1), now, MOST_EARLIER).is_none());
        assert!(suspect.again(pair(0, 0), now, MOST_EARLIER).is_none());
        assert_eq!(suspect.again(pair(1, 2), now, MOST_EARLIER).expect("still there").since, suspect.since);
        let moved = suspect.again(pair(3, 2), now, MOST_EARLIER).expect("still there");
        assert_eq!(moved.since, now, "another mismatch than before");
        let gone = suspect.again(pair(1, 0), now, MOST_EARLIER).expect("still there");
        assert_eq!(gone.pair.target, None);
    }

    /// After a look per second at the pairs, from the first of them on.
    fn looked_at(pairs: &[Pair]) -> (Suspect, Instant) {
        let (first, begun) = (suspect(1, pairs[0]), Instant::now());
        let at = |number: usize| begun + Duration::from_secs(number as u64);
        let seen = pairs.iter().enumerate().skip(1);
        let last = seen.fold(first, |suspect, (number, pair)| {
            suspect.again(*pair, at(number), MOST_EARLIER).expect("still there")
        });
        (last, begun)
    }

    #[test]
    fn a_target_that_is_a_moment_behind_is_in_step_only_while_it_moves() {
        let in_step = |pairs: &[Pair], not_before: u64| {
            let (suspect, begun) = looked_at(pairs);
            suspect.is_in_step(begun + Duration::from_secs(not_before))
        };
        let moving = [pair(2, 1), pair(3, 1), pair(4, 3), pair(5, 4)];
        assert!(in_step(&moving, 2), "it has what the source had a second ago");
        assert!(!in_step(&moving, 3), "that is too long ago");
        assert!(!in_step(&[pair(2, 1), pair(1, 2), pair(2, 1)], 0), "it has what it had at first");
        assert!(!in_step(&[pair(2, 1), pair(3, 7), pair(4, 8)], 0), "the source never had that");
        let stuck = [pair(2, 1), pair(3, 1), pair(4, 3), pair(5, 3), pair(5, 3), pair(5, 3)];
        assert!(in_step(&stuck, 1) && !in_step(&stuck, 2), "it does not move on");
        let lost = [pair(1, 9), pair(2, 9), pair(0, 2), pair(0, 2), pair(0, 2)];
        assert!(in_step(&lost, 1) && !in_step(&lost, 2), "the deletion never came");
    }

    #[test]
    fn of_a_source_that_changes_for_long_the_latest_is_remembered() {
        let pairs: Vec<Pair> = (2..500).map(|number| pair(number, 1)).collect();
        let (suspect, _) = looked_at(&pairs);
        assert_eq!(suspect.earlier.len(), MOST_EARLIER);
        assert_eq!(suspect.earlier.last().map(|(digest, _)| *digest), Some(pair(498, 1).source));
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
