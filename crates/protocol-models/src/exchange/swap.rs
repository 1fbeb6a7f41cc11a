//! A swap: one rename, which drops the former collection.

use super::{Exchange, Exploration, Late, Mechanisms, Method};
use crate::checking::{self, is_soaking};

/// Two commands of one attempt each and one process that recovers; one command is late or not answered.
const SWAP: Exchange = Exchange {
    method: Method::Swap,
    mechanisms: Mechanisms::TODAY,
    late: Late { fences: false, saves: false },
    attempts: [1, 1],
    faults: 1,
    writes: 1,
    tolerates_fences: false,
};
/// One command of two attempts.
const TWO_ATTEMPTS: Exchange = Exchange { attempts: [2, 0], ..SWAP };
/// One attempt, and an application that writes twice.
const TWO_WRITES: Exchange = Exchange { attempts: [1, 0], writes: 2, ..SWAP };
/// The same, but what is stored about the job may be late.
const LATE_SAVES: Exchange = Exchange { late: Late { saves: true, fences: false }, ..TWO_ATTEMPTS };
/// The same, but what raises and lifts fences may be late.
const LATE_FENCES: Exchange = Exchange { late: Late { saves: false, fences: true }, ..TWO_ATTEMPTS };

fn with(model: Exchange, change: impl FnOnce(&mut Mechanisms)) -> Exchange {
    let mut mechanisms = model.mechanisms;
    change(&mut mechanisms);
    Exchange { mechanisms, ..model }
}

#[track_caller]
fn right(model: Exchange, at_least: usize) {
    let model = if is_soaking() { Exchange { writes: model.writes + 1, ..model } } else { model };
    checking::right(&Exploration::of(model), at_least);
}

#[track_caller]
fn found(model: Exchange, what: &str) {
    checking::found(&Exploration::of(model), what);
}

const UNFENCED: &str = "names were exchanged while the live collection took writes";
const LOST: &str = "a write that was acknowledged is not live";
const DELETED: &str = "the application met a document that it had deleted";
const FENCED: &str = "a fence stays";
const OPEN: &str = "the record of an exchange stays open";
const UNTRUE: &str = "the record does not say what happened";

#[test]
fn two_commands_lose_nothing() {
    right(SWAP, 3_000_000);
}

#[test]
fn two_attempts_lose_nothing() {
    right(TWO_ATTEMPTS, 10_000);
}

#[test]
fn two_writes_are_not_lost() {
    right(TWO_WRITES, 20_000);
}

#[test]
fn late_saves_lose_nothing() {
    right(LATE_SAVES, 20_000);
}

#[test]
fn late_fences_lose_nothing_behind_guards() {
    right(with(LATE_FENCES, |mechanisms| mechanisms.guards = true), 20_000);
}

#[test]
fn without_a_fence_writes_are_lost() {
    found(with(TWO_WRITES, |mechanisms| mechanisms.fence = false), LOST);
}

#[test]
fn without_a_fence_around_the_incoming_collection_deletes_are_undone() {
    found(with(TWO_WRITES, |mechanisms| mechanisms.fence_incoming = false), DELETED);
}

#[test]
fn without_reaching_the_fence_writes_are_lost() {
    found(with(TWO_WRITES, |mechanisms| mechanisms.reaching = false), LOST);
}

#[test]
fn without_a_working_name_a_process_that_stood_still_exchanges_names() {
    found(with(TWO_WRITES, |mechanisms| mechanisms.working_name = false), UNFENCED);
}

#[test]
fn a_working_name_that_is_asked_for_twice_comes_back() {
    found(with(TWO_WRITES, |mechanisms| mechanisms.name_sent_once = false), UNFENCED);
}

#[test]
fn a_save_that_asks_for_no_claim_leaves_a_fence() {
    found(with(TWO_WRITES, |mechanisms| mechanisms.claim_in_saves = false), FENCED);
}

#[test]
fn a_save_that_asks_not_whether_all_is_over_undoes_the_end() {
    found(with(LATE_SAVES, |mechanisms| mechanisms.open_in_saves = false), UNTRUE);
}

#[test]
fn a_record_that_is_stored_twice_takes_a_claim_back() {
    found(with(TWO_WRITES, |mechanisms| mechanisms.records_stored_once = false), UNFENCED);
    found(with(LATE_SAVES, |mechanisms| mechanisms.records_stored_once = false), OPEN);
}

/// What a recovery stores is decided by the names, which can't change any more: the claim only spares others
/// the work. (In the program what was brought along is stored with it, which is not modelled.)
#[test]
fn closing_needs_no_claim() {
    right(with(TWO_WRITES, |mechanisms| mechanisms.claim_in_close = false), 20_000);
    right(with(LATE_SAVES, |mechanisms| mechanisms.claim_in_close = false), 20_000);
}

#[test]
fn letting_writes_through_before_names_are_safe_loses_them() {
    found(with(TWO_WRITES, |mechanisms| mechanisms.forbidding_first = false), DELETED);
    let silent = Exchange { writes: 0, ..TWO_WRITES };
    found(with(silent, |mechanisms| mechanisms.forbidding_first = false), UNFENCED);
}

#[test]
fn a_fence_without_a_tag_is_lifted_by_who_recovers_another_one() {
    found(with(SWAP, |mechanisms| mechanisms.tag = false), UNFENCED);
}

#[test]
fn deletes_that_do_not_give_way_take_what_is_newer() {
    found(with(TWO_WRITES, |mechanisms| mechanisms.giving_way = false), LOST);
}

#[test]
fn without_a_position_nobody_can_finish() {
    found(with(TWO_WRITES, |mechanisms| mechanisms.position = false), OPEN);
}

/// What the server does not compare yet: without guards a fence that is late stays, and one that is lifted
/// late lets writes through to a collection that is about to give way.
#[test]
fn late_fences_need_guards() {
    found(LATE_FENCES, FENCED);
    found(Exchange { tolerates_fences: true, ..LATE_FENCES }, UNFENCED);
}

#[test]
fn a_fence_that_is_lifted_before_its_guard_is_gone_comes_back() {
    let change = |mechanisms: &mut Mechanisms| {
        mechanisms.guards = true;
        mechanisms.guard_before_lift = false;
    };
    found(with(LATE_FENCES, change), FENCED);
}

#[test]
fn a_recoverer_that_makes_guards_lets_a_late_fence_in() {
    let change = |mechanisms: &mut Mechanisms| {
        mechanisms.guards = true;
        mechanisms.recoverer_makes_guards = true;
    };
    found(with(LATE_FENCES, change), FENCED);
}
