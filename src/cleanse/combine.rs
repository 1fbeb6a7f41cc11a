//! Which options and rules go together. What does not is refused before anything
//! is touched, rather than be wrong in silence. Pure.

use crate::cli::cleanse::{CleanseArgs, Method};
use crate::error::{Error, Result};
use crate::mongo::valid::Valid;

/// Makes sure that the options go together, with each other and with the rules.
///
/// # Errors
/// A usage error where they don't.
pub fn check(args: &CleanseArgs, valid: &Valid) -> Result<()> {
    let options = [(args.quarantine.is_some(), "--quarantine"), (args.dual_write, "--dual-write")];
    for (_, option) in options.into_iter().filter(|(is_given, _)| *is_given) {
        only_conditions(option, valid)?;
        if args.method == Method::Out {
            return Err(Error::usage(format!("--method out and {option} can't be used together"))
                .hint("leave --method out: ranges are copied by --method merge"));
        }
    }
    Ok(())
}

/// Makes sure that the rules look at nothing but the document itself.
///
/// # Errors
/// A usage error where one asks other documents.
pub fn only_conditions(option: &str, valid: &Valid) -> Result<()> {
    if valid.is_condition() {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{option} can't be used with rules that look at other documents: `exists_in` and `dedupe`"
    ))
    .hint(format!("leave {option} out, or cleanse by `keep` and `reject` alone")))
}
