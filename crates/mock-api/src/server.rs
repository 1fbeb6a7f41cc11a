//! The rehearsal API over HTTP/1.1, on hyper itself: the load it must carry without becoming what
//! is measured, and faults such as a connection reset, are out of reach of a web framework.

use std::error::Error;
use std::fmt;
use std::future::{Future, pending, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::behaviour::{Behaviour, Fault};
use crate::limit::Limiter;
use crate::log::{CallLog, OpenCall, Outcome, Summary};

/// Path of batches and of keys in a body; a single key follows after a slash.
const PATH: &str = "/v1/keys";
/// Half of what is promised to readers of the log, so that a late timer does not break it.
const FLUSH_EVERY: Duration = Duration::from_millis(50);
/// After a failed accept (no file descriptors left): long enough not to spin.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(50);
const LARGEST_BODY: usize = 16 * 1024 * 1024;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");
const HTML_PAGE: &str = "<!DOCTYPE html>\n<html><head><title>Maintenance</title></head>\
    <body><h1>We will be back soon</h1></body></html>\n";
/// Begins with a byte that UTF-8 never has.
const SCRAMBLED: &[u8] = b"\xff\xfe{\x00\"\x00n\x00\x80\xc3\x28";

type Answer = Response<Full<Bytes>>;

/// The line that tells where the API listens, with the port that was bound.
#[must_use]
pub fn listening_line(address: SocketAddr) -> String {
    format!("mock key API listening on http://{address}{PATH}/{{key}}")
}

/// Answers calls on `listener` until `shutdown` resolves; then cuts all connections, writes out the
/// log and says what came.
///
/// # Errors
///
/// When the log can't be written. A failing connection is the client's matter.
pub async fn serve(
    listener: TcpListener,
    behaviour: Behaviour,
    log: Arc<CallLog>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<Summary> {
    let api = Arc::new(Api::new(behaviour, log));
    let mut connections = JoinSet::new();
    let mut flush = interval(FLUSH_EVERY);
    flush.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            _ = flush.tick() => api.log.flush()?,
            // Forgets connections that ended.
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(converse(stream, Arc::clone(&api)));
                }
                Err(_) => sleep(ACCEPT_AGAIN_AFTER).await,
            },
        }
    }
    drop(listener);
    connections.shutdown().await;
    api.log.flush()?;
    Ok(api.log.summary())
}

/// Answers the calls of one connection, one after the other.
async fn converse(stream: TcpStream, api: Arc<Api>) {
    // Without it a small answer may wait for the client's delayed acknowledgement.
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| {
        let api = Arc::clone(&api);
        Box::pin(async move { api.answer(request).await })
    });
    let mut connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let ended = poll_fn(|context| connection.poll_without_shutdown(context)).await;
    if ended.is_err_and(|error| wants_reset(&error)) {
        // With no time to linger, closing sends RST instead of FIN.
        let _ = connection.into_parts().io.into_inner().set_zero_linger();
    }
}

/// Asks [`converse`] to reset the connection: only there the socket can be reached.
#[derive(Debug)]
struct ResetConnection;

impl fmt::Display for ResetConnection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("connection to be reset")
    }
}

impl Error for ResetConnection {}

fn wants_reset(error: &hyper::Error) -> bool {
    error.source().is_some_and(<dyn Error>::is::<ResetConnection>)
}

/// What all connections share.
struct Api {
    behaviour: Behaviour,
    limiter: Option<Limiter>,
    log: Arc<CallLog>,
    /// Calls that were let through: the number of a call is what its faults are drawn from.
    admitted: AtomicU64,
}

impl Api {
    fn new(behaviour: Behaviour, log: Arc<CallLog>) -> Self {
        Self { limiter: behaviour.limit.map(Limiter::new), behaviour, log, admitted: AtomicU64::new(0) }
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Answer, ResetConnection> {
        let mut call = self.log.arrival(request.method().as_str());
        let answer = self.respond(request, &mut call).await?;
        call.status = Some(answer.status().as_u16());
        Ok(answer)
    }

    async fn respond(
        &self,
        request: Request<Incoming>,
        call: &mut OpenCall<'_>,
    ) -> Result<Answer, ResetConnection> {
        let question = match read(request).await {
            Ok(question) => question,
            Err(refusal) => {
                call.outcome = Outcome::BadRequest;
                return Ok(refusal.answer());
            }
        };
        question.note(call);
        if let Some(Err(seconds)) = self.limiter.as_ref().map(Limiter::admit) {
            call.outcome = Outcome::RateLimited;
            return Ok(too_many_requests(seconds));
        }
        let decision = self.behaviour.decide(self.admitted.fetch_add(1, Ordering::Relaxed));
        // The shortest sleep lasts a millisecond, so "at once" must not sleep at all.
        if !decision.latency.is_zero() {
            sleep(decision.latency).await;
        }
        match decision.fault {
            None => Ok(self.look_up(&question, call)),
            Some(fault) => self.fail(fault, &question, call).await,
        }
    }

    fn look_up(&self, question: &Question, call: &mut OpenCall<'_>) -> Answer {
        match question {
            Question::One(key) => {
                let item = self.item(key, call);
                let found = call.keys_found > 0;
                call.outcome = if found { Outcome::Found } else { Outcome::NotFound };
                if found {
                    json_answer(StatusCode::OK, &item)
                } else {
                    json_answer(StatusCode::NOT_FOUND, &json!({"code": "NO_KEY"}))
                }
            }
            Question::Many(keys) => {
                call.outcome = Outcome::Batch;
                let items: Vec<_> = keys.iter().map(|key| self.item(key, call)).collect();
                json_answer(StatusCode::OK, &json!({"items": items}))
            }
        }
    }

    fn item(&self, key: &str, call: &mut OpenCall<'_>) -> Value {
        if let Some(new_key) = self.behaviour.find(key) {
            call.keys_found += 1;
            json!({"legacyKey": key, "newKey": new_key})
        } else {
            call.keys_not_found += 1;
            json!({"legacyKey": key, "code": "NO_KEY"})
        }
    }

    async fn fail(
        &self,
        fault: Fault,
        question: &Question,
        call: &mut OpenCall<'_>,
    ) -> Result<Answer, ResetConnection> {
        call.outcome = outcome_of(fault);
        match fault {
            Fault::ServerError => {
                Ok(json_answer(StatusCode::INTERNAL_SERVER_ERROR, &json!({"code": "INTERNAL"})))
            }
            // Ends when hyper drops it, because the connection is gone.
            Fault::Timeout => pending().await,
            Fault::Reset => Err(ResetConnection),
            Fault::Truncated => Ok(respond_with(StatusCode::OK, JSON, truncated(question))),
            Fault::Scrambled => Ok(respond_with(StatusCode::OK, JSON, SCRAMBLED)),
            Fault::Html => Ok(respond_with(StatusCode::OK, HTML, HTML_PAGE)),
        }
    }
}

fn outcome_of(fault: Fault) -> Outcome {
    match fault {
        Fault::ServerError => Outcome::ServerError,
        Fault::Timeout => Outcome::Timeout,
        Fault::Reset => Outcome::Reset,
        Fault::Truncated | Fault::Scrambled => Outcome::Garbage,
        Fault::Html => Outcome::Html,
    }
}

/// An answer that began well and stops within its first key: an object without its closing brace
/// can't pass for another answer.
fn truncated(question: &Question) -> String {
    match question {
        Question::One(key) => format!("{{\"legacyKey\":{},\"newKey\":\"N-", Value::from(&**key)),
        Question::Many(_) => "{\"items\":[{\"legacyKey\":\"".to_owned(),
    }
}

/// The keys that a call asks for.
enum Question {
    One(String),
    Many(Vec<String>),
}

impl Question {
    fn note(&self, call: &mut OpenCall<'_>) {
        match self {
            Self::One(key) => call.key = Some(key.clone()),
            Self::Many(keys) => call.keys = Some(keys.clone()),
        }
    }
}

/// The bodies that `POST` takes.
#[derive(Deserialize)]
#[serde(untagged)]
enum Body {
    Many {
        keys: Vec<String>,
    },
    One {
        #[serde(rename = "legacyKey")]
        key: String,
    },
}

/// Why something is not a call that this API has.
///
/// Only a malformed key is refused in JSON. Everything else is a mistake in the client's
/// configuration, and a client must not take it for an answer about a key.
#[derive(Clone, Copy)]
enum Refusal {
    NoSuchPath,
    PostOnly,
    BadKey,
    BadBody,
    BodyIncomplete,
    BodyTooLarge,
}

impl Refusal {
    fn answer(self) -> Answer {
        let (status, message) = match self {
            Self::BadKey => {
                return json_answer(StatusCode::BAD_REQUEST, &json!({"code": "BAD_KEY"}));
            }
            Self::NoSuchPath => (
                StatusCode::NOT_FOUND,
                "no such path: GET /v1/keys/{key} or POST /v1/keys; a slash in a key is %2F\n",
            ),
            Self::PostOnly => (StatusCode::METHOD_NOT_ALLOWED, "POST only\n"),
            Self::BadBody => {
                (StatusCode::BAD_REQUEST, "expected {\"keys\": [\"…\", …]} or {\"legacyKey\": \"…\"}\n")
            }
            Self::BodyIncomplete => (StatusCode::BAD_REQUEST, "body incomplete\n"),
            Self::BodyTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "body too large\n"),
        };
        respond_with(status, TEXT, message)
    }
}

/// Reads what is asked.
async fn read(request: Request<Incoming>) -> Result<Question, Refusal> {
    let rest = request.uri().path().strip_prefix(PATH);
    match (request.method(), rest) {
        (&Method::GET, Some(rest)) => {
            let segment = rest.strip_prefix('/').filter(|key| !key.contains('/'));
            key_of_segment(segment.ok_or(Refusal::NoSuchPath)?)
        }
        (&Method::POST, Some("")) => read_body(request.into_body()).await,
        (_, Some("")) => Err(Refusal::PostOnly),
        _ => Err(Refusal::NoSuchPath),
    }
}

fn key_of_segment(segment: &str) -> Result<Question, Refusal> {
    let key = percent_decode_str(segment).decode_utf8().map_err(|_| Refusal::BadKey)?;
    usable(Question::One(key.into_owned()))
}

async fn read_body(body: Incoming) -> Result<Question, Refusal> {
    let bytes = Limited::new(body, LARGEST_BODY)
        .collect()
        .await
        .map_err(|error| {
            if error.is::<LengthLimitError>() { Refusal::BodyTooLarge } else { Refusal::BodyIncomplete }
        })?
        .to_bytes();
    usable(match serde_json::from_slice(&bytes) {
        Ok(Body::Many { keys }) => Question::Many(keys),
        Ok(Body::One { key }) => Question::One(key),
        Err(_) => return Err(Refusal::BadBody),
    })
}

/// No system has an empty key; one that arrives was lost on the way.
fn usable(question: Question) -> Result<Question, Refusal> {
    let empty = match &question {
        Question::One(key) => key.is_empty(),
        Question::Many(keys) => keys.iter().any(String::is_empty),
    };
    if empty { Err(Refusal::BadKey) } else { Ok(question) }
}

fn too_many_requests(seconds: u64) -> Answer {
    let mut answer = json_answer(StatusCode::TOO_MANY_REQUESTS, &json!({"code": "TOO_MANY_REQUESTS"}));
    answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    answer
}

fn json_answer(status: StatusCode, body: &Value) -> Answer {
    respond_with(status, JSON, body.to_string())
}

fn respond_with(status: StatusCode, content_type: HeaderValue, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, content_type);
    answer
}
