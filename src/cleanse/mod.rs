//! Cleansing: the valid documents of a collection, copied to a new one.
//!
//! `plan` decides, `run` lists the phases; `predicate` and `target` decide without I/O what is
//! valid and what the target must look like; `copy` moves ranges, `build`
//! makes and finishes the target, `dry_run` shows all of it without a write.

pub mod build;
pub mod copy;
pub mod count;
pub mod dry_run;
pub mod dual_write;
pub mod follow;
pub mod keep;
pub mod marks;
pub mod plan;
pub mod predicate;
pub mod ranges;
pub mod run;
pub mod target;
