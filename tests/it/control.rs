//! Live control: what is asked for from another process holds within two seconds.

use std::time::{Duration, Instant};

use bson::{Bson, Document, doc};

use crate::harness::{Bench, wait_for};
use crate::key_api::KeyApi;
use crate::program::Running;

/// From the request to its effect.
const IN_TIME: Duration = Duration::from_secs(2);

async fn started(documents: i32, arguments: &str) -> (Bench, KeyApi, Running) {
    let bench = Bench::with_docs(documents).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.program(&format!("backfill --job j {arguments}")).spawn();
    wait_for("calls", async || api.count() > 5).await;
    (bench, api, run)
}

async fn audit(bench: &Bench) -> Vec<Document> {
    let job = bench.job("j").await.expect("a job");
    let entries = job.get_array("audit").cloned().unwrap_or_default();
    entries.into_iter().filter_map(|entry| entry.as_document().cloned()).collect()
}

#[tokio::test]
async fn a_pause_stops_all_calls_and_a_resume_lets_them_go_on() {
    let (bench, api, run) = started(400, "--tps 50").await;
    bench.run("control j pause").await.expect_exit(0);
    tokio::time::sleep(IN_TIME).await;
    let paused = api.count();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(api.count(), paused, "calls during the pause");
    let status = bench.run("status j").await.expect_exit(0);
    assert_eq!(status.text("/jobs/0/limited_by"), "paused");
    bench.run("control j resume").await.expect_exit(0);
    let asked = Instant::now();
    wait_for("calls after the pause", async || api.count() > paused).await;
    assert!(asked.elapsed() < IN_TIME, "{:?}", asked.elapsed());
    run.finish().await.expect_exit(0);
    let entries = audit(&bench).await;
    let told: Vec<_> =
        entries.iter().map(|entry| (entry.get_str("what").ok(), entry.get_bool("to").ok())).collect();
    assert_eq!(told, [(Some("paused"), Some(true)), (Some("paused"), Some(false))]);
    assert!(entries.iter().all(|entry| entry.get_datetime("at").is_ok()), "{entries:?}");
    assert!(
        entries.iter().all(|entry| entry.get_str("who").is_ok_and(|who| who.contains('@'))),
        "{entries:?}"
    );
}

#[tokio::test]
async fn a_pause_outlives_a_restart() {
    let (bench, api, run) = started(200, "--tps 20").await;
    bench.run("control j pause").await.expect_exit(0);
    tokio::time::sleep(IN_TIME).await;
    run.kill();
    let before = api.count();
    let again = bench.program("backfill --job j --tps 100").spawn();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(api.count(), before, "calls in spite of the pause");
    bench.run("control j resume").await.expect_exit(0);
    again.finish().await.expect_exit(0);
    assert_eq!(bench.filled().await, 200);
}

#[tokio::test]
async fn another_rate_holds_at_once_and_is_written_down() {
    let (bench, api, run) = started(300, "--tps 2").await;
    let set = bench.run("control j set tps=200 chunk=50 concurrency=8").await.expect_exit(0);
    let change = &set.json["changes"][0];
    assert_eq!((change["from"].as_f64(), change["to"].as_f64()), (Some(2.0), Some(200.0)));
    let asked = Instant::now();
    wait_for("a faster rate", async || api.count() > 40).await;
    assert!(asked.elapsed() < IN_TIME + Duration::from_secs(1), "{:?}", asked.elapsed());
    run.finish().await.expect_exit(0);
    assert!(api.most_in_flight() <= 10);
    let what: Vec<_> = audit(&bench).await.iter().map(|entry| entry.get("what").cloned()).collect();
    assert_eq!(what, ["tps", "chunk", "concurrency"].map(|what| Some(Bson::from(what))));
}

/// The job still shows the ceiling of the run before when the next one begins.
#[tokio::test]
async fn a_lower_rate_of_the_next_run_holds_from_its_first_call_on() {
    let bench = Bench::with_docs(20).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.run("backfill --job j --tps 100000").await.expect_exit(0);
    bench.insert((1_000..1_100).map(|id| doc! {"_id": id, "legacyKey": format!("more{id}")})).await;
    let before = api.count();
    let run = bench.program("backfill --job j --tps 2").spawn();
    wait_for("a call", async || api.count() > before).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let calls = api.count() - before;
    assert!(calls <= 7, "{calls} calls within little more than two seconds at 2 TPS");
    run.kill();
}

#[tokio::test]
async fn a_setting_holds_over_a_restart_until_another_one_is_given() {
    let (bench, api, run) = started(400, "--tps 50").await;
    bench.run("control j set tps=1").await.expect_exit(0);
    tokio::time::sleep(IN_TIME).await;
    run.kill();
    // Started as before: who set the rate meant this job.
    let again = bench.program("backfill --job j --tps 50").spawn();
    let before = api.count();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(api.count() - before <= 6, "{} calls in five seconds", api.count() - before);
    again.kill();
    // Started with another rate: who starts knows better.
    bench.run("backfill --job j --tps 400").await.expect_exit(0);
    assert_eq!(bench.filled().await, 400);
}

#[tokio::test]
async fn a_stop_saves_everything_and_does_not_hold_for_the_next_run() {
    let (bench, api, run) = started(300, "--tps 50").await;
    bench.run("control j stop").await.expect_exit(0);
    let asked = Instant::now();
    let ended = run.finish().await.expect_exit(143);
    assert!(asked.elapsed() < IN_TIME + Duration::from_secs(1), "{:?}", asked.elapsed());
    assert_eq!(ended.text("/status"), "interrupted");
    assert_eq!(bench.filled().await, u64::try_from(api.count()).expect("small"));
    bench.run("backfill --job j --tps 1000").await.expect_exit(0);
    assert_eq!((bench.filled().await, api.count()), (300, 300));
}

#[tokio::test]
async fn a_stop_ends_all_workers_of_a_job() {
    let (bench, api, run) = started(600, "--tps 60 --workers 3").await;
    let joined = bench.program("backfill --job j --tps 60 --join").spawn();
    wait_for("calls of all", async || api.count() > 150).await;
    bench.run("control j stop").await.expect_exit(0);
    let asked = Instant::now();
    for run in [run, joined] {
        let ended = run.finish().await.expect_exit(143);
        assert_eq!(ended.text("/status"), "interrupted");
    }
    assert!(asked.elapsed() < IN_TIME + Duration::from_secs(1), "{:?}", asked.elapsed());
    let called = api.count();
    assert!(called < 600);
    assert_eq!(bench.filled().await, u64::try_from(called).expect("small"), "an answer was lost");
    let job = bench.job("j").await.expect("a job");
    assert_eq!(job.get_str("state").ok(), Some("interrupted"));
    assert!(job.get_document("workers").is_ok_and(Document::is_empty), "{job}");
    bench.run("backfill --job j --tps 1000 --workers 3").await.expect_exit(0);
    assert_eq!((bench.filled().await, api.count()), (600, 600));
}

#[tokio::test]
async fn what_makes_no_sense_is_refused() {
    let bench = Bench::with_docs(5).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.run("control j pause").await.expect_exit(3);
    bench.run("backfill --job j --tps 100").await.expect_exit(0);
    bench.run("control j set tps=5").await.expect_exit(3);
    bench.run("control j stop").await.expect_exit(3);
    for nonsense in ["set tps=0", "set tps=fast", "set speed=5", "set chunk=0", "set", "hurry"] {
        bench.run(&format!("control j {nonsense}")).await.expect_exit(2);
    }
}
