//! From a parsed command line to a finished command.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser as _};
use tokio_util::sync::CancellationToken;

use crate::cli::index::IndexAction;
use crate::cli::report::ReportArgs;
use crate::cli::{Cli, Command, Global, LogFormat};
use crate::config::Settings;
use crate::error::{Class, Error, Result};
use crate::event::Events;
use crate::evidence::files::Files;
use crate::mongo::Mongo;
use crate::report::outcome::{Format, Outcome};
use crate::report::progress::{self, Style};
use crate::signals::{Drain, Received};
use crate::{Context, backfill, cleanse, command, cutover, evidence, signals};

/// How long closing the connections may take.
const CLOSING: Duration = Duration::from_secs(1);
/// How long telling the last events may take.
const REPORTING: Duration = Duration::from_millis(500);

/// Parses the command line.
///
/// # Errors
/// The exit code, after help, version or the error was printed; with
/// `--output json` an error is a JSON document too.
pub(crate) fn parse(arguments: &[OsString]) -> std::result::Result<Cli, u8> {
    Cli::try_parse_from(arguments).map_err(|error| {
        let is_help = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
        let (result, log) = (wants_json(arguments, "--output"), wants_json(arguments, "--log-format"));
        if is_help || !(result || log) {
            let _closed = error.print();
            return if is_help { 0 } else { 2 };
        }
        let rendered = error.to_string();
        let message = rendered.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        let error = Error::usage(message).hint("see `mongorekey --help`");
        let format = if result { Format::Json } else { Format::Text };
        let log = if log { LogFormat::Json } else { LogFormat::Text };
        Outcome::from_error(&typed_command(arguments), None, error).print(format, log)
    })
}

/// The command that was typed, as far as it can be told.
fn typed_command(arguments: &[OsString]) -> String {
    let known: Vec<String> =
        Cli::command().get_subcommands().map(|command| command.get_name().to_owned()).collect();
    let words = arguments.iter().skip(1).map(|word| word.to_string_lossy().into_owned());
    words.into_iter().find(|word| known.contains(word)).unwrap_or_default()
}

/// Whether an option of what could not be parsed asks for JSON.
fn wants_json(arguments: &[OsString], option: &str) -> bool {
    let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
    words.iter().any(|word| word.strip_prefix(option) == Some("=json"))
        || words.windows(2).any(|pair| pair == [option, "json"])
}

/// Executes a command, from its configuration to its outcome.
pub(crate) async fn execute(cli: Cli) -> Outcome {
    let (events, queue) = Events::channel();
    let reporter = progress::spawn(queue, style(&cli.global));
    let (name, exchanges) = (cli.command.name(), exchanges_names(&cli.command));
    let (stop, drain) = (CancellationToken::new(), drain_of(&cli.command));
    let signal = signals::watch(stop.clone(), events.clone(), drain);
    let work = execute_with(cli, events.clone(), stop, signal.clone());
    let outcome = tokio::select! {
        biased;
        outcome = work => outcome,
        () = signal.overdue() => Err(given_up(signal.number(), exchanges)),
    };
    let outcome = outcome.unwrap_or_else(|error| Outcome::from_error(name, None, error));
    // The bar must be gone before the result is printed; who does not read it any more
    // must not keep the result from others.
    let end = async {
        events.end().await;
        reporter.await
    };
    if let Ok(Err(error)) = tokio::time::timeout(REPORTING, end).await {
        tracing::warn!(%error, "the reporter failed");
    }
    outcome
}

fn drain_of(command: &Command) -> Drain {
    match command {
        // Writes may be held off that nobody else lets through.
        Command::FenceWatchdog => Drain::Unbounded,
        _ => Drain::Bounded,
    }
}

fn exchanges_names(command: &Command) -> bool {
    matches!(command, Command::Cutover(_) | Command::Rollback(_))
}

/// The error of a run that did not end in time after a signal.
fn given_up(signal: u8, exchanges_names: bool) -> Error {
    let seconds = signals::DRAINING.as_secs();
    if exchanges_names {
        let message = format!("interrupted; what was under way did not end within {seconds} s");
        // It sees the end of this process, and recovers.
        return Error::new(Class::Unknown, message).hint(
            "writes that were held off are let through by the watchdog; `mongorekey status` tells which \
             collection is live",
        );
    }
    let message = format!("interrupted; what was under way did not end within {seconds} s and was given up");
    Error::new(Class::Interrupted(signal), message)
        .hint("the state is kept as it was last saved: start the same command again to go on")
}

fn style(global: &Global) -> Style {
    match (global.quiet, global.log_format) {
        (true, _) => Style::Quiet,
        (false, LogFormat::Text) => Style::Text,
        (false, LogFormat::Json) => Style::Json,
    }
}

async fn execute_with(
    cli: Cli,
    events: Events,
    stop: CancellationToken,
    signal: Arc<Received>,
) -> Result<Outcome> {
    match &cli.command {
        Command::Init(args) => return command::init::run(cli.global.config.as_deref(), args.force),
        #[cfg(feature = "mock")]
        Command::MockApi(args) => return command::mock_api::run(args, &events, stop).await,
        Command::FenceWatchdog => return cutover::watchdog::serve(stop).await,
        Command::Report(ReportArgs { check: Some(file), .. }) => return evidence::recheck(file),
        _ => {}
    }
    if let Some(files) = report_files(&cli.command)? {
        files.check()?;
    }
    let overrides = cli.overrides();
    let settings = Settings::load(&overrides)?;
    let mongo = tokio::select! {
        connected = Mongo::connect(&settings.uri, &settings.state_database) => connected?,
        () = stop.cancelled() => {
            let message = "interrupted before MongoDB answered; nothing was done";
            return Err(Error::new(Class::Interrupted(signal.number()), message));
        }
    };
    // An abort is about just that, and reports it.
    if !matches!(&cli.command, Command::Cutover(args) if args.abort) {
        cutover::recover::lift_orphans(&mongo, &settings, &events).await;
    }
    let context = Context { mongo, settings: Arc::new(settings), events, stop, signal };
    let outcome = run_command(&context, &cli.command, cli.global.output).await;
    // Connections that a stuck server keeps busy must not keep the result from the operator.
    let _late = tokio::time::timeout(CLOSING, context.mongo.close()).await;
    outcome
}

/// The files of the report that a command is to write.
fn report_files(command: &Command) -> Result<Option<Files>> {
    match command {
        Command::Verify(args) => args.report.as_deref().map(Files::named).transpose(),
        Command::Report(args) => evidence::job::files(args),
        _ => Ok(None),
    }
}

async fn run_command(context: &Context, command: &Command, format: Format) -> Result<Outcome> {
    match command {
        Command::Backfill(args) => backfill::run::run(context, &args.options()).await,
        Command::Cleanse(args) => cleanse::run::run(context, args).await,
        Command::Cutover(args) => cutover::run::run(context, args).await,
        Command::Rollback(args) => cutover::rollback::run(context, args).await,
        Command::Verify(args) => evidence::verify::run(context, args).await,
        // These keep nothing that would have to be saved.
        other => context.unless_interrupted(look(context, other, format)).await,
    }
}

/// Commands that are no jobs.
async fn look(context: &Context, command: &Command, format: Format) -> Result<Outcome> {
    match command {
        Command::Check(args) => command::check::run(context, args.target.as_deref()).await,
        Command::Index(args) => {
            let targets = context.settings.targets(args.targets().target.as_deref())?;
            match args.action {
                IndexAction::Create(_) => command::index::create(context, &targets).await,
                IndexAction::Status(_) => command::index::status(context, &targets).await,
                IndexAction::Drop(_) => command::index::drop(context, &targets).await,
            }
        }
        Command::Plan(args) => command::plan::run(context, args).await,
        Command::Status(args) => command::status::run(context, args).await,
        Command::Control(args) => command::control::run(context, args).await,
        Command::Cleanup(args) => command::cleanup::run(context, args).await,
        Command::Report(args) => evidence::job::run(context, args).await,
        Command::KeyMap(args) => command::key_map::run(context, args, format).await,
        Command::Retry(args) => command::retry::run(context, args).await,
        // Handled elsewhere: the first two without a connection, the others as jobs.
        Command::Init(_)
        | Command::MockApi(_)
        | Command::Backfill(_)
        | Command::Cleanse(_)
        | Command::Cutover(_)
        | Command::Rollback(_)
        | Command::FenceWatchdog
        | Command::Verify(_) => Err(Error::stopped("this command was to be handled elsewhere")),
    }
}
