//! A key API to rehearse against, because nobody wants the first run of a migration to be the one
//! against the real API: `mongorekey mock-api` for people, [`MockApi`] for tests. Nothing in here
//! knows the rest of mongorekey.
//!
//! - [`Behaviour`] decides, without I/O or a clock, what a call gets;
//! - [`RateLimit`] is what the API lets through per second;
//! - [`serve`] speaks HTTP;
//! - [`CallLog`] remembers every call that came.

mod behaviour;
mod in_process;
mod limit;
mod log;
mod server;
#[cfg(test)]
mod tests;

pub use behaviour::{Behaviour, Decision, Fault, Faults, Latency, Percent, new_key};
pub use in_process::MockApi;
pub use limit::RateLimit;
pub use log::{Call, CallLog, Outcome, OutcomeCounts, Summary};
pub use server::{listening_line, serve};
