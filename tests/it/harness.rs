//! What every test stands on: a replica set, two databases of its own, the
//! built program, and waiting that ends.
//!
//! Tests look at the product from outside, as an operator does: they run the
//! binary and then read its result, the database and the log of the key API.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bson::{Bson, Document, RawDocumentBuf, doc};
use futures_util::TryStreamExt;
use mongodb::{Client, Collection, Database};
use tokio::time::Instant;

use crate::config::Config;
use crate::key_api::KeyApi;
use crate::program::{Finished, Program};

/// Names the replica sets, separated by spaces; `scripts/mongod run` sets it.
const URI_VARIABLE: &str = "MONGOREKEY_TEST_MONGODB_URI";
/// The number of the place that nextest runs a test in: as many as run at once.
const SLOT_VARIABLE: &str = "NEXTEST_TEST_GLOBAL_SLOT";
/// Between two writes of a writer that would else take the server from all other tests.
pub const BREATH: Duration = Duration::from_millis(5);
/// The collection of most tests.
pub const DOCS: &str = "docs";

/// A place for one test: a database, a state database and a folder, all removed at its end.
pub struct Bench {
    pub database: Database,
    pub state: Database,
    pub folder: PathBuf,
    /// Where its databases are.
    pub uri: String,
    client: Client,
}

impl Bench {
    pub async fn new() -> Self {
        Self::on(&uri()).await
    }

    /// A bench on another replica set than that of the tests.
    pub async fn on(uri: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("it_{}_{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let client = connect(uri).await;
        let folder = std::env::temp_dir().join(format!("mongorekey-{name}"));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        let database = client.database(&name);
        let state = client.database(&format!("{name}_state"));
        // What an earlier process of the same id may have left.
        database.drop().await.expect("an empty database");
        state.drop().await.expect("an empty database");
        Self { database, state, folder, uri: uri.to_owned(), client }
    }

    /// A bench with `count` documents `{_id: n, legacyKey: "K<n>"}` from 1 on, and the index.
    pub async fn with_docs(count: i32) -> Self {
        Self::with_docs_on(&uri(), count).await
    }

    /// The same on another replica set than that of the tests.
    pub async fn with_docs_on(uri: &str, count: i32) -> Self {
        let bench = Self::on(uri).await;
        bench.insert((1..=count).map(|id| doc! {"_id": id, "legacyKey": format!("K{id}")})).await;
        bench.create_index().await;
        bench
    }

    /// Ends a bench whose server is gone for good, and its databases with it.
    pub fn abandon(self) {
        std::fs::remove_dir_all(&self.folder).expect("the folder is removed");
        std::mem::forget(self);
    }

    pub fn admin(&self) -> Database {
        self.client.database("admin")
    }

    pub fn docs(&self) -> Collection<Document> {
        self.database.collection(DOCS)
    }

    /// The full name of a collection of this test.
    pub fn namespace(&self, collection: &str) -> String {
        format!("{}.{collection}", self.database.name())
    }

    pub async fn insert(&self, documents: impl IntoIterator<Item = Document>) {
        self.insert_into(DOCS, documents).await;
    }

    pub async fn insert_into(&self, collection: &str, documents: impl IntoIterator<Item = Document>) {
        let collection: Collection<Document> = self.database.collection(collection);
        let documents: Vec<Document> = documents.into_iter().collect();
        for part in documents.chunks(5000) {
            collection.insert_many(part).await.expect("documents are inserted");
        }
    }

    /// A config for the collection `docs` and this API.
    pub fn config(&self, api: &KeyApi) -> Config {
        self.config_for_url(&api.key_url())
    }

    pub fn config_for_url(&self, url: &str) -> Config {
        Config::new(&self.uri, self.state.name(), url).target(
            "docs",
            &self.namespace(DOCS),
            ["legacyKey", "newKey", "newKeyFlag"],
        )
    }

    /// Writes the config where the programs of this bench find it.
    pub fn configure(&self, config: &Config) {
        self.configure_text(&config.text());
    }

    pub fn configure_text(&self, text: &str) {
        std::fs::write(self.folder.join("mongorekey.toml"), text).expect("the config is written");
    }

    /// The program with these arguments, separated by spaces, and `--output json`.
    pub fn program(&self, arguments: &str) -> Program {
        Program::new(&self.folder).arguments("--output json").arguments(arguments)
    }

    pub async fn run(&self, arguments: &str) -> Finished {
        self.program(arguments).run().await
    }

    /// The result for people of a command that succeeds.
    pub async fn text(&self, arguments: &str) -> String {
        Program::new(&self.folder).arguments(arguments).run().await.expect_exit(0).stdout
    }

    /// What the status of a running job says about its speed; empty where it does not run.
    pub async fn limited_by(&self, job: &str) -> String {
        let status = self.run(&format!("status {job}")).await;
        let job = &status.json["jobs"][0];
        if job["running_now"] == true {
            job["limited_by"].as_str().unwrap_or_default().into()
        } else {
            String::new()
        }
    }

    /// Creates the index of the collection `docs` through the program.
    pub async fn create_index(&self) {
        self.configure(&self.config_for_url("http://127.0.0.1:9/{key}"));
        self.run("index create").await.expect_exit(0);
    }

    /// All documents by their `_id`, as they are.
    pub async fn documents(&self, collection: &str) -> Vec<Document> {
        let collection: Collection<Document> = self.database.collection(collection);
        let cursor = collection.find(doc! {}).sort(doc! {"_id": 1}).await.expect("a cursor");
        cursor.try_collect().await.expect("all documents")
    }

    /// All documents by the bytes of their `_id`, without the times of their flags: two runs that
    /// did the same have equal end states.
    pub async fn end_state(&self, collection: &str) -> BTreeMap<Vec<u8>, Document> {
        let documents = self.documents(collection).await;
        documents
            .into_iter()
            .map(|mut document| {
                if let Ok(flag) = document.get_document_mut("newKeyFlag") {
                    assert!(flag.remove("at").is_some_and(|at| at.as_datetime().is_some()), "{flag}");
                }
                (id_bytes(&document), document)
            })
            .collect()
    }

    pub async fn count(&self, filter: Document) -> u64 {
        self.docs().count_documents(filter).await.expect("a count")
    }

    /// Documents with their key, of `docs`.
    pub async fn filled(&self) -> u64 {
        self.count(doc! {"newKey": {"$type": "string"}}).await
    }

    /// Documents with a flag, of `docs`.
    pub async fn flagged(&self) -> u64 {
        self.count(doc! {"newKeyFlag": {"$ne": Bson::Null}}).await
    }

    /// The job document, where there is one.
    pub async fn job(&self, name: &str) -> Option<Document> {
        let jobs: Collection<Document> = self.state.collection("jobs");
        jobs.find_one(doc! {"_id": name}).await.expect("the jobs are readable")
    }

    /// Whether the state database exists: a command that touched nothing has not made it.
    pub async fn has_state(&self) -> bool {
        let names = self.client.list_database_names().await.expect("names");
        names.iter().any(|name| name == self.state.name())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let names = [self.database.name().to_owned(), self.state.name().to_owned()];
        let uri = self.uri.clone();
        // A runtime of its own: the one of the test may be unwinding.
        let cleaner = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let client = connect(&uri).await;
                for name in names {
                    client.database(&name).drop().await.map_err(std::io::Error::other)?;
                }
                client.shutdown().await;
                std::io::Result::Ok(())
            })
        });
        let removed = std::fs::remove_dir_all(&self.folder);
        let dropped = cleaner.join();
        if !std::thread::panicking() {
            removed.expect("the folder is removed");
            dropped.expect("no panic").expect("the databases are dropped");
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "tests look at the database past the product")]
pub async fn connect(uri: &str) -> Client {
    Client::with_uri_str(uri).await.expect("the replica set answers")
}

/// The replica set of this test. Tests that run at the same time are spread over several: each has
/// fail points and an oplog of its own.
pub fn uri() -> String {
    let uris = std::env::var(URI_VARIABLE).unwrap_or_else(|_| {
        panic!("{URI_VARIABLE} is not set; run the tests as `scripts/mongod run -- cargo nextest run`")
    });
    let slot = std::env::var(SLOT_VARIABLE).ok().and_then(|slot| slot.parse().ok()).unwrap_or(0_usize);
    let uris: Vec<&str> = uris.split(' ').collect();
    uris[slot % uris.len()].to_owned()
}

/// The same with a further option.
pub fn uri_with(option: &str) -> String {
    let uri = uri();
    let separator = match uri.split_once("://").expect("a URI").1 {
        rest if rest.contains('?') => "&",
        rest if rest.contains('/') => "?",
        _ => "/?",
    };
    format!("{uri}{separator}{option}")
}

/// The bytes of an `_id` with its type.
pub fn id_bytes(document: &Document) -> Vec<u8> {
    let id = document.get("_id").expect("an _id").clone();
    RawDocumentBuf::try_from(&doc! {"": id}).expect("valid BSON").into_bytes()
}

/// Waits until the condition holds; `what` completes "waited in vain for …".
pub async fn wait_for(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition().await {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Numbers that look random and are the same in every run (splitmix64).
pub struct Random(u64);

impl Random {
    pub fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end).expect("a small number")).expect("a small number")
    }
}
