//! A process beside the cutover that lets writes through again should the
//! cutover die while it holds them off: a kill leaves no time to clean up.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use bson::Document;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

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
/// A parent that holds writes off for so much longer than is allowed hangs, and is
/// ended.
const GRACE: Duration = Duration::from_secs(30);
/// Between attempts to recover, while the database can't be reached.
const RETRY: Duration = Duration::from_secs(2);
/// How long it waits for the end of a parent that it has killed.
const ENDING: Duration = Duration::from_secs(2);
/// How long it tries.
const PATIENCE: Duration = Duration::from_secs(900);

/// What the watchdog is told; by a pipe, because others can read arguments.
#[derive(Serialize, Deserialize)]
struct Duty {
    uri: String,
    state_database: String,
    job: String,
    id: String,
    parent: u32,
}

/// The watchdog, seen from its parent.
#[derive(Debug)]
pub struct Watchdog {
    child: Child,
    line: ChildStdin,
}

impl Watchdog {
    /// Starts one for the exchange of that id; returns when it is watching.
    ///
    /// # Errors
    /// A refusal where it can't be started.
    pub async fn start(uri: &Secret, state_database: &str, job: &str, id: &str) -> Result<Self> {
        let duty = Duty {
            uri: uri.expose().to_owned(),
            state_database: state_database.to_owned(),
            job: job.to_owned(),
            id: id.to_owned(),
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
pub async fn serve() -> Result<Outcome> {
    let not_for_people = || Error::usage(format!("`{COMMAND}` is started by `cutover`, not by people"));
    let line = joined(tokio::task::spawn_blocking(read_line).await)?;
    let duty: Duty = serde_json::from_str(&line).map_err(|_| not_for_people())?;
    // Before it can be gone and its number another process's.
    let parent = handle_of(duty.parent);
    let mongo = Mongo::connect(&Secret::new(&duty.uri), &duty.state_database).await?;
    crate::report::terminal::answer(READY);
    if watch(parent).await? == End::Done {
        return Ok(quietly());
    }
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match lift(&mongo, &duty).await {
            Ok(()) => return Ok(quietly()),
            // Writes go on, and the rest is for a person.
            Err(error) if error.class() == Class::Unknown || tokio::time::Instant::now() > deadline => {
                return Err(error);
            }
            Err(_) => tokio::time::sleep(RETRY).await,
        }
    }
}

/// How the watch ended.
#[derive(PartialEq)]
enum End {
    /// There is no fence any more.
    Done,
    /// The parent is gone.
    Gone,
}

/// Watches the parent. Before writes are held off it may take its time; then it
/// may not, and is ended.
async fn watch(parent: Option<OwnedFd>) -> Result<End> {
    let mut longest = None;
    loop {
        let line = tokio::task::spawn_blocking(read_line);
        let line = match longest {
            None => joined(line.await)?,
            Some(longest) => {
                let Ok(line) = tokio::time::timeout(longest, line).await else {
                    end(parent.as_ref()).await;
                    return Ok(End::Gone);
                };
                joined(line)?
            }
        };
        match line.trim() {
            DONE => return Ok(End::Done),
            "" => return Ok(End::Gone),
            word => longest = Some(longest_fence(word)),
        }
    }
}

/// For how long the parent may hold writes off, by what it said. Pure.
fn longest_fence(word: &str) -> Duration {
    let allowed = word.strip_prefix(HOLDING).and_then(|allowed| allowed.trim().parse().ok());
    Duration::from_millis(allowed.unwrap_or_default()) + GRACE
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

async fn lift(mongo: &Mongo, duty: &Duty) -> Result<()> {
    let jobs: Vec<Document> = store::list(mongo, Some(&duty.job)).await?;
    let Some(job) = jobs.first() else { return Ok(()) };
    match Record::of(job)? {
        Some(record) if record.id == duty.id && record.fence.is_some() => {
            // Who claims to be at it may be dead by now: looked at again until the fence is down.
            let state = recover(mongo, &duty.job, &record).await?;
            state.map(|_| ()).ok_or_else(|| Error::stopped("another process is lifting the fence"))
        }
        _ => Ok(()),
    }
}
