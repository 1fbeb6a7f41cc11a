//! The command line of this process as it may be shown to anybody: without the
//! options whose values may hold a secret. Who runs it again brings his own.

use std::ffi::OsString;

/// Options that are left out with their values.
const SECRET: [&str; 2] = ["--uri", "--api-url"];

/// The command line, quoted for a shell.
pub(crate) fn shown() -> String {
    shown_of(std::env::args_os().skip(1))
}

fn shown_of(arguments: impl Iterator<Item = OsString>) -> String {
    let mut words = vec!["mongorekey".to_owned()];
    let mut arguments = arguments.map(|word| word.to_string_lossy().into_owned());
    while let Some(word) = arguments.next() {
        let name = word.split_once('=').map_or(word.as_str(), |(name, _)| name);
        if SECRET.contains(&name) {
            if name == word {
                arguments.next();
            }
            continue;
        }
        words.push(quoted(&word));
    }
    words.join(" ")
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "-_=./:,+@%".contains(character);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown_line(line: &[&str]) -> String {
        shown_of(line.iter().map(OsString::from))
    }

    #[test]
    fn what_may_hold_a_secret_is_left_out() {
        let line = ["--uri", "mongodb://u:hunter2@h/", "verify", "--full", "--api-url=http://h/{key}?t=x"];
        assert_eq!(shown_line(&line), "mongorekey verify --full");
        assert_eq!(shown_line(&["--uri=mongodb://u:p@h", "status"]), "mongorekey status");
        assert_eq!(shown_line(&["status", "--uri"]), "mongorekey status");
    }

    #[test]
    fn words_are_quoted_where_a_shell_needs_it() {
        let line = ["verify", "--to", "a b", "--job", "it's", "--for", "", "--source", "app.회원"];
        assert_eq!(
            shown_line(&line),
            r"mongorekey verify --to 'a b' --job 'it'\''s' --for '' --source 'app.회원'"
        );
    }
}
