//! The Markdown files of the project: they render as they were meant, and what they tell a reader to
//! type or to configure is accepted by the program.

mod commands;
mod markdown;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use mongorekey::cli::Cli;
use mongorekey::config::load::Source;

use self::commands::{Example, options_in, typed_in};
use self::markdown::{Markdown, Place};

/// Every Markdown file of the repository.
fn documents() -> Vec<Markdown> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["", "docs", "deploy", "crates/mock-api"] {
        let Ok(entries) = std::fs::read_dir(root.join(folder)) else { continue };
        let paths = entries.map(|entry| entry.expect("an entry").path());
        files.extend(paths.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    }
    assert!(files.contains(&root.join("README.md")), "{files:?}");
    files.iter().map(|file| Markdown::read(file, root)).collect()
}

fn readme() -> Markdown {
    documents().into_iter().find(|document| document.name == "README.md").expect("a README")
}

/// Fails with all problems at once: a reader who fixes one wants to know of the others.
#[track_caller]
fn expect_none(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn headings_tables_and_paragraphs_are_intact() {
    let problems: Vec<String> = documents().iter().flat_map(Markdown::broken_structure).collect();
    expect_none(&problems);
}

/// The text that a careless rewrap once made of two headings and a table must be noticed.
#[test]
fn a_rewrapped_document_is_noticed() {
    let broken = [
        ("# A\n\nkept. **Next.** It goes on.", "starts in the middle of a paragraph"),
        ("# A\n\nnever. ## Commands `x` explains", "a heading within a paragraph"),
        ("# A\n\nwords | command | what | | --- | --- | | `init` | writes", "a table within a paragraph"),
        ("# A\n\n| a | b |\n| --- | --- |\n| 1 | 2 | 3 |\n", "a row of 3 cells in a table of 2"),
        ("# A\n\n### B\n", "from level 1 to level 3"),
        ("# A\n\n# B\n", "one heading of level 1, found 2"),
        ("# A\n\n- one. - Two\n", "a list within a paragraph"),
        ("# A\n\n```\nnever closed\n", "a code block that is not closed"),
    ];
    for (text, expected) in broken {
        let problems = Markdown::parse("made-up.md", text).broken_structure();
        assert!(problems.iter().any(|problem| problem.contains(expected)), "{expected}: {problems:?}");
    }
    let intact = "# A\n\n## B\n\n**One.** Two `a | b`.\n\n| a | b |\n| --- | --- |\n| `x\\|y` | 2 |\n";
    expect_none(&Markdown::parse("made-up.md", intact).broken_structure());
}

#[test]
fn links_lead_somewhere() {
    let documents = documents();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut problems = Vec::new();
    for document in &documents {
        for (place, link) in &document.links {
            if let Err(problem) = follow(link, document, &documents, root) {
                problems.push(format!("{place}: the link {link} {problem}"));
            }
        }
    }
    expect_none(&problems);
}

/// Where a link leads: an address, or a file of the repository and a heading in it.
fn follow(link: &str, from: &Markdown, documents: &[Markdown], root: &Path) -> Result<(), String> {
    if let Some(address) = link.strip_prefix("https://") {
        let host = address.split('/').next().unwrap_or_default();
        return if host.contains('.') { Ok(()) } else { Err("names no host".into()) };
    }
    let (file, heading) = link.split_once('#').map_or((link, None), |(file, heading)| (file, Some(heading)));
    let folder = PathBuf::from(&from.name).parent().map(Path::to_owned).unwrap_or_default();
    let file = if file.is_empty() { PathBuf::from(&from.name) } else { folder.join(file) };
    if !root.join(&file).exists() {
        return Err("names a file that does not exist".into());
    }
    let Some(heading) = heading else { return Ok(()) };
    let there = documents.iter().find(|document| Path::new(&document.name) == file);
    match there {
        Some(document) if document.anchors().contains(heading) => Ok(()),
        _ => Err("names a heading that does not exist".into()),
    }
}

#[test]
fn every_subcommand_is_in_the_table_of_commands() {
    let readme = readme();
    let rows = readme.first_column_below("Commands");
    let named: BTreeSet<String> = rows.iter().flat_map(|(_, cell)| typed_in(cell)).collect();
    let missing: Vec<String> = commands::subcommands().difference(&named).cloned().collect();
    assert!(missing.is_empty(), "the table does not name {missing:?}");
}

#[test]
fn the_table_of_commands_names_nothing_that_does_not_exist() {
    let mut problems = Vec::new();
    for (place, cell) in readme().first_column_below("Commands") {
        for command in typed_in(&cell) {
            if !commands::subcommands().contains(&command) {
                problems.push(format!("{place}: there is no command {command}"));
            }
        }
        for (command, option) in options_in(&cell) {
            if !commands::has_option(&command, &option) {
                problems.push(format!("{place}: {command} has no option {option}"));
            }
        }
    }
    expect_none(&problems);
}

#[test]
fn every_toml_block_is_a_config() {
    let environment = |name: &str| Some(format!("value-of-{name}"));
    let mut problems = Vec::new();
    let mut blocks = 0;
    for document in documents() {
        for block in document.code_blocks("toml") {
            blocks += 1;
            let source = Source::from_text(block.place.to_string(), block.text.clone());
            if let Err(error) = source.parse(&environment) {
                problems.push(format!("{}: {error}", block.place));
            }
        }
    }
    assert!(blocks >= 2, "{blocks} blocks were found");
    expect_none(&problems);
}

#[test]
fn every_command_in_a_console_block_is_accepted_by_the_parser() {
    let mut problems = Vec::new();
    let mut parsed = 0;
    for document in documents() {
        for block in document.code_blocks("console").chain(document.code_blocks("sh")) {
            for example in Example::all_in(block) {
                parsed += 1;
                if let Err(problem) = example.parse() {
                    problems.push(format!("{}: {problem}", example.place));
                }
            }
        }
    }
    assert!(parsed >= 10, "{parsed} command lines were found");
    expect_none(&problems);
}

/// A line that the parser refuses must be noticed, and one with all that a shell allows must not.
#[test]
fn a_command_line_that_has_gone_stale_is_noticed() {
    let examples = |text: &str| {
        let document = Markdown::parse("made-up.md", &format!("```console\n{text}\n```\n"));
        let block = document.code_blocks("console").next().expect("a block").clone();
        Example::all_in(&block).into_iter().map(|example| example.parse()).collect::<Vec<_>>()
    };
    assert!(examples("$ mongorekey backfill --tsp 10")[0].is_err());
    assert!(examples("$ mongorekey backfil").first().is_some_and(Result::is_err));
    let fine =
        "$ A=1 mongorekey backfill --tps 10 \\\n    --chunk 5   # a comment\n$ mongorekey status | less";
    assert_eq!(examples(fine), [Ok(()), Ok(())]);
    assert!(examples("mongorekey is not typed here").is_empty());
}

#[test]
fn the_parser_itself_is_sound() {
    Cli::command().debug_assert();
}

/// Where something stands, as editors understand it.
impl std::fmt::Display for Place {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}:{}", self.file, self.line)
    }
}
