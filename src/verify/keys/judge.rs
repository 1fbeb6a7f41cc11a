//! What an answer says about the key that a document has. Pure.

use crate::key_api::classify::Outcome;
use crate::key_map::{Answer, Remembered};

/// What a document's key turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// What the API answers.
    Right,
    /// Another one than the API answers now, or answered when the document was filled.
    Wrong,
    /// What the API answered when the document was filled; now it answers another one.
    Changed,
    /// One that the API no longer has.
    Vanished,
    /// Not known: the API did not answer.
    Unanswered,
}

impl Verdict {
    /// All of them, in the order of results.
    pub const ALL: [Self; 5] = [Self::Right, Self::Wrong, Self::Changed, Self::Vanished, Self::Unanswered];

    /// The word in results.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Right => "right",
            Self::Wrong => "wrong",
            Self::Changed => "changed",
            Self::Vanished => "vanished",
            Self::Unanswered => "unanswered",
        }
    }
}

/// Judges the key of a document: `key` where it is a text, the answer, and what
/// the key map remembers.
pub fn judge(key: Option<&str>, outcome: Option<&Outcome>, remembered: Option<&Remembered>) -> Verdict {
    match outcome {
        Some(Outcome::Found(answer)) if Some(answer.as_str()) == key => Verdict::Right,
        Some(Outcome::Found(_)) => match remembered.map(|remembered| &remembered.answer) {
            Some(Answer::Found(earlier)) if Some(earlier.as_str()) == key => Verdict::Changed,
            _ => Verdict::Wrong,
        },
        Some(Outcome::NotFound | Outcome::Rejected) => Verdict::Vanished,
        _ => Verdict::Unanswered,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_judged_by_the_answer_and_by_what_was_answered_before() {
        let found = |key: &str| Outcome::Found(key.into());
        let knows = |key: &str| Remembered { answer: Answer::Found(key.into()), held: false };
        let cases = [
            (Some("N-1"), Some(found("N-1")), None, Verdict::Right),
            (Some("N-1"), Some(found("N-1")), Some(knows("N-2")), Verdict::Right),
            (Some("N-1"), Some(found("N-2")), None, Verdict::Wrong),
            (Some("N-1"), Some(found("N-2")), Some(knows("N-2")), Verdict::Wrong),
            (Some("N-1"), Some(found("N-2")), Some(knows("N-1")), Verdict::Changed),
            (Some("N-1"), Some(Outcome::NotFound), Some(knows("N-1")), Verdict::Vanished),
            (Some("N-1"), Some(Outcome::Rejected), None, Verdict::Vanished),
            (Some("N-1"), Some(Outcome::Timeout), Some(knows("N-1")), Verdict::Unanswered),
            (Some("N-1"), None, None, Verdict::Unanswered),
            (None, Some(found("N-1")), None, Verdict::Wrong),
        ];
        for (key, outcome, remembered, verdict) in cases {
            assert_eq!(judge(key, outcome.as_ref(), remembered.as_ref()), verdict, "{outcome:?}");
        }
    }
}
