//! Filling from the key map when it is killed: the next start ends right.

use bson::{Bson, doc};

use crate::fail_points::{fail, named_uri};
use crate::from_key_map::{FROM_KEY_MAP, collections, dump};
use crate::harness::{Bench, DOCS, wait_for};
use crate::key_api::KeyApi;
use crate::program::Signal;

fn job_name(bench: &Bench) -> String {
    format!("backfill-{}", bench.namespace(DOCS))
}

#[tokio::test]
async fn kills_and_starts_again_end_like_an_undisturbed_run() {
    let bench = Bench::new().await;
    let key = |id: i32| format!("K{}", id % 9000);
    bench.insert((0..90_000).map(|id| doc! {"_id": id, "legacyKey": key(id)})).await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.file("keys.csv", dump((0..8999).map(key)));
    bench.run("key-map import keys.csv").await.expect_exit(0);
    for moment in [1_u64, 15_000, 45_000] {
        let mut run = bench.program(FROM_KEY_MAP).spawn();
        wait_for("the moment of the kill", async || {
            assert!(run.is_running(), "it was through before it was killed: {}", run.stderr());
            bench.filled().await >= moment
        })
        .await;
        run.kill();
    }
    let run = bench.run(FROM_KEY_MAP).await.expect_exit(0);
    assert_eq!(run.number("/documents/candidates_left"), 10);
    for document in bench.documents(DOCS).await {
        let id = document.get_i32("_id").expect("an id");
        let mut wanted = doc! {"_id": id, "legacyKey": key(id)};
        if id % 9000 != 8999 {
            wanted.insert("newKey", format!("N-{}", key(id)));
        }
        assert_eq!(document, wanted);
    }
    assert_eq!(collections(&bench).await, [DOCS]);
    let job = bench.job(&job_name(&bench)).await.expect("a job");
    assert_eq!(job.get_str("state").ok(), Some("completed"));
    assert_eq!(job.get("operation"), Some(&Bson::Null));
}

#[tokio::test]
async fn elections_cut_connections_and_late_majorities_cost_nothing() {
    for fault in [
        doc! {"errorCode": 10107},
        doc! {"closeConnection": true},
        doc! {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}},
    ] {
        let bench = Bench::with_docs(60).await;
        let api = KeyApi::finding();
        bench.configure(&bench.config(&api).uri(&named_uri(&bench)));
        bench.file("keys.csv", dump((1..=60).map(|id| format!("K{id}"))));
        bench.run("key-map import keys.csv").await.expect_exit(0);
        let mut data = doc! {"failCommands": ["update"]};
        data.extend(fault.clone());
        let point = fail(&bench, doc! {"times": 8}, data).await;
        let run = bench.run(FROM_KEY_MAP).await;
        drop(point);
        let run = run.expect_exit(0);
        assert_eq!(run.number("/documents/candidates_left"), 0, "{fault}: {}", run.stdout);
        assert_eq!(bench.filled().await, 60, "{fault}");
        assert_eq!(collections(&bench).await, [DOCS], "{fault}");
    }
}

#[tokio::test]
async fn a_termination_ends_between_two_chunks() {
    let bench = Bench::with_docs(70_000).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.file("keys.csv", dump((1..=70_000).map(|id| format!("K{id}"))));
    bench.run("key-map import keys.csv").await.expect_exit(0);
    let run = bench.program(FROM_KEY_MAP).spawn();
    wait_for("keys", async || bench.filled().await > 0).await;
    run.signal(Signal::Terminate);
    let run = run.finish().await.expect_exit(143);
    assert_eq!(run.text("/status"), "interrupted");
    let filled = bench.filled().await;
    assert!(filled < 70_000, "it did not stop");
    assert_eq!(run.number("/documents/filled"), filled);
    assert_eq!(run.number("/documents/candidates_left"), 70_000 - filled);
    assert_eq!(collections(&bench).await, [DOCS]);
    let run = bench.run(FROM_KEY_MAP).await.expect_exit(0);
    assert_eq!(run.number("/job_totals/filled"), 70_000);
}
