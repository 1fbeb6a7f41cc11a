//! An application that writes every change to both sides, for the tests of dual writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bson::{Document, doc};
use mongodb::Collection;
use tokio::task::JoinHandle;

use crate::cleansing::{SOURCE, TARGET, assert_same, bytes, bytes_where, configure};
use crate::harness::{BREATH, Bench, Random, wait_for};
use crate::soak::random;

/// The rules of most tests.
pub const RULES: &str = "keep = '{\"valid\": {\"$ne\": false}}'";

pub fn valid() -> Document {
    doc! {"valid": {"$ne": false}}
}

pub fn document(id: i32, version: i64) -> Document {
    doc! {"_id": id, "version": version, "valid": version % 5 != 4, "text": "x".repeat(100), "x.y": version}
}

pub async fn bench(documents: i32) -> Bench {
    let bench = Bench::new().await;
    configure(&bench, RULES);
    if documents > 0 {
        bench.insert_into(SOURCE, (0..documents).map(|id| document(id, i64::from(id)))).await;
    } else {
        bench.database.create_collection(SOURCE).await.expect("a collection");
    }
    bench
}

pub fn sides(bench: &Bench) -> [Collection<Document>; 2] {
    [SOURCE, TARGET].map(|name| bench.database.collection(name))
}

pub async fn expect_equal(bench: &Bench) {
    assert_same(&bytes(bench, TARGET).await, &bytes_where(bench, SOURCE, valid()).await);
}

/// An application that writes everything to both sides, each part with `_id`s of its own.
pub struct Application {
    stop: Arc<AtomicBool>,
    operations: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Application {
    pub fn start(bench: &Bench, documents: i32) -> Self {
        let (stop, operations) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let tasks = (0..4)
            .map(|part| {
                let (sides, stop, operations) = (sides(bench), stop.clone(), operations.clone());
                tokio::spawn(async move {
                    let mut random = random(u64::try_from(part).expect("small"));
                    while !stop.load(Ordering::Relaxed) {
                        write_both(&sides, part, documents, &mut random).await;
                        operations.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(BREATH).await;
                    }
                })
            })
            .collect();
        Self { stop, operations, tasks }
    }

    pub async fn has_written(&self, operations: u64) {
        wait_for("writes", async || self.operations.load(Ordering::Relaxed) >= operations).await;
    }

    pub async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("no panic");
        }
    }
}

/// One change on both sides; an update finds nothing where the copy has not come yet, as it does
/// in applications.
async fn write_both(sides: &[Collection<Document>; 2], part: i32, documents: i32, random: &mut Random) {
    let end = usize::try_from(documents / 4 + 200).expect("positive");
    let id = 4 * i32::try_from(random.below(end)).expect("small") + part;
    let version = i64::try_from(random.next() >> 8).expect("positive");
    let filter = doc! {"_id": id};
    let kind = random.below(6);
    let is_valid = document(id, version).get_bool("valid").expect("set");
    for (number, side) in sides.iter().enumerate() {
        let is_target = number == 1;
        match kind {
            0 => drop(side.delete_one(filter.clone()).await.expect("a write")),
            // The application knows the rules: what is invalid has no place in the target.
            1 | 2 if is_target && !is_valid => drop(side.delete_one(filter.clone()).await.expect("a write")),
            1 | 2 => {
                let replacement = document(id, version);
                side.replace_one(filter.clone(), replacement).upsert(true).await.expect("a write");
            }
            _ => {
                let update = doc! {"$set": {"text": version.to_string()}, "$inc": {"writes": 1}};
                side.update_one(filter.clone(), update).await.expect("a write");
            }
        }
    }
}
