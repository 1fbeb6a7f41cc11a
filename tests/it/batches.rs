//! Many keys per call, from the documents to the last of them.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use bson::doc;
use serde_json::json;

use crate::harness::{Bench, DOCS, wait_for};
use crate::key_api::{Call, KeyApi, Reply};
use crate::program::Finished;

/// Each of `keys` keys in `copies` documents, in no order.
async fn bench(keys: i32, copies: i32) -> Bench {
    let bench = Bench::new().await;
    let count = keys * copies;
    bench.insert((0..count).map(|id| doc! {"_id": id, "legacyKey": format!("K{}", id % keys)})).await;
    bench.create_index().await;
    bench
}

fn configure(bench: &Bench, api: &KeyApi, size: usize, lines: &[&str]) {
    let config = bench.config_for_url(&api.batch_url()).batch(size);
    bench.configure(&lines.iter().fold(config, |config, line| config.key_api(line)));
}

/// Keys of the documents without a key and without a flag, and how many there are of each.
async fn left(bench: &Bench) -> BTreeMap<String, u64> {
    let mut left = BTreeMap::new();
    for document in bench.documents(DOCS).await {
        let legacy = document.get_str("legacyKey").expect("kept");
        match (document.get_str("newKey"), document.get_document("newKeyFlag")) {
            (Ok(key), Err(_)) => assert_eq!(key, format!("N-{legacy}"), "{document}"),
            (Err(_), Ok(_)) => {}
            (Err(_), Err(_)) => *left.entry(legacy.to_owned()).or_default() += 1,
            (Ok(_), Ok(_)) => panic!("key and flag: {document}"),
        }
    }
    left
}

/// The reason of the flag by legacy key.
async fn flags(bench: &Bench) -> BTreeMap<String, String> {
    let documents = bench.documents(DOCS).await;
    let flag = |document: &bson::Document| {
        let reason = document.get_document("newKeyFlag").ok()?.get_str("reason").ok()?.to_owned();
        Some((document.get_str("legacyKey").expect("kept").to_owned(), reason))
    };
    documents.iter().filter_map(flag).collect()
}

#[track_caller]
fn expect_each_asked(api: &KeyApi, times: impl Fn(&str) -> usize) {
    for (key, asked) in api.asked() {
        assert_eq!(asked, times(&key), "{key}");
    }
}

fn calls(run: &Finished) -> usize {
    usize::try_from(run.number("/api/calls")).expect("small")
}

#[tokio::test]
async fn there_are_as_few_calls_as_can_be() {
    // The chunk may be smaller than a batch, as large, or no multiple of it.
    for (chunk, size) in [(37, 100), (100, 100), (1000, 30), (250, 1), (5000, 10_000)] {
        let bench = bench(1050, 2).await;
        let api = KeyApi::start(Reply::found_all);
        configure(&bench, &api, size, &[]);
        let run = bench.run(&format!("backfill --tps 10000 --chunk {chunk}")).await.expect_exit(0);
        assert_eq!(api.count(), 1050_usize.div_ceil(size), "chunk {chunk}, size {size}");
        assert_eq!(calls(&run), api.count());
        assert_eq!(run.number("/api/retries"), 0);
        run.expect_documents(&[("candidates", 2100), ("filled", 2100)]);
        assert!(left(&bench).await.is_empty());
        expect_each_asked(&api, |_| 1);
        assert!(api.calls().iter().all(|call| call.keys.len() <= size));
    }
}

#[tokio::test]
async fn batches_are_full_however_many_documents_share_a_key() {
    // Documents of a key stand next to each other.
    for (keys, copies, size) in [(1200, 10, 600), (5000, 10, 2000), (9000, 1, 3000)] {
        let bench = Bench::new().await;
        let count = keys * copies;
        bench.insert((0..count).map(|id| doc! {"_id": id, "legacyKey": format!("K{}", id / copies)})).await;
        bench.create_index().await;
        let api = KeyApi::start(|call| Reply::found_all(call).after(Duration::from_millis(200)));
        configure(&bench, &api, size, &[]);
        bench.run("backfill --tps 1000").await.expect_exit(0);
        let sizes: Vec<usize> = api.calls().iter().map(|call| call.keys.len()).collect();
        let fewest = usize::try_from(keys).expect("small").div_ceil(size);
        assert_eq!(sizes.len(), fewest, "{copies} documents per key, batches of {size}: {sizes:?}");
        assert_eq!(bench.filled().await, u64::try_from(count).expect("small"));
    }
}

#[tokio::test]
async fn keys_that_an_answer_leaves_out_are_asked_for_again() {
    let bench = bench(100, 2).await;
    let asked_before = std::sync::Mutex::new(HashSet::new());
    let api = KeyApi::start(move |call| {
        let mut before = asked_before.lock().expect("no panic");
        // Keys ending in 7 are answered at the second time, the others in reverse order, amidst items
        // of keys that nobody asked for and items without a key.
        let is_answered = |key: &&String| before.contains(*key) || !key.ends_with('7');
        let mut items: Vec<_> =
            call.keys.iter().rev().filter(is_answered).map(|key| Reply::item(key)).collect();
        items.insert(0, json!({"legacyKey": "K1000", "newKey": "N-STRANGER"}));
        items.push(json!({"newKey": "N-NOBODY"}));
        before.extend(call.keys.iter().cloned());
        Reply::items(items)
    });
    configure(&bench, &api, 25, &[]);
    let run = bench.run("backfill --tps 1000 --chunk 40").await.expect_exit(0);
    run.expect_documents(&[("candidates", 200), ("filled", 200)]);
    assert!(left(&bench).await.is_empty());
    expect_each_asked(&api, |key| if key.ends_with('7') { 2 } else { 1 });
    assert_eq!(calls(&run), api.count());
}

#[tokio::test]
async fn a_key_that_is_never_answered_fails_alone() {
    let bench = bench(60, 3).await;
    let api = KeyApi::start(|call| {
        let answered = call.keys.iter().filter(|key| *key != "K17");
        Reply::items(answered.map(|key| Reply::item(key)))
    });
    configure(&bench, &api, 20, &["max_attempts = 3"]);
    let run = bench.run("backfill --tps 1000").await.expect_exit(1);
    run.expect_documents(&[("candidates", 180), ("filled", 177), ("failed", 3), ("candidates_left", 3)]);
    assert_eq!(left(&bench).await, BTreeMap::from([("K17".to_owned(), 3)]));
    assert!(flags(&bench).await.is_empty());
    expect_each_asked(&api, |key| if key == "K17" { 3 } else { 1 });
}

#[tokio::test]
async fn one_malformed_key_is_flagged_alone() {
    for body in [Some(json!({"code": "BAD_KEY"})), None] {
        let bench = bench(64, 2).await;
        let answer = body.clone();
        let api = KeyApi::start(move |call: &Call| match &answer {
            _ if !call.keys.iter().any(|key| key == "K37") => Reply::found_all(call),
            Some(body) => Reply::json(400, body.clone()),
            None => Reply::empty(422),
        });
        configure(&bench, &api, 64, &[]);
        let run = bench.run("backfill --tps 1000").await.expect_exit(0);
        run.expect_documents(&[("candidates", 128), ("filled", 126), ("flagged", 2)]);
        assert_eq!(run.json["documents"]["flagged_by"], json!({"rejected": 2}));
        assert_eq!(flags(&bench).await, BTreeMap::from([("K37".to_owned(), "rejected".to_owned())]));
        assert!(left(&bench).await.is_empty());
        // The whole, and two halves on each of six levels.
        assert_eq!((api.count(), calls(&run)), (13, 13));
        assert_eq!(bench.run("backfill --tps 1000").await.expect_exit(0).number("/api/calls"), 0);
    }
}

#[tokio::test]
async fn a_refusal_that_proves_nothing_flags_nobody() {
    // HTML may come from anybody on the way; a batch that is too large says nothing about its keys.
    for status in [400, 422] {
        let bench = bench(40, 1).await;
        let api = KeyApi::start(move |_| Reply::html(status));
        configure(&bench, &api, 10, &["max_attempts = 2"]);
        let run = bench.run("backfill --tps 1000").await.expect_exit(1);
        run.expect_documents(&[("candidates", 40), ("failed", 40), ("candidates_left", 40)]);
    }
    let bench = bench(40, 1).await;
    let api =
        KeyApi::start(|call| if call.keys.len() > 3 { Reply::empty(413) } else { Reply::found_all(call) });
    configure(&bench, &api, 40, &[]);
    let run = bench.run("backfill --tps 1000").await.expect_exit(0);
    run.expect_documents(&[("candidates", 40), ("filled", 40)]);
}

#[tokio::test]
async fn an_outage_of_whole_batches_costs_no_key() {
    let bench = bench(500, 2).await;
    let begun = std::time::Instant::now();
    let api = KeyApi::start(move |call| {
        if begun.elapsed() < Duration::from_secs(4) { Reply::empty(503) } else { Reply::found_all(call) }
    });
    configure(&bench, &api, 20, &["max_attempts = 3"]);
    let run = bench.run("backfill --tps 1000 --chunk 100").await.expect_exit(0);
    run.expect_documents(&[("candidates", 1000), ("filled", 1000)]);
    assert!(left(&bench).await.is_empty());
    assert!(api.count() < 120, "{} calls", api.count());
}

#[tokio::test]
async fn only_the_item_of_a_key_says_that_it_has_none() {
    let bench = bench(300, 1).await;
    let api = KeyApi::start(|call| {
        Reply::items(call.keys.iter().map(|key| match key {
            key if key.ends_with('4') => json!({"legacyKey": key, "code": "NO_KEY"}),
            // Neither a key nor the proof that there is none.
            key if key == "K11" => json!({"legacyKey": key, "code": "TRY_LATER"}),
            key => Reply::item(key),
        }))
    });
    configure(&bench, &api, 50, &["max_attempts = 2"]);
    let run = bench.run("backfill --tps 1000").await.expect_exit(1);
    run.expect_documents(&[
        ("candidates", 300),
        ("filled", 269),
        ("flagged", 30),
        ("failed", 1),
        ("candidates_left", 1),
    ]);
    let flags = flags(&bench).await;
    assert!(flags.iter().all(|(key, reason)| key.ends_with('4') && reason == "not_found"), "{flags:?}");
    assert_eq!(left(&bench).await, BTreeMap::from([("K11".to_owned(), 1)]));

    // The same words as the answer of the whole call are none to any key.
    api.change(|_| Reply::json(404, json!({"code": "NO_KEY"})));
    let run = bench.run("backfill --tps 1000").await.expect_exit(1);
    run.expect_documents(&[("candidates", 1), ("failed", 1), ("candidates_left", 1)]);
}

#[tokio::test]
async fn an_item_that_contradicts_another_is_no_answer() {
    let bench = bench(30, 1).await;
    let api = KeyApi::start(|call| {
        let items = call.keys.iter().flat_map(|key| {
            let second = match &**key {
                "K5" => json!({"legacyKey": key, "newKey": "N-OTHER"}),
                "K6" => json!({"legacyKey": key, "code": "NO_KEY"}),
                _ => Reply::item(key),
            };
            [Reply::item(key), second]
        });
        Reply::items(items)
    });
    configure(&bench, &api, 30, &["max_attempts = 2"]);
    let run = bench.run("backfill --tps 1000").await.expect_exit(1);
    run.expect_documents(&[("candidates", 30), ("filled", 28), ("failed", 2), ("candidates_left", 2)]);
    assert_eq!(left(&bench).await.into_keys().collect::<Vec<_>>(), ["K5", "K6"]);
}

#[tokio::test]
async fn after_a_kill_no_answered_key_is_asked_for_again() {
    let bench = bench(2000, 2).await;
    let api = KeyApi::start(|call| Reply::found_all(call).after(Duration::from_millis(5)));
    configure(&bench, &api, 10, &[]);
    let run = bench.program("backfill --tps 100 --chunk 100 --concurrency 4").spawn();
    wait_for("calls", async || api.count() > 60).await;
    run.kill();
    // What has left before the kill arrives at once.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let before = api.count();
    bench.run("backfill --tps 1000 --concurrency 4").await.expect_exit(0);
    assert!(left(&bench).await.is_empty());
    let twice = api.asked().into_values().filter(|asked| *asked > 1).count();
    assert!(twice <= 4 * 10, "{twice} keys were asked for again");
    assert!(api.asked().into_values().all(|asked| asked <= 2));
    let after = api.count() - before;
    assert!(after <= (2000 - 10 * before + twice).div_ceil(10), "{after} calls after {before}");
}

#[tokio::test]
async fn timing_the_ceiling_counts_calls_and_not_keys() {
    let bench = bench(1000, 1).await;
    let api = KeyApi::start(Reply::found_all);
    configure(&bench, &api, 100, &[]);
    bench.run("backfill --tps 4").await.expect_exit(0);
    let calls = api.calls();
    assert_eq!(calls.len(), 10);
    let span = (calls[9].at - calls[0].at).as_secs_f64();
    assert!((2.1..3.5).contains(&span), "ten calls within {span} s");
}
