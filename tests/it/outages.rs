//! A key API that is away, overloaded or broken for a while, or for some keys for ever.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bson::doc;
use tokio::task::{JoinSet, LocalSet};

use crate::fail_points::{fail, named_uri};
use crate::harness::{Bench, wait_for};
use crate::key_api::{Call, KeyApi, Reply};
use crate::program::Finished;

const OUTAGE: Duration = Duration::from_secs(20);
const DOCUMENTS: i32 = 400;
const ALL: u64 = 400;
/// A run of failures, what is in flight when it is noticed, and a probe every few seconds.
const CALLS_IN_AN_OUTAGE: u64 = 60;
/// Probes leave at most ten seconds apart.
const NOTICED_AGAIN: Duration = Duration::from_secs(12);
const COMMAND: &str = "backfill --tps 100 --chunk 100 --concurrency 16";

/// What the API does in an outage.
#[derive(Debug, Clone, Copy)]
enum Outage {
    Refuses,
    Answers(fn() -> Reply, &'static str),
}

/// An outage after so many calls costs calls and time, but no document.
async fn ride_out(outage: Outage, after: usize) {
    let bench = Bench::with_docs(DOCUMENTS).await;
    let api = KeyApi::start(Reply::found);
    bench.configure(&bench.config(&api).key_api("timeout = '1s'"));
    let begin = || match outage {
        Outage::Refuses => api.go_down(),
        Outage::Answers(reply, _) => api.change(move |_| reply()),
    };
    if after == 0 {
        begin();
    }
    let run = bench.program(COMMAND).spawn();
    wait_for("calls before the outage", async || api.count() >= after).await;
    if after > 0 {
        begin();
    }
    let before = api.count();
    tokio::time::sleep(OUTAGE).await;
    let during = api.count() - before;
    match outage {
        Outage::Refuses => api.come_back(),
        Outage::Answers(..) => api.change(Reply::found),
    }
    let (mended, count) = (Instant::now(), api.count());
    wait_for("the first call after the outage", async || api.count() > count).await;
    let noticed = mended.elapsed();
    let run = run.finish().await.expect_exit(0);

    run.expect_documents(&[("candidates", ALL), ("filled", ALL)]);
    assert_eq!(bench.filled().await, ALL);
    let failed = expect_outcomes(&api, &run, outage);
    assert!(noticed < NOTICED_AGAIN, "{noticed:?} until the API was called again");
    assert!(failed < CALLS_IN_AN_OUTAGE, "{failed} failed calls, {during} of them arrived");
}

/// Every call is counted for what it came to; returns how many failed.
fn expect_outcomes(api: &KeyApi, run: &Finished, outage: Outage) -> u64 {
    let outcome = |name: &str| run.number(&format!("/api/outcomes/{name}"));
    let kind = match outage {
        Outage::Refuses => "connect",
        Outage::Answers(_, kind) => kind,
    };
    assert_eq!(outcome("found"), ALL, "{}", run.stdout);
    let failed = outcome(kind);
    run.expect_calls(ALL + failed);
    assert_eq!(run.number("/api/retries"), failed, "{}", run.stdout);
    let arrived = u64::try_from(api.count()).expect("small");
    match outage {
        // Those that were refused never arrived, those that were cut off did.
        Outage::Refuses => assert!((ALL..=ALL + 16).contains(&arrived), "{arrived} calls arrived"),
        Outage::Answers(..) => assert_eq!(arrived, ALL + failed, "{}", run.stdout),
    }
    failed
}

/// All at once: each mostly waits.
#[tokio::test]
async fn timing_an_outage_costs_no_documents() {
    let outages = [
        ("refused from the start", Outage::Refuses, 0),
        ("refused in mid-run", Outage::Refuses, 100),
        ("reset", Outage::Answers(Reply::reset, "connect"), 100),
        ("500", Outage::Answers(|| Reply::html(500), "server_error"), 100),
        ("503 from the start", Outage::Answers(|| Reply::empty(503), "server_error"), 0),
        ("429", Outage::Answers(|| Reply::empty(429), "rate_limited"), 100),
        ("no answer", Outage::Answers(Reply::hang, "timeout"), 100),
    ];
    let mut running = JoinSet::new();
    let mut names = HashMap::new();
    let here = LocalSet::new();
    for (name, outage, after) in outages {
        names.insert(running.spawn_local_on(ride_out(outage, after), &here).id(), name);
    }
    let mut broken = Vec::new();
    here.run_until(async {
        while let Some(ended) = running.join_next().await {
            broken.extend(ended.err().map(|error| names[&error.id()]));
        }
    })
    .await;
    assert!(broken.is_empty(), "see above for {broken:?}");
}

fn is_poison(key: &str) -> bool {
    key.ends_with('3')
}

#[tokio::test]
async fn keys_that_always_fail_hold_up_nobody_and_remain() {
    let bench = Bench::with_docs(300).await;
    let poisoned = |call: &Call| if is_poison(&call.key) { Reply::html(500) } else { Reply::found(call) };
    let api = KeyApi::start(poisoned);
    bench.configure(&bench.config(&api).key_api("max_attempts = 4"));
    let started = Instant::now();
    let run = bench.program("backfill --tps 200 --chunk 50 --concurrency 8").spawn();
    wait_for("all good keys", async || bench.filled().await == 270).await;
    let good = started.elapsed();
    let run = run.finish().await.expect_exit(1);
    assert_eq!(run.text("/status"), "incomplete");
    run.expect_documents(&[("candidates", 300), ("filled", 270), ("failed", 30), ("candidates_left", 30)]);
    assert_eq!(run.json["documents"]["failed_by"], serde_json::json!({"server_error": 30}));
    let left =
        doc! {"legacyKey": {"$regex": "3$"}, "newKey": {"$exists": false}, "newKeyFlag": {"$exists": false}};
    assert_eq!(bench.count(left).await, 30);
    assert!(good < Duration::from_secs(20), "the others waited {good:?}");
    assert!(started.elapsed() < Duration::from_secs(60), "it took {:?}", started.elapsed());
    for (key, times) in api.asked() {
        // While the breaker is open a key has no further attempt.
        let allowed = if is_poison(&key) { 1..=20 } else { 1..=1 };
        assert!(allowed.contains(&times), "{key} was asked for {times} times");
    }

    api.change(Reply::found);
    let again = bench.run("backfill --tps 200").await.expect_exit(0);
    again.expect_documents(&[("candidates", 30), ("filled", 30)]);
    again.expect_calls(30);
}

/// From the first answer that asks for a pause until its end nothing leaves but what is under way.
async fn nothing_leaves_during_a_pause(status: u16, header: fn() -> String, shortest: f64) {
    const IN_FLIGHT: usize = 8;
    let bench = Bench::with_docs(200).await;
    let api = KeyApi::start(Reply::found);
    bench.configure(&bench.config(&api));
    let run = bench.program("backfill --tps 100 --concurrency 8").spawn();
    wait_for("calls", async || api.count() >= 60).await;
    let asked = Instant::now();
    // By the arrival of the call: one that came before and is answered now begins no pause.
    api.change(move |call| {
        if call.at > asked && call.at - asked < Duration::from_secs(1) {
            Reply::empty(status).header("retry-after", header())
        } else {
            Reply::found(call)
        }
    });
    let run = run.finish().await.expect_exit(0);
    run.expect_documents(&[("candidates", 200), ("filled", 200)]);
    let late: Vec<_> = api.calls().into_iter().filter(|call| call.at > asked).collect();
    let gap = late.windows(2).map(|pair| pair[1].at - pair[0].at).max().expect("calls");
    assert!((shortest..shortest + 4.0).contains(&gap.as_secs_f64()), "{status}: a pause of {gap:?}");
    let first =
        late.iter().position(|call| call.at - asked > Duration::from_secs(1)).expect("calls after it");
    assert!(first <= IN_FLIGHT + 1, "{status}: {first} calls left after the API had asked for a pause");
    let failed = run.number("/api/outcomes/rate_limited") + run.number("/api/outcomes/server_error");
    assert_eq!(usize::try_from(failed).expect("small"), first);
}

fn date_in_four_seconds() -> String {
    let at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(4);
    jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&at).expect("a date")
}

#[tokio::test]
async fn timing_nothing_leaves_during_a_pause_that_the_api_asks_for() {
    nothing_leaves_during_a_pause(429, || "3".into(), 2.9).await;
    nothing_leaves_during_a_pause(503, || "3".into(), 2.9).await;
    // A date has whole seconds, hence up to one second less.
    nothing_leaves_during_a_pause(429, date_in_four_seconds, 2.8).await;
    nothing_leaves_during_a_pause(503, date_in_four_seconds, 2.8).await;
}

#[tokio::test]
async fn answers_of_a_gigabyte_are_not_read() {
    // Half of it is the text of a debug build; a single answer would be ten times as much.
    const MOST_MEMORY: u64 = 96 << 20;
    let bench = Bench::with_docs(32).await;
    let api = KeyApi::start(|call| Reply::found(call).followed_by(1 << 30));
    bench.configure(&bench.config(&api).key_api("max_attempts = 2"));
    let mut run = bench.program("backfill --tps 500 --concurrency 32").spawn();
    let mut peak = 0;
    wait_for("the end", async || {
        peak = run.peak_memory().unwrap_or(peak);
        !run.is_running()
    })
    .await;
    let run = run.finish().await.expect_exit(1);
    run.expect_documents(&[("candidates", 32), ("failed", 32), ("candidates_left", 32)]);
    assert_eq!(run.number("/api/outcomes/invalid"), 64, "{}", run.stdout);
    assert_eq!(bench.filled().await, 0);
    assert!(peak > 1 << 20 && peak < MOST_MEMORY, "{} MiB", peak >> 20);
    // What the buffers of both sides hold is sent too.
    assert!(api.surplus() < 64 * (16 << 20), "{} MiB were sent", api.surplus() >> 20);
}

/// What was answered is lost with the process as long as the database does not take it.
#[tokio::test]
async fn while_answers_can_not_be_stored_no_more_keys_are_asked_for() {
    let bench = Bench::with_docs(1_000).await;
    let api = KeyApi::start(Reply::found);
    bench.configure(&bench.config(&api).uri(&named_uri(&bench)));
    let stored_in = bench.run("key-map stats").await.expect_exit(0).text("/collection").to_owned();
    let run = bench.program("backfill --tps 100 --concurrency 1000").spawn();
    wait_for("calls", async || api.count() > 50).await;
    let slow = doc! {
        "failCommands": ["update", "insert", "bulkWrite"],
        "namespace": format!("{}.{stored_in}", bench.state.name()),
        "blockConnection": true,
        "blockTimeMS": 8_000,
    };
    let point = fail(&bench, "alwaysOn", slow).await;
    let begun = api.count();
    tokio::time::sleep(Duration::from_secs(4)).await;
    let asked = api.count();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(api.count(), asked, "{}", run.stderr());
    assert!(asked - begun < 350, "{} more keys were asked for", asked - begun);
    drop(point);
    run.finish().await.expect_exit(0).expect_documents(&[("candidates", 1_000), ("filled", 1_000)]);
    assert_eq!(api.asked().values().max(), Some(&1), "no key is asked for twice");
}
