//! Filling keys: find candidates, ask the key API, write the key or a flag.
//!
//! `run` holds order and policy, the other modules one decision or one step
//! each: `guard` and `counts` are pure, `reader` reads ahead, `asker` makes one
//! key's calls, `engine` moves documents from chunk to durable write.

pub mod asker;
mod beside;
mod canary;
pub mod checkpoint;
pub mod counts;
pub mod engine;
pub mod failures;
pub mod from_key_map;
pub mod guard;
pub mod latency;
mod plan;
pub mod reader;
pub mod run;
pub mod steer;
pub mod summary;
mod worker;

pub use plan::{Options, default_job, identity};
