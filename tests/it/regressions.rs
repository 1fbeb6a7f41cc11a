//! Mistakes that were made once and that no other test would have found.

use std::time::Duration;

use bson::doc;

use crate::fail_points::{COMMANDS, fail, named_uri, survives};
use crate::harness::{Bench, DOCS, wait_for};
use crate::key_api::{KeyApi, Reply};

#[tokio::test]
async fn writes_that_no_majority_confirms_are_sent_again() {
    let late =
        doc! {"code": 64, "codeName": "WriteConcernFailed", "errmsg": "waiting for replication timed out"};
    survives(doc! {"writeConcernError": late}, &["update", "insert", "findAndModify"]).await;
}

#[tokio::test]
async fn an_election_that_outlasts_the_lease_costs_nothing() {
    let bench = Bench::with_docs(100).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api).uri(&named_uri(&bench)));
    let run = bench.program("backfill --tps 20 --concurrency 4").spawn();
    wait_for("keys", async || bench.filled().await > 10).await;
    let data = doc! {"failCommands": COMMANDS.to_vec(), "errorCode": 10107};
    let point = fail(&bench, "alwaysOn", data).await;
    // An election takes about twelve seconds by default.
    tokio::time::sleep(Duration::from_secs(13)).await;
    drop(point);
    run.finish().await.expect_exit(0);
    assert_eq!(bench.filled().await, 100);
    assert_eq!(api.count(), 100);
}

#[tokio::test]
async fn a_view_is_refused_before_an_index_is_built() {
    let bench = Bench::new().await;
    bench.insert_into("real", [doc! {"legacyKey": "K1"}]).await;
    let view = doc! {"create": DOCS, "viewOn": "real", "pipeline": []};
    bench.database.run_command(view).await.expect("a view");
    bench.configure(&bench.config_for_url("http://127.0.0.1:9/{key}"));
    let run = bench.run("index create").await.expect_exit(3);
    assert!(run.text("/error/message").contains("view"), "{}", run.stdout);
}

#[tokio::test]
async fn keys_that_only_a_collation_takes_for_equal_are_two() {
    let bench = Bench::new().await;
    bench
        .database
        .run_command(doc! {"create": DOCS, "collation": {"locale": "en", "strength": 2}})
        .await
        .expect("a collection");
    bench
        .insert((0..).zip(["abc", "ABC", "Abc", "slow"]).map(|(id, key)| doc! {"_id": id, "legacyKey": key}))
        .await;
    bench.create_index().await;
    let api = KeyApi::start(|call| {
        let delay = if call.key == "slow" { Duration::from_secs(1) } else { Duration::ZERO };
        Reply::found(call).after(delay)
    });
    bench.configure(&bench.config(&api).key_api("echo_pointer = '/legacyKey'"));
    assert_eq!(bench.run("plan").await.expect_exit(0).number("/calls"), 4);
    let run = bench.program("backfill --tps 100000").spawn();
    wait_for("the slow call", async || api.asked().contains_key("slow")).await;
    // To the collation nothing changes.
    let changed = bench
        .docs()
        .update_one(doc! {"_id": 3}, doc! {"$set": {"legacyKey": "SLOW"}})
        .await
        .expect("an update");
    assert_eq!(changed.modified_count, 1);
    let run = run.finish().await.expect_exit(0);
    run.expect_calls(5);
    for document in bench.documents(DOCS).await {
        assert_eq!(
            document.get_str("newKey").ok(),
            Some(&*format!("N-{}", document.get_str("legacyKey").expect("kept")))
        );
    }
}

#[tokio::test]
async fn a_key_in_an_array_is_not_the_key() {
    let bench = Bench::new().await;
    bench.insert([doc! {"_id": 1, "legacyKey": "K1"}]).await;
    bench.create_index().await;
    let api = KeyApi::start(|call| Reply::found(call).after(Duration::from_secs(1)));
    bench.configure(&bench.config(&api));
    let run = bench.program("backfill --tps 100000").spawn();
    wait_for("the call", async || api.count() == 1).await;
    bench.docs().update_one(doc! {}, doc! {"$set": {"legacyKey": ["K1", "K2"]}}).await.expect("an update");
    run.finish().await.expect_exit(0);
    assert_eq!(bench.count(doc! {"newKey": {"$exists": true}}).await, 0);
    assert_eq!(bench.count(doc! {"newKeyFlag.reason": "no_legacy_key"}).await, 1);
}

#[tokio::test]
async fn what_was_filled_long_before_its_turn_costs_no_call_whatever_the_concurrency() {
    let bench = Bench::with_docs(200).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    // The last documents have their turn after four seconds.
    let run = bench.program("backfill --tps 40").spawn();
    wait_for("the first call", async || api.count() > 0).await;
    let update = vec![doc! {"$set": {"newKey": {"$concat": ["APP-", "$legacyKey"]}}}];
    bench.docs().update_many(doc! {"_id": {"$gt": 160}}, update).await.expect("an update");
    let run = run.finish().await.expect_exit(0);
    run.expect_documents(&[("candidates", 200), ("filled", 160), ("already_filled", 40)]);
    run.expect_calls(160);
}
