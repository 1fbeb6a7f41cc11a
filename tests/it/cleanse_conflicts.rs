//! Documents of the target that stand in each other's way under a unique index, though the source
//! never showed them together: all of them are removed, looked at again, and none is lost.

use bson::{Bson, Document, doc};
use mongodb::options::IndexOptions;
use mongodb::{Collection, IndexModel};

use crate::cleanse_live::RULE;
use crate::cleansing::{SOURCE, TARGET, assert_same, bytes, bytes_where, configure};
use crate::harness::Bench;

const COMMAND: &str = "cleanse --parallel 2";

/// Documents with a value of their own each under a unique index.
async fn bench(documents: i32) -> Bench {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let all = (0..documents)
        .map(|id| doc! {"_id": id, "valid": id % 3 != 0, "slot": format!("s{id}"), "part": id % 2});
    bench.insert_into(SOURCE, all).await;
    let unique = IndexOptions::builder().unique(true).build();
    let index = IndexModel::builder().keys(doc! {"slot": 1, "part": -1}).options(unique).build();
    collection(&bench, SOURCE).create_index(index).await.expect("an index");
    bench
}

fn collection(bench: &Bench, name: &str) -> Collection<Document> {
    bench.database.collection(name)
}

async fn set(bench: &Bench, name: &str, id: i32, slot: impl Into<Bson>) {
    let update = doc! {"$set": {"slot": slot.into()}};
    let done = collection(bench, name).update_one(doc! {"_id": id}, update).await.expect("a write");
    assert_eq!(done.modified_count, 1, "{id}");
}

async fn killed_at(bench: &Bench, point: &str) {
    let run = bench.program(COMMAND).env("MONGOREKEY_CRASH_AT", point).run().await;
    assert_eq!(run.exit, None, "{point} was never reached: {}", run.output());
}

async fn expect_in_step(bench: &Bench) {
    assert_same(&bytes(bench, TARGET).await, &bytes_where(bench, SOURCE, doc! {"valid": true}).await);
    let names = collection(bench, TARGET).list_index_names().await.expect("names");
    assert!(names.contains(&"slot_1_part_-1".to_owned()), "{names:?}");
    let marks: Collection<Document> = bench.state.collection("marks");
    assert_eq!(marks.count_documents(doc! {}).await.expect("a count"), 0, "marks are left");
}

/// As when a value passed from one document to another between the moments at which both were read.
#[tokio::test]
async fn a_unique_index_is_built_over_documents_that_were_read_at_different_moments() {
    let bench = bench(300).await;
    killed_at(&bench, "cleanse_indexed:1").await;
    set(&bench, TARGET, 1, "s5").await;
    set(&bench, TARGET, 100, "s10").await;
    set(&bench, TARGET, 200, "s100").await;
    set(&bench, TARGET, 202, "s100").await;
    bench.run(COMMAND).await.expect_exit(0);
    expect_in_step(&bench).await;
}

/// The one that had been in step is not touched again by anything: it has to be remembered.
#[tokio::test]
async fn a_kill_between_the_removal_of_both_parties_and_their_return_loses_neither() {
    let bench = bench(300).await;
    bench.run(COMMAND).await.expect_exit(0);
    set(&bench, TARGET, 1, "new").await;
    set(&bench, SOURCE, 5, "new").await;
    killed_at(&bench, "parties_removed:1").await;
    let left = bytes_where(&bench, TARGET, doc! {"_id": {"$in": [1, 5]}}).await;
    assert!(left.is_empty(), "both are removed");
    bench.run(COMMAND).await.expect_exit(0);
    expect_in_step(&bench).await;
}

/// A ring of values that is turned by one place, in one batch.
#[tokio::test]
async fn values_that_change_places_in_a_ring_end_right() {
    let bench = bench(300).await;
    bench.run(COMMAND).await.expect_exit(0);
    let ring: Vec<i32> = (0..300).filter(|id| id % 3 != 0 && id % 2 == 0).collect();
    set(&bench, SOURCE, ring[0], "parked").await;
    for (to, from) in ring.iter().zip(&ring[1..]) {
        set(&bench, SOURCE, *from, format!("passing {from}")).await;
        set(&bench, SOURCE, *to, format!("s{from}")).await;
    }
    set(&bench, SOURCE, ring[ring.len() - 1], format!("s{}", ring[0])).await;
    bench.run(COMMAND).await.expect_exit(0);
    expect_in_step(&bench).await;
}
