//! The command lines that documents show, and what the program's own parser makes of them.

use std::collections::BTreeSet;

use clap::{Command, CommandFactory, Parser};
use mongorekey::cli::Cli;

use super::markdown::{CodeBlock, Place};

const PROGRAM: &str = "mongorekey";

/// A command line of ours in a console block.
pub struct Example {
    pub place: Place,
    line: String,
}

impl Example {
    /// The lines that a reader types and that call the program.
    pub fn all_in(block: &CodeBlock) -> Vec<Self> {
        let mut examples = Vec::new();
        let mut lines = block.text.lines().enumerate();
        while let Some((number, line)) = lines.next() {
            let Some(typed) = line.strip_prefix("$ ").or((block.language == "sh").then_some(line)) else {
                continue;
            };
            let mut typed = typed.to_owned();
            while let Some(begun) = typed.strip_suffix('\\') {
                let next = lines.next().map_or("", |(_, line)| line);
                typed = format!("{begun}{next}");
            }
            if is_ours(&typed) {
                let place = Place { line: block.place.line + number, ..block.place.clone() };
                examples.push(Self { place, line: typed });
            }
        }
        examples
    }

    /// Lets the parser judge it. Nothing is run.
    pub fn parse(&self) -> Result<(), String> {
        let words = words(&self.line);
        match Cli::try_parse_from(words) {
            Ok(_) => Ok(()),
            Err(error) if !error.use_stderr() => Ok(()), // --help and --version
            Err(error) => Err(format!("`{}`: {error}", self.line)),
        }
    }
}

fn is_ours(line: &str) -> bool {
    words(line).first().is_some_and(|word| word == PROGRAM)
}

/// The words of the command, as a shell splits them: without variables before it, comments after it,
/// and what it is piped or redirected to.
fn words(line: &str) -> Vec<String> {
    let words = shlex::split(line).unwrap_or_default();
    let is_variable = |word: &String| word.split_once('=').is_some_and(|(name, _)| is_name(name));
    let ends = |word: &String| matches!(word.as_str(), "|" | ">" | ">>" | "<" | "2>" | "&&" | ";" | "&");
    words.into_iter().skip_while(is_variable).take_while(|word| !ends(word)).collect()
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|letter| letter.is_ascii_uppercase() || letter == '_')
}

/// All commands that an operator can type, with those below them as `index create`.
pub fn subcommands() -> BTreeSet<String> {
    let cli = Cli::command();
    let mut names = BTreeSet::new();
    for command in cli.get_subcommands().filter(|command| !command.is_hide_set()) {
        let below: Vec<&Command> = command.get_subcommands().collect();
        if below.is_empty() {
            names.insert(command.get_name().to_owned());
        }
        names.extend(below.iter().map(|inner| format!("{} {}", command.get_name(), inner.get_name())));
    }
    names
}

/// Whether a command takes an option such as `--tps`.
pub fn has_option(command: &str, option: &str) -> bool {
    let mut cli = Cli::command();
    // So that options of all commands are known to each of them.
    cli.build();
    let found = command.split(' ').try_fold(&cli, |found, name| found.find_subcommand(name));
    let Some(found) = found else { return false };
    found
        .get_arguments()
        .any(|argument| argument.get_long().is_some_and(|long| format!("--{long}") == option))
}

/// The commands that a cell of the table names: `index create|status|drop` are three.
pub fn typed_in(cell: &str) -> BTreeSet<String> {
    code_spans(cell).iter().flat_map(|span| commands_of(span)).collect()
}

/// The options that a cell names, with the command that each belongs to.
pub fn options_in(cell: &str) -> Vec<(String, String)> {
    let mut options = Vec::new();
    let mut command = String::new();
    for span in code_spans(cell) {
        // `--join` beside `backfill --workers N` belongs to the same command.
        command = commands_of(&span).into_iter().next().unwrap_or(command);
        let long = span.split(|letter: char| letter.is_whitespace() || "[]|".contains(letter));
        options.extend(
            long.filter(|word| word.starts_with("--")).map(|word| (command.clone(), word.to_owned())),
        );
    }
    options
}

fn commands_of(span: &str) -> Vec<String> {
    let mut words = span.split_whitespace();
    let Some(first) = words.next().filter(|word| !word.starts_with('-')) else { return Vec::new() };
    let cli = Cli::command();
    let found = cli.find_subcommand(first);
    // What it works on may stand before the subcommand: `control JOB pause`.
    let is_below = |word: &&str| {
        word.split('|').any(|name| found.is_some_and(|found| found.find_subcommand(name).is_some()))
    };
    match words.find(is_below) {
        Some(second) => second.split('|').map(|second| format!("{first} {second}")).collect(),
        None => vec![first.to_owned()],
    }
}

fn code_spans(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}
