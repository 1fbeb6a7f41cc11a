//! `key-map import|export|stats|drop`

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::key_map::StoredOutcome;
use crate::key_map::dump::Format;

/// Options of `key-map`.
#[derive(Debug, Args)]
pub struct KeyMapArgs {
    /// What to do with the key map.
    #[command(subcommand)]
    pub action: KeyMapAction,
    /// Address of the key API, whose key map it is, instead of the configured one.
    #[arg(long, global = true, value_name = "URL")]
    pub api_url: Option<String>,
}

/// What to do with the key map.
#[derive(Debug, Subcommand)]
pub enum KeyMapAction {
    /// Take in a dump of keys, so that no call is made for them.
    ///
    /// A CSV file begins with a line that names its columns: legacyKey and
    /// newKey (or legacy_key and new_key), and, where there is one, outcome with
    /// found, not_found or rejected. JSON lines have the same names. Answers
    /// that are known already stay; a different one is a conflict. Bad rows are
    /// told with their lines, all others are taken in; exit code 1 where any row
    /// was bad. Importing a file twice changes nothing.
    Import(ImportArgs),
    /// Save the answers as CSV or JSON lines.
    Export(ExportArgs),
    /// Count the answers by outcome and job, and new keys that stand for several legacy keys.
    Stats,
    /// Forget all answers of this API: they will be asked for again.
    Drop(DropArgs),
}

/// Options of `key-map import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The file; `-` is stdin.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Format of the file [default: by its extension].
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// Column or field with the legacy key.
    #[arg(long, value_name = "NAME")]
    pub legacy_column: Option<String>,
    /// Column or field with the new key.
    #[arg(long, value_name = "NAME")]
    pub key_column: Option<String>,
    /// Write every bad row to this file, as JSON lines.
    #[arg(long, value_name = "FILE")]
    pub rejects: Option<PathBuf>,
    /// Replace what is known where the file says something else.
    #[arg(long)]
    pub replace: bool,
    /// Check the file and compare it with what is known; write nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// Options of `key-map export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The file, replaced when everything is written [default: stdout].
    #[arg(value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Format of the file [default: by its extension, CSV on stdout].
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// Answers of this kind only.
    #[arg(long, value_enum, value_name = "OUTCOME")]
    pub outcome: Option<StoredOutcome>,
    /// Held answers, which no guard has judged yet, too; they can't be imported.
    #[arg(long)]
    pub held: bool,
}

/// Options of `key-map drop`.
#[derive(Debug, Args)]
pub struct DropArgs {
    /// Don't ask.
    #[arg(long)]
    pub yes: bool,
}
