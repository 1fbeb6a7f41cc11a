//! `cleanse`

use clap::Args;

use crate::config::values::{HumanDuration, Namespace};

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
    /// Copy into a target that the application writes to as well.
    ///
    /// For an application that makes every change on both sides. Nothing that
    /// stands in the target is overwritten by the copy. What was touched meanwhile
    /// is compared afterwards; what still differs after the grace time is brought
    /// to the state of the source and reported. The target may be there already,
    /// and is then never dropped.
    #[arg(long, conflicts_with = "follow")]
    pub dual_write: bool,
    /// How long after a write to one side the application may take for the other.
    #[arg(long, value_name = "DURATION", default_value = "2s", requires = "dual_write")]
    pub grace: HumanDuration,
    /// Ranges to copy at once.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub parallel: u8,
    /// Count the rejected documents per rule, which reads the source once more.
    #[arg(long)]
    pub count_rules: bool,
    /// Drop the target of this job and copy from the start.
    #[arg(long)]
    pub restart: bool,
    /// Name of the job [default: cleanse-SOURCE-to-TARGET].
    #[arg(long, value_name = "NAME")]
    pub job: Option<String>,
}
