//! `dedupe` and `exists_in` while documents and members are written to by many at once: at the end
//! the target is what the rules make of both collections, document by document.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bson::{Document, doc};
use mongodb::{Collection, Database, IndexModel};
use tokio::task::JoinHandle;

use crate::cleansing::{SOURCE, configure};
use crate::harness::{BREATH, Bench, Random, wait_for};
use crate::judging::Judge;
use crate::program::Signal;
use crate::soak::{random, rounds};

const MEMBERS: &str = "members";
/// Two members have each number: when one goes, the other may stay.
const NUMBERS: i32 = 40;

fn small(number: usize) -> i32 {
    i32::try_from(number).expect("small")
}

fn document(random: &mut Random, id: i32, documents: i32) -> Document {
    doc! {
        "_id": id,
        "valid": !random.below(6).eq(&0),
        "member": small(random.below(usize::try_from(NUMBERS).expect("small"))),
        "team": small(random.below(usize::try_from(documents / 5).expect("small"))),
        "at": small(random.below(1000)),
        "text": "x".repeat(60),
    }
}

async fn bench(documents: i32, foreign: &str, dedupe: bool) -> Bench {
    let bench = Bench::new().await;
    let mut random = Random::seeded(1);
    bench.insert_into(SOURCE, (0..documents).map(|id| document(&mut random, id, documents))).await;
    bench.insert_into(MEMBERS, (0..NUMBERS).map(|n| doc! {"_id": n, "n": n})).await;
    bench.insert_into(MEMBERS, (0..NUMBERS).map(|n| doc! {"_id": 1000 + n, "n": n})).await;
    let images = doc! {"collMod": MEMBERS, "changeStreamPreAndPostImages": {"enabled": true}};
    bench.database.run_command(images).await.expect("changed");
    let source: Collection<Document> = bench.database.collection(SOURCE);
    for field in ["team", "member"] {
        source.create_index(IndexModel::builder().keys(doc! {field: 1}).build()).await.expect("an index");
    }
    let members = bench.namespace(MEMBERS);
    let mut rules = format!(
        "keep = '{{\"valid\": true}}'\nexists_in = [{{ name = 'm', collection = '{members}', local = 'member', foreign = '{foreign}' }}]\n"
    );
    if dedupe {
        rules.push_str("dedupe = { by = ['team'], keep_latest = 'at' }\n");
    }
    configure(&bench, &rules);
    bench
}

struct Writers {
    stop: Arc<AtomicBool>,
    operations: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Writers {
    fn start(database: &Database, documents: i32) -> Self {
        let (stop, operations) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let tasks = (0..4_u64)
            .map(|seed| {
                let (database, stop, operations) = (database.clone(), stop.clone(), operations.clone());
                tokio::spawn(async move {
                    let mut random = random(seed);
                    while !stop.load(Ordering::Relaxed) {
                        // Of members there are few, each with many documents.
                        if random.below(40) == 0 {
                            write_member(&database, &mut random).await;
                        } else {
                            write(&database, documents, &mut random).await;
                        }
                        operations.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(BREATH).await;
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

async fn write_member(database: &Database, random: &mut Random) {
    let members: Collection<Document> = database.collection(MEMBERS);
    let number = small(random.below(usize::try_from(NUMBERS).expect("small")));
    let id = if random.below(2) == 0 { number } else { 1000 + number };
    let filter = doc! {"_id": id};
    match random.below(4) {
        0 => {
            members.delete_one(filter).await.expect("a write");
        }
        1 => drop(members.insert_one(doc! {"_id": id, "n": number}).await),
        2 => {
            members.update_one(filter, doc! {"$set": {"x": number}}).await.expect("a write");
        }
        _ => {
            let other = small(random.below(usize::try_from(NUMBERS).expect("small")));
            members.update_one(filter, doc! {"$set": {"n": other}}).upsert(true).await.expect("a write");
        }
    }
}

async fn write(database: &Database, documents: i32, random: &mut Random) {
    let source: Collection<Document> = database.collection(SOURCE);
    let id = small(random.below(usize::try_from(documents + 100).expect("small")));
    let fresh = document(random, id, documents);
    let part = |name: &str| doc! {"$set": {name: fresh.get(name).cloned()}};
    let filter = doc! {"_id": id};
    let update = match random.below(9) {
        0 => {
            source.delete_one(filter).await.expect("a write");
            return;
        }
        1 => return drop(source.insert_one(fresh).await),
        2 => return drop(source.replace_one(filter, fresh).upsert(true).await),
        3 => part("valid"),
        4 => part("member"),
        5 => part("team"),
        6 => doc! {"$inc": {"at": -5}},
        7 => doc! {"$unset": {"team": ""}},
        _ => part("at"),
    };
    source.update_one(filter, update).await.expect("a write");
}

async fn copies_under_load(foreign: &'static str, dedupe: bool) {
    let bench = bench(4_000, foreign, dedupe).await;
    let judge = Judge { keep: true, exists_in: Some((MEMBERS, foreign)), dedupe };
    let writers = Writers::start(&bench.database, 4_000);
    wait_for("writers under way", async || writers.operations() > 100).await;
    bench.run("cleanse --parallel 2").await.expect_exit(0);
    let run = bench.program("cleanse --follow").spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    let before = writers.operations();
    wait_for("many writes", async || writers.operations() > before + 400).await;
    writers.stop().await;
    wait_for("the target in step", async || judge.is_in_step(&bench).await).await;
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
    judge.expect_target(&bench).await;
    bench.run("verify --full --counts").await.expect_exit(0);
}

#[tokio::test]
async fn members_by_id_are_followed_under_load() {
    copies_under_load("_id", false).await;
}

#[tokio::test]
async fn members_by_value_are_followed_under_load() {
    copies_under_load("n", false).await;
}

#[tokio::test]
async fn groups_of_members_are_followed_under_load() {
    copies_under_load("n", true).await;
}

#[tokio::test]
async fn random_kills_under_load_lose_no_group_and_no_member() {
    let bench = bench(3_000, "n", true).await;
    let judge = Judge { keep: true, exists_in: Some((MEMBERS, "n")), dedupe: true };
    let writers = Writers::start(&bench.database, 3_000);
    let (mut random, kills) = (random(42), rounds(5));
    for kill in 0..kills {
        let arguments = if 5 * kill < 2 * kills { "cleanse" } else { "cleanse --follow" };
        let run = bench.program(arguments).spawn();
        let moment = u64::try_from(100 + random.below(1_500)).expect("small");
        tokio::time::sleep(Duration::from_millis(moment)).await;
        run.kill();
    }
    bench.run("cleanse").await.expect_exit(0);
    writers.stop().await;
    bench.run("cleanse").await.expect_exit(0);
    judge.expect_target(&bench).await;
}
