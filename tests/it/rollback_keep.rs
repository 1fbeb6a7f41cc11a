//! `rollback` after a keep, and `cutover --feed-back` before it, under writers with a journal: all
//! documents are back, with what was written since.

use std::time::Duration;

use bson::{Bson, Document, doc};
use mongodb::Collection;

use crate::cleanse_live::RULE;
use crate::cleansing::{SOURCE, bytes, configure, job_name, run_when_near};
use crate::harness::{Bench, wait_for};
use crate::own_set::OwnSet;
use crate::program::{Finished, Running, Signal};
use crate::writers::{Cutover, Options, Writers, expect_live_after_rollback, is_valid};

const KEEP: &str = "cutover --mode keep --max-pause 10s --yes";
const FEED_BACK: &str = "cutover --mode keep --feed-back --max-pause 10s --yes";
const ROLLBACK: &str = "rollback --max-pause 10s --yes";

/// A bench under writers that was copied.
async fn copied(documents: i32) -> (Bench, Writers) {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let cutover = Cutover::AndRollback(is_valid);
    let options = Options { documents, cutover, target_rate: 400, ..Options::default() };
    let writers = Writers::on(&bench, SOURCE, options).await;
    bench.run("cleanse --parallel 2").await.expect_exit(0);
    (bench, writers)
}

fn kept_name(bench: &Bench) -> String {
    format!("{SOURCE}_before_{}", job_name(bench))
}

/// The rollback is done; returns the documents that are told to have given way, each of which is kept.
async fn expect_rolled_back(bench: &Bench, done: &Finished) -> Vec<Bson> {
    let displaced = done.json["displaced"].as_array().expect("a list");
    assert_eq!(done.exit, Some(i32::from(!displaced.is_empty())), "{}", done.output());
    assert_eq!(done.text("/outcome"), "rolled_back");
    let kept: Collection<Document> = bench.state.collection("displaced");
    let mut ids = Vec::new();
    for id in displaced {
        let id = Bson::try_from(id.clone()).expect("an _id");
        let kept = kept.find_one(doc! {"_id": {"job": job_name(bench), "id": &id}}).await;
        assert!(kept.expect("a read").is_some_and(|kept| kept.contains_key("document")), "{id}");
        ids.push(id);
    }
    ids
}

async fn expect_nothing_lost(bench: &Bench, writers: Writers, done: &Finished) {
    let stays_away = expect_rolled_back(bench, done).await;
    let journal = writers.stop().await;
    expect_live_after_rollback(bench, SOURCE, &journal, &stays_away).await;
}

async fn wait_until_fed_back(run: &mut Running) {
    wait_for("the feed back", async || {
        assert!(run.is_running(), "{}", run.stderr());
        run.stderr().contains("is up to date and follows")
    })
    .await;
}

#[tokio::test]
async fn a_rollback_after_a_keep_loses_no_write() {
    let (bench, writers) = copied(8_000).await;
    run_when_near(&bench, KEEP, None).await.expect_exit(0);
    writers.go_on_for(250).await;
    let done = run_when_near(&bench, ROLLBACK, None).await;
    writers.go_on_for(500).await;
    expect_nothing_lost(&bench, writers, &done).await;
}

#[tokio::test]
async fn a_rollback_after_a_keep_that_is_killed_loses_no_write() {
    let (bench, writers) = copied(4_000).await;
    // Something has to give way, whatever the writers do: these two hold the same value.
    bench.insert_into(SOURCE, [doc! {"_id": "old", "valid": false, "slot": "wanted"}]).await;
    run_when_near(&bench, KEEP, None).await.expect_exit(0);
    bench.insert_into(SOURCE, [doc! {"_id": "new", "valid": true, "slot": "wanted"}]).await;
    for point in ["displaced_kept:1", "cutover_fenced:1", "cutover_renamed:1"] {
        writers.go_on_for(500).await;
        let killed = run_when_near(&bench, ROLLBACK, Some(point)).await;
        assert_eq!(killed.exit, None, "{point}: {}", killed.output());
    }
    let done = run_when_near(&bench, ROLLBACK, None).await;
    assert!(
        done.json["displaced"].as_array().is_some_and(|all| all.contains(&"old".into())),
        "{}",
        done.stdout
    );
    let live: Collection<Document> = bench.database.collection(SOURCE);
    let deleted = live.delete_many(doc! {"slot": "wanted"}).await.expect("a delete");
    assert_eq!(deleted.deleted_count, 1, "the newer one stays");
    writers.go_on_for(500).await;
    expect_nothing_lost(&bench, writers, &done).await;
}

/// A rejected document of the old collection holds a value that a new document has by now: it is
/// kept, and comes back once the value is free.
#[tokio::test]
async fn what_gives_way_on_the_way_back_is_kept_and_comes_back_where_it_can() {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let documents = (0..30).map(|id| doc! {"_id": id, "valid": id % 3 != 0, "slot": format!("s{id}")});
    bench.insert_into(SOURCE, documents).await;
    let unique = doc! {"key": {"slot": 1}, "name": "slot_1", "unique": true};
    let create = doc! {"createIndexes": SOURCE, "indexes": [unique]};
    bench.database.run_command(create).await.expect("an index");
    bench.run("cleanse").await.expect_exit(0);
    let mut run = bench.program(FEED_BACK).spawn();
    wait_until_fed_back(&mut run).await;
    let live: Collection<Document> = bench.database.collection(SOURCE);
    let old: Collection<Document> = bench.database.collection(&kept_name(&bench));
    // The first goes on, the second stays, the third is written anew itself.
    for (id, slot) in [("a", "s0"), ("b", "s3"), ("c", "s6")] {
        live.insert_one(doc! {"_id": id, "slot": slot}).await.expect("a write");
    }
    wait_for("the three of them", async || {
        old.count_documents(doc! {"_id": {"$type": "string"}}).await.expect("a count") == 3
    })
    .await;
    assert_eq!(old.count_documents(doc! {}).await.expect("a count"), 30);
    live.update_one(doc! {"_id": "a"}, doc! {"$set": {"slot": "moved"}}).await.expect("a write");
    live.insert_one(doc! {"_id": 6, "slot": "other"}).await.expect("a write");
    live.delete_one(doc! {"_id": 6}).await.expect("a write");
    let done = bench.run(ROLLBACK).await.expect_exit(1);
    run.finish().await.expect_exit(143);
    assert_eq!(done.json["displaced"], serde_json::json!([{"$numberInt": "3"}]), "{}", done.stdout);
    let found = bench.documents(SOURCE).await;
    let there = |id: i32| found.iter().any(|document| document.get_i32("_id").is_ok_and(|found| found == id));
    assert!(there(0) && !there(3) && !there(6), "{found:?}");
    assert_eq!(found.len(), 31);
    assert_eq!(bench.run(ROLLBACK).await.expect_exit(1).text("/outcome"), "rolled_back");
}

/// What a rollback would have done without is not lost by an attempt, and neither is
/// what the job tells of the cutover.
#[tokio::test]
async fn a_rollback_that_was_given_up_changes_nothing() {
    // A keep waits for the transaction with the whole server locked.
    let set = OwnSet::start(&[]);
    let bench = Bench::on(&set.uri).await;
    configure(&bench, RULE);
    bench.insert_into(SOURCE, (0..20).map(|id| doc! {"_id": id, "valid": true})).await;
    bench.run("cleanse").await.expect_exit(0);
    bench.run(KEEP).await.expect_exit(0);
    let live: Collection<Document> = bench.database.collection(SOURCE);
    live.insert_one(doc! {"_id": "new", "valid": true}).await.expect("a write");
    let record = async || {
        let job = bench.job(&job_name(&bench)).await.expect("a job");
        job.get_document("cutover").expect("a record").clone()
    };
    let before = record().await;
    let client = crate::harness::connect(&bench.uri).await;
    let mut session = client.start_session().await.expect("a session");
    session.start_transaction().await.expect("a transaction");
    let touched = client.database(bench.database.name()).collection::<Document>(SOURCE);
    let update = touched.update_one(doc! {"_id": 1}, doc! {"$set": {"touched": true}});
    update.session(&mut session).await.expect("a write");
    let without = "rollback --max-pause 300ms --discard-writes-since-cutover --yes";
    let given_up = bench.run(without).await.expect_exit(1);
    assert_eq!(given_up.text("/outcome"), "given_up", "{}", given_up.stdout);
    session.abort_transaction().await.expect("an end");
    assert_eq!(record().await, before);
    // The same command as before knows what was done.
    let again = bench.run(KEEP).await.expect_exit(0);
    assert_eq!(again.text("/outcome"), "cut_over", "{}", again.stdout);
    bench.run(ROLLBACK).await.expect_exit(0);
    assert!(live.find_one(doc! {"_id": "new"}).await.expect("a read").is_some(), "it was brought back");
}

#[tokio::test]
async fn what_is_fed_back_is_in_the_old_collection_and_a_rollback_takes_over() {
    let (bench, writers) = copied(6_000).await;
    let mut run = bench.program(FEED_BACK).spawn();
    wait_until_fed_back(&mut run).await;
    writers.go_on_for(250).await;
    // One that is stopped goes on where it was, and a killed one too.
    run.signal(Signal::Terminate);
    let stopped = run.finish().await.expect_exit(143);
    assert_eq!(stopped.text("/outcome"), "cut_over", "{}", stopped.stdout);
    assert!(stopped.number("/feed_back/changes") > 0);
    writers.go_on_for(500).await;
    let killed = bench.program(FEED_BACK).env("MONGOREKEY_CRASH_AT", "changes_applied:3").run().await;
    assert_eq!(killed.exit, None, "{}", killed.output());
    let mut run = bench.program(FEED_BACK).spawn();
    wait_until_fed_back(&mut run).await;
    let refused = bench.run(FEED_BACK).await.expect_exit(3);
    assert!(refused.stderr.contains("is being run by"), "{}", refused.stderr);
    writers.go_on_for(500).await;
    let done = run_when_near(&bench, ROLLBACK, None).await;
    run.finish().await.expect_exit(143);
    writers.go_on_for(500).await;
    expect_nothing_lost(&bench, writers, &done).await;
}

/// What the oplog holds by the time of the rollback does not matter.
#[tokio::test]
async fn what_is_fed_back_is_not_asked_of_the_oplog_again() {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    bench.insert_into(SOURCE, (0..100).map(|id| doc! {"_id": id, "valid": id % 3 != 0})).await;
    bench.run("cleanse").await.expect_exit(0);
    let mut run = bench.program(FEED_BACK).spawn();
    wait_until_fed_back(&mut run).await;
    let position = async || {
        let job = bench.job(&job_name(&bench)).await.expect("the job");
        job.get_document("feed_back").expect("a position").clone()
    };
    let before = position().await;
    let live: Collection<Document> = bench.database.collection(SOURCE);
    live.insert_one(doc! {"_id": "new"}).await.expect("a write");
    live.delete_one(doc! {"_id": 1}).await.expect("a write");
    let old = kept_name(&bench);
    wait_for("the old collection", async || bytes(&bench, &old).await.len() == 100).await;
    wait_for("the position", async || position().await != before).await;
    let paused = bench.run(&format!("control {} pause", job_name(&bench))).await;
    paused.expect_exit(0);
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    live.insert_one(doc! {"_id": "later"}).await.expect("a write");
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(bytes(&bench, &old).await.len(), 100, "paused");
    bench.run(&format!("control {} resume", job_name(&bench))).await.expect_exit(0);
    wait_for("the old collection", async || bytes(&bench, &old).await.len() == 101).await;
    bench.run(&format!("control {} stop", job_name(&bench))).await.expect_exit(0);
    let stopped = run.finish().await.expect_exit(143);
    assert!(stopped.stderr.contains("control"), "{}", stopped.stderr);
    bench.run(ROLLBACK).await.expect_exit(0);
    assert_eq!(bytes(&bench, SOURCE).await.len(), 101);
}
