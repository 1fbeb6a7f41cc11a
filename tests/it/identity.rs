//! What a job is, and what a command refuses to start on.

use bson::{Bson, doc};

use crate::harness::{Bench, DOCS};
use crate::key_api::KeyApi;
use crate::program::Finished;

const FAST: &str = "backfill --tps 100000";

/// Refused, with a message that holds these words, and no call made.
#[track_caller]
fn expect_refusal(run: Finished, words: &[&str], api: &KeyApi) {
    let run = run.expect_exit(3);
    assert_eq!(run.text("/error/code"), "refused");
    for word in words {
        assert!(run.text("/error/message").contains(word), "no {word} in {}", run.stdout);
    }
    assert!(run.json["error"].get("hint").is_some(), "no hint in {}", run.stdout);
    assert_eq!(api.count(), 0);
}

#[tokio::test]
async fn a_job_that_does_something_else_is_refused_with_the_difference() {
    let bench = Bench::with_docs(10).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.run("backfill --job j --limit 0").await.expect_exit(0);

    let fields = ["otherLegacy", "newKey", "newKeyFlag"];
    bench.configure(&bench.config(&api).no_targets().target("docs", &bench.namespace(DOCS), fields));
    expect_refusal(bench.run("backfill --job j").await, &["legacyKey", "otherLegacy", "j"], &api);

    let other = bench.config_for_url(&format!("http://{}/v2/{{key}}", api.address()));
    bench.configure(&other);
    expect_refusal(bench.run("backfill --job j").await, &["/v1/keys/", "/v2/"], &api);

    // Another name is another job.
    bench.configure(&bench.config(&api));
    bench.run("backfill --tps 1000 --job k").await.expect_exit(0);
}

#[tokio::test]
async fn how_fast_a_job_goes_may_change() {
    let bench = Bench::with_docs(30).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.run("backfill --job j --tps 1000 --chunk 3 --limit 10").await.expect_exit(0);
    assert_eq!(bench.filled().await, 10);
    let slower =
        bench.config(&api).backfill("windows = ['00:00-24:00']").backfill("time_zone = 'Asia/Seoul'");
    bench.configure(&slower);
    let run = bench.run("backfill --job j --tps 500 --chunk 7 --concurrency 2").await.expect_exit(0);
    run.expect_documents(&[("candidates", 20), ("filled", 20)]);
    assert_eq!(run.number("/job_totals/filled"), 30);
}

#[tokio::test]
async fn a_missing_index_is_refused_unless_a_scan_is_allowed() {
    let bench = Bench::new().await;
    bench.insert((0..20).map(|id| doc! {"_id": id, "legacyKey": format!("K{id}")})).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    expect_refusal(bench.run(FAST).await, &["mongorekey_docs", &bench.namespace(DOCS)], &api);
    assert!(!bench.has_state().await);

    let run = bench.run(&format!("{FAST} --allow-collection-scan --chunk 6")).await.expect_exit(0);
    run.expect_documents(&[("candidates", 20), ("filled", 20)]);
}

#[tokio::test]
async fn an_index_of_the_name_with_another_definition_is_refused() {
    let keys = doc! {"_id": 1, "newKey": 1, "newKeyFlag": 1};
    let wrong = [
        doc! {"key": {"_id": 1, "newKey": 1}, "partialFilterExpression": {"newKey": Bson::Null, "newKeyFlag": Bson::Null}},
        doc! {"key": keys.clone()},
        doc! {"key": keys.clone(), "partialFilterExpression": {"newKey": Bson::Null}},
        doc! {"key": keys.clone(), "partialFilterExpression": {"newKey": "x", "newKeyFlag": Bson::Null}},
        doc! {
            "key": keys.clone(),
            "partialFilterExpression": {"newKey": Bson::Null, "newKeyFlag": Bson::Null},
            "collation": {"locale": "en", "strength": 2},
        },
        doc! {
            "key": keys,
            "partialFilterExpression": {"newKey": Bson::Null, "newKeyFlag": Bson::Null},
            "hidden": true,
        },
    ];
    for mut index in wrong {
        let bench = Bench::new().await;
        bench.insert([doc! {"_id": 1, "legacyKey": "K1"}]).await;
        index.insert("name", "mongorekey_docs");
        let create = doc! {"createIndexes": DOCS, "indexes": [index.clone()]};
        bench.database.run_command(create).await.expect("an index");
        let api = KeyApi::finding();
        bench.configure(&bench.config(&api));
        for command in ["backfill", "backfill --allow-collection-scan", "index create"] {
            expect_refusal(bench.run(command).await, &["mongorekey_docs"], &api);
        }
        let status = bench.run("index status").await.expect_exit(1);
        assert_eq!(status.text("/targets/0/state"), "different", "{index}");

        // The way out that the refusal names.
        bench.run("index drop").await.expect_exit(0);
        bench.run("index create").await.expect_exit(0);
        bench.run(FAST).await.expect_exit(0);
    }
}

#[tokio::test]
async fn a_missing_collection_and_a_view_are_refused() {
    let bench = Bench::new().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    for command in ["backfill", "backfill --allow-collection-scan", "index create", "plan"] {
        expect_refusal(bench.run(command).await, &[&bench.namespace(DOCS)], &api);
    }
    bench.insert_into("real", [doc! {"legacyKey": "K1"}]).await;
    let view = doc! {"create": DOCS, "viewOn": "real", "pipeline": []};
    bench.database.run_command(view).await.expect("a view");
    for command in ["backfill", "backfill --allow-collection-scan"] {
        expect_refusal(bench.run(command).await, &["view"], &api);
    }
    assert!(!bench.has_state().await);
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_refused() {
    let bench = Bench::new().await;
    let api = KeyApi::finding();
    let uri = "mongodb://127.0.0.1:9/?serverSelectionTimeoutMS=500";
    bench.configure(&bench.config(&api).uri(uri));
    expect_refusal(bench.run("backfill").await, &["MongoDB"], &api);
}
