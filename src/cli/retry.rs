//! `retry`

use clap::Args;

use super::BackfillTargetArgs;
use crate::mongo::sink::FlagReason;

/// Clears flags of one reason, and forgets the negative answers behind them, so
/// that the next backfill asks again.
///
/// Only flags that a backfill has written are cleared, and only where the key
/// is still missing. Each collection is read once from end to end, because no
/// index knows the flags. Kill it at any moment and start the same command
/// again.
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
