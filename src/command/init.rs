//! `init`: a first config file that explains itself.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::config::DEFAULT_FILE;
use crate::config::load::Source;
use crate::error::{Error, Result};
use crate::report::outcome::Outcome;

/// The file, with `@NAME@` where an answer goes.
const TEMPLATE: &str = include_str!("init.toml");

/// The questions: the placeholder, what is asked, the answer without a terminal.
const QUESTIONS: [(&str, &str, &str); 6] = [
    ("COLLECTION", "Collection to fill (database.collection)", "app.users"),
    ("LEGACY_FIELD", "Field with the legacy key", "legacyKey"),
    ("KEY_FIELD", "Field that receives the new key", "newKey"),
    ("API_URL", "Address of the key API, with {key}", "http://127.0.0.1:8080/v1/keys/{key}"),
    ("TPS", "Calls per second that the API allows", "10"),
    ("TIME_ZONE", "Time zone for windows", "UTC"),
];

/// Runs the command.
///
/// # Errors
/// A usage error where the file exists or the answers make no valid config.
pub fn run(path: Option<&Path>, force: bool) -> Result<Outcome> {
    let path = path.map_or_else(|| PathBuf::from(DEFAULT_FILE), Path::to_path_buf);
    if path.exists() && !force {
        return Err(
            Error::usage(format!("{} exists already", path.display())).hint("overwrite it with --force")
        );
    }
    let answers = if std::io::stdin().is_terminal() { ask_all()? } else { defaults() };
    let text = fill(&answers);
    check(&path, &text)?;
    std::fs::write(&path, &text)
        .map_err(|error| Error::usage(format!("{} can't be written: {error}", path.display())))?;
    let json = json!({"schema": 1, "command": "init", "file": path.display().to_string()});
    let text = format!(
        "wrote {}\nnext: export MONGODB_URI=mongodb://…, then run `mongorekey check`",
        path.display()
    );
    Ok(Outcome::reached(json, text))
}

fn defaults() -> Vec<String> {
    QUESTIONS.iter().map(|(_, _, default)| (*default).to_owned()).collect()
}

fn ask_all() -> Result<Vec<String>> {
    let mut answers = Vec::new();
    for (_, question, default) in QUESTIONS {
        let _closed = write!(std::io::stderr(), "{question} [{default}]: ");
        let mut line = String::new();
        std::io::stdin()
            .lock()
            .read_line(&mut line)
            .map_err(|error| Error::usage(format!("the answer can't be read: {error}")))?;
        let answer = line.trim();
        answers.push(if answer.is_empty() { default.to_owned() } else { answer.to_owned() });
    }
    Ok(answers)
}

fn fill(answers: &[String]) -> String {
    QUESTIONS.iter().zip(answers).fold(TEMPLATE.to_owned(), |text, ((name, _, _), answer)| {
        // A quote in an answer must not end the string that it stands in.
        let escaped = answer.replace('\\', "\\\\").replace('"', "\\\"");
        text.replace(&format!("@{name}@"), &escaped)
    })
}

/// What is written must pass, or the first experience is an error.
fn check(path: &Path, text: &str) -> Result<()> {
    let environment = |_: &str| Some(String::from("set"));
    Source::from_text(path.display().to_string(), text).parse(&environment).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_passes_with_its_defaults() {
        let text = fill(&defaults());
        assert!(!text.contains('@'), "{text}");
        check(Path::new("mongorekey.toml"), &text).expect("a valid config");
    }

    #[test]
    fn a_bad_answer_is_refused_before_anything_is_written() {
        let mut answers = defaults();
        answers[0] = "users".into();
        assert!(check(Path::new("mongorekey.toml"), &fill(&answers)).is_err());
    }
}
