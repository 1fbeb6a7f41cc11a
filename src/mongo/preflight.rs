//! What can be seen of a server before anything is done with it: version,
//! topology, oplog, privileges, disk.

use bson::{Bson, Document, doc};
use serde_json::{Value, json};

use super::Mongo;
use super::index::whole_number;
use crate::config::values::Namespace;
use crate::error::{Context, Result};
use crate::report::progress::duration;

/// The oldest server that the driver and the queries here work with.
const OLDEST_VERSION: [u64; 2] = [4, 4];
/// An oplog shorter than this is worth a warning.
const SHORT_OPLOG_SECONDS: u64 = 24 * 3600;
/// Actions that filling and cleansing a collection need.
const ACTIONS: [&str; 4] = ["find", "insert", "update", "createIndex"];

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// All is well.
    Pass,
    /// Worth a look; work may start.
    Warn,
    /// Work can't start.
    Fail,
}

/// One line of a preflight.
#[derive(Debug, Clone)]
pub struct Finding {
    /// How it ended.
    pub level: Level,
    name: String,
    found: String,
    hint: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn pass(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self { level: Level::Pass, name: name.into(), found: found.into(), hint: None }
    }

    /// Worth a look, with what to do.
    pub fn warn(name: impl Into<String>, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { level: Level::Warn, hint: Some(hint.into()), ..Self::pass(name, found) }
    }

    /// Work can't start, with what to do.
    pub fn fail(name: impl Into<String>, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { level: Level::Fail, ..Self::warn(name, found, hint) }
    }

    /// As a line for people.
    pub fn text(&self) -> String {
        let mark = match self.level {
            Level::Pass => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        let hint = self.hint.as_ref().map_or(String::new(), |hint| format!("\n       {hint}"));
        format!("{mark}   {}: {}{hint}", self.name, self.found)
    }

    /// As an entry of the JSON result.
    pub fn json(&self) -> Value {
        let level = match self.level {
            Level::Pass => "pass",
            Level::Warn => "warn",
            Level::Fail => "fail",
        };
        json!({
            "name": self.name,
            "passed": self.level != Level::Fail,
            "level": level,
            "found": self.found,
            "hint": self.hint,
        })
    }
}

impl Mongo {
    /// Version, topology and oplog.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn check_server(&self) -> Result<Vec<Finding>> {
        let build = self
            .admin()
            .run_command(doc! {"buildInfo": 1})
            .await
            .during("asking the server for its version")?;
        let hello = self.hello().await?;
        let mut findings = vec![version(&build), topology(&hello)];
        if hello.contains_key("setName") {
            findings.push(self.oplog().await);
        }
        Ok(findings)
    }

    /// Existence, privileges and disk of a collection's database.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn check_namespace(&self, namespace: &Namespace) -> Result<Vec<Finding>> {
        Ok(vec![self.privileges(namespace).await, self.disk(namespace).await])
    }

    async fn oplog(&self) -> Finding {
        let name = "oplog";
        let oplog = self.oplog_entries();
        let first = oplog.find_one(doc! {}).sort(doc! {"$natural": 1}).await;
        let last = oplog.find_one(doc! {}).sort(doc! {"$natural": -1}).await;
        let seconds =
            |entry: &Document| entry.get_timestamp("ts").ok().map(|timestamp| u64::from(timestamp.time));
        match (first, last) {
            (Ok(Some(first)), Ok(Some(last))) => {
                let window = seconds(&last).unwrap_or(0).saturating_sub(seconds(&first).unwrap_or(0));
                let found = format!("reaches back {}", duration(std::time::Duration::from_secs(window)));
                if window < SHORT_OPLOG_SECONDS {
                    Finding::warn(
                        name,
                        found,
                        "a young server, or an oplog too small to catch up after a long pause",
                    )
                } else {
                    Finding::pass(name, found)
                }
            }
            _ => Finding::warn(
                name,
                "can't be read",
                "give the user `read` on the database local to see its length",
            ),
        }
    }

    async fn privileges(&self, namespace: &Namespace) -> Finding {
        let name = format!("privileges on {namespace}");
        let status = self.admin().run_command(doc! {"connectionStatus": 1, "showPrivileges": true}).await;
        let Ok(status) = status else {
            return Finding::warn(name, "can't be asked for", "make sure that the user may read and write");
        };
        match missing_actions(&status, namespace) {
            None => Finding::pass(name, "access control is off"),
            Some(missing) if missing.is_empty() => Finding::pass(name, ACTIONS.join(", ")),
            Some(missing) => Finding::fail(
                name,
                format!("missing: {}", missing.join(", ")),
                format!("grant the user `readWrite` on {} and on the state database", namespace.database),
            ),
        }
    }

    async fn disk(&self, namespace: &Namespace) -> Finding {
        let name = format!("disk of {}", namespace.database);
        let Ok(stats) = self.database(&namespace.database).run_command(doc! {"dbStats": 1}).await else {
            return Finding::warn(name, "can't be asked for", "make sure that there is room for a copy");
        };
        let figure = |field: &str| stats.get(field).and_then(whole_number).unwrap_or(0);
        let (used, total) = (figure("fsUsedSize"), figure("fsTotalSize"));
        if total == 0 {
            return Finding::pass(name, "not known before the database exists");
        }
        let gigabytes = |bytes: u64| format!("{}.{} GB", bytes / 1_000_000_000, bytes / 100_000_000 % 10);
        let (free, data) = (total.saturating_sub(used), figure("storageSize") + figure("indexSize"));
        let found = format!("{} free, the database takes {}", gigabytes(free), gigabytes(data));
        if free < data {
            Finding::warn(
                name,
                found,
                "a copy of everything would not fit; a cleanse takes only what is kept",
            )
        } else {
            Finding::pass(name, found)
        }
    }
}

fn version(build: &Document) -> Finding {
    let text = build.get_str("version").unwrap_or("unknown").to_owned();
    let numbers: Vec<u64> = text.split('.').filter_map(|part| part.parse().ok()).collect();
    if numbers.as_slice() >= OLDEST_VERSION.as_slice() {
        Finding::pass("server", format!("MongoDB {text}"))
    } else {
        Finding::fail("server", format!("MongoDB {text}"), "mongorekey needs MongoDB 4.4 or newer")
    }
}

fn topology(hello: &Document) -> Finding {
    if hello.get_str("msg").is_ok_and(|message| message == "isdbgrid") {
        return Finding::warn(
            "topology",
            "sharded cluster",
            "backfill works; a sharded collection can't be cleansed",
        );
    }
    match hello.get_str("setName") {
        Ok(set) => {
            let members = hello.get_array("hosts").map_or(0, Vec::len);
            Finding::pass("topology", format!("replica set {set} with {members} data-bearing members"))
        }
        Err(_) => Finding::fail(
            "topology",
            "a server without a replica set",
            "start it as a replica set of one: writes could not be made durable otherwise",
        ),
    }
}

/// Actions that no privilege grants; `None` where access control is off.
fn missing_actions(status: &Document, namespace: &Namespace) -> Option<Vec<&'static str>> {
    let info = status.get_document("authInfo").ok()?;
    if info.get_array("authenticatedUsers").is_ok_and(Vec::is_empty) {
        return None;
    }
    let privileges = info.get_array("authenticatedUserPrivileges").ok()?;
    let covers = |resource: &Document| {
        let matches = |field: &str, value: &str| {
            resource.get_str(field).is_ok_and(|text| text.is_empty() || text == value)
        };
        resource.get_bool("anyResource").unwrap_or(false)
            || (matches("db", &namespace.database) && matches("collection", &namespace.collection))
    };
    let granted: Vec<&str> = privileges
        .iter()
        .filter_map(Bson::as_document)
        .filter(|privilege| privilege.get_document("resource").is_ok_and(covers))
        .filter_map(|privilege| privilege.get_array("actions").ok())
        .flatten()
        .filter_map(Bson::as_str)
        .collect();
    Some(
        ACTIONS
            .into_iter()
            .filter(|action| !granted.contains(action) && !granted.contains(&"anyAction"))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(version(&doc! {"version": "6.0.5"}).level, Level::Pass);
        assert_eq!(version(&doc! {"version": "10.0.0"}).level, Level::Pass);
        assert_eq!(version(&doc! {"version": "4.2.24"}).level, Level::Fail);
    }

    #[test]
    fn missing_privileges_are_named() {
        let namespace: Namespace = "app.users".parse().expect("a namespace");
        let status = |actions: &[&str], db: &str| {
            doc! {"authInfo": {
                "authenticatedUsers": [{"user": "u"}],
                "authenticatedUserPrivileges": [
                    {"resource": {"db": db, "collection": ""}, "actions": actions.to_vec()},
                ],
            }}
        };
        assert_eq!(missing_actions(&status(&ACTIONS, "app"), &namespace), Some(vec![]));
        assert_eq!(
            missing_actions(&status(&["find", "insert"], "app"), &namespace),
            Some(vec!["update", "createIndex"])
        );
        assert_eq!(
            missing_actions(&status(&ACTIONS, "other"), &namespace).map(|missing| missing.len()),
            Some(4)
        );
        let open = doc! {"authInfo": {"authenticatedUsers": [], "authenticatedUserPrivileges": []}};
        assert_eq!(missing_actions(&open, &namespace), None);
    }
}
