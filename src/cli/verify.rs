//! `verify`

use clap::Args;

use super::BackfillTargetArgs;
use crate::config::values::Namespace;

/// Options of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Compare the number of documents that should be in the target with what is there.
    #[arg(long)]
    pub counts: bool,
    /// Compare so many random documents of each side with the other side.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub sample: Option<u32>,
    /// Collection to compare from, as database.collection [default: as configured].
    #[arg(long, value_name = "NAMESPACE")]
    pub source: Option<Namespace>,
    /// Collection to compare with; a bare name is one of the source's database.
    #[arg(long, value_name = "COLLECTION")]
    pub to: Option<String>,
    /// Differences to list per check.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub max_differences: usize,
    /// Name of the job to verify [default: as the command that made it].
    #[arg(long, value_name = "NAME")]
    pub job: Option<String>,
    /// What was filled.
    #[command(flatten)]
    pub targets: BackfillTargetArgs,
}
