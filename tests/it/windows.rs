//! Times of day at which calls may be made.

use std::time::{Duration, Instant};

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::harness::{Bench, wait_for};
use crate::key_api::KeyApi;
use crate::program::Signal;

/// The time of day in UTC, `minutes` from now, without its seconds.
fn minutes_from_now(minutes: i64) -> String {
    let at = Timestamp::now() + SignedDuration::from_mins(minutes);
    at.to_zoned(TimeZone::UTC).strftime("%H:%M").to_string()
}

/// Milliseconds until the next full minute.
fn until_full_minute() -> i64 {
    60_000 - Timestamp::now().as_millisecond() % 60_000
}

async fn bench(lines: &[&str]) -> (Bench, KeyApi) {
    let bench = Bench::with_docs(400).await;
    let api = KeyApi::finding();
    bench.configure(&lines.iter().fold(bench.config(&api), |config, line| config.key_api(line)));
    (bench, api)
}

#[tokio::test]
async fn while_no_window_is_open_no_call_is_made_and_the_opening_is_told() {
    let (bench, api) = bench(&[]).await;
    let (from, to) = (minutes_from_now(120), minutes_from_now(180));
    let line = format!("windows = ['{from}-{to}']");
    bench.configure(&bench.config(&api).backfill(&line));
    let run = bench.program("backfill --job j --tps 100").spawn();
    wait_for("the wait", async || bench.limited_by("j").await == "window").await;
    wait_for("the opening to be told", async || run.stderr().contains("calls again at")).await;
    let told = run.stderr();
    assert!(told.contains("limited by window") && told.contains(&format!("T{from}:00")), "{told}");
    assert_eq!((api.count(), bench.filled().await), (0, 0));
    let asked = Instant::now();
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert_eq!(api.count(), 0);
    // Options override the config.
    let open = format!("--window {}-{}", minutes_from_now(-60), minutes_from_now(60));
    bench.run(&format!("backfill --job j --tps 1000 {open}")).await.expect_exit(0);
    assert_eq!(api.count(), 400);
}

/// A call may take as long as its timeout, so that calls stop as long before the end of the window.
#[tokio::test]
async fn timing_no_call_leaves_that_might_outlast_its_window() {
    let (bench, api) = bench(&[]).await;
    // The last call leaves in six seconds, the window ends after that.
    let minutes = if until_full_minute() > 20_000 { 1 } else { 2 };
    let end = Instant::now()
        + Duration::from_millis(u64::try_from(until_full_minute() + 60_000 * (minutes - 1)).expect("small"));
    let window = format!("{}-{}", minutes_from_now(-60), minutes_from_now(minutes));
    let last = Instant::now() + Duration::from_secs(6);
    let timeout = (end - last).as_millis();
    bench.configure(&bench.config(&api).key_api(&format!("timeout = '{timeout}ms'")));
    let run = bench.program(&format!("backfill --job j --tps 20 --chunk 50 --window {window}")).spawn();
    wait_for("the end of the calls", async || bench.limited_by("j").await == "window").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let calls = api.calls();
    let latest = calls.last().expect("calls while it was open").at;
    assert!(latest <= last + Duration::from_millis(20), "{:?} too late", latest - last);
    assert!(latest + Duration::from_millis(300) > last, "{:?} too early", last - latest);
    assert!(calls.len() > 60, "{} calls", calls.len());
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
    assert_eq!(bench.filled().await, u64::try_from(calls.len()).expect("small"));
}

#[tokio::test]
async fn when_a_window_opens_calls_leave() {
    let (bench, api) = bench(&[]).await;
    let opens = Instant::now() + Duration::from_millis(u64::try_from(until_full_minute()).expect("small"));
    let window = format!("{}-{}", minutes_from_now(1), minutes_from_now(61));
    let run = bench.program(&format!("backfill --tps 400 --window {window}")).spawn().finish().await;
    run.expect_exit(0);
    let first = api.calls()[0].at;
    assert!(first + Duration::from_millis(5) > opens, "{:?} too early", opens - first);
    assert!(first < opens + Duration::from_secs(2), "{:?} too late", first - opens);
    assert_eq!((api.count(), bench.filled().await), (400, 400));
}

#[tokio::test]
async fn windows_that_are_shorter_than_a_call_are_refused() {
    let (bench, api) = bench(&["timeout = '90s'"]).await;
    bench.run("backfill --window 01:00-01:01").await.expect_exit(2);
    bench.run("backfill --window 01:00-01:01 --window 05:00-05:01").await.expect_exit(2);
    bench.run("backfill --window 1am-2am").await.expect_exit(2);
    bench.run("backfill --time-zone Mars/Olympus").await.expect_exit(2);
    assert_eq!(api.count(), 0);
    assert!(!bench.has_state().await);
}
