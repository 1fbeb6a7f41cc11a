//! Keeps secrets of the command line out of the process title: the password of
//! `--uri`, the token in the query of `--api-url`.
//!
//! Every user of a machine can read the arguments of every process. A program
//! can't change its own, but it can start itself again without them: same
//! process id, the secrets in the environment, which only its owner can read.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use crate::config::values::Secret;
use crate::config::{API_URL_VARIABLE, URI_VARIABLE};

/// An option whose value may hold a secret.
struct SecretOption {
    name: &'static str,
    /// The variable that takes its place.
    variable: &'static str,
    is_secret: fn(&str) -> bool,
}

const OPTIONS: [SecretOption; 2] = [
    SecretOption { name: "--uri", variable: URI_VARIABLE, is_secret: holds_password },
    SecretOption { name: "--api-url", variable: API_URL_VARIABLE, is_secret: may_hold_token },
];

/// Secrets by their variables.
type Secrets = Vec<(&'static str, String)>;

/// Starts the program again if an argument holds a secret. Returns where there
/// is none, or where starting again failed.
pub(crate) fn hide_secrets(arguments: &[OsString]) {
    let Some((secrets, rest)) = split(arguments) else { return };
    let Ok(program) = std::env::current_exe() else { return };
    let error = Command::new(program)
        .arg0(arguments.first().map_or(OsStr::new("mongorekey"), OsString::as_os_str))
        .args(rest.iter().skip(1))
        .envs(secrets)
        .exec();
    tracing::warn!(%error, "secrets of the command line stay visible in the process title");
}

fn holds_password(uri: &str) -> bool {
    Secret::new(uri).credentials().is_some_and(|credentials| credentials.contains(':'))
}

/// A query may hold a token, and nothing tells which one does.
fn may_hold_token(url: &str) -> bool {
    url.contains(['?', '@'])
}

/// The secrets by their variables, and the arguments without them.
fn split(arguments: &[OsString]) -> Option<(Secrets, Vec<OsString>)> {
    let mut rest = Vec::new();
    let mut secrets = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let text = word.to_str().unwrap_or_default();
        let option = OPTIONS.iter().find_map(|option| {
            let value = text.strip_prefix(option.name)?;
            if value.is_empty() {
                return Some((option, None));
            }
            Some((option, Some(value.strip_prefix('=')?.to_owned())))
        });
        let Some((option, value)) = option else {
            rest.push(word.clone());
            continue;
        };
        let is_apart = value.is_none();
        let value = match value {
            Some(value) => value,
            None => words.next()?.to_str()?.to_owned(),
        };
        if (option.is_secret)(&value) {
            secrets.push((option.variable, value));
        } else {
            rest.push(word.clone());
            if is_apart {
                rest.push(value.into());
            }
        }
    }
    (!secrets.is_empty()).then_some((secrets, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split_line(line: &str) -> Option<(Secrets, Vec<OsString>)> {
        split(&line.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn a_password_is_taken_out_in_both_spellings() {
        for line in ["m --uri mongodb://u:p@h/ check -v", "m --uri=mongodb://u:p@h/ check -v"] {
            let (secrets, rest) = split_line(line).expect("a password");
            assert_eq!(secrets, [(URI_VARIABLE, "mongodb://u:p@h/".to_owned())]);
            assert_eq!(rest, ["m", "check", "-v"]);
        }
    }

    #[test]
    fn a_token_is_taken_out_and_harmless_values_stay() {
        let (secrets, rest) =
            split_line("m --uri mongodb://h/ backfill --api-url http://h/{key}?token=t --uri=x --tps 1")
                .expect("a token");
        assert_eq!(secrets, [(API_URL_VARIABLE, "http://h/{key}?token=t".to_owned())]);
        assert_eq!(rest, ["m", "--uri", "mongodb://h/", "backfill", "--uri=x", "--tps", "1"]);
    }

    #[test]
    fn other_arguments_are_left_alone() {
        for line in [
            "m check",
            "m --uri mongodb://h/ check",
            "m --uri mongodb://u@h/ check",
            "m --uri",
            "m backfill --api-url http://h/{key}",
            "m --uris mongodb://u:p@h/ check",
        ] {
            assert_eq!(split_line(line), None, "{line}");
        }
    }
}
