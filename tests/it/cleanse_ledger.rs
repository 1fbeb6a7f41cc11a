//! The ledger: figures of one moment that add up, whatever is written meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bson::{Document, doc};
use mongodb::Collection;

use crate::cleansing::{SOURCE, TARGET, configure};
use crate::harness::{Bench, wait_for};
use crate::program::Finished;

const RULES: &str = "keep = '{\"n\": {\"$lt\": 8}}'\nreject = [{ name = \"zero\", when = '{\"n\": 0}' }]";

async fn bench(documents: i32) -> Bench {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..documents).map(|id| doc! {"_id": id, "n": id % 10})).await;
    configure(&bench, RULES);
    bench
}

fn source(bench: &Bench) -> Collection<Document> {
    bench.database.collection(SOURCE)
}

#[track_caller]
fn expect_sums(run: &Finished) {
    let number = |name: &str| run.number(&format!("/ledger/{name}"));
    assert_eq!(number("kept") + number("rejected"), number("source_now"), "{}", run.stdout);
    assert_eq!(
        number("source_at_start") + number("inserted_during"),
        number("source_now") + number("deleted_during"),
        "{}",
        run.stdout
    );
    assert_eq!(number("kept"), run.number("/documents/copied"));
}

#[tokio::test]
async fn every_document_is_accounted_for_by_rule() {
    let bench = bench(1_000).await;
    let run = bench.run("cleanse --count-rules").await.expect_exit(0);
    expect_sums(&run);
    let ledger = &run.json["ledger"];
    assert_eq!((run.number("/ledger/kept"), &ledger["balanced"]), (700, &true.into()));
    assert_eq!(ledger["rejected_by"], serde_json::json!({"keep": 200, "zero": 100}));
    // Without a count by the rules nothing is claimed.
    let run = bench.run("cleanse").await.expect_exit(0);
    expect_sums(&run);
    assert!(run.json["ledger"]["balanced"].is_null(), "{}", run.stdout);
}

#[tokio::test]
async fn what_came_and_went_is_counted_once_over_kills_and_runs() {
    let bench = bench(4_000).await;
    // So slow that a range has several pieces, and there are enough for all kills.
    let slow = "cleanse --documents-per-second 400 --count-rules";
    for round in 0..3 {
        let run = bench.program(slow).env("MONGOREKEY_CRASH_AT", "after_piece:2").spawn();
        let ranges: Collection<Document> = bench.state.collection("ranges");
        wait_for("the copy", async || ranges.count_documents(doc! {}).await.expect("a count") > 0).await;
        let added = (0..100).map(|n| doc! {"_id": format!("{round} {n}"), "n": n % 10});
        source(&bench).insert_many(added).await.expect("a write");
        source(&bench)
            .delete_many(doc! {"_id": {"$gte": round * 40, "$lt": round * 40 + 40}})
            .await
            .expect("a write");
        source(&bench).insert_one(doc! {"_id": "again", "n": 1}).await.expect("a write");
        source(&bench).delete_one(doc! {"_id": "again"}).await.expect("a write");
        assert_eq!(run.finish().await.exit, None, "it was not killed");
    }
    let run = bench.run("cleanse --count-rules").await.expect_exit(0);
    expect_sums(&run);
    assert_eq!(run.number("/ledger/source_at_start"), 4_000, "{}", run.stdout);
    assert_eq!(run.number("/ledger/inserted_during"), 303, "{}", run.stdout);
    assert_eq!(run.number("/ledger/deleted_during"), 123, "{}", run.stdout);
    assert_eq!(run.json["ledger"]["balanced"], true, "{}", run.stdout);
}

#[tokio::test]
async fn figures_add_up_while_the_source_is_written_to() {
    let bench = bench(5_000).await;
    let run = bench.program("cleanse --documents-per-second 4000 --count-rules").spawn();
    let ranges: Collection<Document> = bench.state.collection("ranges");
    wait_for("the copy", async || ranges.count_documents(doc! {}).await.expect("a count") > 0).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (source, stop) = (source(&bench), stop.clone());
        tokio::spawn(async move {
            let mut written = 0;
            while !stop.load(Ordering::Relaxed) {
                source
                    .insert_one(doc! {"_id": format!("w{written}"), "n": written % 10})
                    .await
                    .expect("a write");
                source.delete_one(doc! {"_id": written * 2}).await.expect("a write");
                written += 1;
            }
            written
        })
    };
    let run = run.finish().await.expect_exit(0);
    stop.store(true, Ordering::Relaxed);
    let written = writer.await.expect("no panic");
    expect_sums(&run);
    assert_eq!(run.number("/ledger/source_at_start"), 5_000, "{}", run.stdout);
    let inserted = run.number("/ledger/inserted_during");
    assert!(inserted > 0 && inserted <= u64::try_from(written).expect("small"), "{inserted} of {written}");
    assert_ne!(run.json["ledger"]["balanced"], false, "{}", run.stdout);
}

#[tokio::test]
async fn a_target_that_lacks_a_document_is_not_balanced() {
    let bench = bench(500).await;
    bench.run("cleanse").await.expect_exit(0);
    let target: Collection<Document> = bench.database.collection(TARGET);
    target.delete_one(doc! {"_id": 5}).await.expect("a write");
    let run = bench.run("cleanse --count-rules").await.expect_exit(1);
    assert_eq!(run.text("/status"), "incomplete");
    assert_eq!(run.json["ledger"]["balanced"], false, "{}", run.stdout);
}
