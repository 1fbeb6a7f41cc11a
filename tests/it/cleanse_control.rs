//! Live control of a cleanse and of a full comparison, from another process.

use std::time::Duration;

use bson::{Bson, Document, RawDocumentBuf, doc};
use mongodb::Collection;

use crate::cleansing::{
    FailPoint, SOURCE, TARGET, assert_same, bytes, bytes_where, configure, job_name, next_namespace,
};
use crate::fail_points::named_uri;
use crate::harness::{Bench, wait_for};
use crate::program::{Finished, Running};

const KEEP: &str = "keep = '{\"valid\": true}'";

async fn bench(documents: i32) -> Bench {
    let bench = Bench::new().await;
    bench
        .insert_into(SOURCE, (0..documents).map(|id| doc! {"_id": id, "valid": id % 3 != 0, "version": 0}))
        .await;
    configure(&bench, KEEP);
    bench
}

fn source(bench: &Bench) -> Collection<Document> {
    bench.database.collection(SOURCE)
}

/// A run that has copied everything and follows.
async fn following(bench: &Bench) -> Running {
    let run = bench.program("cleanse --follow").spawn();
    wait_for("the copy", async || run.stderr().contains("follows")).await;
    run
}

/// Toggles the validity of some documents, deletes some, adds some.
async fn touch(bench: &Bench) {
    let toggle = vec![doc! {"$set": {"valid": {"$not": ["$valid"]}, "version": {"$add": ["$version", 1]}}}];
    source(bench).update_many(doc! {"_id": {"$mod": [5, 0]}}, toggle).await.expect("a write");
    source(bench).delete_many(doc! {"_id": {"$mod": [7, 1]}}).await.expect("a write");
    let added = (0..50)
        .map(|n| doc! {"_id": format!("new {n} {}", Bson::from(bson::oid::ObjectId::new())), "valid": true});
    source(bench).insert_many(added).await.expect("a write");
}

async fn is_in_step(bench: &Bench) -> bool {
    bytes_where(bench, SOURCE, doc! {"valid": true}).await == bytes(bench, TARGET).await
}

async fn expect_in_step(bench: &Bench) {
    assert_same(&bytes(bench, TARGET).await, &bytes_where(bench, SOURCE, doc! {"valid": true}).await);
}

async fn control(bench: &Bench, what: &str) -> Finished {
    bench.run(&format!("control {} {what}", job_name(bench))).await
}

async fn marks(bench: &Bench) -> u64 {
    let marks: Collection<Document> = bench.state.collection("marks");
    marks.count_documents(doc! {}).await.expect("a count")
}

async fn position(bench: &Bench) -> Document {
    bench.job(&job_name(bench)).await.expect("a job").get_document("feed").expect("a position").clone()
}

#[track_caller]
fn expect_stopped_by_control(run: Finished) -> Finished {
    let run = run.expect_exit(143);
    assert_eq!(run.text("/error/code"), "interrupted");
    assert!(run.text("/error/message").contains("live control"), "{}", run.stdout);
    assert!(run.stderr.contains("stopping"), "{}", run.stderr);
    run
}

#[tokio::test]
async fn a_stop_ends_a_follower_with_its_state_saved() {
    let bench = bench(2_000).await;
    let run = following(&bench).await;
    touch(&bench).await;
    wait_for("the target in step", async || is_in_step(&bench).await).await;
    control(&bench, "stop").await.expect_exit(0);
    let ended = expect_stopped_by_control(run.finish().await);
    assert_eq!(ended.text("/status"), "interrupted");
    let job = bench.job(&job_name(&bench)).await.expect("a job");
    assert_eq!(job.get_str("state").ok(), Some("interrupted"));
    assert!(!job.contains_key("lease"), "the lease was not given back: {job}");
    // The next run is not asked to stop, and sees what was written in between.
    touch(&bench).await;
    let again = bench.run("cleanse").await.expect_exit(0);
    assert_eq!(again.text("/status"), "completed");
    expect_in_step(&bench).await;
}

#[tokio::test]
async fn a_stop_ends_a_copy_and_the_next_run_goes_on() {
    let bench = bench(6_000).await;
    let inserts = FailPoint::reserve("hangDuringBatchInsert");
    let data = doc! {"nss": next_namespace(&bench, "cleanse", TARGET).await, "shouldCheckForInterrupt": true};
    let before = inserts.set(&bench, "alwaysOn", data).await;
    let run = bench.program("cleanse --parallel 1").spawn();
    inserts.wait_until_entered(&bench, before + 1).await;
    control(&bench, "stop").await.expect_exit(0);
    let ended = expect_stopped_by_control(run.finish().await);
    assert_eq!(ended.text("/status"), "interrupted");
    inserts.off(&bench).await;
    touch(&bench).await;
    bench.run("cleanse").await.expect_exit(0);
    expect_in_step(&bench).await;
}

#[tokio::test]
async fn while_a_follower_is_paused_changes_are_remembered_and_none_is_applied() {
    let bench = bench(2_000).await;
    let run = following(&bench).await;
    control(&bench, "pause").await.expect_exit(0);
    wait_for("the pause", async || run.stderr().contains("paused")).await;
    let (before, at) = (bytes(&bench, TARGET).await, position(&bench).await);
    touch(&bench).await;
    wait_for("marks", async || marks(&bench).await > 300).await;
    wait_for("a later position", async || position(&bench).await != at).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_same(&bytes(&bench, TARGET).await, &before);
    control(&bench, "resume").await.expect_exit(0);
    wait_for("the target in step", async || is_in_step(&bench).await).await;
    wait_for("no marks", async || marks(&bench).await == 0).await;
    // It goes on following.
    touch(&bench).await;
    wait_for("the target in step", async || is_in_step(&bench).await).await;
    control(&bench, "stop").await.expect_exit(0);
    expect_stopped_by_control(run.finish().await);
}

#[tokio::test]
async fn what_was_remembered_in_a_pause_outlives_a_kill() {
    let bench = bench(2_000).await;
    let run = following(&bench).await;
    control(&bench, "pause").await.expect_exit(0);
    wait_for("the pause", async || run.stderr().contains("paused")).await;
    let at = position(&bench).await;
    touch(&bench).await;
    wait_for("marks", async || marks(&bench).await > 300).await;
    wait_for("a later position", async || position(&bench).await != at).await;
    run.kill();
    control(&bench, "resume").await.expect_exit(0);
    bench.run("cleanse").await.expect_exit(0);
    expect_in_step(&bench).await;
}

#[tokio::test]
async fn a_paused_run_begins_no_range_and_ends_when_asked() {
    let bench = bench(3_000).await;
    bench.run("cleanse").await.expect_exit(0);
    control(&bench, "pause").await.expect_exit(0);
    let run = bench.program("cleanse --restart").spawn();
    wait_for("an empty target", async || {
        let ranges: Collection<Document> = bench.state.collection("ranges");
        ranges.count_documents(doc! {"state": "pending"}).await.expect("a count") >= 4
    })
    .await;
    touch(&bench).await;
    wait_for("marks", async || marks(&bench).await > 300).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let target: Collection<RawDocumentBuf> = bench.database.collection(TARGET);
    assert_eq!(target.count_documents(doc! {}).await.expect("a count"), 0, "copied in spite of the pause");
    control(&bench, "stop").await.expect_exit(0);
    expect_stopped_by_control(run.finish().await);
    control(&bench, "resume").await.expect_exit(0);
    bench.run("cleanse").await.expect_exit(0);
    expect_in_step(&bench).await;
}

#[tokio::test]
async fn the_catch_up_keeps_to_a_limit_that_was_set_meanwhile() {
    let bench = bench(4_000).await;
    let run = following(&bench).await;
    control(&bench, "set documents-per-second=200").await.expect_exit(0);
    wait_for("the new limit", async || run.stderr().contains("200 documents per second")).await;
    // What was waited for before may still be of the former size.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let all = doc! {"$set": {"version": 7, "valid": true}};
    source(&bench).update_many(doc! {}, all).await.expect("a write");
    let target: Collection<Document> = bench.database.collection(TARGET);
    let done = async || target.count_documents(doc! {"version": 7}).await.expect("a count");
    wait_for("first documents", async || done().await > 0).await;
    let (begun, first) = (std::time::Instant::now(), done().await);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let written = done().await - first;
    let most = 200.0 * (begun.elapsed().as_secs_f64() + 1.5);
    assert!(written > 0 && (written as f64) < most, "{written} in {:?}", begun.elapsed());
    control(&bench, "set documents-per-second=0").await.expect_exit(0);
    wait_for("the target in step", async || is_in_step(&bench).await).await;
    assert!(begun.elapsed() < Duration::from_secs(15), "the limit held on");
    control(&bench, "stop").await.expect_exit(0);
    expect_stopped_by_control(run.finish().await);
}

#[tokio::test]
async fn settings_of_other_commands_are_refused_with_the_reason() {
    let bench = bench(10).await;
    bench.run("cleanse").await.expect_exit(0);
    for (what, needed) in
        [("set tps=5", "tps"), ("set chunk=5", "chunk"), ("set concurrency=2", "concurrency")]
    {
        let refused = control(&bench, what).await.expect_exit(3);
        assert!(refused.text("/error/message").contains(needed), "{}", refused.stdout);
        assert!(refused.text("/error/hint").contains("documents-per-second"), "{}", refused.stdout);
    }
    control(&bench, "stop").await.expect_exit(3);
    control(&bench, "set documents-per-second=x").await.expect_exit(2);
}

#[tokio::test]
async fn a_stop_ends_a_full_comparison_and_the_next_run_goes_on() {
    let bench = bench(4_000).await;
    bench.run("cleanse").await.expect_exit(0);
    let text = crate::cleansing::config(&bench, KEEP).replace(&bench.uri, &named_uri(&bench));
    bench.configure_text(&text);
    let job = format!("verify-{}-to-{TARGET}", bench.namespace(SOURCE));
    // A document too many, and all the time of the world for it to go away.
    let target: Collection<Document> = bench.database.collection(TARGET);
    target.insert_one(doc! {"_id": "too many"}).await.expect("a write");
    let run = bench.program("verify --full --settle 10m").spawn();
    wait_for("the second look", async || run.stderr().contains("differ")).await;
    let refused = bench.run(&format!("control {job} pause")).await.expect_exit(3);
    assert!(refused.text("/error/hint").contains("stop"), "{}", refused.stdout);
    bench.run(&format!("control {job} stop")).await.expect_exit(0);
    expect_stopped_by_control(run.finish().await);
    let stored = bench.job(&job).await.expect("a job");
    assert_eq!(stored.get_str("state").ok(), Some("interrupted"));
    target.delete_one(doc! {"_id": "too many"}).await.expect("a write");
    let again = bench.run("verify --full").await.expect_exit(0);
    assert!(again.number("/full/ranges_of_earlier_runs") > 0, "{}", again.stdout);
}
