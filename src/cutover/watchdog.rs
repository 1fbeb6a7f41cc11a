//! A process beside the cutover that lets writes through again should the
//! cutover die while it holds them off: a kill leaves no time to clean up.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use bson::{Bson, Document};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::orphan::{self, Orphan};
use super::record::Record;
use super::recover::recover;
use crate::config::values::Secret;
use crate::error::{Class, Error, Result, joined};
use crate::job::store;
use crate::mongo::Mongo;
use crate::report::outcome::Outcome;

/// The name of the command, which nobody is to type.
pub const COMMAND: &str = "fence-watchdog";
/// What the parent says when there is no fence any more.
const DONE: &str = "done";
/// What the watchdog says when it is watching.
const READY: &str = "ready";
/// What the parent says before it holds writes off, with the pause that is allowed.
const HOLDING: &str = "holding";
/// What the parent says when writes go on and it has something left to do.
const RESTING: &str = "resting";
/// When writes are held off for so much longer than is allowed, they are let through: whatever the
/// parent is about to do, it can't be done any more.
const LATE: Duration = Duration::from_secs(1);
/// A parent that goes on for so much longer after that hangs, and is ended.
const GRACE: Duration = Duration::from_secs(30);
/// Between attempts to recover, while the database can't be reached.
const RETRY: Duration = Duration::from_secs(2);
/// How long it waits for the end of a parent that it has killed.
const ENDING: Duration = Duration::from_secs(2);
/// How long it tries, besides twice the pause that is allowed.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it goes on trying when it is asked to end.
const LEAVING: Duration = Duration::from_secs(3);

/// What the watchdog is told; by a pipe, because others can read arguments.
#[derive(Serialize, Deserialize)]
struct Duty {
    uri: String,
    /// What the fence says too, in Extended JSON: with it no job and no state database are needed.
    about: serde_json::Value,
    parent: u32,
}

/// The watchdog, seen from its parent.
#[derive(Debug)]
pub struct Watchdog {
    child: Child,
    line: ChildStdin,
}

impl Watchdog {
    /// Starts one for an exchange, which [`Record::about`] describes; returns when it is watching.
    ///
    /// # Errors
    /// A refusal where it can't be started.
    pub async fn start(uri: &Secret, about: &Document) -> Result<Self> {
        let duty = Duty {
            uri: uri.expose().to_owned(),
            about: Bson::Document(about.clone()).into_canonical_extjson(),
            parent: std::process::id(),
        };
        joined(tokio::task::spawn_blocking(move || spawn(&duty)).await)?
            .map_err(|error| Error::refused(format!("the watchdog of the cutover can't be started: {error}")))
    }

    /// Tells it that writes are about to be held off, for that long: its clock starts.
    ///
    /// # Errors
    /// A stop where it is gone: nobody would let writes through.
    pub fn begin(&mut self, max_pause: Duration) -> Result<()> {
        writeln!(self.line, "{HOLDING} {}", max_pause.as_millis())
            .map_err(|error| Error::stopped(format!("the watchdog of the cutover is gone: {error}")))
    }

    /// Tells it that writes go on, and that there is something left to do: its clock stops.
    pub fn rest(&mut self) {
        // It may have gone by itself.
        let _gone = writeln!(self.line, "{RESTING}");
    }

    /// Leaves the fence to it, if there is one: this process could not tell or could
    /// not lift it.
    pub fn leave(self) {
        drop(self.line);
    }

    /// Lets it go home: there is no fence any more.
    pub async fn dismiss(mut self) {
        let gone = tokio::task::spawn_blocking(move || {
            // It may have gone by itself.
            let _gone = writeln!(self.line, "{DONE}");
            drop(self.line);
            let _collected = self.child.wait();
        });
        let _joined = gone.await;
    }
}

fn spawn(duty: &Duty) -> std::io::Result<Watchdog> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg(COMMAND)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // A Ctrl-C at the terminal is for its parent.
        .process_group(0)
        .spawn()?;
    let (Some(mut line), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(std::io::Error::other("it has no pipes"));
    };
    writeln!(line, "{}", serde_json::to_string(duty)?)?;
    let mut answer = String::new();
    BufReader::new(answers).read_line(&mut answer)?;
    if answer.trim() != READY {
        return Err(std::io::Error::other("it ended at once"));
    }
    Ok(Watchdog { child, line })
}

/// What the watchdog does: waits for the end of its parent.
///
/// # Errors
/// A usage error where somebody typed the command; a stop where the fence could
/// not be lifted.
pub async fn serve(stop: CancellationToken) -> Result<Outcome> {
    let not_for_people = || Error::usage(format!("`{COMMAND}` is started by `cutover`, not by people"));
    let line = joined(tokio::task::spawn_blocking(read_line).await)?;
    let duty: Duty = serde_json::from_str(&line).map_err(|_| not_for_people())?;
    let about = Bson::try_from(duty.about).ok().and_then(|about| about.as_document().cloned());
    let (about, exchange) = about
        .and_then(|about| Record::from_about(&about).map(|read| (about, read)))
        .ok_or_else(not_for_people)?;
    // Before it can be gone and its number another process's.
    let parent = handle_of(duty.parent);
    let mongo = Mongo::connect(&Secret::new(&duty.uri), &exchange.1).await?;
    crate::report::terminal::answer(READY);
    let mut watch = Watch { allowed: Duration::ZERO, stop };
    let (end, line) = watch.parent().await?;
    if end == End::Done {
        return Ok(quietly());
    }
    let lifted = watch.lift(&mongo, &about, (&exchange.0, &exchange.2)).await;
    if end == End::Late && tokio::time::timeout(GRACE, line).await.is_err() {
        self::end(parent.as_ref()).await;
    }
    lifted.map(|()| quietly())
}

/// How the watch ended.
#[derive(PartialEq)]
enum End {
    /// There is no fence any more.
    Done,
    /// The parent is gone.
    Gone,
    /// The parent holds writes off for too long.
    Late,
}

/// What the watchdog knows while it watches.
struct Watch {
    /// For how long the parent may hold writes off, by what it said.
    allowed: Duration,
    /// Asked to end.
    stop: CancellationToken,
}

impl Watch {
    /// Watches the parent. Before writes are held off it may take its time; then it may not. Returns
    /// also the next line, where it is still waited for.
    async fn parent(&mut self) -> Result<(End, JoinHandle<String>)> {
        let mut late_at: Option<Instant> = None;
        loop {
            let mut line = tokio::task::spawn_blocking(read_line);
            let late = async {
                match late_at {
                    Some(moment) => tokio::time::sleep_until(moment).await,
                    None => std::future::pending().await,
                }
            };
            let said = tokio::select! {
                said = &mut line => joined(said)?,
                () = late => return Ok((End::Late, line)),
                // Without a fence nobody needs it; the parent raises none without it.
                () = self.stop.cancelled(), if late_at.is_none() => return Ok((End::Done, line)),
            };
            let ended = tokio::spawn(std::future::ready(String::new()));
            match said.trim() {
                DONE => return Ok((End::Done, ended)),
                "" => return Ok((End::Gone, ended)),
                RESTING => late_at = None,
                word => {
                    self.allowed = allowed_by(word);
                    late_at = Some(Instant::now() + self.allowed + LATE);
                }
            }
        }
    }

    /// Lets writes through, and tries that for a while.
    async fn lift(&self, mongo: &Mongo, about: &Document, (job, record): (&str, &Record)) -> Result<()> {
        let given_up = Instant::now() + 2 * self.allowed + PATIENCE;
        let leaving = async {
            self.stop.cancelled().await;
            tokio::time::sleep(LEAVING).await;
        };
        let trying = async {
            loop {
                match lift(mongo, about, (job, record)).await {
                    // Writes go on, and the rest is for a person.
                    Err(error) if error.class() != Class::Unknown => tokio::time::sleep(RETRY).await,
                    result => return result,
                }
            }
        };
        let gone = || Error::stopped("the fence could not be lifted in time");
        tokio::select! {
            result = trying => result,
            () = tokio::time::sleep_until(given_up) => Err(gone()),
            () = leaving => Err(gone()),
        }
    }
}

/// For how long the parent may hold writes off, by what it said. Pure.
fn allowed_by(word: &str) -> Duration {
    let allowed = word.strip_prefix(HOLDING).and_then(|allowed| allowed.trim().parse().ok());
    Duration::from_millis(allowed.unwrap_or_default())
}

fn quietly() -> Outcome {
    Outcome::reached(serde_json::Value::Null, "")
}

fn read_line() -> String {
    let mut line = String::new();
    let _closed = std::io::stdin().lock().read_line(&mut line);
    line
}

/// A handle of the parent, by which no other process can be meant; `None` where it
/// is gone already.
fn handle_of(parent: u32) -> Option<OwnedFd> {
    let parent = Pid::from_raw(i32::try_from(parent).ok()?)?;
    pidfd_open(parent, PidfdFlags::empty()).ok()
}

/// Ends a parent that hangs, and waits until it is gone. That it can't exchange
/// names any more does not depend on this: recovering makes it impossible. It is
/// for the operator, who would see a command that never ends.
async fn end(parent: Option<&OwnedFd>) {
    let Some(parent) = parent else { return };
    let _gone = pidfd_send_signal(parent, Signal::KILL);
    let given_up = tokio::time::Instant::now() + ENDING;
    while !is_gone(parent) && tokio::time::Instant::now() < given_up {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whether a process is gone.
fn is_gone(process: &OwnedFd) -> bool {
    let mut handles = [PollFd::new(process, PollFlags::IN)];
    // The handle is readable once its process has ended.
    poll(&mut handles, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

async fn lift(mongo: &Mongo, about: &Document, (job, exchange): (&str, &Record)) -> Result<()> {
    let Some(stored) = store::find(mongo, job).await? else {
        return lift_orphan(mongo, about, exchange).await;
    };
    match Record::of(&stored)? {
        Some(record) if record.id == exchange.id && record.fence.is_some() => {
            // Who claims to be at it may be dead by now: looked at again until the fence is down.
            let state = recover(mongo, job, &record).await?;
            state.map(|_| ()).ok_or_else(|| Error::stopped("another process is lifting the fence"))
        }
        _ => Ok(()),
    }
}

/// The job is gone, with what it says of the exchange; the fence may stand all the same.
async fn lift_orphan(mongo: &Mongo, about: &Document, exchange: &Record) -> Result<()> {
    let found = orphan::find(mongo, &exchange.renames.live.database).await?;
    let ours = found.iter().any(|orphan| orphan.is_of(&exchange.id));
    match Orphan::of(about) {
        Some(orphan) if ours => orphan.lift(mongo).await.map(|_| ()),
        _ => Ok(()),
    }
}
