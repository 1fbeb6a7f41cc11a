//! A cleanse beside an application that writes every change to both sides: nothing of the
//! application's is lost, and what it missed is repaired and reported.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bson::{Bson, Document, Timestamp, doc};

use crate::cleansing::{
    Bytes, FailPoint, SOURCE, TARGET, assert_same, bytes, bytes_where, configure, delicate, every_type, ids,
    insert_raw, job_name, store_exactly, zero_timestamps,
};
use crate::dual_writing::{Application, RULES, bench, document, expect_equal, sides, valid};
use crate::harness::{Bench, Random, wait_for};
use crate::own_set::ThreeNodes;
use crate::program::Finished;
use crate::soak::{random, rounds};

const COMMAND: &str = "cleanse --dual-write --grace 400ms";
/// Waits in front of every batch that is inserted into a collection.
const INSERTS: &str = "hangDuringBatchInsert";

/// The reported differences as kind and `_id`, sorted.
fn differences(run: &Finished) -> Vec<(String, String)> {
    let listed = run.json["dual_write"]["differences"].as_array().expect("a list");
    let mut differences: Vec<_> = listed
        .iter()
        .map(|entry| {
            assert_eq!(entry["outcome"], "repaired", "{}", run.stdout);
            (entry["kind"].as_str().expect("a kind").to_owned(), entry["_id"].to_string())
        })
        .collect();
    differences.sort();
    differences
}

/// What the application has in the target before the copy: newer versions of documents of the
/// source, some of which other ways to write would change, and one of its own.
async fn seed_target(bench: &Bench) -> Bytes {
    let zero = Timestamp { time: 0, increment: 0 };
    bench.insert_into(TARGET, (0..500).map(|id| doc! {"_id": 3 * id, "own": true})).await;
    for document in delicate().into_iter().take(3) {
        let mut document = Document::try_from(document).expect("valid BSON");
        document.insert("own.er", doc! {"$x": 1});
        store_exactly(bench, TARGET, document).await;
    }
    for id in ["zero", "bare"] {
        store_exactly(bench, TARGET, doc! {"_id": id, "$own": zero, "n": {"t": zero}, "p.q": zero}).await;
    }
    store_exactly(bench, TARGET, doc! {"_id": Bson::Null, "own": zero}).await;
    store_exactly(bench, TARGET, doc! {"_id": "only here", "own": zero}).await;
    bytes(bench, TARGET).await
}

async fn seed_source(bench: &Bench) {
    bench.insert_into(SOURCE, (0..).zip(ids(300)).map(|(number, id)| every_type(id, number))).await;
    insert_raw(bench, SOURCE, delicate()).await;
    for document in zero_timestamps() {
        store_exactly(bench, SOURCE, document).await;
    }
    store_exactly(bench, SOURCE, doc! {"_id": Bson::Null, "a": 1}).await;
    let index = doc! {"createIndexes": SOURCE, "indexes": [{"key": {"string": 1}, "name": "by string"}]};
    bench.database.run_command(index).await.expect("an index");
}

/// The documents of the target, and what it lacks of the source.
async fn expected(bench: &Bench, before: &Bytes) -> Bytes {
    let mut expected = bytes_where(bench, SOURCE, valid()).await;
    expected.extend(before.iter().map(|(id, document)| (id.clone(), document.clone())));
    expected
}

#[tokio::test]
async fn dual_write_copy_keeps_every_byte_of_the_target_and_adds_what_it_lacks() {
    let bench = bench(0).await;
    bench.insert_into(SOURCE, (10_000..13_000).map(|id| document(id, i64::from(id)))).await;
    bench.insert_into(SOURCE, (0..1_500).map(|id| document(id, 0))).await;
    insert_raw(&bench, SOURCE, delicate()).await;
    for document in zero_timestamps() {
        store_exactly(&bench, SOURCE, document).await;
    }
    store_exactly(&bench, SOURCE, doc! {"_id": Bson::Null, "t": Timestamp { time: 0, increment: 0 }}).await;
    let index = doc! {"createIndexes": SOURCE, "indexes": [{"key": {"string": 1}, "name": "by string"}]};
    bench.database.run_command(index).await.expect("an index");
    let before = seed_target(&bench).await;

    let run = bench.run(&format!("{COMMAND} --parallel 2")).await.expect_exit(0);
    // What an interrupted comparison may go on by.
    let job = bench.job(&job_name(&bench)).await.expect("the job");
    assert!(job.get_datetime("caught_up_at").is_ok(), "{job}");
    let expected = expected(&bench, &before).await;
    assert_same(&bytes(&bench, TARGET).await, &expected);
    assert_eq!(run.number("/dual_write/inserted"), (expected.len() - before.len()) as u64);
    assert_eq!(run.number("/dual_write/existing"), before.len() as u64 - 1, "{}", run.stdout);
    assert_eq!(run.number("/dual_write/repaired"), 0);
    assert_eq!(run.json["dual_write"]["structure"][0]["index"], "by string", "{}", run.stdout);
    let [_, target] = sides(&bench);
    assert_eq!(target.list_index_names().await.expect("names"), ["_id_"]);
    let job = bench.job(&job_name(&bench)).await.expect("a job");
    assert!(job.get_bool("target_adopted").expect("set"), "{job}");
}

#[tokio::test]
async fn dual_write_copy_makes_a_target_that_is_not_there() {
    let bench = bench(0).await;
    seed_source(&bench).await;
    bench.run(COMMAND).await.expect_exit(0);
    expect_equal(&bench).await;
    let [_, target] = sides(&bench);
    let mut names = target.list_index_names().await.expect("names");
    names.sort();
    assert_eq!(names, ["_id_", "by string"]);
    // It is the job's own: copied anew on demand.
    bench.run(&format!("{COMMAND} --restart")).await.expect_exit(0);
    expect_equal(&bench).await;
}

#[tokio::test]
async fn dual_write_beside_an_application_loses_nothing() {
    let bench = bench(20_000).await;
    let application = Application::start(&bench, 20_000);
    application.has_written(200).await;
    let run = bench.run(COMMAND).await.expect_exit(0);
    assert!(run.number("/dual_write/compared") > 0, "{}", run.stdout);
    assert_eq!(run.number("/dual_write/not_repaired"), 0, "{}", run.stdout);
    application.stop().await;
    bench.run(COMMAND).await.expect_exit(0);
    expect_equal(&bench).await;
    let last = bench.run(COMMAND).await.expect_exit(0);
    assert_eq!(last.number("/dual_write/compared"), 0);
}

#[tokio::test]
async fn random_kills_beside_dual_writes_lose_nothing() {
    let bench = bench(20_000).await;
    let application = Application::start(&bench, 20_000);
    application.has_written(200).await;
    let mut random = random(7);
    for _ in 0..rounds(4) {
        let run = bench.program(COMMAND).spawn();
        let moment = u64::try_from(50 + random.below(1_800)).expect("small");
        tokio::time::sleep(Duration::from_millis(moment)).await;
        run.kill();
    }
    bench.run(COMMAND).await.expect_exit(0);
    application.stop().await;
    bench.run(COMMAND).await.expect_exit(0);
    expect_equal(&bench).await;
}

#[tokio::test]
async fn dual_write_through_an_election_loses_nothing() {
    let set = ThreeNodes::start().await;
    let bench = Bench::on(&set.uri).await;
    configure(&bench, RULES);
    bench.insert_into(SOURCE, (0..40_000).map(|id| document(id, 0))).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let ([source, target], stop) = (sides(&bench), stop.clone());
        async move {
            let mut random = Random::seeded(11);
            while !stop.load(Ordering::Relaxed) {
                let id = i32::try_from(random.below(41_000)).expect("small");
                let (filter, update) =
                    (doc! {"_id": id}, doc! {"$inc": {"version": 10}, "$set": {"by": "it"}});
                // A write that fails may have been made, and is not made on the other side.
                let deletes = random.below(4) == 0;
                let written = if deletes {
                    source.delete_one(filter.clone()).await.is_ok()
                } else {
                    source.update_one(filter.clone(), update.clone()).await.is_ok()
                };
                if written && deletes {
                    drop(target.delete_one(filter).await);
                } else if written {
                    drop(target.update_one(filter, update).await);
                }
            }
        }
    });
    let mut run = bench.program(COMMAND).spawn();
    let [_, target] = sides(&bench);
    wait_for("documents in the target", async || {
        assert!(run.is_running(), "{}", run.stderr());
        target.estimated_document_count().await.is_ok_and(|count| count > 1_000)
    })
    .await;
    set.step_down().await;
    let run = run.finish().await.expect_exit(0);
    assert_eq!(run.number("/dual_write/not_repaired"), 0, "{}", run.stdout);
    stop.store(true, Ordering::Relaxed);
    writer.await.expect("no panic");
    bench.run(COMMAND).await.expect_exit(0);
    expect_equal(&bench).await;
}

#[tokio::test]
async fn dual_write_killed_in_mid_copy_goes_on_without_emptying_anything() {
    let bench = bench(0).await;
    bench.insert_into(SOURCE, (0..6_000).map(|id| document(id, 0))).await;
    let before = seed_target(&bench).await;
    for batch in 1..=3 {
        let crash = format!("after_kept_batch:{batch}");
        let run = bench.program(COMMAND).env("MONGOREKEY_CRASH_AT", &crash).run().await;
        assert_eq!(run.exit, None, "{}", run.stderr);
        // What nobody has marked is in nobody's way, and not to be touched.
        let kept = bytes(&bench, TARGET).await;
        assert!(before.iter().all(|(id, document)| kept.get(id) == Some(document)));
    }
    bench.run(COMMAND).await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &expected(&bench, &before).await);
}

#[tokio::test]
async fn dual_write_document_deleted_on_both_sides_while_it_is_copied_stays_deleted() {
    let bench = bench(50).await;
    let inserts = FailPoint::reserve(INSERTS);
    let entered = inserts.set(&bench, "alwaysOn", doc! {"nss": bench.namespace(TARGET)}).await;
    let run = bench.program(&format!("{COMMAND} --parallel 1")).spawn();
    inserts.wait_until_entered(&bench, entered + 1).await;
    // It is read and on its way.
    let filter = doc! {"_id": {"$in": (0..50).collect::<Vec<i32>>()}, "valid": true};
    for side in sides(&bench) {
        side.delete_many(filter.clone()).await.expect("deleted");
    }
    inserts.off(&bench).await;
    let run = run.finish().await.expect_exit(0);
    expect_equal(&bench).await;
    assert!(run.number("/dual_write/repaired") > 0, "nothing had come back: {}", run.stdout);
    assert!(differences(&run).iter().all(|(kind, _)| kind == "extra"), "{}", run.stdout);
}

#[tokio::test]
async fn dual_write_that_missed_the_target_is_repaired_and_reported() {
    let bench = bench(100).await;
    bench.run(COMMAND).await.expect_exit(0);
    let [source, target] = sides(&bench);
    // On both sides, so that nothing is to be said about it.
    for side in [&source, &target] {
        side.update_one(doc! {"_id": 50}, doc! {"$set": {"seen": 1}}).await.expect("a write");
    }
    // On one side: inserted, changed, deleted, no longer valid.
    source.insert_one(document(1_000, 0)).await.expect("a write");
    let zero = Timestamp { time: 0, increment: 0 };
    store_exactly(&bench, SOURCE, doc! {"_id": 1, "t": zero, "$a": 1, "a.b": 1}).await;
    source.delete_one(doc! {"_id": 2}).await.expect("a write");
    source.update_one(doc! {"_id": 3}, doc! {"$set": {"valid": false}}).await.expect("a write");
    let run = bench.run(COMMAND).await.expect_exit(0);
    expect_equal(&bench).await;
    let expected = [("different", 1), ("extra", 2), ("extra", 3), ("missing", 1_000)]
        .map(|(kind, id)| (kind.to_owned(), format!("{{\"$numberInt\":\"{id}\"}}")));
    assert_eq!(differences(&run), expected);
    assert_eq!((run.number("/dual_write/compared"), run.number("/dual_write/repaired")), (5, 4));
}

#[tokio::test]
async fn dual_write_killed_after_a_repair_ends_right() {
    let bench = bench(100).await;
    bench.run(COMMAND).await.expect_exit(0);
    let [source, _] = sides(&bench);
    source.delete_many(doc! {"_id": {"$lt": 20}}).await.expect("a write");
    source.insert_one(document(1_000, 0)).await.expect("a write");
    let run = bench.program(COMMAND).env("MONGOREKEY_CRASH_AT", "after_repair:1").run().await;
    assert_eq!(run.exit, None, "{}", run.stderr);
    assert!(run.stderr.contains("missing in") && run.stderr.contains("extra in"), "{}", run.stderr);
    bench.run(COMMAND).await.expect_exit(0);
    expect_equal(&bench).await;
}

#[tokio::test]
async fn dual_write_copies_and_repairs_documents_of_sixteen_megabytes() {
    let bench = bench(0).await;
    let [source, _] = sides(&bench);
    let large = |id: i32, letter: &str| doc! {"_id": id, "text": letter.repeat((16 << 20) - 26)};
    source.insert_one(large(0, "a")).await.expect("a write");
    bench.run(COMMAND).await.expect_exit(0);
    expect_equal(&bench).await;
    source.replace_one(doc! {"_id": 0}, large(0, "b")).await.expect("a write");
    source.insert_one(large(1, "b")).await.expect("a write");
    let run = bench.run(COMMAND).await.expect_exit(0);
    assert_eq!(run.number("/dual_write/repaired"), 2);
    expect_equal(&bench).await;
}

#[tokio::test]
async fn dual_write_repairs_values_that_swapped_places_under_a_unique_index() {
    let bench = bench(0).await;
    let [source, target] = sides(&bench);
    let account = |id: i32| doc! {"_id": id, "email": format!("e{id}")};
    for side in [SOURCE, TARGET] {
        bench.insert_into(side, (0..10).map(account)).await;
        let command =
            doc! {"createIndexes": side, "indexes": [{"key": {"email": 1}, "name": "email", "unique": true}]};
        bench.database.run_command(command).await.expect("an index");
    }
    bench.run(COMMAND).await.expect_exit(0);
    for (id, email) in [(1, "free"), (2, "e1"), (1, "e2")] {
        source.update_one(doc! {"_id": id}, doc! {"$set": {"email": email}}).await.expect("a write");
    }
    let run = bench.run(COMMAND).await.expect_exit(0);
    assert_eq!(run.number("/dual_write/repaired"), 2, "{}", run.stdout);
    expect_equal(&bench).await;

    // What nobody has touched is not removed for the sake of another one.
    target.insert_one(doc! {"_id": "only here", "email": "both"}).await.expect("a write");
    source.insert_one(doc! {"_id": "other", "email": "both"}).await.expect("a write");
    let run = bench.run(COMMAND).await.expect_exit(1);
    assert_eq!(run.number("/dual_write/not_repaired"), 1, "{}", run.stdout);
    let difference = &run.json["dual_write"]["differences"][0];
    assert_eq!((&difference["_id"], &difference["outcome"]), (&"other".into(), &"not repaired".into()));
    assert!(difference["reason"].as_str().expect("a reason").contains("email"), "{}", run.stdout);
    assert!(target.find_one(doc! {"_id": "only here"}).await.expect("a read").is_some());
}

#[tokio::test]
async fn dual_write_tells_what_the_target_does_not_accept() {
    let bench = bench(0).await;
    let validator = doc! {"create": TARGET, "validator": {"a": {"$exists": true}}};
    bench.database.run_command(validator).await.expect("a collection");
    bench.insert_into(SOURCE, [doc! {"_id": 1, "a": 1}, doc! {"_id": 2}, doc! {"_id": 3, "a": 1}]).await;
    let run = bench.run(COMMAND).await.expect_exit(1);
    assert_eq!(run.text("/status"), "incomplete");
    assert_eq!(run.number("/dual_write/not_repaired"), 1, "{}", run.stdout);
    let difference = &run.json["dual_write"]["differences"][0];
    assert_eq!((&difference["kind"], &difference["outcome"]), (&"missing".into(), &"not repaired".into()));
    assert!(difference["reason"].as_str().expect("a reason").contains("validator"), "{}", run.stdout);
    assert_eq!(bytes(&bench, TARGET).await.len(), 2);
    // It is not forgotten.
    let command = doc! {"collMod": TARGET, "validator": {}};
    bench.database.run_command(command).await.expect("no validator");
    bench.run(COMMAND).await.expect_exit(0);
    expect_equal(&bench).await;
}

#[tokio::test]
async fn dual_write_leaves_a_document_alone_that_is_just_being_written() {
    let bench = bench(10).await;
    bench.run(COMMAND).await.expect_exit(0);
    let [source, target] = sides(&bench);
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let stop = stop.clone();
        async move {
            let mut version = 0_i64;
            while !stop.load(Ordering::Relaxed) {
                version += 1;
                let update = doc! {"$set": {"text": version.to_string()}};
                source.update_one(doc! {"_id": 1}, update.clone()).await.expect("a write");
                tokio::time::sleep(Duration::from_millis(150)).await;
                target.update_one(doc! {"_id": 1}, update).await.expect("a write");
                tokio::time::sleep(Duration::from_millis(150)).await;
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let run = bench.run(COMMAND).await.expect_exit(0);
    stop.store(true, Ordering::Relaxed);
    writer.await.expect("no panic");
    assert_eq!((run.number("/dual_write/compared"), run.number("/dual_write/repaired")), (1, 0));
    expect_equal(&bench).await;
}

#[tokio::test]
async fn dual_write_never_drops_a_target_that_was_there_before() {
    let bench = bench(10).await;
    bench.insert_into(TARGET, [doc! {"_id": "own"}]).await;
    let expect_refused = async |arguments: &str| {
        let run = bench.run(arguments).await.expect_exit(3);
        assert!(!bytes(&bench, TARGET).await.is_empty());
        run.text("/error/message").to_owned()
    };
    // Without the option it is somebody else's.
    assert!(expect_refused("cleanse").await.contains("not this job's"));
    expect_refused(&format!("{COMMAND} --restart")).await;
    bench.run(COMMAND).await.expect_exit(0);
    for arguments in [format!("{COMMAND} --restart"), "cleanse --restart".into()] {
        assert!(expect_refused(&arguments).await.contains("not created by"), "{arguments}");
    }
    // The mode is part of what the job does.
    assert!(expect_refused("cleanse").await.contains("dual_write"));
    bench.run(&format!("{COMMAND} --follow")).await.expect_exit(2);
    bench.run("cleanse --grace 1s").await.expect_exit(2);
    // An empty one is the application's too.
    bench.database.collection::<Document>("empty").insert_one(doc! {}).await.expect("a write");
    bench.database.collection::<Document>("empty").delete_many(doc! {}).await.expect("a write");
    bench.run(&format!("{COMMAND} --to empty")).await.expect_exit(0);
    bench.run(&format!("{COMMAND} --to empty --restart")).await.expect_exit(3);
    let view = doc! {"create": "view", "viewOn": SOURCE, "pipeline": []};
    bench.database.run_command(view).await.expect("a view");
    bench.run(&format!("{COMMAND} --to view")).await.expect_exit(3);
}
