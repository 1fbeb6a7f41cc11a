//! `max_calls_per_day`: over all starts of a day together.

use std::time::{Duration, Instant};

use crate::config::Config;
use crate::harness::{Bench, wait_for};
use crate::key_api::KeyApi;
use crate::program::{Running, Signal};

/// A zone where it is about noon: no midnight comes in the middle of a test.
fn zone_at_noon() -> String {
    let hour = (jiff::Timestamp::now().as_second() / 3600) % 24;
    // The sign of these names is that of the way back to UTC.
    format!("Etc/GMT{:+}", hour - 12)
}

fn config(bench: &Bench, api: &KeyApi, limit: usize) -> Config {
    bench
        .config(api)
        .backfill(&format!("max_calls_per_day = {limit}"))
        .backfill(&format!("time_zone = '{}'", zone_at_noon()))
}

async fn bench(limit: usize) -> (Bench, KeyApi) {
    let bench = Bench::with_docs(100).await;
    let api = KeyApi::finding();
    bench.configure(&config(&bench, &api, limit));
    (bench, api)
}

/// Waits until the run has nothing left of the day, then sees to it that it makes no further call.
async fn until_used_up(bench: &Bench, api: &KeyApi, calls: usize) {
    wait_for("the daily limit", async || bench.limited_by("j").await == "daily limit").await;
    assert_eq!(api.count(), calls);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(api.count(), calls, "a call beyond the limit");
}

async fn terminate(run: Running) {
    let asked = Instant::now();
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
}

#[tokio::test]
async fn a_day_has_so_many_calls_however_often_the_job_is_started() {
    let (bench, api) = bench(30).await;
    let run = bench.program("backfill --job j --tps 200").spawn();
    until_used_up(&bench, &api, 30).await;
    assert_eq!(bench.filled().await, 30);
    wait_for("the day to be named", async || run.stderr().contains("calls again at")).await;
    assert!(run.stderr().contains("limited by daily limit"), "{}", run.stderr());
    terminate(run).await;

    let run = bench.program("backfill --job j --tps 200").spawn();
    until_used_up(&bench, &api, 30).await;
    terminate(run).await;

    bench.configure(&config(&bench, &api, 60));
    let run = bench.program("backfill --job j --tps 200").spawn();
    until_used_up(&bench, &api, 60).await;
    terminate(run).await;

    // Enough for the rest: the run comes to its end.
    bench.configure(&config(&bench, &api, 100));
    bench.run("backfill --job j --tps 200").await.expect_exit(0);
    assert_eq!((api.count(), bench.filled().await), (100, 100));
}

#[tokio::test]
async fn a_kill_forgets_no_call_of_the_day() {
    let (bench, api) = bench(40).await;
    for calls in [5, 10] {
        let run = bench.program("backfill --job j --tps 5").spawn();
        wait_for("calls", async || api.count() >= calls).await;
        run.kill();
    }
    let run = bench.program("backfill --job j --tps 5").spawn();
    wait_for("the daily limit", async || bench.limited_by("j").await == "daily limit" || api.count() > 40)
        .await;
    run.kill();
    assert!(api.count() <= 40, "{} calls", api.count());
}

#[tokio::test]
async fn after_a_kill_a_higher_limit_leaves_what_was_not_called() {
    let (bench, api) = bench(10).await;
    let run = bench.program("backfill --job j --tps 200").spawn();
    until_used_up(&bench, &api, 10).await;
    run.kill();
    // Ten calls were made today, and no more could have been.
    bench.configure(&config(&bench, &api, 60));
    let run = bench.program("backfill --job j --tps 200").spawn();
    until_used_up(&bench, &api, 60).await;
    terminate(run).await;
}

#[tokio::test]
async fn several_workers_can_not_share_a_day() {
    let (bench, api) = bench(30).await;
    for several in ["--workers 2", "--join"] {
        bench.run(&format!("backfill {several}")).await.expect_exit(2);
    }
    assert_eq!(api.count(), 0);
    assert!(!bench.has_state().await);
}
