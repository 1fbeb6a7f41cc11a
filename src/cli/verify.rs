//! `verify`

use std::path::PathBuf;

use clap::Args;

use super::BackfillTargetArgs;
use crate::config::values::{HumanDuration, Namespace};

/// Options of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Compare the number of documents that should be in the target with what is there.
    #[arg(long)]
    pub counts: bool,
    /// Compare so many random documents of each side with the other side.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub sample: Option<u32>,
    /// What decides which documents --sample and --keys draw: the same seed and the same data,
    /// the same documents [default: a random one, which the result tells].
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Compare every document of both sides byte for byte, and indexes and options.
    ///
    /// Reads on the primary what a majority has. What differs is read again for a
    /// while, so that writers may be live. An interrupted comparison goes on
    /// where it was.
    #[arg(long)]
    pub full: bool,
    /// Ask the key API again for so many random filled documents of all targets.
    ///
    /// Calls as the backfill does, within the same ceiling, and writes nothing.
    /// Tells keys that are wrong (the API has another one), that have changed since
    /// the backfill, and that have vanished.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keys: Option<u32>,
    /// Look for new keys of two legacy keys, and legacy keys with two new keys, over all targets.
    #[arg(long)]
    pub unique: bool,
    /// Write or remove the documents that --full found to differ, as the source and
    /// the rules of the cleanse say, and compare again. Asks first.
    #[arg(long, requires = "full")]
    pub repair: bool,
    /// Do not ask before --repair.
    #[arg(long, requires = "repair")]
    pub yes: bool,
    /// Ranges that --full compares at once.
    #[arg(long, value_name = "N", default_value_t = 2, requires = "full", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub parallel: u8,
    /// Watch an application that writes to both sides, and tell what reached one side only.
    ///
    /// Follows the changes of both sides for a while and compares each touched
    /// document, byte for byte, once the other side has had the time of --settle
    /// to follow. Tells what is missing, extra or different, and what came late.
    /// Does not pass where nothing was written.
    #[arg(long)]
    pub dual_write: bool,
    /// How long --dual-write watches.
    #[arg(long = "for", value_name = "DURATION", default_value = "10m", requires = "dual_write")]
    pub watch: HumanDuration,
    /// How long --full and --sample read differing documents again before they report them, and
    /// how long --dual-write lets the other side take to follow.
    #[arg(long, value_name = "DURATION", default_value = "10s")]
    pub settle: HumanDuration,
    /// Do not go on with an interrupted --full: start over.
    #[arg(long, requires = "full")]
    pub restart: bool,
    /// Collection to compare from, as database.collection [default: as configured].
    #[arg(long, value_name = "NAMESPACE")]
    pub source: Option<Namespace>,
    /// Collection to compare with; a bare name is one of the source's database.
    #[arg(long, value_name = "COLLECTION")]
    pub to: Option<String>,
    /// Differences to list per check.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub max_differences: usize,
    /// Write a report to FILE.html and FILE.json, passed or not, to be printed and signed.
    ///
    /// Says "not finished" where the run was interrupted. The folder must exist.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Name of the job to verify [default: as the command that made it].
    #[arg(long, value_name = "NAME")]
    pub job: Option<String>,
    /// What was filled.
    #[command(flatten)]
    pub targets: BackfillTargetArgs,
}
