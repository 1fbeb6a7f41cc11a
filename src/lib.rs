//! Give a live MongoDB collection a new key, or a clean copy of itself.
//!
//! The way of the data is the order of the modules: what was typed ([`cli`]),
//! what was decided ([`config`]), what is said to the reader ([`error`],
//! [`event`], [`report`]), the doors to the outside ([`mongo`], [`key_api`]),
//! what slows down ([`throttle`]), what is remembered ([`key_map`], [`job`]) and
//! the commands themselves ([`backfill`], [`cleanse`], [`verify`]).

pub mod backfill;
pub mod cleanse;
pub mod cli;
pub mod command;
pub mod config;
pub mod cutover;
pub mod error;
pub mod event;
pub mod evidence;
pub mod job;
pub mod key_api;
pub mod key_map;
pub mod legacy_key;
pub mod mongo;
pub mod report;
pub mod throttle;

pub mod verify;

mod clock;
mod command_line;
mod crash;
mod dispatch;
mod logging;
mod process_title;
mod signals;

use std::ffi::OsString;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use config::Settings;
use event::Events;
use mongo::Mongo;

/// What every command that touches the database works with.
#[derive(Debug, Clone)]
pub struct Context {
    /// The connection.
    pub mongo: Mongo,
    /// The configuration.
    pub settings: Arc<Settings>,
    /// Where progress and warnings go.
    pub events: Events,
    /// Cancelled by the first signal: finish what is begun, save, end.
    pub stop: CancellationToken,
    /// The signal that was received.
    signal: Arc<signals::Received>,
}

impl Context {
    /// Does something that a signal may cut short at any moment.
    async fn unless_interrupted<T>(&self, work: impl Future<Output = error::Result<T>>) -> error::Result<T> {
        tokio::select! {
            result = work => result,
            () = self.stop.cancelled() => {
                Err(self.interrupted("interrupted before it was done"))
            }
        }
    }

    /// The same for one run, which may be ended without ending the process.
    fn of_one_run(&self) -> Self {
        Self { stop: self.stop.child_token(), ..self.clone() }
    }

    /// Ends a run as the first signal does, because an operator asked for that.
    fn stop_by_control(&self) {
        self.signal.ask_by_control();
        self.stop.cancel();
    }

    /// The error of a run that a signal or an operator ended; the message begins
    /// with `interrupted`.
    fn interrupted(&self, message: &str) -> error::Error {
        let message = match message.strip_prefix("interrupted") {
            Some(rest) if self.signal.is_by_control() => format!("stopped by live control{rest}"),
            _ => message.to_owned(),
        };
        error::Error::new(error::Class::Interrupted(self.signal.number()), message)
    }
}

/// Runs the program with the given arguments; returns its exit code.
pub fn run(arguments: Vec<OsString>) -> u8 {
    process_title::hide_secrets(&arguments);
    let cli = match dispatch::parse(&arguments) {
        Ok(cli) => cli,
        Err(exit) => return exit,
    };
    logging::start(&cli.global);
    // One provider for the driver and the HTTP client; an earlier one stays.
    let _earlier = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let error = error::Error::stopped(format!("the runtime can't be started: {error}"));
            return report::outcome::Outcome::from_error(cli.command.name(), None, error)
                .print(cli.global.output, cli.global.log_format);
        }
    };
    let (format, log) = (cli.global.output, cli.global.log_format);
    let outcome = runtime.block_on(dispatch::execute(cli));
    let exit = outcome.print(format, log);
    runtime.shutdown_background();
    exit
}
