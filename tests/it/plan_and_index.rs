//! What `plan` says about the work to come, and the index that finds it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bson::{Bson, Document, doc, oid::ObjectId};
use futures_util::TryStreamExt;
use serde_json::json;

use crate::harness::{Bench, DOCS, wait_for};
use crate::key_api::{KeyApi, Reply};
use crate::program::{Finished, Signal};

fn target(run: &Finished, number: usize) -> &serde_json::Value {
    &run.json["targets"][number]
}

#[tokio::test]
async fn plan_counts_candidates_distinct_keys_and_what_is_no_key() {
    let bench = Bench::new().await;
    let uuid = bson::Uuid::from_bytes([0xab; 16]);
    let legacy: Vec<Bson> = vec![
        "a".into(),
        "a".into(),
        "A".into(),
        "42".into(),
        42.into(),
        42_i64.into(),
        42.0.into(),
        0.0.into(),
        (-0.0).into(),
        ObjectId::from_bytes([1; 12]).into(),
        "010101010101010101010101".into(),
        uuid.into(),
        uuid.to_string().into(),
        Bson::Null,
        "".into(),
        "".into(),
        1.5.into(),
        true.into(),
        doc! {"a": 1}.into(),
        vec![Bson::from("a")].into(),
        Bson::DateTime(bson::DateTime::from_millis(5)),
    ];
    bench.insert((0..).zip(legacy).map(|(id, key)| doc! {"_id": id, "legacyKey": key})).await;
    bench.insert([doc! {"_id": "none"}, doc! {"_id": "filled", "legacyKey": "b", "newKey": "N"}]).await;
    bench.insert([doc! {"_id": "flagged", "legacyKey": "c", "newKeyFlag": {"reason": "not_found"}}]).await;
    bench.insert([doc! {"_id": "nulls", "legacyKey": "d", "newKey": null, "newKeyFlag": null}]).await;
    bench.configure(&bench.config(&KeyApi::finding()));

    for index in [false, true] {
        if index {
            bench.run("index create").await.expect_exit(0);
        }
        let run = bench.run("plan").await.expect_exit(0);
        assert_eq!(target(&run, 0)["collection"], json!(bench.namespace(DOCS)));
        assert_eq!(target(&run, 0)["candidates"], json!(23));
        // a, A, 42, 0, the ObjectId, the UUID and d.
        assert_eq!(target(&run, 0)["distinct_keys"], json!(7), "{}", run.stdout);
        let unusable = json!({
            "array": 1, "bool": 1, "date": 1, "double": 1, "empty string": 2, "missing": 1, "null": 1, "object": 1,
        });
        assert_eq!(target(&run, 0)["unusable"], unusable);
        assert_eq!(run.number("/calls"), 7);
    }
}

#[tokio::test]
async fn plan_and_backfill_agree_about_calls() {
    let bench = Bench::new().await;
    let keys: Vec<Bson> =
        vec!["1".into(), 1.into(), 1_i64.into(), "x".into(), "x".into(), "X".into(), 2.5.into(), Bson::Null];
    bench.insert(keys.into_iter().map(|key| doc! {"legacyKey": key})).await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let planned = bench.run("plan").await.expect_exit(0).number("/calls");
    bench.run("backfill --tps 100000").await.expect_exit(0).expect_calls(planned);
    assert_eq!(bench.run("plan").await.expect_exit(0).number("/calls"), 0);
}

#[tokio::test]
async fn keys_that_differ_in_case_are_two_whatever_the_collation() {
    let bench = Bench::new().await;
    let collation = doc! {"locale": "en", "strength": 2};
    bench.database.run_command(doc! {"create": DOCS, "collation": collation}).await.expect("created");
    bench.insert(["k", "K", "é", "e"].map(|key| doc! {"legacyKey": key})).await;
    bench.create_index().await;
    bench.configure(&bench.config(&KeyApi::finding()));
    let run = bench.run("plan").await.expect_exit(0);
    assert_eq!((run.number("/calls"), &target(&run, 0)["distinct_keys"]), (4, &json!(4)));
}

#[tokio::test]
async fn keys_of_several_targets_are_asked_for_once() {
    let bench = Bench::new().await;
    bench.insert((0..30).map(|n| doc! {"legacyKey": format!("K{n}")})).await;
    bench.insert_into("orders", (20..60).map(|n| doc! {"oldKey": format!("K{n}")})).await;
    let api = KeyApi::finding();
    let config = bench.config(&api).target("orders", &bench.namespace("orders"), ["oldKey", "key", "flag"]);
    bench.configure(&config);

    let run = bench.run("plan").await.expect_exit(0);
    assert_eq!(target(&run, 0)["distinct_keys"], json!(30));
    assert_eq!(target(&run, 1)["distinct_keys"], json!(40));
    assert_eq!(run.number("/calls"), 60);
    assert_eq!(bench.run("plan --target orders").await.expect_exit(0).number("/calls"), 40);
}

#[tokio::test]
async fn keys_with_a_known_answer_need_no_call() {
    let bench = Bench::with_docs(50).await;
    let api = KeyApi::start(|call| if call.key == "K2" { Reply::not_found() } else { Reply::found(call) });
    bench.configure(&bench.config(&api));
    bench.run("backfill --tps 100000 --limit 20").await;
    let asked = u64::try_from(api.count()).expect("small");
    bench
        .docs()
        .update_many(doc! {}, doc! {"$unset": {"newKey": "", "newKeyFlag": ""}})
        .await
        .expect("changed");

    let run = bench.run("plan").await.expect_exit(0);
    assert_eq!(target(&run, 0)["distinct_keys"], json!(50));
    assert!(asked >= 20);
    assert_eq!(run.number("/calls"), 50 - asked);
    bench.configure(&bench.config(&api).backfill("key_map = false"));
    assert_eq!(bench.run("plan").await.expect_exit(0).number("/calls"), 50);
}

#[tokio::test]
async fn a_filter_limits_the_plan() {
    let bench = Bench::new().await;
    bench.insert((0..40).map(|n| doc! {"legacyKey": format!("K{n}"), "n": n})).await;
    bench.configure(&bench.config(&KeyApi::finding()).target_line("filter = '{\"n\": {\"$lt\": 15}}'"));
    let run = bench.run("plan").await.expect_exit(0);
    assert_eq!((run.number("/calls"), &target(&run, 0)["candidates"]), (15, &json!(15)));
}

#[tokio::test]
async fn the_time_is_that_of_the_calls_and_of_the_windows() {
    let bench = Bench::with_docs(54).await;
    bench.configure(&bench.config(&KeyApi::finding()).backfill("tps = 0.5"));
    let run = bench.run("plan").await.expect_exit(0);
    assert_eq!(run.json["seconds_nonstop"], json!(108.0));
    assert_eq!(run.json["seconds_in_windows"], json!(null));
    let run = bench.run("plan --tps 0.01 --window 00:00-24:00").await.expect_exit(0);
    assert_eq!(run.json["seconds_in_windows"], json!(5400.0));

    // One hour a day, which begins in about six hours: an hour today, half an hour tomorrow.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time after 1970");
    let opens = (now.as_secs() / 3600 + 6) * 3600;
    let expected = (Duration::from_secs(opens + 24 * 3600 + 1800) - now).as_secs_f64();
    // Seoul has no summer time.
    for (zone, ahead) in [("UTC", 0), ("Asia/Seoul", 9)] {
        let hour = |hours: u64| (opens / 3600 + ahead + hours) % 24;
        let window = format!("{:02}:00-{:02}:00", hour(0), hour(1));
        let run =
            bench.run(&format!("plan --tps 0.01 --window {window} --time-zone {zone}")).await.expect_exit(0);
        let found = run.json["seconds_in_windows"].as_f64().expect("a number");
        assert!((found - expected).abs() < 30.0, "{found} {expected} {window} {zone}");
    }
}

#[tokio::test]
async fn a_plan_for_a_missing_collection_is_refused_and_reads_only() {
    let bench = Bench::new().await;
    bench.configure(&bench.config(&KeyApi::finding()));
    bench.run("plan").await.expect_exit(3);
    bench.insert([doc! {"legacyKey": "a"}]).await;
    bench.run("plan").await.expect_exit(0);
    assert!(!bench.has_state().await);
}

async fn indexes(bench: &Bench) -> Vec<Document> {
    let list = doc! {"listIndexes": DOCS};
    let cursor = bench.database.run_cursor_command(list).await.expect("a list");
    cursor.try_collect().await.expect("indexes")
}

#[tokio::test]
async fn the_index_is_created_once_and_proven_to_be_used() {
    let bench = Bench::new().await;
    bench.insert((0..500).map(|n| doc! {"legacyKey": format!("K{n}"), "newKey": if n < 300 { Bson::from("N") } else { Bson::Null }})).await;
    bench.configure(&bench.config(&KeyApi::finding()));
    let run = bench.run("index status").await.expect_exit(1);
    assert_eq!(target(&run, 0)["state"], json!("missing"));

    for command in ["index create", "index create", "index status"] {
        let run = bench.run(command).await.expect_exit(0);
        let line = target(&run, 0);
        assert_eq!(line["state"], json!("ready"));
        assert_eq!((&line["candidates"], &line["used"]), (&json!(200), &json!(true)));
        assert!(line["size_bytes"].as_u64().expect("a size") > 0);
        let explain =
            json!({"index": "mongorekey_docs", "keys_examined": 100, "returned": 100, "sorted": false});
        assert_eq!(line["explain"], explain);
    }
    let stored = indexes(&bench).await;
    assert_eq!(stored.len(), 2);
    assert_eq!(stored[1].get_document("key").expect("keys"), &doc! {"_id": 1, "newKey": 1, "newKeyFlag": 1});
    let filter = doc! {"newKey": Bson::Null, "newKeyFlag": Bson::Null};
    let same = stored[1].get_document("partialFilterExpression").expect("a filter");
    assert!(same.to_string().contains("newKey") && same.len() == filter.len(), "{same}");
}

#[tokio::test]
async fn dropping_the_index_leaves_the_others() {
    let bench = Bench::with_docs(3).await;
    let run = bench.run("index drop").await.expect_exit(0);
    assert_eq!(target(&run, 0)["state"], json!("dropped"));
    assert_eq!(indexes(&bench).await.len(), 1);
    let run = bench.run("index drop").await.expect_exit(0);
    assert_eq!(target(&run, 0)["state"], json!("missing"));
}

#[tokio::test]
async fn another_index_of_our_name_is_neither_used_nor_replaced() {
    let partial = doc! {"newKey": Bson::Null, "newKeyFlag": Bson::Null};
    let ours = doc! {"_id": 1, "newKey": 1, "newKeyFlag": 1};
    let others = [
        doc! {"key": {"_id": 1, "newKey": 1}, "partialFilterExpression": &partial},
        doc! {"key": &ours},
        doc! {"key": &ours, "partialFilterExpression": {"newKey": Bson::Null}},
        doc! {"key": &ours, "partialFilterExpression": {"newKey": Bson::Null, "newKeyFlag": true}},
        doc! {"key": &ours, "partialFilterExpression": &partial, "hidden": true},
        doc! {"key": &ours, "partialFilterExpression": &partial, "collation": {"locale": "en"}},
    ];
    for other in others {
        let bench = Bench::new().await;
        bench.insert([doc! {"legacyKey": "a"}]).await;
        let mut index = other.clone();
        index.insert("name", "mongorekey_docs");
        bench.database.run_command(doc! {"createIndexes": DOCS, "indexes": [index]}).await.expect("created");
        let before = indexes(&bench).await;
        bench.configure(&bench.config(&KeyApi::finding()));
        let run = bench.run("index create").await.expect_exit(3);
        assert!(run.text("/error/hint").contains("index drop"), "{}", run.stdout);
        let run = bench.run("index status").await.expect_exit(1);
        assert_eq!(target(&run, 0)["state"], json!("different"), "{other}");
        assert!(!target(&run, 0)["difference"].as_str().expect("a difference").is_empty());
        for command in ["backfill", "backfill --allow-collection-scan"] {
            bench.run(command).await.expect_exit(3);
        }
        assert_eq!(indexes(&bench).await, before);
    }
}

#[tokio::test]
async fn an_index_for_a_missing_collection_is_refused() {
    let bench = Bench::new().await;
    bench.configure(&bench.config(&KeyApi::finding()));
    for command in ["index create", "index status"] {
        bench.run(command).await.expect_exit(3);
    }
    assert!(bench.database.list_collection_names().await.expect("names").is_empty());
}

#[tokio::test]
async fn an_index_follows_the_collation_of_its_collection() {
    let bench = Bench::new().await;
    let collation = doc! {"locale": "en", "strength": 2};
    bench.database.run_command(doc! {"create": DOCS, "collation": collation}).await.expect("created");
    bench.insert((0..150).map(|n| doc! {"_id": format!("k{n}"), "legacyKey": format!("K{n}")})).await;
    bench.configure(&bench.config(&KeyApi::finding()));
    let run = bench.run("index create").await.expect_exit(0);
    assert_eq!((&target(&run, 0)["used"], &target(&run, 0)["candidates"]), (&json!(true), &json!(150)));
}

#[tokio::test]
async fn keys_that_cannot_be_sent_are_not_planned_as_calls() {
    let bench = Bench::new().await;
    bench.insert([".", "..", "K1"].map(|key| doc! {"legacyKey": key})).await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let planned = bench.run("plan").await.expect_exit(0).number("/calls");
    bench.run("backfill --tps 1000").await.expect_exit(1).expect_calls(planned);
}

#[tokio::test]
async fn decimals_of_different_text_are_different_keys_in_the_plan_too() {
    let bench = Bench::new().await;
    let decimal = |text: &str| text.parse::<bson::Decimal128>().expect("a decimal");
    bench.insert(["42", "42.0", "42.00"].map(|key| doc! {"legacyKey": decimal(key)})).await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let planned = bench.run("plan").await.expect_exit(0).number("/calls");
    bench.run("backfill --tps 1000").await.expect_exit(0).expect_calls(planned);
}

#[tokio::test]
async fn the_index_that_a_running_backfill_reads_by_is_not_dropped() {
    let bench = Bench::with_docs(500).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.program("backfill --tps 20").spawn();
    wait_for("a call", async || api.count() > 0).await;
    let refused = bench.run("index drop").await.expect_exit(3);
    assert!(refused.text("/error/message").contains("is being run by"), "{}", refused.stdout);
    run.signal(Signal::Interrupt);
    run.finish().await.expect_exit(130);
    bench.run("index drop").await.expect_exit(0);
}

/// Answers that were on their way count, are written, and are not asked for again.
#[tokio::test]
async fn what_was_asked_when_reading_failed_is_counted_and_not_asked_again() {
    let bench = Bench::with_docs(600).await;
    let api = KeyApi::start(|call| Reply::found(call).after(Duration::from_millis(400)));
    bench.configure(&bench.config(&api));
    let run = bench.program("backfill --tps 1000 --concurrency 40 --chunk 20").spawn();
    wait_for("answers", async || bench.filled().await > 0).await;
    // What another program may do.
    bench.docs().drop_indexes().await.expect("dropped");
    let run = run.finish().await.expect_exit(4);
    assert_eq!(run.number("/documents/filled"), bench.filled().await, "{}", run.output());
    bench.run("index create").await.expect_exit(0);
    bench.run("backfill --tps 1000 --concurrency 40").await.expect_exit(0);
    let asked = api.asked();
    assert_eq!((asked.len(), asked.values().max()), (600, Some(&1)), "no key is asked for twice");
}
