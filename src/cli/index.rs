//! `index create|status|drop`

use clap::{Args, Subcommand};

use super::BackfillTargetArgs;

/// Options of `index`.
#[derive(Debug, Args)]
pub struct IndexArgs {
    /// What to do with the index.
    #[command(subcommand)]
    pub action: IndexAction,
}

/// What to do with the index.
#[derive(Debug, Subcommand)]
pub enum IndexAction {
    /// Build the index of every target and prove by explain that it is used.
    ///
    /// The index holds exactly the documents that lack both key and flag, so
    /// its size is the work that is left. Building it reads the collection
    /// once; reads and writes go on meanwhile.
    Create(BackfillTargetArgs),
    /// Show the index: definition, size, candidates left, explain.
    Status(BackfillTargetArgs),
    /// Drop the index, once nothing is left to fill.
    Drop(BackfillTargetArgs),
}

impl IndexArgs {
    /// The targets that the options describe.
    pub fn targets(&self) -> &BackfillTargetArgs {
        match &self.action {
            IndexAction::Create(targets) | IndexAction::Status(targets) | IndexAction::Drop(targets) => {
                targets
            }
        }
    }
}
