//! What every report tells, whatever it is about: where it was made, of which
//! collections, and when.
//!
//! A report must not fail because the server is gone: that may be the very thing
//! that it has to tell. What can't be read in time is absent.

use std::time::Duration;

use bson::{Bson, DateTime, Document, doc};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::config::values::Namespace;
use crate::job::holder::Holder;
use crate::mongo::Mongo;

/// What is read for a report takes no longer, or is left out.
const PATIENCE: Duration = Duration::from_secs(15);

/// What comes within a reasonable time.
pub async fn in_time<T>(work: impl Future<Output = Option<T>>) -> Option<T> {
    tokio::time::timeout(PATIENCE, work).await.ok().flatten()
}

/// Now, as it stands in reports.
pub fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

/// A stored moment, as it stands in reports.
pub fn moment(job: &Document, field: &str) -> Value {
    let at = job.get_datetime(field).ok();
    json!(at.and_then(|at| text_of(*at)))
}

/// A moment, as it stands in reports.
pub fn text_of(at: DateTime) -> Option<String> {
    at.try_to_rfc3339_string().ok()
}

/// Who makes the report, and which server it is about.
pub async fn place(mongo: &Mongo) -> Value {
    let holder = Holder::current();
    let hello = in_time(async { mongo.hello().await.ok() }).await.unwrap_or_default();
    let build = in_time(async { mongo.admin().run_command(doc! {"buildInfo": 1}).await.ok() }).await;
    let version = build.as_ref().and_then(|build| build.get_str("version").ok());
    json!({
        "tool": concat!("mongorekey ", env!("CARGO_PKG_VERSION")),
        "host": holder.host,
        "process": holder.pid,
        "server": version.map(|version| format!("MongoDB {version}")),
        "topology": topology(&hello),
        "server_time": hello.get_datetime("localTime").ok().and_then(|at| text_of(*at)),
    })
}

fn topology(hello: &Document) -> Option<String> {
    if hello.get_str("msg").is_ok_and(|message| message == "isdbgrid") {
        return Some("sharded cluster".into());
    }
    let set = hello.get_str("setName").ok()?;
    let members = hello.get_array("hosts").map_or(0, Vec::len);
    Some(format!("replica set {set}, {members} data-bearing members"))
}

/// A collection by its name and its identity.
pub async fn collection(mongo: &Mongo, role: &str, namespace: &Namespace) -> Value {
    let described = in_time(async { mongo.describe(namespace).await.ok() }).await;
    let uuid = described.as_ref().and_then(Option::as_ref).and_then(|found| found.uuid.clone());
    let documents = in_time(async { mongo.collection(namespace).estimated_document_count().await.ok() });
    json!({
        "role": role,
        "namespace": namespace.to_string(),
        "uuid": uuid.as_ref().and_then(uuid_text),
        "exists": described.map(|found| found.is_some()),
        "documents_now": documents.await,
    })
}

/// The identity of a collection as people write it.
pub fn uuid_text(uuid: &Bson) -> Option<String> {
    let Bson::Binary(binary) = uuid else { return None };
    binary.to_uuid().ok().map(|uuid| uuid.to_string())
}

/// A document without what only BSON knows, for the JSON of a report.
pub fn relaxed(document: &Document) -> Value {
    Bson::Document(document.clone()).into_relaxed_extjson()
}
