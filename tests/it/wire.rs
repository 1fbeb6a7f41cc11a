//! Servers for what lies below a key API: TLS, proxies, answers without an end.
//!
//! They run in the runtime of their test and end with it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use serde_json::json;
use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Path and query; the whole URL where a proxy is asked.
    pub target: String,
    pub proxy_authorization: Option<String>,
    pub body: Bytes,
}

/// Status and body.
pub type Answer = (u16, Vec<u8>);
type Handler = Arc<dyn Fn(&Seen) -> Answer + Send + Sync>;

/// An HTTP server, with or without TLS. Dropping it ends it.
pub struct Server {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    accepting: JoinHandle<()>,
}

impl Server {
    pub async fn start(
        tls: Option<ServerConfig>,
        handler: impl Fn(&Seen) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let acceptor = tls.map(|config| TlsAcceptor::from(Arc::new(config)));
        let accepting = tokio::spawn(accept(listener, acceptor, Arc::new(handler), Arc::clone(&seen)));
        Self { address, seen, accepting }
    }

    /// Finds a key for every key that the last segment of a path names.
    pub async fn finding(tls: Option<ServerConfig>) -> Self {
        Self::start(tls, |seen| {
            let segment = seen.target.rsplit('/').next().unwrap_or_default();
            let key = percent_decode_str(segment).decode_utf8().expect("UTF-8");
            (200, json!({"legacyKey": key, "newKey": format!("N-{key}")}).to_string().into_bytes())
        })
        .await
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no panic").clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    handler: Handler,
    seen: Arc<Mutex<Vec<Seen>>>,
) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.expect("a connection");
        let (acceptor, handler, seen) = (acceptor.clone(), Arc::clone(&handler), Arc::clone(&seen));
        connections.spawn(async move {
            match acceptor {
                None => converse(stream, handler, seen).await,
                // A client that does not trust us ends the handshake, as it should.
                Some(acceptor) => {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        converse(stream, handler, seen).await;
                    }
                }
            }
        });
    }
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    handler: Handler,
    seen: Arc<Mutex<Vec<Seen>>>,
) {
    let service = service_fn(|request: Request<Incoming>| {
        let (handler, seen) = (Arc::clone(&handler), Arc::clone(&seen));
        async move {
            let header = request.headers().get("proxy-authorization");
            let proxy_authorization = header.map(|value| value.to_str().expect("text").to_owned());
            let target = request.uri().to_string();
            let body = request.into_body().collect().await?.to_bytes();
            let request = Seen { target, proxy_authorization, body };
            let (status, body) = handler(&request);
            seen.lock().expect("no panic").push(request);
            let answer = Response::builder().status(status).header("location", "/again");
            Ok::<_, hyper::Error>(answer.body(Full::<Bytes>::from(body)).expect("a valid answer"))
        }
    });
    // A client that goes away in the middle is no matter of the server.
    let _ended = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

/// A certificate authority of one test.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its private key, as PEM.
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("a certificate"))
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for a host name or an address.
    pub fn issue(&self, name: &str) -> Identity {
        let params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        Identity { certificate: certificate.pem(), key: key.serialize_pem() }
    }

    /// TLS for a server of this name; with `clients`, only for those that it certified.
    pub fn server(&self, name: &str, clients: Option<&Self>) -> ServerConfig {
        let Identity { certificate, key } = self.issue(name);
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .expect("versions");
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots.add(authority.0.der().clone()).expect("a root");
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().expect("a verifier"))
            }
        };
        builder.with_single_cert(vec![certificate], key).expect("a server")
    }
}

/// A proxy that makes tunnels (CONNECT) and counts them; with `password`, only for those who know
/// it. Dropping it ends it.
pub struct TunnelProxy {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    accepting: JoinHandle<()>,
}

impl TunnelProxy {
    pub async fn start(authorization: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        let accepting = tokio::spawn(async move {
            let mut tunnels = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                let log = Arc::clone(&log);
                tunnels.spawn(async move {
                    // Either side may go away at any moment.
                    let _ended = tunnel(stream, authorization, &log).await;
                });
            }
        });
        Self { address, requests, accepting }
    }

    /// The first lines of all requests.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("no panic").clone()
    }
}

impl Drop for TunnelProxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn tunnel(
    stream: TcpStream,
    authorization: Option<&str>,
    log: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut client = BufReader::new(stream);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if client.read_line(&mut line).await? == 0 || line == "\r\n" {
            break;
        }
        head.push(line.trim_end().to_owned());
    }
    let request = head.first().cloned().unwrap_or_default();
    let goal = request.split(' ').nth(1).unwrap_or_default().to_owned();
    log.lock().expect("no panic").push(request);
    let expected = authorization.map(|value| format!("proxy-authorization: {value}"));
    if expected.is_some_and(|expected| !head.iter().any(|line| line.eq_ignore_ascii_case(&expected))) {
        let refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n";
        return client.get_mut().write_all(refusal).await;
    }
    let mut server = TcpStream::connect(goal).await?;
    client.get_mut().write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await.map(drop)
}

/// Begins an answer of 200 and never ends it. Dropping it ends it.
pub struct Endless {
    pub address: SocketAddr,
    sent: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl Endless {
    /// Sends `part` again and again, `pause` apart.
    pub async fn start(part: Vec<u8>, pause: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let sent = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&sent);
        let accepting = tokio::spawn(async move {
            let mut streams = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                let (part, count) = (part.clone(), Arc::clone(&count));
                streams.spawn(async move {
                    // Ends when the client goes away.
                    let _ended = stream_on(stream, &part, pause, &count).await;
                });
            }
        });
        Self { address, sent, accepting }
    }

    /// Bytes of bodies that clients, and the buffers on the way to them, took.
    pub fn sent(&self) -> usize {
        self.sent.load(Ordering::SeqCst)
    }
}

impl Drop for Endless {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn stream_on(
    mut stream: TcpStream,
    part: &[u8],
    pause: Duration,
    count: &AtomicUsize,
) -> std::io::Result<()> {
    let mut request = [0; 4096];
    let _begun = stream.read(&mut request).await?;
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n").await?;
    loop {
        stream.write_all(part).await?;
        count.fetch_add(part.len(), Ordering::SeqCst);
        tokio::time::sleep(pause).await;
    }
}
