//! A database that can't keep up, or no longer tells whether it does, is spared.

use std::time::Duration;

use bson::doc;

use crate::harness::{Bench, connect, wait_for};
use crate::key_api::KeyApi;
use crate::own_set::{OwnSet, ThreeNodes};

const STOP: &str = "rsSyncApplyStop";

async fn expect_no_call(api: &KeyApi, during: Duration) {
    // What was under way when the pause began.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = api.count();
    tokio::time::sleep(during).await;
    assert_eq!(api.count(), before, "calls during a pause");
}

async fn expect_all_filled(bench: &Bench, api: &KeyApi, documents: i32) {
    assert_eq!(bench.filled().await, u64::try_from(documents).expect("small"));
    assert_eq!(api.count(), usize::try_from(documents).expect("small"), "one call per key");
}

#[tokio::test]
async fn calls_wait_until_a_lagging_member_has_caught_up() {
    let set = ThreeNodes::start().await;
    let bench = Bench::with_docs_on(&set.uri, 800).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api).backfill("max_replication_lag = '2s'"));
    let run = bench.program("backfill --job j --tps 40 --chunk 50").spawn();
    wait_for("calls", async || api.count() > 20).await;
    let lagging = set.secondaries().await[0];
    lagging.fail_point(STOP, doc! {}).await;
    wait_for("the lag to be seen", async || bench.limited_by("j").await == "replication lag").await;
    let paused = api.count();
    assert!(paused < 700, "{paused} calls before the pause");
    expect_no_call(&api, Duration::from_secs(3)).await;
    assert!(run.stderr().contains("replication lag"), "{}", run.stderr());
    lagging.end_fail_point(STOP).await;
    wait_for("calls after the lag", async || api.count() > paused + 5).await;
    let run = run.finish().await.expect_exit(0);
    expect_all_filled(&bench, &api, 800).await;
    let seconds = run.json["limited_by_seconds"]["replication lag"].as_f64().unwrap_or_default();
    assert!(seconds > 3.0, "{}", run.json["limited_by_seconds"]);
}

#[tokio::test]
async fn a_majority_that_stands_still_for_a_while_costs_nothing() {
    let set = ThreeNodes::start().await;
    let bench = Bench::with_docs_on(&set.uri, 400).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api).backfill("max_replication_lag = '2s'"));
    let run = bench.program("backfill --job j --tps 40 --chunk 50").spawn();
    wait_for("calls", async || api.count() > 20).await;
    for member in set.secondaries().await {
        member.fail_point(STOP, doc! {}).await;
    }
    tokio::time::sleep(Duration::from_secs(6)).await;
    expect_no_call(&api, Duration::from_secs(2)).await;
    for member in set.secondaries().await {
        member.end_fail_point(STOP).await;
    }
    run.finish().await.expect_exit(0);
    expect_all_filled(&bench, &api, 400).await;
}

#[tokio::test]
async fn a_signal_that_is_lost_pauses_until_it_is_back() {
    let set = OwnSet::start(&[]);
    let bench = Bench::with_docs_on(&set.uri, 300).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let point = |mode: bson::Bson| {
        // Neither the driver nor the job depends on this command.
        let data = doc! {"failCommands": ["replSetGetStatus"], "errorCode": 8};
        doc! {"configureFailPoint": "failCommand", "mode": mode, "data": data}
    };
    bench.admin().run_command(point("alwaysOn".into())).await.expect("the fail point is set");
    let begun = std::time::Instant::now();
    let run = bench.program("backfill --job j --tps 2").spawn();
    wait_for("the pause", async || bench.limited_by("j").await == "lost signal").await;
    assert!(begun.elapsed() > Duration::from_secs(29), "{:?}", begun.elapsed());
    assert!(api.count() > 50, "{} calls before the pause", api.count());
    expect_no_call(&api, Duration::from_secs(3)).await;
    let off = doc! {"configureFailPoint": "failCommand", "mode": "off"};
    bench.admin().run_command(off).await.expect("the fail point is off");
    bench.run("control j set tps=1000").await.expect_exit(0);
    let run = run.finish().await.expect_exit(0);
    expect_all_filled(&bench, &api, 300).await;
    assert!(run.json["limited_by_seconds"]["lost signal"].as_f64().is_some_and(|spent| spent > 2.0));
}

#[tokio::test]
async fn who_may_not_ask_for_the_lag_is_not_paused_for_it() {
    let set = OwnSet::start(&["--auth"]);
    let bench = Bench::with_docs_on(&set.uri, 300).await;
    let api = KeyApi::finding();
    let root = connect(&set.uri).await;
    let role = |name: &str| doc! {"role": "readWrite", "db": name};
    let user = doc! {
        "createUser": "modest",
        "pwd": "modest",
        "roles": [role(bench.database.name()), role(bench.state.name())],
    };
    root.database("admin").run_command(user).await.expect("a user");
    bench.configure(&bench.config(&api).uri(&set.uri.replace("root:throw-away@", "modest:modest@")));
    let mut run = bench.program("backfill --job j --tps 2").spawn();
    // Longer than a signal may be silent.
    tokio::time::sleep(Duration::from_secs(35)).await;
    assert!(run.is_running(), "{}", run.stderr());
    let before = api.count();
    assert!(before > 60, "{before} calls; {}", run.stderr());
    wait_for("further calls", async || api.count() > before + 3).await;
    bench.run("control j set tps=1000").await.expect_exit(0);
    run.finish().await.expect_exit(0);
    expect_all_filled(&bench, &api, 300).await;
}
