//! The ceiling of calls, as the API sees it. Nothing runs beside these tests.

use std::time::{Duration, Instant};

use bson::doc;

use crate::harness::{Bench, wait_for};
use crate::key_api::{Call, KeyApi, Reply};
use crate::program::{Running, Signal};

const TPS: usize = 50;
const MEASURED: Duration = Duration::from_secs(10);
/// Calls that waited for the end of a stall arrive right after it.
const AFTER_A_STALL: Duration = Duration::from_millis(2);
const COMMAND: &str = "backfill --tps 50 --chunk 30";

/// The ceiling as documented: in any window of a second or more, ceil(w * tps) + max(1, tps / 100).
///
/// A window at whose end or beginning the machine was too busy to tell when a call arrived tells
/// nothing; there may be few of those.
fn expect_ceiling(api: &KeyApi, calls: &[Call]) {
    expect_ceiling_of(TPS, api, calls);
}

pub fn expect_ceiling_of(tps: usize, api: &KeyApi, calls: &[Call]) {
    let stalls = api.stalls();
    let is_stalled = |at: Instant| stalls.iter().any(|(from, to)| *from <= at && at <= *to + AFTER_A_STALL);
    for seconds in [1, 2, 5] {
        let ceiling = usize::try_from(seconds).expect("small") * tps + (tps / 100).max(1);
        let (mut told, mut silent) = (0, 0);
        for window in calls.windows(ceiling + 1) {
            if is_stalled(window[0].at) || is_stalled(window[ceiling].at) {
                silent += 1;
                continue;
            }
            told += 1;
            let span = window[ceiling].at - window[0].at;
            let gaps = || -> Vec<_> {
                window.windows(2).map(|pair| (pair[1].at - pair[0].at).as_millis()).collect()
            };
            assert!(
                span > Duration::from_secs(seconds),
                "{} calls within {span:?} from call {}; milliseconds between them: {:?}",
                ceiling + 1,
                window[0].number,
                gaps()
            );
        }
        assert!(silent <= told / 2, "this machine is too busy for a measurement: {silent} of {told} windows");
    }
}

/// Runs for as long as is measured, then ends the program.
async fn measure(bench: &Bench, api: &KeyApi) -> Vec<Call> {
    let run = bench.program(COMMAND).spawn();
    wait_for("the first call", async || api.count() > 0).await;
    let end = api.calls()[0].at + MEASURED;
    wait_for("the end of the measurement", async || Instant::now() > end).await;
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
    api.calls().into_iter().filter(|call| call.at <= end).collect()
}

fn slow(call: &Call) -> Reply {
    Reply::found(call).after(Duration::from_millis(300))
}

#[tokio::test]
async fn timing_a_slow_api_is_called_at_the_ceiling_and_never_above() {
    let bench = Bench::with_docs(700).await;
    let api = KeyApi::start(slow);
    bench.configure(&bench.config(&api));
    let calls = measure(&bench, &api).await;
    assert!(calls.len() >= 495, "{} calls in ten seconds", calls.len());
    expect_ceiling(&api, &calls);
}

#[tokio::test]
async fn timing_outliers_do_not_lower_the_rate() {
    let bench = Bench::with_docs(700).await;
    let api = KeyApi::start(|call| {
        let outlier = call.number % 10 == 3;
        Reply::found(call).after(Duration::from_millis(if outlier { 2000 } else { 300 }))
    });
    bench.configure(&bench.config(&api));
    let calls = measure(&bench, &api).await;
    assert!(calls.len() >= 495, "{} calls in ten seconds", calls.len());
    expect_ceiling(&api, &calls);
}

#[tokio::test]
async fn timing_answers_from_many_documents_do_not_lower_the_rate() {
    let bench = Bench::new().await;
    // Many chunks without a call between those that need one.
    bench.insert((0..7000).map(|id| doc! {"_id": id, "legacyKey": format!("K{}", id / 10)})).await;
    bench.create_index().await;
    let api = KeyApi::start(slow);
    bench.configure(&bench.config(&api));
    let calls = measure(&bench, &api).await;
    assert!(calls.len() >= 495, "{} calls in ten seconds", calls.len());
    expect_ceiling(&api, &calls);
}

async fn restarted(end: impl AsyncFn(Running)) {
    let bench = Bench::with_docs(260).await;
    let api = KeyApi::start(slow);
    bench.configure(&bench.config(&api));
    let first = bench.program(COMMAND).spawn();
    wait_for("calls", async || api.count() >= 120).await;
    end(first).await;
    let before = api.count();
    bench.run(COMMAND).await.expect_exit(0);
    assert_eq!(bench.filled().await, 260);
    assert!(api.count() > before, "the second run called too");
    expect_ceiling(&api, &api.calls());
}

#[tokio::test]
async fn timing_the_ceiling_holds_over_a_termination_and_restart() {
    restarted(async |run| {
        run.signal(Signal::Terminate);
        run.finish().await.expect_exit(143);
    })
    .await;
}

#[tokio::test]
async fn timing_the_ceiling_holds_over_a_kill_and_restart() {
    restarted(async |run| run.kill()).await;
}

#[tokio::test]
async fn timing_retries_count_against_the_ceiling() {
    let bench = Bench::with_docs(100).await;
    let api = KeyApi::start(|call| if call.attempt < 2 { Reply::empty(503) } else { Reply::found(call) });
    bench.configure(&bench.config(&api));
    let run = bench.run(COMMAND).await.expect_exit(0);
    run.expect_calls(300);
    assert_eq!(run.number("/api/retries"), 200);
    expect_ceiling(&api, &api.calls());
}

#[tokio::test]
async fn timing_a_fraction_of_a_call_per_second() {
    let bench = Bench::with_docs(4).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.run("backfill --tps 0.5").await.expect_exit(0);
    let calls = api.calls();
    let span = calls[3].at - calls[0].at;
    assert!((5.0..7.5).contains(&span.as_secs_f64()), "four calls within {span:?}");
}

/// Every call after the first waits as long as the first answer says.
async fn paused_by(retry_after: impl Fn() -> String + Send + Sync + 'static, at_least: f64) {
    let bench = Bench::with_docs(30).await;
    let api = KeyApi::start(move |call| match call.number {
        0 => Reply::empty(429).header("retry-after", retry_after()),
        _ => Reply::found(call),
    });
    bench.configure(&bench.config(&api));
    // One at a time, so that no call is under way when the answer comes.
    let run = bench.run("backfill --tps 100 --concurrency 1").await.expect_exit(0);
    assert_eq!(run.number("/documents/filled"), 30);
    let calls = api.calls();
    let pause = (calls[1].at - calls[0].at).as_secs_f64();
    assert!((at_least..at_least + 3.0).contains(&pause), "a pause of {pause} s");
}

#[tokio::test]
async fn timing_retry_after_in_seconds_stops_all_calls() {
    paused_by(|| "2".into(), 2.0).await;
}

#[tokio::test]
async fn timing_retry_after_as_a_date_stops_all_calls() {
    // A date has whole seconds, hence up to one second less.
    let date = || {
        let at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(3);
        jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&at).expect("a date")
    };
    paused_by(date, 1.9).await;
}

/// How long each of the three runs of [`matrix`] is measured.
const SEGMENT: Duration = Duration::from_secs(6);
/// Where the processors are idle for less than this share, the machine is the limit, not the pacer.
pub const ENOUGH_IDLE: f64 = 0.2;

/// 300 ms, one call of a hundred takes two seconds, two of a hundred have to be made again.
fn uneven(call: &Call) -> Reply {
    let latency = Duration::from_millis(if call.number % 100 == 3 { 2000 } else { 300 });
    let reply = if call.number % 50 == 7 { Reply::empty(500) } else { Reply::found(call) };
    reply.after(latency)
}

/// One run, from its first call on for [`SEGMENT`].
struct Segment {
    calls: Vec<Call>,
    /// The share of this machine's time that nobody used meanwhile.
    idle: f64,
}

async fn segment(bench: &Bench, api: &KeyApi, tps: usize, end: impl AsyncFn(Running)) -> Segment {
    let before = api.count();
    let run = bench.program(&format!("backfill --tps {tps}")).spawn();
    wait_for("the first call", async || api.count() > before).await;
    let until = api.calls()[before].at + SEGMENT;
    let (idle, total) = processor_time();
    tokio::time::sleep_until(until.into()).await;
    let (idle_then, total_then) = processor_time();
    end(run).await;
    let calls = api.calls().into_iter().skip(before).filter(|call| call.at <= until).collect();
    Segment { calls, idle: (idle_then - idle) / (total_then - total) }
}

/// How long the processors of this machine were idle since its start, and how long in all.
pub fn processor_time() -> (f64, f64) {
    let text = std::fs::read_to_string("/proc/stat").expect("the times of the processors");
    let line = text.lines().next().expect("their sum");
    let times: Vec<f64> =
        line.split_whitespace().skip(1).take(8).map(|time| time.parse().expect("a number")).collect();
    // Idle, and idle but for the disk.
    (times[3] + times[4], times.iter().sum())
}

/// The share of the allowed calls that was used, and the longest gaps in milliseconds with when
/// they began.
fn usage(tps: usize, calls: &[Call]) -> (f64, Vec<(u128, u128)>) {
    let (first, last) = (calls[0].at, calls[calls.len() - 1].at);
    let number = |count: usize| f64::from(u32::try_from(count).expect("small"));
    let mut gaps: Vec<_> = calls
        .windows(2)
        .map(|pair| ((pair[1].at - pair[0].at).as_millis(), (pair[0].at - first).as_millis()))
        .collect();
    gaps.sort_unstable_by(|one, other| other.cmp(one));
    gaps.truncate(10);
    // The last interval is not over when the last call leaves.
    (number(calls.len()) / (last - first).as_secs_f64() / number(tps), gaps)
}

/// A run that is interrupted, one that is killed, and one that takes over from it.
async fn matrix(tps: usize) {
    let documents = tps * 3 * (usize::try_from(SEGMENT.as_secs()).expect("small") + 2) + 20;
    let bench = Bench::with_docs(i32::try_from(documents).expect("small")).await;
    let api = KeyApi::start(uneven);
    bench.configure(&bench.config(&api));
    let stopped = async |run: Running, signal, exit| {
        run.signal(signal);
        run.finish().await.expect_exit(exit);
    };
    let segments = [
        segment(&bench, &api, tps, async |run| stopped(run, Signal::Interrupt, 130).await).await,
        segment(&bench, &api, tps, async |run| run.kill()).await,
        segment(&bench, &api, tps, async |run| stopped(run, Signal::Terminate, 143).await).await,
    ];
    assert!(bench.filled().await < u64::try_from(documents).expect("small"), "there was work to the end");
    let used = segments.map(|segment| (usage(tps, &segment.calls), segment.idle));
    for ((share, gaps), idle) in &used {
        let least = if *idle > ENOUGH_IDLE { 0.99 } else { 0.5 };
        assert!(*share >= least, "{share} used at {tps} TPS, idle {idle}; longest gaps, and when: {gaps:?}");
    }
    expect_ceiling_of(tps, &api, &api.calls());
}

#[tokio::test]
async fn timing_the_ceiling_of_one_and_of_ten_calls_a_second() {
    tokio::join!(matrix(1), matrix(10));
}

#[tokio::test]
async fn timing_alone_the_ceiling_of_two_hundred_calls_a_second() {
    matrix(200).await;
}

#[tokio::test]
async fn timing_alone_the_ceiling_of_a_thousand_calls_a_second() {
    matrix(1000).await;
}
