//! `status`

use std::path::PathBuf;

use clap::Args;

/// Options of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Name of one job; all without it.
    pub job: Option<String>,
    /// Show it again every two seconds until nothing runs any more.
    #[arg(long, conflicts_with = "failed")]
    pub watch: bool,
    /// List the documents that failed, with reason and legacy key.
    #[arg(long, requires = "job")]
    pub failed: bool,
    /// Write the failed documents to this file, one JSON document per line.
    #[arg(long, value_name = "FILE", requires = "failed")]
    pub file: Option<PathBuf>,
}
