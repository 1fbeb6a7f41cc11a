//! A network that lies: it stands between the program and a server, and holds commands back, delivers
//! them late or twice, loses answers, breaks connections, or lets nothing through for a while.
//!
//! Nothing of the server is imitated: whatever arrives is carried out by a real one, and its answer
//! is a real answer.

mod frame;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bson::Document;
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};

pub use frame::Command;
use frame::Frame;

/// Nothing that is waited for takes this long.
const LIMIT: Duration = Duration::from_secs(60);

/// The network. Dropping it ends it with all its connections.
pub struct Network {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

/// Which command is meant: the one after so many that match.
pub struct Rule {
    matches: Box<dyn Fn(&Command) -> bool + Send + Sync>,
    skip: usize,
}

/// A command that is held back, or is to be.
pub struct Held {
    server: SocketAddr,
    arrivals: mpsc::Receiver<Arrival>,
    arrived: Option<Arrival>,
}

/// A command that does not get through, in the hands of whoever holds it.
struct Arrival {
    frame: Frame,
    command: Command,
    /// Sent on over its own connection; the server's answer comes back.
    release: oneshot::Sender<oneshot::Sender<Document>>,
}

struct Shared {
    server: SocketAddr,
    rules: Mutex<Vec<(Rule, Act)>>,
    /// Whether nothing gets through in any direction.
    frozen: watch::Sender<bool>,
    /// How long each message takes longer.
    delay: watch::Sender<Duration>,
    log: Mutex<Vec<String>>,
}

#[derive(Clone)]
enum Act {
    Hold(mpsc::Sender<Arrival>),
    LoseReply,
    Break,
}

/// What one connection awaits: answers by the number of the message, and what is to be done with them.
#[derive(Default)]
struct Awaited {
    told: HashMap<i32, oneshot::Sender<Document>>,
    lost: Option<i32>,
}

impl Rule {
    /// The first command.
    pub fn any() -> Self {
        Self { matches: Box::new(|_| true), skip: 0 }
    }

    /// The first command of that name.
    pub fn on(name: &'static str) -> Self {
        Self::any().that(move |command| command.name == name)
    }

    /// Only those that meet a further condition.
    pub fn that(self, condition: impl Fn(&Command) -> bool + Send + Sync + 'static) -> Self {
        let matches = self.matches;
        Self { matches: Box::new(move |command| matches(command) && condition(command)), skip: self.skip }
    }

    /// Only those of a collection, by the beginning of its name.
    pub fn of(self, collection: &'static str) -> Self {
        self.that(move |command| command.collection().starts_with(collection))
    }

    /// Not the first so many.
    pub fn after(self, skip: usize) -> Self {
        Self { skip, ..self }
    }
}

impl Network {
    /// In front of the server of a URI, which has one member.
    pub async fn before(uri: &str) -> Self {
        let hosts = uri.strip_prefix("mongodb://").expect("a plain URI");
        let host = hosts.split(['/', '?']).next().expect("a host");
        let server = host.replace("localhost", "127.0.0.1").parse();
        let server: SocketAddr = server.expect("the address of one member");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            server,
            rules: Mutex::default(),
            frozen: watch::Sender::new(false),
            delay: watch::Sender::new(Duration::ZERO),
            log: Mutex::default(),
        });
        let accepting = tokio::spawn(accept(listener, shared.clone()));
        Self { address, shared, accepting }
    }

    /// The way to the server through this network.
    pub fn uri(&self) -> String {
        format!("mongodb://{}/?directConnection=true", self.address)
    }

    /// Holds a command back, once.
    pub fn hold(&self, rule: Rule) -> Held {
        let (sender, arrivals) = mpsc::channel(1);
        self.add(rule, Act::Hold(sender));
        Held { server: self.shared.server, arrivals, arrived: None }
    }

    /// Lets the server carry a command out, and closes the connection instead of its answer, once.
    pub fn lose_reply(&self, rule: Rule) {
        self.add(rule, Act::LoseReply);
    }

    /// Closes the connection on which a command is sent, and does not deliver it, once.
    pub fn break_at(&self, rule: Rule) {
        self.add(rule, Act::Break);
    }

    /// Lets nothing through any more; connections stay open.
    pub fn freeze(&self) {
        self.shared.frozen.send_replace(true);
    }

    /// Lets everything through that has come meanwhile.
    pub fn thaw(&self) {
        self.shared.frozen.send_replace(false);
    }

    /// Lets each message take so much longer.
    pub fn slow_down(&self, delay: Duration) {
        self.shared.delay.send_replace(delay);
    }

    /// What was sent so far, for whoever looks for the reason of a failure.
    pub fn log(&self) -> Vec<String> {
        self.shared.log.lock().expect("no panic").clone()
    }

    /// Whether all that was to happen has happened.
    pub fn is_done(&self) -> bool {
        self.shared.rules.lock().expect("no panic").is_empty()
    }

    fn add(&self, rule: Rule, act: Act) {
        self.shared.rules.lock().expect("no panic").push((rule, act));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Held {
    /// Waits until the command has come; returns it.
    pub async fn arrived(&mut self) -> Command {
        if self.arrived.is_none() {
            let arrival = tokio::time::timeout(LIMIT, self.arrivals.recv()).await;
            self.arrived = Some(arrival.expect("the command comes").expect("the network is there"));
        }
        self.arrived.as_ref().expect("it has come").command.clone()
    }

    /// Delivers it over its own connection, which the client may have left; returns the server's answer.
    pub async fn release(mut self) -> Document {
        self.arrived().await;
        let (sender, answer) = oneshot::channel();
        let arrival = self.arrived.take().expect("it has come");
        assert!(arrival.release.send(sender).is_ok(), "its connection to the server is there");
        let answer = tokio::time::timeout(LIMIT, answer).await.expect("an answer in time");
        answer.expect("an answer")
    }

    /// Delivers a copy of it over a connection of its own; returns the server's answer.
    pub async fn deliver_copy(&mut self) -> Document {
        self.arrived().await;
        let frame = self.arrived.as_ref().expect("it has come").frame.clone();
        let asking = async {
            let mut server = TcpStream::connect(self.server).await?;
            server.write_all(frame.bytes()).await?;
            Frame::read(&mut server).await
        };
        let answer = tokio::time::timeout(LIMIT, asking).await.expect("an answer in time");
        let answer = answer.expect("a connection").expect("an answer");
        answer.command().expect("an answer in plain BSON").body
    }
}

impl Shared {
    /// What is to be done with a command: that of the first rule that it meets, which is over then.
    fn act(&self, command: &Command) -> Option<Act> {
        self.log.lock().expect("no panic").push(format!("{} {}", command.name, command.collection()));
        let mut rules = self.rules.lock().expect("no panic");
        let mut found = None;
        for (index, (rule, _)) in rules.iter_mut().enumerate() {
            if !(rule.matches)(command) {
                continue;
            }
            if rule.skip == 0 {
                found = Some(index);
                break;
            }
            rule.skip -= 1;
        }
        found.map(|index| rules.remove(index).1)
    }

    async fn let_through(&self) {
        let delay = *self.delay.borrow();
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let mut frozen = self.frozen.subscribe();
        // The sender lives as long as this.
        let _thawed = frozen.wait_for(|frozen| !frozen).await;
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let (client, _) = listener.accept().await.expect("a connection");
        let shared = shared.clone();
        connections.spawn(async move {
            // Either side may go away at any moment.
            let _ended = connect(client, &shared).await;
        });
    }
}

/// Ends when one of the sides does, or the network breaks the connection; a command that is held back
/// keeps the server's side open, so that it is delivered although the client is gone.
async fn connect(client: TcpStream, shared: &Shared) -> io::Result<()> {
    let server = TcpStream::connect(shared.server).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    let awaited = Mutex::default();
    tokio::select! {
        ended = forward(from_client, to_server, shared, &awaited) => ended,
        ended = answer(from_server, to_client, shared, &awaited) => ended,
    }
}

async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    shared: &Shared,
    awaited: &Mutex<Awaited>,
) -> io::Result<()> {
    while let Ok(Some(frame)) = Frame::read(&mut from).await {
        shared.let_through().await;
        let command = frame.command();
        match command.as_ref().and_then(|command| shared.act(command)) {
            None => {}
            Some(Act::Break) => return Ok(()),
            Some(Act::LoseReply) => awaited.lock().expect("no panic").lost = Some(frame.id()),
            Some(Act::Hold(holder)) => {
                let command = command.expect("a rule is about commands");
                if let Some(told) = held(&holder, &frame, command).await {
                    awaited.lock().expect("no panic").told.insert(frame.id(), told);
                }
            }
        }
        to.write_all(frame.bytes()).await?;
    }
    // The client is gone; whoever has released a command of it waits for the answer.
    while !awaited.lock().expect("no panic").told.is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Waits until it is released, and never ends where it never is.
async fn held(
    holder: &mpsc::Sender<Arrival>,
    frame: &Frame,
    command: Command,
) -> Option<oneshot::Sender<Document>> {
    let (release, released) = oneshot::channel();
    let arrival = Arrival { frame: frame.clone(), command, release };
    if holder.try_send(arrival).is_err() {
        return None;
    }
    match released.await {
        Ok(told) => Some(told),
        Err(_) => std::future::pending().await,
    }
}

async fn answer(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    shared: &Shared,
    awaited: &Mutex<Awaited>,
) -> io::Result<()> {
    while let Some(frame) = Frame::read(&mut from).await? {
        let (told, is_lost) = {
            let mut awaited = awaited.lock().expect("no panic");
            (awaited.told.remove(&frame.answers()), awaited.lost == Some(frame.answers()))
        };
        if let Some(told) = told {
            // Whoever asked may not wait for it.
            let _unheard = told.send(frame.command().map(|command| command.body).unwrap_or_default());
        }
        if is_lost {
            return Ok(());
        }
        shared.let_through().await;
        // Where the client is gone, the other direction notices.
        let _gone = to.write_all(frame.bytes()).await;
    }
    Ok(())
}
