//! What the application writes while the live name is free between two renames: none of it costs the
//! application time, and none of it is undone.

use std::time::Duration;

use bson::{Bson, Document, doc};
use mongodb::Collection;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cleansing::{SOURCE, TARGET};
use crate::cutover::{expect_no_fence, small_on};
use crate::harness::{Bench, wait_for};
use crate::own_set::OwnSet;

const GAP: &str = "cutover --mode keep --fence validator --allow-gap --max-pause 5s --yes";
/// So many documents are written into the gap.
const WRITTEN: i32 = 4_000;

/// Holds up the renames after the first two: the copy has the name of the attempt, and the live name
/// is free.
async fn hold_up_in_the_gap(bench: &Bench, milliseconds: i32) {
    let data = doc! {
        "failCommands": ["renameCollection"], "blockConnection": true, "blockTimeMS": milliseconds,
    };
    let third = doc! {"configureFailPoint": "failCommand", "mode": {"skip": 2}, "data": data};
    bench.admin().run_command(third).await.expect("the fail point");
}

/// Waits until the live name is free; what comes after this is not held up.
async fn gap(bench: &Bench) {
    wait_for("the gap", async || {
        let names = bench.database.list_collection_names().await.expect("names");
        !names.iter().any(|name| name == SOURCE)
    })
    .await;
    // It takes effect at once, and returns when nothing is held up any more.
    let (admin, off) = (bench.admin(), doc! {"configureFailPoint": "failCommand", "mode": "off"});
    tokio::spawn(async move { admin.run_command(off).await.expect("off") });
}

/// Writes until it is told to stop; returns the longest time for which writes were refused.
fn probe(live: Collection<Document>, stop: CancellationToken) -> JoinHandle<Duration> {
    tokio::spawn(async move {
        let (mut accepted, mut longest) = (Instant::now(), Duration::ZERO);
        let mut number = 0;
        while !stop.is_cancelled() {
            number += 1;
            if live.insert_one(doc! {"_id": format!("probe {number}")}).await.is_ok() {
                longest = longest.max(accepted.elapsed());
                accepted = Instant::now();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        longest.max(accepted.elapsed())
    })
}

async fn write_into_the_gap(live: &Collection<Document>) {
    let written = (0..WRITTEN).map(|number| doc! {"_id": 1_000 + number, "valid": true});
    live.insert_many(written).await.expect("the name is free");
    // Both are in the copy: the one is written again, the other one deleted.
    for id in [1, 4] {
        let change = doc! {"$set": {"gap": true}};
        live.update_one(doc! {"_id": id}, change).upsert(true).await.expect("an upsert");
    }
    let deleted = live.delete_one(doc! {"_id": 4}).await.expect("a delete");
    assert_eq!(deleted.deleted_count, 1);
}

#[tokio::test]
async fn timing_thousands_of_documents_written_into_the_gap_hold_no_writes_off() {
    let set = OwnSet::start(&[]);
    let bench = small_on(&set).await;
    let live = bench.database.collection::<Document>(SOURCE);
    hold_up_in_the_gap(&bench, 2_500).await;
    let run = bench.program(GAP).spawn();
    gap(&bench).await;
    write_into_the_gap(&live).await;
    let stop = CancellationToken::new();
    let probing = probe(live.clone(), stop.clone());
    let done = run.finish().await.expect_exit(1);
    stop.cancel();
    let refused = probing.await.expect("no panic");
    assert!(refused < Duration::from_secs(2), "writes were refused for {refused:?}");
    assert_eq!(done.text("/outcome"), "cut_over", "{}", done.stdout);
    let merged = live.count_documents(doc! {"_id": {"$gte": 1_000}}).await.expect("a count");
    assert_eq!(merged, u64::try_from(WRITTEN).expect("small"), "{}", done.stdout);
    assert!(live.find_one(doc! {"_id": 4}).await.expect("a read").is_none(), "its delete was acknowledged");
    let conflicts = done.json["gap"]["conflicts"].to_string();
    assert_eq!(conflicts, r#"[{"$numberInt":"1"}]"#, "{}", done.stdout);
    assert_eq!(done.json["gap"]["deleted"], 1, "{}", done.stdout);
    expect_nothing_left(&bench).await;
}

/// No collection of the gap is left.
async fn expect_nothing_left(bench: &Bench) {
    let mut names = bench.database.list_collection_names().await.expect("names");
    names.sort();
    assert_eq!(names.len(), 2, "the live collection and the former one: {names:?}");
    assert!(!names.iter().any(|name| name == TARGET));
    expect_no_fence(bench).await;
}

/// Whoever comes after a crash finds what was set aside.
#[tokio::test]
async fn what_was_written_into_the_gap_is_merged_after_a_crash_too() {
    let set = OwnSet::start(&[]);
    for point in ["cutover_renamed", "cutover_lifted"] {
        let bench = small_on(&set).await;
        let live = bench.database.collection::<Document>(SOURCE);
        hold_up_in_the_gap(&bench, 1_500).await;
        let run = bench.program(GAP).env("MONGOREKEY_CRASH_AT", &format!("{point}:1")).spawn();
        gap(&bench).await;
        live.insert_many((0..700).map(|number| doc! {"_id": 1_000 + number}))
            .await
            .expect("the name is free");
        live.update_one(doc! {"_id": 4}, doc! {"$set": {"a": 1}}).upsert(true).await.expect("an upsert");
        live.delete_one(doc! {"_id": 4}).await.expect("a delete");
        assert_eq!(run.finish().await.exit, None, "{point}");
        let next = bench.run(GAP).await.expect_exit(0);
        assert_eq!(next.text("/outcome"), "cut_over", "{point}");
        let merged = live.count_documents(doc! {"_id": {"$gte": 1_000}}).await.expect("a count");
        assert_eq!(merged, 700, "{point}: {}", next.stdout);
        let deleted = live.find_one(doc! {"_id": Bson::Int32(4)}).await.expect("a read");
        assert!(deleted.is_none(), "{point}: its delete was acknowledged");
        expect_nothing_left(&bench).await;
    }
}
