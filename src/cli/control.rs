//! `control`

use clap::{Args, Subcommand};

use crate::job::control::Change;

/// Steers a running backfill, from any machine that reaches the database.
///
/// A change takes effect within two seconds and is written down in the job
/// document, with who made it and when. A pause outlives a restart until it is
/// ended by `resume`; a setting holds until the job is started with another one.
#[derive(Debug, Args)]
pub struct ControlArgs {
    /// Name of the job, as `mongorekey status` shows it.
    pub job: String,
    /// What to do.
    #[command(subcommand)]
    pub action: ControlAction,
}

/// What to do with a job.
#[derive(Debug, Clone, Subcommand)]
pub enum ControlAction {
    /// Make no calls until `resume`.
    Pause,
    /// Go on.
    Resume,
    /// Finish what is under way, save, end.
    Stop,
    /// Change settings: tps=20, chunk=500, concurrency=auto.
    Set {
        /// One or more of tps=N, chunk=N, concurrency=auto|N.
        #[arg(required = true, value_name = "NAME=VALUE", value_parser = Change::parse_setting)]
        settings: Vec<Change>,
    },
}

impl ControlArgs {
    /// The changes asked for.
    pub fn changes(&self) -> Vec<Change> {
        match &self.action {
            ControlAction::Pause => vec![Change::Pause],
            ControlAction::Resume => vec![Change::Resume],
            ControlAction::Stop => vec![Change::Stop],
            ControlAction::Set { settings } => settings.clone(),
        }
    }
}
