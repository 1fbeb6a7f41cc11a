//! What a call gets: pure, so that a rehearsal can be repeated exactly and tests know the answers
//! beforehand.
//!
//! Two kinds of chance are kept apart. What belongs to a key (its new key, or that it has none) is
//! derived from the seed and the key: it never changes. What belongs to a call (latency, fault) is
//! derived from the seed and the number of the call: a retry of the same key gets another draw.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::SignedDuration;
use sha2::{Digest, Sha256};

use crate::limit::RateLimit;

/// Everything that can be told to the rehearsal API. The default finds every key, at once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Behaviour {
    /// What every draw is derived from.
    pub seed: u64,
    /// Time until an answer.
    pub latency: Latency,
    /// Share of calls that take `slow_latency` instead.
    pub slow_share: Percent,
    /// Time until an answer for the slow share.
    pub slow_latency: Latency,
    /// Share of keys that have no new key.
    pub not_found: Percent,
    /// Calls per second that are let through; `None` lets all through.
    pub limit: Option<RateLimit>,
    /// Calls that go wrong.
    pub faults: Faults,
}

/// What one call gets, whichever key it asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// Time until the answer, or until the fault shows.
    pub latency: Duration,
    /// What goes wrong instead of an answer.
    pub fault: Option<Fault>,
}

/// A way for a call to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Answers 500.
    ServerError,
    /// Never answers.
    Timeout,
    /// Resets the connection.
    Reset,
    /// Answers 200 with JSON that ends in the middle.
    Truncated,
    /// Answers 200 with bytes that are no text, called JSON.
    Scrambled,
    /// Answers 200 with an HTML page.
    Html,
}

/// Shares of calls that go wrong, each a percentage of all calls; together at most 100, see
/// [`Faults::checked`].
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Faults {
    /// Calls that answer 500.
    pub server_error: Percent,
    /// Calls that are never answered.
    pub timeout: Percent,
    /// Calls whose connection is reset.
    pub reset: Percent,
    /// Calls answered with broken JSON, one half cut off and the other no text at all.
    pub garbage: Percent,
    /// Calls answered with an HTML page.
    pub html: Percent,
}

/// Draws of one call that must not depend on each other.
#[derive(Clone, Copy)]
enum Draw {
    Fault = 1,
    Slow = 2,
    Latency = 3,
}

impl Behaviour {
    /// What call number `counter` gets: the same for the same seed and number.
    #[must_use]
    pub fn decide(&self, counter: u64) -> Decision {
        Decision {
            latency: self.draw_latency(counter),
            fault: self.faults.pick(draw(self.seed, counter, Draw::Fault)),
        }
    }

    /// The new key of `legacy_key`, or `None` where it is among the keys not found.
    #[must_use]
    pub fn find(&self, legacy_key: &str) -> Option<String> {
        let (identity, luck) = fingerprint(self.seed, legacy_key);
        (unit(luck) >= self.not_found.share()).then(|| key_text(identity))
    }

    fn draw_latency(&self, counter: u64) -> Duration {
        let slow = draw(self.seed, counter, Draw::Slow) < self.slow_share.share();
        let latency = if slow { self.slow_latency } else { self.latency };
        latency.at(draw(self.seed, counter, Draw::Latency))
    }
}

impl Faults {
    /// These shares, once they are known to fit.
    ///
    /// # Errors
    ///
    /// A message for the reader when they are more than 100% together.
    pub fn checked(self) -> Result<Self, String> {
        // Shares such as 33.3% are inexact in binary: what a person adds up to 100 must pass.
        const ROUNDING: f64 = 1e-9;
        let sum: f64 = self.shares().iter().map(|(share, _)| share * 100.0).sum();
        if sum <= 100.0 + ROUNDING {
            return Ok(self);
        }
        Err(format!(
            "--error-500, --timeouts, --resets, --garbage and --html are {} together, more than 100%",
            Percent(sum)
        ))
    }

    /// The fault that the point `luck` of 0..1 falls on, when the shares are laid end to end.
    fn pick(&self, luck: f64) -> Option<Fault> {
        let mut end = 0.0;
        self.shares().into_iter().find_map(|(share, fault)| {
            end += share;
            (luck < end).then_some(fault)
        })
    }

    fn shares(&self) -> [(f64, Fault); 6] {
        [
            (self.server_error.share(), Fault::ServerError),
            (self.timeout.share(), Fault::Timeout),
            (self.reset.share(), Fault::Reset),
            (self.garbage.share() / 2.0, Fault::Truncated),
            (self.garbage.share() / 2.0, Fault::Scrambled),
            (self.html.share(), Fault::Html),
        ]
    }
}

/// The new key that the rehearsal API gives for `legacy_key`: `N-` and 16 hexadecimal digits.
#[must_use]
pub fn new_key(seed: u64, legacy_key: &str) -> String {
    key_text(fingerprint(seed, legacy_key).0)
}

fn key_text(identity: u64) -> String {
    format!("N-{identity:016X}")
}

/// Two independent numbers that belong to a key: one for its new key, one for whether it is found.
fn fingerprint(seed: u64, legacy_key: &str) -> (u64, u64) {
    let digest: [u8; 32] =
        Sha256::new().chain_update(seed.to_be_bytes()).chain_update(legacy_key).finalize().into();
    (big_endian(&digest[..8]), big_endian(&digest[8..16]))
}

fn big_endian(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

/// A number in 0..1 that depends on nothing but its arguments.
fn draw(seed: u64, counter: u64, purpose: Draw) -> f64 {
    unit(mix(mix(mix(seed).wrapping_add(purpose as u64)).wrapping_add(counter)))
}

/// `SplitMix64`: neighbouring numbers (calls are counted) give unrelated results.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The upper 53 bits as a number in 0..1: as many as a double holds exactly, so never 1.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// A percentage from 0 to 100; reads `2%`, `2` and `0.5%`.
#[derive(Debug, Clone, Copy, Default, PartialEq, PartialOrd)]
pub struct Percent(f64);

impl Percent {
    /// A percentage: 2.0 is two in a hundred.
    ///
    /// # Errors
    ///
    /// A message for the reader when it is not a number from 0 to 100.
    pub fn new(percent: f64) -> Result<Self, String> {
        if (0.0..=100.0).contains(&percent) {
            Ok(Self(percent))
        } else {
            Err(format!("a percentage lies between 0 and 100, not {percent}"))
        }
    }

    /// The same as a part of 1.
    fn share(self) -> f64 {
        self.0 / 100.0
    }
}

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix('%').unwrap_or(text).trim();
        let percent = number.parse().map_err(|_| "expected a percentage such as 2%, 2 or 0.5%".to_owned())?;
        Self::new(percent)
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}%", self.0)
    }
}

/// A time, or any time between two, equally likely; reads `300ms` and `300ms..2s`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Latency {
    shortest: Duration,
    longest: Duration,
}

impl Latency {
    /// Always `time`.
    #[must_use]
    pub const fn fixed(time: Duration) -> Self {
        Self { shortest: time, longest: time }
    }

    /// Any time from `shortest` to `longest`.
    ///
    /// # Errors
    ///
    /// A message for the reader when `shortest` is the longer one.
    pub fn between(shortest: Duration, longest: Duration) -> Result<Self, String> {
        if shortest > longest {
            return Err(format!(
                "the first time of a range must not be the longer one: {shortest:?}..{longest:?}"
            ));
        }
        Ok(Self { shortest, longest })
    }

    fn at(self, luck: f64) -> Duration {
        self.shortest + self.longest.saturating_sub(self.shortest).mul_f64(luck)
    }
}

impl FromStr for Latency {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once("..") {
            Some((shortest, longest)) => Self::between(time(shortest)?, time(longest)?),
            None => time(text).map(Self::fixed),
        }
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}", self.shortest)?;
        if self.longest > self.shortest {
            write!(formatter, "..{:?}", self.longest)?;
        }
        Ok(())
    }
}

/// Reads `300ms`, `2s`, `1.5s`, `1m`; a plain `0` needs no unit.
fn time(text: &str) -> Result<Duration, String> {
    if text.trim() == "0" {
        return Ok(Duration::ZERO);
    }
    text.trim()
        .parse::<SignedDuration>()
        .ok()
        .and_then(|time| Duration::try_from(time).ok())
        .ok_or_else(|| format!("expected a time such as 300ms or 2s, not {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALLS: u64 = 100_000;

    fn percent(number: f64) -> Percent {
        Percent::new(number).unwrap()
    }

    fn share(hits: usize) -> f64 {
        hits as f64 / CALLS as f64
    }

    fn assert_close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 0.005, "{found} is not near {expected}");
    }

    #[test]
    fn new_keys_depend_on_the_seed_and_the_key_alone() {
        assert_eq!(new_key(0, "K1"), new_key(0, "K1"));
        assert_ne!(new_key(0, "K1"), new_key(1, "K1"));
        assert_ne!(new_key(0, "K1"), new_key(0, "K2"));
        // Fixed once and for all: a rehearsal must give the same keys after an update.
        assert_eq!(new_key(0, "K1"), "N-B6DED99D1BC95B4D");
        assert_eq!(Behaviour::default().find("K1"), Some(new_key(0, "K1")));
    }

    #[test]
    fn new_keys_do_not_collide() {
        let keys: std::collections::HashSet<_> = (0..CALLS).map(|n| new_key(0, &n.to_string())).collect();
        assert_eq!(keys.len() as u64, CALLS);
    }

    #[test]
    fn not_found_belongs_to_the_key() {
        let behaviour = Behaviour { not_found: percent(2.0), ..Behaviour::default() };
        let missing = |n: &u64| behaviour.find(&n.to_string()).is_none();
        let first: Vec<_> = (0..CALLS).filter(missing).collect();
        let second: Vec<_> = (0..CALLS).filter(missing).collect();
        assert_eq!(first, second);
        assert_close(share(first.len()), 0.02);
    }

    #[test]
    fn nothing_and_everything_are_exact() {
        let all = Behaviour {
            not_found: percent(100.0),
            faults: Faults { html: percent(100.0), ..Faults::default() },
            ..Behaviour::default()
        };
        let none = Behaviour::default();
        for n in 0..CALLS {
            assert_eq!(all.find(&n.to_string()), None);
            assert_eq!(all.decide(n).fault, Some(Fault::Html));
            assert!(none.find(&n.to_string()).is_some());
            assert_eq!(none.decide(n).fault, None);
            assert_eq!(none.decide(n).latency, Duration::ZERO);
        }
    }

    #[test]
    fn faults_come_in_their_shares_and_repeat() {
        let behaviour = Behaviour {
            seed: 7,
            faults: Faults {
                server_error: percent(5.0),
                timeout: percent(1.0),
                reset: percent(2.0),
                garbage: percent(4.0),
                html: percent(3.0),
            },
            ..Behaviour::default()
        };
        let run = || (0..CALLS).map(|n| behaviour.decide(n)).collect::<Vec<_>>();
        let decisions = run();
        assert_eq!(decisions, run());
        for (fault, expected) in [
            (Some(Fault::ServerError), 0.05),
            (Some(Fault::Timeout), 0.01),
            (Some(Fault::Reset), 0.02),
            (Some(Fault::Truncated), 0.02),
            (Some(Fault::Scrambled), 0.02),
            (Some(Fault::Html), 0.03),
            (None, 0.85),
        ] {
            let hits = decisions.iter().filter(|d| d.fault == fault).count();
            assert_close(share(hits), expected);
        }
    }

    #[test]
    fn latencies_fill_their_range_and_outliers_come_in_their_share() {
        let behaviour = Behaviour {
            latency: "100ms..300ms".parse().unwrap(),
            slow_share: percent(1.0),
            slow_latency: "2s".parse().unwrap(),
            ..Behaviour::default()
        };
        let slow = Duration::from_secs(2);
        let (outliers, usual): (Vec<_>, Vec<_>) =
            (0..CALLS).map(|n| behaviour.decide(n).latency).partition(|latency| *latency == slow);
        assert_close(share(outliers.len()), 0.01);
        assert!(usual.iter().all(|l| (100..=300).contains(&l.as_millis())));
        let mean = usual.iter().map(Duration::as_secs_f64).sum::<f64>() / usual.len() as f64;
        assert_close(mean, 0.2);
    }

    #[test]
    fn another_seed_is_another_rehearsal() {
        let faults = |seed| {
            let behaviour = Behaviour {
                seed,
                faults: Faults { reset: percent(50.0), ..Faults::default() },
                ..Behaviour::default()
            };
            (0..100).map(|n| behaviour.decide(n).fault).collect::<Vec<_>>()
        };
        assert_ne!(faults(0), faults(1));
    }

    #[test]
    fn percentages_are_read() {
        for (text, expected) in [("2%", 2.0), ("2", 2.0), ("0.5%", 0.5), ("100 %", 100.0)] {
            assert_eq!(text.parse(), Ok(percent(expected)), "{text}");
        }
        for text in ["-1", "100.1%", "NaN", "inf", "2%%", "", "%", "two"] {
            let message = text.parse::<Percent>().unwrap_err();
            assert!(message.contains("percentage"), "{text}: {message}");
        }
        assert_eq!(percent(0.5).to_string(), "0.5%");
    }

    #[test]
    fn faults_over_a_hundred_percent_are_refused() {
        let faults = |html| Faults {
            server_error: percent(33.3),
            timeout: percent(33.3),
            reset: percent(33.3),
            html: percent(html),
            ..Faults::default()
        };
        assert!(faults(0.1).checked().is_ok());
        let message = faults(1.0).checked().unwrap_err();
        assert!(message.contains("more than 100%"), "{message}");
    }

    #[test]
    fn latencies_are_read() {
        let ms = Duration::from_millis;
        for (text, shortest, longest) in [
            ("300ms", 300, 300),
            ("300ms..2s", 300, 2000),
            ("0", 0, 0),
            ("0..1.5s", 0, 1500),
            ("1m", 60_000, 60_000),
        ] {
            let expected = Latency::between(ms(shortest), ms(longest));
            assert_eq!(text.parse(), expected, "{text}");
        }
        for text in ["300", "-1s", "2s..1s", "..", "fast", ""] {
            assert!(text.parse::<Latency>().is_err(), "{text}");
        }
        for text in ["300ms", "300ms..2s"] {
            assert_eq!(text.parse::<Latency>().unwrap().to_string(), text);
        }
    }
}
