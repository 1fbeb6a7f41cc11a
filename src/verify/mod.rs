//! Verification: checks that find what is missing, extra or different, and
//! that never pass because there was nothing to look at.

pub mod backfill;
pub mod check;
pub mod compare;
pub mod confidence;
pub mod counts;
pub mod dual_write;
pub mod full;
pub mod keys;
pub mod pairs;
pub mod quarantine;
pub mod repair;
pub mod result;
pub mod run;
pub mod sample;
pub mod sides;
pub mod structure;
pub mod unique;
pub mod verdict;
pub mod wanted;

mod differences;
mod on_their_way;
mod value;
