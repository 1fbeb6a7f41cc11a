//! Cleansing: the valid documents of a collection, copied to a new one.
//!
//! `plan` decides, `run` lists the phases; `predicate` and `target` decide without I/O what is
//! valid and what the target must look like; `copy` moves ranges, `build`
//! makes and finishes the target, `quarantine` keeps what is rejected, `dry_run` shows all of it without a write.

pub mod build;
pub mod copy;
pub mod count;
pub mod dry_run;
pub mod follow;
pub mod marks;
pub mod plan;
pub mod predicate;
pub mod quarantine;
pub mod ranges;
pub mod run;
pub mod target;
