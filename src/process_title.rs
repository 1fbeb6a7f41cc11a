//! Keeps the password of `--uri` out of the process title.
//!
//! Every user of a machine can read the arguments of every process. A program
//! can't change its own, but it can start itself again without them: same
//! process id, the URI in the environment, which only its owner can read.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use crate::config::URI_VARIABLE;
use crate::config::values::Secret;

/// Starts the program again if an argument holds a URI with a password.
/// Returns where there is none, or where starting again failed.
pub(crate) fn hide_password(arguments: &[OsString]) {
    let Some((uri, rest)) = split(arguments) else { return };
    let Ok(program) = std::env::current_exe() else { return };
    let error = Command::new(program)
        .arg0(arguments.first().map_or(OsStr::new("mongorekey"), OsString::as_os_str))
        .args(rest.iter().skip(1))
        .env(URI_VARIABLE, uri)
        .exec();
    tracing::warn!(%error, "the password of --uri stays visible in the process title");
}

/// The URI with a password, and the arguments without it.
fn split(arguments: &[OsString]) -> Option<(String, Vec<OsString>)> {
    let mut rest = Vec::new();
    let mut found = None;
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let text = word.to_str().unwrap_or_default();
        if text == "--uri" {
            found = Some(words.next()?.to_str()?.to_owned());
        } else if let Some(value) = text.strip_prefix("--uri=") {
            found = Some(value.to_owned());
        } else {
            rest.push(word.clone());
        }
    }
    let holds_password =
        |uri: &String| Secret::new(uri).credentials().is_some_and(|credentials| credentials.contains(':'));
    found.filter(holds_password).map(|uri| (uri, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split_line(line: &str) -> Option<(String, Vec<OsString>)> {
        split(&line.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn a_password_is_taken_out_in_both_spellings() {
        for line in ["m --uri mongodb://u:p@h/ check -v", "m --uri=mongodb://u:p@h/ check -v"] {
            let (uri, rest) = split_line(line).expect("a password");
            assert_eq!(uri, "mongodb://u:p@h/");
            assert_eq!(rest, ["m", "check", "-v"]);
        }
    }

    #[test]
    fn other_arguments_are_left_alone() {
        for line in ["m check", "m --uri mongodb://h/ check", "m --uri mongodb://u@h/ check", "m --uri"] {
            assert_eq!(split_line(line), None, "{line}");
        }
    }
}
