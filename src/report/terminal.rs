//! Talking with whoever sits at the terminal, and handing data to stdout.

use std::io::{BufRead as _, IsTerminal as _, Write};

use crate::error::{Error, Result};

/// Makes sure that a question can be asked, or need not be because `yes` is the
/// answer given on the command line.
///
/// # Errors
/// A usage error where nobody can be asked.
pub fn check_terminal(yes: bool) -> Result<()> {
    if yes || std::io::stdin().is_terminal() {
        return Ok(());
    }
    Err(Error::usage("this command asks first, and there is no terminal to ask at")
        .hint("look at what it would do, then give --yes"))
}

/// Asks a question; anything but `y` and `yes` is a no.
///
/// # Errors
/// A stop where the task that reads the answer failed.
pub async fn ask(question: String) -> Result<bool> {
    let asked = tokio::task::spawn_blocking(move || {
        // stderr, because stdout carries the result only.
        let _closed = write!(std::io::stderr(), "{question} [y/N]: ");
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).map(|_| line)
    });
    let answer = crate::error::joined(asked.await)?.unwrap_or_default();
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

/// Asks before something is done that can't be undone.
///
/// # Errors
/// A usage error where nobody can be asked, a refusal where the answer is no.
pub async fn confirm(question: String, yes: bool) -> Result<()> {
    check_terminal(yes)?;
    if yes || ask(question).await? {
        return Ok(());
    }
    Err(Error::refused("nothing was done: the answer was no"))
}

/// Where data goes that a command streams instead of a result.
pub fn data_output() -> impl Write {
    std::io::BufWriter::new(std::io::stdout())
}

/// A line for the process that started this one.
pub fn answer(line: &str) {
    let mut stdout = std::io::stdout().lock();
    // Who does not listen any more needs no answer.
    let _closed = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}
