//! `key-map import`: a file is read beside the database, batch by batch.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Write as _};
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{open, result};
use crate::Context;
use crate::cli::key_map::ImportArgs;
use crate::error::{Error, Result};
use crate::event::Progress;
use crate::key_map::dump::{self, Format, Problem, Row, Rules};
use crate::key_map::import::{Fate, Import, Manner, Numbered};
use crate::report::outcome::Outcome;

/// Rows per batch.
const BATCH: usize = 1000;
/// Batches read ahead.
const BATCHES_AHEAD: usize = 2;
/// Bad rows that the result shows one by one.
const SHOWN: usize = 10;

/// Runs the command.
///
/// # Errors
/// Usage errors, before anything is touched; a stop where the file can't be
/// read on or the key map can't be written.
pub(super) async fn run(context: &Context, args: &ImportArgs) -> Result<Outcome> {
    let start = Instant::now();
    let name = shown_name(&args.file);
    let key_map = open(context, &format!("import {name}"))?;
    let rules = Rules {
        legacy_column: args.legacy_column.clone(),
        key_column: args.key_column.clone(),
        key_pattern: context.settings.key_api()?.key_pattern.clone(),
    };
    check_rejects(args)?;
    let mut batches = read_ahead(&args.file, format(args)?, rules)?;
    // A header that is refused comes first, before anything is touched.
    let mut next = batches.recv().await.transpose()?;
    if !args.dry_run {
        key_map.prepare(&context.mongo).await?;
    }
    let mut tally = Tally::new(args.rejects.as_deref())?;
    let mut import = Import::new(key_map.clone(), Manner { dry_run: args.dry_run, replace: args.replace });
    while let Some(rows) = next {
        tally.rows += u64::try_from(rows.len()).unwrap_or(0);
        take(&mut import, rows, &mut tally).await?;
        context.events.progress(Progress {
            phase: "import".into(),
            unit: "rows",
            done: tally.rows,
            total: None,
            limited_by: None,
            detail: format!("{} imported, {} bad", tally.imported, tally.bad()),
        });
        next = batches.recv().await.transpose()?;
    }
    tally.finish()?;
    if import.has_lost_track() {
        context.events.warn("the file is too long for a dry run to compare all its lines with each other");
    }
    let mut json = result("import", &key_map);
    json["file"] = json!(name);
    json["dry_run"] = json!(args.dry_run);
    tally.describe(&mut json);
    json["rejects"] = json!(args.rejects.as_ref().map(|path| path.display().to_string()));
    json["elapsed_seconds"] = json!(start.elapsed().as_secs_f64());
    let text = tally.text(&name, args);
    Ok(if tally.bad() > 0 { Outcome::not_reached(json, text) } else { Outcome::reached(json, text) })
}

fn shown_name(path: &Path) -> String {
    if path == Path::new("-") {
        return "stdin".into();
    }
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn format(args: &ImportArgs) -> Result<Format> {
    args.format.or_else(|| Format::of(&args.file)).ok_or_else(|| {
        Error::usage(format!("the format of {} is not clear from its name", args.file.display()))
            .hint("give --format csv or --format jsonl")
    })
}

/// Reads the file on a thread of its own. Nobody waits for it once the batches
/// are no longer wanted.
fn read_ahead(path: &Path, format: Format, rules: Rules) -> Result<mpsc::Receiver<Result<Vec<Row>>>> {
    let input: Box<dyn Read + Send> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        let file = File::open(path)
            .map_err(|error| Error::usage(format!("{} can't be read: {error}", path.display())))?;
        Box::new(file)
    };
    let (sender, receiver) = mpsc::channel(BATCHES_AHEAD);
    tokio::task::spawn_blocking(move || {
        let rows = match dump::read(input, format, rules) {
            Ok(rows) => rows,
            Err(error) => return drop(sender.blocking_send(Err(error))),
        };
        let mut batch = Vec::with_capacity(BATCH);
        for row in rows {
            match row {
                Ok(row) => batch.push(row),
                Err(error) => {
                    // What was read before is taken in.
                    return drop(
                        sender.blocking_send(Ok(batch)).and_then(|()| sender.blocking_send(Err(error))),
                    );
                }
            }
            if batch.len() == BATCH && sender.blocking_send(Ok(std::mem::take(&mut batch))).is_err() {
                return;
            }
        }
        drop(sender.blocking_send(Ok(batch)));
    });
    Ok(receiver)
}

/// The file of bad rows is made anew, which must not be the file that is read.
fn check_rejects(args: &ImportArgs) -> Result<()> {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    match args.rejects.as_deref().map(real) {
        Some(Some(rejects)) if real(&args.file) == Some(rejects.clone()) => {
            Err(Error::usage("--rejects names the file that is to be imported"))
        }
        _ => Ok(()),
    }
}

async fn take(import: &mut Import, rows: Vec<Row>, tally: &mut Tally) -> Result<()> {
    let mut records = Vec::with_capacity(rows.len());
    for row in rows {
        match row.record {
            Ok(record) => records.push(Numbered { line: row.line, record }),
            Err(problem) => tally.refuse(row.line, problem)?,
        }
    }
    let fates = import.take(&records).await?;
    for (row, fate) in records.into_iter().zip(fates) {
        let (reason, message) = match fate {
            Fate::Imported => {
                tally.imported += 1;
                continue;
            }
            Fate::Known => {
                tally.known += 1;
                continue;
            }
            Fate::Replaced => {
                tally.replaced += 1;
                continue;
            }
            Fate::Contradicted(message) => ("contradiction", message),
            Fate::Conflict(message) => ("conflict", message),
            Fate::Shared(message) => ("shared_new_key", message),
        };
        let answer = &row.record.answer;
        let shown = json!({
            "legacyKey": row.record.legacy_key,
            "newKey": answer.new_key(),
            "outcome": answer.outcome().as_str(),
        });
        tally.refuse(row.line, Problem { reason, message, row: shown })?;
    }
    Ok(())
}

/// What became of the rows.
struct Tally {
    rows: u64,
    imported: u64,
    known: u64,
    replaced: u64,
    bad_by: BTreeMap<&'static str, u64>,
    first: Vec<(u64, Problem)>,
    rejects: Option<BufWriter<File>>,
}

impl Tally {
    fn new(rejects: Option<&Path>) -> Result<Self> {
        let rejects = rejects
            .map(|path| {
                File::create(path)
                    .map(BufWriter::new)
                    .map_err(|error| Error::usage(format!("{} can't be written: {error}", path.display())))
            })
            .transpose()?;
        Ok(Self {
            rows: 0,
            imported: 0,
            known: 0,
            replaced: 0,
            bad_by: BTreeMap::new(),
            first: Vec::new(),
            rejects,
        })
    }

    fn bad(&self) -> u64 {
        self.bad_by.values().sum()
    }

    fn refuse(&mut self, line: u64, problem: Problem) -> Result<()> {
        *self.bad_by.entry(problem.reason).or_default() += 1;
        if let Some(file) = &mut self.rejects {
            writeln!(file, "{}", problem_json(line, &problem)).map_err(cannot_reject)?;
        }
        if self.first.len() < SHOWN {
            self.first.push((line, problem));
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.rejects.as_mut().map_or(Ok(()), |file| file.flush().map_err(cannot_reject))
    }

    fn describe(&self, json: &mut Value) {
        json["rows"] = json!(self.rows);
        json["imported"] = json!(self.imported);
        json["already_known"] = json!(self.known);
        json["replaced"] = json!(self.replaced);
        json["bad"] = json!(self.bad());
        json["bad_by"] = json!(self.bad_by);
        json["bad_rows"] = self.first.iter().map(|(line, problem)| problem_json(*line, problem)).collect();
    }

    fn text(&self, name: &str, args: &ImportArgs) -> String {
        let head = if args.dry_run { "dry run, nothing was written: " } else { "" };
        let mut lines = vec![
            format!("{head}{} rows of {name}", self.rows),
            format!("  imported      {:>12}", self.imported),
            format!("  already known {:>12}", self.known),
        ];
        if self.replaced > 0 {
            lines.push(format!("  replaced      {:>12}", self.replaced));
        }
        if self.bad() == 0 {
            return lines.join("\n");
        }
        let reasons: Vec<String> =
            self.bad_by.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        lines.push(format!("  bad           {:>12}  ({})", self.bad(), reasons.join(", ")));
        for (line, problem) in &self.first {
            lines.push(format!("line {line}: {}: {}", problem.reason, problem.message));
        }
        let more = self.bad().saturating_sub(u64::try_from(self.first.len()).unwrap_or(0));
        match (&args.rejects, more) {
            (Some(path), _) => lines.push(format!("all of them are in {}", path.display())),
            (None, 1..) => lines.push(format!("and {more} more; --rejects FILE keeps them all")),
            (None, 0) => {}
        }
        lines.join("\n")
    }
}

fn problem_json(line: u64, problem: &Problem) -> Value {
    json!({"line": line, "reason": problem.reason, "message": problem.message, "row": problem.row})
}

fn cannot_reject(error: std::io::Error) -> Error {
    Error::stopped(format!("the file of bad rows can't be written: {error}"))
}
