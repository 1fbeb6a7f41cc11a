//! `cleanse`

use clap::Args;

use crate::config::values::Namespace;

/// Options of `cleanse`.
#[derive(Debug, Args)]
pub struct CleanseArgs {
    /// Collection to copy to, in the source's database [default: as configured].
    #[arg(long, value_name = "COLLECTION")]
    pub to: Option<String>,
    /// Collection to copy from, as database.collection [default: as configured].
    #[arg(long, value_name = "NAMESPACE")]
    pub source: Option<Namespace>,
    /// Write nothing: print counts per rule, sample `_id`s and the plan.
    #[arg(long)]
    pub dry_run: bool,
    /// After the copy keep the target in step with the source until stopped.
    #[arg(long, conflicts_with = "dry_run")]
    pub follow: bool,
    /// Ranges to copy at once.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub parallel: u8,
    /// Keep the rejected documents too: in this collection of the source's database, as
    /// {_id, rule, document}. The copy reads the source once more per rule.
    #[arg(long, value_name = "COLLECTION")]
    pub quarantine: Option<String>,
    /// Count the rejected documents per rule, which reads the source once more.
    #[arg(long)]
    pub count_rules: bool,
    /// Drop the target and the quarantine of this job and copy from the start.
    #[arg(long)]
    pub restart: bool,
    /// Name of the job [default: cleanse-SOURCE-to-TARGET].
    #[arg(long, value_name = "NAME")]
    pub job: Option<String>,
}
