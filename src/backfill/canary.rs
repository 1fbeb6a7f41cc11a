//! The canary: some documents first, each shown with what became of it, before
//! all the others follow.

use super::counts::shown;
use super::plan::Options;
use super::summary::Report;
use crate::Context;
use crate::error::Result;
use crate::job::JobState;
use crate::report::terminal;

/// Makes sure that the question after the canary can be asked.
///
/// # Errors
/// A usage error without a terminal and without `--yes`.
pub(super) fn check_question(options: &Options) -> Result<()> {
    terminal::check_terminal(options.yes)
}

/// Shows what became of the documents and asks whether to go on; a signal is a
/// no.
///
/// # Errors
/// A stop where the answer can't be read.
pub(super) async fn goes_on(context: &Context, options: &Options, report: &Report) -> Result<bool> {
    for recorded in &report.recorded {
        let key = recorded.legacy_key.as_deref().unwrap_or("(no key)");
        let detail = if recorded.detail.is_empty() { String::new() } else { format!(" {}", recorded.detail) };
        context.events.announce(format!(
            "canary: {} {} {key} -> {}{detail}",
            recorded.collection, recorded.document, recorded.outcome
        ));
    }
    if matches!(report.state, JobState::Stopped | JobState::Interrupted) {
        return Ok(false);
    }
    if options.yes || report.documents.candidates_left == 0 {
        return Ok(true);
    }
    // The lines above must be seen before the question.
    context.events.settled().await;
    let (documents, left) = (&report.documents, shown(report.documents.candidates_left));
    let question = format!(
        "{} filled, {} flagged, {} failed. Go on with the {left} candidates left?",
        documents.filled, documents.flagged, documents.failed
    );
    tokio::select! {
        answer = terminal::ask(question) => answer,
        () = context.stop.cancelled() => Ok(false),
    }
}
