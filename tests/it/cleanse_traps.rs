//! What is known to go wrong when a collection is copied while it is written to, one test each:
//! deleted documents that come back, documents that pass in and out of the rule, changes that are
//! seen twice or can no longer be seen.

use bson::{Bson, Document, RawDocumentBuf, doc, rawdoc};
use mongodb::Collection;

use crate::cleanse_kill::{INSERTS, start_and_block};
use crate::cleanse_live::{RULE, expect_target, live, wait_until_in_step};
use crate::cleansing::{
    FailPoint, SOURCE, TARGET, assert_same, bytes, bytes_where, configure, delicate, every_type, ids,
    insert_raw, job_name, store_exactly, zero_timestamps,
};
use crate::harness::{Bench, wait_for};
use crate::program::Signal;
use crate::writers::{Options, Writers, expect_collection_equals, is_valid};

const COMMAND: &str = "cleanse --parallel 2";
/// The largest document that the server stores.
const LARGEST: usize = 16 * 1024 * 1024;

async fn bench(documents: i32) -> Bench {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let all = (0..documents).map(|id| doc! {"_id": id, "valid": id % 2 == 0, "n": 0});
    bench.insert_into(SOURCE, all).await;
    bench
}

fn source(bench: &Bench) -> Collection<Document> {
    bench.database.collection(SOURCE)
}

async fn jobs(bench: &Bench, update: Document) {
    let jobs: Collection<Document> = bench.state.collection("jobs");
    jobs.update_one(doc! {"_id": job_name(bench)}, update).await.expect("a write");
}

async fn expect_in_step(bench: &Bench) {
    assert_same(&bytes(bench, TARGET).await, &bytes_where(bench, SOURCE, doc! {"valid": true}).await);
}

/// The copy has read documents and not yet written them: whatever befalls them in that moment, it
/// is not the copy that has the last word.
#[tokio::test]
async fn what_befalls_documents_between_their_copy_being_read_and_written_is_not_lost() {
    let bench = bench(3_000).await;
    let inserts = FailPoint::reserve(INSERTS);
    let run = start_and_block(&bench, &inserts, true).await;
    let source = source(&bench);
    // Deleted; deleted and back; out of the rule; into it; out of it and back; changed.
    source.delete_many(doc! {"_id": {"$mod": [20, 0]}}).await.expect("a write");
    source.delete_many(doc! {"_id": {"$mod": [20, 2]}}).await.expect("a write");
    bench
        .insert_into(SOURCE, (0..150).map(|id| doc! {"_id": 20 * id + 2, "valid": true, "back": true}))
        .await;
    let toggle = vec![doc! {"$set": {"valid": {"$not": ["$valid"]}}}];
    source.update_many(doc! {"_id": {"$mod": [20, 4]}}, toggle.clone()).await.expect("a write");
    source.update_many(doc! {"_id": {"$mod": [20, 5]}}, toggle.clone()).await.expect("a write");
    for _ in 0..2 {
        source.update_many(doc! {"_id": {"$mod": [20, 6]}}, toggle.clone()).await.expect("a write");
        source.update_many(doc! {"_id": {"$mod": [20, 7]}}, toggle.clone()).await.expect("a write");
    }
    source.update_many(doc! {"_id": {"$mod": [20, 8]}}, doc! {"$inc": {"n": 1}}).await.expect("a write");
    inserts.off(&bench).await;
    run.finish().await.expect_exit(0);
    expect_in_step(&bench).await;
}

/// Each of a few documents changes, passes in and out of the rule, is deleted and comes back many
/// times in every batch.
#[tokio::test]
async fn few_documents_that_are_written_all_the_time_end_right() {
    let (bench, writers) = live(48).await;
    let mut run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    writers.go_on_for(1_000).await;
    let journal = writers.stop().await;
    wait_until_in_step(&bench, &journal, &mut run).await;
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
}

#[tokio::test]
async fn changes_that_are_seen_again_do_no_harm() {
    let (bench, writers) = live(600).await;
    bench.run(COMMAND).await.expect_exit(0);
    let early = bench.job(&job_name(&bench)).await.expect("a job").get("feed").cloned();
    writers.go_on_for(500).await;
    let journal = writers.stop().await;
    for _ in 0..3 {
        let run = bench.run(COMMAND).await.expect_exit(0);
        assert!(run.number("/followed/changes") >= 400, "{}", run.stdout);
        expect_target(&bench, &journal).await;
        jobs(&bench, doc! {"$set": {"feed": early.clone()}}).await;
    }
}

/// The server answers as it does when its oplog no longer holds what comes after the position: a new
/// set remembers everything.
#[tokio::test]
async fn changes_that_the_oplog_no_longer_holds_are_missed_aloud() {
    let bench = bench(300).await;
    bench.run(COMMAND).await.expect_exit(0);
    let copied = bytes(&bench, TARGET).await;
    let before = bench.job(&job_name(&bench)).await.expect("a job").get("feed").cloned();
    source(&bench).update_many(doc! {}, doc! {"$inc": {"n": 1}}).await.expect("a write");
    let commands = FailPoint::reserve("failCommand");
    let lost = doc! {"failCommands": ["aggregate"], "namespace": bench.namespace(SOURCE), "errorCode": 286};
    for command in [COMMAND.to_owned(), format!("{COMMAND} --follow")] {
        commands.set(&bench, "alwaysOn", lost.clone()).await;
        let run = bench.run(&command).await.expect_exit(3);
        commands.off(&bench).await;
        assert!(run.text("/error/message").contains("oplog no longer holds"), "{}", run.stdout);
        assert!(run.text("/error/hint").contains("--restart"), "{}", run.stdout);
    }
    assert_same(&bytes(&bench, TARGET).await, &copied);
    assert_eq!(bench.job(&job_name(&bench)).await.expect("a job").get("feed").cloned(), before);

    // In the middle of a run it is a stop.
    let run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    let mut lost = lost;
    lost.insert("failCommands", vec!["aggregate", "getMore"]);
    commands.set(&bench, "alwaysOn", lost).await;
    let ended = run.finish().await.expect_exit(4);
    commands.off(&bench).await;
    assert!(ended.text("/error/message").contains("oplog no longer holds"), "{}", ended.stdout);
    bench.run("cleanse --restart").await.expect_exit(0);
    expect_in_step(&bench).await;
}

/// `_id`s of all types, delicate field names, the largest documents: written while they are followed.
#[tokio::test]
async fn documents_of_all_kinds_are_followed_byte_for_byte() {
    let bench = Bench::new().await;
    configure(&bench, "keep = '{\"bool\": {\"$ne\": false}}'");
    let valid = || doc! {"bool": {"$ne": false}};
    bench.insert_into(SOURCE, (0..).zip(ids(500)).map(|(number, id)| every_type(id, number))).await;
    let run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    let source = source(&bench);
    for (number, id) in ids(500).into_iter().enumerate() {
        let filter = doc! {"_id": {"$eq": &id}};
        match number % 5 {
            0 => drop(source.delete_one(filter).await.expect("a write")),
            1 => {
                source.delete_one(filter).await.expect("a write");
                source.insert_one(doc! {"_id": id, "back": true}).await.expect("a write");
            }
            2 => drop(source.update_one(filter, doc! {"$set": {"bool": true}}).await.expect("a write")),
            3 => drop(source.update_one(filter, doc! {"$set": {"bool": false}}).await.expect("a write")),
            _ => drop(source.update_one(filter, doc! {"$unset": {"bool": 1}}).await.expect("a write")),
        }
    }
    // An equal number of another type, and an `_id` as a document in another type of its number.
    for (one, other) in
        [(Bson::Int32(77_777), Bson::Double(77_777.0)), (doc! {"a": 1}.into(), doc! {"a": 1_i64}.into())]
    {
        source.insert_one(doc! {"_id": &one}).await.expect("a write");
        source.delete_one(doc! {"_id": {"$eq": one}}).await.expect("a write");
        source.insert_one(doc! {"_id": other}).await.expect("a write");
    }
    insert_raw(&bench, SOURCE, delicate()).await;
    for document in zero_timestamps() {
        store_exactly(&bench, SOURCE, document).await;
    }
    let empty = rawdoc! {"_id": "large 0", "n": 0, "data": ""};
    let data = "x".repeat(LARGEST - empty.as_bytes().len());
    let large: Vec<RawDocumentBuf> = (0..3)
        .map(|number| rawdoc! {"_id": format!("large {number}"), "n": 0, "data": data.as_str()})
        .collect();
    for document in large {
        assert_eq!(document.as_bytes().len(), LARGEST);
        insert_raw(&bench, SOURCE, vec![document]).await;
    }
    source.update_many(doc! {"n": 0}, doc! {"$set": {"n": 1}}).await.expect("a write");
    wait_for("the target in step", async || {
        bytes(&bench, TARGET).await == bytes_where(&bench, SOURCE, valid()).await
    })
    .await;
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
    assert_same(&bytes(&bench, TARGET).await, &bytes_where(&bench, SOURCE, valid()).await);
}

#[tokio::test]
async fn collections_with_nothing_or_everything_to_keep_are_followed() {
    let all: fn(&Document) -> bool = |_| true;
    let none: fn(&Document) -> bool = |_| false;
    let rounds = [
        (0, RULE, is_valid as fn(&Document) -> bool),
        (1, RULE, is_valid),
        (200, "keep = '{}'", all),
        (200, "keep = '{\"valid\": \"never\"}'", none),
    ];
    for (documents, rule, valid) in rounds {
        let bench = Bench::new().await;
        configure(&bench, rule);
        let options = Options { documents, writers: 4, target_rate: 300, ..Options::default() };
        let writers = Writers::on(&bench, SOURCE, options).await;
        bench.run(COMMAND).await.expect_exit(0);
        writers.go_on_for(100).await;
        let journal = writers.stop().await;
        bench.run(COMMAND).await.expect_exit(0);
        expect_collection_equals(&bench, TARGET, &journal.expected(valid), &journal).await;
    }
}

/// Nobody writes to the target while it is kept in step; who does is found by `verify`.
#[tokio::test]
async fn what_somebody_else_writes_to_the_target_is_found() {
    let bench = bench(300).await;
    bench.run(COMMAND).await.expect_exit(0);
    bench.run("verify --full").await.expect_exit(0);
    let target: Collection<Document> = bench.database.collection(TARGET);
    target.update_one(doc! {"_id": 4}, doc! {"$set": {"n": 7}}).await.expect("a write");
    bench.run("verify --full --settle 100ms").await.expect_exit(1);
    target.update_one(doc! {"_id": 4}, doc! {"$set": {"n": 0}}).await.expect("a write");
    target.insert_one(doc! {"_id": "stranger", "valid": true}).await.expect("a write");
    bench.run("verify --full --settle 100ms").await.expect_exit(1);
    target.delete_many(doc! {"_id": {"$in": ["stranger", 6]}}).await.expect("a write");
    bench.run("verify --full --settle 100ms").await.expect_exit(1);
}

#[tokio::test]
async fn a_follower_is_one_of_its_kind_and_ends_when_its_source_changes_its_rules() {
    let bench = bench(300).await;
    let run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    bench.run(COMMAND).await.expect_exit(3);
    // An index changes no document.
    let index = doc! {"createIndexes": SOURCE, "indexes": [{"key": {"n": 1}, "name": "by n"}]};
    bench.database.run_command(index).await.expect("an index");
    source(&bench).update_many(doc! {}, doc! {"$set": {"n": 5}}).await.expect("a write");
    wait_for("the target in step", async || {
        bytes(&bench, TARGET).await == bytes_where(&bench, SOURCE, doc! {"valid": true}).await
    })
    .await;
    bench.database.run_command(doc! {"collMod": SOURCE, "validator": {"n": 5}}).await.expect("changed");
    let ended = run.finish().await.expect_exit(4);
    assert!(ended.text("/error/message").contains("modify"), "{}", ended.stdout);
}
