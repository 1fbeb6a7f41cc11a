//! An application that works on the collection while the backfill does.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bson::{Bson, doc};
use tokio_util::sync::CancellationToken;

use crate::harness::{Bench, DOCS, Random, wait_for};
use crate::key_api::{KeyApi, Reply};

#[tokio::test]
async fn values_of_the_application_are_never_overwritten() {
    let bench = Bench::with_docs(400).await;
    let api = KeyApi::start(|call| Reply::found(call).after(Duration::from_millis(30)));
    bench.configure(&bench.config(&api));
    let run = bench.program("backfill --tps 200 --concurrency 16 --chunk 50").spawn();
    wait_for("the first call", async || api.count() > 0).await;

    // It wins every race that it can: keys, flags and new legacy keys, just ahead of the backfill.
    let mut random = Random::seeded(7);
    let (mut keys, mut flags, mut changed) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for round in 0..300_usize {
        let ahead = api.count() + random.below(20);
        let id = i32::try_from(ahead.min(400)).expect("small");
        let untouched = doc! {"_id": id, "newKey": Bson::Null, "newKeyFlag": Bson::Null};
        let (set, written) = match round % 3 {
            0 => (doc! {"newKey": format!("APP-{id}")}, &mut keys),
            1 => (doc! {"newKeyFlag": "by the application"}, &mut flags),
            _ => (doc! {"legacyKey": format!("C{id}")}, &mut changed),
        };
        let result = bench.docs().update_one(untouched, doc! {"$set": set}).await.expect("an update");
        if result.matched_count == 1 {
            written.insert(id);
        }
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    let run = run.finish().await.expect_exit(0);

    assert!(keys.len() > 10 && flags.len() > 10 && changed.len() > 10, "the application lost every race");
    for document in bench.documents(DOCS).await {
        let id = document.get_i32("_id").expect("an id");
        let legacy = document.get_str("legacyKey").expect("a legacy key");
        let (key, flag) = (document.get_str("newKey").ok(), document.get("newKeyFlag"));
        let expected = if keys.contains(&id) { format!("APP-{id}") } else { format!("N-{legacy}") };
        if flags.contains(&id) {
            assert_eq!(flag, Some(&"by the application".into()), "{document}");
            assert!(key.is_none(), "{document}");
        } else {
            assert_eq!((key, flag), (Some(&*expected), None), "{document}");
        }
    }
    let filled = run.number("/documents/filled");
    let taken = u64::try_from(keys.len() + flags.len()).expect("small");
    assert_eq!(filled + taken, 400, "{}", run.stdout);
    // Documents that were taken before they were ever read are neither.
    assert!(run.number("/documents/already_filled") <= taken, "{}", run.stdout);
    assert!(run.number("/documents/already_filled") > 0, "{}", run.stdout);
}

#[tokio::test]
async fn what_was_filled_long_before_its_turn_costs_no_call() {
    let bench = Bench::with_docs(200).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    // The last documents have their turn after four seconds, but are read at the start.
    let run = bench.program("backfill --tps 40 --concurrency 4").spawn();
    wait_for("the first call", async || api.count() > 0).await;
    let update = vec![doc! {"$set": {"newKey": {"$concat": ["APP-", "$legacyKey"]}}}];
    let filled = bench.docs().update_many(doc! {"_id": {"$gt": 160}}, update).await.expect("an update");
    assert_eq!(filled.modified_count, 40);

    let run = run.finish().await.expect_exit(0);
    run.expect_documents(&[("candidates", 200), ("filled", 160), ("already_filled", 40)]);
    run.expect_calls(160);
    assert_eq!(bench.count(doc! {"newKey": {"$regex": "^APP-"}}).await, 40);
}

#[tokio::test]
async fn deleted_documents_are_not_made_again() {
    let bench = Bench::with_docs(60).await;
    let api = KeyApi::start(|call| Reply::found(call).after(Duration::from_millis(300)));
    bench.configure(&bench.config(&api));
    let run = bench.program("backfill --tps 1000").spawn();
    wait_for("all calls", async || api.count() == 60).await;
    bench.docs().delete_many(doc! {"_id": {"$gt": 50}}).await.expect("a delete");
    let run = run.finish().await.expect_exit(0);
    assert_eq!(bench.documents(DOCS).await.len(), 50);
    assert_eq!(run.number("/documents/filled"), 50);
    assert_eq!(run.number("/documents/candidates_left"), 0);
}

/// Runs a backfill of 40 documents beside an application that inserts faster than it calls.
async fn beside_an_inserter(next_id: impl Fn(&mut Random, i64) -> i64 + Send + 'static) {
    const ORIGINAL: i64 = 1_000_000;
    let bench = Bench::new().await;
    bench.insert((1..=40_i64).map(|n| doc! {"_id": n * ORIGINAL, "legacyKey": format!("K{n}")})).await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let stop = CancellationToken::new();
    let inserter = tokio::spawn({
        let (docs, stop) = (bench.docs(), stop.clone());
        async move {
            let mut random = Random::seeded(99);
            for number in 0.. {
                if stop.is_cancelled() {
                    return;
                }
                let id = next_id(&mut random, number);
                // An id that exists already is left alone.
                let new = doc! {"$setOnInsert": {"legacyKey": format!("I{number}")}};
                docs.update_one(doc! {"_id": id}, new).upsert(true).await.expect("an insert");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    });
    let started = Instant::now();
    let run = bench.run("backfill --tps 40 --chunk 5 --concurrency 4").await.expect_exit(0);
    stop.cancel();
    inserter.await.expect("no panic");

    assert!(started.elapsed() < Duration::from_secs(30), "it took {:?}", started.elapsed());
    assert_eq!(run.text("/status"), "completed");
    assert!(run.number("/documents/candidates_left") > 0, "{}", run.stdout);
    let originals = bench.count(doc! {"legacyKey": {"$regex": "^K"}, "newKey": {"$type": "string"}}).await;
    assert_eq!(originals, 40, "what was there at the start is done: {}", run.stdout);
}

#[tokio::test]
async fn ascending_inserts_do_not_extend_a_pass() {
    beside_an_inserter(|_, number| 100_000_000 + number).await;
}

#[tokio::test]
async fn inserts_everywhere_do_not_extend_a_pass_nor_displace_what_was_there() {
    beside_an_inserter(|random, _| i64::try_from(random.below(40_000_000)).expect("small")).await;
}
