//! `cleanse`

use clap::{Args, ValueEnum};

use super::cutover::CopyArgs;
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
    #[arg(long, conflicts_with_all = ["follow", "quarantine"])]
    pub dual_write: bool,
    /// How long after a write to one side the application may take for the other.
    #[arg(long, value_name = "DURATION", default_value = "2s", requires = "dual_write")]
    pub grace: HumanDuration,
    /// How to copy.
    #[arg(long, value_enum, default_value_t, value_name = "METHOD")]
    pub method: Method,
    /// Ranges to copy at once.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub parallel: u8,
    /// Documents per second to copy and to catch up with at most, read or
    /// written; 0 means no limit [default: as configured, else no limit].
    #[arg(long, value_name = "N")]
    pub documents_per_second: Option<u32>,
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

impl CleanseArgs {
    /// The options that name a copy, and nothing else.
    pub fn of_copy(copy: &CopyArgs, quarantine: Option<&str>) -> Self {
        let quarantine = quarantine.and_then(|name| name.split_once('.')).map(|(_, name)| name.to_owned());
        Self {
            to: copy.to.clone(),
            source: copy.source.clone(),
            job: copy.job.clone(),
            quarantine,
            dry_run: false,
            follow: false,
            dual_write: false,
            grace: HumanDuration(std::time::Duration::from_secs(2)),
            method: Method::Auto,
            parallel: 2,
            documents_per_second: None,
            count_rules: false,
            restart: false,
        }
    }
}

/// How documents are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Method {
    /// The best for a source that is written to: `merge`.
    #[default]
    Auto,
    /// Range by range: resumes, can be slowed, follows what is written meanwhile.
    Merge,
    /// By one `$out`, for maintenance windows: the source must not be written
    /// meanwhile (that it was is noticed), an interrupted one is begun anew, and
    /// a Timestamp(0, 0) at the top level of a document becomes the time of day.
    Out,
}

impl Method {
    /// The word that is stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Merge => "merge",
            Self::Out => "out",
        }
    }
}
