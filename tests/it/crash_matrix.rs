//! Killed at every point of the flow, again and again: the run that follows ends where an
//! undisturbed one does, and asks no key twice that was answered.
//!
//! The points are compiled into debug builds only; see src/crash.rs.

use std::collections::BTreeMap;
use std::time::Duration;

use bson::{Bson, Document, doc};

use crate::harness::{Bench, DOCS};
use crate::key_api::{Call, KeyApi, Reply};

const POINTS: [&str; 5] =
    ["after_claim", "after_call", "after_key_map", "after_documents", "after_checkpoint"];
const CONCURRENCY: usize = 4;
const COMMAND: &str = "backfill --tps 300 --chunk 50 --concurrency 4 --job j";

fn documents() -> impl Iterator<Item = Document> {
    (0..1500).map(|id| match id % 25 {
        0 => doc! {"_id": id, "legacyKey": Bson::Null},
        1 => doc! {"_id": id, "legacyKey": id},
        _ => doc! {"_id": id, "legacyKey": format!("K{}", id % 700)},
    })
}

fn answer(call: &Call) -> Reply {
    let reply = if call.key.ends_with('3') { Reply::not_found() } else { Reply::found(call) };
    reply.after(Duration::from_millis(5))
}

async fn bench() -> (Bench, KeyApi) {
    let bench = Bench::new().await;
    bench.insert(documents()).await;
    bench.create_index().await;
    let api = KeyApi::start(answer);
    bench.configure(&bench.config(&api));
    (bench, api)
}

async fn undisturbed() -> (BTreeMap<Vec<u8>, Document>, usize) {
    let (bench, api) = bench().await;
    bench.run(COMMAND).await.expect_exit(0);
    (bench.end_state(DOCS).await, api.count())
}

/// Kills at that point, each time it is reached for one more time, then lets the job finish.
async fn killed_at(point: &str, times: &[u64], wanted: &(BTreeMap<Vec<u8>, Document>, usize)) {
    let (bench, api) = bench().await;
    let mut kills = 0;
    for time in times {
        let run = bench.program(COMMAND).env("MONGOREKEY_CRASH_AT", &format!("{point}:{time}")).run().await;
        match run.exit {
            None => kills += 1,
            // Done before the point was reached that often.
            exit => assert_eq!(exit, Some(0), "{point}:{time}: {}", run.output()),
        }
    }
    assert!(kills > 0, "{point} was never reached");
    bench.run(COMMAND).await.expect_exit(0);
    assert!(bench.end_state(DOCS).await == wanted.0, "{point}: another end state after {kills} kills");
    let repeated = api.count() - wanted.1;
    assert!(repeated <= kills * CONCURRENCY, "{point}: {repeated} calls repeated after {kills} kills");
}

#[tokio::test]
async fn a_kill_at_any_point_changes_nothing_but_the_calls_in_flight() {
    let wanted = undisturbed().await;
    for point in POINTS {
        // A checkpoint is due every two seconds, the claim comes once in a run.
        let times: &[u64] = match point {
            "after_claim" => &[1, 1, 1],
            "after_checkpoint" => &[1, 1],
            _ => &[1, 2, 3, 7, 20, 60],
        };
        killed_at(point, times, &wanted).await;
    }
}

#[tokio::test]
async fn a_killed_worker_of_several_changes_nothing_either() {
    let wanted = undisturbed().await;
    let (bench, api) = bench().await;
    let mut kills = 0;
    for (point, time) in [("after_call", 40), ("after_key_map", 5), ("after_documents", 9)] {
        let run = bench
            .program(&format!("{COMMAND} --workers 3"))
            .env("MONGOREKEY_CRASH_AT", &format!("{point}:{time}"))
            .run()
            .await;
        kills += usize::from(run.exit.is_none());
    }
    assert!(kills > 0, "never killed");
    bench.run(&format!("{COMMAND} --workers 2")).await.expect_exit(0);
    assert!(bench.end_state(DOCS).await == wanted.0, "another end state after {kills} kills");
    let repeated = api.count() - wanted.1;
    assert!(repeated <= kills * 3 * CONCURRENCY, "{repeated} calls repeated after {kills} kills");
}
