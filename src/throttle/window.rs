//! Times of day at which calls may be made, in a time zone with its changes of
//! the clock. Pure: the time is always given.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::civil::{Date, Time};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Span, Timestamp};
use serde::Deserialize;
use serde::de::{self, Deserializer};

/// A span of the day such as `01:00-06:00`; where the end is not after the
/// start it lies on the next day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    start: Time,
    end: Time,
}

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || format!("`{text}` is no window: write it as in `01:00-06:00`");
        let time = |part: &str| -> Result<Time, String> {
            if part.trim() == "24:00" {
                return Ok(Time::midnight());
            }
            Time::strptime("%H:%M", part.trim()).map_err(|_| usage())
        };
        let (start, end) = text.split_once('-').ok_or_else(usage)?;
        Ok(Self { start: time(start)?, end: time(end)? })
    }
}

impl fmt::Display for Window {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}-{}", self.start.strftime("%H:%M"), self.end.strftime("%H:%M"))
    }
}

impl<'de> Deserialize<'de> for Window {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A time zone by its IANA name; UTC by default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimeZoneName(TimeZone);

impl Default for TimeZoneName {
    fn default() -> Self {
        Self(TimeZone::UTC)
    }
}

impl TimeZoneName {
    /// The zone itself.
    pub fn zone(&self) -> &TimeZone {
        &self.0
    }
}

impl FromStr for TimeZoneName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        TimeZone::get(text)
            .map(Self)
            .map_err(|_| format!("`{text}` is no time zone: write a name such as `Asia/Seoul` or `UTC`"))
    }
}

impl<'de> Deserialize<'de> for TimeZoneName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Every opening in the time to come.
#[derive(Debug, Clone)]
pub struct Schedule {
    windows: Vec<Window>,
    zone: TimeZone,
}

/// A plan that needs more days than this is answered with "never".
const LONGEST_PLAN_DAYS: i64 = 366 * 100;

impl Schedule {
    /// The schedule of some windows; `None` where there are none, which means
    /// that calls may be made at any time.
    pub fn new(windows: Vec<Window>, zone: TimeZoneName) -> Option<Self> {
        (!windows.is_empty()).then_some(Self { windows, zone: zone.0 })
    }

    /// The moment from which a call of at most `longest_call` may leave: now
    /// itself while a window is open for long enough, else the next opening.
    pub fn next_opening(&self, now: Timestamp, longest_call: Duration) -> Timestamp {
        let margin = SignedDuration::try_from(longest_call).unwrap_or_default();
        self.openings(now)
            .map(|(start, end)| (start, end - margin))
            .find(|(start, end)| start < end && now < *end)
            .map_or(Timestamp::MAX, |(start, _)| start.max(now))
    }

    /// When work that needs `needed` of open time is finished; `None` where it
    /// never is.
    pub fn finish(&self, start: Timestamp, needed: Duration) -> Option<Timestamp> {
        let mut left = SignedDuration::try_from(needed).ok()?;
        for (opens, closes) in self.openings(start) {
            let opens = opens.max(start);
            let length = closes.duration_since(opens);
            if length >= left {
                return opens.checked_add(left).ok();
            }
            left -= length.max(SignedDuration::ZERO);
        }
        None
    }

    /// Openings that end after `from`, in order, those that touch joined.
    fn openings(&self, from: Timestamp) -> impl Iterator<Item = (Timestamp, Timestamp)> {
        // The day before may hold a window that reaches over midnight.
        let first = from.to_zoned(self.zone.clone()).date().yesterday().unwrap_or(Date::MIN);
        let days = (0..LONGEST_PLAN_DAYS).map_while(move |day| first.checked_add(Span::new().days(day)).ok());
        let mut raw = days.flat_map(move |date| self.openings_of(date)).peekable();
        std::iter::from_fn(move || {
            let (start, mut end) = raw.next()?;
            while let Some((_, later)) = raw.next_if(|(next, _)| *next <= end) {
                end = end.max(later);
                // A window round the clock never ends: two days at a time will do.
                if end.duration_since(start) > SignedDuration::from_hours(48) {
                    break;
                }
            }
            Some((start, end))
        })
        .filter(move |(_, end)| *end > from)
    }

    fn openings_of(&self, date: Date) -> Vec<(Timestamp, Timestamp)> {
        let at = |date: Date, time: Time| {
            date.to_datetime(time).to_zoned(self.zone.clone()).ok().map(|zoned| zoned.timestamp())
        };
        let mut openings: Vec<_> = self
            .windows
            .iter()
            .filter_map(|window| {
                let last_day = if window.end <= window.start { date.tomorrow().ok()? } else { date };
                Some((at(date, window.start)?, at(last_day, window.end)?))
            })
            .collect();
        openings.sort();
        openings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(windows: &[&str], zone: &str) -> Schedule {
        let windows = windows.iter().map(|window| window.parse().expect("a window")).collect();
        Schedule::new(windows, zone.parse().expect("a zone")).expect("some windows")
    }

    fn time(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    #[test]
    fn eight_hours_a_night_take_the_calendar_date_that_a_hand_would_count() {
        // 1,000,000 s at 28,800 s a night: 34 whole nights and 20,800 s.
        let finish = schedule(&["22:00-06:00"], "Asia/Seoul")
            .finish(time("2026-11-22T12:00:00+09:00"), Duration::from_secs(1_000_000));
        assert_eq!(finish, Some(time("2026-12-27T03:46:40+09:00")));
    }

    #[test]
    fn a_window_across_midnight_is_open_on_both_sides() {
        let nights = schedule(&["23:00-02:00"], "UTC");
        let margin = Duration::from_secs(5);
        for open in ["2026-01-01T23:00:00Z", "2026-01-02T00:30:00Z", "2026-01-02T01:59:54Z"] {
            assert_eq!(nights.next_opening(time(open), margin), time(open));
        }
        for closed in ["2026-01-02T01:59:55Z", "2026-01-02T02:00:00Z", "2026-01-02T12:00:00Z"] {
            assert_eq!(nights.next_opening(time(closed), margin), time("2026-01-02T23:00:00Z"));
        }
    }

    #[test]
    fn nights_of_clock_changes_have_their_real_length() {
        let nights = schedule(&["01:00-06:00"], "Europe/Berlin");
        // In spring 02:00 becomes 03:00: four hours; in autumn six.
        let spring = nights.finish(time("2026-03-28T12:00:00Z"), Duration::from_secs(4 * 3600 + 60));
        assert_eq!(spring, Some(time("2026-03-30T01:01:00+02:00")));
        let autumn = nights.finish(time("2026-10-24T12:00:00Z"), Duration::from_secs(6 * 3600));
        assert_eq!(autumn, Some(time("2026-10-25T06:00:00+01:00")));
    }

    #[test]
    fn a_window_round_the_clock_is_always_open() {
        for text in ["00:00-24:00", "00:00-00:00", "09:00-09:00"] {
            let always = schedule(&[text], "UTC");
            let now = time("2026-05-05T00:00:00Z");
            assert_eq!(always.next_opening(now, Duration::from_secs(5)), now, "{text}");
            assert_eq!(
                always.finish(now, Duration::from_secs(1_000_000)),
                Some(time("2026-05-16T13:46:40Z"))
            );
        }
    }

    #[test]
    fn several_windows_a_day_are_used_in_order() {
        let two = schedule(&["12:00-13:00", "01:00-02:00"], "UTC");
        let finish = two.finish(time("2026-01-01T00:00:00Z"), Duration::from_secs(2 * 3600));
        assert_eq!(finish, Some(time("2026-01-01T13:00:00Z")));
    }

    #[test]
    fn a_window_shorter_than_a_call_never_opens() {
        let short = schedule(&["01:00-01:01"], "UTC");
        let opens = short.next_opening(time("2026-01-01T00:00:00Z"), Duration::from_secs(120));
        assert_eq!(opens, Timestamp::MAX);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["", "01:00", "25:00-26:00", "1-2", "01:00-06:61"] {
            assert!(bad.parse::<Window>().is_err(), "{bad}");
        }
        assert!("Moon/Crater".parse::<TimeZoneName>().is_err());
    }
}
