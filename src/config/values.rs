//! The small types that config values turn into, each of which can only hold
//! what is valid. Parsing them is the validation: an error here is reported by
//! the loader with file, line and key.

use std::fmt;
use std::time::Duration;

use bson::{Bson, Document};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

/// A string that must never be shown: a URI with a password, a header value.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// What stands before the host of a URI, if anything: `user:password`.
    pub fn credentials(&self) -> Option<&str> {
        let (_, rest) = self.0.split_once("://")?;
        rest.rsplit_once('@').map(|(credentials, _)| credentials)
    }

    /// The value itself. Only for handing it to the driver or the HTTP client.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("[secret]")
    }
}

/// Implements `Deserialize` by way of `FromStr`, so that every error carries
/// the position of the string in the file.
macro_rules! deserialize_from_str {
    ($($type:ty),+) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    )+};
}

/// `database.collection`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Namespace {
    /// Name of the database.
    pub database: String,
    /// Name of the collection, which may contain dots.
    pub collection: String,
}

impl std::str::FromStr for Namespace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('.') {
            Some((database, collection))
                if !database.is_empty() && !collection.is_empty() && !text.contains('\0') =>
            {
                if collection.starts_with("system.") || collection.contains('$') {
                    return Err(format!("`{text}` is not a user collection"));
                }
                Ok(Self { database: database.into(), collection: collection.into() })
            }
            _ => Err(format!("`{text}` is not of the form database.collection")),
        }
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.database, self.collection)
    }
}

/// A dotted path of field names, none of them a number or a `$` expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldPath(String);

impl FieldPath {
    /// The path as text, such as `profile.legacyKey`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The paths above this one: `a` and `a.b` for `a.b.c`.
    pub fn parents(&self) -> impl Iterator<Item = &str> {
        self.0.match_indices('.').map(|(end, _)| &self.0[..end])
    }

    /// Whether writing one of the two paths would write into the other.
    pub fn overlaps(&self, other: &Self) -> bool {
        let within = |inner: &str, outer: &str| {
            inner == outer || inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('.'))
        };
        within(&self.0, &other.0) || within(&other.0, &self.0)
    }
}

impl std::str::FromStr for FieldPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let reason = if text.split('.').any(str::is_empty) {
            "a part of the path is empty"
        } else if text.split('.').any(|part| part.starts_with('$') || part.contains('\0')) {
            "a field name may not start with `$`"
        } else if text.split('.').any(|part| part.bytes().all(|byte| byte.is_ascii_digit())) {
            "a number in a path would mean an array position"
        } else if text == "_id" || text.starts_with("_id.") {
            "`_id` can't be used here"
        } else {
            return Ok(Self(text.into()));
        };
        Err(format!("`{text}` is no usable field path: {reason}"))
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// A JSON pointer (RFC 6901) such as `/data/newKey`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonPointer(String);

impl JsonPointer {
    /// The value that the pointer leads to, if there is one.
    pub fn find<'a>(&self, value: &'a serde_json::Value) -> Option<&'a serde_json::Value> {
        value.pointer(&self.0)
    }

    /// The pointer as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for JsonPointer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad_escape =
            text.match_indices('~').any(|(at, _)| !matches!(text.as_bytes().get(at + 1), Some(b'0' | b'1')));
        if !(text.is_empty() || text.starts_with('/')) {
            return Err(format!("`{text}` is no JSON pointer: it must start with `/`, as in `/{text}`"));
        }
        if bad_escape {
            return Err(format!(
                "`{text}` is no JSON pointer: `~` must be written `~0`, `/` within a name `~1`"
            ));
        }
        Ok(Self(text.into()))
    }
}

/// A document written as extended JSON.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ExtendedJson(pub Document);

impl std::str::FromStr for ExtendedJson {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let value: serde_json::Value =
            serde_json::from_str(text).map_err(|error| format!("`{text}` is no valid JSON: {error}"))?;
        match Bson::try_from(value) {
            Ok(Bson::Document(document)) => Ok(Self(document)),
            Ok(_) => Err(format!("`{text}` is not a JSON object")),
            Err(error) => Err(format!("`{text}` is no valid extended JSON: {error}")),
        }
    }
}

/// A duration such as `5s`, `300ms` or `1h 30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HumanDuration(pub Duration);

impl std::str::FromStr for HumanDuration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let signed: jiff::SignedDuration = text
            .parse()
            .map_err(|_| format!("`{text}` is no duration: write it as in `5s`, `300ms` or `10m`"))?;
        Duration::try_from(signed)
            .ok()
            .filter(|duration| !duration.is_zero())
            .map(Self)
            .ok_or_else(|| format!("`{text}` is no usable duration: it must be above zero"))
    }
}

/// Calls per second: above zero, fractions allowed.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Tps(f64);

impl Tps {
    /// The highest rate the pacer is tested at.
    pub const HIGHEST: f64 = 1_000_000.0;

    /// A checked rate.
    ///
    /// # Errors
    /// A message where the rate is not above zero or above [`Self::HIGHEST`].
    pub fn new(value: f64) -> Result<Self, String> {
        if value.is_finite() && value > 0.0 && value <= Self::HIGHEST {
            Ok(Self(value))
        } else {
            Err(format!("`{value}` is no usable TPS: it must be above 0 and at most {}", Self::HIGHEST))
        }
    }

    /// Calls per second.
    pub fn per_second(self) -> f64 {
        self.0
    }
}

impl std::str::FromStr for Tps {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("`{text}` is no number")).and_then(Self::new)
    }
}

impl<'de> Deserialize<'de> for Tps {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        f64::deserialize(deserializer).and_then(|value| Self::new(value).map_err(de::Error::custom))
    }
}

/// A share between 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Share(pub f64);

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = f64::deserialize(deserializer)?;
        if (0.0..=1.0).contains(&value) {
            Ok(Self(value))
        } else {
            Err(de::Error::custom(format!("`{value}` is no share: it must be between 0 and 1")))
        }
    }
}

/// How many calls may be in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Concurrency {
    /// As many as the TPS and the timeout call for.
    Auto,
    /// Just so many.
    Fixed(usize),
}

/// More calls in flight than this would only be a queue in front of the API.
const HIGHEST_CONCURRENCY: usize = 1024;

impl Concurrency {
    /// The number of slots for a rate: enough that calls as slow as the
    /// timeout don't lower it, never fewer than 4.
    pub fn slots(self, tps: Tps, timeout: Duration) -> usize {
        match self {
            Self::Fixed(slots) => slots,
            Self::Auto => {
                let needed = (tps.per_second() * timeout.as_secs_f64()).ceil();
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "clamped to 4..=512"
                )]
                let slots = needed.clamp(4.0, 512.0) as usize;
                slots
            }
        }
    }
}

impl fmt::Display for Concurrency {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::Fixed(slots) => slots.fmt(formatter),
        }
    }
}

impl std::str::FromStr for Concurrency {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        text.parse()
            .ok()
            .filter(|slots| (1..=HIGHEST_CONCURRENCY).contains(slots))
            .map(Self::Fixed)
            .ok_or_else(|| format!("`{text}` is neither `auto` nor a number from 1 to {HIGHEST_CONCURRENCY}"))
    }
}

impl<'de> Deserialize<'de> for Concurrency {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AutoOrNumber;
        impl Visitor<'_> for AutoOrNumber {
            type Value = Concurrency;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("\"auto\" or a number")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Concurrency, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Concurrency, E> {
                number.to_string().parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(AutoOrNumber)
    }
}

/// Where candidates are read; writes and decisions always use the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ReadPreference {
    /// The primary only.
    Primary,
    /// The primary while there is one.
    PrimaryPreferred,
    /// Secondaries only.
    Secondary,
    /// Secondaries where there are any.
    #[default]
    SecondaryPreferred,
    /// Whichever member answers fastest.
    Nearest,
}

/// A regular expression that a key must match.
#[derive(Debug, Clone)]
pub struct Pattern(regex::Regex);

impl Pattern {
    /// Whether the text matches.
    pub fn matches(&self, text: &str) -> bool {
        self.0.is_match(text)
    }

    /// The expression as text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl std::str::FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        regex::Regex::new(text)
            .map(Self)
            .map_err(|error| format!("`{text}` is no valid regular expression: {error}"))
    }
}

deserialize_from_str!(Namespace, FieldPath, JsonPointer, ExtendedJson, HumanDuration, Pattern);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_paths_refuse_what_mongodb_would_read_differently() {
        for bad in ["", "a..b", ".a", "$a", "a.$b", "a.0.b", "_id", "_id.x"] {
            assert!(bad.parse::<FieldPath>().is_err(), "{bad}");
        }
        let path: FieldPath = "a.b.c".parse().expect("a valid path");
        assert_eq!(path.parents().collect::<Vec<_>>(), ["a", "a.b"]);
    }

    #[test]
    fn overlapping_paths_are_seen() {
        let path = |text: &str| text.parse::<FieldPath>().expect("a valid path");
        assert!(path("a").overlaps(&path("a.b")));
        assert!(path("a.b").overlaps(&path("a")));
        assert!(!path("a.b").overlaps(&path("a.c")));
        assert!(!path("ab").overlaps(&path("a")));
    }

    #[test]
    fn pointers_are_checked() {
        for bad in ["newKey", "/a~b", "/a~2"] {
            assert!(bad.parse::<JsonPointer>().is_err(), "{bad}");
        }
        assert!("/a~0b/c~1d/0".parse::<JsonPointer>().is_ok());
    }

    #[test]
    fn extended_json_keeps_order_and_types() {
        let parsed: ExtendedJson =
            r#"{"z": {"$numberLong": "5"}, "a": {"$oid": "507f1f77bcf86cd799439011"}}"#.parse().expect("valid");
        assert_eq!(parsed.0.keys().collect::<Vec<_>>(), ["z", "a"]);
        assert!(matches!(parsed.0.get("z"), Some(Bson::Int64(5))));
        assert!("[1]".parse::<ExtendedJson>().is_err());
        assert!(r#"{"a": {"$oid": "xyz"}}"#.parse::<ExtendedJson>().is_err());
    }

    #[test]
    fn automatic_concurrency_follows_rate_and_timeout() {
        let tps = |value| Tps::new(value).expect("a valid rate");
        assert_eq!(Concurrency::Auto.slots(tps(0.5), Duration::from_secs(5)), 4);
        assert_eq!(Concurrency::Auto.slots(tps(10.0), Duration::from_secs(5)), 50);
        assert_eq!(Concurrency::Auto.slots(tps(1_000_000.0), Duration::from_secs(5)), 512);
    }
}
