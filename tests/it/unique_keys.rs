//! `unique_keys`: an API that gives one new key to two legacy keys is not believed twice.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bson::doc;
use serde_json::json;

use crate::harness::{Bench, DOCS};
use crate::key_api::{Call, KeyApi, Reply};

const KEYS: usize = 60;
/// Documents of each key.
const COPIES: usize = 5;
/// Keys whose new key is another's already.
const SHARED: usize = 20;

/// Of three keys in a row the first two get the same new key.
fn new_key(key: &str) -> String {
    let number: u32 = key[1..].parse().expect("a number");
    format!("N-{}", if number % 3 == 1 { number - 1 } else { number })
}

fn answer(call: &Call) -> Reply {
    // The answers of both come at nearly the same time, in either order.
    Reply::key(call, &new_key(&call.key)).after(Duration::from_millis(call.number as u64 % 3))
}

async fn bench() -> (Bench, KeyApi) {
    let bench = Bench::new().await;
    let documents = (0..KEYS * COPIES)
        .map(|id| doc! {"_id": i32::try_from(id).expect("small"), "legacyKey": format!("K{}", id % KEYS)});
    bench.insert(documents).await;
    bench.create_index().await;
    let api = KeyApi::start(answer);
    bench.configure(&bench.config(&api).key_api("unique_keys = true"));
    (bench, api)
}

/// Legacy keys by new key; every document of a legacy key is filled, or none.
async fn owners(bench: &Bench) -> BTreeMap<String, BTreeSet<String>> {
    let mut filled: BTreeMap<String, usize> = BTreeMap::new();
    let mut owners: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for document in bench.documents(DOCS).await {
        assert!(document.get("newKeyFlag").is_none(), "{document}");
        let legacy = document.get_str("legacyKey").expect("kept").to_owned();
        let Ok(key) = document.get_str("newKey") else { continue };
        assert_eq!(key, new_key(&legacy));
        owners.entry(key.to_owned()).or_default().insert(legacy.clone());
        *filled.entry(legacy).or_default() += 1;
    }
    assert!(filled.values().all(|count| *count == COPIES), "{filled:?}");
    owners
}

/// With any chunk and any number of calls in flight.
async fn is_given_once(arguments: &str) {
    let (bench, api) = bench().await;
    let run = bench.run(&format!("backfill --job j {arguments}")).await.expect_exit(1);
    let [lost, all] = [SHARED, KEYS].map(|keys| u64::try_from(keys * COPIES).expect("small"));
    run.expect_documents(&[
        ("candidates", all),
        ("filled", all - lost),
        ("failed", lost),
        ("candidates_left", lost),
    ]);
    assert_eq!(run.json["documents"]["failed_by"], json!({"shared_new_key": lost}), "{arguments}");
    assert_eq!(api.count(), KEYS, "{arguments}: one call per key");
    let first = owners(&bench).await;
    assert_eq!(first.len(), KEYS - SHARED);
    assert!(first.values().all(|owners| owners.len() == 1), "{arguments}: {first:?}");

    let status = bench.run("status j --failed").await.expect_exit(0);
    assert_eq!(status.number("/failed_total"), lost);
    for entry in status.json["failed"].as_array().expect("a list") {
        let owner = &first[&new_key(entry["legacy_key"].as_str().expect("a key"))];
        let description = entry["description"].as_str().expect("a text");
        assert!(owner.iter().all(|owner| description.contains(owner)), "{entry}");
    }

    // Whose key it is stays decided.
    let before = api.count();
    let again = bench.run(&format!("backfill --job j {arguments}")).await.expect_exit(1);
    again.expect_documents(&[("candidates", lost), ("failed", lost), ("candidates_left", lost)]);
    assert!(api.count() - before <= SHARED, "{} calls", api.count() - before);
    assert_eq!(owners(&bench).await, first);
}

#[tokio::test]
async fn a_new_key_is_given_to_one_legacy_key_only() {
    is_given_once("--tps 100000 --concurrency 1 --chunk 1000").await;
}

#[tokio::test]
async fn whatever_is_in_flight_at_once_a_new_key_is_given_once() {
    is_given_once("--tps 100000 --concurrency 64 --chunk 7").await;
    is_given_once("--tps 100000 --concurrency 64 --chunk 300").await;
}

#[tokio::test]
async fn timing_several_workers_give_a_new_key_once() {
    is_given_once("--tps 100000 --concurrency 8 --chunk 50 --workers 3").await;
}

#[tokio::test]
async fn what_an_earlier_job_has_given_away_is_not_given_again() {
    let (bench, api) = bench().await;
    // The key of K1 is that of K0, whose documents another collection had.
    bench.docs().delete_many(doc! {"legacyKey": {"$nin": ["K0", "K1"]}}).await.expect("deleted");
    bench.docs().delete_many(doc! {"legacyKey": "K1"}).await.expect("deleted");
    bench.run("backfill --job first --tps 1000").await.expect_exit(0);
    bench.docs().delete_many(doc! {}).await.expect("deleted");
    bench.insert([doc! {"_id": 1, "legacyKey": "K1"}]).await;
    let run = bench.run("backfill --job second --tps 1000").await.expect_exit(1);
    run.expect_documents(&[("candidates", 1), ("failed", 1), ("candidates_left", 1)]);
    assert_eq!(api.count(), 2);
}
