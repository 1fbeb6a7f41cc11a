//! `mock-api`: serves the rehearsal key API until it is interrupted.

use mongorekey_mock_api::{CallLog, listening_line, serve};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::cli::mock_api::MockApiArgs;
use crate::error::{Error, Result};
use crate::event::Events;
use crate::report::outcome::Outcome;

/// Runs the command.
///
/// # Errors
/// Usage errors; a refusal where the address can't be listened on.
pub async fn run(args: &MockApiArgs, events: &Events, stop: CancellationToken) -> Result<Outcome> {
    let behaviour = args.behaviour().map_err(Error::usage)?;
    let log = CallLog::open(args.log.as_deref())
        .map_err(|error| Error::usage(format!("the log of calls can't be opened: {error}")))?;
    let listener = TcpListener::bind(args.listen).await.map_err(|error| {
        Error::refused(format!("{} can't be listened on: {error}", args.listen))
            .hint("choose another port, or 0 for a free one")
    })?;
    let address = listener.local_addr().map_err(|error| Error::stopped(error.to_string()))?;
    events.announce(listening_line(address));
    let summary = serve(listener, behaviour, std::sync::Arc::new(log), stop.cancelled_owned())
        .await
        .map_err(|error| Error::stopped(format!("the mock API failed: {error}")))?;
    let mut json = json!({"schema": 1, "command": "mock-api", "address": address.to_string()});
    json["summary"] = serde_json::to_value(summary).unwrap_or_default();
    let text = format!(
        "{} calls: {} keys found, {} not found\n{}",
        summary.calls, summary.keys_found, summary.keys_not_found, json["summary"]["outcomes"]
    );
    Ok(Outcome::reached(json, text))
}
