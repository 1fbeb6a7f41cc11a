//! What happened under a name between two renames, while it was nobody's.
//!
//! What stands in the collection that the server made for writes of that time does not tell
//! it all: a document that was inserted and deleted again is not there. The change stream of
//! the database tells it, because one of a collection ends with each rename.

use std::collections::HashMap;

use bson::{Document, RawBson, RawDocumentBuf, Timestamp, doc};
use mongodb::options::ReadConcern;
use tokio::time::{Duration, Instant};

use super::Mongo;
use super::command::retrying;
use super::sink::value_bytes;
use crate::config::values::Namespace;
use crate::error::{Error, Result};

/// How long the server waits for a change before it answers that there is none.
const ANSWER: Duration = Duration::from_millis(20);
/// How long the second rename is looked for.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was done to documents under a name while it was nobody's.
#[derive(Debug)]
pub struct NameHistory {
    /// Of what was written and deleted: that of which the delete came last.
    pub deleted: Vec<RawBson>,
    /// When the name was somebody's again.
    pub taken_at: Timestamp,
}

/// What is known so far.
#[derive(Debug, Default)]
struct Reading {
    is_free: bool,
    deleted: HashMap<Vec<u8>, RawBson>,
    taken_at: Option<Timestamp>,
}

impl Mongo {
    /// Reads what happened under a name from a moment on, to the rename by which it became that of one
    /// of the collections that were called `former` before; nothing counts before the rename that
    /// freed it, unless `from_the_start`.
    ///
    /// # Errors
    /// A stop where the change stream can't be read or does not tell of the renames.
    pub async fn name_history(
        &self,
        name: &Namespace,
        from: Timestamp,
        former: &[&Namespace],
        from_the_start: bool,
    ) -> Result<NameHistory> {
        let reading = retrying(format!("reading what was written to {name} between the renames"), || {
            self.read_history(name, from, former, from_the_start)
        })
        .await?;
        let taken_at = reading.taken_at.ok_or_else(|| {
            Error::stopped(format!("the change stream does not tell when {name} was renamed"))
        })?;
        Ok(NameHistory { deleted: reading.deleted.into_values().collect(), taken_at })
    }

    async fn read_history(
        &self,
        name: &Namespace,
        from: Timestamp,
        former: &[&Namespace],
        from_the_start: bool,
    ) -> mongodb::error::Result<Reading> {
        let database = self.database(&name.database);
        let stream = database
            .watch()
            .pipeline(pipeline(name))
            .read_concern(ReadConcern::majority())
            .max_await_time(ANSWER)
            .start_at_operation_time(from);
        let mut stream = stream.await?.with_type::<RawDocumentBuf>();
        let deadline = Instant::now() + PATIENCE;
        let mut reading = Reading { is_free: from_the_start, ..Reading::default() };
        while reading.taken_at.is_none() && Instant::now() < deadline {
            if let Some(event) = stream.next_if_any().await? {
                reading.take(&event, name, former);
            }
        }
        Ok(reading)
    }
}

fn pipeline(name: &Namespace) -> Vec<Document> {
    let about = doc! {"$or": [{"ns.coll": &name.collection}, {"to.coll": &name.collection}]};
    let fields = doc! {"operationType": 1, "documentKey._id": 1, "clusterTime": 1, "ns": 1, "to": 1};
    vec![doc! {"$match": about}, doc! {"$project": fields}]
}

impl Reading {
    fn take(&mut self, event: &RawDocumentBuf, name: &Namespace, former: &[&Namespace]) {
        let names = |field: &str, wanted: &Namespace| {
            let named = event.get_document(field).ok();
            named.and_then(|named| named.get_str("coll").ok()) == Some(wanted.collection.as_str())
        };
        match event.get_str("operationType").unwrap_or_default() {
            "rename" if self.is_free && names("to", name) && former.iter().any(|from| names("ns", from)) => {
                self.taken_at = event.get_timestamp("clusterTime").ok();
            }
            "rename" if names("ns", name) => self.is_free = true,
            "delete" if self.is_free => {
                if let Some(id) = id_of(event) {
                    self.deleted.insert(value_bytes(id.as_raw_bson_ref()), id);
                }
            }
            "insert" | "update" | "replace" if self.is_free => {
                if let Some(id) = id_of(event) {
                    self.deleted.remove(&value_bytes(id.as_raw_bson_ref()));
                }
            }
            _ => {}
        }
    }
}

fn id_of(event: &RawDocumentBuf) -> Option<RawBson> {
    event.get_document("documentKey").ok()?.get("_id").ok().flatten().map(RawBson::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::rawdoc;

    #[test]
    fn only_what_was_deleted_last_between_the_renames_counts() {
        let name: Namespace = "app.users".parse().expect("valid");
        let (copy, old): (Namespace, Namespace) =
            ("app.users_v2".parse().expect("valid"), "app.users_old".parse().expect("valid"));
        let change = |kind: &str, id: i32| rawdoc! {"operationType": kind, "ns": {"coll": "users"}, "documentKey": {"_id": id}};
        let at = Timestamp { time: 5, increment: 1 };
        let rename = |from: &str, to: &str| {
            rawdoc! {"operationType": "rename", "ns": {"coll": from}, "to": {"coll": to}, "clusterTime": at}
        };
        let events = [
            change("delete", 1),
            rename("users", "users_old"),
            change("insert", 2),
            change("delete", 2),
            change("delete", 3),
            change("insert", 3),
            rename("users", "aside"),
            change("insert", 4),
            change("delete", 4),
        ];
        let mut reading = Reading::default();
        events.iter().for_each(|event| reading.take(event, &name, &[&copy, &old]));
        let mut deleted: Vec<i32> =
            reading.deleted.values().filter_map(|id| id.as_raw_bson_ref().as_i32()).collect();
        deleted.sort_unstable();
        assert_eq!((deleted, reading.taken_at), (vec![2, 4], None));
        reading.take(&rename("users_v2", "users"), &name, &[&copy, &old]);
        assert_eq!(reading.taken_at, Some(at));
    }
}
