//! Jobs: persistent runs of a command, found again by their name.
//!
//! A job document says what the job does (its identity, which may not change),
//! who runs it now (the lease) and how far it is (counters and position, never
//! ahead of durable writes).

pub mod budget;
pub mod control;
pub mod crew;
mod elsewhere;
pub mod health;
pub mod holder;
pub mod lanes;
pub mod lease;
pub mod ownership;
pub mod running;
pub mod series;
mod start;
pub mod store;

pub use lease::Lease;
pub use start::{BORROWED, RAN, RESULT, refuse_others};
pub use store::{Job, JobState, Role};
