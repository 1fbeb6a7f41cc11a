//! An API that gets slow is called less, and as before once it is quick again.

use std::time::{Duration, Instant};

use crate::harness::{Bench, wait_for};
use crate::key_api::{Call, KeyApi, Reply};
use crate::pacing::expect_ceiling_of;

const TPS: usize = 100;
/// Clearly above the limit of 200 ms.
const SLOW: Duration = Duration::from_millis(320);

/// The calls of each second from a moment on.
fn per_second(calls: &[Call], from: Instant, seconds: usize) -> Vec<usize> {
    let mut counts = vec![0; seconds];
    for call in calls.iter().filter(|call| call.at >= from) {
        let second = usize::try_from((call.at - from).as_secs()).expect("small");
        if let Some(count) = counts.get_mut(second) {
            *count += 1;
        }
    }
    counts
}

#[tokio::test]
async fn timing_a_slow_api_is_called_less_until_it_is_quick_again() {
    let bench = Bench::with_docs(1400).await;
    let api = KeyApi::start(|call| Reply::found(call).after(SLOW));
    bench.configure(&bench.config(&api).backfill("max_api_latency = '200ms'"));
    let run = bench.program("backfill --job j --tps 100 --chunk 200").spawn();
    wait_for("the first call", async || api.count() > 0).await;
    let begun = api.calls()[0].at;
    tokio::time::sleep(Duration::from_secs(9)).await;
    let limited = bench.limited_by("j").await;
    api.change(Reply::found);
    let mended = Instant::now();
    let run = run.finish().await.expect_exit(0);
    run.expect_documents(&[("candidates", 1400), ("filled", 1400)]);
    run.expect_calls(1400);
    let slow = per_second(&api.calls(), begun, 8);
    let all: usize = slow[3..].iter().sum();
    assert!(all < TPS * 5 * 7 / 10, "calls of each second while it was slow: {slow:?}");
    assert!(all > TPS * 5 / 20, "the job all but stopped: {slow:?}");
    assert_eq!(limited, "api latency");
    let seconds = run.json["limited_by_seconds"]["api latency"].as_f64().expect("a figure");
    assert!(seconds > 3.0, "{}", run.json["limited_by_seconds"]);
    // Step by step, after what was seen while it was slow is out of sight.
    let quick = per_second(&api.calls(), mended, 18);
    assert!(quick.iter().any(|count| *count >= TPS * 95 / 100), "calls of each second after: {quick:?}");
    expect_ceiling_of(TPS, &api, &api.calls());
}

/// The rate that the tool is made for: few calls, whose slowness counts all the same.
#[tokio::test]
async fn timing_a_slow_api_is_called_less_at_a_low_rate_too() {
    let bench = Bench::with_docs(400).await;
    let api = KeyApi::start(|call| Reply::found(call).after(SLOW));
    bench.configure(&bench.config(&api).backfill("max_api_latency = '200ms'"));
    let run = bench.program("backfill --job j --tps 20 --chunk 200").spawn();
    wait_for("the first call", async || api.count() > 0).await;
    let begun = api.calls()[0].at;
    tokio::time::sleep(Duration::from_secs(14)).await;
    let counts = per_second(&api.calls(), begun, 14);
    drop(run);
    // Slowness shows after a hundred calls.
    let late: usize = counts[7..].iter().sum();
    assert!(late < 20 * 7 * 7 / 10, "calls of each second: {counts:?}");
}
