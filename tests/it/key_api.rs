//! Key APIs that do as a test tells them, faults on the wire included.
//!
//! Each runs on a thread of its own, so that a busy test delays no answer.

use std::collections::HashMap;
use std::fmt;
use std::future::{pending, poll_fn};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::http::request;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Where single keys are asked for; the key follows, percent-encoded.
const PATH: &str = "/v1/keys/";
/// Where many keys at once are asked for, by `{"keys": […]}`.
const BATCH_PATH: &str = "/v1/keys";

/// A sleep of a millisecond that takes longer than this is a stall.
const LONGEST_SLEEP: Duration = Duration::from_millis(8);

/// A call as it arrived.
#[derive(Debug, Clone)]
pub struct Call {
    /// Calls before this one.
    pub number: usize,
    /// Calls for the same key before this one.
    pub attempt: usize,
    /// The key, decoded; of a batch the first one.
    pub key: String,
    /// All keys that are asked for, in their order.
    pub keys: Vec<String>,
    /// Path and query as they came over the wire.
    pub target: String,
    pub headers: HashMap<String, String>,
    pub at: Instant,
}

/// What to do with a call.
pub struct Reply {
    after: Duration,
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    fault: Option<Fault>,
}

/// What can go wrong on the wire.
#[derive(Clone, Copy)]
enum Fault {
    /// Never answers.
    Hang,
    /// Resets the connection.
    Reset,
    /// Closes the connection in the middle of the body.
    CutOff,
    /// Sends half of the body and keeps the connection open.
    HangInBody,
    /// Sends so many bytes after the body.
    Endless(usize),
}

impl Reply {
    pub fn new(status: u16, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        let headers = vec![("content-type", content_type.to_owned())];
        Self { after: Duration::ZERO, status, headers, body: body.into(), fault: None }
    }

    pub fn json(status: u16, body: Value) -> Self {
        Self::new(status, "application/json", body.to_string())
    }

    pub fn html(status: u16) -> Self {
        Self::new(status, "text/html", "<html><body>We will be back soon</body></html>")
    }

    pub fn empty(status: u16) -> Self {
        Self::new(status, "text/plain", "")
    }

    /// The new key `N-<key>`.
    pub fn found(call: &Call) -> Self {
        Self::key(call, &format!("N-{}", call.key))
    }

    pub fn key(call: &Call, new_key: &str) -> Self {
        Self::json(200, json!({"legacyKey": call.key, "newKey": new_key}))
    }

    /// Every key of a batch has the new key `N-<key>`.
    pub fn found_all(call: &Call) -> Self {
        Self::items(call.keys.iter().map(|key| Self::item(key)))
    }

    /// What says that a key of a batch has the new key `N-<key>`.
    pub fn item(key: &str) -> Value {
        json!({"legacyKey": key, "newKey": format!("N-{key}")})
    }

    /// The answer to a batch.
    pub fn items(items: impl IntoIterator<Item = Value>) -> Self {
        let items: Vec<Value> = items.into_iter().collect();
        Self::json(200, json!({ "items": items }))
    }

    pub fn not_found() -> Self {
        Self::json(404, json!({"code": "NO_KEY"}))
    }

    pub fn hang() -> Self {
        Self { fault: Some(Fault::Hang), ..Self::empty(200) }
    }

    pub fn reset() -> Self {
        Self { fault: Some(Fault::Reset), ..Self::empty(200) }
    }

    /// This answer, but the connection is closed before its end.
    pub fn cut_off(self) -> Self {
        Self { fault: Some(Fault::CutOff), ..self }
    }

    /// This answer, but it never comes to its end.
    pub fn hang_in_body(self) -> Self {
        Self { fault: Some(Fault::HangInBody), ..self }
    }

    /// This answer with so many further bytes.
    pub fn followed_by(self, bytes: usize) -> Self {
        Self { fault: Some(Fault::Endless(bytes)), ..self }
    }

    pub fn after(self, after: Duration) -> Self {
        Self { after, ..self }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

type Behaviour = Arc<dyn Fn(&Call) -> Reply + Send + Sync>;

/// A running key API. Dropping it ends it.
pub struct KeyApi {
    address: SocketAddr,
    shared: Arc<Shared>,
    up: watch::Sender<bool>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    behaviour: Mutex<Behaviour>,
    calls: Mutex<Vec<Call>>,
    attempts: Mutex<HashMap<String, usize>>,
    in_flight: AtomicUsize,
    most_in_flight: AtomicUsize,
    stalls: Mutex<Vec<(Instant, Instant)>>,
    /// Bytes that followed answers.
    surplus: AtomicUsize,
}

impl KeyApi {
    pub fn start(behaviour: impl Fn(&Call) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a socket for tokio");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            behaviour: Mutex::new(Arc::new(behaviour)),
            calls: Mutex::default(),
            attempts: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            most_in_flight: AtomicUsize::new(0),
            stalls: Mutex::default(),
            surplus: AtomicUsize::new(0),
        });
        let (up, is_up) = watch::channel(true);
        let stop = CancellationToken::new();
        let (seen, until) = (Arc::clone(&shared), stop.clone());
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(until.run_until_cancelled(serve(listener, is_up, seen)));
        });
        Self { address, shared, up, stop, thread: Some(thread) }
    }

    /// Answers every call with the key `N-<legacy key>`.
    pub fn finding() -> Self {
        Self::start(Reply::found)
    }

    /// Behaves differently from here on.
    pub fn change(&self, behaviour: impl Fn(&Call) -> Reply + Send + Sync + 'static) {
        *locked(&self.shared.behaviour) = Arc::new(behaviour);
    }

    /// Cuts all connections and refuses new ones; its port stays its own.
    pub fn go_down(&self) {
        self.up.send_replace(false);
        self.wait_until_reachable(false);
    }

    pub fn come_back(&self) {
        self.up.send_replace(true);
        self.wait_until_reachable(true);
    }

    fn wait_until_reachable(&self, wanted: bool) {
        let given_up = Instant::now() + Duration::from_secs(10);
        while std::net::TcpStream::connect(self.address).is_ok() != wanted {
            assert!(Instant::now() < given_up, "the key API does not change");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL for a config.
    pub fn key_url(&self) -> String {
        format!("http://{}{PATH}{{key}}", self.address)
    }

    /// The same for a config with batches.
    pub fn batch_url(&self) -> String {
        format!("http://{}{BATCH_PATH}", self.address)
    }

    /// All calls that arrived so far, in their order.
    pub fn calls(&self) -> Vec<Call> {
        locked(&self.shared.calls).clone()
    }

    pub fn count(&self) -> usize {
        locked(&self.shared.calls).len()
    }

    /// How often each key was asked for.
    pub fn asked(&self) -> HashMap<String, usize> {
        locked(&self.shared.attempts).clone()
    }

    /// From when to when this machine was too busy to note the arrival of a call in time.
    pub fn stalls(&self) -> Vec<(Instant, Instant)> {
        locked(&self.shared.stalls).clone()
    }

    /// How many bytes were taken off the answers that are followed by more than belongs to them.
    pub fn surplus(&self) -> usize {
        self.shared.surplus.load(Ordering::SeqCst)
    }

    /// The most calls that were under way at once.
    pub fn most_in_flight(&self) -> usize {
        self.shared.most_in_flight.load(Ordering::SeqCst)
    }
}

impl Drop for KeyApi {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.expect("the key API did not panic");
            }
        }
    }
}

async fn serve(listener: TcpListener, mut up: watch::Receiver<bool>, shared: Arc<Shared>) {
    let address = listener.local_addr().expect("an address");
    let mut listener = tokio::net::TcpListener::from_std(listener).expect("a runtime");
    tokio::spawn(watch_for_stalls(Arc::clone(&shared)));
    loop {
        let mut conversations = JoinSet::new();
        let accept = async {
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                conversations.spawn(converse(stream, Arc::clone(&shared)));
            }
        };
        tokio::select! {
            () = accept => {}
            change = up.wait_for(|up| !*up) => drop(change.expect("the key API")),
        }
        conversations.shutdown().await;
        drop(listener);
        // Bound without listening: nobody else gets the port, and connections are refused.
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("an option");
        socket.bind(address).expect("the port is still free");
        up.wait_for(|up| *up).await.expect("the key API");
        listener = socket.listen(1024).expect("a port of our own");
    }
}

/// Sleeps on the thread that notes calls: where it wakes up late, so do they.
async fn watch_for_stalls(shared: Arc<Shared>) {
    loop {
        let before = Instant::now();
        tokio::time::sleep(Duration::from_millis(1)).await;
        if before.elapsed() > LONGEST_SLEEP {
            locked(&shared.stalls).push((before, Instant::now()));
        }
    }
}

async fn converse(stream: TcpStream, shared: Arc<Shared>) {
    stream.set_nodelay(true).expect("a TCP socket");
    let service = service_fn(move |request| {
        let shared = Arc::clone(&shared);
        Box::pin(async move { answer(&shared, request).await })
    });
    let mut connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let ended = poll_fn(|context| connection.poll_without_shutdown(context)).await;
    let wants_reset = |error: hyper::Error| {
        std::error::Error::source(&error).is_some_and(<dyn std::error::Error>::is::<ResetConnection>)
    };
    if ended.is_err_and(wants_reset) {
        connection.into_parts().io.into_inner().set_zero_linger().expect("a TCP socket");
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

impl std::error::Error for ResetConnection {}

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, io::Error>;
type Parts = Pin<Box<dyn Stream<Item = io::Result<Frame<Bytes>>> + Send>>;

async fn answer(shared: &Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, ResetConnection> {
    let at = Instant::now();
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| ResetConnection)?.to_bytes();
    let call = shared.note(&head, &body, at);
    let _open = Open::enter(shared);
    let behaviour = Arc::clone(&locked(&shared.behaviour));
    let reply = behaviour(&call);
    if !reply.after.is_zero() {
        tokio::time::sleep(reply.after).await;
    }
    let mut response = Response::builder().status(reply.status);
    for (name, value) in reply.headers {
        response = response.header(name, value);
    }
    let length = reply.body.len();
    let half = part(reply.body[..length / 2].to_vec());
    let parts: Parts = match reply.fault {
        Some(Fault::Hang) => pending().await,
        Some(Fault::Reset) => return Err(ResetConnection),
        Some(Fault::CutOff) => Box::pin(half.chain(stream::iter([Err(io::Error::other("cut off"))]))),
        Some(Fault::HangInBody) => Box::pin(half.chain(stream::pending())),
        Some(Fault::Endless(bytes)) => Box::pin(part(reply.body).chain(padding(bytes, Arc::clone(shared)))),
        None => Box::pin(part(reply.body)),
    };
    if !matches!(reply.fault, Some(Fault::Endless(_))) {
        response = response.header("content-length", length);
    }
    Ok(response.body(BodyExt::boxed_unsync(StreamBody::new(parts))).expect("a valid answer"))
}

fn part(bytes: Vec<u8>) -> impl Stream<Item = io::Result<Frame<Bytes>>> + Send {
    stream::iter([Ok(Frame::data(bytes.into()))])
}

/// Bytes that are made and counted when they are taken.
fn padding(bytes: usize, shared: Arc<Shared>) -> impl Stream<Item = io::Result<Frame<Bytes>>> + Send {
    const PIECE: &[u8] = &[b' '; 64 * 1024];
    stream::iter(0..bytes / PIECE.len()).map(move |_| {
        shared.surplus.fetch_add(PIECE.len(), Ordering::SeqCst);
        Ok(Frame::data(Bytes::from_static(PIECE)))
    })
}

impl Shared {
    fn note(&self, request: &request::Parts, body: &[u8], at: Instant) -> Call {
        let target = request.uri.to_string();
        let keys = asked_for(request, body);
        let headers = request
            .headers
            .iter()
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect();
        let key = keys.first().cloned().unwrap_or_default();
        let attempt = {
            let mut attempts = locked(&self.attempts);
            let before = attempts.get(&key).copied().unwrap_or_default();
            keys.iter().for_each(|key| *attempts.entry(key.clone()).or_default() += 1);
            before
        };
        let mut calls = locked(&self.calls);
        let call = Call { number: calls.len(), attempt, key, keys, target, headers, at };
        calls.push(call.clone());
        call
    }
}

fn asked_for(request: &request::Parts, body: &[u8]) -> Vec<String> {
    if request.method == Method::POST && request.uri.path() == BATCH_PATH {
        let body: Value = serde_json::from_slice(body).expect("a batch is JSON");
        return serde_json::from_value(body["keys"].clone()).expect("an array of texts");
    }
    let segment = request.uri.path().strip_prefix(PATH).unwrap_or_default();
    vec![percent_decode_str(segment).decode_utf8().expect("a key in UTF-8").into_owned()]
}

/// Counts a call for as long as it is under way, however it ends.
struct Open<'a>(&'a Shared);

impl<'a> Open<'a> {
    fn enter(shared: &'a Shared) -> Self {
        let now = shared.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        shared.most_in_flight.fetch_max(now, Ordering::SeqCst);
        Self(shared)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic while it was locked")
}
