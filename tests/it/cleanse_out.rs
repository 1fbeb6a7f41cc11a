//! The copy by one `$out`: the same result, and honest about what it can't do.

use std::time::Duration;

use bson::{Document, doc};
use mongodb::Collection;

use crate::cleansing::{
    FailPoint, SOURCE, TARGET, assert_same, bytes, bytes_where, configure, count_now, delicate, every_type,
    ids, insert_raw, job_name, store_exactly, zero_timestamps,
};
use crate::harness::{Bench, wait_for};
use crate::program::{Running, Signal};

/// Waits whenever a reader of a collection lets others run, every thousand documents.
const YIELDS: &str = "setYieldAllLocksWait";

async fn seed(bench: &Bench, count: u32) {
    bench.insert_into(SOURCE, (0..).zip(ids(count)).map(|(number, id)| every_type(id, number))).await;
    insert_raw(bench, SOURCE, delicate()).await;
    configure(bench, "");
}

fn collection(bench: &Bench, name: &str) -> Collection<Document> {
    bench.database.collection(name)
}

/// Options and indexes of a collection, as stored.
async fn shape(bench: &Bench, name: &str) -> (Document, Vec<String>) {
    let list = doc! {"listCollections": 1, "filter": {"name": name}};
    let reply = bench.database.run_command(list).await.expect("a list");
    let first =
        reply.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch")).expect("a batch");
    let options = first[0].as_document().expect("a collection").get_document("options").expect("options");
    let mut indexes = collection(bench, name).list_index_names().await.expect("names");
    indexes.sort();
    (options.clone(), indexes)
}

/// A run whose reading of the source is slow, under way.
async fn slow_run(bench: &Bench, yields: &FailPoint) -> Running {
    yields.set(bench, "alwaysOn", doc! {"namespace": bench.namespace(SOURCE), "waitForMillis": 400}).await;
    let run = bench.program("cleanse --method out").spawn();
    wait_for("the operation", async || {
        let job = bench.job(&job_name(bench)).await;
        job.is_some_and(|job| job.get_document("out_session").is_ok())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    run
}

#[tokio::test]
async fn one_shot_copies_the_same_with_options_and_indexes() {
    let bench = Bench::new().await;
    let validator = doc! {"string": {"$type": "string"}};
    let create = doc! {"create": SOURCE, "collation": {"locale": "en", "strength": 2}, "validator": validator,
    "validationLevel": "strict", "validationAction": "warn"};
    bench.database.run_command(create).await.expect("a collection");
    bench
        .insert_into(SOURCE, (0..3000).map(|n| doc! {"_id": n, "string": format!("s{n}"), "n": n % 5}))
        .await;
    let indexes = doc! {"createIndexes": SOURCE, "indexes": [
        {"key": {"string": 1}, "name": "unique", "unique": true},
        {"key": {"n": 1}, "name": "partial", "partialFilterExpression": {"n": {"$gt": 1}}},
        {"key": {"at": 1}, "name": "ttl", "expireAfterSeconds": 3600},
    ]};
    bench.database.run_command(indexes).await.expect("indexes");
    configure(&bench, "keep = '{\"n\": {\"$lt\": 4}}'");

    let run = bench.run("cleanse --method out").await.expect_exit(0);
    assert_eq!((run.number("/documents/copied"), run.number("/touched_during_copy")), (2400, 0));
    assert_same(&bytes(&bench, TARGET).await, &bytes_where(&bench, SOURCE, doc! {"n": {"$lt": 4}}).await);
    assert_eq!(shape(&bench, TARGET).await, shape(&bench, SOURCE).await);
    // From then on it is a job like any other.
    collection(&bench, SOURCE).delete_many(doc! {"n": 1}).await.expect("a write");
    bench.run("cleanse").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes_where(&bench, SOURCE, doc! {"n": {"$lt": 4}}).await);
}

#[tokio::test]
async fn one_shot_copies_documents_of_all_types_and_clustered_collections() {
    let bench = Bench::new().await;
    seed(&bench, 3_000).await;
    bench.run("cleanse --method out").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);

    let bench = Bench::new().await;
    let create = doc! {"create": SOURCE, "clusteredIndex": {"key": {"_id": 1}, "unique": true}};
    bench.database.run_command(create).await.expect("a collection");
    seed(&bench, 500).await;
    bench.run("cleanse --method out").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
    assert_eq!(shape(&bench, TARGET).await, shape(&bench, SOURCE).await);
}

#[tokio::test]
async fn what_it_changes_is_said_with_the_count() {
    let bench = Bench::new().await;
    seed(&bench, 100).await;
    let quiet = bench.run("cleanse --method out").await.expect_exit(0);
    assert!(!quiet.stderr.contains("Timestamp(0, 0)"), "{}", quiet.stderr);
    for document in zero_timestamps() {
        store_exactly(&bench, SOURCE, document).await;
    }
    let run = bench.run("cleanse --method out --restart").await.expect_exit(0);
    let count = zero_timestamps().len();
    assert!(run.stderr.contains(&format!("{count} documents have one")), "{}", run.stderr);
}

#[tokio::test]
async fn a_source_that_is_written_meanwhile_is_noticed_and_caught_up_with_by_the_next_run() {
    let bench = Bench::new().await;
    seed(&bench, 6_000).await;
    let index = doc! {"createIndexes": SOURCE, "indexes": [{"key": {"long": 1}, "name": "by long"}]};
    bench.database.run_command(index).await.expect("an index");
    let yields = FailPoint::reserve(YIELDS);
    let run = slow_run(&bench, &yields).await;
    let source = collection(&bench, SOURCE);
    source.delete_many(doc! {"_id": {"$type": "bool"}}).await.expect("a write");
    source.update_one(doc! {"_id": "dot"}, doc! {"$set": {"new": 1}}).await.expect("a write");
    let run = run.finish().await.expect_exit(1);
    yields.off(&bench).await;
    assert_eq!(run.text("/status"), "incomplete");
    assert_eq!(run.number("/touched_during_copy"), 3);
    bench.run("cleanse").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
    assert_eq!(shape(&bench, TARGET).await, shape(&bench, SOURCE).await);
}

#[tokio::test]
async fn a_killed_shot_is_begun_anew_whatever_became_of_it() {
    for wait_for_its_end in [false, true] {
        let bench = Bench::new().await;
        seed(&bench, 5_000).await;
        let yields = FailPoint::reserve(YIELDS);
        slow_run(&bench, &yields).await.kill();
        if wait_for_its_end {
            // The server goes on without us, and puts its result in place.
            yields.off(&bench).await;
            wait_for("the result", async || count_now(&bench, TARGET, doc! {}).await > 0).await;
        }
        yields.off(&bench).await;
        let source = collection(&bench, SOURCE);
        source.update_many(doc! {"int": {"$lt": 10}}, doc! {"$set": {"x": 1}}).await.expect("a write");
        let other = bench.run("cleanse --method merge").await.expect_exit(3);
        assert!(other.text("/error/hint").contains("--restart"), "{}", other.stdout);
        let run = bench.run("cleanse").await.expect_exit(0);
        assert!(run.stderr.contains("begun anew"), "{}", run.stderr);
        assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
        assert_eq!(shape(&bench, TARGET).await, shape(&bench, SOURCE).await);
    }
}

#[tokio::test]
async fn a_kill_right_after_it_keeps_the_result_and_catches_up() {
    let bench = Bench::new().await;
    seed(&bench, 500).await;
    let run = bench.program("cleanse --method out").env("MONGOREKEY_CRASH_AT", "after_out:1").run().await;
    assert_eq!(run.exit, None, "it was not killed: {}", run.output());
    collection(&bench, SOURCE).delete_many(doc! {"int": {"$lt": 100}}).await.expect("a write");
    let run = bench.run("cleanse --method out").await.expect_exit(0);
    assert!(!run.stderr.contains("begun anew"), "{}", run.stderr);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
    assert_eq!(shape(&bench, TARGET).await, shape(&bench, SOURCE).await);
}

#[tokio::test]
async fn a_signal_ends_it_and_somebody_elses_target_is_never_taken() {
    let bench = Bench::new().await;
    seed(&bench, 20_000).await;
    let yields = FailPoint::reserve(YIELDS);
    let run = slow_run(&bench, &yields).await;
    run.signal(Signal::Terminate);
    let run = run.finish().await.expect_exit(143);
    yields.off(&bench).await;
    assert_eq!(run.text("/status"), "interrupted");
    collection(&bench, TARGET).drop().await.expect("dropped");
    bench.insert_into(TARGET, [doc! {"_id": "somebody else's"}]).await;
    bench.run("cleanse").await.expect_exit(3);
    bench.run("cleanse --restart --method out").await.expect_exit(3);
    assert_eq!(bytes(&bench, TARGET).await.len(), 1);
}
