//! The only writer to the terminal: results on stdout, everything else on
//! stderr.

pub mod ask;
pub mod json;
pub mod outcome;
pub mod progress;
