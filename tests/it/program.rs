//! The built program as a child process.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

/// No run of a test takes this long.
const LIMIT: Duration = Duration::from_secs(150);

/// The program, about to be started.
pub struct Program {
    command: Command,
    output: PathBuf,
}

/// The program under way. Dropping it kills it.
pub struct Running {
    child: Child,
    output: PathBuf,
    writes_json: bool,
}

/// What the program left behind.
pub struct Finished {
    /// The exit code; `None` where a signal ended it.
    pub exit: Option<i32>,
    /// The JSON document on stdout; null where there is none.
    pub json: Value,
    pub stdout: String,
    pub stderr: String,
}

/// The signals that tests send.
#[derive(Clone, Copy)]
pub enum Signal {
    Hangup,
    Interrupt,
    Terminate,
    Stop,
    Continue,
    Kill,
}

impl Program {
    pub fn new(folder: &Path) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let output = folder.join(format!("run{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let mut command = Command::new(env!("CARGO_BIN_EXE_mongorekey"));
        command.current_dir(folder).stdin(Stdio::null()).env_remove("MONGOREKEY_URI");
        Self { command, output }
    }

    /// Further arguments, separated by spaces.
    pub fn arguments(mut self, arguments: &str) -> Self {
        self.command.args(arguments.split_whitespace());
        self
    }

    /// One further argument, whatever it holds.
    pub fn argument(mut self, argument: &str) -> Self {
        self.command.arg(argument);
        self
    }

    /// What it reads from stdin.
    pub fn input(mut self, file: &Path) -> Self {
        self.command.stdin(File::open(file).expect("a file to read from"));
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn spawn(mut self) -> Running {
        // Into files: a pipe that nobody reads would stop the program.
        let file =
            |kind: &str| File::create(self.output.with_extension(kind)).expect("a file for the output");
        self.command.stdout(file("out")).stderr(file("err"));
        let writes_json = self.command.get_args().any(|argument| argument == "json");
        let child = self.command.spawn().expect("the program starts");
        Running { child, output: self.output, writes_json }
    }

    pub async fn run(self) -> Finished {
        self.spawn().finish().await
    }
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the state of a child").is_none()
    }

    /// The most memory that it had so far, in bytes; `None` where it has ended.
    pub fn peak_memory(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
        Some(kibibytes * 1024)
    }

    /// What it wrote to stderr so far.
    pub fn stderr(&self) -> String {
        read(&self.output.with_extension("err"))
    }

    /// Waits for its end.
    pub async fn finish(mut self) -> Finished {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().expect("the state of a child") {
                return self.finished(status);
            }
            if Instant::now() > deadline {
                panic!("the program did not end within {LIMIT:?}; it said:\n{}", self.stderr());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn signal(&self, kind: Signal) {
        signal(self.pid(), kind);
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(mut self) {
        self.child.kill().expect("a child to kill");
        self.child.wait().expect("its end");
    }

    fn finished(&self, status: ExitStatus) -> Finished {
        let stdout = read(&self.output.with_extension("out"));
        let json = if stdout.trim().is_empty() || !self.writes_json {
            Value::Null
        } else {
            serde_json::from_str(&stdout)
                .unwrap_or_else(|error| panic!("stdout is not one JSON document ({error}):\n{stdout}"))
        };
        Finished { exit: status.code(), json, stderr: self.stderr(), stdout }
    }
}

/// Sends a signal to a process.
pub fn signal(pid: u32, kind: Signal) {
    let name = match kind {
        Signal::Hangup => "-HUP",
        Signal::Interrupt => "-INT",
        Signal::Terminate => "-TERM",
        Signal::Stop => "-STOP",
        Signal::Continue => "-CONT",
        Signal::Kill => "-KILL",
    };
    let sent = Command::new("kill").args([name, &pid.to_string()]).status().expect("kill exists");
    assert!(sent.success(), "the signal was not sent");
}

/// The processes that a process has started.
pub fn children(pid: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").expect("the processes").flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok());
    numbers.filter(|number| stat(*number).get(1).is_some_and(|parent| *parent == pid.to_string())).collect()
}

/// The state of a process, the number of its parent, and what follows; nothing where it is gone.
fn stat(pid: u32) -> Vec<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    fields.split(' ').map(str::to_owned).collect()
}

/// Whether a process is stopped (SIGSTOP).
pub fn is_stopped(pid: u32) -> bool {
    stat(pid).first().is_some_and(|state| state == "T")
}

/// Whether a process has ended, whoever collects it.
pub fn is_gone(pid: u32) -> bool {
    stat(pid).first().is_none_or(|state| state.is_empty() || state == "Z")
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only where it has ended.
        let _gone = self.child.kill();
        let _collected = self.child.wait();
    }
}

impl Finished {
    #[track_caller]
    pub fn expect_exit(self, exit: i32) -> Self {
        assert_eq!(
            self.exit,
            Some(exit),
            "wrong exit code; stdout:\n{}\nstderr:\n{}",
            self.stdout,
            self.stderr
        );
        self
    }

    /// A number of the result, by JSON pointer.
    #[track_caller]
    pub fn number(&self, pointer: &str) -> u64 {
        let value = self.json.pointer(pointer).unwrap_or_else(|| panic!("no {pointer} in {}", self.stdout));
        value.as_u64().unwrap_or_else(|| panic!("{pointer} is no whole number in {}", self.stdout))
    }

    /// A text of the result, by JSON pointer.
    #[track_caller]
    pub fn text(&self, pointer: &str) -> &str {
        let value = self.json.pointer(pointer).unwrap_or_else(|| panic!("no {pointer} in {}", self.stdout));
        value.as_str().unwrap_or_else(|| panic!("{pointer} is no text in {}", self.stdout))
    }

    /// Checks the counts of documents that are named, all others being zero.
    #[track_caller]
    pub fn expect_documents(&self, expected: &[(&str, u64)]) {
        for name in ["candidates", "filled", "flagged", "already_filled", "failed", "candidates_left"] {
            let wanted = expected.iter().find(|(other, _)| *other == name).map_or(0, |(_, count)| *count);
            assert_eq!(
                self.number(&format!("/documents/{name}")),
                wanted,
                "documents.{name} in {}\n{}",
                self.stdout,
                self.stderr
            );
        }
    }

    #[track_caller]
    pub fn expect_calls(&self, calls: u64) {
        assert_eq!(self.number("/api/calls"), calls, "{}\n{}", self.stdout, self.stderr);
    }

    /// All that it wrote.
    pub fn output(&self) -> String {
        format!("{}\n{}", self.stdout, self.stderr)
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).expect("the output is readable")).into_owned()
}
