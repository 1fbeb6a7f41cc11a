//! A moment by which work must be finished, as a person writes it.

use std::str::FromStr;

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

/// A date, which means its beginning, a date with a time, or a moment with its
/// offset from UTC (RFC 3339). The first two are those of the configured time
/// zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline(Written);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    Local(DateTime),
    Exact(Timestamp),
}

impl FromStr for Deadline {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if let Ok(exact) = text.parse() {
            return Ok(Self(Written::Exact(exact)));
        }
        // The parser would pass over an offset or a zone that it can't use.
        let plain = |character: char| character.is_ascii_digit() || "-T:. ".contains(character);
        let local = if text.chars().all(plain) { text.parse().ok() } else { None };
        local.map(|local| Self(Written::Local(local))).ok_or_else(|| {
            format!(
                "`{text}` is no deadline: write it as in 2026-12-24, 2026-12-24T06:00 or 2026-12-24T06:00:00+09:00"
            )
        })
    }
}

impl Deadline {
    /// A deadline further away than this is a slip of the pen.
    const FARTHEST: SignedDuration = SignedDuration::from_hours(24 * 365 * 100);

    /// The moment itself.
    ///
    /// # Errors
    /// What is wrong with a moment that is not after `now`, or more than a
    /// hundred years after it.
    pub fn after(self, now: Timestamp, zone: &TimeZone) -> Result<Timestamp, String> {
        let at = match self.0 {
            Written::Exact(at) => at,
            Written::Local(time) => zone.to_timestamp(time).map_err(|error| error.to_string())?,
        };
        let shown = at.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M %Z");
        match at.duration_since(now) {
            away if !away.is_positive() => Err(format!("{shown} lies in the past")),
            away if away > Self::FARTHEST => Err(format!("{shown} is more than a hundred years away")),
            _ => Ok(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str, zone: &str) -> Result<String, String> {
        let now = "2026-11-22T12:00:00Z".parse().expect("a time");
        let zone = TimeZone::get(zone).expect("a zone");
        text.parse::<Deadline>()?.after(now, &zone).map(|at| at.to_string())
    }

    #[test]
    fn dates_and_times_are_those_of_the_zone() {
        let seoul = |text: &str| at(text, "Asia/Seoul").expect("a deadline");
        assert_eq!(seoul("2026-12-24"), "2026-12-23T15:00:00Z");
        assert_eq!(seoul("2026-12-24T06:00"), "2026-12-23T21:00:00Z");
        assert_eq!(seoul("2026-12-24 06:00:30"), "2026-12-23T21:00:30Z");
        assert_eq!(at("2027-03-28T02:30", "Europe/Berlin").as_deref(), Ok("2027-03-28T01:30:00Z"));
    }

    #[test]
    fn a_moment_with_an_offset_is_the_same_everywhere() {
        for zone in ["Asia/Seoul", "UTC"] {
            assert_eq!(at("2026-12-24T06:00:00Z", zone).as_deref(), Ok("2026-12-24T06:00:00Z"));
            assert_eq!(at("2026-12-24T06:00:00-05:00", zone).as_deref(), Ok("2026-12-24T11:00:00Z"));
        }
    }

    #[test]
    fn the_past_and_nonsense_are_refused() {
        for (text, reason) in [
            ("2026-11-22", "past"),
            ("2026-11-22T12:00:00Z", "past"),
            ("2020-01-01T00:00:00Z", "past"),
            ("2199-01-01", "hundred years"),
            ("", "no deadline"),
            ("24.12.2026", "no deadline"),
            ("2026-13-01", "no deadline"),
            ("2026-02-30", "no deadline"),
            ("06:00", "no deadline"),
            ("2026-12-24T25:00", "no deadline"),
            ("2026-12-24T06:00[Europe/Berlin]", "no deadline"),
            ("tomorrow", "no deadline"),
        ] {
            let error = at(text, "UTC").expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
