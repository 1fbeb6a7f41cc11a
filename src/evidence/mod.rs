//! The evidence report: what somebody signs who says that nothing is missing.
//!
//! A report is one JSON document, put together from what a command found (`verify`)
//! or from what is stored of a job (`job`), and sealed with a hash of itself
//! (`canonical`). The page for people is made of that document and of nothing else
//! (`page`), so that the two can't disagree and a page can be made again and
//! compared. No secret goes into the document: neither the connection string nor
//! anything of the key API but its shown address.

pub mod canonical;
pub mod files;
pub mod gather;
pub mod job;
pub mod page;
pub mod verify;
pub mod words;

mod comparisons;
mod exact;
mod recheck;
mod series;

pub use recheck::recheck;

/// Version of the document's layout.
pub const SCHEMA: u32 = 1;
/// What the document calls itself.
pub const KIND: &str = "mongorekey evidence report";
