//! The only writer to the terminal: results on stdout, everything else on
//! stderr.

pub mod json;
pub mod outcome;
pub mod progress;
pub mod terminal;
