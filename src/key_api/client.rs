//! The HTTP client. It makes exactly the calls it is told to make: no redirects,
//! no silent re-sends, no proxy but the configured one, every answer bounded in
//! time and size.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use sha2::{Digest, Sha256};

use super::batch::{Answers, BatchOutcome, classify_batch};
use super::classify::{Answer, Outcome, classify};
use super::retry::parse_retry_after;
use super::tls;
use crate::config::file::{Batch, KeyApi, Method};
use crate::config::template;
use crate::error::{Error, Result};

/// A key's answer is some hundred bytes; whatever is longer is not one.
const LARGEST_BODY: usize = 1024 * 1024;
/// What each key of a batch adds to that.
const LARGEST_ITEM: usize = 4 * 1024;

/// Asks the key API.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    api: KeyApi,
    headers: HeaderMap,
    idempotency_header: Option<HeaderName>,
    /// Goes into every idempotency key, with the legacy key.
    idempotency_scope: String,
}

/// One call: what it came to and how long it took.
#[derive(Debug)]
pub struct Call {
    /// What it came to.
    pub outcome: Outcome,
    /// From sending to the last byte.
    pub latency: Duration,
}

/// One call for many keys: what it came to and how long it took.
#[derive(Debug)]
pub struct BatchCall {
    /// What it came to.
    pub outcome: BatchOutcome,
    /// From sending to the last byte.
    pub latency: Duration,
}

/// A response as a whole.
struct Received {
    status: u16,
    retry_after: Option<Duration>,
    body: Vec<u8>,
}

impl Received {
    fn answer(&self) -> Answer<'_> {
        Answer { status: self.status, retry_after: self.retry_after, body: &self.body }
    }
}

impl Client {
    /// A client for up to `slots` calls at once. `idempotency_scope` identifies
    /// the job: the same job asks for the same key with the same idempotency key.
    ///
    /// # Errors
    /// A usage error for headers that HTTP does not allow, for files with
    /// certificates and for a proxy that can't be used.
    pub fn new(api: KeyApi, slots: usize, idempotency_scope: impl Into<String>) -> Result<Self> {
        let headers = read_headers(&api)?;
        let idempotency_header = api
            .idempotency_header
            .as_ref()
            .map(|name| {
                HeaderName::try_from(name).map_err(|_| {
                    Error::usage(format!("`key_api.idempotency_header`: `{name}` is no header name"))
                })
            })
            .transpose()?;
        let http = http_client(&api, slots)?;
        Ok(Self { http, api, headers, idempotency_header, idempotency_scope: idempotency_scope.into() })
    }

    /// The configuration that this client follows.
    pub fn api(&self) -> &KeyApi {
        &self.api
    }

    /// Whether this key can be sent unchanged.
    pub fn is_sendable(&self, legacy_key: &str) -> bool {
        template::is_sendable(&self.api.url, legacy_key)
    }

    /// Makes one call. Never fails: a failure is an outcome. An API that takes
    /// batches is asked by a batch of one key.
    pub async fn call(&self, legacy_key: &str) -> Call {
        if self.api.batch.is_some() {
            let BatchCall { outcome, latency } = self.call_batch(&[legacy_key.to_owned()]).await;
            return Call { outcome: only_outcome(outcome), latency };
        }
        let started = Instant::now();
        let outcome = match self.exchange(self.request(legacy_key), LARGEST_BODY).await {
            Ok(received) => classify(&self.api, legacy_key, &received.answer()),
            Err(failure) => failure,
        };
        Call { outcome, latency: started.elapsed() }
    }

    /// Makes one call for distinct keys, at least one, by `key_api.batch`. Never
    /// fails: a failure is an outcome.
    pub async fn call_batch(&self, legacy_keys: &[String]) -> BatchCall {
        let started = Instant::now();
        let outcome = match &self.api.batch {
            None => {
                BatchOutcome::Failed(Outcome::Invalid("the config does not describe batches of keys".into()))
            }
            Some(batch) => {
                let largest = LARGEST_BODY + LARGEST_ITEM.saturating_mul(legacy_keys.len());
                match self.exchange(self.batch_request(batch, legacy_keys), largest).await {
                    Ok(received) => classify_batch(&self.api, legacy_keys, &received.answer()),
                    Err(failure) => BatchOutcome::Failed(failure),
                }
            }
        };
        BatchCall { outcome, latency: started.elapsed() }
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    /// The outcome, where there is no complete answer of at most `largest` bytes.
    async fn exchange(&self, request: reqwest::RequestBuilder, largest: usize) -> Result<Received, Outcome> {
        let response =
            request.headers(self.headers.clone()).send().await.map_err(|error| no_answer(&error))?;
        let status = response.status().as_u16();
        let retry_after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| parse_retry_after(text, Timestamp::now()));
        match read_bounded(response, largest).await.map_err(|error| no_answer(&error))? {
            Some(body) => Ok(Received { status, retry_after, body }),
            None => Err(Outcome::Invalid(format!("the answer is longer than {largest} bytes"))),
        }
    }

    fn request(&self, legacy_key: &str) -> reqwest::RequestBuilder {
        let url = template::fill_url(&self.api.url, legacy_key);
        let mut request = match self.api.method {
            Method::Get => self.http.get(url),
            Method::Post => self.http.post(url),
        };
        if let Some(body) = &self.api.body {
            request =
                request.header(CONTENT_TYPE, "application/json").body(template::fill_body(body, legacy_key));
        }
        if let Some(name) = &self.idempotency_header {
            request = request.header(name, self.idempotency_key(legacy_key));
        }
        request
    }

    fn batch_request(&self, batch: &Batch, legacy_keys: &[String]) -> reqwest::RequestBuilder {
        let mut request = self
            .http
            .post(&self.api.url)
            .header(CONTENT_TYPE, "application/json")
            .body(template::fill_batch_body(&batch.body, legacy_keys));
        if let Some(name) = &self.idempotency_header {
            request = request.header(name, self.idempotency_key_of_batch(legacy_keys));
        }
        request
    }

    fn idempotency_key(&self, legacy_key: &str) -> String {
        shortened(self.scoped_digest().chain_update(legacy_key))
    }

    /// The order of the keys has no meaning; their lengths keep `ab, c` and
    /// `a, bc` apart.
    fn idempotency_key_of_batch(&self, legacy_keys: &[String]) -> String {
        let mut sorted: Vec<&str> = legacy_keys.iter().map(String::as_str).collect();
        sorted.sort_unstable();
        let digest = sorted.into_iter().fold(self.scoped_digest().chain_update([1]), |digest, key| {
            digest.chain_update(key.len().to_be_bytes()).chain_update(key)
        });
        shortened(digest)
    }

    fn scoped_digest(&self) -> Sha256 {
        Sha256::new().chain_update(&self.idempotency_scope).chain_update([0])
    }
}

fn http_client(api: &KeyApi, slots: usize) -> Result<reqwest::Client> {
    let tls = tls::client_config(api)
        .map_err(|unusable| Error::usage(format!("`{}`: {}", unusable.key, unusable.reason)))?;
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .timeout(api.timeout.0)
        .connect_timeout(api.timeout.0)
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .no_proxy()
        .pool_max_idle_per_host(slots)
        .pool_idle_timeout(Duration::from_secs(30))
        .user_agent(concat!("mongorekey/", env!("CARGO_PKG_VERSION")));
    if let Some(proxy) = &api.proxy {
        // The error would repeat the URL and with it a password.
        let proxy = reqwest::Proxy::all(proxy.expose())
            .map_err(|_| Error::usage("`key_api.proxy` is no usable URL of a proxy"))?;
        builder = builder.proxy(proxy);
    }
    builder.build().map_err(|error| Error::usage(format!("the HTTP client can't be built: {error}")))
}

fn shortened(digest: Sha256) -> String {
    digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// What a batch of one key came to, as the outcome of that key.
fn only_outcome(outcome: BatchOutcome) -> Outcome {
    match outcome {
        BatchOutcome::Failed(outcome) => outcome,
        BatchOutcome::Answered(Answers { mut outcomes, .. }) if outcomes.len() == 1 => outcomes.remove(0),
        other => Outcome::Invalid(other.describe()),
    }
}

fn no_answer(error: &reqwest::Error) -> Outcome {
    if error.is_timeout() { Outcome::Timeout } else { Outcome::Connect(root_cause(error)) }
}

/// The whole body, or `None` where it is longer than `largest` bytes: what is
/// beyond them is never read.
async fn read_bounded(mut response: reqwest::Response, largest: usize) -> reqwest::Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    while let Some(part) = response.chunk().await? {
        if body.len() + part.len() > largest {
            return Ok(None);
        }
        body.extend_from_slice(&part);
    }
    Ok(Some(body))
}

fn read_headers(api: &KeyApi) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (name, value) in &api.headers {
        let header = HeaderName::try_from(name)
            .map_err(|_| Error::usage(format!("`key_api.headers.{name}` is no header name")))?;
        let mut value = HeaderValue::try_from(value.expose()).map_err(|_| {
            Error::usage(format!(
                "the value of `key_api.headers.{name}` holds characters that HTTP does not allow"
            ))
        })?;
        value.set_sensitive(true);
        headers.insert(header, value);
    }
    Ok(headers)
}

/// The innermost cause, which is what an operator can act on; the outer layers
/// repeat the URL and with it the key.
fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    if std::ptr::addr_eq(cause, error) { "the request failed".into() } else { cause.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::values::Secret;

    fn client(scope: &str) -> Client {
        let mut api = KeyApi::for_url("http://127.0.0.1:9/{key}");
        api.idempotency_header = Some("Idempotency-Key".into());
        api.headers.insert("Authorization".into(), Secret::new("Bearer hunter2"));
        Client::new(api, 4, scope).expect("a valid client")
    }

    #[test]
    fn the_idempotency_key_depends_on_job_and_legacy_key_only() {
        assert_eq!(client("job").idempotency_key("K1"), client("job").idempotency_key("K1"));
        assert_ne!(client("job").idempotency_key("K1"), client("job").idempotency_key("K2"));
        assert_ne!(client("job").idempotency_key("K1"), client("other").idempotency_key("K1"));
    }

    #[test]
    fn the_idempotency_key_of_a_batch_depends_on_the_job_and_the_set_of_its_keys() {
        let key = |scope: &str, keys: &[&str]| {
            let keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
            client(scope).idempotency_key_of_batch(&keys)
        };
        assert_eq!(key("job", &["K1", "K2"]), key("job", &["K2", "K1"]));
        let different = [
            key("job", &["K1", "K2"]),
            key("other", &["K1", "K2"]),
            key("job", &["K1"]),
            key("job", &["K", "1K2"]),
        ];
        for (index, one) in different.iter().enumerate() {
            assert_eq!(one.len(), 32);
            assert!(!different[..index].contains(one) && *one != client("job").idempotency_key("K1"));
        }
    }

    #[test]
    fn secrets_are_not_in_the_debug_output() {
        let mut proxied = KeyApi::for_url("http://127.0.0.1:9/{key}");
        proxied.proxy = Some(Secret::new("http://user:hunter2@127.0.0.1:9"));
        let proxied = Client::new(proxied, 4, "job").expect("a valid client");
        for client in [client("job"), proxied] {
            let text = format!("{client:?}");
            // As it is, and as the header for the proxy encodes it.
            assert!(!text.contains("hunter2") && !text.contains("dXNlcjpodW50ZXIy"), "{text}");
        }
    }

    #[tokio::test]
    async fn a_refused_connection_is_an_outcome() {
        let call = client("job").call("K1").await;
        assert!(matches!(call.outcome, Outcome::Connect(_)), "{:?}", call.outcome);
    }
}
