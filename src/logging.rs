//! Sets up tracing, which is for developers; operators read events.

use tracing_subscriber::EnvFilter;

use crate::cli::{Global, LogFormat};

/// Starts logging to stderr at the level that the options ask for.
pub(crate) fn start(global: &Global) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => "error",
        (false, 0) => "mongorekey=warn",
        (false, 1) => "mongorekey=info",
        (false, 2) => "mongorekey=debug",
        (false, _) => "mongorekey=trace,mongodb=info",
    };
    let builder =
        tracing_subscriber::fmt().with_env_filter(EnvFilter::new(level)).with_writer(std::io::stderr);
    let result = match global.log_format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    // A test may have set a subscriber; the first one stays.
    drop(result);
}
