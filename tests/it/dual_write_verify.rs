//! `verify --dual-write` beside applications that write to both sides, or fail to.

use std::time::Duration;

use bson::{Document, doc};
use mongodb::Collection;

use crate::cleansing::{SOURCE, TARGET};
use crate::dual_writing::{Application, bench, document, sides};
use crate::harness::{Bench, wait_for};
use crate::program::{Finished, Running, Signal};

/// The other side has one and a half seconds to follow.
const COMMAND: &str = "verify --dual-write --settle 1500ms";

/// A source and a target that are equal.
async fn both(documents: i32) -> Bench {
    let bench = bench(documents).await;
    bench.insert_into(TARGET, (0..documents).map(|id| document(id, i64::from(id)))).await;
    let [_, target] = sides(&bench);
    target.delete_many(doc! {"valid": false}).await.expect("deleted");
    bench
}

async fn watching(bench: &Bench, time: &str) -> Running {
    let run = bench.program(&format!("{COMMAND} --for {time}")).spawn();
    wait_for("the watch", async || run.stderr().contains("watching the writes")).await;
    run
}

fn check(run: &Finished) -> &serde_json::Value {
    let check = &run.json["checks"][0];
    assert_eq!(check["name"], "dual write", "{}", run.stdout);
    check
}

/// The differences as kind and `_id`, sorted.
fn differences(run: &Finished) -> Vec<(String, String)> {
    let listed = check(run)["differences"].as_array().expect("a list");
    let text = |value: &serde_json::Value| value.as_str().map_or(value.to_string(), str::to_owned);
    let mut differences: Vec<_> =
        listed.iter().map(|entry| (text(&entry["kind"]), text(&entry["_id"]))).collect();
    differences.sort();
    differences
}

async fn set(side: &Collection<Document>, id: &str, value: i32) {
    let update = doc! {"$set": {"value": value}};
    side.update_one(doc! {"_id": id}, update).upsert(true).await.expect("a write");
}

#[tokio::test]
async fn dual_write_verified_with_clean_traffic_passes() {
    let bench = both(2_000).await;
    let run = watching(&bench, "4s").await;
    let application = Application::start(&bench, 2_000);
    application.has_written(300).await;
    let run = run.finish().await;
    application.stop().await;
    let run = run.expect_exit(0);
    assert!(check(&run)["passed"].as_bool().expect("set"), "{}", run.stdout);
    assert_eq!(check(&run)["expected"], check(&run)["found"]);
    assert!(run.number("/dual_write/compared") > 40, "{}", run.stdout);
    assert!(run.stderr.contains("writes/s"), "{}", run.stderr);
}

#[tokio::test]
async fn dual_write_verified_tells_each_kind_of_miss() {
    let bench = bench(0).await;
    let ids =
        ["updated", "deleted in source", "deleted in target", "differs", "invalid", "good", "late", "hot"];
    for side in [SOURCE, TARGET] {
        bench.insert_into(side, ids.map(|id| doc! {"_id": id, "value": 0})).await;
    }
    let [source, target] = sides(&bench);
    let run = watching(&bench, "6s").await;
    // On both sides: nothing to be said.
    for side in [&source, &target] {
        set(side, "good", 1).await;
        set(side, "new", 1).await;
        side.delete_one(doc! {"_id": "good"}).await.expect("a write");
    }
    source.insert_one(doc! {"_id": "never valid", "valid": false}).await.expect("a write");
    // On one side.
    set(&source, "inserted in source", 1).await;
    set(&target, "inserted in target", 1).await;
    set(&source, "updated", 1).await;
    source.delete_one(doc! {"_id": "deleted in source"}).await.expect("a write");
    target.delete_one(doc! {"_id": "deleted in target"}).await.expect("a write");
    source.update_one(doc! {"_id": "invalid"}, doc! {"$set": {"valid": false}}).await.expect("a write");
    // On both, with other values.
    set(&source, "differs", 1).await;
    let double = doc! {"$set": {"value": 1.0}};
    target.update_one(doc! {"_id": "differs"}, double).await.expect("a write");
    // On the other side, but too late; and one that never rests on the side that is written.
    set(&source, "late", 1).await;
    let restless = tokio::spawn({
        let source = source.clone();
        async move {
            for value in 0.. {
                set(&source, "hot", value).await;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(2_800)).await;
    set(&target, "late", 1).await;
    let run = run.finish().await;
    restless.abort();
    let run = run.expect_exit(1);
    let expected = [
        ("different", "differs"),
        ("different", "hot"),
        ("different", "updated"),
        ("extra", "deleted in source"),
        ("extra", "inserted in target"),
        ("extra", "invalid"),
        ("late", "late"),
        ("missing", "deleted in target"),
        ("missing", "inserted in source"),
    ]
    .map(|(kind, id)| (kind.to_owned(), id.to_owned()));
    assert_eq!(differences(&run), expected, "{}", run.stdout);
    let listed = check(&run)["differences"].as_array().expect("a list");
    let entry = |id: &str| listed.iter().find(|entry| entry["_id"] == id).expect("listed");
    let late = entry("late")["late_seconds"].as_f64().expect("a number");
    assert!((2.5..10.0).contains(&late), "{late}");
    assert_eq!(entry("differs")["difference"], "numeric_type");
    assert_eq!(check(&run)["found"], 3, "good, new and never valid: {}", run.stdout);
    assert_eq!(run.number("/dual_write/unsettled"), 0);
}

#[tokio::test]
async fn dual_write_verified_beside_more_one_sided_writes_than_memory_holds_comes_to_an_end() {
    const DOCUMENTS: u64 = 40_000;
    let bench = bench(0).await;
    // Long `_id`s fill the memory sooner.
    for side in [SOURCE, TARGET] {
        let documents = (0..DOCUMENTS).map(|id| doc! {"_id": format!("{id:0>500}"), "valid": true});
        bench.insert_into(side, documents).await;
    }
    let [source, _] = sides(&bench);
    let run = watching(&bench, "10s").await;
    source.update_many(doc! {}, doc! {"$set": {"one side": 1}}).await.expect("a write");
    let run = run.finish().await.expect_exit(1);
    assert_eq!(run.number("/dual_write/different"), DOCUMENTS, "{}", run.stdout);
    assert_eq!(run.number("/dual_write/unsettled"), 0);
}

#[tokio::test]
async fn dual_write_verified_without_a_write_does_not_pass() {
    let bench = both(10).await;
    let run = bench.run(&format!("{COMMAND} --for 1s")).await.expect_exit(1);
    assert_eq!(check(&run)["passed"], false);
    assert!(
        check(&run)["remark"].as_str().expect("a remark").contains("nothing was written"),
        "{}",
        run.stdout
    );

    // What is written to the source alone, and has no place in the target, proves nothing either.
    let [source, _] = sides(&bench);
    let run = watching(&bench, "2s").await;
    source.insert_one(doc! {"_id": "invalid", "valid": false}).await.expect("a write");
    let run = run.finish().await.expect_exit(1);
    let remark = check(&run)["remark"].as_str().expect("a remark");
    assert!(remark.contains("nothing was written to the target"), "{}", run.stdout);
}

#[tokio::test]
async fn dual_write_verified_until_a_signal_tells_what_was_seen() {
    let bench = both(10).await;
    let [source, _] = sides(&bench);
    let run = watching(&bench, "10m").await;
    set(&source, "one side", 1).await;
    wait_for("the difference", async || run.stderr().contains("1 differ")).await;
    run.signal(Signal::Interrupt);
    let run = run.finish().await.expect_exit(130);
    assert_eq!(differences(&run), [("missing".to_owned(), "one side".to_owned())]);
    assert_eq!((&run.json["passed"], run.text("/error/code")), (&false.into(), "interrupted"));
}

#[tokio::test]
async fn dual_write_verified_needs_two_collections_that_stay() {
    let bench = bench(10).await;
    let run = bench.run(&format!("{COMMAND} --for 1m")).await.expect_exit(1);
    assert!(check(&run)["remark"].as_str().expect("a remark").contains("there is no collection"));
    bench.run("verify --for 1m").await.expect_exit(2);
    bench.run(&format!("{COMMAND} --for 0s")).await.expect_exit(2);
    bench.insert_into(TARGET, [doc! {"_id": 1}]).await;
    let [_, target] = sides(&bench);
    let run = watching(&bench, "1m").await;
    target.drop().await.expect("dropped");
    let run = run.finish().await.expect_exit(4);
    assert!(run.text("/error/message").contains("drop"), "{}", run.stdout);
    assert_eq!(run.json["passed"], false);
}
