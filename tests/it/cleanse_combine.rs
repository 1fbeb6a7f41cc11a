//! Options and rules together: what does not go with each other is refused before
//! anything is touched, and the rest of them keep to what each by itself promises.

use std::time::{Duration, Instant};

use bson::doc;

use crate::cleansing::{SOURCE, TARGET, configure, job_name};
use crate::harness::{Bench, wait_for};
use crate::program::Signal;

const DEDUPE: &str = "dedupe = { by = ['k'], keep_latest = 'at' }";

fn exists_in(bench: &Bench) -> String {
    let members = bench.namespace("members");
    format!("exists_in = [{{ name = 'stranger', collection = '{members}', local = 'k', foreign = '_id' }}]")
}

async fn seeded() -> Bench {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..20).map(|n| doc! {"_id": n, "k": n % 5, "at": n})).await;
    bench.insert_into("members", (0..3).map(|n| doc! {"_id": n})).await;
    bench
}

async fn expect_untouched(bench: &Bench) {
    let names = bench.database.list_collection_names().await.expect("names");
    assert!(names.iter().all(|name| name == SOURCE || name == "members"), "{names:?}");
    assert!(!bench.has_state().await);
}

#[tokio::test]
async fn rules_that_look_elsewhere_go_with_neither_quarantine_nor_dual_write() {
    let bench = seeded().await;
    for rules in [DEDUPE.to_owned(), exists_in(&bench)] {
        configure(&bench, &rules);
        for command in [
            "cleanse --quarantine rejected",
            "cleanse --quarantine rejected --dry-run",
            "cleanse --dual-write",
            "verify --dual-write --for 1s",
        ] {
            let run = bench.run(command).await.expect_exit(2);
            assert!(run.text("/error/message").contains("`exists_in` and `dedupe`"), "{command}");
        }
        expect_untouched(&bench).await;
    }
}

#[tokio::test]
async fn what_follows_nothing_or_writes_elsewhere_goes_with_nothing_else() {
    let bench = seeded().await;
    configure(&bench, "");
    for command in [
        "cleanse --method out --quarantine rejected",
        "cleanse --method out --dual-write",
        "cleanse --dual-write --quarantine rejected",
        "cleanse --dual-write --follow",
    ] {
        bench.run(command).await.expect_exit(2);
    }
    expect_untouched(&bench).await;
}

#[tokio::test]
async fn a_quarantine_is_not_verified_by_rules_that_it_was_not_made_by() {
    let bench = seeded().await;
    configure(&bench, "keep = '{\"k\": {\"$lt\": 3}}'");
    let run = bench.run("cleanse --quarantine rejected --count-rules").await.expect_exit(0);
    assert_eq!(run.json["ledger"]["quarantined"], 8);
    assert_eq!(run.json["ledger"]["balanced"], true);
    configure(&bench, DEDUPE);
    for command in ["verify", "verify --full"] {
        let run = bench.run(command).await.expect_exit(2);
        assert!(run.text("/error/message").contains("quarantine"), "{command}");
    }
    assert_eq!(bench.documents(TARGET).await.len(), 12);
}

#[tokio::test]
async fn one_shot_copies_by_rules_that_look_elsewhere() {
    let bench = seeded().await;
    configure(&bench, &format!("{}\n{DEDUPE}", exists_in(&bench)));
    let run = bench.run("cleanse --method out --count-rules").await.expect_exit(0);
    assert_eq!(run.json["ledger"]["balanced"], true);
    let ids: Vec<i32> = bench
        .documents(TARGET)
        .await
        .iter()
        .map(|document| document.get_i32("_id").expect("a number"))
        .collect();
    assert_eq!(ids, [15, 16, 17]);
    bench.run("verify").await.expect_exit(0);
}

#[tokio::test]
async fn members_that_come_during_a_pause_bring_their_documents_after_it() {
    let bench = seeded().await;
    configure(&bench, &exists_in(&bench));
    let job = job_name(&bench);
    let run = bench.program("cleanse --follow").spawn();
    wait_for("the copy", async || run.stderr().contains("follows")).await;
    let copied = async || bench.documents(TARGET).await.len();
    assert_eq!(copied().await, 12);
    bench.run(&format!("control {job} pause")).await.expect_exit(0);
    wait_for("the pause", async || bench.limited_by(&job).await == "paused").await;
    bench.insert_into("members", [doc! {"_id": 3}]).await;
    let noted = bench.state.collection::<bson::Document>("members");
    wait_for("the note", async || noted.count_documents(doc! {}).await.expect("a count") > 0).await;
    assert_eq!(copied().await, 12, "applied during the pause");
    bench.run(&format!("control {job} resume")).await.expect_exit(0);
    wait_for("the documents", async || copied().await == 16).await;
    bench.run(&format!("control {job} stop")).await.expect_exit(0);
    run.finish().await.expect_exit(143);
    assert_eq!(noted.count_documents(doc! {}).await.expect("a count"), 0);
}

#[tokio::test]
async fn documents_that_a_member_brings_keep_to_the_limit() {
    let bench = seeded().await;
    bench.insert_into(SOURCE, (100..2_100).map(|n| doc! {"_id": n, "k": 4, "at": n})).await;
    configure(&bench, &exists_in(&bench));
    let run = bench.program("cleanse --follow --documents-per-second 1000").spawn();
    wait_for("the copy", async || run.stderr().contains("follows")).await;
    let begun = Instant::now();
    bench.insert_into("members", [doc! {"_id": 4}]).await;
    wait_for("the documents", async || bench.documents(TARGET).await.len() == 2_016).await;
    assert!(begun.elapsed() > Duration::from_millis(1_800), "{:?}", begun.elapsed());
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
}

#[tokio::test]
async fn a_copy_beside_dual_writes_keeps_to_the_limit() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..600).map(|n| doc! {"_id": n})).await;
    configure(&bench, "");
    let begun = Instant::now();
    bench.run("cleanse --dual-write --grace 100ms --documents-per-second 200").await.expect_exit(0);
    assert!(begun.elapsed() > Duration::from_millis(1_900), "{:?}", begun.elapsed());
    assert_eq!(bench.documents(TARGET).await, bench.documents(SOURCE).await);
}
