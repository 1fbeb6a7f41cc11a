//! The HTTP client. It makes exactly the calls it is told to make: no redirects,
//! no silent re-sends, no proxy from the environment, every answer bounded in
//! time and size.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use sha2::{Digest, Sha256};

use super::classify::{Answer, Outcome, classify};
use super::retry::parse_retry_after;
use crate::config::file::{KeyApi, Method};
use crate::config::template;
use crate::error::{Error, Result};

/// A key's answer is some hundred bytes; whatever is longer is not one.
const LARGEST_BODY: usize = 1024 * 1024;

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

impl Client {
    /// A client for up to `slots` calls at once. `idempotency_scope` identifies
    /// the job: the same job asks for the same key with the same idempotency key.
    ///
    /// # Errors
    /// A usage error for headers that HTTP does not allow.
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
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls_config()?)
            .timeout(api.timeout.0)
            .connect_timeout(api.timeout.0)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .no_proxy()
            .pool_max_idle_per_host(slots)
            .pool_idle_timeout(Duration::from_secs(30))
            .user_agent(concat!("mongorekey/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| Error::usage(format!("the HTTP client can't be built: {error}")))?;
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

    /// Makes one call. Never fails: a failure is an outcome.
    pub async fn call(&self, legacy_key: &str) -> Call {
        let started = Instant::now();
        let outcome = match self.exchange(legacy_key).await {
            Ok(outcome) => outcome,
            Err(error) if error.is_timeout() => Outcome::Timeout,
            Err(error) => Outcome::Connect(root_cause(&error)),
        };
        Call { outcome, latency: started.elapsed() }
    }

    async fn exchange(&self, legacy_key: &str) -> reqwest::Result<Outcome> {
        let response = self.request(legacy_key).send().await?;
        let status = response.status().as_u16();
        let retry_after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| parse_retry_after(text, Timestamp::now()));
        let Some(body) = read_bounded(response).await? else {
            return Ok(Outcome::Invalid(format!("the answer is longer than {LARGEST_BODY} bytes")));
        };
        Ok(classify(&self.api, legacy_key, &Answer { status, retry_after, body: &body }))
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
        request.headers(self.headers.clone())
    }

    fn idempotency_key(&self, legacy_key: &str) -> String {
        let mut digest = Sha256::new();
        digest.update(self.idempotency_scope.as_bytes());
        digest.update([0]);
        digest.update(legacy_key.as_bytes());
        digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The whole body, or `None` where it is too long.
async fn read_bounded(mut response: reqwest::Response) -> reqwest::Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    while let Some(part) = response.chunk().await? {
        if body.len() + part.len() > LARGEST_BODY {
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

/// One crypto provider and one set of roots for this client and the driver.
fn tls_config() -> Result<rustls::ClientConfig> {
    let roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::usage(format!("TLS can't be set up: {error}")))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
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
    fn secrets_are_not_in_the_debug_output() {
        assert!(!format!("{:?}", client("job")).contains("hunter2"));
    }

    #[tokio::test]
    async fn a_refused_connection_is_an_outcome() {
        let call = client("job").call("K1").await;
        assert!(matches!(call.outcome, Outcome::Connect(_)), "{:?}", call.outcome);
    }
}
