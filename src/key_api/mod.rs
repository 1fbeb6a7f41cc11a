//! The only door to the key API: what is asked, what an answer means, and the
//! client that does it.

pub mod batch;
pub mod classify;
pub mod client;
pub mod retry;
pub mod tls;
