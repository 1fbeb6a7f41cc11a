//! `key-map export`: page by page, and a file only once it is whole.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{open, result};
use crate::Context;
use crate::cli::key_map::ExportArgs;
use crate::error::{Error, Result};
use crate::event::{Events, Progress};
use crate::key_map::KeyMap;
use crate::key_map::dump::{Format, Writer};
use crate::key_map::upkeep::Selection;
use crate::report::outcome::{Format as OutputFormat, Outcome};
use crate::report::terminal;

/// Runs the command.
///
/// # Errors
/// A usage error where the file can't be written, a stop where the key map
/// can't be read.
pub(super) async fn run(context: &Context, args: &ExportArgs, output: OutputFormat) -> Result<Outcome> {
    let key_map = open(context, "export")?;
    let selection = Selection { outcome: args.outcome, with_held: args.held };
    let Some(path) = &args.file else {
        return to_stdout(context, &key_map, selection, args, output).await;
    };
    let format = args.format.or_else(|| Format::of(path)).ok_or_else(|| {
        Error::usage(format!("the format of {} is not clear from its name", path.display()))
            .hint("give --format csv or --format jsonl")
    })?;
    let unfinished = Unfinished::create(path)?;
    let file = unfinished.open()?;
    let pages = Pages { key_map: &key_map, selection, events: &context.events };
    let (written, file) = pages.write(BufWriter::new(file), format).await?;
    let file = file.into_inner().map_err(|error| cannot_write(path, error.error()))?;
    unfinished.keep(&file, path)?;
    let mut json = result("export", &key_map);
    json["file"] = json!(path.display().to_string());
    json["answers"] = json!(written);
    Ok(Outcome::reached(json, format!("{written} answers written to {}", path.display())))
}

async fn to_stdout(
    context: &Context,
    key_map: &KeyMap,
    selection: Selection,
    args: &ExportArgs,
    output: OutputFormat,
) -> Result<Outcome> {
    if output == OutputFormat::Json {
        return Err(Error::usage("with --output json stdout takes the result, not the dump")
            .hint("name a file to export to"));
    }
    let pages = Pages { key_map, selection, events: &context.events };
    let (written, mut stdout) =
        pages.write(terminal::data_output(), args.format.unwrap_or(Format::Csv)).await?;
    stdout.flush().map_err(|error| cannot_write(Path::new("stdout"), &error))?;
    context.events.note(format!("{written} answers written"));
    Ok(Outcome::reached(result("export", key_map), String::new()))
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Error {
    Error::stopped(format!("{} can't be written: {error}", path.display()))
}

/// The selected answers, streamed.
struct Pages<'a> {
    key_map: &'a KeyMap,
    selection: Selection,
    events: &'a Events,
}

impl Pages<'_> {
    async fn write<W: Write>(&self, output: W, format: Format) -> Result<(u64, W)> {
        let failed = |error: std::io::Error| Error::stopped(format!("the dump can't be written: {error}"));
        let total = self.key_map.count(self.selection).await?;
        let with_held = self.selection.with_held;
        let mut writer = Writer::new(output, format, with_held).map_err(failed)?;
        let (mut last, mut written) = (None::<String>, 0);
        loop {
            let page = self.key_map.page(last.as_deref(), self.selection).await?;
            let Some((end, _)) = page.last() else { break };
            last = Some(end.clone());
            // A slow reader of stdout must not hold up the other tasks.
            tokio::task::block_in_place(|| {
                page.iter().try_for_each(|(key, known)| writer.write(key, known, with_held))
            })
            .map_err(failed)?;
            written += u64::try_from(page.len()).unwrap_or(0);
            self.events.progress(Progress {
                phase: "export".into(),
                unit: "answers",
                done: written,
                total: Some(total.max(written)),
                limited_by: None,
                detail: String::new(),
            });
        }
        Ok((written, writer.finish().map_err(failed)?))
    }
}

/// A file beside the one that is wanted, removed unless it is kept.
struct Unfinished {
    path: PathBuf,
}

impl Unfinished {
    fn create(wanted: &Path) -> Result<Self> {
        let name = wanted
            .file_name()
            .ok_or_else(|| Error::usage(format!("{} is no name of a file", wanted.display())))?;
        if wanted.exists() && !wanted.is_file() {
            return Err(Error::usage(format!("{} is no file that could be replaced", wanted.display())));
        }
        let mut unfinished = name.to_owned();
        unfinished.push(format!(".{}.unfinished", std::process::id()));
        Ok(Self { path: wanted.with_file_name(unfinished) })
    }

    fn open(&self) -> Result<File> {
        File::create(&self.path)
            .map_err(|error| Error::usage(format!("{} can't be written: {error}", self.path.display())))
    }

    /// Makes the file durable and gives it the wanted name.
    fn keep(&self, file: &File, wanted: &Path) -> Result<()> {
        file.sync_all()
            .and_then(|()| std::fs::rename(&self.path, wanted))
            .map_err(|error| cannot_write(wanted, &error))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Gone already where it was kept.
        let _gone = std::fs::remove_file(&self.path);
    }
}
