//! Ends that nobody planned: the run that follows goes on as if nothing had been.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bson::{Bson, Document, doc};

use crate::harness::{Bench, DOCS, Random, wait_for};
use crate::key_api::{Call, KeyApi, Reply};
use crate::program::Signal;

const KILLS: usize = 5;
const CONCURRENCY: usize = 8;
const KEYS: i32 = 400;
const COMMAND: &str = "backfill --tps 400 --chunk 40 --concurrency 8 --job the-job";

/// Three documents to a key at most; some keys have no answer, some documents no key.
fn documents() -> impl Iterator<Item = Document> {
    (0..900).map(|id| match id % 30 {
        0 => doc! {"_id": id, "legacyKey": Bson::Null},
        1 => doc! {"_id": id},
        _ => doc! {"_id": id, "legacyKey": format!("K{}", id % KEYS)},
    })
}

fn answer(call: &Call) -> Reply {
    let reply = if call.key.ends_with('7') { Reply::not_found() } else { Reply::found(call) };
    reply.after(Duration::from_millis(20))
}

async fn bench() -> (Bench, KeyApi) {
    let bench = Bench::new().await;
    bench.insert(documents()).await;
    bench.create_index().await;
    let api = KeyApi::start(answer);
    bench.configure(&bench.config(&api));
    (bench, api)
}

async fn undisturbed() -> (BTreeMap<Vec<u8>, Document>, usize) {
    let (bench, api) = bench().await;
    bench.run(COMMAND).await.expect_exit(0);
    (bench.end_state(DOCS).await, api.count())
}

#[tokio::test]
async fn five_kills_change_nothing_but_the_calls_in_flight() {
    let (wanted, distinct) = undisturbed().await;
    let (bench, api) = bench().await;
    let mut random = Random::seeded(20_261_122);
    let mut killed_after = Vec::new();
    for _ in 0..KILLS {
        let before = api.count();
        let moment = before + 1 + random.below(distinct / KILLS);
        let run = bench.program(COMMAND).spawn();
        wait_for("calls to kill it in the middle of", async || api.count() >= moment).await;
        run.kill();
        killed_after.push(api.count());
        // What is stored never runs ahead of what is done.
        let job = bench.job("the-job").await.expect("a job");
        let totals = job.get_document("totals").cloned().unwrap_or_default();
        let stored = |name: &str| u64::try_from(totals.get_i64(name).unwrap_or(0)).expect("a count");
        assert!(stored("filled") <= bench.filled().await, "{totals}");
        assert!(stored("flagged") <= bench.flagged().await, "{totals}");
    }
    bench.run(COMMAND).await.expect_exit(0);

    assert!(bench.end_state(DOCS).await == wanted, "another end state; killed after calls {killed_after:?}");
    let repeated = api.count() - distinct;
    assert!(repeated <= KILLS * CONCURRENCY, "{repeated} calls repeated; killed after {killed_after:?}");
    assert!(api.most_in_flight() <= 2 * CONCURRENCY, "more calls at once than slots");
    let again = bench.run(COMMAND).await.expect_exit(0);
    again.expect_documents(&[]);
    again.expect_calls(0);
}

async fn ended_by(signal: Signal, exit: i32) {
    let (wanted, distinct) = undisturbed().await;
    let (bench, api) = bench().await;
    let run = bench.program(COMMAND).spawn();
    wait_for("calls to interrupt", async || api.count() >= 100).await;
    run.signal(signal);
    let ended = run.finish().await.expect_exit(exit);
    assert_eq!(ended.text("/status"), "interrupted");
    assert_eq!(ended.text("/error/code"), "interrupted");
    let (filled, flagged) = (bench.filled().await, bench.flagged().await);
    assert_eq!(ended.number("/documents/filled"), filled);
    assert_eq!(ended.number("/documents/flagged"), flagged);
    assert_eq!(ended.number("/documents/candidates_left"), 900 - filled - flagged);
    ended.expect_calls(u64::try_from(api.count()).expect("a count"));
    let job = bench.job("the-job").await.expect("a job");
    assert_eq!(job.get_str("state").ok(), Some("interrupted"));
    assert!(!job.contains_key("lease"), "the lease is given back: {job}");

    let done = bench.run(COMMAND).await.expect_exit(0);
    assert_eq!(done.text("/status"), "completed");
    assert!(bench.end_state(DOCS).await == wanted, "another end state");
    assert_eq!(api.count(), distinct, "every call that was under way was finished and remembered");
    assert_eq!(done.number("/job_totals/filled"), bench.filled().await);
    assert_eq!(done.number("/job_totals/flagged"), bench.flagged().await);
    assert_eq!(done.number("/job_totals/calls"), u64::try_from(distinct).expect("a count"));
}

#[tokio::test]
async fn an_interrupt_finishes_what_is_under_way_and_the_next_start_completes() {
    ended_by(Signal::Interrupt, 130).await;
}

#[tokio::test]
async fn a_termination_finishes_what_is_under_way_and_the_next_start_completes() {
    ended_by(Signal::Terminate, 143).await;
}

/// A process that was started by `nohup`, as these tests may be, goes on.
fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("a mask");
    u64::from_str_radix(ignored.trim(), 16).expect("a mask") & 1 != 0
}

#[tokio::test]
async fn a_hangup_finishes_what_is_under_way_and_the_next_start_completes() {
    if !is_hangup_ignored() {
        ended_by(Signal::Hangup, 129).await;
    }
}

#[tokio::test]
async fn a_signal_does_not_wait_for_retries() {
    let bench = Bench::with_docs(20).await;
    let api = KeyApi::start(|_| Reply::empty(503).header("retry-after", "600"));
    bench.configure(&bench.config(&api));
    let run = bench.program("backfill --tps 100").spawn();
    wait_for("a refused call", async || api.count() > 0).await;
    let asked = Instant::now();
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
    assert!(asked.elapsed() < Duration::from_secs(20), "it took {:?}", asked.elapsed());
}

#[tokio::test]
async fn a_second_start_is_refused_and_names_the_holder() {
    let bench = Bench::with_docs(100).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let holder = bench.program("backfill --tps 2").spawn();
    wait_for("the first call", async || api.count() > 0).await;

    let second = bench.run("backfill --tps 2").await.expect_exit(3);
    assert_eq!(second.text("/error/code"), "refused");
    let message = second.text("/error/message");
    assert!(message.contains(&holder.pid().to_string()), "{message}");

    // The second start left the first one alone.
    let before = api.count();
    wait_for("further calls of the holder", async || api.count() > before + 1).await;
    holder.signal(Signal::Terminate);
    holder.finish().await.expect_exit(143);
}

#[tokio::test]
async fn a_killed_holder_is_taken_over_at_once() {
    let bench = Bench::with_docs(200).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let holder = bench.program("backfill --tps 50").spawn();
    wait_for("calls", async || api.count() > 10).await;
    holder.kill();
    let before = api.count();
    let start = Instant::now();
    let next = bench.program("backfill --tps 50").spawn();
    wait_for("a call of the next one", async || api.count() > before).await;
    let took = start.elapsed();
    assert!(took < Duration::from_secs(5), "taken over after {took:?}");
    next.finish().await.expect_exit(0);
    assert_eq!(bench.filled().await, 200);
}

#[tokio::test]
async fn the_position_is_saved_however_busy_the_run_is() {
    let bench = Bench::with_docs(60_000).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let name = format!("backfill-{}", bench.namespace(DOCS));
    let run = bench.program("backfill --tps 100000").spawn();
    wait_for("a checkpoint", async || {
        let job = bench.job(&name).await;
        job.is_some_and(|job| job.contains_key("position"))
    })
    .await;
    let filled = bench.filled().await;
    assert!(filled < 50_000, "{filled} documents were filled before the first checkpoint");
    run.kill();
}
