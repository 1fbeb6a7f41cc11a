//! Several workers on one job: one call per key and one ceiling over all of them, whoever dies.

use std::time::{Duration, Instant};

use bson::doc;

use crate::harness::{Bench, wait_for};
use crate::key_api::{Call, KeyApi, Reply};
use crate::pacing::{ENOUGH_IDLE, expect_ceiling_of, processor_time};
use crate::program::Signal;

fn quick(call: &Call) -> Reply {
    let reply = if call.key.ends_with('7') { Reply::not_found() } else { Reply::found(call) };
    reply.after(Duration::from_millis(30))
}

async fn bench(documents: i32, keys: i32) -> (Bench, KeyApi) {
    let bench = Bench::new().await;
    bench.insert((0..documents).map(|id| doc! {"_id": id, "legacyKey": format!("K{}", id % keys)})).await;
    bench.create_index().await;
    let api = KeyApi::start(quick);
    bench.configure(&bench.config(&api));
    (bench, api)
}

async fn expect_all_settled(bench: &Bench, documents: i32, keys: i32) {
    let with_answer = (0..documents).filter(|id| (id % keys) % 10 != 7).count();
    assert_eq!(bench.filled().await, u64::try_from(with_answer).expect("small"));
    let without = usize::try_from(documents).expect("small") - with_answer;
    assert_eq!(bench.flagged().await, u64::try_from(without).expect("small"));
}

#[tokio::test]
async fn workers_of_one_process_share_the_keys() {
    let (bench, api) = bench(3000, 1000).await;
    let run = bench.run("backfill --tps 100000 --chunk 100 --workers 3").await.expect_exit(0);
    expect_all_settled(&bench, 3000, 1000).await;
    assert_eq!(api.count(), 1000, "one call per key");
    assert_eq!(run.number("/documents/candidates"), 3000);
    assert_eq!(run.number("/documents/filled") + run.number("/documents/flagged"), 3000);
    assert_eq!(run.number("/documents/candidates_left"), 0);
    assert_eq!(run.number("/job_totals/calls"), 1000);
    assert_eq!(run.number("/job_totals/filled"), bench.filled().await);
    let job = bench.job(run.text("/job")).await.expect("a job");
    assert_eq!(job.get_str("state").ok(), Some("completed"));
    assert!(job.get_document("workers").expect("workers").is_empty(), "{job}");
    // The next run finds nothing left, and is alone again.
    bench.run("backfill --tps 1000").await.expect_exit(0).expect_calls(0);
}

#[tokio::test]
async fn a_second_process_takes_its_share_and_the_job_ends_once() {
    let (bench, api) = bench(1200, 1200).await;
    let first = bench.program("backfill --tps 150 --chunk 50").spawn();
    wait_for("calls of the first", async || api.count() > 50).await;
    let joined = bench.run("backfill --tps 150 --chunk 50 --join").await.expect_exit(0);
    let first = first.finish().await.expect_exit(0);
    expect_all_settled(&bench, 1200, 1200).await;
    assert_eq!(api.count(), 1200, "one call per key");
    let (by_first, by_joined) = (first.number("/api/calls"), joined.number("/api/calls"));
    assert_eq!(by_first + by_joined, 1200);
    assert!(by_joined > 200, "the second process made {by_joined} calls only");
    assert_eq!(first.number("/documents/candidates_left"), 0);
    let status = bench.run("status").await.expect_exit(0);
    assert_eq!(status.text("/jobs/0/state"), "completed");
}

#[tokio::test]
async fn joining_nobody_starts_the_job() {
    let (bench, api) = bench(40, 40).await;
    bench.run("backfill --tps 1000 --join").await.expect_exit(0);
    expect_all_settled(&bench, 40, 40).await;
    assert_eq!(api.count(), 40);
}

#[tokio::test]
async fn timing_three_workers_keep_one_ceiling_and_use_it() {
    let (bench, api) = bench(3000, 3000).await;
    let (begun, (idle, total)) = (Instant::now(), processor_time());
    bench.run("backfill --tps 200 --chunk 200 --workers 3").await.expect_exit(0);
    let (idle_then, total_then) = processor_time();
    let idle = (idle_then - idle) / (total_then - total);
    expect_all_settled(&bench, 3000, 3000).await;
    let calls = api.calls();
    assert_eq!(calls.len(), 3000);
    expect_ceiling_of(200, &api, &calls);
    // From when all three had their share until nothing was left.
    let span = calls[2900].at - calls[600].at;
    let used = 2300.0 / (200.0 * span.as_secs_f64());
    // Moments of several workers are a little further apart, a debug build misses some, and a
    // reservation that waits for a slow disk costs a block. One worker that is idle costs a third.
    let least = if idle > ENOUGH_IDLE { 0.9 } else { 0.5 };
    assert!(used >= least, "{used:.3} of the ceiling, idle {idle:.2}; all in {:?}", begun.elapsed());
}

/// Whose keys fail is chance; the job is not completed, whoever's they were.
#[tokio::test]
async fn a_job_in_which_a_worker_failed_is_incomplete() {
    let (bench, api) = bench(900, 900).await;
    api.change(|call| if call.key.ends_with('3') { Reply::html(200) } else { quick(call) });
    bench.configure(&bench.config(&api).key_api("max_attempts = 1"));
    // Slow enough for all of them to get a share.
    let run = bench.run("backfill --tps 300 --chunk 50 --workers 3").await.expect_exit(1);
    assert_eq!(run.number("/documents/failed"), 90, "{}", run.stdout);
    let job = bench.job(run.text("/job")).await.expect("a job");
    assert_eq!(job.get_str("state").ok(), Some("incomplete"), "{job}");
    let documents = job.get_document("documents").expect("counts");
    assert_eq!(documents.get_i64("failed").ok(), Some(90), "{documents}");
    let by = documents.get_document("failed_by").expect("reasons");
    assert_eq!(by.get_i64("invalid").ok(), Some(90), "{documents}");
    api.change(quick);
    let again = bench.run("backfill --tps 1000").await.expect_exit(0);
    let job = bench.job(again.text("/job")).await.expect("a job");
    assert_eq!(job.get_str("state").ok(), Some("completed"));
}

/// Who has joined goes on calling at the moments that it has reserved.
#[tokio::test]
async fn timing_a_runner_that_is_started_again_beside_who_joined_keeps_the_ceiling() {
    let (bench, api) = bench(2400, 2400).await;
    let runner = bench.program("backfill --tps 200 --chunk 50").spawn();
    wait_for("calls of the runner", async || api.count() > 20).await;
    let joined = bench.program("backfill --tps 200 --chunk 50 --workers 3 --join").spawn();
    wait_for("calls of all", async || api.count() > 500).await;
    runner.kill();
    let again = bench.program("backfill --tps 200 --chunk 50").spawn();
    // What is reserved is never handed out again.
    let name = format!("backfill-{}", bench.namespace("docs"));
    let (mut reserved, begun) = (0.0, Instant::now());
    while begun.elapsed() < Duration::from_secs(3) {
        let job = bench.job(&name).await.expect("a job");
        let next = job.get_document("budget").and_then(|budget| budget.get_f64("next")).expect("a timetable");
        assert!(next >= reserved, "{next} after {reserved}");
        reserved = next;
    }
    let again = again.finish().await.expect_exit(0);
    joined.finish().await.expect_exit(0);
    expect_all_settled(&bench, 2400, 2400).await;
    assert_eq!(again.number("/documents/candidates_left"), 0);
    expect_ceiling_of(200, &api, &api.calls());
}

#[tokio::test]
async fn a_killed_worker_loses_its_share_to_the_others() {
    let (bench, api) = bench(3000, 3000).await;
    let runner = bench.program("backfill --tps 150 --chunk 50").spawn();
    wait_for("calls of the runner", async || api.count() > 20).await;
    let joined = bench.program("backfill --tps 150 --chunk 50 --join").spawn();
    let job = format!("backfill-{}", bench.namespace("docs"));
    wait_for("shares of the one who joined", async || {
        let job = bench.job(&job).await.expect("a job");
        let owners = job.get_document("buckets").cloned().unwrap_or_default();
        owners.values().filter(|owner| owner.as_str().is_some_and(|owner| owner.starts_with('w'))).count()
            > 20
    })
    .await;
    let before = api.count();
    wait_for("further calls", async || api.count() > before + 100).await;
    joined.kill();
    runner.finish().await.expect_exit(0);
    expect_all_settled(&bench, 3000, 3000).await;
    let repeated = api.count() - 3000;
    assert!(repeated <= 512, "{repeated} calls were repeated");
    let most = api.asked().into_values().max().expect("calls");
    assert!(most <= 2, "a key was asked for {most} times");
}

#[tokio::test]
async fn a_killed_runner_leaves_the_job_to_who_joined() {
    let (bench, api) = bench(2000, 2000).await;
    let runner = bench.program("backfill --tps 200 --chunk 50").spawn();
    wait_for("calls of the runner", async || api.count() > 20).await;
    let joined = bench.program("backfill --tps 200 --chunk 50 --join").spawn();
    wait_for("calls of both", async || api.count() > 500).await;
    runner.kill();
    joined.finish().await.expect_exit(0);
    expect_all_settled(&bench, 2000, 2000).await;
    assert!(api.asked().into_values().all(|times| times <= 2));
}

/// Puts one of two to sleep until its share is taken; the other does everything.
async fn slept_through_its_lease(is_runner: bool) {
    let (bench, api) = bench(2400, 2400).await;
    let runner = bench.program("backfill --tps 120 --chunk 50").spawn();
    wait_for("calls of the runner", async || api.count() > 20).await;
    let joined = bench.program("backfill --tps 120 --chunk 50 --join").spawn();
    wait_for("calls of both", async || api.count() > 700).await;
    let (asleep, awake, prefix) = if is_runner { (runner, joined, 'r') } else { (joined, runner, 'w') };
    asleep.signal(Signal::Stop);
    let name = format!("backfill-{}", bench.namespace("docs"));
    wait_for("its share with the other", async || {
        let job = bench.job(&name).await.expect("a job");
        let owners = job.get_document("buckets").cloned().unwrap_or_default();
        owners.values().all(|owner| owner.as_str().is_some_and(|owner| !owner.starts_with(prefix)))
    })
    .await;
    asleep.signal(Signal::Continue);
    let ended = asleep.finish().await.expect_exit(4);
    assert!(ended.text("/error/message").contains("lease"), "{}", ended.stdout);
    awake.finish().await.expect_exit(0);
    expect_all_settled(&bench, 2400, 2400).await;
    assert!(api.asked().into_values().all(|times| times <= 2));
    let job = bench.job(&name).await.expect("a job");
    assert_eq!(job.get_str("state").ok(), Some("completed"), "{job}");
}

#[tokio::test]
async fn a_worker_that_slept_through_its_lease_stops_before_it_writes() {
    slept_through_its_lease(false).await;
}

#[tokio::test]
async fn a_runner_that_slept_through_its_lease_stops_before_it_writes() {
    slept_through_its_lease(true).await;
}

#[tokio::test]
async fn a_worker_that_is_interrupted_hands_its_share_over() {
    let (bench, api) = bench(1500, 1500).await;
    let runner = bench.program("backfill --tps 150 --chunk 50").spawn();
    wait_for("calls of the runner", async || api.count() > 20).await;
    let joined = bench.program("backfill --tps 150 --chunk 50 --join").spawn();
    wait_for("calls of both", async || api.count() > 600).await;
    joined.signal(Signal::Terminate);
    joined.finish().await.expect_exit(143);
    runner.finish().await.expect_exit(0);
    expect_all_settled(&bench, 1500, 1500).await;
    assert_eq!(api.count(), 1500, "nothing was under way twice");
}

#[tokio::test]
async fn what_only_one_worker_can_do_is_refused_for_several() {
    let (bench, _api) = bench(1, 1).await;
    for arguments in ["--workers 0", "--workers 99", "--workers 2 --limit 5", "--join --canary 1 --yes"] {
        bench.run(&format!("backfill {arguments}")).await.expect_exit(2);
    }
}
