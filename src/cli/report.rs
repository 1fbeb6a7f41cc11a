//! `report`

use std::path::PathBuf;

use clap::Args;

/// Options of `report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Name of a job of `backfill` or `cleanse`.
    #[arg(required_unless_present = "check")]
    pub job: Option<String>,
    /// File to write; the other of FILE.html and FILE.json is written beside it [default: JOB.html].
    #[arg(long, value_name = "FILE", requires = "job")]
    pub to: Option<PathBuf>,
    /// Write nothing: look whether this report is still what was written.
    #[arg(long, value_name = "FILE", conflicts_with = "job")]
    pub check: Option<PathBuf>,
}
