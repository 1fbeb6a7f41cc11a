//! `rollback` after a swap: what was rejected comes back into the live collection beside the
//! application, by the writers' own journal, whenever the run is killed.

use bson::{Bson, Document, doc};

use crate::cleanse_live::RULE;
use crate::cleansing::{SOURCE, bytes, configure, job_name, run_when_near};
use crate::harness::{Bench, wait_for};
use crate::own_set::OwnSet;
use crate::program::Finished;
use crate::writers::{Cutover, Options, Writers, expect_live_after_rollback, is_valid};

const QUARANTINE: &str = "rejected";
const COPY: &str = "cleanse --parallel 2 --quarantine rejected";
const SWAP: &str = "cutover --mode swap --max-pause 10s --yes";
const ROLLBACK: &str = "rollback --yes";

/// A bench with a hundred documents, a third of which is rejected, cut over by a swap.
async fn swapped(indexes: &[Document]) -> Bench {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let documents = (0..100).map(|id| doc! {"_id": id, "valid": id % 3 != 0, "slot": format!("s{id}")});
    bench.insert_into(SOURCE, documents).await;
    if !indexes.is_empty() {
        let create = doc! {"createIndexes": SOURCE, "indexes": indexes.to_vec()};
        bench.database.run_command(create).await.expect("indexes");
    }
    bench.run(COPY).await.expect_exit(0);
    let done = bench.run(SWAP).await.expect_exit(0);
    let gates = done.json["gates"].as_array().expect("gates");
    assert!(gates.iter().any(|gate| gate["name"] == "verify quarantine"), "{}", done.stdout);
    bench
}

async fn rejected(bench: &Bench) -> u64 {
    let quarantine = bench.database.collection::<Document>(QUARANTINE);
    quarantine.count_documents(doc! {}).await.expect("a count")
}

#[tokio::test]
async fn what_a_swap_rejected_comes_back() {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let documents = (0..3_000).map(|id| doc! {"_id": id, "valid": id % 3 != 0, "x.y": {"$a": id}});
    bench.insert_into(SOURCE, documents).await;
    let before = bytes(&bench, SOURCE).await;
    bench.run(COPY).await.expect_exit(0);
    bench.run(SWAP).await.expect_exit(0);
    assert_eq!(bytes(&bench, SOURCE).await.len(), 2_000);
    let done = bench.run(ROLLBACK).await.expect_exit(0);
    assert_eq!((done.text("/command"), done.text("/outcome")), ("rollback", "rolled_back"));
    assert_eq!(done.number("/documents/restored"), 1_000, "{}", done.stdout);
    assert_eq!(bytes(&bench, SOURCE).await, before);
    // Once more changes nothing, also where something is deleted meanwhile.
    let live = bench.database.collection::<Document>(SOURCE);
    live.delete_one(doc! {"_id": 0}).await.expect("a write");
    let again = bench.run(ROLLBACK).await.expect_exit(0);
    assert_eq!(again.text("/outcome"), "rolled_back");
    assert_eq!(bytes(&bench, SOURCE).await.len(), 2_999);
}

/// What the application did since is newer: written anew, or written anew and deleted.
#[tokio::test]
async fn what_was_written_or_deleted_since_a_swap_stays_as_it_is() {
    let bench = swapped(&[]).await;
    let live = bench.database.collection::<Document>(SOURCE);
    live.insert_one(doc! {"_id": 0, "new": true}).await.expect("a write");
    live.insert_one(doc! {"_id": 3, "new": true}).await.expect("a write");
    live.delete_one(doc! {"_id": 3}).await.expect("a write");
    live.delete_one(doc! {"_id": 1}).await.expect("a write");
    let done = bench.run(ROLLBACK).await.expect_exit(0);
    assert_eq!(done.number("/documents/restored"), 32, "{}", done.stdout);
    assert_eq!(done.number("/documents/deleted_since"), 1, "{}", done.stdout);
    assert_eq!(done.json["kept"], serde_json::json!([{"$numberInt": "0"}]));
    let found = bench.documents(SOURCE).await;
    assert_eq!(found.len(), 98, "neither 1 nor 3");
    assert_eq!(found[0], doc! {"_id": 0, "new": true});
}

#[tokio::test]
async fn what_can_not_be_put_back_is_told_and_tried_again() {
    let unique = doc! {"key": {"slot": 1}, "name": "slot_1", "unique": true};
    let bench = swapped(&[unique]).await;
    let live = bench.database.collection::<Document>(SOURCE);
    live.insert_one(doc! {"_id": "thief", "slot": "s3"}).await.expect("a write");
    // Rejected documents are put back past a validator: the old collection had tolerated them.
    let strict = doc! {"collMod": SOURCE, "validator": {"valid": true}};
    bench.database.run_command(strict).await.expect("a validator");
    let done = bench.run(ROLLBACK).await.expect_exit(1);
    assert_eq!(done.text("/outcome"), "rolled_back");
    assert_eq!((done.number("/documents/restored"), done.number("/documents/not_restored")), (33, 1));
    let refused = &done.json["not_restored"][0];
    assert_eq!(refused["_id"], serde_json::json!({"$numberInt": "3"}));
    assert!(refused["reason"].as_str().is_some_and(|reason| reason.contains("slot_1")), "{}", done.stdout);
    live.delete_one(doc! {"_id": "thief"}).await.expect("a write");
    live.delete_one(doc! {"_id": 6}).await.expect("a write");
    bench.run(ROLLBACK).await.expect_exit(0);
    let found = bench.documents(SOURCE).await;
    assert_eq!(found.len(), 99, "3 is back, and 6, which the application has deleted, is not");
}

#[tokio::test]
async fn without_a_quarantine_or_with_another_one_nothing_is_touched() {
    let bench = swapped(&[]).await;
    let before = bytes(&bench, SOURCE).await;
    let refused = bench.run("rollback --discard-writes-since-cutover --yes").await.expect_exit(2);
    assert!(refused.stderr.contains("--mode keep"), "{}", refused.stderr);
    let jobs = bench.state.collection::<Document>("jobs");
    let (job, unverified) = (doc! {"_id": job_name(&bench)}, doc! {"$unset": {"quarantine_verified": 1}});
    jobs.update_one(job, unverified).await.expect("a write");
    let refused = bench.run(ROLLBACK).await.expect_exit(3);
    assert!(refused.stderr.contains("not verified"), "{}", refused.stderr);
    let quarantine = bench.database.collection::<Document>(QUARANTINE);
    quarantine.drop().await.expect("dropped");
    bench.run(ROLLBACK).await.expect_exit(3);
    bench.database.create_collection(QUARANTINE).await.expect("made");
    let refused = bench.run(ROLLBACK).await.expect_exit(3);
    assert!(refused.stderr.contains("is not what this job has made"), "{}", refused.stderr);
    assert_eq!(bytes(&bench, SOURCE).await, before);
}

#[tokio::test]
async fn a_quarantine_that_lacks_something_is_not_cut_over_by_a_swap() {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    bench.insert_into(SOURCE, (0..100).map(|id| doc! {"_id": id, "valid": id % 3 != 0})).await;
    bench.run(COPY).await.expect_exit(0);
    let quarantine = bench.database.collection::<Document>(QUARANTINE);
    for filter in [doc! {"_id": 0}, doc! {}] {
        quarantine.delete_many(filter).await.expect("a write");
        let refused = bench.run(SWAP).await.expect_exit(3);
        assert!(refused.stderr.contains("verify quarantine"), "{}", refused.stderr);
    }
    assert_eq!(bytes(&bench, SOURCE).await.len(), 100);
}

/// Where the oplog tells no more what was deleted, that is told.
#[tokio::test]
async fn without_the_oplog_since_the_swap_everything_comes_back() {
    let bench = swapped(&[]).await;
    let live = bench.database.collection::<Document>(SOURCE);
    live.insert_one(doc! {"_id": 3, "new": true}).await.expect("a write");
    live.delete_one(doc! {"_id": 3}).await.expect("a write");
    let jobs = bench.state.collection::<Document>("jobs");
    let lost = doc! {"$unset": {"feed_back": ""}};
    jobs.update_one(doc! {"_id": job_name(&bench)}, lost).await.expect("a write");
    let done = bench.run(ROLLBACK).await.expect_exit(0);
    assert_eq!(done.json["deletes_known"], false, "{}", done.stdout);
    assert!(done.stderr.contains("no longer tells"), "{}", done.stderr);
    assert_eq!(bytes(&bench, SOURCE).await.len(), 100);
}

/// Deletes are let through until the very rename: what was deleted then is not brought back.
#[tokio::test]
async fn what_was_deleted_at_the_last_moment_of_a_swap_stays_away() {
    let set = OwnSet::start(&[]);
    let bench = Bench::on(&set.uri).await;
    configure(&bench, RULE);
    bench.insert_into(SOURCE, (0..100).map(|id| doc! {"_id": id, "valid": id % 3 != 0})).await;
    bench.run(COPY).await.expect_exit(0);
    let slow = doc! {"failCommands": ["renameCollection"], "blockConnection": true, "blockTimeMS": 3_000};
    // Not the one that gives the copy the name of the attempt.
    let second = doc! {"configureFailPoint": "failCommand", "mode": {"skip": 1}, "data": slow};
    bench.admin().run_command(second).await.expect("the fail point");
    let mut run = bench.program(SWAP).spawn();
    wait_for("the last moment", async || {
        assert!(run.is_running(), "{}", run.stderr());
        let job = bench.job(&job_name(&bench)).await.expect("the job");
        job.get_document("cutover")
            .is_ok_and(|record| record.get_str("state").is_ok_and(|is| is == "renaming"))
    })
    .await;
    let source = bench.database.collection::<Document>(SOURCE);
    source.delete_many(doc! {"_id": {"$in": [0, 1]}}).await.expect("deletes are let through");
    let done = run.finish().await.expect_exit(0);
    assert_eq!(done.number("/residual_deletes"), 2, "{}", done.stdout);
    assert_eq!(rejected(&bench).await, 33);
    bench.run(ROLLBACK).await.expect_exit(0);
    let found = bench.documents(SOURCE).await;
    assert_eq!((found.len(), found[0].get_i32("_id").ok()), (98, Some(2)));
}

/// Rejected documents that the writers know nothing about: what becomes of them is not left to chance.
const PROBES: i32 = 20;

fn probe(number: i32, valid: bool) -> Document {
    doc! {"_id": format!("probe-{number}"), "valid": valid, "slot": format!("probe-{number}")}
}

/// A bench under writers that was cut over by a swap. Of the probes all were written anew since, and
/// half of them deleted again.
async fn swapped_live(documents: i32) -> (Bench, Writers) {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let cutover = Cutover::AndRollback(is_valid);
    let options = Options { documents, cutover, target_rate: 400, ..Options::default() };
    let writers = Writers::on(&bench, SOURCE, options).await;
    bench.insert_into(SOURCE, (0..PROBES).map(|number| probe(number, false))).await;
    bench.run(COPY).await.expect_exit(0);
    run_when_near(&bench, SWAP, None).await.expect_exit(0);
    bench.insert_into(SOURCE, (0..PROBES).map(|number| probe(number, true))).await;
    let half: Vec<String> = (0..PROBES / 2).map(|number| format!("probe-{number}")).collect();
    let live = bench.database.collection::<Document>(SOURCE);
    live.delete_many(doc! {"_id": {"$in": half}}).await.expect("a write");
    writers.go_on_for(200).await;
    (bench, writers)
}

/// The probes are as they were left; they go, for the journal knows nothing of them.
async fn expect_probes(bench: &Bench) {
    let live = bench.database.collection::<Document>(SOURCE);
    let probes = doc! {"_id": {"$regex": "^probe-"}};
    let left = live.count_documents(doc! {"$and": [&probes, {"valid": true}]}).await.expect("a count");
    let all = live.delete_many(probes).await.expect("a write").deleted_count;
    assert_eq!((all, left), (10, 10), "half were deleted, the others are newer than what was rejected");
}

/// The rollback is done, and tells what became of every document of the quarantine.
async fn expect_rolled_back(bench: &Bench, done: &Finished) -> Vec<Bson> {
    let refused = done.json["not_restored"].as_array().expect("a list");
    assert_eq!(done.exit, Some(i32::from(!refused.is_empty())), "{}", done.output());
    assert_eq!(done.text("/outcome"), "rolled_back");
    let counts = ["restored", "kept", "deleted_since", "not_restored"];
    let sum: u64 = counts.iter().map(|name| done.number(&format!("/documents/{name}"))).sum();
    assert_eq!(sum, rejected(bench).await);
    // A value that another document has by now, and nothing else.
    assert!(refused.iter().all(|refusal| refusal["reason"].to_string().contains("slot_1")), "{refused:?}");
    refused.iter().map(|refusal| Bson::try_from(refusal["_id"].clone()).expect("an _id")).collect()
}

async fn expect_nothing_lost(bench: &Bench, writers: Writers, done: &Finished) {
    let stays_away = expect_rolled_back(bench, done).await;
    expect_probes(bench).await;
    writers.go_on_for(250).await;
    let journal = writers.stop().await;
    expect_live_after_rollback(bench, SOURCE, &journal, &stays_away).await;
}

#[tokio::test]
async fn a_rollback_after_a_swap_loses_no_write() {
    let (bench, writers) = swapped_live(6_000).await;
    let done = bench.run(ROLLBACK).await;
    let count = |name: &str| done.number(&format!("/documents/{name}"));
    assert!(count("restored") > 1_000, "{}", done.stdout);
    assert!(count("kept") >= 10 && count("deleted_since") >= 10, "{}", done.stdout);
    expect_nothing_lost(&bench, writers, &done).await;
}

#[tokio::test]
async fn a_rollback_after_a_swap_that_is_killed_at_every_boundary_loses_nothing() {
    let (bench, writers) = swapped_live(6_000).await;
    for point in
        ["restore_put:1", "restore_saved:1", "restore_put:1", "restore_saved:1", "restore_complete:1"]
    {
        let killed = bench.program(ROLLBACK).env("MONGOREKEY_CRASH_AT", point).run().await;
        assert_eq!(killed.exit, None, "{point}: {}", killed.output());
        writers.go_on_for(200).await;
    }
    let done = bench.run(ROLLBACK).await;
    expect_nothing_lost(&bench, writers, &done).await;
}
