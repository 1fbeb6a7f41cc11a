//! Several targets in one job.

use bson::{Bson, Document, doc};
use mongodb::Collection;

use crate::harness::{Bench, wait_for};
use crate::key_api::{KeyApi, Reply};
use crate::program::Signal;

const FIELDS: [&str; 3] = ["legacyKey", "newKey", "newKeyFlag"];

/// Configures the targets `first` and `second` and creates their indexes.
async fn configure(bench: &Bench, api: &KeyApi) {
    let config = bench.config(api).no_targets().target("first", &bench.namespace("first"), FIELDS).target(
        "second",
        &bench.namespace("second"),
        FIELDS,
    );
    bench.configure(&config);
    bench.run("index create").await.expect_exit(0);
}

#[tokio::test]
async fn a_key_of_two_collections_is_asked_for_once() {
    let bench = Bench::new().await;
    for name in ["first", "second"] {
        bench.insert_into(name, (0..50).map(|id| doc! {"_id": id, "legacyKey": format!("K{id}")})).await;
    }
    let api = KeyApi::finding();
    configure(&bench, &api).await;
    assert_eq!(bench.run("plan").await.expect_exit(0).number("/calls"), 50);
    let run = bench.run("backfill --tps 5000").await.expect_exit(0);
    run.expect_documents(&[("candidates", 100), ("filled", 100)]);
    run.expect_calls(50);

    // One of them alone is another job, with the same answers.
    bench.insert_into("second", [doc! {"_id": 100, "legacyKey": "K1"}]).await;
    let run = bench.run("backfill --tps 5000 --target second").await.expect_exit(0);
    run.expect_documents(&[("candidates", 1), ("filled", 1)]);
    run.expect_calls(0);
}

#[tokio::test]
async fn where_an_index_finds_them_documents_of_all_targets_are_filled_at_once() {
    let bench = Bench::new().await;
    let numbers = |id: i32| match id % 3 {
        0 => Bson::Int32(id),
        1 => Bson::Double(f64::from(id)),
        _ => Bson::String(id.to_string()),
    };
    bench.insert_into("first", (0..200).map(|id| doc! {"_id": id, "legacyKey": id.to_string()})).await;
    bench.insert_into("second", (0..400).map(|id| doc! {"_id": id, "legacyKey": numbers(id % 200)})).await;
    // The same number as far as the server knows, another key to the API.
    let other: bson::Decimal128 = "5.0".parse().expect("a decimal");
    bench.insert_into("second", [doc! {"_id": "other", "legacyKey": other}]).await;
    let second: Collection<Document> = bench.database.collection("second");
    let index = mongodb::IndexModel::builder().keys(doc! {"legacyKey": 1}).build();
    second.create_index(index).await.expect("an index");
    let api = KeyApi::start(|call| match call.key.as_str() {
        "199" => Reply::hang(),
        key if key.ends_with('7') => Reply::not_found(),
        _ => Reply::found(call),
    });
    configure(&bench, &api).await;
    let run = bench.program("backfill --tps 2000").spawn();
    // The first target is not done, and still documents of the second have their keys.
    // (Flags may wait for the guard, and then for the turn of their target.)
    let done = doc! {"newKey": {"$type": "string"}};
    wait_for("documents of the second target", async || {
        second.count_documents(done.clone()).await.expect("a count") == 358
    })
    .await;
    assert!(!api.asked().contains_key("5.0"));
    api.change(Reply::found);
    let run = run.finish().await.expect_exit(0);
    assert_eq!(run.number("/documents/filled") + run.number("/documents/flagged"), 601);
    assert_eq!(run.number("/documents/candidates"), 601);
    let other = second.find_one(doc! {"_id": "other"}).await.expect("found").expect("there");
    assert_eq!(other.get_str("newKey").ok(), Some("N-5.0"));
    assert!(api.asked().iter().all(|(key, times)| *times == 1 || key == "199"), "{:?}", api.asked());
}

#[tokio::test]
async fn flags_reach_the_collection_that_they_belong_to() {
    let bench = Bench::new().await;
    // The first target alone has too few answers for a verdict, both together have enough.
    for (name, count) in [("first", 50), ("second", 200)] {
        let documents = (0..count).map(|id| match id % 10 {
            0 => doc! {"_id": id, "legacyKey": format!("{name}-none-{id}")},
            1 => doc! {"_id": id, "legacyKey": Bson::Null},
            _ => doc! {"_id": id, "legacyKey": format!("{name}-{id}")},
        });
        bench.insert_into(name, documents).await;
    }
    let api =
        KeyApi::start(|call| if call.key.contains("none") { Reply::not_found() } else { Reply::found(call) });
    configure(&bench, &api).await;
    let run = bench.run("backfill --tps 5000").await.expect_exit(0);
    run.expect_documents(&[("candidates", 250), ("filled", 200), ("flagged", 50)]);
    for (name, flags) in [("first", 10), ("second", 40)] {
        let collection: Collection<Document> = bench.database.collection(name);
        let flagged = doc! {"newKeyFlag.reason": {"$in": ["not_found", "no_legacy_key"]}};
        assert_eq!(collection.count_documents(flagged).await.expect("a count"), flags, "{name}");
    }
}

#[tokio::test]
async fn failures_of_one_target_are_not_forgotten_by_the_second_pass_of_another() {
    let bench = Bench::new().await;
    bench.insert_into("first", [doc! {"_id": 1, "legacyKey": ".."}]).await;
    bench.insert_into("second", [doc! {"_id": 2, "legacyKey": ".."}]).await;
    bench.insert_into("second", (10..50).map(|id| doc! {"_id": id, "legacyKey": format!("K{id}")})).await;
    let api = KeyApi::finding();
    configure(&bench, &api).await;
    let run = bench.program("backfill --tps 40").spawn();
    wait_for("a call", async || api.count() > 0).await;
    bench.insert_into("second", [doc! {"_id": 1000, "legacyKey": "K1000"}]).await;
    let run = run.finish().await.expect_exit(1);
    assert_eq!(run.number("/documents/failed"), 2, "{}", run.stdout);
    assert_eq!(run.number("/documents/filled"), 41);
    let failed: Collection<Document> = bench.state.collection("failures");
    let mut listed = failed.distinct("document", doc! {}).await.expect("a list");
    listed.sort_by_key(|id| id.as_i32());
    assert_eq!(listed, [Bson::Int32(1), Bson::Int32(2)]);
}

/// What is written is what was asked for, and the key map answers for the others later.
#[tokio::test]
async fn a_limit_holds_for_the_documents_of_other_targets_too() {
    let bench = Bench::new().await;
    bench.insert_into("first", (0..20).map(|id| doc! {"_id": id, "legacyKey": format!("K{id}")})).await;
    bench
        .insert_into("second", (0..200).map(|id| doc! {"_id": id, "legacyKey": format!("K{}", id % 20)}))
        .await;
    let second: Collection<Document> = bench.database.collection("second");
    let index = mongodb::IndexModel::builder().keys(doc! {"legacyKey": 1}).build();
    second.create_index(index).await.expect("an index");
    let api = KeyApi::finding();
    configure(&bench, &api).await;
    let filled = async || second.count_documents(doc! {"newKey": {"$exists": true}}).await.expect("a count");
    let limited = bench.run("backfill --tps 1000 --limit 5").await.expect_exit(0);
    assert_eq!(limited.number("/documents/filled"), 5, "{}", limited.stdout);
    assert_eq!(filled().await, 0);
    bench.run("backfill --tps 1000 --canary 5 --yes").await.expect_exit(0);
    assert_eq!((filled().await, api.count()), (200, 20), "each key was asked for once");
}

#[tokio::test]
async fn a_job_beside_another_one_of_the_same_api_is_warned_of_it() {
    let bench = Bench::new().await;
    for name in ["first", "second"] {
        bench
            .insert_into(name, (0..50).map(|id| doc! {"_id": id, "legacyKey": format!("{name} {id}")}))
            .await;
    }
    let api = KeyApi::finding();
    configure(&bench, &api).await;
    let first = bench.program("backfill --tps 5 --target first").spawn();
    wait_for("a call", async || api.count() > 0).await;
    let warning = "the job backfill-";
    let beside = bench.run("backfill --tps 1000 --target second --limit 10").await.expect_exit(0);
    assert!(beside.stderr.contains(warning) && beside.stderr.contains("same API"), "{}", beside.stderr);
    let canary = bench.run("backfill --tps 1000 --target second --canary 2 --yes").await;
    assert_eq!(canary.expect_exit(0).stderr.matches(warning).count(), 1, "told once");
    first.signal(Signal::Interrupt);
    first.finish().await.expect_exit(130);
    let alone = bench.run("backfill --tps 1000 --target second").await.expect_exit(0);
    assert!(!alone.stderr.contains(warning), "{}", alone.stderr);
}
