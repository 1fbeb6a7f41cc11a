//! Templates of URL and body: where the legacy key goes and how it is encoded.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

/// Stands for the percent-encoded legacy key in a URL.
pub const KEY: &str = "{key}";
/// Stands for the legacy key as a JSON string in a body.
pub const KEY_JSON: &str = "{key_json}";
/// Stands for the legacy keys as a JSON array of strings in the body of a batch.
pub const KEYS_JSON: &str = "{keys_json}";

/// Everything but the unreserved characters of RFC 3986.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Whether a URL template is usable.
///
/// # Errors
/// What is wrong with it, without repeating it: it may hold a password.
pub fn check_url(template: &str) -> Result<(), String> {
    let url = reqwest::Url::parse(&fill_url(template, "key"))
        .map_err(|error| format!("is no valid URL: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("must start with http:// or https://".into());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(
            "must not hold credentials, for a URL is shown and stored: use headers.Authorization".into()
        );
    }
    let before_path = template.split_once("://").and_then(|(_, rest)| rest.split(['/', '?']).next());
    if before_path.is_some_and(|host| host.contains(KEY)) {
        return Err("{key} can stand in the path or the query only".into());
    }
    Ok(())
}

/// Whether a proxy's URL is usable; it may hold credentials.
///
/// # Errors
/// What is wrong with it, without repeating it.
pub fn check_proxy(text: &str) -> Result<(), String> {
    let url = reqwest::Url::parse(text).map_err(|error| format!("is no valid URL: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("must start with http:// or https://".into());
    }
    if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
        return Err("names a host and a port, nothing after them".into());
    }
    Ok(())
}

/// The URL for one legacy key.
pub fn fill_url(template: &str, legacy_key: &str) -> String {
    template.replace(KEY, &utf8_percent_encode(legacy_key, ENCODED).to_string())
}

/// The body for one legacy key.
pub fn fill_body(template: &str, legacy_key: &str) -> String {
    template.replace(KEY_JSON, &serde_json::Value::from(legacy_key).to_string())
}

/// The body for a batch of legacy keys.
pub fn fill_batch_body(template: &str, legacy_keys: &[String]) -> String {
    template.replace(KEYS_JSON, &serde_json::Value::from(legacy_keys).to_string())
}

/// Bytes of the longest URL that a client sends.
const LONGEST_URL: usize = 65_534;

/// Whether a key can be sent as itself: as a segment of a path a client resolves
/// `.` and `..` before it sends, and it sends no URL of more than 64 KB.
pub fn is_sendable(template: &str, legacy_key: &str) -> bool {
    let is_short = || {
        // An encoded byte takes three at most.
        let most = template.len() + 3 * legacy_key.len();
        most <= LONGEST_URL || fill_url(template, legacy_key).len() <= LONGEST_URL
    };
    is_short()
        && !(matches!(legacy_key, "." | "..")
            && template.split('?').next().is_some_and(|path| path.contains(KEY)))
}

/// The template without its query, which may hold a token: for showing.
pub fn shown(template: &str) -> &str {
    template.split('?').next().unwrap_or(template)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_arrive_as_one_segment_whatever_they_hold() {
        for key in ["a b", "a/b", "a?b", "100%", "😀", "홍길동", "a+b&c=d#e", "%2e%2e", "\\..\\", "a\nb"]
        {
            let text = fill_url("http://h/v1/keys/{key}", key);
            let url = reqwest::Url::parse(&text).expect("a valid URL");
            let segments: Vec<_> = url.path_segments().expect("a path").collect();
            assert_eq!(segments.len(), 3, "{url}");
            let decoded = percent_encoding::percent_decode_str(segments[2]).decode_utf8().expect("UTF-8");
            assert_eq!(decoded, key);
            assert_eq!(url.query(), None);
        }
    }

    #[test]
    fn dots_alone_cannot_be_sent_in_a_path() {
        assert!(!is_sendable("http://h/{key}", ".."));
        assert!(!is_sendable("http://h/{key}", "."));
        assert!(is_sendable("http://h/{key}", "..."));
        assert!(is_sendable("http://h/?k={key}", ".."));
    }

    #[test]
    fn a_key_that_makes_the_url_too_long_cannot_be_sent() {
        let room = LONGEST_URL - "http://h/".len();
        assert!(is_sendable("http://h/{key}", &"a".repeat(room)));
        assert!(!is_sendable("http://h/{key}", &"a".repeat(room + 1)));
        assert!(!is_sendable("http://h/{key}", &"/".repeat(room / 3 + 1)));
        assert!(is_sendable("http://h/keys", &"a".repeat(2 * room)));
    }

    #[test]
    fn bodies_hold_valid_json() {
        let body = fill_body(r#"{"legacyKey": {key_json}}"#, "a\"b\\c");
        let value: serde_json::Value = serde_json::from_str(&body).expect("valid JSON");
        assert_eq!(value["legacyKey"], "a\"b\\c");
    }

    #[test]
    fn batches_are_arrays_of_strings_and_no_key_is_taken_for_a_placeholder() {
        let keys = ["1", "a\"b", "{keys_json}", "홍길동"].map(str::to_owned);
        let body = fill_batch_body(r#"{"keys": {keys_json}}"#, &keys);
        let value: serde_json::Value = serde_json::from_str(&body).expect("valid JSON");
        assert_eq!(value["keys"], serde_json::json!(keys));
    }
}
