//! What was typed: one file per command, no I/O, no rules across options.

pub mod backfill;
pub mod cleanse;
pub mod cleanup;
pub mod control;
pub mod cutover;
pub mod index;
pub mod key_map;
#[cfg(feature = "mock")]
pub mod mock_api;
pub mod options;
pub mod report;
pub mod retry;
pub mod status;
pub mod verify;

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::config::values::{FieldPath, Namespace, Secret};
use crate::config::{Overrides, TargetOptions};
use crate::report::outcome::Format;

/// Give a live MongoDB collection a new key, or a clean copy of itself.
///
/// Commands read `mongorekey.toml` in the current folder unless --config names
/// another file; options override it. Results go to stdout, progress and logs
/// to stderr.
///
/// Exit codes: 0 the goal is reached; 1 the command ran but did not reach it
/// (documents failed, a mismatch was found); 2 bad usage or configuration,
/// nothing was touched; 3 refused by a check, nothing was touched; 4 stopped by
/// a fatal condition, all state is kept; 130 and 143 interrupted, all state is
/// saved.
#[derive(Debug, Parser)]
#[command(name = "mongorekey", version, max_term_width = 100)]
pub struct Cli {
    /// Options of all commands.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of all commands.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Config file [default: mongorekey.toml, where it exists].
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// MongoDB connection string, overriding the config.
    ///
    /// A password given here is visible to other users of this machine only
    /// until the program has started; the environment variable MONGOREKEY_URI
    /// never is.
    #[arg(long, global = true, value_name = "URI")]
    pub uri: Option<String>,

    /// Format of the result on stdout.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Format,

    /// Format of progress and logs on stderr.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    pub log_format: LogFormat,

    /// Log more: -v what is decided, -vv what is sent again.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,

    /// Show neither progress nor notes, only warnings and the result.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
}

/// Format of progress and logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON document per line.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a commented mongorekey.toml, asking where a terminal is attached.
    Init(InitArgs),
    /// Check connection, server, privileges, disk, oplog, indexes and key API.
    ///
    /// Touches nothing but one probe call to the key API. Says what to do about
    /// each line that fails and exits with 3 if any does.
    Check(BackfillTargetArgs),
    /// Create, look at or drop the partial index that finds candidates.
    Index(index::IndexArgs),
    /// Count candidates and distinct keys, and tell how long a backfill takes.
    ///
    /// Reads only. The time is that of the calls at the configured TPS and
    /// `max_calls_per_day`, both non-stop and within the configured windows.
    Plan(PlanArgs),
    /// Fill the new key into every document that lacks it.
    ///
    /// Finds documents whose key and flag are missing, asks the key API once per
    /// distinct legacy key, and writes the key, or a flag where there is none.
    ///
    /// Stop it at any moment (Ctrl-C finishes the calls under way; kill -9 is safe
    /// too) and start the same command again: the documents themselves are the
    /// checkpoint. What the application writes meanwhile is never overwritten.
    Backfill(backfill::BackfillArgs),
    /// Clear flags, so that the next backfill asks again for what had no key.
    ///
    /// The negative answers behind the flags are forgotten too. Only flags that
    /// a backfill has written are cleared, and only where the key is still
    /// missing. Each collection is read once from end to end, because no index
    /// knows the flags. Kill it at any moment and start the same command again.
    Retry(retry::RetryArgs),
    /// Take in, save, count or forget what is known about keys.
    KeyMap(key_map::KeyMapArgs),
    /// Copy the valid documents of a collection to a new one.
    ///
    /// Copies the documents that pass the rules of `[cleanse]` to a new collection
    /// of the same database, with the options and indexes of the source.
    ///
    /// The copy runs by ranges of `_id` in parallel, resumes where it was
    /// interrupted, and never changes the source. What is written to the source
    /// meanwhile is followed by its change stream: at the end the target is as
    /// the source was a moment ago. Started again, the same command catches up
    /// with what was written since; with --follow it keeps doing so.
    Cleanse(cleanse::CleanseArgs),
    /// Let the copy take the place of the collection, on a live database.
    ///
    /// Brings the copy up to date, verifies it where that was not done since, and
    /// lets it take the place of the live collection without losing a write.
    ///
    /// swap: the new collection gets the name, the old one is dropped. keep: the old
    /// one is kept under another name, and `rollback` brings it back. Writes are
    /// held off for a moment, which is measured and printed. Asks first.
    Cutover(cutover::CutoverArgs),
    /// Take a cutover back: the old collection is live again.
    ///
    /// After `cutover --mode swap` the quarantine is put back into the live collection.
    /// After `cutover --mode keep`: brings along what was written since, and
    /// exchanges the names again. Writes are held off for a moment. Asks first.
    Rollback(cutover::RollbackArgs),
    /// Let writes through again when a cutover has died.
    #[command(name = "fence-watchdog", hide = true)]
    FenceWatchdog,
    /// Check that what should be there is there.
    ///
    /// Checks what the jobs of this config left behind: candidates and flags of a
    /// backfill, counts and samples of a cleanse in both directions.
    ///
    /// Without --counts, --sample and --full everything that applies is checked, the
    /// copy by counts and samples. Exits with 1 on any difference; an empty or
    /// missing side is a difference.
    Verify(verify::VerifyArgs),
    /// Show jobs: what they do, how far they are, who runs them.
    Status(status::StatusArgs),
    /// Steer a running job: pause, resume, stop, set tps=20.
    ///
    /// Steers a running backfill, cleanse or full comparison, from any machine that
    /// reaches the database.
    ///
    /// A change takes effect within two seconds and is written down in the job
    /// document, with who made it and when. A pause outlives a restart until it is
    /// ended by `resume`; a setting holds until the job is started with another one.
    Control(control::ControlArgs),
    /// Write the report of a backfill or a cleanse, as HTML and JSON.
    ///
    /// What was done, when, by which rules and with which outcomes, with charts and
    /// a hash that shows changes: self-contained, made to be printed and signed. It
    /// is made from what is stored of the job, at any time. Writes JOB.html and
    /// JOB.json. --check looks whether a report is still what was written.
    Report(report::ReportArgs),
    /// Clear away what a job has left in the state database.
    ///
    /// Lists first what would go: the job document, ranges, marks and lists of the
    /// job. Refuses while the job runs. Collections with your documents (the old
    /// collection of a cutover, a quarantine) go only with --drop-old-collection,
    /// the key map never.
    Cleanup(cleanup::CleanupArgs),
    /// Run a rehearsal key API on this machine.
    #[cfg(feature = "mock")]
    MockApi(mock_api::MockApiArgs),
}

impl Command {
    /// The command's name, as in results.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Init(_) => "init",
            Self::Check(_) => "check",
            Self::Index(_) => "index",
            Self::Plan(_) => "plan",
            Self::Backfill(_) => "backfill",
            Self::Retry(_) => "retry",
            Self::KeyMap(_) => "key-map",
            Self::Cleanse(_) => "cleanse",
            Self::Cutover(_) => "cutover",
            Self::Rollback(_) => "rollback",
            Self::FenceWatchdog => "fence-watchdog",
            Self::Verify(_) => "verify",
            Self::Status(_) => "status",
            Self::Control(_) => "control",
            Self::Report(_) => "report",
            Self::Cleanup(_) => "cleanup",
            #[cfg(feature = "mock")]
            Self::MockApi(_) => "mock-api",
        }
    }

    /// The targets and the API that options describe.
    pub fn target_options(&self) -> Option<&BackfillTargetArgs> {
        match self {
            Self::Check(args) => Some(args),
            Self::Index(args) => Some(args.targets()),
            Self::Plan(args) => Some(&args.targets),
            Self::Backfill(args) => Some(&args.targets),
            Self::Retry(args) => Some(&args.targets),
            Self::Verify(args) => Some(&args.targets),
            _ => None,
        }
    }

    /// The key API that options describe.
    fn api_url(&self) -> Option<String> {
        match self {
            Self::KeyMap(args) => args.api_url.clone(),
            _ => self.target_options().and_then(|targets| targets.api_url.clone()),
        }
    }
}

/// Options of `init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Overwrite the file if it exists.
    #[arg(long)]
    pub force: bool,
}

/// Options of `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Calls per second, instead of the configured ceiling.
    #[arg(long, value_name = "N")]
    pub tps: Option<crate::config::values::Tps>,
    /// Window of the day such as 01:00-06:00, instead of the configured ones; repeatable.
    #[arg(long = "window", value_name = "FROM-TO")]
    pub windows: Vec<crate::throttle::window::Window>,
    /// Time zone of the windows, such as Asia/Seoul.
    #[arg(long, value_name = "ZONE")]
    pub time_zone: Option<crate::throttle::window::TimeZoneName>,
    /// Tell the TPS that is needed to finish by then, such as 2026-12-24T06:00.
    ///
    /// A date alone means its beginning. Dates and times are those of the time
    /// zone of the windows unless an offset follows, as in 2026-12-24T06:00:00Z.
    #[arg(long, value_name = "WHEN")]
    pub deadline: Option<crate::throttle::deadline::Deadline>,
    /// What to fill.
    #[command(flatten)]
    pub targets: BackfillTargetArgs,
}

/// Options that describe what to fill, for use without a config file.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "What to fill (instead of the config)")]
pub struct BackfillTargetArgs {
    /// One target of the config only, by its name.
    #[arg(long, value_name = "NAME")]
    pub target: Option<String>,
    /// Collection to fill, as database.collection; replaces the configured targets.
    #[arg(long, value_name = "NAMESPACE", conflicts_with = "target")]
    pub collection: Option<Namespace>,
    /// Field with the legacy key; dotted paths allowed [default: legacyKey].
    #[arg(long, value_name = "PATH")]
    pub legacy_field: Option<FieldPath>,
    /// Field that receives the new key [default: newKey].
    #[arg(long, value_name = "PATH")]
    pub key_field: Option<FieldPath>,
    /// Field that receives the flag of documents without a new key [default: newKeyFlag].
    #[arg(long, value_name = "PATH")]
    pub flag_field: Option<FieldPath>,
    /// Address of the key API, with {key} for the percent-encoded legacy key.
    #[arg(long, value_name = "URL")]
    pub api_url: Option<String>,
}

impl Cli {
    /// What the options say that concerns the configuration.
    pub fn overrides(&self) -> Overrides {
        let targets = self.command.target_options().cloned().unwrap_or_default();
        Overrides {
            config: self.global.config.clone(),
            uri: self.global.uri.as_ref().map(Secret::new),
            api_url: self.command.api_url(),
            target: TargetOptions {
                collection: targets.collection,
                legacy_field: targets.legacy_field,
                key_field: targets.key_field,
                flag_field: targets.flag_field,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn valid_lines_parse_and_invalid_ones_do_not() {
        let valid = [
            "check",
            "index create",
            "index status --target users",
            "plan --deadline 2026-12-24T06:00",
            "plan --tps 0.5 --window 22:00-06:00 --time-zone Asia/Seoul",
            "backfill --tps 10 --chunk 1000 --concurrency auto --window 01:00-06:00 --window 12:00-13:00",
            "backfill --collection app.users --legacy-field a.b --api-url http://h/{key} --output json",
            "--output json cleanse --to users_v2 --dry-run",
            "cutover --mode keep --fence apply-ops --max-pause 200ms --yes",
            "cutover --abort",
            "rollback --discard-writes-since-cutover --yes",
            "verify --counts --sample 1000",
            "retry --reason not_found --job j --target users --yes",
            "key-map import - --format jsonl --rejects bad.jsonl --dry-run",
            "key-map export keys.csv --outcome not_found --api-url http://h/{key}",
            "key-map drop --yes",
            "status some-job",
            "status some-job --failed --file failed.jsonl",
            "control some-job pause",
            "control some-job set tps=0.5 chunk=10",
            "control some-job set documents-per-second=2000",
            "cleanup some-job --yes --drop-old-collection",
            "report some-job --to signed.html",
            "report --check signed.json",
            "verify --full --report signed.html",
            "cleanse --to users_v2 --method out --documents-per-second 1000",
            "backfill --canary 100 --yes",
            #[cfg(feature = "mock")]
            "mock-api --listen 127.0.0.1:0",
        ];
        for line in valid {
            let arguments = std::iter::once("mongorekey").chain(line.split(' '));
            assert!(Cli::try_parse_from(arguments).is_ok(), "{line}");
        }
        let invalid = [
            "",
            "backfill --tps 0",
            "backfill --tps -1",
            "backfill --window 1-2",
            "plan --deadline tomorrow",
            "backfill --concurrency 0",
            "backfill --collection users",
            "backfill --collection app.users --key-field $x",
            "backfill --target a --collection app.b",
            "index",
            "cutover --mode move",
            "cutover --abort --feed-back",
            "verify --sample 0",
            "control some-job",
            "control some-job set",
            "control some-job set tps=0",
            "report",
            "report some-job --check signed.json",
            "cleanup",
            "cleanse --method fast",
            "status --failed",
            "backfill --canary 0",
            "retry",
            "retry --reason timeout",
            "key-map",
            "key-map import",
            "key-map import a.csv --format xml",
            "--output xml check",
            "-v -q check",
        ];
        for line in invalid {
            let arguments = std::iter::once("mongorekey").chain(line.split_whitespace());
            assert!(Cli::try_parse_from(arguments).is_err(), "{line}");
        }
    }
}
