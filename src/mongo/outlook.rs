//! What can be seen of a server before a large copy: room on the disk, how far the
//! oplog reaches, who follows the collection.

use std::time::Duration;

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;

use super::Mongo;
use super::index::whole_number;
use crate::config::values::Namespace;

/// How much a collection takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// Documents, about.
    pub documents: u64,
    /// Bytes of documents, uncompressed.
    pub data: u64,
    /// Bytes on the disk, with indexes.
    pub stored: u64,
}

/// How far the oplog reaches back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Oplog {
    /// From its first to its last entry.
    pub window: Duration,
    /// Whether it is about full, so that it reaches no further from now on.
    pub is_full: bool,
}

/// Somebody who follows changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// What is followed: `collection`, `database` or `cluster`.
    pub scope: &'static str,
    /// Who follows, as far as it is known.
    pub who: String,
}

impl Mongo {
    /// How much a collection takes; `None` where that can't be asked for.
    pub async fn size(&self, namespace: &Namespace) -> Option<Size> {
        let stats = doc! {"collStats": &namespace.collection};
        let stats = self.database(&namespace.database).run_command(stats).await.ok()?;
        let figure = |name: &str| stats.get(name).and_then(whole_number).unwrap_or(0);
        Some(Size {
            documents: figure("count"),
            data: figure("size"),
            stored: figure("storageSize") + figure("totalIndexSize"),
        })
    }

    /// Bytes that are free on the disk of a database; `None` where that can't be told.
    pub async fn free_bytes(&self, database: &str) -> Option<u64> {
        let stats = self.database(database).run_command(doc! {"dbStats": 1}).await.ok()?;
        let figure = |name: &str| stats.get(name).and_then(whole_number);
        figure("fsTotalSize").filter(|total| *total > 0)?.checked_sub(figure("fsUsedSize")?)
    }

    /// How far the oplog reaches back; `None` where it can't be read.
    pub async fn oplog_reach(&self) -> Option<Oplog> {
        let local = self.database("local");
        let oplog = self.oplog_entries();
        let seconds = |entry: Document| entry.get_timestamp("ts").ok().map(|time| time.time);
        let first = oplog.find_one(doc! {}).sort(doc! {"$natural": 1}).await.ok()??;
        let last = oplog.find_one(doc! {}).sort(doc! {"$natural": -1}).await.ok()??;
        let window = u64::from(seconds(last)?.saturating_sub(seconds(first)?));
        let stats = local.run_command(doc! {"collStats": "oplog.rs"}).await.ok()?;
        let figure = |name: &str| stats.get(name).and_then(whole_number).unwrap_or(0);
        let is_full = figure("maxSize") > 0 && figure("size") >= figure("maxSize") / 10 * 9;
        Some(Oplog { window: Duration::from_secs(window), is_full })
    }

    /// Who follows changes of a collection, by itself or with others; `None` where
    /// this user may not see that.
    pub async fn streams(&self, namespace: &Namespace) -> Option<Vec<Stream>> {
        let pipeline = [
            doc! {"$currentOp": {"allUsers": true, "idleConnections": false, "idleCursors": true}},
            doc! {"$match": {"cursor.originatingCommand.pipeline.0.$changeStream": {"$exists": true}}},
        ];
        let cursor = self.admin().aggregate(pipeline).await.ok()?;
        let operations: Vec<Document> = cursor.try_collect().await.ok()?;
        Some(operations.iter().filter_map(|operation| stream(operation, namespace)).collect())
    }
}

/// Reads who follows what; `None` for another collection. Pure.
fn stream(operation: &Document, namespace: &Namespace) -> Option<Stream> {
    let command = operation.get_document("cursor").ok()?.get_document("originatingCommand").ok()?;
    let stage = command.get_array("pipeline").ok()?.first()?.as_document()?;
    let options = stage.get_document("$changeStream").ok()?;
    let database = command.get_str("$db").unwrap_or_default();
    let scope = if options.get_bool("allChangesForCluster").unwrap_or(false) {
        "cluster"
    } else if database != namespace.database {
        return None;
    } else {
        match command.get("aggregate") {
            Some(Bson::String(collection)) if *collection == namespace.collection => "collection",
            Some(Bson::String(_)) => return None,
            _ => "database",
        }
    };
    let text = |name: &str| operation.get_str(name).ok().filter(|text| !text.is_empty());
    let host = text("client").or_else(|| text("host")).unwrap_or("unknown");
    let who = match text("appName") {
        Some(application) => format!("{application} at {host}"),
        None => host.to_owned(),
    };
    Some(Stream { scope, who })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(database: &str, aggregate: impl Into<Bson>, all: bool) -> Document {
        doc! {
            "client": "10.0.0.7:5000",
            "appName": "search",
            "cursor": {"originatingCommand": {
                "aggregate": aggregate.into(),
                "pipeline": [{"$changeStream": {"allChangesForCluster": all}}],
                "$db": database,
            }},
        }
    }

    #[test]
    fn followers_of_the_collection_its_database_and_the_cluster_are_seen() {
        let namespace: Namespace = "app.users".parse().expect("a namespace");
        let scope = |operation: &Document| stream(operation, &namespace).map(|stream| stream.scope);
        assert_eq!(scope(&operation("app", "users", false)), Some("collection"));
        assert_eq!(scope(&operation("app", 1, false)), Some("database"));
        assert_eq!(scope(&operation("admin", 1, true)), Some("cluster"));
        assert_eq!(scope(&operation("app", "orders", false)), None);
        assert_eq!(scope(&operation("other", "users", false)), None);
        let seen = stream(&operation("app", "users", false), &namespace).expect("seen");
        assert_eq!(seen.who, "search at 10.0.0.7:5000");
    }
}
