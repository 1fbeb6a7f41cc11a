//! What an answer of the key API means. Pure: status, headers and body in,
//! outcome out.
//!
//! The danger lies in answers that look like "there is no key": a proxy's 404
//! page would flag millions of documents. So only an answer of the described
//! shape counts as not found or rejected, everything else is invalid.

use std::borrow::Cow;
use std::time::Duration;

use serde_json::Value;

use crate::config::file::KeyApi;

/// What one call came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The new key.
    Found(String),
    /// The API says that there is no new key.
    NotFound,
    /// The API refuses the legacy key as malformed.
    Rejected,
    /// 429, with the pause asked for.
    RateLimited(Option<Duration>),
    /// A 5xx or 408 status, with the pause asked for.
    ServerError(u16, Option<Duration>),
    /// 401 or 403.
    Unauthorized(u16),
    /// A 3xx status.
    Redirect(u16),
    /// No complete answer within the timeout.
    Timeout,
    /// No complete answer at all: refused, reset, cut off.
    Connect(String),
    /// An answer that is not what the config describes.
    Invalid(String),
}

/// The names of the outcomes in JSON results, in the order of [`Outcome::index`].
pub const OUTCOME_NAMES: [&str; 10] = [
    "found",
    "not_found",
    "rejected",
    "rate_limited",
    "server_error",
    "unauthorized",
    "redirect",
    "timeout",
    "connect",
    "invalid",
];

impl Outcome {
    /// Position in [`OUTCOME_NAMES`].
    pub fn index(&self) -> usize {
        match self {
            Self::Found(_) => 0,
            Self::NotFound => 1,
            Self::Rejected => 2,
            Self::RateLimited(_) => 3,
            Self::ServerError(..) => 4,
            Self::Unauthorized(_) => 5,
            Self::Redirect(_) => 6,
            Self::Timeout => 7,
            Self::Connect(_) => 8,
            Self::Invalid(_) => 9,
        }
    }

    /// What went wrong, for people; never holds a key or a secret.
    pub fn describe(&self) -> String {
        match self {
            Self::ServerError(status, _) | Self::Unauthorized(status) | Self::Redirect(status) => {
                format!("{} (HTTP {status})", OUTCOME_NAMES[self.index()])
            }
            Self::Connect(reason) | Self::Invalid(reason) => {
                format!("{}: {reason}", OUTCOME_NAMES[self.index()])
            }
            _ => OUTCOME_NAMES[self.index()].to_owned(),
        }
    }

    /// Whether it settles the key: found, not found or rejected.
    pub fn is_answer(&self) -> bool {
        matches!(self, Self::Found(_) | Self::NotFound | Self::Rejected)
    }

    /// The pause that the API asked for by `Retry-After`.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited(pause) | Self::ServerError(_, pause) => *pause,
            _ => None,
        }
    }
}

/// An answer as it came over the wire.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// HTTP status.
    pub status: u16,
    /// `Retry-After`, already read.
    pub retry_after: Option<Duration>,
    /// The whole body.
    pub body: &'a [u8],
}

/// Classifies the answer to a call for `legacy_key`.
pub fn classify(api: &KeyApi, legacy_key: &str, answer: &Answer<'_>) -> Outcome {
    if api.not_found_status.contains(&answer.status) && proves_not_found(api, answer.body) {
        return Outcome::NotFound;
    }
    match answer.status {
        200..=299 => read_key(api, legacy_key, answer.body),
        400 | 422 if is_empty_or_json(answer.body) => Outcome::Rejected,
        _ => failure(answer),
    }
}

/// What a status means that is neither an answer about a key nor a refusal of one.
pub(super) fn failure(answer: &Answer<'_>) -> Outcome {
    match answer.status {
        300..=399 => Outcome::Redirect(answer.status),
        401 | 403 => Outcome::Unauthorized(answer.status),
        408 | 500..=599 => Outcome::ServerError(answer.status, answer.retry_after),
        429 => Outcome::RateLimited(answer.retry_after),
        status => Outcome::Invalid(format!("HTTP {status} with an answer that the config does not describe")),
    }
}

fn proves_not_found(api: &KeyApi, body: &[u8]) -> bool {
    if api.not_found_when.is_empty() {
        return is_empty_or_json(body);
    }
    serde_json::from_slice::<Value>(body).is_ok_and(|value| says_not_found(api, &value))
}

/// Whether any `not_found_when` holds in a value.
pub(super) fn says_not_found(api: &KeyApi, value: &Value) -> bool {
    api.not_found_when.iter().any(|proof| proof.pointer.find(value) == Some(&proof.equals))
}

pub(super) fn is_empty_or_json(body: &[u8]) -> bool {
    body.trim_ascii().is_empty() || serde_json::from_slice::<serde::de::IgnoredAny>(body).is_ok()
}

fn read_key(api: &KeyApi, legacy_key: &str, body: &[u8]) -> Outcome {
    let value: Value = match serde_json::from_slice(body) {
        Ok(value) => value,
        Err(_) => return Outcome::Invalid("the body is not JSON".into()),
    };
    if let Some(pointer) = &api.echo_pointer
        && echoed(pointer.find(&value)).as_deref() != Some(legacy_key)
    {
        return Outcome::Invalid(format!("{} does not repeat the key asked for", pointer.as_str()));
    }
    key_in(api, &value)
}

/// The new key of a value, or why it is none.
pub(super) fn key_in(api: &KeyApi, value: &Value) -> Outcome {
    let pointer = &api.key_pointer;
    match pointer.find(value) {
        None => Outcome::Invalid(format!("the answer has no {}", pointer.as_str())),
        Some(Value::String(key)) if key.trim().is_empty() => {
            Outcome::Invalid(format!("{} is empty", pointer.as_str()))
        }
        Some(Value::String(key)) => match &api.key_pattern {
            Some(pattern) if !pattern.matches(key) => {
                Outcome::Invalid(format!("{} does not match key_pattern", pointer.as_str()))
            }
            _ => Outcome::Found(key.clone()),
        },
        Some(_) => Outcome::Invalid(format!("{} is not a string", pointer.as_str())),
    }
}

/// The legacy key that an answer repeats: an API may do so as a number.
pub(super) fn echoed(echo: Option<&Value>) -> Option<Cow<'_, str>> {
    match echo? {
        Value::String(text) => Some(Cow::Borrowed(text)),
        Value::Number(number) => Some(Cow::Owned(number.to_string())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::file::PointerEquals;

    fn api() -> KeyApi {
        let mut api = KeyApi::for_url("http://h/{key}");
        api.echo_pointer = "/legacyKey".parse().ok();
        api.key_pattern = "^N-[0-9]+$".parse().ok();
        api
    }

    fn outcome(api: &KeyApi, status: u16, body: &str) -> Outcome {
        classify(api, "K1", &Answer { status, retry_after: None, body: body.as_bytes() })
    }

    #[test]
    fn a_good_answer_is_found() {
        assert_eq!(
            outcome(&api(), 200, r#"{"legacyKey":"K1","newKey":"N-1"}"#),
            Outcome::Found("N-1".into())
        );
    }

    #[test]
    fn anything_else_in_a_2xx_is_invalid_never_a_flag() {
        for body in [
            "",
            "<html>login</html>",
            r#"{"legacyKey":"K1","newKey":"N-1"#,
            r#"{"legacyKey":"K2","newKey":"N-1"}"#,
            r#"{"newKey":"N-1"}"#,
            r#"{"legacyKey":"K1"}"#,
            r#"{"legacyKey":"K1","newKey":null}"#,
            r#"{"legacyKey":"K1","newKey":""}"#,
            r#"{"legacyKey":"K1","newKey":17}"#,
            r#"{"legacyKey":"K1","newKey":"M-1"}"#,
            r#"{"legacyKey":"K1","newKey":"N-1"} trailing"#,
            "null",
        ] {
            assert!(matches!(outcome(&api(), 200, body), Outcome::Invalid(_)), "{body}");
        }
    }

    #[test]
    fn not_found_needs_the_right_shape() {
        assert_eq!(outcome(&api(), 404, ""), Outcome::NotFound);
        assert_eq!(outcome(&api(), 404, r#"{"error":"no such key"}"#), Outcome::NotFound);
        assert!(matches!(outcome(&api(), 404, "<html>nginx</html>"), Outcome::Invalid(_)));
        let mut strict = api();
        strict.not_found_status = vec![404, 200];
        strict.not_found_when =
            vec![PointerEquals { pointer: "/code".parse().expect("a pointer"), equals: "NO_KEY".into() }];
        assert_eq!(outcome(&strict, 404, r#"{"code":"NO_KEY"}"#), Outcome::NotFound);
        assert_eq!(outcome(&strict, 200, r#"{"code":"NO_KEY"}"#), Outcome::NotFound);
        assert!(matches!(outcome(&strict, 404, r#"{"code":"NO_ROUTE"}"#), Outcome::Invalid(_)));
        assert!(matches!(outcome(&strict, 404, ""), Outcome::Invalid(_)));
        assert_eq!(
            outcome(&strict, 200, r#"{"legacyKey":"K1","newKey":"N-2"}"#),
            Outcome::Found("N-2".into())
        );
    }

    #[test]
    fn statuses_have_their_class() {
        let api = api();
        assert_eq!(outcome(&api, 400, "{}"), Outcome::Rejected);
        assert_eq!(outcome(&api, 422, ""), Outcome::Rejected);
        assert!(matches!(outcome(&api, 400, "<html>"), Outcome::Invalid(_)));
        assert_eq!(outcome(&api, 401, ""), Outcome::Unauthorized(401));
        assert_eq!(outcome(&api, 403, "{}"), Outcome::Unauthorized(403));
        assert_eq!(outcome(&api, 302, ""), Outcome::Redirect(302));
        assert_eq!(outcome(&api, 429, ""), Outcome::RateLimited(None));
        assert_eq!(outcome(&api, 503, ""), Outcome::ServerError(503, None));
        assert!(matches!(outcome(&api, 410, "{}"), Outcome::Invalid(_)));
    }

    #[test]
    fn numeric_echoes_count() {
        assert_eq!(echoed(Some(&serde_json::json!(42))).as_deref(), Some("42"));
        assert_eq!(echoed(Some(&serde_json::json!(true))), None);
        assert_eq!(echoed(None), None);
    }
}
