//! What was typed after `mongorekey mock-api`.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::Args;
use mongorekey_mock_api::{Behaviour, Faults, Latency, Percent, RateLimit};

/// Serve a key API to rehearse against
///
/// `GET /v1/keys/{key}` answers `{"legacyKey": …, "newKey": …}`, or 404 with `{"code": "NO_KEY"}`.
/// `POST /v1/keys` answers the same for a body `{"legacyKey": "…"}`, and
/// `{"items": [{"legacyKey": …, "newKey": …}, …]}` for a body `{"keys": ["…", …]}`; an item that
/// is not found is `{"legacyKey": …, "code": "NO_KEY"}`.
///
/// Without options every key is found and every answer is given at once. Which new key belongs to
/// a legacy key, and which legacy keys are not found, depends on the key and --seed alone: asking
/// again gives the same answer, after a restart too. Which calls are slow or fail depends on
/// --seed and on how many calls were let through before.
///
/// Runs until interrupted; connections that are open then are cut. The result counts the calls by
/// their outcome.
#[derive(Debug, Clone, Args)]
pub struct MockApiArgs {
    /// Address and port to listen on; port 0 takes a free one, named on stderr
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,

    /// Time until an answer: `300ms`, or `300ms..2s` for anything between the two, equally likely
    #[arg(long, value_name = "TIME", default_value = "0s")]
    pub latency: Latency,

    /// Share of calls that take --slow-latency instead of --latency: `1%`
    #[arg(long, value_name = "PERCENT", default_value = "0%")]
    pub slow_share: Percent,

    /// Time until an answer for the share of calls given by --slow-share
    #[arg(long, value_name = "TIME", default_value = "2s")]
    pub slow_latency: Latency,

    /// Share of keys that have no new key: they answer 404, every time: `2%`
    #[arg(long, value_name = "PERCENT", default_value = "0%")]
    pub not_found: Percent,

    /// Calls per second that are let through, `0.5` is one in two seconds; more answer 429
    ///
    /// The answer says in `Retry-After` after how many seconds the next call is let through. A
    /// batch is one call. Without the option nothing is limited.
    #[arg(long, value_name = "CALLS")]
    pub tps: Option<f64>,

    /// Calls that are let through at once after a quiet time [default: --tps, rounded up]
    #[arg(long, value_name = "CALLS")]
    pub tps_burst: Option<NonZeroU32>,

    /// Share of calls that answer 500
    #[arg(long, value_name = "PERCENT", default_value = "0%")]
    pub error_500: Percent,

    /// Share of calls that are never answered: the connection stays open until the client closes it
    #[arg(long, value_name = "PERCENT", default_value = "0%")]
    pub timeouts: Percent,

    /// Share of calls whose connection is reset instead of an answer
    #[arg(long, value_name = "PERCENT", default_value = "0%")]
    pub resets: Percent,

    /// Share of calls that answer 200 and claim to be JSON, but are cut off or no text at all
    #[arg(long, value_name = "PERCENT", default_value = "0%")]
    pub garbage: Percent,

    /// Share of calls that answer 200 with an HTML page
    #[arg(long, value_name = "PERCENT", default_value = "0%")]
    pub html: Percent,

    /// Number that all new keys, keys not found, latencies and faults are derived from
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub seed: u64,

    /// Append one JSON line per call to FILE; `-` is stderr
    ///
    /// Fields: `at` (when the call arrived, RFC 3339), `since_start_us` (the same in microseconds
    /// since the start), `method`, `key` (null for a batch, which has `keys` instead), `outcome`,
    /// `status` (null when nothing was answered), `latency_ms`. Lines stand in the order in which
    /// calls ended.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
}

impl MockApiArgs {
    /// The behaviour that these options describe.
    ///
    /// # Errors
    ///
    /// A message for the reader, naming the options, when they do not fit together.
    pub fn behaviour(&self) -> Result<Behaviour, String> {
        Ok(Behaviour {
            seed: self.seed,
            latency: self.latency,
            slow_share: self.slow_share,
            slow_latency: self.slow_latency,
            not_found: self.not_found,
            limit: RateLimit::from_options(self.tps, self.tps_burst)?,
            faults: Faults {
                server_error: self.error_500,
                timeout: self.timeouts,
                reset: self.resets,
                garbage: self.garbage,
                html: self.html,
            }
            .checked()?,
        })
    }
}
