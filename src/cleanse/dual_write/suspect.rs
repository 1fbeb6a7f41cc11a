//! A document that differed when it was read last. Pure.

use std::time::Duration;

use tokio::time::Instant;

use crate::cleanse::marks::Mark;
use crate::verify::full::matching::Id;
use crate::verify::pairs::Seen;

/// Repairs of one document before it is given up.
const MOST_ATTEMPTS: u32 = 5;
/// Grace times after which a document that does not stand still is given up.
const PATIENCE: u32 = 15;
/// It is looked at for so long at least.
const SHORTEST_PATIENCE: Duration = Duration::from_secs(20);

/// A document under suspicion.
#[derive(Debug)]
pub(super) struct Suspect {
    /// Its `_id`.
    pub(super) id: Id,
    /// The mark that led here, to be removed in the end.
    pub(super) mark: Option<Mark>,
    /// What was seen last.
    pub(super) seen: Seen,
    /// Since when it has been just that, or when it was repaired.
    pub(super) since: Instant,
    /// When it was first looked at.
    pub(super) first: Instant,
    /// Repairs so far.
    pub(super) attempts: u32,
    /// Its place among the reported differences.
    pub(super) entry: Option<usize>,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing: both sides are the same.
    Agrees,
    /// It was just written, so look again.
    Wait,
    /// It stood still for the grace time.
    Repair,
    /// It does not stand still, or can't be repaired.
    GiveUp,
}

impl Suspect {
    /// Seen for the first time.
    pub(super) fn new(id: Id, mark: Option<Mark>, seen: Seen, now: Instant) -> Self {
        Self { id, mark, seen, since: now, first: now, attempts: 0, entry: None }
    }

    /// What follows from another look.
    pub(super) fn judge(&mut self, seen: Seen, now: Instant, grace: Duration) -> Verdict {
        let is_quiet = |since: Instant| now.duration_since(since) >= grace;
        if seen.kind().is_none() {
            // A repair must stand: the application may have been about to write.
            let stands = self.attempts == 0 || is_quiet(self.since);
            return if stands { Verdict::Agrees } else { Verdict::Wait };
        }
        if seen != self.seen {
            self.seen = seen;
            self.since = now;
        }
        let patience = SHORTEST_PATIENCE.max(grace * PATIENCE);
        if self.attempts >= MOST_ATTEMPTS || now.duration_since(self.first) > patience {
            Verdict::GiveUp
        } else if is_quiet(self.since) {
            Verdict::Repair
        } else {
            Verdict::Wait
        }
    }

    /// Notes an attempt to repair it.
    pub(super) fn attempted(&mut self, now: Instant) {
        self.attempts += 1;
        self.since = now;
    }

    /// Notes that it can't be repaired.
    pub(super) fn hopeless(&mut self) {
        self.attempts = MOST_ATTEMPTS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::pairs::Version;
    use bson::rawdoc;

    const GRACE: Duration = Duration::from_secs(2);

    fn seen(source: i32, target: i32) -> Seen {
        let version = |value: i32| (value > 0).then(|| Version::of(&rawdoc! {"_id": 1, "v": value}));
        Seen { source: version(source), target: version(target) }
    }

    fn suspect(now: Instant) -> Suspect {
        Suspect::new(Id::of(&rawdoc! {"_id": 1}).expect("an _id"), None, seen(1, 0), now)
    }

    #[test]
    fn only_what_stands_still_is_repaired() {
        let start = Instant::now();
        let mut suspect = suspect(start);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(suspect.judge(seen(1, 0), at(1), GRACE), Verdict::Wait);
        assert_eq!(suspect.judge(seen(2, 1), at(2), GRACE), Verdict::Wait, "written on both sides");
        assert_eq!(suspect.judge(seen(2, 1), at(3), GRACE), Verdict::Wait);
        assert_eq!(suspect.judge(seen(2, 1), at(4), GRACE), Verdict::Repair);
        assert_eq!(suspect.judge(seen(2, 2), at(4), GRACE), Verdict::Agrees, "it was late");
    }

    #[test]
    fn a_repair_must_stand_for_the_grace_time() {
        let start = Instant::now();
        let mut suspect = suspect(start);
        let at = |seconds| start + Duration::from_secs(seconds);
        suspect.attempted(at(2));
        assert_eq!(suspect.judge(seen(1, 1), at(3), GRACE), Verdict::Wait);
        assert_eq!(suspect.judge(seen(1, 1), at(4), GRACE), Verdict::Agrees);
        assert_eq!(suspect.judge(seen(0, 1), at(5), GRACE), Verdict::Wait, "deleted meanwhile");
        assert_eq!(suspect.judge(seen(0, 1), at(7), GRACE), Verdict::Repair);
    }

    #[test]
    fn what_never_stands_still_or_fails_again_and_again_is_given_up() {
        let start = Instant::now();
        let mut moving = suspect(start);
        let verdicts = (1..=31).map(|second| {
            moving.judge(
                seen(second, second + 1),
                start + Duration::from_secs(second.unsigned_abs().into()),
                GRACE,
            )
        });
        assert_eq!(verdicts.last(), Some(Verdict::GiveUp));
        let mut failing = suspect(start);
        failing.hopeless();
        assert_eq!(failing.judge(seen(1, 0), start, GRACE), Verdict::GiveUp);
    }
}
