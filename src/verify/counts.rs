//! The number of documents on both sides.

use std::time::Duration;

use bson::Document;
use serde_json::json;

use super::check::Check;
use super::sides::Sides;
use crate::Context;
use crate::cleanse::count;
use crate::error::Result;

/// The name of the check.
const NAME: &str = "counts";

/// Compares the number of documents that should be in the target with what is there.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn check(
    context: &Context,
    sides: &Sides,
    _copy: Option<&Document>,
    _settle: Duration,
) -> Result<Check> {
    let mongo = &context.mongo;
    let expected = count::valid(mongo, &sides.source, &sides.predicate.valid()).await?;
    let found = count::exactly(mongo, &sides.target, &Document::new()).await?;
    Ok(judged(sides, expected, found))
}

fn judged(sides: &Sides, expected: u64, found: u64) -> Check {
    let check = Check::of(NAME, json!(expected), json!(found), Vec::new());
    let check =
        check.remark(format!("valid documents of {} and documents of {}", sides.source, sides.target));
    // Two empty sides agree, which proves nothing.
    Check { passed: check.passed && expected > 0, ..check }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cleanse::predicate::Predicate;

    #[test]
    fn two_empty_sides_do_not_pass() {
        let sides = Sides {
            source: "app.a".parse().expect("a namespace"),
            target: "app.b".parse().expect("a namespace"),
            predicate: Predicate::everything(),
            job: "j".into(),
        };
        assert!(!judged(&sides, 0, 0).passed);
        assert!(judged(&sides, 5, 5).passed);
        assert!(!judged(&sides, 5, 4).passed);
    }
}
