//! A wrong flag is a disaster: when flags are written, and when never.

use std::time::Duration;

use bson::doc;

use crate::harness::{Bench, wait_for};
use crate::key_api::{Call, KeyApi, Reply};
use crate::program::Signal;

fn nothing_found(_: &Call) -> Reply {
    Reply::not_found().after(Duration::from_millis(20))
}

/// After the API was mended, the same command fills all that a guard had saved.
async fn expect_filled_once_mended(bench: &Bench, api: &KeyApi, documents: u64) {
    assert_eq!(bench.flagged().await, 0, "a wrong flag");
    api.change(Reply::found);
    let run = bench.run("backfill --tps 5000").await.expect_exit(0);
    run.expect_documents(&[("candidates", documents), ("filled", documents)]);
    assert_eq!((bench.filled().await, bench.flagged().await), (documents, 0));
}

#[tokio::test]
async fn an_api_that_knows_no_key_stops_the_job_without_a_flag() {
    let bench = Bench::with_docs(300).await;
    let api = KeyApi::start(nothing_found);
    bench.configure(&bench.config(&api));
    let run = bench.run("backfill --tps 5000 --concurrency 8").await.expect_exit(4);
    assert_eq!(run.text("/status"), "stopped");
    run.expect_documents(&[("candidates", 300), ("candidates_left", 300)]);
    assert!((100..=108).contains(&api.count()), "it was stopped after {} calls", api.count());
    expect_filled_once_mended(&bench, &api, 300).await;
}

#[tokio::test]
async fn a_key_that_is_not_found_in_mid_run_stops_the_job_too() {
    let bench = Bench::with_docs(800).await;
    let api = KeyApi::start(|call| if call.number < 200 { Reply::found(call) } else { Reply::not_found() });
    bench.configure(&bench.config(&api));
    bench.run("backfill --tps 5000 --concurrency 8").await.expect_exit(4);
    // 200 of 400 is the limit itself.
    assert!((400..=410).contains(&api.count()), "it was stopped after {} calls", api.count());
    assert!(bench.flagged().await <= 201);
    assert_eq!(bench.filled().await, 200);
}

#[tokio::test]
async fn too_few_answers_for_a_verdict_are_flagged_with_a_warning() {
    let bench = Bench::with_docs(60).await;
    let api = KeyApi::start(nothing_found);
    bench.configure(&bench.config(&api));
    let run = bench.run("backfill --tps 5000").await.expect_exit(0);
    run.expect_documents(&[("candidates", 60), ("flagged", 60)]);
    assert!(run.stderr.contains("60 of 60"), "{}", run.stderr);
    assert_eq!(bench.flagged().await, 60);

    let again = bench.run("backfill --tps 5000").await.expect_exit(0);
    again.expect_documents(&[]);
    again.expect_calls(0);
    assert_eq!(api.count(), 60, "what is flagged is not asked for again");
}

/// The guard counts answers, and there never are enough: what waits for it does not grow with the
/// documents.
#[tokio::test]
async fn few_keys_of_many_documents_are_flagged_in_one_run() {
    const DOCUMENTS: i32 = 45_000;
    let bench = Bench::new().await;
    bench.insert((0..DOCUMENTS).map(|id| doc! {"_id": id, "legacyKey": format!("S{}", id % 5)})).await;
    bench.create_index().await;
    let api = KeyApi::start(nothing_found);
    bench.configure(&bench.config(&api));
    let run = bench.run("backfill --tps 5000").await.expect_exit(0);
    run.expect_documents(&[("candidates", 45_000), ("flagged", 45_000)]);
    run.expect_calls(5);
    assert!(run.stderr.contains("5 of 5"), "{}", run.stderr);
    assert_eq!(bench.flagged().await, 45_000);
}

#[tokio::test]
async fn flags_wait_for_the_hundredth_answer() {
    let bench = Bench::with_docs(300).await;
    let api =
        KeyApi::start(|call| if call.number % 5 == 0 { Reply::not_found() } else { Reply::found(call) });
    bench.configure(&bench.config(&api));
    let run = bench.program("backfill --tps 100 --concurrency 2").spawn();
    wait_for("keys to be written", async || bench.filled().await >= 60).await;
    assert!(api.count() < 98, "too late to tell: {}", api.count());
    assert_eq!(bench.flagged().await, 0);
    let run = run.finish().await.expect_exit(0);
    run.expect_documents(&[("candidates", 300), ("filled", 240), ("flagged", 60)]);
}

#[tokio::test]
async fn the_guard_remembers_over_a_kill_before_its_verdict() {
    let bench = Bench::with_docs(300).await;
    let api = KeyApi::start(nothing_found);
    bench.configure(&bench.config(&api));
    let run = bench.program("backfill --tps 200 --concurrency 4").spawn();
    wait_for("calls", async || api.count() >= 60).await;
    run.kill();
    assert_eq!(bench.flagged().await, 0);
    assert!(api.count() < 100, "too late to tell: {}", api.count());
    bench.run("backfill --tps 200 --concurrency 4").await.expect_exit(4);
    assert!((100..=108).contains(&api.count()), "it was stopped after {} calls", api.count());
    expect_filled_once_mended(&bench, &api, 300).await;
}

#[tokio::test]
async fn a_field_without_usable_keys_stops_the_job_without_a_flag_or_call() {
    let bench = Bench::with_docs(300).await;
    let api = KeyApi::finding();
    let wrong = bench.config(&api).no_targets().target(
        "docs",
        &bench.namespace("docs"),
        ["legacykey", "newKey", "newKeyFlag"],
    );
    bench.configure(&wrong);
    let before = bench.documents("docs").await;
    bench.run("backfill --tps 5000 --job mistyped").await.expect_exit(4);
    assert_eq!(bench.documents("docs").await, before);
    assert_eq!(api.count(), 0);

    bench.configure(&bench.config(&api));
    bench.run("backfill --tps 5000").await.expect_exit(0);
    assert_eq!((bench.filled().await, bench.flagged().await), (300, 0));
}

#[tokio::test]
async fn a_share_that_is_allowed_is_flagged() {
    let bench = Bench::new().await;
    let documents = (0..400).map(|id| match id % 4 {
        0 => doc! {"_id": id, "legacyKey": format!("K{id}")},
        1 => doc! {"_id": id, "legacyKey": ""},
        2 => doc! {"_id": id, "legacyKey": ["K1", "K2"]},
        _ => doc! {"_id": id, "legacyKey": {"a": 1}},
    });
    bench.insert(documents).await;
    bench.create_index().await;
    let api = KeyApi::start(|_| Reply::not_found());
    let config = bench.config(&api).backfill("max_not_found_share = 1.0");
    bench.configure(&config.clone().backfill("max_no_legacy_key_share = 0.7"));
    bench.run("backfill --tps 5000").await.expect_exit(4);
    assert_eq!(bench.flagged().await, 0);
    bench.configure(&config.backfill("max_no_legacy_key_share = 0.8"));
    let run = bench.run("backfill --tps 5000").await.expect_exit(0);
    run.expect_documents(&[("candidates", 400), ("flagged", 400)]);
    assert_eq!(bench.count(doc! {"newKeyFlag.reason": "no_legacy_key"}).await, 300);
    assert_eq!(bench.count(doc! {"newKeyFlag.reason": "not_found"}).await, 100);
}

#[tokio::test]
async fn an_interrupt_before_the_verdict_writes_no_flag() {
    let bench = Bench::with_docs(300).await;
    let api = KeyApi::start(nothing_found);
    bench.configure(&bench.config(&api));
    let run = bench.program("backfill --tps 100 --concurrency 4").spawn();
    wait_for("calls", async || api.count() >= 40).await;
    run.signal(Signal::Interrupt);
    run.finish().await.expect_exit(130);
    assert!(api.count() < 100, "too late to tell: {}", api.count());
    assert_eq!(
        bench.flagged().await,
        0,
        "somebody who sees that all goes wrong and presses Ctrl-C gets flags"
    );
}

#[tokio::test]
async fn an_answer_counts_once_however_many_documents_wait_for_it() {
    let bench = Bench::new().await;
    // Two of seven keys are not found. Ten chunks in a row hold the same seven keys.
    let id = |key: i32, copy: i32| (key / 7) * 70 + copy * 7 + key % 7;
    bench
        .insert((0..210).flat_map(|key| {
            (0..10).map(move |copy| doc! {"_id": id(key, copy), "legacyKey": format!("{}-{key}", key % 7)})
        }))
        .await;
    bench.create_index().await;
    let api = KeyApi::start(|call| {
        if call.key.starts_with("0-") || call.key.starts_with("1-") {
            Reply::not_found()
        } else {
            Reply::found(call)
        }
    });
    bench.configure(&bench.config(&api));
    let run = bench.run("backfill --tps 5000 --chunk 7 --concurrency 4").await.expect_exit(0);
    run.expect_documents(&[("candidates", 2100), ("filled", 1500), ("flagged", 600)]);
    run.expect_calls(210);
}

/// What an early end leaves unjudged is the answers that say no: they alone are no fair sample.
#[tokio::test]
async fn runs_that_end_early_do_not_add_up_to_a_false_alarm() {
    let bench = Bench::with_docs(1500).await;
    let one_in_ten =
        |call: &Call| if call.key.ends_with('7') { Reply::not_found() } else { Reply::found(call) };
    let api = KeyApi::start(one_in_ten);
    bench.configure(&bench.config(&api));
    for _ in 0..20 {
        let before = api.count();
        let run = bench.program("backfill --tps 200 --concurrency 4").spawn();
        wait_for("some calls", async || api.count() >= before + 40).await;
        run.signal(Signal::Terminate);
        run.finish().await.expect_exit(143);
    }
    bench.run("backfill --tps 5000").await.expect_exit(0);
    assert_eq!((bench.filled().await, bench.flagged().await), (1350, 150));
    assert_eq!(api.count(), 1500, "no key is asked for twice");
}

#[tokio::test]
async fn a_limit_counts_documents_whose_flag_is_held_back() {
    let bench = Bench::with_docs(40).await;
    bench
        .docs()
        .update_many(doc! {"_id": {"$in": [3, 4]}}, doc! {"$unset": {"legacyKey": 1}})
        .await
        .expect("set");
    let api = KeyApi::start(|call| if call.key == "K2" { Reply::not_found() } else { Reply::found(call) });
    bench.configure(&bench.config(&api));
    for settled in [6, 12] {
        bench.run("backfill --tps 1000 --limit 6").await.expect_exit(0);
        assert_eq!(bench.filled().await + bench.flagged().await, settled);
    }
    assert_eq!((bench.flagged().await, api.count()), (3, 10));
}
