//! The same reads, calls and updates as a backfill, and nothing else: no key map, no checkpoint,
//! no retry, no rate. What is slower than this is the price of the bookkeeping, so this is the
//! limit that `scripts/bench` measures the backfill against.

#![expect(clippy::print_stdout, clippy::disallowed_methods, reason = "a program of its own")]

use std::error::Error;
use std::time::Instant;

use clap::Parser;
use futures_util::{StreamExt, TryStreamExt};
use mongodb::bson::{Bson, Document, doc};
use mongodb::options::Hint;
use mongodb::{Client, Collection};
use serde_json::Value;
use tokio::sync::mpsc;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Chunks that wait for their calls, and batches that wait for their update.
const WAITING: usize = 2;
/// Update commands on their way at once.
const UPDATES_IN_FLIGHT: usize = 2;

/// Fill every candidate of a collection without any bookkeeping
#[derive(Parser)]
struct Options {
    /// Connection string of the replica set
    #[arg(long, env = "MONGODB_URI", hide_env_values = true)]
    uri: String,
    /// database.collection, with its partial index
    #[arg(long)]
    collection: String,
    /// Where the keys are: `http://127.0.0.1:8080/v1/keys/`
    #[arg(long)]
    api: String,
    /// Candidates per read and updates per command
    #[arg(long, default_value_t = 1000)]
    chunk: usize,
    /// Calls in flight
    #[arg(long, default_value_t = 128)]
    concurrency: usize,
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let options = Options::parse();
    let started = Instant::now();
    let client = Client::with_uri_str(&options.uri).await?;
    let (database, name) = options.collection.split_once('.').ok_or("--collection: database.collection")?;
    let collection = client.database(database).collection::<Document>(name);
    let filled = fill(collection, &options).await?;
    println!("{}", serde_json::json!({"filled": filled, "elapsed_seconds": started.elapsed().as_secs_f64()}));
    Ok(())
}

async fn fill(collection: Collection<Document>, options: &Options) -> Outcome<u64> {
    let (chunks, candidates) = mpsc::channel::<Vec<Document>>(WAITING);
    let reader = tokio::spawn(read(collection.clone(), options.chunk, chunks));
    let http = http_client(options.concurrency)?;
    let filled = futures_util::stream::unfold(candidates, async |mut candidates| {
        candidates.recv().await.map(|chunk| (futures_util::stream::iter(chunk), candidates))
    })
    .flatten()
    .map(|candidate| call(&http, &options.api, candidate))
    .buffer_unordered(options.concurrency)
    .try_chunks(options.chunk)
    .map(|batch| update(&collection, batch.map_err(|error| error.1)))
    .buffer_unordered(UPDATES_IN_FLIGHT)
    .try_fold(0, async |sum, filled| Ok(sum + filled))
    .await?;
    reader.await??;
    Ok(filled)
}

async fn read(
    collection: Collection<Document>,
    chunk: usize,
    chunks: mpsc::Sender<Vec<Document>>,
) -> Outcome<()> {
    let hint = Hint::Name(index_name(&collection).await?);
    let mut last = Bson::MinKey;
    loop {
        let filter = doc! {
            "newKey": null,
            "newKeyFlag": null,
            "$expr": {"$gt": ["$_id", {"$literal": &last}]},
        };
        let found: Vec<Document> = collection
            .find(filter)
            .sort(doc! {"_id": 1})
            .limit(i64::try_from(chunk)?)
            .batch_size(u32::try_from(chunk)?)
            .projection(doc! {"legacyKey": 1})
            .hint(hint.clone())
            .await?
            .try_collect()
            .await?;
        let Some(id) = found.last().and_then(|document| document.get("_id")) else { return Ok(()) };
        last = id.clone();
        chunks.send(found).await?;
    }
}

/// The partial index, whatever the target is called.
async fn index_name(collection: &Collection<Document>) -> Outcome<String> {
    let names = collection.list_index_names().await?;
    names.into_iter().find(|name| name.starts_with("mongorekey_")).ok_or_else(|| "no partial index".into())
}

/// As the backfill has it; it is plain HTTP that is measured, TLS is there because it must be.
fn http_client(slots: usize) -> Outcome<reqwest::Client> {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let http =
        reqwest::Client::builder().tls_backend_preconfigured(tls).no_proxy().pool_max_idle_per_host(slots);
    Ok(http.build()?)
}

async fn call(http: &reqwest::Client, api: &str, candidate: Document) -> Outcome<Document> {
    let (id, legacy_key) = (candidate.get("_id").ok_or("no _id")?, candidate.get_str("legacyKey")?);
    let body = http.get(format!("{api}{legacy_key}")).send().await?.error_for_status()?.bytes().await?;
    let answer: Value = serde_json::from_slice(&body)?;
    let new_key = answer["newKey"].as_str().ok_or("no newKey")?;
    let is_open = |field: &str| doc! {"$eq": [{"$ifNull": [field, null]}, null]};
    let unchanged = doc! {"$eq": ["$legacyKey", {"$literal": legacy_key}]};
    let guard = doc! {"$and": [is_open("$newKey"), is_open("$newKeyFlag"), unchanged]};
    let value = doc! {"$cond": [guard, {"$literal": new_key}, "$newKey"]};
    Ok(doc! {"q": {"_id": id}, "u": [{"$set": {"newKey": value}}]})
}

async fn update(collection: &Collection<Document>, batch: Outcome<Vec<Document>>) -> Outcome<u64> {
    let namespace = collection.namespace();
    let reply = collection
        .client()
        .database(&namespace.db)
        .run_command(doc! {
            "update": namespace.coll,
            "updates": batch?,
            "ordered": false,
            "writeConcern": {"w": "majority"},
        })
        .await?;
    if reply.contains_key("writeErrors") {
        return Err(format!("an update failed: {reply}").into());
    }
    Ok(u64::try_from(reply.get_i32("n")?)?)
}
