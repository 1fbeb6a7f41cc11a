//! Without any one mechanism the target misses a change, or a former holder changes it.

use super::{Mechanisms, Takeover};
use crate::checking::{self, found, is_soaking};

const TAKEOVER: Takeover =
    Takeover { mechanisms: Mechanisms::TODAY, faults: 1, writes: 2, is_restarted: false };
const RESTART: Takeover = Takeover { is_restarted: true, ..TAKEOVER };

const LATE: &str = "a former holder has changed the target";
const MISSING: &str = "a change is missing that nobody will look at again";

fn with(model: Takeover, change: impl FnOnce(&mut Mechanisms)) -> Takeover {
    let mut mechanisms = model.mechanisms;
    change(&mut mechanisms);
    Takeover { mechanisms, ..model }
}

#[track_caller]
fn right(model: Takeover, at_least: usize) {
    checking::right(&Takeover { faults: model.faults + u8::from(is_soaking()), ..model }, at_least);
}

#[test]
fn a_job_that_is_taken_over_misses_nothing() {
    right(TAKEOVER, 10_000);
}

#[test]
fn a_job_that_is_begun_anew_misses_nothing() {
    right(RESTART, 10_000);
}

#[test]
fn without_a_new_number_a_former_holder_goes_on() {
    found(&with(TAKEOVER, |mechanisms| mechanisms.number = false), MISSING);
}

#[test]
fn without_raising_a_former_holder_goes_on() {
    found(&with(TAKEOVER, |mechanisms| mechanisms.raising = false), MISSING);
}

#[test]
fn lanes_that_are_lowered_let_a_former_holder_in() {
    found(&with(TAKEOVER, |mechanisms| mechanisms.only_upwards = false), LATE);
}

#[test]
fn a_look_at_the_lane_before_the_transaction_is_too_early() {
    found(&with(TAKEOVER, |mechanisms| mechanisms.gate = false), LATE);
}

#[test]
fn a_lane_that_is_opened_without_a_look_at_the_job_lets_a_former_holder_in() {
    found(&with(TAKEOVER, |mechanisms| mechanisms.opening = false), LATE);
}

/// Of the same copy an older position is only more work, of a new one it is not true.
#[test]
fn a_position_of_a_former_holder_is_not_that_of_a_new_copy() {
    right(with(TAKEOVER, |mechanisms| mechanisms.saving = false), 10_000);
    found(&with(RESTART, |mechanisms| mechanisms.saving = false), MISSING);
}

#[test]
fn a_position_that_is_stored_too_early_misses_a_change() {
    found(&with(TAKEOVER, |mechanisms| mechanisms.saving_last = false), MISSING);
}

/// The server gives an open transaction up by itself.
#[test]
fn ending_what_is_open_only_makes_it_quicker() {
    right(with(TAKEOVER, |mechanisms| mechanisms.ending = false), 10_000);
}
