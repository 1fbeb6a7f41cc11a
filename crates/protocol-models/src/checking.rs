//! What the tests assert of a model.

use std::time::Instant;

use crate::explore::{Model, explore};

/// Set by `scripts/soak`, which runs tests at full length; here it widens the bounds.
const FACTOR: &str = "MONGOREKEY_SOAK_FACTOR";

/// Whether the bounds are to be wider than in a usual run.
pub(crate) fn is_soaking() -> bool {
    std::env::var(FACTOR).is_ok()
}

/// Nothing is wrong in any state, and there are so many at least.
#[track_caller]
pub(crate) fn right(model: &impl Model, at_least: usize) {
    let begun = Instant::now();
    let explored = explore(model);
    tell(&format!("{} states in {:.1?}", explored.states, begun.elapsed()));
    if let Some(wrong) = explored.wrong {
        panic!("{wrong}");
    }
    assert!(explored.states >= at_least, "there are {} states only", explored.states);
}

/// That is wrong in some state.
#[track_caller]
pub(crate) fn found(model: &impl Model, what: &str) {
    let explored = explore(model);
    let wrong = explored.wrong.unwrap_or_else(|| panic!("nothing is wrong in {} states", explored.states));
    tell(&format!("{} states until: {wrong}", explored.states));
    assert_eq!(wrong.what, what, "{wrong}");
}

#[expect(clippy::print_stdout, reason = "shown by a test that fails, or on request")]
fn tell(text: &str) {
    println!("{text}");
}
