//! `control`

use clap::{Args, Subcommand};

use crate::job::control::Change;

/// Options of `control`.
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
    /// Make no calls, or copy no further range and apply no change, until `resume`.
    Pause,
    /// Go on.
    Resume,
    /// Finish what is under way, save, end.
    Stop,
    /// Change settings: tps=20, chunk=500, concurrency=auto of a backfill,
    /// documents-per-second=2000 of a cleanse.
    Set {
        /// One or more of tps=N, chunk=N, concurrency=auto|N, documents-per-second=N (0: no limit).
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
