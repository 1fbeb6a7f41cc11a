//! Fences that outlive what has raised them: a process that is gone or hangs, its watchdog, and the
//! state database. Writes are let through all the same, soon or by one command.

use std::time::Duration;

use bson::{Document, doc};
use tokio::time::Instant;

use crate::cleansing::{SOURCE, TARGET, configure};
use crate::fencing::{copied, source, stopped_at};
use crate::harness::{Bench, wait_for};
use crate::own_set::OwnSet;
use crate::program::{Signal, children, is_gone, is_stopped, signal};

async fn is_writable(bench: &Bench) -> bool {
    let probe = source(bench).insert_one(doc! {"_id": "probe", "valid": true}).await;
    if probe.is_ok() {
        source(bench).delete_one(doc! {"_id": "probe"}).await.expect("a delete");
    }
    probe.is_ok()
}

async fn exists(bench: &Bench, id: i32) -> bool {
    source(bench).find_one(doc! {"_id": id}).await.expect("a read").is_some()
}

/// Kills a cutover and its watchdog at once, as the end of a container does, and drops its state.
async fn abort_without_state(bench: &Bench, outcome: &str) {
    bench.state.drop().await.expect("dropped");
    assert!(!is_writable(bench).await, "the fence stands");
    let status = bench.run("status").await.expect_exit(0);
    assert!(status.stderr.contains("cutover --abort --source"), "{}", status.stderr);
    let abort = format!("cutover --abort --source {}", bench.namespace(SOURCE));
    let aborted = bench.run(&abort).await.expect_exit(0);
    assert_eq!(aborted.text("/outcome"), outcome, "{}", aborted.output());
    assert!(is_writable(bench).await, "{}", aborted.output());
    let status = bench.run("status").await.expect_exit(0);
    assert!(!status.stderr.contains("held off"), "{}", status.stderr);
}

#[tokio::test]
async fn an_abort_lifts_a_fence_whose_job_is_gone() {
    let bench = copied().await;
    let validator = doc! {"_id": {"$exists": true}};
    let modify = doc! {"collMod": SOURCE, "validator": validator.clone(), "validationLevel": "moderate"};
    bench.database.run_command(modify).await.expect("a validator");
    bench.run("cleanse --restart").await.expect_exit(0);
    let (run, watchdogs) = stopped_at(&bench, "cutover --mode swap --yes", "cutover_fenced").await;
    run.kill();
    watchdogs.iter().for_each(|watchdog| signal(*watchdog, Signal::Kill));
    abort_without_state(&bench, "aborted").await;
    let names = bench.database.list_collection_names().await.expect("names");
    assert!(names.iter().any(|name| name == TARGET), "the copy has its name back: {names:?}");
    let list = doc! {"listCollections": 1, "filter": {"name": SOURCE}};
    let reply = bench.database.run_command(list).await.expect("the collection").to_string();
    assert!(reply.contains("moderate") && reply.contains("$exists"), "{reply}");
}

/// Names were exchanged; what was deleted at the last moment is told by the change stream.
#[tokio::test]
async fn an_abort_finds_out_what_became_of_a_cutover_whose_job_is_gone() {
    let bench = copied().await;
    let run = bench
        .program("cutover --mode keep --max-pause 20s --yes")
        .env("MONGOREKEY_STOP_AT", "cutover_deadline_seen:1")
        .env("MONGOREKEY_CRASH_AT", "cutover_renamed:1")
        .spawn();
    wait_for("the stop", async || is_stopped(run.pid())).await;
    let watchdogs = children(run.pid());
    watchdogs.iter().for_each(|watchdog| signal(*watchdog, Signal::Stop));
    source(&bench).delete_one(doc! {"_id": 1}).await.expect("a delete");
    run.signal(Signal::Continue);
    assert_eq!(run.finish().await.exit, None);
    watchdogs.iter().for_each(|watchdog| signal(*watchdog, Signal::Kill));
    abort_without_state(&bench, "cut_over").await;
    assert!(!exists(&bench, 1).await, "its delete was acknowledged");
    assert!(exists(&bench, 2).await && !exists(&bench, 3).await, "the clean copy is live");
}

#[tokio::test]
async fn a_watchdog_lifts_a_fence_whose_job_is_gone() {
    let bench = copied().await;
    let run = bench
        .program("cutover --mode swap --max-pause 20s --yes")
        .env("MONGOREKEY_STOP_AT", "cutover_fenced:1")
        .spawn();
    wait_for("the stop", async || is_stopped(run.pid())).await;
    bench.state.drop().await.expect("dropped");
    assert!(!is_writable(&bench).await, "the fence stands");
    run.kill();
    wait_for("the watchdog", async || is_writable(&bench).await).await;
    let names = bench.database.list_collection_names().await.expect("names");
    assert!(names.iter().any(|name| name == TARGET), "the copy has its name back: {names:?}");
}

/// The application is not held off for longer than was allowed, although nothing has ended.
#[tokio::test]
async fn timing_a_cutover_that_hangs_holds_writes_off_no_longer_than_it_may() {
    let bench = copied().await;
    let run = bench
        .program("cutover --mode swap --max-pause 1s --yes")
        .env("MONGOREKEY_STOP_AT", "cutover_fenced:1")
        .spawn();
    wait_for("the stop", async || is_stopped(run.pid())).await;
    let begun = Instant::now();
    wait_for("the watchdog", async || is_writable(&bench).await).await;
    assert!(begun.elapsed() < Duration::from_secs(3), "writes were refused for {:?}", begun.elapsed());
    source(&bench).insert_one(doc! {"_id": 1_000, "valid": true}).await.expect("writes go on");
    run.signal(Signal::Continue);
    let late = run.finish().await;
    assert!(matches!(late.exit, Some(0 | 4)), "{}", late.output());
    assert!(exists(&bench, 1_000).await, "{}", late.output());
    assert!(is_writable(&bench).await, "{}", late.output());
}

/// Nobody has to look for it: neither parent nor server will come back.
#[tokio::test]
async fn a_watchdog_without_parent_and_server_heeds_a_signal() {
    let set = OwnSet::start(&[]);
    let bench = Bench::on(&set.uri).await;
    configure(&bench, "keep = '{\"valid\": true}'");
    let documents = (0..30).map(|id| doc! {"_id": id, "valid": id % 3 != 0});
    bench.insert_into(SOURCE, documents.collect::<Vec<Document>>()).await;
    bench.run("cleanse").await.expect_exit(0);
    let run = bench
        .program("cutover --mode swap --max-pause 20s --yes")
        .env("MONGOREKEY_STOP_AT", "cutover_fenced:1")
        .spawn();
    wait_for("the stop", async || is_stopped(run.pid())).await;
    let watchdogs = children(run.pid());
    drop(set);
    bench.abandon();
    run.kill();
    watchdogs.iter().for_each(|watchdog| signal(*watchdog, Signal::Terminate));
    let asked = Instant::now();
    wait_for("its end", async || watchdogs.iter().all(|watchdog| is_gone(*watchdog))).await;
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
}
