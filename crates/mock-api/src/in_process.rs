//! The rehearsal API inside a test: no process to start, no port to choose.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::behaviour::Behaviour;
use crate::log::{Call, CallLog, Summary};
use crate::server::serve;

/// A running rehearsal API. Dropping it stops it too, without waiting.
pub struct MockApi {
    address: SocketAddr,
    log: Arc<CallLog>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<io::Result<Summary>>,
}

impl MockApi {
    /// Starts on a free port of 127.0.0.1, in the runtime of the caller.
    ///
    /// # Errors
    ///
    /// When no port can be had.
    pub async fn start(behaviour: Behaviour) -> io::Result<Self> {
        Self::start_on((Ipv4Addr::LOCALHOST, 0).into(), behaviour).await
    }

    /// Starts on `address`, for one that comes back after an outage where it was before.
    ///
    /// # Errors
    ///
    /// When the address can't be had.
    pub async fn start_on(address: SocketAddr, behaviour: Behaviour) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let log = Arc::new(CallLog::in_memory());
        let (stop, stopped) = oneshot::channel();
        // Resolves as well when the sender is dropped, which is a request to stop too.
        let shutdown = async move {
            let _ = stopped.await;
        };
        let server = tokio::spawn(serve(listener, behaviour, Arc::clone(&log), shutdown));
        Ok(Self { address, log, stop, server })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL for batches, and for keys in a body: `http://127.0.0.1:PORT/v1/keys`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}/v1/keys", self.address)
    }

    /// The URL for single keys, as the configuration takes it: `http://127.0.0.1:PORT/v1/keys/{key}`.
    #[must_use]
    pub fn key_url(&self) -> String {
        format!("{}/{{key}}", self.url())
    }

    /// The calls that ended so far, in the order in which they ended: a client that has its answer
    /// finds its call here.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.log.calls()
    }

    /// Counts of the calls that ended so far.
    #[must_use]
    pub fn summary(&self) -> Summary {
        self.log.summary()
    }

    /// Cuts all connections, frees the port and gives back the log, calls cut off included.
    ///
    /// # Errors
    ///
    /// When the server had failed before.
    pub async fn stop(self) -> io::Result<Vec<Call>> {
        let _ = self.stop.send(());
        self.server.await.map_err(io::Error::other)??;
        Ok(self.log.calls())
    }
}
