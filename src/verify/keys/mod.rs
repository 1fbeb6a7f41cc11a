//! `verify --keys`: the key API asked again for some filled documents.
//!
//! Nothing is written but the job that sees to it that nobody else calls the API
//! meanwhile: `job` holds it, `filled` draws documents, `ask` makes the calls,
//! `judge` says what the answers mean, `run` goes from one to the next.

pub mod ask;
pub mod filled;
pub mod job;
pub mod judge;
pub mod run;

pub use job::check_turn;
pub use run::{Keys, check};
