//! How many calls a day may see. Pure: the time is always given.
//!
//! A day is one of the configured time zone, with 23 or 25 hours where the
//! clocks change. What was used of it outlives the process: the holder of the
//! job stores a snapshot and the next one goes on from there.

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use super::window::{LONGEST_PLAN_DAYS, TimeZoneName};

/// The calls of today, and how many there may be.
#[derive(Debug, Clone)]
pub struct DailyBudget {
    /// Calls per day; 0 is no limit.
    limit: u64,
    zone: TimeZone,
    /// The day of the last call and its calls.
    used: Option<(Date, u64)>,
}

impl DailyBudget {
    /// A budget of `limit` calls per day, of which 0 means no limit; `stored` is
    /// the snapshot of an earlier holder.
    pub fn new(limit: u64, zone: &TimeZoneName, stored: Option<(Date, u64)>) -> Self {
        Self { limit, zone: zone.zone().clone(), used: stored }
    }

    /// Counts a call that leaves now.
    ///
    /// # Errors
    /// The moment, after now, at which the next day begins, where today's calls
    /// are used up; nothing is counted then.
    pub fn take(&mut self, now: Timestamp) -> Result<(), Timestamp> {
        let (day, used) = self.today(now);
        let refused = self.limit > 0 && used >= self.limit;
        self.used = Some((day, if refused { used } else { used + 1 }));
        if refused { Err(next_day(&self.zone, day, now)) } else { Ok(()) }
    }

    /// What to store: the day that a call now belongs to and the calls it has
    /// seen; `None` where there is no limit.
    pub fn calls_of_day(&self, now: Timestamp) -> Option<(Date, u64)> {
        (self.limit > 0).then(|| self.today(now))
    }

    /// The same with calls that may leave before the next snapshot, of which
    /// there are no more than the limit leaves.
    pub fn calls_of_day_with(&self, now: Timestamp, ahead: u64) -> Option<(Date, u64)> {
        self.calls_of_day(now).map(|(day, used)| (day, used.saturating_add(ahead).min(used.max(self.limit))))
    }

    /// The day that a call now belongs to, and the calls it has seen.
    fn today(&self, now: Timestamp) -> (Date, u64) {
        let today = now.to_zoned(self.zone.clone()).date();
        match self.used {
            Some((day, used)) if day == today => (day, used),
            // A clock that is put back over midnight, or one a bit behind that
            // of an earlier holder: the day has begun and has its calls.
            Some((day, used)) if day.yesterday().is_ok_and(|before| before == today) => (day, used),
            // A clock that was wrong must not cost the days until its date.
            Some((day, used)) if day > today => (today, used),
            _ => (today, 0),
        }
    }
}

/// The moment after `now` at which the day after `day` begins.
fn next_day(zone: &TimeZone, day: Date, now: Timestamp) -> Timestamp {
    let Ok(next) = day.tomorrow() else { return Timestamp::MAX };
    let midnight = zone.to_ambiguous_timestamp(next.at(0, 0, 0, 0));
    // Clocks that are put back may strike midnight twice.
    [midnight.earlier(), midnight.later()]
        .into_iter()
        .filter_map(Result::ok)
        .find(|begins| *begins > now)
        .unwrap_or(Timestamp::MAX)
}

/// The days from a moment on, what is left of the first one first: each with its
/// beginning and its end. Ends after a hundred years.
pub fn days(zone: &TimeZone, from: Timestamp) -> impl Iterator<Item = (Timestamp, Timestamp)> {
    let mut begins = from;
    (0..LONGEST_PLAN_DAYS).map_while(move |_| {
        let ends = next_day(zone, begins.to_zoned(zone.clone()).date(), begins);
        (ends < Timestamp::MAX).then(|| (std::mem::replace(&mut begins, ends), ends))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(name: &str) -> TimeZoneName {
        name.parse().expect("a zone")
    }

    fn time(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn date(text: &str) -> Date {
        text.parse().expect("a date")
    }

    #[test]
    fn a_day_has_so_many_calls_and_the_next_one_as_many_again() {
        let mut budget = DailyBudget::new(3, &zone("Asia/Seoul"), None);
        let evening = time("2026-11-22T23:00:00+09:00");
        let midnight = time("2026-11-23T00:00:00+09:00");
        let calls: Vec<_> = (0..5).map(|_| budget.take(evening)).collect();
        assert_eq!(calls, [Ok(()), Ok(()), Ok(()), Err(midnight), Err(midnight)]);
        assert_eq!(budget.calls_of_day(evening), Some((date("2026-11-22"), 3)));
        assert_eq!(budget.take(time("2026-11-22T23:59:59.999+09:00")), Err(midnight));
        assert_eq!(budget.calls_of_day(midnight), Some((date("2026-11-23"), 0)));
        assert_eq!(budget.take(midnight), Ok(()));
        assert_eq!(budget.calls_of_day(midnight), Some((date("2026-11-23"), 1)));
    }

    #[test]
    fn a_restart_goes_on_where_the_last_holder_was() {
        let noon = time("2026-11-22T12:00:00Z");
        let mut budget = DailyBudget::new(3, &zone("UTC"), Some((date("2026-11-22"), 2)));
        assert_eq!(budget.take(noon), Ok(()));
        let mut budget = DailyBudget::new(3, &zone("UTC"), budget.calls_of_day(noon));
        assert_eq!(budget.take(noon), Err(time("2026-11-23T00:00:00Z")));
        // A higher limit lets more through at once, a lower one none.
        assert_eq!(DailyBudget::new(4, &zone("UTC"), budget.calls_of_day(noon)).take(noon), Ok(()));
        assert!(DailyBudget::new(1, &zone("UTC"), budget.calls_of_day(noon)).take(noon).is_err());
        let mut later = DailyBudget::new(3, &zone("UTC"), Some((date("2026-11-01"), 3)));
        assert_eq!(later.take(noon), Ok(()));
    }

    #[test]
    fn a_snapshot_counts_ahead_but_never_beyond_the_limit() {
        let noon = time("2026-11-22T12:00:00Z");
        let stored = |used, ahead| {
            let budget = DailyBudget::new(30, &zone("UTC"), Some((date("2026-11-22"), used)));
            budget.calls_of_day_with(noon, ahead).map(|(_, calls)| calls)
        };
        assert_eq!((stored(5, 20), stored(5, 800), stored(40, 800)), (Some(25), Some(30), Some(40)));
        assert_eq!(DailyBudget::new(0, &zone("UTC"), None).calls_of_day_with(noon, 5), None);
    }

    #[test]
    fn no_limit_counts_and_never_refuses() {
        let mut budget = DailyBudget::new(0, &zone("UTC"), None);
        for _ in 0..1000 {
            assert_eq!(budget.take(time("2026-11-22T12:00:00Z")), Ok(()));
        }
        assert_eq!(budget.calls_of_day(time("2026-11-22T12:00:00Z")), None);
    }

    #[test]
    fn days_of_23_and_25_hours_end_at_their_midnight() {
        for (day, begins, ends, hours) in [
            ("2026-03-29", "2026-03-29T00:00:00+01:00", "2026-03-30T00:00:00+02:00", 23),
            ("2026-10-25", "2026-10-25T00:00:00+02:00", "2026-10-26T00:00:00+01:00", 25),
        ] {
            let (begins, ends) = (time(begins), time(ends));
            assert_eq!(ends.duration_since(begins).as_hours(), hours);
            let mut budget = DailyBudget::new(1, &zone("Europe/Berlin"), None);
            assert_eq!(budget.take(begins), Ok(()));
            for hour in 0..hours {
                let now = begins.checked_add(jiff::SignedDuration::from_hours(hour)).expect("a time");
                assert_eq!(budget.take(now), Err(ends), "{now}");
            }
            assert_eq!(budget.calls_of_day(begins), Some((date(day), 1)));
            assert_eq!(budget.take(ends), Ok(()));
        }
    }

    #[test]
    fn a_day_may_begin_at_one_or_its_midnight_come_late() {
        // Clocks go from 00:00 to 01:00, and from 24:00 back to 23:00.
        for (last, begins) in [
            ("2018-11-03T23:30:00-03:00", "2018-11-04T01:00:00-02:00"),
            ("2018-02-17T23:30:00-02:00", "2018-02-18T00:00:00-03:00"),
        ] {
            let mut budget = DailyBudget::new(1, &zone("America/Sao_Paulo"), None);
            assert_eq!(budget.take(time(last)), Ok(()));
            assert_eq!(budget.take(time(last)), Err(time(begins)));
            assert_eq!(budget.take(time(begins)), Ok(()));
        }
    }

    #[test]
    fn a_day_that_has_begun_is_not_begun_again() {
        let mut budget = DailyBudget::new(2, &zone("UTC"), Some((date("2026-11-23"), 2)));
        let just_before = time("2026-11-22T23:59:58Z");
        assert_eq!(budget.take(just_before), Err(time("2026-11-24T00:00:00Z")));
        // In Newfoundland the clocks went back at one minute past midnight.
        let mut budget = DailyBudget::new(1, &zone("America/St_Johns"), None);
        let midnight = time("2010-11-07T00:00:30-02:30");
        let (again, end) = (time("2010-11-06T23:30:00-03:30"), time("2010-11-08T00:00:00-03:30"));
        assert_eq!(budget.take(midnight), Ok(()));
        assert_eq!(budget.take(again), Err(end));
        assert_eq!(budget.take(time("2010-11-07T00:00:30-03:30")), Err(end));
        // The moment named is never in the past, wherever one starts.
        let mut fresh = DailyBudget::new(1, &zone("America/St_Johns"), None);
        assert_eq!(fresh.take(again), Ok(()));
        assert_eq!(fresh.take(again), Err(time("2010-11-07T00:00:00-03:30")));
    }

    #[test]
    fn a_clock_that_was_a_year_ahead_costs_a_day_at_most() {
        let mut budget = DailyBudget::new(2, &zone("UTC"), Some((date("2027-11-22"), 2)));
        let tomorrow = time("2026-11-23T00:00:00Z");
        assert_eq!(budget.take(time("2026-11-22T12:00:00Z")), Err(tomorrow));
        assert_eq!(budget.take(tomorrow), Ok(()));
        assert_eq!(budget.calls_of_day(tomorrow), Some((date("2026-11-23"), 1)));
    }

    #[test]
    fn days_follow_each_other_without_a_gap() {
        let from = time("2026-10-24T15:00:00+02:00");
        let berlin = zone("Europe/Berlin");
        let found: Vec<_> = days(berlin.zone(), from).take(3).collect();
        let [first, second, third] = [
            time("2026-10-25T00:00:00+02:00"),
            time("2026-10-26T00:00:00+01:00"),
            time("2026-10-27T00:00:00+01:00"),
        ];
        assert_eq!(found, [(from, first), (first, second), (second, third)]);
        assert_eq!(i64::try_from(days(berlin.zone(), from).count()), Ok(LONGEST_PLAN_DAYS));
    }
}
