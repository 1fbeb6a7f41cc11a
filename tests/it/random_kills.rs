//! Kills at random moments, from the first millisecond of a start to the middle of the
//! calls: what is left at the end is what an undisturbed run leaves.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use crate::cleansing::{
    SOURCE, TARGET, assert_same, bytes, bytes_where, configure, count_now, every_type, ids,
};
use crate::harness::{Bench, DOCS, wait_for};
use crate::key_api::{Call, KeyApi, Reply};
use crate::soak::{random, rounds};

/// How many that are in a usual run.
const KILLS: usize = 10;
/// Kills in mid-run are rarer than those of a start: each costs the second that a takeover waits.
const KILLS_BY_CALLS_IN_TEN: usize = 4;
const JOB: &str = "killed";

/// How the killed runs work, which decides what a kill can cut off.
struct Shape {
    seed: u64,
    concurrency: usize,
    chunk: usize,
    /// So many for each kill that the run is not done before the last one.
    keys_per_kill: usize,
    /// A kill by calls comes after so many at most.
    calls: usize,
}

/// Two documents to a key, some without one, every tenth key unknown to the API.
fn documents(keys: usize) -> impl Iterator<Item = Document> {
    let count = i32::try_from(2 * keys).expect("small");
    let keys = i32::try_from(keys).expect("small");
    (0..count).map(move |id| match id % 40 {
        0 => doc! {"_id": id, "legacyKey": Bson::Null},
        _ => doc! {"_id": id, "legacyKey": format!("K{}", id % keys)},
    })
}

fn answer(call: &Call) -> Reply {
    let reply = if call.key.ends_with('7') { Reply::not_found() } else { Reply::found(call) };
    reply.after(Duration::from_millis(15))
}

async fn bench(keys: usize) -> (Bench, KeyApi) {
    let bench = Bench::new().await;
    bench.insert(documents(keys)).await;
    bench.create_index().await;
    let api = KeyApi::start(answer);
    // Whether the guard judges runs fairly that never come far is not the question here.
    bench.configure(&bench.config(&api).backfill("max_not_found_share = 1.0"));
    (bench, api)
}

async fn undisturbed(keys: usize) -> (BTreeMap<Vec<u8>, Document>, usize) {
    let (bench, api) = bench(keys).await;
    bench.run(&format!("backfill --tps 5000 --concurrency 64 --job {JOB}")).await.expect_exit(0);
    (bench.end_state(DOCS).await, api.count())
}

/// Keys whose answers a restart will know.
async fn remembered(bench: &Bench) -> HashSet<String> {
    let names = bench.state.list_collection_names().await.expect("names");
    let Some(name) = names.into_iter().find(|name| name.starts_with("key_map_")) else {
        return HashSet::new();
    };
    let key_map: Collection<Document> = bench.state.collection(&name);
    let entries: Vec<Document> =
        key_map.find(doc! {}).await.expect("a cursor").try_collect().await.expect("entries");
    entries.iter().map(|entry| entry.get_str("_id").expect("a key").to_owned()).collect()
}

/// What is stored about the job never runs ahead of what is done.
async fn expect_honest_counts(bench: &Bench) {
    let job = bench.job(JOB).await.unwrap_or_default();
    let totals = job.get_document("totals").cloned().unwrap_or_default();
    let stored = |name: &str| u64::try_from(totals.get_i64(name).unwrap_or(0)).expect("a count");
    assert!(stored("filled") <= bench.filled().await, "{totals}");
    assert!(stored("flagged") <= bench.flagged().await, "{totals}");
}

async fn killed_at_random(shape: Shape) {
    let kills = rounds(KILLS);
    let keys = shape.keys_per_kill * kills;
    let (wanted, distinct) = undisturbed(keys).await;
    let (bench, api) = bench(keys).await;
    let command =
        format!("backfill --tps 400 --chunk {} --concurrency {} --job {JOB}", shape.chunk, shape.concurrency);
    let mut random = random(shape.seed);
    let (mut cut_off, mut in_mid_run, mut moments) = (0, 0, Vec::new());
    for kill in 0..kills {
        let before = api.count();
        let mut run = bench.program(&command).spawn();
        if random.below(10) < KILLS_BY_CALLS_IN_TEN {
            let moment = before + 1 + random.below(shape.calls);
            wait_for("the moment of the kill", async || {
                assert!(run.is_running(), "kill {kill} came too late: {}", run.stderr());
                api.count() >= moment
            })
            .await;
            tokio::time::sleep(Duration::from_micros(u64::try_from(random.below(5000)).expect("small")))
                .await;
            in_mid_run += 1;
        } else {
            let moment = u64::try_from(10 + random.below(290)).expect("small");
            tokio::time::sleep(Duration::from_millis(moment)).await;
        }
        run.kill();
        // What was sent arrives.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let known = remembered(&bench).await;
        let lost = api.calls()[before..].iter().filter(|call| !known.contains(&call.key)).count();
        assert!(lost <= shape.concurrency, "kill {kill} cost {lost} answers; kills so far: {moments:?}");
        cut_off += lost;
        moments.push((api.count() - before, lost));
        expect_honest_counts(&bench).await;
    }
    assert!(in_mid_run >= kills / 5, "{in_mid_run} kills in mid-run only");
    assert!(bench.filled().await > 0, "the kills came too early");
    bench.run(&command).await.expect_exit(0);

    // Calls and lost answers of each run.
    let shown = format!("{moments:?}");
    assert!(bench.end_state(DOCS).await == wanted, "another end state; kills: {shown}");
    let repeated = api.count() - distinct;
    assert!(repeated <= cut_off, "{repeated} calls repeated, {cut_off} had been cut off; kills: {shown}");
    let again = bench.run(&command).await.expect_exit(0);
    again.expect_documents(&[]);
    again.expect_calls(0);
}

#[tokio::test]
async fn random_kills_of_a_run_that_asks_for_one_key_at_a_time() {
    killed_at_random(Shape { seed: 1, concurrency: 1, chunk: 3, keys_per_kill: 6, calls: 6 }).await;
}

#[tokio::test]
async fn random_kills_of_a_run_with_small_chunks() {
    killed_at_random(Shape { seed: 2, concurrency: 8, chunk: 20, keys_per_kill: 24, calls: 40 }).await;
}

#[tokio::test]
async fn random_kills_of_a_run_with_many_calls_at_once() {
    killed_at_random(Shape { seed: 3, concurrency: 64, chunk: 1000, keys_per_kill: 48, calls: 90 }).await;
}

/// From before the target exists to after its last range; every second kill comes when a run has
/// begun to copy.
#[tokio::test]
async fn random_kills_of_a_cleanse() {
    const KEEP: &str = "keep = '{\"bool\": true}'";
    let bench = Bench::new().await;
    let source = (0..).zip(ids(16_000)).map(|(number, id)| every_type(id, number));
    bench.insert_into(SOURCE, source).await;
    configure(&bench, KEEP);
    let mut random = random(4);
    for kill in 0..rounds(6) {
        let parallel = 1 + kill % 4;
        let before = count_now(&bench, TARGET, doc! {}).await;
        let mut run = bench.program(&format!("cleanse --parallel {parallel}")).spawn();
        if kill % 2 == 0 {
            wait_for("something copied", async || {
                !run.is_running() || count_now(&bench, TARGET, doc! {}).await > before
            })
            .await;
        }
        let moment = u64::try_from(5 + random.below(250)).expect("small");
        tokio::time::sleep(Duration::from_millis(moment)).await;
        let done = !run.is_running();
        run.kill();
        if done {
            let run = bench.program(&format!("cleanse --restart --parallel {parallel}")).spawn();
            tokio::time::sleep(Duration::from_millis(moment)).await;
            run.kill();
        }
    }
    bench.run("cleanse").await.expect_exit(0);
    let expected = bytes_where(&bench, SOURCE, doc! {"bool": true}).await;
    assert!(expected.len() > 7000);
    assert_same(&bytes(&bench, TARGET).await, &expected);
}
