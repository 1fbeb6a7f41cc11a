//! What the tests of `cleanse` and `verify` share: configs, documents of every
//! kind, raw bytes on both sides, and fail points of the server.

use std::collections::BTreeMap;
use std::fs::File;

use bson::oid::ObjectId;
use bson::spec::BinarySubtype;
use bson::{Bson, DateTime, Document, RawDocument, RawDocumentBuf, Timestamp, doc, rawdoc};
use futures_util::TryStreamExt;
use mongodb::{Collection, Database};
use mongorekey::mongo::exact;

use crate::config::Config;
use crate::harness::{Bench, uri, wait_for};
use crate::program::Finished;

/// The collection to copy from.
pub const SOURCE: &str = "source";
/// The collection to copy to.
pub const TARGET: &str = "target";

/// The bytes of documents by those of their `_id`s.
pub type Bytes = BTreeMap<Vec<u8>, Vec<u8>>;

/// Writes a config whose `[cleanse]` copies `source` to `target` by these further lines.
pub fn configure(bench: &Bench, rules: &str) {
    bench.configure_text(&config(bench, rules));
}

/// The text of that config.
pub fn config(bench: &Bench, rules: &str) -> String {
    let rest = Config::new(&bench.uri, bench.state.name(), "http://127.0.0.1:9/{key}").text();
    format!("{rest}\n[cleanse]\nsource = '{}'\nto = '{TARGET}'\n{rules}\n", bench.namespace(SOURCE))
}

/// The default name of the job that copies `source` to `target`.
pub fn job_name(bench: &Bench) -> String {
    format!("cleanse-{}-to-{TARGET}", bench.namespace(SOURCE))
}

/// What has the name of a collection and, while a cleanse copies to it, the number of its epoch.
async fn names_while_copied(bench: &Bench, collection: &str) -> Vec<String> {
    let before = format!("{collection}.mongorekey-");
    let names = bench.database.list_collection_names().await.expect("names");
    names.into_iter().filter(|name| name.starts_with(&before)).collect()
}

/// The name that a collection has now, be it that of an epoch.
pub async fn name_now(bench: &Bench, collection: &str) -> String {
    names_while_copied(bench, collection).await.pop().unwrap_or_else(|| collection.to_owned())
}

/// How many documents of a collection match, whatever its name is now.
pub async fn count_now(bench: &Bench, collection: &str, filter: Document) -> u64 {
    let mut counted = None;
    wait_for("a count", async || {
        let named: Collection<Document> = bench.database.collection(&name_now(bench, collection).await);
        // A run that begins gives it another name, and the server ends what reads it.
        counted = named.count_documents(filter.clone()).await.ok();
        counted.is_some()
    })
    .await;
    counted.expect("a count")
}

/// The namespace to which the next run of this cleanse is going to copy what will be this collection. A
/// job that is not there yet is begun.
pub async fn next_namespace(bench: &Bench, command: &str, collection: &str) -> String {
    let job = async || bench.job(&job_name(bench)).await;
    if job().await.is_none() {
        let begun = bench.program(command).env("MONGOREKEY_CRASH_AT", "cleanse_renamed:1").run().await;
        assert_eq!(begun.exit, None, "killed by itself: {}", begun.output());
    }
    let job = job().await.expect("the job");
    let created = job.get_datetime("created_at").expect("a time").timestamp_millis();
    let epoch = created / 1000 * 1000 + job.get_i64("fence").expect("a number") + 1;
    bench.namespace(&format!("{collection}.mongorekey-{epoch}"))
}

/// Inserts documents as they are, whatever their fields are called.
pub async fn insert_raw(bench: &Bench, collection: &str, documents: Vec<RawDocumentBuf>) {
    let collection: Collection<RawDocumentBuf> = bench.database.collection(collection);
    for part in documents.chunks(2000) {
        collection.insert_many(part).await.expect("documents are inserted");
    }
}

/// Stores a document that an insert would change: one with a `Timestamp(0, 0)` at its top level.
pub async fn store_exactly(bench: &Bench, collection: &str, document: Document) {
    let id = document.get("_id").expect("an _id").clone();
    let command = doc! {"update": collection, "updates": [
        {"q": {"_id": id}, "u": [{"$replaceWith": {"$literal": document}}], "upsert": true},
    ]};
    let reply = bench.database.run_command(command).await.expect("an answer");
    assert!(!reply.contains_key("writeErrors"), "{reply}");
}

/// All documents of a collection as bytes.
pub async fn bytes(bench: &Bench, collection: &str) -> Bytes {
    bytes_where(bench, collection, doc! {}).await
}

/// The documents that match, as bytes.
pub async fn bytes_where(bench: &Bench, collection: &str, filter: Document) -> Bytes {
    let collection: Collection<RawDocumentBuf> = bench.database.collection(collection);
    let documents: Vec<RawDocumentBuf> =
        collection.find(filter).await.expect("a cursor").try_collect().await.expect("documents");
    documents.into_iter().map(|document| (raw_id(&document), document.into_bytes())).collect()
}

fn raw_id(document: &RawDocument) -> Vec<u8> {
    exact::id_bytes(document).expect("an _id")
}

/// Says which documents differ instead of printing megabytes.
#[track_caller]
pub fn assert_same(found: &Bytes, expected: &Bytes) {
    let id = |bytes: &Vec<u8>| format!("{:?}", RawDocument::from_bytes(bytes).expect("valid BSON"));
    let missing: Vec<_> = expected.keys().filter(|key| !found.contains_key(*key)).map(id).collect();
    let extra: Vec<_> = found.keys().filter(|key| !expected.contains_key(*key)).map(id).collect();
    let changed: Vec<_> =
        found.iter().filter(|(key, value)| expected.get(*key).is_some_and(|other| other != *value)).collect();
    let shown: Vec<_> = changed.iter().take(5).map(|(key, _)| id(key)).collect();
    assert!(
        missing.is_empty() && extra.is_empty() && changed.is_empty(),
        "{} missing {:?}; {} extra {:?}; {} changed {shown:?}",
        missing.len(),
        &missing[..missing.len().min(5)],
        extra.len(),
        &extra[..extra.len().min(5)],
        changed.len(),
    );
}

/// `_id`s of all types that a server accepts, `count` and a few more.
pub fn ids(count: u32) -> Vec<Bson> {
    let mut ids = vec![
        Bson::MinKey,
        Bson::MaxKey,
        true.into(),
        false.into(),
        f64::NAN.into(),
        f64::INFINITY.into(),
        f64::NEG_INFINITY.into(),
        (-1e300).into(),
        "".into(),
        "$weird".into(),
        "홍길동".into(),
        doc! {}.into(),
        doc! {"a": Bson::Null}.into(),
        doc! {"x.y": 1}.into(),
        Bson::Binary(bson::Binary { subtype: BinarySubtype::Generic, bytes: Vec::new() }),
        Bson::JavaScriptCode("f()".into()),
        Bson::Timestamp(Timestamp { time: 0, increment: 0 }),
        i64::MAX.into(),
        i64::MIN.into(),
    ];
    ids.extend((0..count).map(|number| match number % 10 {
        0 => {
            ObjectId::from_bytes(spread(number).to_be_bytes()[..12].try_into().expect("twelve bytes")).into()
        }
        1 => Bson::Int32(i32::try_from(number).expect("small") - 6000),
        2 => Bson::Int64((i64::from(number) << 33) - (1 << 45)),
        3 => Bson::Double(f64::from(number) + 0.25),
        4 => format!("{number}.5").parse::<bson::Decimal128>().expect("a decimal").into(),
        5 => format!("id-{:x}", spread(number)).into(),
        6 => bson::Uuid::from_bytes(spread(number).to_be_bytes()).into(),
        7 => doc! {"year": number % 20, "number": i64::from(number)}.into(),
        8 => DateTime::from_millis((i64::from(number) - 6000) * 86_400_000).into(),
        _ => Bson::Timestamp(Timestamp { time: number + 1, increment: 7 }),
    }));
    ids
}

fn spread(number: u32) -> u128 {
    (u128::from(number) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
}

/// A document with a value of every BSON type.
pub fn every_type(id: Bson, number: u32) -> Document {
    doc! {
        "_id": id,
        "double": f64::from(number) / 3.0,
        "minusZero": -0.0,
        "nan": f64::NAN,
        "string": format!("값-{number}"),
        "document": {"b": 1, "a": {"z": [], "y": {}}},
        "array": [1, 1_i64, 1.0, [Bson::Null, "x"], {"k": true}],
        "binary": bson::Binary { subtype: BinarySubtype::UserDefined(0x80), bytes: number.to_be_bytes().to_vec() },
        "uuid": bson::Uuid::from_bytes(spread(number).to_be_bytes()),
        "undefined": Bson::Undefined,
        "objectId": ObjectId::from_bytes([7; 12]),
        "bool": number.is_multiple_of(2),
        "date": DateTime::from_millis(-i64::from(number)),
        "null": Bson::Null,
        "regex": bson::Regex { pattern: "^a.*z$".try_into().expect("no zero"), options: "im".try_into().expect("no zero") },
        "code": Bson::JavaScriptCode("function() {}".into()),
        "symbol": Bson::Symbol("sym".into()),
        "scoped": bson::JavaScriptCodeWithScope { code: "x".into(), scope: doc! {"x": 1} },
        "int": Bson::Int32(i32::try_from(number).expect("small")),
        "timestamp": Timestamp { time: number, increment: 1 },
        "long": i64::from(number),
        "decimal": "1.10".parse::<bson::Decimal128>().expect("a decimal"),
        "minKey": Bson::MinKey,
        "maxKey": Bson::MaxKey,
        "nested": {"zero": Timestamp { time: 0, increment: 0 }},
    }
}

/// Documents that writing in the wrong way changes: `$merge` with `keepExisting`, an update that
/// replaces, a modifier. The other ones need [`store_exactly`].
pub fn delicate() -> Vec<RawDocumentBuf> {
    vec![
        rawdoc! {"_id": "dot", "x.y": 2, "x": {"y": 1}},
        rawdoc! {"_id": "dots", "a.b.c": {"d.e": 1}, "": 3, ".": 4, "..": 5},
        rawdoc! {"_id": "dollar", "$a": 1, "b": 2, "$set": {"c": 1}},
        rawdoc! {"_id": "nested dollars", "n": {"$a": 1, "$b": {"$c": ["$d", "$$ROOT"]}, "e.f": 1}},
        rawdoc! {"_id": "expression", "v": {"$add": [1, 2]}, "w": "$v", "x": "$$REMOVE"},
        rawdoc! {"_id": "reference", "r": {"$ref": "c", "$id": 1, "$db": "d"}},
        rawdoc! {"_id": "marked", "__mongorekey_pending": true, "a": 1},
        rawdoc! {"_id": "empty values", "a": "", "b": {}, "c": [], "d": null},
        rawdoc! {"_id": "order", "z": 1, "y": 2, "x": 3, "_a": 4},
        rawdoc! {"_id": "bare"},
    ]
}

/// Documents whose top level holds a `Timestamp(0, 0)`.
pub fn zero_timestamps() -> Vec<Document> {
    let zero = Timestamp { time: 0, increment: 0 };
    vec![
        doc! {"_id": "zero", "t": zero},
        doc! {"_id": "zeros", "x.y": 1, "t": zero, "n": {"t": zero}, "u": zero, "z": 1},
        doc! {"_id": "marked zero", "__mongorekey_pending": true, "t": zero},
        doc! {"_id": Timestamp { time: 0, increment: 1 }, "t": zero, "a": -0.0},
    ]
}

/// A fail point of the server, set until this is dropped. The server has one of each name for all
/// tests, so that a file lock lets one test at a time have it.
pub struct FailPoint {
    name: &'static str,
    _lock: File,
}

impl FailPoint {
    /// Waits for the fail point of that name; nothing fails yet.
    pub fn reserve(name: &'static str) -> Self {
        // Of this server: others have fail points of their own.
        let server: String = uri().chars().filter(char::is_ascii_digit).collect();
        let path = std::env::temp_dir().join(format!("mongorekey-it-{name}-{server}.lock"));
        let lock = File::create(path).expect("a lock file");
        lock.lock().expect("the lock");
        Self { name, _lock: lock }
    }

    /// Sets it; returns how often it was entered so far.
    pub async fn set(&self, bench: &Bench, mode: impl Into<Bson>, data: Document) -> i64 {
        set(&bench.admin(), self.name, mode.into(), data).await
    }

    /// Waits until it was entered so often in all.
    pub async fn wait_until_entered(&self, bench: &Bench, times: i64) {
        let wait = doc! {"waitForFailPoint": self.name, "timesEntered": times, "maxTimeMS": 60_000};
        bench.admin().run_command(wait).await.expect("the fail point is entered");
    }

    pub async fn off(&self, bench: &Bench) {
        set(&bench.admin(), self.name, "off".into(), doc! {}).await;
    }
}

async fn set(admin: &Database, name: &str, mode: Bson, data: Document) -> i64 {
    let command = doc! {"configureFailPoint": name, "mode": mode, "data": data};
    let mut reply = admin.run_command(command.clone()).await;
    if reply.is_err() {
        // Who has waited for its turn has not answered the driver's questions meanwhile.
        reply = admin.run_command(command).await;
    }
    let reply = reply.expect("the fail point is set");
    let count = reply.get("count").expect("a count");
    count.as_i64().or_else(|| count.as_i32().map(Into::into)).expect("a number")
}

impl Drop for FailPoint {
    #[expect(clippy::disallowed_methods, reason = "tests look at the product from outside")]
    fn drop(&mut self) {
        let name = self.name;
        let cleaner = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let client = mongodb::Client::with_uri_str(uri()).await.expect("the replica set answers");
                set(&client.database("admin"), name, "off".into(), doc! {}).await;
                client.shutdown().await;
            });
        });
        let ended = cleaner.join();
        if !std::thread::panicking() {
            ended.expect("the fail point is off");
        }
    }
}

/// Runs a cutover or a rollback beside writers; again where its gates did not hold: a busy machine may
/// be too far behind, or a document written too often to be found equal. What is really wrong stays
/// wrong. `crash` is where it is to be killed.
pub async fn run_when_near(bench: &Bench, command: &str, crash: Option<&str>) -> Finished {
    let is_held_by_gates = |run: &Finished| {
        let gates = run.json["gates"].as_array().map(Vec::as_slice).unwrap_or_default();
        run.exit == Some(3) && gates.iter().any(|gate| gate["passed"] == false)
    };
    for _ in 0..5 {
        let mut program = bench.program(command);
        if let Some(point) = crash {
            program = program.env("MONGOREKEY_CRASH_AT", point);
        }
        let run = program.run().await;
        if !is_held_by_gates(&run) {
            return run;
        }
    }
    panic!("{command}: the gates did not hold, five times in a row");
}
