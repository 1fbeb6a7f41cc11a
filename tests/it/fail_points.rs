//! A database that fails: elections, cut connections, writes that no majority confirms.

use bson::{Bson, Document, doc};

use crate::cleansing::FailPoint;
use crate::harness::{Bench, DOCS, uri_with};
use crate::key_api::{KeyApi, Reply};

/// Lets commands of the tested program fail until this is dropped.
pub async fn fail(bench: &Bench, mode: impl Into<Bson>, mut data: Document) -> FailPoint {
    // Waiting for our turn must not keep the driver from watching the server.
    let reserved = tokio::task::spawn_blocking(|| FailPoint::reserve("failCommand"));
    let point = reserved.await.expect("no panic");
    data.insert("appName", app_name(bench));
    point.set(bench, mode, data).await;
    point
}

/// Only the tested program bears this name.
fn app_name(bench: &Bench) -> String {
    format!("tested-{}", bench.database.name())
}

/// A real election is announced, one that is made up is only seen when the driver asks: often here.
pub fn named_uri(bench: &Bench) -> String {
    uri_with(&format!("appName={}&heartbeatFrequencyMS=500", app_name(bench)))
}

/// Commands that a backfill sends, each of which may fail at any time.
pub const COMMANDS: [&str; 6] = ["find", "update", "insert", "aggregate", "findAndModify", "count"];

/// Fails some commands of each kind; the backfill is complete all the same.
pub async fn survives(fault: Document, commands: &[&str]) {
    let mut problems = Vec::new();
    for command in commands {
        if let Err(problem) = survives_one(&fault, command).await {
            problems.push(format!("{command}: {problem}"));
        }
    }
    assert!(problems.is_empty(), "{fault}\n{}", problems.join("\n\n"));
}

async fn survives_one(fault: &Document, command: &str) -> Result<(), String> {
    let bench = Bench::new().await;
    bench.insert((0..60).map(|id| doc! {"_id": id, "legacyKey": format!("K{}", id % 40)})).await;
    bench.create_index().await;
    let api =
        KeyApi::start(|call| if call.key.ends_with('7') { Reply::not_found() } else { Reply::found(call) });
    bench.configure(&bench.config(&api).uri(&named_uri(&bench)));
    let mut data = doc! {"failCommands": [command]};
    data.extend(fault.clone());
    let point = fail(&bench, doc! {"times": 3}, data).await;
    let run = bench.run("backfill --tps 100000 --chunk 10 --concurrency 8").await;
    drop(point);
    if run.exit != Some(0) {
        return Err(run.output());
    }
    run.expect_documents(&[("candidates", 60), ("filled", 54), ("flagged", 6)]);
    assert_eq!(api.count(), 40, "{command} {fault}");
    for document in bench.documents(DOCS).await {
        let legacy = document.get_str("legacyKey").expect("kept");
        let wanted = (!legacy.ends_with('7')).then(|| format!("N-{legacy}"));
        assert_eq!(document.get_str("newKey").ok(), wanted.as_deref(), "{command} {fault}: {document}");
    }
    Ok(())
}

#[tokio::test]
async fn a_new_primary_costs_nothing() {
    survives(doc! {"errorCode": 10107}, &COMMANDS).await;
}

#[tokio::test]
async fn cut_connections_cost_nothing() {
    survives(doc! {"closeConnection": true}, &COMMANDS).await;
}

#[tokio::test]
async fn time_limits_and_conflicts_cost_nothing() {
    survives(doc! {"errorCode": 50}, &COMMANDS).await;
    survives(doc! {"errorCode": 112}, &["update", "insert", "findAndModify"]).await;
}

#[tokio::test]
async fn interrupted_operations_cost_nothing() {
    survives(doc! {"errorCode": 11602}, &COMMANDS).await;
    survives(doc! {"errorCode": 11601}, &COMMANDS).await;
}

#[tokio::test]
async fn a_server_that_shuts_down_or_lost_its_primary_costs_nothing() {
    survives(doc! {"errorCode": 91}, &COMMANDS).await;
    survives(doc! {"errorCode": 13435}, &["find", "aggregate", "count"]).await;
    survives(doc! {"errorCode": 189}, &["update", "insert", "findAndModify"]).await;
}

/// The rest of a chunk or of the key map's answers can't be had: it is read again.
#[tokio::test]
async fn a_cursor_that_breaks_off_loses_no_document() {
    let faults = [
        doc! {"errorCode": 43},
        doc! {"errorCode": 10107},
        doc! {"errorCode": 11601},
        doc! {"errorCode": 11602},
        doc! {"errorCode": 50},
        doc! {"closeConnection": true},
    ];
    for fault in faults {
        let bench = Bench::with_docs(700).await;
        let api = KeyApi::finding();
        bench.configure(&bench.config(&api).uri(&named_uri(&bench)));
        // Half of the keys are known, so that the key map answers in several batches too.
        bench.run("backfill --tps 100000 --limit 350").await.expect_exit(0);
        bench.docs().update_many(doc! {}, doc! {"$unset": {"newKey": ""}}).await.expect("an update");
        let mut data = doc! {"failCommands": ["getMore"]};
        data.extend(fault.clone());
        let point = fail(&bench, doc! {"times": 4}, data).await;
        let run = bench.run("backfill --tps 100000 --chunk 300").await;
        let failed = point.set(&bench, "off", doc! {}).await;
        drop(point);
        assert_eq!(run.exit, Some(0), "{fault}\n{}", run.output());
        assert!(failed >= 4, "{fault}: only {failed} commands failed");
        run.expect_documents(&[("candidates", 700), ("filled", 700)]);
        run.expect_calls(350);
        assert_eq!((bench.filled().await, api.count()), (700, 700), "{fault}");
    }
}

#[tokio::test]
async fn an_error_that_does_not_pass_stops_the_job_and_keeps_its_state() {
    let bench = Bench::with_docs(60).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api).uri(&named_uri(&bench)));
    let data = doc! {"failCommands": ["insert"], "errorCode": 13};
    let point = fail(&bench, "alwaysOn", data).await;
    let run = bench.run("backfill --tps 1000 --concurrency 8").await.expect_exit(4);
    drop(point);
    assert_eq!(run.text("/error/code"), "stopped");
    assert!(run.text("/error/message").contains("13"), "{}", run.stdout);
    assert_eq!(bench.filled().await, 0, "no document is written before its answer is durable");
    assert!(api.count() <= 16, "{} calls for answers that could not be kept", api.count());
    bench.run("backfill --tps 1000").await.expect_exit(0);
    assert_eq!(bench.filled().await, 60);
}
