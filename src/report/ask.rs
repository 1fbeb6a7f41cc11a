//! Questions to the operator, before something that can't be taken back.

use std::io::{IsTerminal, Write as _};

use crate::error::{Error, Result};

/// Makes sure that a question can be asked, or need not be.
///
/// # Errors
/// A usage error without a terminal and without `--yes`.
pub fn check_terminal(yes: bool, before: &str) -> Result<()> {
    if yes || std::io::stdin().is_terminal() {
        return Ok(());
    }
    Err(Error::usage(format!("{before} asks first, and there is no terminal to ask at"))
        .hint("give --yes to go on without a question"))
}

/// Asks a question on stderr; only `y` and `yes` are a yes.
///
/// # Errors
/// A stop where the answer can't be read.
pub async fn confirm(question: String) -> Result<bool> {
    let answer = tokio::task::spawn_blocking(move || {
        // stderr, because stdout carries the result only.
        write!(std::io::stderr(), "{question} [y/N] ")?;
        std::io::stderr().flush()?;
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        std::io::Result::Ok(line)
    })
    .await;
    match crate::error::joined(answer)? {
        Ok(line) => Ok(matches!(line.trim().to_lowercase().as_str(), "y" | "yes")),
        Err(error) => Err(Error::stopped(format!("the answer could not be read: {error}"))),
    }
}
