//! What the answer to a call for many keys means. Pure, like [`super::classify`].
//!
//! A batch multiplies every mistake: an answer that is off by one gives a whole
//! batch of documents the keys of others, and a 404 from a proxy would flag all
//! of them. So an item counts only for the key that it repeats, never by its
//! position; what an item does not prove is invalid and asked again; and no
//! status of the whole call says anything about one of several keys.

use std::collections::HashMap;

use serde_json::Value;

use super::classify::{Answer, Outcome, echoed, failure, is_empty_or_json, key_in, says_not_found};
use crate::config::file::{Batch, KeyApi};

/// What one call for many keys came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BatchOutcome {
    /// The whole call came to this; no key of it is answered. Never found, not
    /// found or rejected.
    Failed(Outcome),
    /// The API refuses the batch as a whole, with this status: some key of it is
    /// malformed, or it is too long. To be asked again in two halves, see
    /// [`bisect`]. Never the outcome of a batch of one key.
    Refused(u16),
    /// Each key has its own outcome.
    Answered(Answers),
}

/// The outcomes of a batch that was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answers {
    /// One per key, in the order in which they were asked for.
    pub outcomes: Vec<Outcome>,
    /// Items that repeat no key that was asked for; they are ignored.
    pub stray: usize,
}

impl BatchOutcome {
    /// What the call came to, for people; never holds a key or a secret.
    pub fn describe(&self) -> String {
        match self {
            Self::Failed(outcome) => outcome.describe(),
            Self::Refused(status) => format!("the batch was refused (HTTP {status})"),
            Self::Answered(Answers { outcomes, stray: 0 }) => format!("{} keys answered", outcomes.len()),
            Self::Answered(Answers { outcomes, stray }) => {
                format!("{} keys answered; {stray} items for keys that were not asked for", outcomes.len())
            }
        }
    }
}

/// Classifies the answer to a call for `legacy_keys`, which are distinct.
///
/// A key is found, or not found, only by an item that repeats it at
/// `echo_pointer`. `not_found_status` has no say over items, for they have no
/// status: an item is "not found" by `not_found_when` alone, and without that
/// never. An answer with a status of `not_found_status` may hold such items
/// too, but no keys.
pub fn classify_batch(api: &KeyApi, legacy_keys: &[String], answer: &Answer<'_>) -> BatchOutcome {
    let Some(batch) = &api.batch else {
        return BatchOutcome::Failed(Outcome::Invalid("`key_api.batch` is not configured".into()));
    };
    let alone = legacy_keys.len() < 2;
    match answer.status {
        200..=299 => read_items(api, batch, legacy_keys, answer.body, key_in),
        status if api.not_found_status.contains(&status) => {
            read_items(api, batch, legacy_keys, answer.body, |_, _| {
                Outcome::Invalid(format!("an item of an answer with HTTP {status} proves no \"not found\""))
            })
        }
        400 | 422 if is_empty_or_json(answer.body) => match alone {
            true => BatchOutcome::Answered(Answers { outcomes: vec![Outcome::Rejected], stray: 0 }),
            false => BatchOutcome::Refused(answer.status),
        },
        // Says nothing about a key, only about the length: a single one that
        // gets it is no malformed key.
        413 if !alone => BatchOutcome::Refused(answer.status),
        _ => BatchOutcome::Failed(failure(answer)),
    }
}

/// The two halves of a batch that was refused; the second one is empty where
/// there is nothing to divide.
pub fn bisect<T>(keys: &[T]) -> (&[T], &[T]) {
    keys.split_at(keys.len().div_ceil(2))
}

/// Gives every key the item that repeats it; `read` tells what an item means
/// that does not prove "not found".
fn read_items(
    api: &KeyApi,
    batch: &Batch,
    legacy_keys: &[String],
    body: &[u8],
    read: impl Fn(&KeyApi, &Value) -> Outcome,
) -> BatchOutcome {
    let invalid = |reason: String| BatchOutcome::Failed(Outcome::Invalid(reason));
    let Ok(body) = serde_json::from_slice::<Value>(body) else {
        return invalid("the body is not JSON".into());
    };
    let Some(Value::Array(items)) = batch.items_pointer.find(&body) else {
        return invalid(format!("the answer has no array at {}", batch.items_pointer.as_str()));
    };
    let mut answered: HashMap<&str, Option<Outcome>> =
        legacy_keys.iter().map(|key| (key.as_str(), None)).collect();
    let mut stray = 0;
    for item in items {
        let echo = api.echo_pointer.as_ref().and_then(|pointer| echoed(pointer.find(item)));
        match echo.and_then(|key| answered.get_mut(&*key)) {
            None => stray += 1,
            Some(known) => {
                let outcome = read_item(api, item, &read);
                *known = Some(known.take().map_or(outcome.clone(), |earlier| agreed(earlier, outcome)));
            }
        }
    }
    let outcome = |key: &String| answered.get(key.as_str()).cloned().flatten().unwrap_or_else(not_answered);
    BatchOutcome::Answered(Answers { outcomes: legacy_keys.iter().map(outcome).collect(), stray })
}

fn read_item(api: &KeyApi, item: &Value, read: impl Fn(&KeyApi, &Value) -> Outcome) -> Outcome {
    if !says_not_found(api, item) {
        return read(api, item);
    }
    // A flag is not taken back, so a proof that comes with a key is none.
    match api.key_pointer.find(item) {
        Some(Value::String(_)) => Outcome::Invalid("an item says \"not found\" and has a key".into()),
        _ => Outcome::NotFound,
    }
}

/// Two items for one key are one answer only where they say the same.
fn agreed(earlier: Outcome, later: Outcome) -> Outcome {
    if earlier == later { later } else { Outcome::Invalid("two items for the same key differ".into()) }
}

fn not_answered() -> Outcome {
    Outcome::Invalid("the batch did not answer for this key".into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::file::PointerEquals;

    fn api() -> KeyApi {
        let mut api = KeyApi::for_url("http://h/keys");
        api.batch = Some(Batch {
            size: 100,
            body: r#"{"keys": {keys_json}}"#.into(),
            items_pointer: "/items".parse().expect("a pointer"),
        });
        api.echo_pointer = "/legacyKey".parse().ok();
        api.key_pattern = "^N-".parse().ok();
        api.not_found_when =
            vec![PointerEquals { pointer: "/code".parse().expect("a pointer"), equals: "NO_KEY".into() }];
        api
    }

    fn keys(keys: &[&str]) -> Vec<String> {
        keys.iter().map(|key| (*key).to_owned()).collect()
    }

    fn outcome(api: &KeyApi, asked: &[&str], status: u16, body: &str) -> BatchOutcome {
        classify_batch(api, &keys(asked), &Answer { status, retry_after: None, body: body.as_bytes() })
    }

    /// The outcomes of a 200 with these items.
    #[track_caller]
    fn answers(asked: &[&str], items: &Value) -> Answers {
        match outcome(&api(), asked, 200, &json!({ "items": items }).to_string()) {
            BatchOutcome::Answered(answers) => answers,
            other => panic!("{other:?}"),
        }
    }

    fn found(key: &str) -> Outcome {
        Outcome::Found(key.into())
    }

    #[test]
    fn items_belong_to_the_key_that_they_repeat_wherever_they_stand() {
        let items = json!([
            {"legacyKey": "C", "code": "NO_KEY"},
            {"legacyKey": 2, "newKey": "N-2"},
            {"legacyKey": "A", "newKey": "N-A"},
        ]);
        let expected = Answers { outcomes: vec![found("N-A"), found("N-2"), Outcome::NotFound], stray: 0 };
        assert_eq!(answers(&["A", "2", "C"], &items), expected);
    }

    #[test]
    fn a_key_without_an_item_is_asked_again() {
        let answers = answers(&["A", "B"], &json!([{"legacyKey": "B", "newKey": "N-B"}]));
        assert_eq!(answers.outcomes, [not_answered(), found("N-B")]);
    }

    #[test]
    fn items_without_their_key_are_never_used_not_even_in_the_right_place() {
        let items = json!([
            {"newKey": "N-A"}, {"code": "NO_KEY"}, "A", null, {"legacyKey": null, "newKey": "N-A"},
            {"legacyKey": ["A"], "newKey": "N-A"}, {"legacyKey": "a", "newKey": "N-a"},
            {"legacyKey": "OTHER", "code": "NO_KEY"},
        ]);
        let answers = answers(&["A"], &items);
        assert_eq!((answers.outcomes, answers.stray), (vec![not_answered()], 8));
        let ignored = Answers { outcomes: vec![found("N-SECRET")], stray: 3 };
        let text = BatchOutcome::Answered(ignored).describe();
        assert!(text.contains("3 items") && !text.contains("SECRET"), "{text}");
    }

    #[test]
    fn two_items_for_one_key_must_agree() {
        let items = json!([
            {"legacyKey": "A", "newKey": "N-1"}, {"legacyKey": "A", "newKey": "N-1"},
            {"legacyKey": "B", "newKey": "N-1"}, {"legacyKey": "B", "newKey": "N-2"},
            {"legacyKey": "C", "newKey": "N-1"}, {"legacyKey": "C", "code": "NO_KEY"},
            {"legacyKey": "D", "newKey": "N-1"}, {"legacyKey": "D", "newKey": "N-2"}, {"legacyKey": "D", "newKey": "N-1"},
        ]);
        let outcomes = answers(&["A", "B", "C", "D"], &items).outcomes;
        assert_eq!(outcomes[0], found("N-1"));
        for outcome in &outcomes[1..] {
            assert!(matches!(outcome, Outcome::Invalid(_)), "{outcome:?}");
        }
    }

    #[test]
    fn what_an_item_does_not_prove_is_invalid() {
        for item in [
            json!({"legacyKey": "A"}),
            json!({"legacyKey": "A", "newKey": null}),
            json!({"legacyKey": "A", "newKey": ""}),
            json!({"legacyKey": "A", "newKey": 17}),
            json!({"legacyKey": "A", "newKey": "M-1"}),
            json!({"legacyKey": "A", "code": "NO_ROUTE"}),
            json!({"legacyKey": "A", "code": "NO_KEY", "newKey": "N-1"}),
        ] {
            let outcomes = answers(&["A"], &json!([item])).outcomes;
            assert!(matches!(outcomes[0], Outcome::Invalid(_)), "{item}: {outcomes:?}");
        }
    }

    #[test]
    fn without_a_proof_no_item_is_not_found() {
        let mut api = api();
        api.not_found_when.clear();
        for (status, body) in [
            (200, r#"{"items":[{"legacyKey":"A","code":"NO_KEY"}]}"#),
            (404, r#"{"items":[{"legacyKey":"A","code":"NO_KEY"}]}"#),
            (404, ""),
            (404, "{}"),
        ] {
            let invalid = match outcome(&api, &["A"], status, body) {
                BatchOutcome::Answered(answers) => matches!(answers.outcomes[..], [Outcome::Invalid(_)]),
                BatchOutcome::Failed(outcome) => matches!(outcome, Outcome::Invalid(_)),
                BatchOutcome::Refused(_) => false,
            };
            assert!(invalid, "{status} {body}");
        }
    }

    #[test]
    fn a_404_of_the_whole_call_says_nothing_about_a_key_without_an_item_that_does() {
        for body in ["", "{}", r#"{"code":"NO_KEY"}"#, "<html>nginx</html>", r#"{"items":{}}"#] {
            for asked in [&["A"][..], &["A", "B"]] {
                let failed = outcome(&api(), asked, 404, body);
                assert!(matches!(failed, BatchOutcome::Failed(Outcome::Invalid(_))), "{body}: {failed:?}");
            }
        }
        let body = r#"{"items":[{"legacyKey":"A","code":"NO_KEY"},{"legacyKey":"B","newKey":"N-B"}]}"#;
        let BatchOutcome::Answered(answers) = outcome(&api(), &["A", "B"], 404, body) else {
            panic!("answered")
        };
        assert_eq!(answers.outcomes[0], Outcome::NotFound);
        assert!(matches!(answers.outcomes[1], Outcome::Invalid(_)), "{answers:?}");
    }

    #[test]
    fn a_refused_batch_is_divided_until_one_key_is_rejected() {
        for (status, body) in [(400, "{}"), (422, ""), (413, ""), (413, "<html>too large</html>")] {
            assert_eq!(outcome(&api(), &["A", "B"], status, body), BatchOutcome::Refused(status));
        }
        let rejected = BatchOutcome::Answered(Answers { outcomes: vec![Outcome::Rejected], stray: 0 });
        assert_eq!(outcome(&api(), &["A"], 400, r#"{"code":"BAD_KEY"}"#), rejected);
        assert_eq!(outcome(&api(), &["A"], 422, ""), rejected);
        for (status, body) in [(413, ""), (400, "<html>"), (422, "no JSON")] {
            let failed = outcome(&api(), &["A"], status, body);
            assert!(matches!(failed, BatchOutcome::Failed(Outcome::Invalid(_))), "{status}: {failed:?}");
        }
        let failed = outcome(&api(), &["A", "B"], 400, "<html>");
        assert!(matches!(failed, BatchOutcome::Failed(Outcome::Invalid(_))), "{failed:?}");
    }

    #[test]
    fn a_call_that_failed_answers_no_key() {
        let failed = |status| outcome(&api(), &["A", "B"], status, "{}");
        assert_eq!(failed(429), BatchOutcome::Failed(Outcome::RateLimited(None)));
        assert_eq!(failed(503), BatchOutcome::Failed(Outcome::ServerError(503, None)));
        assert_eq!(failed(401), BatchOutcome::Failed(Outcome::Unauthorized(401)));
        assert_eq!(failed(302), BatchOutcome::Failed(Outcome::Redirect(302)));
        for body in ["", "[]", "{}", r#"{"items":null}"#, r#"{"items":[{"legacyKey":"A","newKey":"N-A"}"#] {
            let failed = outcome(&api(), &["A", "B"], 200, body);
            assert!(matches!(failed, BatchOutcome::Failed(Outcome::Invalid(_))), "{body}: {failed:?}");
        }
    }

    #[test]
    fn halves_hold_all_keys_in_their_order_and_get_shorter() {
        for length in 0..40_usize {
            let keys: Vec<usize> = (0..length).collect();
            let (left, right) = bisect(&keys);
            assert_eq!([left, right].concat(), keys);
            assert!(length < 2 || (left.len() < length && right.len() < length), "{length}");
        }
        assert_eq!(bisect(&[7]), (&[7][..], &[][..]));
    }
}
