//! A cleanse that is slowed: by documents per second, and for the sake of the database.

use std::time::{Duration, Instant};

use bson::{Document, doc};
use mongodb::Collection;

use crate::cleansing::{
    SOURCE, TARGET, assert_same, bytes, bytes_where, configure, count_now, every_type, ids, job_name,
};
use crate::harness::{Bench, wait_for};
use crate::own_set::ThreeNodes;
use crate::program::Running;

async fn seed(bench: &Bench, count: u32) -> u64 {
    let ids = ids(count);
    let all = ids.len() as u64;
    bench.insert_into(SOURCE, (0..).zip(ids).map(|(number, id)| every_type(id, number))).await;
    all
}

async fn copied(bench: &Bench) -> u64 {
    count_now(bench, TARGET, doc! {}).await
}

/// Looks at the target until the run ends: never more than `rate` a second, give or take a second.
async fn expect_never_faster(bench: &Bench, run: &mut Running, rate: f64) -> Duration {
    wait_for("first documents", async || copied(bench).await > 0).await;
    let begun = Instant::now();
    while run.is_running() {
        let count = copied(bench).await;
        let most = rate * (begun.elapsed().as_secs_f64() + 1.6);
        assert!((count as f64) < most, "{count} documents after {:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    begun.elapsed()
}

#[tokio::test]
async fn a_copy_keeps_to_the_limit_all_the_time() {
    let bench = Bench::new().await;
    let count = seed(&bench, 4_000).await;
    configure(&bench, "documents_per_second = 800");
    let mut run = bench.program("cleanse --parallel 2").spawn();
    let took = expect_never_faster(&bench, &mut run, 800.0).await;
    assert!(took > Duration::from_millis(3_500), "{took:?}");
    let run = run.finish().await.expect_exit(0);
    assert_eq!(run.number("/documents/copied"), count);
    assert!(run.stderr.contains("limited by documents/s limit"), "{}", run.stderr);
    let seconds = run.json["limited_by_seconds"]["documents/s limit"].as_f64().unwrap_or_default();
    assert!(seconds > 2.0, "{}", run.json["limited_by_seconds"]);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
}

#[tokio::test]
async fn a_limit_of_the_command_line_holds_in_place_of_the_configured_one_and_can_be_lifted() {
    let bench = Bench::new().await;
    seed(&bench, 3_000).await;
    configure(&bench, "documents_per_second = 1000000");
    let run = bench.program("cleanse --documents-per-second 50").spawn();
    wait_for("first documents", async || copied(&bench).await > 0).await;
    wait_for("the limit in the status", async || {
        bench.limited_by(&job_name(&bench)).await == "documents/s limit"
    })
    .await;
    let begun = Instant::now();
    let lifted = bench.run(&format!("control {} set documents-per-second=0", job_name(&bench))).await;
    lifted.expect_exit(0);
    run.finish().await.expect_exit(0);
    assert!(begun.elapsed() < Duration::from_secs(20), "the limit held on: {:?}", begun.elapsed());
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
}

#[tokio::test]
async fn a_kill_between_pieces_of_a_range_costs_none_of_them() {
    let bench = Bench::new().await;
    seed(&bench, 3_000).await;
    let keep = doc! {"int": {"$mod": [3, 0]}};
    configure(&bench, "keep = '{\"int\": {\"$mod\": [3, 0]}}'");
    let mut before = 0;
    for pieces in [1, 3, 2] {
        let at = format!("after_piece:{pieces}");
        let run = bench.program("cleanse --parallel 2 --documents-per-second 600");
        let run = run.env("MONGOREKEY_CRASH_AT", &at).run().await;
        assert_eq!(run.exit, None, "it was not killed: {}", run.output());
        let ranges: Collection<Document> = bench.state.collection("ranges");
        let begun = ranges.count_documents(doc! {"reached": {"$exists": true}}).await.expect("a count");
        assert!(begun > 0, "no range is partly copied");
        let now = copied(&bench).await;
        assert!(now > before, "{now} documents after {before}");
        before = now;
    }
    // Without a limit the rest goes at once.
    bench.run("cleanse").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes_where(&bench, SOURCE, keep).await);
}

#[tokio::test]
async fn a_copy_and_a_follower_wait_for_a_lagging_member() {
    let set = ThreeNodes::start().await;
    let bench = Bench::on(&set.uri).await;
    seed(&bench, 4_000).await;
    configure(&bench, "max_replication_lag = '2s'\ndocuments_per_second = 200");
    let job = job_name(&bench);
    let run = bench.program("cleanse --follow").spawn();
    wait_for("first documents", async || copied(&bench).await > 0).await;
    let lagging = set.secondaries().await[0];
    lagging.fail_point("rsSyncApplyStop", doc! {}).await;
    wait_for("the lag to be seen", async || bench.limited_by(&job).await == "replication lag").await;
    // What was under way.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let paused = copied(&bench).await;
    assert!(paused < 3_500, "{paused} documents before the pause");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(copied(&bench).await, paused, "copied during the lag");
    lagging.end_fail_point("rsSyncApplyStop").await;
    bench.run(&format!("control {job} set documents-per-second=0")).await.expect_exit(0);
    wait_for("the copy", async || run.stderr().contains("follows")).await;
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
    bench.run(&format!("control {job} stop")).await.expect_exit(0);
    let run = run.finish().await.expect_exit(143);
    let seconds = run.json["limited_by_seconds"]["replication lag"].as_f64().unwrap_or_default();
    assert!(seconds > 2.0, "{}", run.json["limited_by_seconds"]);
}
