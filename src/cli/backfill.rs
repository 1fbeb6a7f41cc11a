//! `backfill`

use clap::Args;

use super::BackfillTargetArgs;
use crate::backfill::Options;
use crate::config::values::{Concurrency, Tps};
use crate::throttle::window::{TimeZoneName, Window};

/// Options of `backfill`.
#[derive(Debug, Args)]
pub struct BackfillArgs {
    /// Ceiling of calls per second, retries included; fractions allowed [default: as configured, 10].
    #[arg(long, value_name = "N")]
    pub tps: Option<Tps>,
    /// Candidates per read [default: as configured, 1000].
    #[arg(long, value_name = "N")]
    pub chunk: Option<usize>,
    /// Calls in flight at most: `auto` or a number [default: as configured, auto].
    #[arg(long, value_name = "N")]
    pub concurrency: Option<Concurrency>,
    /// Call only within this window of the day, such as 01:00-06:00; repeatable.
    #[arg(long = "window", value_name = "FROM-TO")]
    pub windows: Vec<Window>,
    /// Time zone of the windows, such as Asia/Seoul.
    #[arg(long, value_name = "ZONE")]
    pub time_zone: Option<TimeZoneName>,
    /// Documents to settle at most in this run.
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
    /// Count the candidates; call nothing, write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Go on without the partial index, scanning the collection for every chunk.
    #[arg(long)]
    pub allow_collection_scan: bool,
    /// Do so many documents first, show each, and ask before going on.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), conflicts_with_all = ["limit", "dry_run"])]
    pub canary: Option<u64>,
    /// Go on after the canary without asking.
    #[arg(long)]
    pub yes: bool,
    /// Workers in this process; they share keys and TPS [default: 1].
    #[arg(long, value_name = "N")]
    pub workers: Option<usize>,
    /// Share keys and TPS with those who run the job already, on any machine;
    /// starts the job where nobody does.
    #[arg(long)]
    pub join: bool,
    /// Fill what the key map knows, within the database and without a single call.
    ///
    /// Documents whose key is not in the key map stay candidates, and no flag is
    /// written: a backfill without this option does the rest.
    #[arg(long, conflicts_with_all = ["canary", "workers", "join"])]
    pub from_key_map: bool,
    /// Name of the job [default: backfill- and the collections].
    #[arg(long, value_name = "NAME")]
    pub job: Option<String>,
    /// What to fill.
    #[command(flatten)]
    pub targets: BackfillTargetArgs,
}

impl BackfillArgs {
    /// What the options ask for.
    pub fn options(&self) -> Options {
        Options {
            job: self.job.clone(),
            tps: self.tps,
            chunk: self.chunk,
            concurrency: self.concurrency,
            windows: self.windows.clone(),
            time_zone: self.time_zone.clone(),
            target: self.targets.target.clone(),
            limit: self.limit,
            dry_run: self.dry_run,
            allow_collection_scan: self.allow_collection_scan,
            canary: self.canary,
            yes: self.yes,
            workers: self.workers,
            join: self.join,
            from_key_map: self.from_key_map,
        }
    }
}
