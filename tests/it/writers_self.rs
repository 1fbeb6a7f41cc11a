//! The writers and their journal by themselves: without any tool the collection is what the journal
//! says, and one that is not is found out.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use bson::{Document, doc};
use futures_util::{FutureExt, TryStreamExt};
use mongodb::Collection;
use tokio::time::Instant;

use crate::harness::Bench;
use crate::writers::{
    Cutover, Options, Writers, expect_collection_equals, expect_live_after_cutover, is_valid,
};

const LIVE: &str = "live";

#[tokio::test]
async fn without_a_tool_the_collection_is_what_the_journal_says() {
    let bench = Bench::new().await;
    let begin = Instant::now();
    let writers = Writers::on(&bench, LIVE, Options { target_rate: 100_000, ..Options::default() }).await;
    println!("seeded in {:?}", begin.elapsed());
    let begin = Instant::now();
    writers.go_on_for(10_000).await;
    println!(
        "{:.0} operations/s, {} refused, longest pause {:?}",
        10_000.0 / begin.elapsed().as_secs_f64(),
        writers.refused(),
        writers.longest_pause()
    );
    let journal = writers.stop().await;
    expect_collection_equals(&bench, LIVE, &journal.expected(|_| true), &journal).await;
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

/// A cutover takes invalid documents away, and a rollback brings them back, at moments that no writer
/// knows.
#[tokio::test]
async fn a_cutover_under_the_writers_is_told_from_lost_writes() {
    for rolls_back in [false, true] {
        let bench = Bench::new().await;
        let cutover = if rolls_back { Cutover::AndRollback(is_valid) } else { Cutover::Once(is_valid) };
        let options = Options { documents: 400, cutover, ..Options::default() };
        let writers = Writers::on(&bench, LIVE, options).await;
        writers.go_on_for(1_000).await;
        let live: Collection<Document> = bench.database.collection(LIVE);
        let away = live.find(doc! {"valid": false}).await.expect("a cursor");
        let away: Vec<Document> = away.try_collect().await.expect("documents");
        assert!(away.len() > 50);
        for document in &away {
            // What was written meanwhile remains.
            live.delete_one(document.clone()).await.expect("a delete");
        }
        let ended = Instant::now();
        writers.forget_pauses();
        writers.go_on_for(1_000).await;
        assert!(writers.longest_pause() < Duration::from_secs(10), "{:?}", writers.longest_pause());
        if rolls_back {
            // Those that were written anew meanwhile are refused.
            drop(live.insert_many(&away).ordered(false).await);
            writers.go_on_for(500).await;
        }
        let journal = writers.stop().await;
        expect_live_after_cutover(&bench, LIVE, &journal, is_valid, ended).await;
    }
}
