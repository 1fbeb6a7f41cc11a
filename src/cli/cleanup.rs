//! `cleanup`

use clap::Args;

/// Options of `cleanup`.
#[derive(Debug, Args)]
pub struct CleanupArgs {
    /// Name of the job, as `mongorekey status` shows it.
    pub job: String,
    /// Don't ask.
    #[arg(long)]
    pub yes: bool,
    /// Also drop what the job has set aside: the old collection of a cutover, the
    /// quarantine. These hold your documents, and are kept without this option.
    #[arg(long)]
    pub drop_old_collection: bool,
}
