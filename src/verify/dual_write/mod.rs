//! `verify --dual-write`: whether an application that writes every change to
//! both sides does so.
//!
//! The change streams of both sides tell which documents are touched, and when.
//! What counts is what the documents are like once the other side has had its
//! time to follow: events may be many for one write, or none for one that
//! changes nothing.

mod result;
mod run;
mod watched;

pub use result::DualWrite;
pub use run::{Order, run};
