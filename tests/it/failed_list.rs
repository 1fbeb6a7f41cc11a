//! `status --failed` and `status --watch`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bson::oid::ObjectId;
use bson::{Bson, doc};
use serde_json::{Value, json};

use crate::harness::{Bench, wait_for};
use crate::key_api::{Call, KeyApi, Reply};

const ID: &str = "5c2b35015f1a90c307000016";

fn answer(call: &Call) -> Reply {
    match &*call.key {
        "DOWN" => Reply::html(500),
        "ODD" => Reply::html(200),
        _ => Reply::found(call),
    }
}

/// Six documents that can be filled, and five that can't for three reasons, under `_id`s of all kinds.
async fn bench() -> (Bench, KeyApi) {
    let bench = Bench::with_docs(6).await;
    let id = ObjectId::parse_str(ID).expect("an id");
    bench
        .insert([
            doc! {"_id": id, "legacyKey": "DOWN"},
            doc! {"_id": 7_000_000_000_i64, "legacyKey": "DOWN"},
            doc! {"_id": {"region": "kr", "number": 8}, "legacyKey": "ODD"},
            doc! {"_id": "홍길동", "legacyKey": "ODD"},
            doc! {"_id": 9.5, "legacyKey": "."},
        ])
        .await;
    let api = KeyApi::start(answer);
    bench.configure(&bench.config(&api).key_api("max_attempts = 2"));
    (bench, api)
}

/// Reason and key by `_id`.
fn expected() -> BTreeMap<String, (&'static str, &'static str)> {
    [
        (json!({"$oid": ID}), ("server_error", "DOWN")),
        (json!({"$numberLong": "7000000000"}), ("server_error", "DOWN")),
        (json!({"region": "kr", "number": {"$numberInt": "8"}}), ("invalid", "ODD")),
        (json!("홍길동"), ("invalid", "ODD")),
        (json!({"$numberDouble": "9.5"}), ("unsendable_key", ".")),
    ]
    .into_iter()
    .map(|(id, failure)| (id.to_string(), failure))
    .collect()
}

#[track_caller]
fn expect_all(bench: &Bench, list: &[Value]) {
    let expected = expected();
    assert_eq!(list.len(), expected.len(), "{list:#?}");
    for entry in list {
        let id = entry["document"].to_string();
        let (reason, key) = expected.get(&id).unwrap_or_else(|| panic!("{id} did not fail: {entry}"));
        assert_eq!((entry["reason"].as_str(), entry["legacy_key"].as_str()), (Some(*reason), Some(*key)));
        assert_eq!(entry["collection"], json!(bench.namespace("docs")));
        assert_eq!(entry["job"], json!("j"));
        assert!(entry["description"].as_str().is_some_and(|text| !text.is_empty()), "{entry}");
        let at: jiff::Timestamp = entry["at"].as_str().expect("a time").parse().expect("RFC 3339");
        assert!(at.duration_until(jiff::Timestamp::now()).as_secs() < 120, "{entry}");
    }
}

#[tokio::test]
async fn exactly_the_failed_documents_are_listed_until_they_are_filled() {
    let (bench, api) = bench().await;
    // The second run fails the same, and lists nothing twice.
    for _ in 0..2 {
        let run = bench.run("backfill --job j --tps 1000").await.expect_exit(1);
        assert_eq!(run.number("/documents/failed"), 5);
        let status = bench.run("status j --failed").await.expect_exit(0);
        assert_eq!(status.number("/failed_total"), 5);
        expect_all(&bench, status.json["failed"].as_array().expect("a list"));
    }

    let text = bench.text("status j --failed").await;
    assert!(text.contains("j: 5 failed documents"), "{text}");
    for id in expected().keys() {
        assert_eq!(text.lines().filter(|line| line.contains(id)).count(), 1, "{id} in {text}");
    }

    let status = bench.run("status j --failed --file failed.jsonl").await.expect_exit(0);
    assert_eq!((status.number("/failed_total"), &status.json["file"]), (5, &json!("failed.jsonl")));
    let written = std::fs::read_to_string(bench.folder.join("failed.jsonl")).expect("a file");
    let lines: Vec<Value> = written.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    expect_all(&bench, &lines);

    api.change(Reply::found);
    let run = bench.run("backfill --job j --tps 1000").await.expect_exit(1);
    assert_eq!(run.number("/documents/failed"), 1);
    let status = bench.run("status j --failed").await.expect_exit(0);
    assert_eq!(status.number("/failed_total"), 1);
    assert_eq!(status.json["failed"][0]["reason"], json!("unsendable_key"));

    let set = doc! {"$set": {"newKey": "APP"}};
    bench.docs().update_one(doc! {"legacyKey": "."}, set).await.expect("an update");
    bench.run("backfill --job j --tps 1000").await.expect_exit(0);
    let status = bench.run("status j --failed --file failed.jsonl").await.expect_exit(0);
    assert_eq!(status.number("/failed_total"), 0);
    assert_eq!(std::fs::read_to_string(bench.folder.join("failed.jsonl")).expect("a file"), "");
    assert_eq!(bench.text("status j --failed").await.trim(), "j: 0 failed documents");
}

#[tokio::test]
async fn a_limited_run_strikes_off_nothing_that_it_has_not_tried() {
    let (bench, _api) = bench().await;
    bench.run("backfill --job j --tps 1000").await.expect_exit(1);
    bench.insert([doc! {"_id": Bson::Int32(-1), "legacyKey": "K-1"}]).await;
    bench.run("backfill --job j --tps 1000 --limit 1").await.expect_exit(0);
    let status = bench.run("status j --failed").await.expect_exit(0);
    expect_all(&bench, status.json["failed"].as_array().expect("a list"));
}

#[tokio::test]
async fn the_list_is_that_of_one_job_that_exists() {
    let (bench, _api) = bench().await;
    bench.run("backfill --job j --tps 1000").await.expect_exit(1);
    bench.run("status --failed").await.expect_exit(2);
    bench.run("status j --file failed.jsonl").await.expect_exit(2);
    bench.run("status j --failed --file no/such/folder").await.expect_exit(2);
    bench.run("status other --failed").await.expect_exit(3);
}

#[tokio::test]
async fn a_watch_ends_when_nothing_runs_any_more() {
    let bench = Bench::with_docs(80).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.program("backfill --job j --tps 20").spawn();
    wait_for("calls", async || api.count() > 0).await;
    let watch = bench.program("status j --watch").spawn();
    run.finish().await.expect_exit(0);
    let ended = Instant::now();
    let watch = watch.finish().await.expect_exit(0);
    assert!(ended.elapsed() < Duration::from_secs(20), "{:?} after the job", ended.elapsed());
    assert_eq!(watch.text("/jobs/0/state"), "completed");
    assert_eq!(watch.json["jobs"][0]["running_now"], json!(false));
    assert!(watch.stderr.lines().filter(|line| line.contains("running")).count() >= 2, "{}", watch.stderr);

    let begun = Instant::now();
    bench.run("status --watch").await.expect_exit(0);
    assert!(begun.elapsed() < Duration::from_secs(2));
}
