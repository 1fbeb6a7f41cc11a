//! Cleansing: the valid documents of a collection, copied to a new one.
//!
//! `plan` decides, `run` lists the phases; `predicate` and `target` decide without I/O what is
//! valid and what the target must look like; `copy` moves ranges, `build`
//! makes and finishes the target, `steer` slows and stops it, `needs` and `affected` care for rules that
//! look at other documents, `names` are those of an unfinished copy, `quarantine` keeps what is rejected and `restore` puts it back, `displaced` what gave way on the way back, `combine` tells which options go together,
//! `dry_run` shows all of it without a write.

pub mod affected;
pub mod build;
pub mod combine;
pub mod conflict;
pub mod copy;
pub mod count;
pub mod displaced;
pub mod dry_run;
pub mod dual_write;
pub mod follow;
pub mod keep;
pub mod ledger;
pub mod marks;
pub mod names;
pub mod needs;
pub mod out;
pub mod outlook;
pub mod pending;
pub mod plan;
pub mod predicate;
pub mod quarantine;
pub mod ranges;
pub mod restore;
mod result;
pub mod run;
pub mod steer;
pub mod target;
