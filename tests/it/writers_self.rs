//! The writers and their journal by themselves: without any tool the collection is what the journal
//! says, and one that is not is found out.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use bson::{Document, doc};
use futures_util::FutureExt;
use mongodb::Collection;
use tokio::time::Instant;

use crate::cleansing::FailPoint;
use crate::harness::{Bench, wait_for};
use crate::writers::{
    Cutover, Options, Writers, expect_collection_equals, expect_live_after_cutover, is_valid,
};

const LIVE: &str = "live";

/// The load is what the other tests say it is: at least a thousand documents per second.
#[tokio::test]
async fn timing_without_a_tool_the_collection_is_what_the_journal_says() {
    let bench = Bench::new().await;
    let writers = Writers::on(&bench, LIVE, Options { target_rate: 100_000, ..Options::default() }).await;
    let mut best: f64 = 0.0;
    for _ in 0..4 {
        let (begin, before) = (Instant::now(), writers.operations());
        writers.go_on_for(3_000).await;
        let written = u32::try_from(writers.operations() - before).expect("small");
        best = best.max(f64::from(written) / begin.elapsed().as_secs_f64());
    }
    let journal = writers.stop().await;
    expect_collection_equals(&bench, LIVE, &journal.expected(|_| true), &journal).await;
    assert!(best >= 1_000.0, "{best:.0} operations per second");
}

/// What was changed past the writers is found, each in its own way.
#[tokio::test]
async fn a_collection_that_is_not_what_the_journal_says_is_found_out() {
    let bench = Bench::new().await;
    let writers = Writers::on(&bench, LIVE, Options { documents: 400, ..Options::default() }).await;
    writers.go_on_for(500).await;
    let journal = writers.stop().await;
    let expected = journal.expected(is_valid);
    assert!(expected.len() > 50 && expected.len() < journal.expected(|_| true).len());
    let live: Collection<Document> = bench.database.collection(LIVE);
    live.delete_many(doc! {"valid": false}).await.expect("a delete");
    expect_collection_equals(&bench, LIVE, &expected, &journal).await;
    expect_live_after_cutover(&bench, LIVE, &journal, is_valid, Instant::now()).await;
    for change in [doc! {"$set": {"version": 7}}, doc! {"$rename": {"log": "log2"}}] {
        let before = live.find_one_and_update(doc! {}, change).await.expect("a write").expect("a document");
        let differs = expect_collection_equals(&bench, LIVE, &expected, &journal);
        let failed = AssertUnwindSafe(differs).catch_unwind().await.expect_err("it differs");
        let message = failed.downcast_ref::<String>().expect("a message");
        assert!(message.contains("1 different") && message.contains("Insert"), "{message}");
        live.replace_one(doc! {"_id": before.get("_id")}, before).await.expect("a write");
    }
    live.delete_one(doc! {}).await.expect("a delete");
    live.insert_one(doc! {"_id": "stranger"}).await.expect("a write");
    let differs = expect_collection_equals(&bench, LIVE, &expected, &journal);
    let failed = AssertUnwindSafe(differs).catch_unwind().await.expect_err("it differs");
    let message = failed.downcast_ref::<String>().expect("a message");
    assert!(message.contains("1 missing") && message.contains("1 extra"), "{message}");
}

/// Refused writes were not applied; and a document that is taken away or changed under its writer
/// contradicts what it was told.
#[tokio::test]
async fn refusals_are_no_writes_and_lost_writes_are_noticed_by_the_writers() {
    let bench = Bench::new().await;
    let writers = Writers::on(&bench, LIVE, Options { documents: 400, ..Options::default() }).await;
    writers.go_on_for(500).await;
    let fence = |validator: Document| doc! {"collMod": LIVE, "validator": validator};
    bench.database.run_command(fence(doc! {"$expr": false})).await.expect("fenced");
    tokio::time::sleep(Duration::from_millis(300)).await;
    bench.database.run_command(fence(doc! {})).await.expect("open");
    assert!(writers.refused() > 10, "{} refused", writers.refused());
    writers.go_on_for(500).await;
    let journal = writers.stop().await;
    expect_collection_equals(&bench, LIVE, &journal.expected(|_| true), &journal).await;

    let bench = Bench::new().await;
    let writers = Writers::on(&bench, LIVE, Options { documents: 400, ..Options::default() }).await;
    let live: Collection<Document> = bench.database.collection(LIVE);
    live.delete_many(doc! {"valid": true, "writes": 0}).await.expect("a delete");
    writers.go_on_for(2_000).await;
    let journal = writers.stop().await;
    assert!(!journal.contradictions.is_empty());
}

/// A cutover takes invalid documents away, at a moment that no writer knows.
#[tokio::test]
async fn a_cutover_under_the_writers_is_told_from_lost_writes() {
    let bench = Bench::new().await;
    let options = Options { documents: 400, cutover: Cutover::Once(is_valid), ..Options::default() };
    let writers = Writers::on(&bench, LIVE, options).await;
    writers.go_on_for(1_000).await;
    let live: Collection<Document> = bench.database.collection(LIVE);
    live.delete_many(doc! {"valid": false}).await.expect("a delete");
    let ended = Instant::now();
    writers.forget_pauses();
    writers.go_on_for(1_000).await;
    assert!(writers.longest_pause() < Duration::from_secs(10), "{:?}", writers.longest_pause());
    let journal = writers.stop().await;
    expect_live_after_cutover(&bench, LIVE, &journal, is_valid, ended).await;
}

/// What nobody knows is found out by its writer: commands that were not executed, and ones that were.
#[tokio::test]
async fn writes_of_unknown_outcome_are_settled() {
    let bench = Bench::new().await;
    let commands = FailPoint::reserve("failCommand");
    let writers = Writers::on(&bench, LIVE, Options { documents: 400, ..Options::default() }).await;
    let late = doc! {"code": 64, "errmsg": "timed out", "errInfo": {}};
    for failure in [doc! {"closeConnection": true}, doc! {"writeConcernError": late}] {
        let before = writers.unknown();
        let mut data =
            doc! {"failCommands": ["insert", "update", "delete"], "namespace": bench.namespace(LIVE)};
        data.extend(failure);
        commands.set(&bench, doc! {"times": 200}, data).await;
        wait_for("unknown outcomes", async || writers.unknown() > before).await;
        commands.off(&bench).await;
        writers.go_on_for(500).await;
    }
    let journal = writers.stop().await;
    expect_collection_equals(&bench, LIVE, &journal.expected(|_| true), &journal).await;
}
