//! `cutover` and `rollback`

use clap::{Args, ValueEnum};

use crate::config::values::{HumanDuration, Namespace};

/// How a clean collection takes the place of the old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Mode {
    /// The application is deployed to the new collection, step by step: no pause, no rename.
    #[default]
    Switch,
    /// The new collection gets the name of the old one, which is dropped.
    Swap,
    /// The new collection gets the name of the old one, which gets another name.
    Keep,
}

/// What holds writes off while names are exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FenceKind {
    /// A validator that refuses inserts and updates of the one collection.
    Validator,
    /// The server's block of all writes of the deployment (needs the privilege to bypass it).
    WriteBlock,
    /// The validator, and both renames under one lock by `applyOps` (keep only).
    ApplyOps,
}

/// Options of `cutover`.
#[derive(Debug, Args)]
pub struct CutoverArgs {
    /// Which copy: job, source and target.
    #[command(flatten)]
    pub copy: CopyArgs,
    /// How to cut over.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub mode: Mode,
    /// How names are exchanged.
    #[command(flatten)]
    pub exchange: ExchangeArgs,
    /// Afterwards keep the old collection up to date until stopped (with switch and keep).
    ///
    /// What is written to the new collection is brought back into the old one, so
    /// that `rollback` has little left to do, whatever the oplog holds by then.
    /// Started again, it goes on.
    #[arg(long)]
    pub feed_back: bool,
    /// With switch: done when nothing was written to the old collection for this long.
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    pub quiet_for: HumanDuration,
    /// Lift the fence of a cutover that was cut short, and look at what has become of it.
    #[arg(long, conflicts_with = "feed_back")]
    pub abort: bool,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
}

/// Options of `rollback`.
#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// Which copy: job, source and target.
    #[command(flatten)]
    pub copy: CopyArgs,
    /// How names are exchanged.
    #[command(flatten)]
    pub exchange: ExchangeArgs,
    /// Give up what was written since the cutover, where it can't be brought along.
    #[arg(long)]
    pub discard_writes_since_cutover: bool,
    /// After a switch: done when nothing was written to the new collection for this long.
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    pub quiet_for: HumanDuration,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
}

/// Which copy.
#[derive(Debug, Clone, Args)]
pub struct CopyArgs {
    /// Collection that was copied, as database.collection [default: as configured].
    #[arg(long, value_name = "NAMESPACE")]
    pub source: Option<Namespace>,
    /// Collection that it was copied to [default: as configured].
    #[arg(long, value_name = "COLLECTION")]
    pub to: Option<String>,
    /// Name of the job of the cleanse [default: cleanse-SOURCE-to-TARGET].
    #[arg(long, value_name = "NAME")]
    pub job: Option<String>,
}

/// How names are exchanged.
#[derive(Debug, Clone, Args)]
pub struct ExchangeArgs {
    /// What holds writes off meanwhile [default: validator; with keep apply-ops].
    #[arg(long, value_enum, value_name = "FENCE")]
    pub fence: Option<FenceKind>,
    /// Do not begin where writes would be held off for longer, and give up where they are.
    #[arg(long, value_name = "DURATION", default_value = "500ms")]
    pub max_pause: HumanDuration,
    /// With keep: rename twice, with a moment between in which the name is free.
    ///
    /// What is written in that moment goes to a collection that the server makes
    /// for it; it is found and merged.
    #[arg(long)]
    pub allow_gap: bool,
}
