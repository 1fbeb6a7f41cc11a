//! Replica sets of a test's own. Each of three members can be asked by itself, stepped down, frozen
//! and killed.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bson::{Document, doc};
use mongodb::{Client, Database};

use crate::harness::{connect, wait_for};

/// Prints the URI, then waits until its input is closed, which the death of the test does too.
const PRINT_AND_WAIT: &str = "echo \"$MONGODB_URI\"; cat >/dev/null";

/// A replica set for one test. Dropping it removes it.
pub struct OwnSet {
    script: Child,
    pub uri: String,
}

/// Three members.
pub struct ThreeNodes {
    pub uri: String,
    pub members: Vec<Member>,
    _set: OwnSet,
}

/// One member, asked directly.
pub struct Member {
    pub host: String,
    client: Client,
    pid: i64,
}

impl OwnSet {
    /// Starts a set with these options of the script.
    pub fn start(options: &[&str]) -> Self {
        let mut script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/mongod"))
            .args(["run", "--cache-gb", "0.25"])
            .args(options)
            .args(["--", "sh", "-c", PRINT_AND_WAIT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the script starts");
        let mut uri = String::new();
        let stdout = script.stdout.as_mut().expect("its output");
        BufReader::new(stdout).read_line(&mut uri).expect("the URI");
        Self { script, uri: uri.trim().to_owned() }
    }

    /// Its members, asked directly.
    pub async fn members(&self) -> Vec<Member> {
        let hosts = self.uri.strip_prefix("mongodb://").expect("a replica set");
        let hosts = hosts.split(['/', '?']).next().expect("hosts");
        let mut members = Vec::new();
        for host in hosts.split(',') {
            members.push(Member::open(host).await);
        }
        members
    }
}

impl Drop for OwnSet {
    fn drop(&mut self) {
        drop(self.script.stdin.take());
        // Frozen members are killed like the others.
        let ended = self.script.wait();
        if !std::thread::panicking() {
            ended.expect("the script ended");
        }
    }
}

impl ThreeNodes {
    pub async fn start() -> Self {
        let set = OwnSet::start(&["--nodes", "3", "--election-ms", "2000"]);
        Self { uri: set.uri.clone(), members: set.members().await, _set: set }
    }

    /// The member that takes writes; waits for one.
    pub async fn primary(&self) -> &Member {
        let mut found = None;
        wait_for("a primary", async || {
            for member in &self.members {
                if member.is_primary().await {
                    found = Some(member);
                }
            }
            found.is_some()
        })
        .await;
        found.expect("a primary")
    }

    /// The two others.
    pub async fn secondaries(&self) -> Vec<&Member> {
        let primary = self.primary().await;
        self.members.iter().filter(|member| member.host != primary.host).collect()
    }

    /// Lets another member become the primary; returns when there is one.
    pub async fn step_down(&self) {
        let primary = self.primary().await;
        let command = doc! {"replSetStepDown": 5, "secondaryCatchUpPeriodSecs": 2};
        wait_for("another primary", async || {
            // Refused where no member can catch up in time, which a busy machine may take a while for.
            if primary.is_primary().await {
                let _refused = primary.admin().run_command(command.clone()).await;
            }
            self.primary().await.host != primary.host
        })
        .await;
    }

    /// The number of the last election.
    pub async fn term(&self) -> i64 {
        let status = self.primary().await.admin().run_command(doc! {"replSetGetStatus": 1}).await;
        status.expect("a status").get_i64("term").expect("a term")
    }
}

impl Member {
    async fn open(host: &str) -> Self {
        let options = "directConnection=true&serverSelectionTimeoutMS=1000&connectTimeoutMS=1000";
        let client = connect(&format!("mongodb://{host}/?{options}")).await;
        let status = client.database("admin").run_command(doc! {"serverStatus": 1}).await.expect("a status");
        Self { host: host.to_owned(), pid: status.get_i64("pid").expect("a process id"), client }
    }

    pub fn admin(&self) -> Database {
        self.client.database("admin")
    }

    pub fn database(&self, name: &str) -> Database {
        self.client.database(name)
    }

    async fn is_primary(&self) -> bool {
        let asked = self.admin();
        let hello = tokio::time::timeout(Duration::from_secs(1), asked.run_command(doc! {"hello": 1})).await;
        hello.is_ok_and(|hello| {
            hello.is_ok_and(|hello| hello.get_bool("isWritablePrimary").is_ok_and(|is| is))
        })
    }

    /// Sets a fail point, until it is ended or the set is gone.
    pub async fn fail_point(&self, name: &str, data: Document) {
        let command = doc! {"configureFailPoint": name, "mode": "alwaysOn", "data": data};
        self.admin().run_command(command).await.expect("the fail point is set");
    }

    pub async fn end_fail_point(&self, name: &str) {
        let command = doc! {"configureFailPoint": name, "mode": "off"};
        self.admin().run_command(command).await.expect("the fail point is off");
    }

    /// `kill -9`.
    pub fn kill(&self) {
        self.signal("-KILL");
    }

    /// Neither answers nor closes a connection until it is thawed.
    pub fn freeze(&self) {
        self.signal("-STOP");
    }

    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.pid.to_string()]).status().expect("kill exists");
        assert!(sent.success(), "the signal was not sent");
    }
}
