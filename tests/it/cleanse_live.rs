//! A cleanse of a collection that is written to: at the end the target is what the rules make of
//! the source, document by document.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bson::{Bson, Document, RawDocumentBuf, doc};
use mongodb::{Collection, IndexModel};
use tokio::task::JoinHandle;

use crate::harness::{Bench, Random, id_bytes, uri, wait_for};
use crate::program::Signal;

const COMMAND: &str = "cleanse --to target --parallel 2";

async fn bench(documents: i32) -> Bench {
    let bench = Bench::new().await;
    bench.insert_into("source", (0..documents).map(|id| document(id, 0, id % 3 != 0))).await;
    let config = format!(
        "[mongodb]\nuri = '{}'\nstate_database = '{}'\n\n[cleanse]\nsource = '{}'\nkeep = '{{\"valid\": true}}'\n",
        uri(),
        bench.state.name(),
        bench.namespace("source")
    );
    bench.configure_text(&config);
    bench
}

fn document(id: i32, version: i64, valid: bool) -> Document {
    doc! {"_id": id, "version": version, "valid": valid, "text": "x".repeat(100), "x.y": version}
}

/// Writers of every kind, each with a part of the `_id`s of its own.
struct Writers {
    stop: Arc<AtomicBool>,
    operations: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Writers {
    fn start(source: &Collection<Document>, documents: i32) -> Self {
        let (stop, operations) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let tasks = (0..4)
            .map(|part| {
                let (source, stop, operations) = (source.clone(), stop.clone(), operations.clone());
                tokio::spawn(async move {
                    let mut random = Random::seeded(u64::try_from(part).expect("small"));
                    while !stop.load(Ordering::Relaxed) {
                        write(&source, part, documents, &mut random).await;
                        operations.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        Self { stop, operations, tasks }
    }

    fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("no panic");
        }
    }
}

async fn write(source: &Collection<Document>, part: i32, documents: i32, random: &mut Random) {
    let below = |random: &mut Random, end: i32| {
        i32::try_from(random.below(usize::try_from(end).expect("positive"))).expect("small")
    };
    let id = 4 * below(random, documents / 4 + 200) + part;
    let filter = doc! {"_id": id};
    let version = i64::try_from(random.next() >> 8).expect("positive");
    match random.below(8) {
        0 => drop(source.insert_one(document(id, version, true)).await),
        1 => drop(source.delete_one(filter).await.expect("a write")),
        2 => {
            source.delete_one(filter.clone()).await.expect("a write");
            drop(source.insert_one(document(id, version, version % 2 == 0)).await);
        }
        3 => {
            let replacement = document(id, version, version % 2 == 0);
            source.replace_one(filter, replacement).upsert(true).await.expect("a write");
        }
        4 => {
            let toggle = vec![doc! {"$set": {"valid": {"$not": ["$valid"]}}}];
            source.update_one(filter, toggle).await.expect("a write");
        }
        _ => {
            let update = doc! {"$set": {"version": version}, "$inc": {"writes": 1}};
            source.update_one(filter, update).await.expect("a write");
        }
    }
}

/// The documents by the bytes of their `_id`, each as its bytes.
async fn bytes(bench: &Bench, collection: &str, filter: Document) -> BTreeMap<Vec<u8>, Vec<u8>> {
    use futures_util::TryStreamExt;
    let collection: Collection<Document> = bench.database.collection(collection);
    let cursor = collection.find(filter).await.expect("a cursor");
    let documents: Vec<Document> = cursor.try_collect().await.expect("all documents");
    documents
        .iter()
        .map(|document| {
            let bytes = RawDocumentBuf::try_from(document).expect("valid BSON").into_bytes();
            (id_bytes(document), bytes)
        })
        .collect()
}

async fn expect_equal(bench: &Bench) {
    let wanted = bytes(bench, "source", doc! {"valid": true}).await;
    let found = bytes(bench, "target", doc! {}).await;
    let missing = wanted.keys().filter(|id| !found.contains_key(*id)).count();
    let extra = found.keys().filter(|id| !wanted.contains_key(*id)).count();
    let different =
        wanted.iter().filter(|(id, bytes)| found.get(*id).is_some_and(|found| found != *bytes)).count();
    assert_eq!((missing, extra, different), (0, 0, 0), "missing, extra, different of {}", wanted.len());
}

fn source(bench: &Bench) -> Collection<Document> {
    bench.database.collection("source")
}

#[tokio::test]
async fn what_is_written_during_the_copy_is_in_the_target() {
    let bench = bench(20_000).await;
    let writers = Writers::start(&source(&bench), 20_000);
    wait_for("writers under way", async || writers.operations() > 100).await;
    let run = bench.run(COMMAND).await.expect_exit(0);
    assert!(run.number("/followed/changes") > 0, "{}", run.stdout);
    writers.stop().await;
    // What was written after its end is caught up with by the same command.
    let again = bench.run(COMMAND).await.expect_exit(0);
    assert_eq!(again.text("/status"), "completed");
    expect_equal(&bench).await;
    // And nothing is left to be done.
    let last = bench.run(COMMAND).await.expect_exit(0);
    assert_eq!(last.number("/followed/changes"), 0);
}

#[tokio::test]
async fn a_follower_keeps_the_target_in_step_until_it_is_stopped() {
    let bench = bench(5_000).await;
    let run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the copy", async || run.stderr().contains("follows")).await;
    let writers = Writers::start(&source(&bench), 5_000);
    wait_for("many writes", async || writers.operations() > 3_000).await;
    writers.stop().await;
    wait_for("the target in step", async || {
        bytes(&bench, "source", doc! {"valid": true}).await == bytes(&bench, "target", doc! {}).await
    })
    .await;
    run.signal(Signal::Terminate);
    let ended = run.finish().await.expect_exit(143);
    assert!(ended.number("/followed/changes") >= 1_000, "{}", ended.stdout);
    expect_equal(&bench).await;
}

#[tokio::test]
async fn kills_at_any_moment_lose_no_write() {
    let bench = bench(15_000).await;
    let writers = Writers::start(&source(&bench), 15_000);
    let mut random = Random::seeded(42);
    for kill in 0..12 {
        let arguments = if kill < 6 { COMMAND.to_owned() } else { format!("{COMMAND} --follow") };
        let run = bench.program(&arguments).spawn();
        let moment = u64::try_from(50 + random.below(1_500)).expect("small");
        tokio::time::sleep(Duration::from_millis(moment)).await;
        run.kill();
    }
    bench.run(COMMAND).await.expect_exit(0);
    writers.stop().await;
    bench.run(COMMAND).await.expect_exit(0);
    expect_equal(&bench).await;
}

#[tokio::test]
async fn values_that_swap_places_under_a_unique_index_end_right() {
    let bench = bench(0).await;
    let source = source(&bench);
    let count = 400;
    let account = |id: i32| doc! {"_id": id, "valid": true, "email": format!("e{id}")};
    bench.insert_into("source", (0..count).map(account)).await;
    let unique = mongodb::options::IndexOptions::builder().unique(true).build();
    let index = IndexModel::builder().keys(doc! {"email": 1}).options(unique).build();
    source.create_index(index).await.expect("an index");
    let run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the copy", async || run.stderr().contains("follows")).await;
    for round in 0..300 {
        let (one, other) = (round % count, (round * 7 + 1) % count);
        if one == other {
            continue;
        }
        let email = async |id: i32| {
            source.find_one(doc! {"_id": id}).await.expect("a read").expect("there").get("email").cloned()
        };
        let (first, second) = (email(one).await, email(other).await);
        let set = async |id: i32, email: Option<Bson>| {
            let update = doc! {"$set": {"email": email}};
            source.update_one(doc! {"_id": id}, update).await.expect("a write");
        };
        set(one, Some("free".into())).await;
        set(other, first).await;
        set(one, second).await;
    }
    wait_for("the target in step", async || {
        bytes(&bench, "source", doc! {}).await == bytes(&bench, "target", doc! {}).await
    })
    .await;
    run.signal(Signal::Interrupt);
    run.finish().await.expect_exit(130);
}

#[tokio::test]
async fn a_source_that_is_dropped_or_renamed_ends_the_run_with_the_state_kept() {
    for rename in [false, true] {
        let bench = bench(500).await;
        let run = bench.program(&format!("{COMMAND} --follow")).spawn();
        wait_for("the copy", async || run.stderr().contains("follows")).await;
        if rename {
            let command =
                doc! {"renameCollection": bench.namespace("source"), "to": bench.namespace("elsewhere")};
            bench.admin().run_command(command).await.expect("renamed");
        } else {
            source(&bench).drop().await.expect("dropped");
        }
        let ended = run.finish().await.expect_exit(4);
        let event = if rename { "rename" } else { "drop" };
        assert!(ended.text("/error/message").contains(event), "{}", ended.stdout);
    }
}
