//! `verify --full`: every document of both sides, byte for byte.
//!
//! Both sides are read by ranges of `_id` at the same time and matched by the
//! bytes of their `_id`s. A range whose sides agree is done and never read
//! again; documents that differ are read again until they agree or stand.

pub mod job;
pub mod matching;
pub mod outcome;
pub mod progress;
pub mod run;
pub mod sides;
pub mod suspects;
pub mod workers;

pub use job::{SINCE, name_beside as job_name, quarantine_name_beside as quarantine_job_name};
pub use outcome::Full;
pub use run::{Order, run};
