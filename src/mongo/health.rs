//! How the deployment bears its load: replication lag and flow control.
//!
//! What any user may ask (`hello`) tells how far the majority is behind; who may
//! ask for more also sees each member and the server's own brake.

use std::collections::HashSet;
use std::time::Duration;

use bson::{Bson, Document, doc};
use mongodb::error::{Error as DriverError, ErrorKind};

use super::Mongo;
use crate::error::{Context, Result};
use crate::throttle::health::Reading;

/// The server's code for a missing privilege.
const UNAUTHORIZED: i32 = 13;

/// Reads the signals; remembers which of them this user may not read.
#[derive(Debug)]
pub struct HealthProbe {
    mongo: Mongo,
    /// Commands that this user may not run.
    denied: HashSet<&'static str>,
}

impl HealthProbe {
    /// A probe of this deployment.
    pub fn new(mongo: Mongo) -> Self {
        Self { mongo, denied: HashSet::new() }
    }

    /// What the deployment tells now.
    ///
    /// # Errors
    /// A stop where it can't be asked.
    pub async fn read(&mut self) -> Result<Reading> {
        let hello = self.mongo.hello().await?;
        let majority = majority_lag(&hello);
        if majority.is_none() {
            // No replica set, or a router: there is nobody who could lag.
            return Ok(Reading::default());
        }
        let status = self.ask("replSetGetStatus").await?;
        let config = self.ask("replSetGetConfig").await?;
        let server = self.ask("serverStatus").await?;
        let members = status.as_ref().and_then(|status| members_lag(status, &delayed(config.as_ref())));
        let flow_control = server.as_ref().is_some_and(is_flow_controlled);
        Ok(Reading { lag: majority.max(members), flow_control })
    }

    async fn ask(&mut self, command: &'static str) -> Result<Option<Document>> {
        if self.denied.contains(command) {
            return Ok(None);
        }
        match self.mongo.admin().run_command(doc! {command: 1}).await {
            Ok(reply) => Ok(Some(reply)),
            Err(error) if is_unauthorized(&error) => {
                tracing::info!(command, "may not be asked for; the lag of the majority is what is looked at");
                self.denied.insert(command);
                Ok(None)
            }
            Err(error) => Err(error).during(format!("asking the server for {command}")),
        }
    }
}

fn is_unauthorized(error: &DriverError) -> bool {
    matches!(error.kind.as_ref(), ErrorKind::Command(command) if command.code == UNAUTHORIZED)
}

fn majority_lag(hello: &Document) -> Option<Duration> {
    let last = hello.get_document("lastWrite").ok()?;
    let written = last.get_datetime("lastWriteDate").ok()?.timestamp_millis();
    let confirmed = last.get_datetime("majorityWriteDate").ok()?.timestamp_millis();
    Some(Duration::from_millis(u64::try_from(written - confirmed).unwrap_or(0)))
}

/// The lag of the slowest secondary that is alive and means to keep up.
fn members_lag(status: &Document, delayed: &HashSet<i64>) -> Option<Duration> {
    let members = status.get_array("members").ok()?;
    let members: Vec<&Document> = members.iter().filter_map(Bson::as_document).collect();
    let state = |member: &Document| member.get_i32("state").unwrap_or(-1);
    let written =
        |member: &Document| member.get_datetime("optimeDate").ok().map(|time| time.timestamp_millis());
    let primary = members.iter().find(|member| state(member) == 1).and_then(|member| written(member))?;
    members
        .iter()
        .filter(|member| state(member) == 2)
        .filter(|member| !member_id(member).is_some_and(|id| delayed.contains(&id)))
        .filter_map(|member| written(member))
        .map(|written| Duration::from_millis(u64::try_from(primary - written).unwrap_or(0)))
        .max()
}

/// Members that lag on purpose.
fn delayed(config: Option<&Document>) -> HashSet<i64> {
    let members = config
        .and_then(|config| config.get_document("config").ok())
        .and_then(|config| config.get_array("members").ok());
    let seconds = |member: &Document| {
        ["secondaryDelaySecs", "slaveDelay"]
            .iter()
            .find_map(|name| member.get(name).and_then(super::index::whole_number))
            .unwrap_or(0)
    };
    members
        .into_iter()
        .flatten()
        .filter_map(Bson::as_document)
        .filter(|member| seconds(member) > 0)
        .filter_map(member_id)
        .collect()
}

fn member_id(member: &Document) -> Option<i64> {
    member.get("_id").and_then(super::index::whole_number).and_then(|id| i64::try_from(id).ok())
}

fn is_flow_controlled(status: &Document) -> bool {
    status.get_document("flowControl").is_ok_and(|flow| {
        flow.get_bool("enabled").unwrap_or(false) && flow.get_bool("isLagged").unwrap_or(false)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::DateTime;

    fn member(id: i32, state: i32, written: i64) -> Document {
        doc! {"_id": id, "state": state, "optimeDate": DateTime::from_millis(written)}
    }

    #[test]
    fn the_slowest_living_secondary_counts() {
        let status = doc! {"members": [
            member(0, 1, 60_000), member(1, 2, 58_000), member(2, 2, 51_000), member(3, 8, 0), member(4, 2, 1_000),
        ]};
        let on_purpose = HashSet::from([4]);
        assert_eq!(members_lag(&status, &on_purpose), Some(Duration::from_secs(9)));
        let config = doc! {"config": {"members": [
            {"_id": 1, "secondaryDelaySecs": 0_i64}, {"_id": 4, "secondaryDelaySecs": 3600_i64},
        ]}};
        assert_eq!(delayed(Some(&config)), on_purpose);
        assert_eq!(members_lag(&doc! {"members": [member(0, 1, 5)]}, &HashSet::new()), None);
    }

    #[test]
    fn the_majority_may_lag_too() {
        let hello = doc! {"lastWrite": {
            "lastWriteDate": DateTime::from_millis(9_000),
            "majorityWriteDate": DateTime::from_millis(2_000),
        }};
        assert_eq!(majority_lag(&hello), Some(Duration::from_secs(7)));
        assert_eq!(majority_lag(&doc! {"msg": "isdbgrid"}), None);
    }

    #[test]
    fn flow_control_counts_while_it_brakes() {
        assert!(is_flow_controlled(&doc! {"flowControl": {"enabled": true, "isLagged": true}}));
        assert!(!is_flow_controlled(&doc! {"flowControl": {"enabled": true, "isLagged": false}}));
        assert!(!is_flow_controlled(&doc! {}));
    }
}
