//! Times of day at which calls may be made, in a time zone with its changes of
//! the clock. Pure: the time is always given.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::AmbiguousOffset::Unambiguous;
use jiff::tz::{Offset, TimeZone};
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
pub const LONGEST_PLAN_DAYS: i64 = 366 * 100;
/// Openings longer than this are told in parts.
const LONGEST_OPENING: SignedDuration = SignedDuration::from_hours(96);

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

    /// How long calls may be made between two moments.
    pub fn open_time(&self, from: Timestamp, to: Timestamp) -> Duration {
        self.openings(from)
            .take_while(|(opens, _)| *opens < to)
            .map(|(opens, closes)| closes.min(to).duration_since(opens.max(from)))
            .filter_map(|length| Duration::try_from(length).ok())
            .sum()
    }

    /// Openings that end after `from`, in order and apart from each other.
    fn openings(&self, from: Timestamp) -> impl Iterator<Item = (Timestamp, Timestamp)> {
        // The day before may hold a window that reaches over midnight.
        let first = from.to_zoned(self.zone.clone()).date().yesterday().unwrap_or(Date::MIN);
        let days = (0..LONGEST_PLAN_DAYS).map_while(move |day| first.checked_add(Span::new().days(day)).ok());
        let mut raw = days.flat_map(move |date| self.openings_of(date)).peekable();
        let mut last_end = Timestamp::MIN;
        std::iter::from_fn(move || {
            loop {
                let (start, mut end) = raw.next()?;
                while let Some((_, later)) = raw.next_if(|(next, _)| *next <= end) {
                    end = end.max(later);
                    // Windows round the clock never end: some days at a time will do.
                    if end.duration_since(start) > LONGEST_OPENING {
                        break;
                    }
                }
                let start = start.max(last_end);
                if start < end {
                    last_end = end;
                    return Some((start, end));
                }
            }
        })
        .filter(move |(_, end)| *end > from)
    }

    fn openings_of(&self, date: Date) -> Vec<(Timestamp, Timestamp)> {
        let mut openings: Vec<_> = self
            .windows
            .iter()
            .filter_map(|window| {
                let last_day = if window.end <= window.start { date.tomorrow().ok()? } else { date };
                Some(stretches(&self.zone, date.to_datetime(window.start), last_day.to_datetime(window.end)))
            })
            .flatten()
            .collect();
        openings.sort();
        openings
    }
}

/// The moments at which the clocks of a zone show a time from `from` on and
/// before `to`. Usually that is one stretch; it ends early where the clocks are
/// put forward past `to`, and there are two where they are put back to before
/// `from` or `to`. What the clock on the wall shows is what an operator agreed
/// on with the owners of the API.
fn stretches(zone: &TimeZone, from: DateTime, to: DateTime) -> Vec<(Timestamp, Timestamp)> {
    let offsets = [from, to].map(|time| zone.to_ambiguous_timestamp(time).offset());
    if let [Unambiguous { offset }, Unambiguous { offset: same }] = offsets
        && offset == same
    {
        return stretch(from, to, offset, Timestamp::MIN, Timestamp::MAX).into_iter().collect();
    }
    let utc = |time: DateTime, ahead: i64| {
        Offset::UTC.to_timestamp(time).ok()?.checked_add(SignedDuration::from_hours(ahead)).ok()
    };
    // No zone is farther from UTC than that.
    let (Some(mut since), Some(latest)) = (utc(from, -26), utc(to, 26)) else { return Vec::new() };
    let mut offset = zone.to_offset(since);
    let mut found = Vec::new();
    for change in zone.following(since).take_while(|change| change.timestamp() < latest) {
        found.extend(stretch(from, to, offset, since, change.timestamp()));
        (since, offset) = (change.timestamp(), change.offset());
    }
    found.extend(stretch(from, to, offset, since, latest));
    found
}

/// The part of `since` to `until`, in which the clocks are ahead of UTC by
/// `offset`, that lies between two times of the clock.
fn stretch(
    from: DateTime,
    to: DateTime,
    offset: Offset,
    since: Timestamp,
    until: Timestamp,
) -> Option<(Timestamp, Timestamp)> {
    let start = offset.to_timestamp(from).ok()?.max(since);
    let end = offset.to_timestamp(to).ok()?.min(until);
    (start < end).then_some((start, end))
}

#[cfg(test)]
mod tests;
