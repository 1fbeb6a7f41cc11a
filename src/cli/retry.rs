//! `retry`

use clap::Args;

use super::BackfillTargetArgs;
use crate::mongo::sink::FlagReason;

/// Options of `retry`.
#[derive(Debug, Args)]
pub struct RetryArgs {
    /// Flags of this reason.
    #[arg(long, value_enum, value_name = "REASON")]
    pub reason: FlagReason,
    /// Only flags that this job has written.
    #[arg(long, value_name = "NAME")]
    pub job: Option<String>,
    /// Don't ask.
    #[arg(long)]
    pub yes: bool,
    /// Where to look.
    #[command(flatten)]
    pub targets: BackfillTargetArgs,
}
