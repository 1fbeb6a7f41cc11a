//! Dumps of keys: in, out, counted and forgotten.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use bson::{Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;
use serde_json::{Value, json};

use crate::harness::{Bench, DOCS, wait_for};
use crate::key_api::{KeyApi, Reply};
use crate::program::{Finished, Signal};

/// The answers of a bench's key map as `legacy key, outcome, new key`.
pub async fn answers(bench: &Bench) -> Vec<(String, String, Option<String>)> {
    let mut found = Vec::new();
    for name in bench.state.list_collection_names().await.expect("names") {
        if !name.starts_with("key_map_") {
            continue;
        }
        let entries: Collection<Document> = bench.state.collection(&name);
        let cursor = entries.find(doc! {}).sort(doc! {"_id": 1}).await.expect("a cursor");
        let entries: Vec<Document> = cursor.try_collect().await.expect("all entries");
        let text = |entry: &Document, name: &str| entry.get_str(name).map(str::to_owned).ok();
        found.extend(entries.iter().map(|entry| {
            let outcome = text(entry, "outcome").expect("an outcome");
            (text(entry, "_id").expect("a key"), outcome, text(entry, "newKey"))
        }));
    }
    found
}

fn found(legacy: &str, new: &str) -> (String, String, Option<String>) {
    (legacy.into(), "found".into(), Some(new.into()))
}

impl Bench {
    pub fn file(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.join(name);
        std::fs::write(&path, text).expect("a file");
        path
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.join(name)).expect("a file in UTF-8")
    }

    fn lines_of_json(&self, name: &str) -> Vec<Value> {
        self.read(name).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

/// A bench whose API must not be called.
async fn unasked() -> (Bench, KeyApi) {
    let bench = Bench::new().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api).key_api("key_pattern = '^N'"));
    (bench, api)
}

fn expect_counts(run: &Finished, [rows, imported, known, replaced, bad]: [u64; 5]) {
    let counts =
        ["rows", "imported", "already_known", "replaced", "bad"].map(|name| run.number(&format!("/{name}")));
    assert_eq!(counts, [rows, imported, known, replaced, bad], "{}", run.stdout);
}

#[tokio::test]
async fn good_rows_are_taken_in_and_bad_ones_told_by_line() {
    let (bench, api) = unasked().await;
    let text: Vec<u8> = [
        "\u{feff}legacyKey,newKey,outcome\r\nK1,N1,found\r\n".as_bytes(),
        b"\"K,2\r\n\",\"N\"\"2\",\r\n,N3,\r\nK4,,\r\n\r\nK5,bad,\r\n",
        b"K6,\xff,\r\nK7,,not_found\r\nK8,,rejected\r\nK1,N1,\r\nK1,N9,\r\nK9\r\n",
    ]
    .concat();
    bench.file("keys.csv", text);
    let run = bench.run("key-map import keys.csv --rejects bad.jsonl").await.expect_exit(1);
    expect_counts(&run, [11, 4, 1, 0, 6]);
    let wanted = [
        found("K,2\r\n", "N\"2"),
        found("K1", "N1"),
        ("K7".into(), "not_found".into(), None),
        ("K8".into(), "rejected".into(), None),
    ];
    assert_eq!(answers(&bench).await, wanted);
    let bad: Vec<(u64, String)> = bench
        .lines_of_json("bad.jsonl")
        .iter()
        .map(|row| {
            (row["line"].as_u64().expect("a line"), row["reason"].as_str().expect("a reason").to_owned())
        })
        .collect();
    let mut sorted = bad.clone();
    sorted.sort();
    let wanted = [
        (5, "legacy_key"),
        (6, "new_key"),
        (8, "key_pattern"),
        (9, "encoding"),
        (13, "contradiction"),
        (14, "fields"),
    ];
    assert_eq!(sorted, wanted.map(|(line, reason)| (line, reason.to_owned())));
    assert_eq!(run.json["bad_rows"].as_array().map(Vec::len), Some(6));
    assert!(bench.read("bad.jsonl").contains("line 2"), "the earlier line is named");

    // A second time changes nothing.
    let again = bench.run("key-map import keys.csv").await.expect_exit(1);
    expect_counts(&again, [11, 0, 5, 0, 6]);
    assert_eq!(api.count(), 0);
}

#[tokio::test]
async fn imported_keys_cost_no_call() {
    let (bench, api) = unasked().await;
    bench
        .insert([
            doc! {"_id": 1, "legacyKey": "K1"},
            doc! {"_id": 2, "legacyKey": 7},
            doc! {"_id": 3, "legacyKey": "K3"},
            doc! {"_id": 4, "legacyKey": "K4"},
        ])
        .await;
    bench.run("index create").await.expect_exit(0);
    let lines = [
        json!({"legacyKey": "K1", "newKey": "N-1"}),
        json!({"legacy_key": 7.0, "new_key": "N-7"}),
        json!({"legacyKey": "K3", "outcome": "not_found"}),
    ];
    let text = lines.map(|line| line.to_string()).join("\n");
    let path = bench.file("keys", text);
    let run = bench.program("key-map import - --format jsonl").input(&path).run().await.expect_exit(0);
    expect_counts(&run, [3, 3, 0, 0, 0]);
    bench.run("backfill --tps 1000").await.expect_exit(0).expect_calls(1);
    assert_eq!(api.asked().keys().collect::<Vec<_>>(), ["K4"]);
    assert_eq!(bench.count(doc! {"newKey": {"$in": ["N-1", "N-7", "N-K4"]}}).await, 3);
    assert_eq!(bench.count(doc! {"_id": 3, "newKeyFlag.reason": "not_found"}).await, 1);
}

#[tokio::test]
async fn what_is_known_stays_unless_it_is_to_be_replaced() {
    let (bench, _api) = unasked().await;
    bench.file("first.csv", "legacyKey,newKey\nK1,N1\nK2,N2\nK3,N3\n");
    bench.run("key-map import first.csv").await.expect_exit(0);
    bench.file("second.csv", "legacyKey,newKey,outcome\nK1,N1,\nK2,NX,\nK3,,not_found\nK4,N4,\n");
    // The same line twice is the same twice.
    bench.file("twice.csv", "legacyKey,newKey\nK1,NX\nK1,NX\nK4,N4\nK4,N4\n");
    let before = answers(&bench).await;

    let run = bench.run("key-map import second.csv --dry-run").await.expect_exit(1);
    expect_counts(&run, [4, 1, 1, 0, 2]);
    let run = bench.run("key-map import twice.csv --dry-run").await.expect_exit(1);
    expect_counts(&run, [4, 1, 1, 0, 2]);
    assert_eq!(answers(&bench).await, before);
    let run = bench.run("key-map import second.csv").await.expect_exit(1);
    expect_counts(&run, [4, 1, 1, 0, 2]);
    assert_eq!(run.json["bad_by"], json!({"conflict": 2}));
    assert_eq!(answers(&bench).await[..3], before);

    let run = bench.run("key-map import second.csv --replace").await.expect_exit(0);
    expect_counts(&run, [4, 0, 2, 2, 0]);
    let wanted =
        [found("K1", "N1"), found("K2", "NX"), ("K3".into(), "not_found".into(), None), found("K4", "N4")];
    assert_eq!(answers(&bench).await, wanted);
}

#[tokio::test]
async fn a_file_that_contradicts_itself_far_apart_is_told_so() {
    let (bench, _api) = unasked().await;
    let mut text = String::from("legacyKey,newKey\nK0,N0\n");
    for number in 1..=3000 {
        writeln!(text, "K{number},N{number}").expect("a string");
    }
    text.push_str("K0,NX\n");
    bench.file("keys.csv", &text);
    for options in ["--dry-run", "", "--replace"] {
        let run = bench.run(&format!("key-map import keys.csv {options}")).await.expect_exit(1);
        assert_eq!(run.number("/bad"), 1, "{options}: {}", run.stdout);
        assert_eq!(run.number("/bad_rows/0/line"), 3003);
        assert_eq!(run.text("/bad_rows/0/reason"), "contradiction", "{options}");
        assert_eq!(bench.has_state().await, options != "--dry-run");
    }
    assert!(answers(&bench).await.contains(&found("K0", "N0")));
}

#[tokio::test]
async fn a_header_without_the_columns_touches_nothing() {
    let (bench, _api) = unasked().await;
    bench.file("keys.csv", "old,new\nK1,N1\n");
    for arguments in
        ["key-map import keys.csv", "key-map import none.csv", "key-map import keys.csv --rejects keys.csv"]
    {
        bench.run(arguments).await.expect_exit(2);
    }
    assert!(!bench.has_state().await);
    assert_eq!(bench.read("keys.csv"), "old,new\nK1,N1\n");
    let run = bench.run("key-map import keys.csv --legacy-column old --key-column new").await.expect_exit(0);
    expect_counts(&run, [1, 1, 0, 0, 0]);
}

#[tokio::test]
async fn an_export_imported_elsewhere_is_the_same_map() {
    let (bench, _api) = unasked().await;
    let (other, _other_api) = unasked().await;
    let mut text =
        String::from("legacyKey,newKey,outcome\n\"a,\"\"b\"\"\n\",N1,\n\" \",,rejected\n홍길동,,not_found\n");
    for number in 0..12_000 {
        writeln!(text, "K{number},N{number},found").expect("a string");
    }
    bench.file("keys.csv", text);
    bench.run("key-map import keys.csv").await.expect_exit(0);
    for name in ["out.csv", "out.jsonl"] {
        let run = bench.run(&format!("key-map export {name}")).await.expect_exit(0);
        assert_eq!(run.number("/answers"), 12_003);
        std::fs::copy(bench.folder.join(name), other.folder.join(name)).expect("a copy");
        let run = other.run(&format!("key-map import {name}")).await.expect_exit(0);
        assert_eq!(run.number("/rows"), 12_003);
        assert!(answers(&other).await == answers(&bench).await, "{name}");
    }
    let left = std::fs::read_dir(&bench.folder).expect("a folder");
    let unfinished = left
        .filter(|entry| entry.as_ref().expect("an entry").path().to_string_lossy().contains("unfinished"));
    assert_eq!(unfinished.count(), 0);
}

#[tokio::test]
async fn held_answers_are_not_exported_and_stdout_carries_one_thing() {
    let (bench, _api) = unasked().await;
    bench.file("keys.csv", "legacyKey,newKey,outcome\nK1,N1,\nK2,,not_found\nK3,,not_found\n");
    let run = bench.run("key-map import keys.csv").await.expect_exit(0);
    let entries: Collection<Document> = bench.state.collection(run.text("/collection"));
    entries.update_one(doc! {"_id": "K3"}, doc! {"$set": {"held": true}}).await.expect("an update");
    for arguments in ["key-map export", "key-map export .", "key-map export /dev/null --format csv"] {
        bench.run(arguments).await.expect_exit(2);
    }
    bench.run("key-map export out.csv").await.expect_exit(0);
    assert_eq!(bench.read("out.csv"), "legacyKey,newKey,outcome\nK1,N1,found\nK2,,not_found\n");
    bench.run("key-map export out.jsonl --outcome not_found --held").await.expect_exit(0);
    let wanted = [
        json!({"legacyKey": "K2", "outcome": "not_found"}),
        json!({"legacyKey": "K3", "outcome": "not_found", "held": true}),
    ];
    assert_eq!(bench.lines_of_json("out.jsonl"), wanted);
    let run = bench.run("key-map import out.jsonl").await.expect_exit(1);
    assert_eq!(run.json["bad_by"], json!({"held": 1}));

    let output = std::process::Command::new(env!("CARGO_BIN_EXE_mongorekey"))
        .current_dir(&bench.folder)
        .args(["key-map", "export", "--outcome", "found"])
        .output()
        .expect("the program runs");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "legacyKey,newKey,outcome\nK1,N1,found\n");
}

#[tokio::test]
async fn stats_count_and_show_shared_keys() {
    let (bench, _api) = unasked().await;
    bench.file("keys.csv", "legacyKey,newKey,outcome\nK1,N1,\nK2,N1,\nK3,N3,\nK4,,not_found\n");
    let run = bench.run("key-map import keys.csv").await.expect_exit(0);
    let entries: Collection<Document> = bench.state.collection(run.text("/collection"));
    entries.update_one(doc! {"_id": "K4"}, doc! {"$set": {"held": true}}).await.expect("an update");
    let run = bench.run("key-map stats").await.expect_exit(0);
    let wanted = json!({"total": 4, "found": 3, "not_found": 1, "rejected": 0, "held": 1});
    assert_eq!(run.json["answers"], wanted);
    assert_eq!(run.json["jobs"], json!([{"job": "import keys.csv", "answers": 4}]));
    let examples = json!([{"new_key": "N1", "count": 2, "legacy_keys": ["K1", "K2"]}]);
    assert_eq!(run.json["shared_new_keys"], json!({"count": 1, "examples": examples}));
    assert!(run.text("/oldest") <= run.text("/newest"));
}

#[tokio::test]
async fn a_key_map_is_dropped_only_when_nobody_works_with_it() {
    let bench = Bench::with_docs(200).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let backfill = bench.program("backfill --tps 20").spawn();
    wait_for("calls", async || api.count() > 3).await;
    let refused = bench.run("key-map drop --yes").await.expect_exit(3);
    assert!(refused.text("/error/message").contains(&backfill.pid().to_string()), "{}", refused.stdout);
    assert!(!answers(&bench).await.is_empty());
    // A killed one is none any more.
    backfill.kill();
    bench.run("key-map drop").await.expect_exit(2);
    let known = answers(&bench).await.len();
    assert!(known > 0);
    let run = bench.run("key-map drop --yes").await.expect_exit(0);
    assert_eq!(run.number("/answers_dropped"), u64::try_from(known).expect("small"));
    assert!(answers(&bench).await.is_empty());
}

#[tokio::test]
async fn a_killed_import_is_simply_started_again() {
    let (bench, _api) = unasked().await;
    let mut text = String::from("legacyKey,newKey\n");
    for number in 0..120_000 {
        writeln!(text, "K{number:06},N{number}").expect("a string");
    }
    bench.file("keys.csv", text);
    let import = bench.program("key-map import keys.csv").spawn();
    wait_for("answers to kill it in the middle of", async || !answers(&bench).await.is_empty()).await;
    import.kill();
    let before = answers(&bench).await.len();
    assert!(before < 120_000, "it was through before it was killed");
    let run = bench.run("key-map import keys.csv").await.expect_exit(0);
    assert!(run.number("/already_known") >= u64::try_from(before).expect("small"), "{}", run.stdout);
    assert_eq!(run.number("/already_known") + run.number("/imported"), 120_000);
    assert_eq!(answers(&bench).await.len(), 120_000);
}

#[tokio::test]
async fn an_interrupted_export_leaves_the_old_file() {
    let (bench, _api) = unasked().await;
    let mut text = String::from("legacyKey,newKey\n");
    for number in 0..60_000 {
        writeln!(text, "K{number},N{number}").expect("a string");
    }
    bench.file("keys.csv", text);
    bench.run("key-map import keys.csv").await.expect_exit(0);
    bench.file("out.csv", "the old one");
    let has_unfinished = || {
        let files = std::fs::read_dir(&bench.folder).expect("a folder");
        files
            .filter(|file| file.as_ref().expect("an entry").path().to_string_lossy().contains("unfinished"))
            .count()
            > 0
    };
    let export = bench.program("key-map export out.csv").spawn();
    wait_for("the unfinished file", async || has_unfinished()).await;
    export.signal(Signal::Interrupt);
    export.finish().await.expect_exit(130);
    assert_eq!(bench.read("out.csv"), "the old one");
    assert!(!has_unfinished());
}

#[tokio::test]
async fn rows_beside_a_backfill_agree_with_its_answers() {
    let bench = Bench::with_docs(300).await;
    let api = KeyApi::start(|call| Reply::found(call).after(Duration::from_millis(5)));
    bench.configure(&bench.config(&api));
    let mut text = String::from("legacyKey,newKey\n");
    for number in 1..=300 {
        writeln!(text, "K{number},N-K{number}").expect("a string");
    }
    bench.file("keys.csv", text);
    let backfill = bench.program("backfill --tps 60 --chunk 20").spawn();
    wait_for("calls", async || api.count() > 20).await;
    let run = bench.run("key-map import keys.csv").await.expect_exit(0);
    assert_eq!(run.number("/imported") + run.number("/already_known"), 300);
    backfill.finish().await.expect_exit(0);
    assert_eq!(answers(&bench).await.len(), 300);
    assert_eq!(bench.documents(DOCS).await.len(), 300);
    assert!(api.count() <= 300, "{} calls", api.count());
}
