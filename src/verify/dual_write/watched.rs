//! Documents that were touched, until it is known whether both sides agree about
//! them. Pure: no clock and no I/O.
//!
//! An application that writes to both sides makes their events alternate. So the
//! time in which the other side must follow is counted from the first event of
//! the last run on one side: a side that is written again and again while the
//! other one stays silent is not forgiven for never standing still.
//!
//! A document that differs is judged when the streams are known up to the moment
//! at which it was read. Where memory is full they can't be read that far; then
//! one that a second look, the grace time later, finds with a side that has not
//! moved was not followed in time, whatever the streams have yet to tell.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bson::Timestamp;
use tokio::time::Instant;

use crate::verify::full::matching::{Id, Side};
use crate::verify::pairs::{Kind, Seen};

/// What all watched documents together may take in memory; beyond it the streams
/// are read later.
const MOST_BYTES: usize = 24 << 20;
/// What those may take of it that differ; more are only counted.
const MOST_OVERDUE_BYTES: usize = 8 << 20;
/// What an entry takes besides its `_id`, about.
const ENTRY_BYTES: usize = 256;
/// A document that is written all the time is looked at after so many times the
/// grace time: it may agree in between.
const FORCED: u32 = 3;
/// How soon one that differs is looked at when the same side is written again.
const SOON: Duration = Duration::from_secs(1);

/// The watched documents.
#[derive(Debug)]
pub(super) struct Watched {
    grace: Duration,
    entries: HashMap<Id, Entry>,
    queue: VecDeque<(Instant, Id)>,
    urgent: Vec<Id>,
    awaiting: Vec<(Timestamp, Id)>,
    bytes: usize,
    overdue_bytes: usize,
    most_late: usize,
    /// What was found so far.
    pub(super) counts: Counts,
    /// Some of the writes that came late, and by how much.
    pub(super) late: Vec<(Id, Duration)>,
}

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counts {
    /// Writes to the source.
    pub(super) source_writes: u64,
    /// Writes to the target.
    pub(super) target_writes: u64,
    /// Documents found equal in time.
    pub(super) agreed: u64,
    /// Valid in the source, and not in the target.
    pub(super) missing: u64,
    /// In the target, and not valid in the source.
    pub(super) extra: u64,
    /// On both sides with other bytes.
    pub(super) different: u64,
    /// Equal in the end.
    pub(super) late: u64,
}

#[derive(Debug)]
struct Entry {
    /// The side that was written last, and since when only that one was.
    side: Side,
    run_start: Instant,
    first: Instant,
    last: Instant,
    is_queued: bool,
    seen: Seen,
    /// When that was seen.
    looked: Instant,
    /// Found to differ; judged when both streams are known up to this moment.
    awaiting: Option<Timestamp>,
    overdue: Option<Overdue>,
}

/// A difference that stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overdue {
    pub(super) kind: Kind,
    /// When the write was that the other side has not followed.
    pub(super) since: Instant,
}

impl Counts {
    /// Everything that was judged.
    pub(super) fn compared(&self) -> u64 {
        self.agreed + self.differing() + self.late
    }

    /// What differs.
    pub(super) fn differing(&self) -> u64 {
        self.missing + self.extra + self.different
    }

    fn of(&mut self, kind: Kind) -> &mut u64 {
        match kind {
            Kind::Missing => &mut self.missing,
            Kind::Extra => &mut self.extra,
            Kind::Different => &mut self.different,
        }
    }
}

impl Watched {
    /// Nothing yet. So long the other side may take, and so many late writes are
    /// told one by one.
    pub(super) fn new(grace: Duration, most_late: usize) -> Self {
        Self {
            grace,
            entries: HashMap::new(),
            queue: VecDeque::new(),
            urgent: Vec::new(),
            awaiting: Vec::new(),
            bytes: 0,
            overdue_bytes: 0,
            most_late,
            counts: Counts::default(),
            late: Vec::new(),
        }
    }

    /// Whether more events can be taken.
    pub(super) fn has_room(&self) -> bool {
        self.bytes < MOST_BYTES
    }

    /// Takes an event. Documents that are not watched yet are only taken where
    /// `admits` says so.
    pub(super) fn note(&mut self, id: Id, side: Side, at: Instant, admits: bool) {
        if admits {
            match side {
                Side::Source => self.counts.source_writes += 1,
                Side::Target => self.counts.target_writes += 1,
            }
        }
        let Some(entry) = self.entries.get_mut(&id) else {
            if admits {
                self.bytes += bytes_of(&id);
                self.queue.push_back((at + self.grace, id.clone()));
                self.entries.insert(id, Entry::new(side, at));
            }
            return;
        };
        entry.last = at;
        let is_answer = entry.side != side;
        if is_answer {
            (entry.side, entry.run_start, entry.awaiting) = (side, at, None);
        }
        if entry.overdue.is_some() && is_answer {
            self.urgent.push(id);
        } else if !entry.is_queued && entry.awaiting.is_none() {
            entry.is_queued = true;
            let wait = if entry.overdue.is_some() { SOON.min(self.grace) } else { self.grace };
            self.queue.push_back((at + wait, id));
        }
    }

    /// Documents to be looked at now, at most so many.
    pub(super) fn take_due(&mut self, now: Instant, most: usize) -> Vec<Id> {
        let mut due: Vec<Id> = Vec::new();
        while due.len() < most
            && let Some(id) = self.urgent.pop()
        {
            due.push(id);
        }
        let mut turns = self.queue.len();
        while due.len() < most
            && turns > 0
            && self.queue.front().is_some_and(|(due, _)| *due <= now)
            && let Some((_, id)) = self.queue.pop_front()
        {
            turns -= 1;
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            let quiet = entry.run_start + self.grace;
            if entry.overdue.is_none() && quiet > now && now < entry.first + self.grace * FORCED {
                self.queue.push_back((quiet, id));
            } else {
                entry.is_queued = false;
                due.push(id);
            }
        }
        due
    }

    /// What was seen of one at that time. Where the sides differ, it is only
    /// judged when the streams are known up to `until`.
    pub(super) fn looked(&mut self, id: &Id, seen: Seen, now: Instant, until: Timestamp) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let Some(kind) = seen.kind() else { return self.agree(id) };
        (entry.seen, entry.looked) = (seen, now);
        if let Some(overdue) = &mut entry.overdue {
            *self.counts.of(overdue.kind) -= 1;
            overdue.kind = kind;
            *self.counts.of(kind) += 1;
        } else if entry.run_start + self.grace <= now {
            entry.awaiting = Some(until);
            self.awaiting.push((until, id.clone()));
        } else {
            // Between two writes; it has another chance.
            entry.first = now;
            entry.is_queued = true;
            self.queue.push_back((entry.run_start + self.grace, id.clone()));
        }
    }

    /// Both streams are known up to this moment.
    pub(super) fn reached(&mut self, time: Timestamp) {
        let is_known = |until: &Timestamp| (until.time, until.increment) <= (time.time, time.increment);
        let (known, open) =
            std::mem::take(&mut self.awaiting).into_iter().partition(|(until, _)| is_known(until));
        self.awaiting = open;
        let known: Vec<(Timestamp, Id)> = known;
        for (until, id) in known {
            if self.entries.get(&id).is_some_and(|entry| entry.awaiting == Some(until)) {
                self.judge(&id);
            }
        }
    }

    /// Documents to be looked at a second time, at most so many: some only where
    /// nothing more can be taken, so that the streams can't tell about them.
    pub(super) fn take_stuck(&mut self, now: Instant, most: usize) -> Vec<Id> {
        if self.has_room() {
            return Vec::new();
        }
        let (entries, grace) = (&self.entries, self.grace);
        self.awaiting
            .retain(|(until, id)| entries.get(id).is_some_and(|entry| entry.awaiting == Some(*until)));
        let is_due = |id: &Id| entries.get(id).is_some_and(|entry| entry.looked + grace <= now);
        self.awaiting.iter().map(|(_, id)| id).filter(|id| is_due(id)).take(most).cloned().collect()
    }

    /// What a second look has seen of one. A side that has moved since the first
    /// one may have followed: it is looked at again.
    pub(super) fn looked_again(&mut self, id: &Id, seen: Seen, now: Instant) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        if seen.kind().is_none() {
            return self.agree(id);
        }
        let before = std::mem::replace(&mut entry.seen, seen);
        entry.looked = now;
        if before.source == seen.source || before.target == seen.target {
            self.judge(id);
        }
    }

    /// The difference that was seen stands.
    fn judge(&mut self, id: &Id) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        entry.awaiting = None;
        let Some(kind) = entry.seen.kind() else { return };
        entry.overdue = Some(Overdue { kind, since: entry.run_start });
        *self.counts.of(kind) += 1;
        self.overdue_bytes += bytes_of(id);
        if self.overdue_bytes > MOST_OVERDUE_BYTES {
            self.overdue_bytes -= bytes_of(id);
            self.remove(id);
        }
    }

    /// Whether everything is judged.
    pub(super) fn is_settled(&self) -> bool {
        self.entries.values().all(|entry| entry.overdue.is_some())
    }

    /// Documents that are not judged.
    pub(super) fn unsettled(&self) -> u64 {
        let open = self.entries.values().filter(|entry| entry.overdue.is_none()).count();
        u64::try_from(open).unwrap_or(u64::MAX)
    }

    /// The differences that stand, the oldest first.
    pub(super) fn overdue(&self) -> Vec<(Id, Overdue)> {
        let mut overdue: Vec<(Id, Overdue)> =
            self.entries.iter().filter_map(|(id, entry)| Some((id.clone(), entry.overdue?))).collect();
        overdue.sort_by(|(id, one), (other_id, other)| (one.since, id).cmp(&(other.since, other_id)));
        overdue
    }

    fn agree(&mut self, id: &Id) {
        let Some(entry) = self.entries.get(id) else { return };
        if let Some(overdue) = entry.overdue {
            let by = entry.last.saturating_duration_since(overdue.since);
            *self.counts.of(overdue.kind) -= 1;
            self.counts.late += 1;
            self.overdue_bytes -= bytes_of(id);
            if self.late.len() < self.most_late {
                self.late.push((id.clone(), by));
            }
        } else {
            self.counts.agreed += 1;
        }
        self.remove(id);
    }

    fn remove(&mut self, id: &Id) {
        if self.entries.remove(id).is_some() {
            self.bytes -= bytes_of(id);
        }
    }
}

impl Entry {
    fn new(side: Side, at: Instant) -> Self {
        Self {
            side,
            run_start: at,
            first: at,
            last: at,
            is_queued: true,
            seen: Seen::default(),
            looked: at,
            awaiting: None,
            overdue: None,
        }
    }
}

fn bytes_of(id: &Id) -> usize {
    // The `_id` stands in the map and in the queue.
    2 * id.entry_bytes() + ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::pairs::Version;
    use bson::rawdoc;

    const GRACE: Duration = Duration::from_secs(10);
    const UNTIL: Timestamp = Timestamp { time: 5, increment: 1 };

    fn id(number: i32) -> Id {
        Id::of(&rawdoc! {"_id": number}).expect("an _id")
    }

    fn seen(source: i32, target: i32) -> Seen {
        let version = |value: i32| (value > 0).then(|| Version::of(&rawdoc! {"_id": 1, "v": value}));
        Seen { source: version(source), target: version(target) }
    }

    struct Bench {
        watched: Watched,
        start: Instant,
    }

    impl Bench {
        fn new() -> Self {
            Self { watched: Watched::new(GRACE, 10), start: Instant::now() }
        }

        fn at(&self, seconds: u64) -> Instant {
            self.start + Duration::from_secs(seconds)
        }

        fn write(&mut self, side: Side, seconds: u64) {
            let at = self.at(seconds);
            self.watched.note(id(1), side, at, true);
        }

        /// Looks at what is due; returns whether anything was.
        fn look(&mut self, seconds: u64, seen: Seen) -> bool {
            let now = self.at(seconds);
            let due = self.watched.take_due(now, 10);
            for id in &due {
                self.watched.looked(id, seen, now, UNTIL);
            }
            !due.is_empty()
        }
    }

    #[test]
    fn a_write_to_both_sides_agrees() {
        let mut bench = Bench::new();
        bench.write(Side::Source, 0);
        bench.write(Side::Target, 1);
        assert!(!bench.look(10, seen(1, 1)), "ten seconds after the last write");
        assert!(bench.look(11, seen(1, 1)));
        assert_eq!(bench.watched.counts.agreed, 1);
        assert!(bench.watched.is_settled() && bench.watched.entries.is_empty() && bench.watched.bytes == 0);
    }

    #[test]
    fn a_write_to_one_side_is_overdue_once_the_streams_are_known() {
        let mut bench = Bench::new();
        bench.write(Side::Source, 0);
        assert!(bench.look(10, seen(1, 0)));
        bench.watched.reached(Timestamp { time: 5, increment: 0 });
        assert_eq!((bench.watched.counts.missing, bench.watched.is_settled()), (0, false));
        bench.watched.reached(UNTIL);
        assert_eq!((bench.watched.counts.missing, bench.watched.is_settled()), (1, true));
        assert_eq!(bench.watched.overdue()[0].1, Overdue { kind: Kind::Missing, since: bench.start });
    }

    #[test]
    fn a_write_that_was_on_its_way_when_the_sides_were_read_is_no_difference() {
        let mut bench = Bench::new();
        bench.write(Side::Source, 0);
        assert!(bench.look(10, seen(1, 0)));
        bench.write(Side::Target, 10);
        bench.watched.reached(UNTIL);
        assert_eq!(bench.watched.counts.missing, 0);
        assert!(bench.look(20, seen(1, 1)));
        assert_eq!(bench.watched.counts.agreed, 1);
    }

    #[test]
    fn a_late_write_is_told_by_how_much() {
        let mut bench = Bench::new();
        bench.write(Side::Source, 0);
        assert!(bench.look(10, seen(2, 1)));
        bench.watched.reached(UNTIL);
        assert_eq!(bench.watched.counts.different, 1);
        bench.write(Side::Target, 13);
        assert!(bench.look(13, seen(2, 2)), "looked at without another wait");
        let counts = bench.watched.counts;
        assert_eq!((counts.different, counts.late, counts.agreed), (0, 1, 0));
        assert_eq!(bench.watched.late, [(id(1), Duration::from_secs(13))]);
        assert_eq!((bench.watched.bytes, bench.watched.overdue_bytes), (0, 0));
    }

    #[test]
    fn a_side_that_never_rests_while_the_other_is_silent_is_found() {
        let mut bench = Bench::new();
        for second in 0..12 {
            bench.write(Side::Source, second);
        }
        assert!(bench.look(12, seen(9, 1)));
        bench.write(Side::Source, 13);
        bench.watched.reached(UNTIL);
        assert_eq!(bench.watched.counts.different, 1);
    }

    #[test]
    fn one_that_is_written_on_both_sides_all_the_time_is_no_difference() {
        let mut bench = Bench::new();
        for second in 0..60 {
            bench.write(if second % 2 == 0 { Side::Source } else { Side::Target }, second);
            bench.look(second, seen(2, 1));
            bench.watched.reached(UNTIL);
        }
        assert_eq!((bench.watched.counts.differing(), bench.watched.unsettled()), (0, 1));
        assert!((60..100).any(|second| bench.look(second, seen(2, 2))));
        assert_eq!(bench.watched.counts.agreed, 1);
    }

    #[test]
    fn memory_is_bounded_and_all_differences_are_counted() {
        let mut bench = Bench::new();
        let total = 80_000;
        let mut noted = 0;
        while noted < total {
            while noted < total && bench.watched.has_room() {
                bench.watched.note(id(noted), Side::Source, bench.start, true);
                noted += 1;
            }
            let now = bench.at(10);
            for id in bench.watched.take_due(now, usize::MAX) {
                bench.watched.looked(&id, seen(1, 0), now, UNTIL);
            }
            bench.watched.reached(UNTIL);
        }
        assert_eq!(bench.watched.counts.missing, u64::try_from(total).expect("small"));
        assert!(bench.watched.bytes <= MOST_BYTES + 1024);
        assert!(bench.watched.overdue().len() < 60_000, "the rest is counted only");
    }

    #[test]
    fn memory_that_is_full_does_not_end_the_judging() {
        let mut bench = Bench::new();
        let mut noted = 0;
        while bench.watched.has_room() {
            bench.watched.note(id(noted), Side::Source, bench.start, true);
            noted += 1;
        }
        let look = bench.at(10);
        for id in bench.watched.take_due(look, usize::MAX) {
            bench.watched.looked(&id, seen(2, 1), look, UNTIL);
        }
        // The streams are never known up to then: there is no room for what comes first.
        assert!(bench.watched.take_stuck(bench.at(19), usize::MAX).is_empty(), "not yet");
        let again = bench.at(20);
        let stuck = bench.watched.take_stuck(again, usize::MAX);
        assert_eq!(stuck.len(), usize::try_from(noted).expect("small"));
        bench.watched.looked_again(&stuck[0], seen(2, 2), again);
        bench.watched.looked_again(&stuck[1], seen(4, 3), again);
        for id in &stuck[2..] {
            bench.watched.looked_again(id, seen(3, 1), again);
        }
        let counts = bench.watched.counts;
        assert_eq!(counts.agreed, 1, "it was followed");
        assert_eq!(
            counts.different,
            u64::try_from(noted - 2).expect("small"),
            "both sides of one have moved"
        );
        assert!(bench.watched.has_room() && bench.watched.unsettled() == 1);
        assert!(bench.watched.take_stuck(bench.at(90), usize::MAX).is_empty(), "the streams go on");
    }

    #[test]
    fn what_is_touched_after_the_end_does_not_count() {
        let mut bench = Bench::new();
        bench.watched.note(id(1), Side::Source, bench.start, false);
        assert!(bench.watched.is_settled());
        assert_eq!(bench.watched.counts, Counts::default());
    }
}
