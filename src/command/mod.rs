//! Commands that are no jobs: they look, prepare or rehearse.

pub mod check;
pub mod cleanup;
pub mod control;
pub mod index;
pub mod init;
pub mod key_map;
#[cfg(feature = "mock")]
pub mod mock_api;
pub mod plan;
pub mod retry;
pub mod status;
