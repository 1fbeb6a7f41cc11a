//! `--mode switch`: the application is deployed to the new collection, step by step.
//!
//! Meanwhile some of its instances write to the old collection and some to the new
//! one. What is written to the old one is brought to the new one by writes that
//! yield (`sync`); a document that anybody else has written to in the new one is
//! owned by it from then on (`owned`), and what the old collection says about it
//! is a conflict (`contest`) to report, never applied. The same `sync` the other way round
//! feeds the old collection for the time of a rollback. `stage` is what the job
//! remembers of it, `run` lists the steps.

pub mod contest;
pub mod owned;
pub mod report;
pub mod run;
pub mod stage;
pub mod sync;
