//! A quarantine under live writers and kills: at the end every document of the source is kept or
//! quarantined under the first rule that hits it, and none is in both.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;
use tokio::task::JoinHandle;

use crate::cleansing::{FailPoint, SOURCE, configure, count_now, next_namespace};
use crate::harness::{BREATH, Bench, Random, wait_for};
use crate::program::Signal;
use crate::quarantine::{COMMAND, QUARANTINE, expect_split};
use crate::soak::{random, rounds};

const RULES: &str = r#"keep = '{"valid": true}'
reject = [{ name = "a", when = '{"kind": 1}' }, { name = "b", when = '{"kind": 2}' }]"#;
/// Waits in front of every batch that is inserted into a collection.
const INSERTS: &str = "hangDuringBatchInsert";

fn valid() -> Document {
    doc! {"valid": true, "kind": {"$nin": [1, 2]}}
}

fn hits() -> [(&'static str, Document); 3] {
    let of_kind = |kind: i32| doc! {"valid": true, "kind": kind};
    [("keep", doc! {"valid": {"$ne": true}}), ("a", of_kind(1)), ("b", of_kind(2))]
}

fn document(id: i32, random: &mut Random) -> Document {
    let kind = i32::try_from(random.below(4)).expect("small");
    let version = i64::try_from(random.next() >> 8).expect("positive");
    doc! {"_id": id, "valid": random.below(3) > 0, "kind": kind, "x.y": version, "text": "x".repeat(50)}
}

async fn bench(documents: i32) -> Bench {
    let bench = Bench::new().await;
    let mut random = Random::seeded(7);
    bench.insert_into(SOURCE, (0..documents).map(|id| document(id, &mut random))).await;
    configure(&bench, RULES);
    bench
}

/// Writers that make documents valid and invalid, and let another rule hit them.
struct Writers {
    stop: Arc<AtomicBool>,
    operations: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Writers {
    fn start(bench: &Bench, documents: i32) -> Self {
        Self::start_with_pauses(bench, documents, BREATH)
    }

    fn start_with_pauses(bench: &Bench, documents: i32, pause: Duration) -> Self {
        let (stop, operations) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let source: Collection<Document> = bench.database.collection(SOURCE);
        let tasks = (0..4)
            .map(|part| {
                let (source, stop, operations) = (source.clone(), stop.clone(), operations.clone());
                tokio::spawn(async move {
                    let mut random = random(u64::try_from(part).expect("small"));
                    while !stop.load(Ordering::Relaxed) {
                        write(&source, part, documents, &mut random).await;
                        operations.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(pause).await;
                    }
                })
            })
            .collect();
        Self { stop, operations, tasks }
    }

    async fn until(&self, operations: u64) {
        wait_for("writes", async || self.operations.load(Ordering::Relaxed) >= operations).await;
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("no panic");
        }
    }
}

async fn write(source: &Collection<Document>, part: i32, documents: i32, random: &mut Random) {
    let below = usize::try_from(documents / 4 + 100).expect("positive");
    let id = 4 * i32::try_from(random.below(below)).expect("small") + part;
    let filter = doc! {"_id": id};
    match random.below(6) {
        0 => drop(source.insert_one(document(id, random)).await),
        1 => drop(source.delete_one(filter).await.expect("a write")),
        2 => {
            source.delete_one(filter).await.expect("a write");
            drop(source.insert_one(document(id, random)).await);
        }
        3 => {
            let replacement = document(id, random);
            source.replace_one(filter, replacement).upsert(true).await.expect("a write");
        }
        4 => {
            let toggle = vec![doc! {"$set": {"valid": {"$not": ["$valid"]}}}];
            source.update_one(filter, toggle).await.expect("a write");
        }
        _ => {
            let kind = i32::try_from(random.below(4)).expect("small");
            source.update_one(filter, doc! {"$set": {"kind": kind}}).await.expect("a write");
        }
    }
}

#[tokio::test]
async fn writers_that_change_sides_and_rules_are_caught_up_with() {
    let bench = bench(12_000).await;
    let writers = Writers::start(&bench, 12_000);
    writers.until(100).await;
    bench.run(COMMAND).await.expect_exit(0);
    writers.stop().await;
    let run = bench.run(COMMAND).await.expect_exit(0);
    assert!(run.number("/documents/quarantined") > 1000, "{}", run.stdout);
    expect_split(&bench, valid(), &hits()).await;

    let run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    let writers = Writers::start(&bench, 12_000);
    writers.until(2_000).await;
    writers.stop().await;
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
    bench.run(COMMAND).await.expect_exit(0);
    expect_split(&bench, valid(), &hits()).await;
}

#[tokio::test]
async fn a_quarantine_is_verified_beside_its_follower_under_live_writes() {
    let bench = bench(6_000).await;
    bench.run(COMMAND).await.expect_exit(0);
    let run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    let writers = Writers::start_with_pauses(&bench, 6_000, Duration::from_millis(15));
    writers.until(200).await;
    for _ in 0..4 {
        // Each count once only, so that it agrees at whatever moment it is made.
        bench.run("verify --counts --settle 1ms").await.expect_exit(0);
        bench.run("verify --sample 2000 --settle 20s").await.expect_exit(0);
    }
    let quarantine: Collection<Document> = bench.database.collection(QUARANTINE);
    let stray = doc! {"_id": "stray", "rule": "keep", "document": {"_id": "stray", "valid": false}};
    quarantine.insert_one(stray).await.expect("a write");
    let counted = bench.run("verify --counts --settle 2s").await.expect_exit(1);
    let checks = counted.json["checks"].as_array().expect("checks");
    let failed: Vec<_> = checks.iter().filter(|check| check["passed"] == false).collect();
    assert!(failed.len() == 1 && failed[0]["name"] == "quarantine", "{}", counted.stdout);
    let sampled = bench.run("verify --sample 100000 --settle 4s").await.expect_exit(1);
    let checks = sampled.json["checks"].as_array().expect("checks").iter();
    let mut differences = checks.flat_map(|check| check["differences"].as_array().expect("a list"));
    let stray = differences.find(|difference| difference["_id"] == "stray").expect("the stray one");
    assert!(stray["age_seconds"].as_f64().is_some_and(|age| age >= 3.0), "{stray}");
    writers.stop().await;
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
}

#[tokio::test]
async fn random_kills_leave_every_document_on_one_side() {
    let bench = bench(10_000).await;
    let writers = Writers::start(&bench, 10_000);
    let (mut random, kills) = (random(4711), rounds(6));
    for kill in 0..kills {
        let follow = if 12 * kill < 7 * kills { "" } else { " --follow" };
        let run = bench.program(&format!("{COMMAND}{follow}")).spawn();
        let moment = u64::try_from(50 + random.below(1_800)).expect("small");
        tokio::time::sleep(Duration::from_millis(moment)).await;
        run.kill();
    }
    bench.run(COMMAND).await.expect_exit(0);
    writers.stop().await;
    bench.run(COMMAND).await.expect_exit(0);
    expect_split(&bench, valid(), &hits()).await;
}

/// The sessions on which ranges are being copied, as the program recorded them.
async fn recorded_sessions(bench: &Bench) -> Vec<Bson> {
    let ranges: Collection<Document> = bench.state.collection("ranges");
    let copying: Vec<Document> =
        ranges.find(doc! {"state": "copying"}).await.expect("a cursor").try_collect().await.expect("ranges");
    copying.iter().filter_map(|range| range.get_document("session").ok()?.get("id").cloned()).collect()
}

async fn running_on(bench: &Bench, sessions: &[Bson]) -> usize {
    let pipeline = [
        doc! {"$currentOp": {"allUsers": true}},
        doc! {"$match": {"active": true, "lsid.id": {"$in": sessions.to_vec()}}},
    ];
    let operations: Vec<Document> =
        bench.admin().aggregate(pipeline).await.expect("a cursor").try_collect().await.expect("operations");
    operations.len()
}

#[tokio::test]
async fn a_kill_while_rejected_documents_are_copied_leaves_no_range_half_done() {
    let bench = bench(6_000).await;
    let inserts = FailPoint::reserve(INSERTS);
    let data =
        doc! {"nss": next_namespace(&bench, COMMAND, QUARANTINE).await, "shouldCheckForInterrupt": true};
    // Some batches go through before: what a rule rejects is there in part.
    inserts.set(&bench, doc! {"skip": 5}, data).await;
    let mut run = bench.program(&format!("{COMMAND} --parallel 1")).spawn();
    wait_for("a range of which a part is quarantined", async || {
        assert!(run.is_running(), "{}", run.stderr());
        let copied = count_now(&bench, QUARANTINE, doc! {}).await;
        copied > 200 && running_on(&bench, &recorded_sessions(&bench).await).await > 0
    })
    .await;
    let zombies = recorded_sessions(&bench).await;
    run.kill();
    // What it had copied changes sides meanwhile.
    let source: Collection<Document> = bench.database.collection(SOURCE);
    let toggle = vec![doc! {"$set": {"valid": {"$not": ["$valid"]}}}];
    source.update_many(doc! {}, toggle).await.expect("a write");
    inserts.off(&bench).await;
    bench.run(COMMAND).await.expect_exit(0);
    assert_eq!(running_on(&bench, &zombies).await, 0);
    expect_split(&bench, valid(), &hits()).await;
}

/// The first rule has copied them, and then the second hits them before it looks.
#[tokio::test]
async fn documents_that_change_their_rule_during_the_copy_are_quarantined_once() {
    let bench = Bench::new().await;
    let odd =
        |id: i32| doc! {"_id": id, "valid": true, "kind": 1, "x.y": id, "n": {"$a": {"b.c": id}, "d": -0.0}};
    bench.insert_into(SOURCE, (0..3000).map(odd)).await;
    configure(&bench, RULES);
    let inserts = FailPoint::reserve(INSERTS);
    let data =
        doc! {"nss": next_namespace(&bench, COMMAND, QUARANTINE).await, "shouldCheckForInterrupt": true};
    inserts.set(&bench, doc! {"skip": 3}, data).await;
    let mut run = bench.program(&format!("{COMMAND} --parallel 1")).spawn();
    wait_for("a part of the first rule", async || {
        assert!(run.is_running(), "{}", run.stderr());
        count_now(&bench, QUARANTINE, doc! {"rule": "a"}).await > 100
    })
    .await;
    let source: Collection<Document> = bench.database.collection(SOURCE);
    source.update_many(doc! {}, doc! {"$set": {"kind": 2}}).await.expect("a write");
    inserts.off(&bench).await;
    run.finish().await.expect_exit(0);
    expect_split(&bench, valid(), &hits()).await;
}

#[tokio::test]
async fn a_kill_between_leaving_one_side_and_reaching_the_other_loses_nothing() {
    let bench = bench(600).await;
    bench.run(COMMAND).await.expect_exit(0);
    let source: Collection<Document> = bench.database.collection(SOURCE);
    let toggle = vec![doc! {"$set": {"valid": {"$not": ["$valid"]}}}];
    source.update_many(doc! {}, toggle).await.expect("a write");
    let run = bench.program(COMMAND).env("MONGOREKEY_CRASH_AT", "left_a_side:1").run().await;
    assert_eq!(run.exit, None, "killed by itself: {}", run.output());
    let quarantine: Collection<Document> = bench.database.collection(QUARANTINE);
    let target: Collection<Document> = bench.database.collection("target");
    let there = quarantine.count_documents(doc! {}).await.expect("a count")
        + target.count_documents(doc! {}).await.expect("a count");
    assert!(there < 600, "{there} are there: not killed in between");
    bench.run(COMMAND).await.expect_exit(0);
    expect_split(&bench, valid(), &hits()).await;
}
