//! A switch: the application is deployed to the new collection while the old one is still
//! written to. What it writes to the new one is never overwritten, what it writes to the old one
//! arrives, and what it writes to both is told.

use std::collections::BTreeMap;
use std::time::Duration;

use bson::{Bson, Document, doc};
use mongodb::options::IndexOptions;
use mongodb::{Collection, IndexModel};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cleanse_live::RULE;
use crate::cleansing::{SOURCE, TARGET, assert_same, bytes, bytes_where, configure, job_name};
use crate::harness::{Bench, Random, connect, wait_for};
use crate::program::{Finished, Running};
use crate::soak::{random, rounds};
use crate::writers::{Options, Writers, expect_collection_equals, is_valid};

const SWITCH: &str = "cutover --mode switch --quiet-for 2s --yes";

/// A bench with a hundred documents, copied: those divisible by three are not valid.
async fn copied() -> Bench {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    bench.insert_into(SOURCE, (0..100).map(|id| doc! {"_id": id, "valid": id % 3 != 0, "n": 0})).await;
    bench.run("cleanse").await.expect_exit(0);
    bench
}

async fn stage(bench: &Bench) -> Option<String> {
    let job = bench.job(&job_name(bench)).await?;
    Some(job.get_document("switch").ok()?.get_str("stage").ok()?.to_owned())
}

/// Waits until whatever is written to the target is left alone.
async fn begun(bench: &Bench, run: &Running) {
    wait_for("the switch", async || run.stderr().contains("deploy the application")).await;
    assert!(stage(bench).await.is_some());
}

fn both(bench: &Bench) -> (Collection<Document>, Collection<Document>) {
    (bench.database.collection(SOURCE), bench.database.collection(TARGET))
}

async fn set(collection: &Collection<Document>, id: i32, fields: Document) {
    let update = collection.update_one(doc! {"_id": id}, doc! {"$set": fields}).upsert(true);
    update.await.expect("a write");
}

async fn find(collection: &Collection<Document>, id: i32) -> Option<Document> {
    collection.find_one(doc! {"_id": id}).await.expect("an answer")
}

/// Who has written to a document last.
async fn writer_of(collection: &Collection<Document>, id: i32) -> String {
    let found = find(collection, id).await.expect("it is there");
    found.get_str("by").expect("somebody has written to it").to_owned()
}

fn conflicts(finished: &Finished) -> Vec<Bson> {
    let listed = finished.json["conflicts"]["documents"].as_array().expect("a list");
    let mut ids: Vec<i64> = listed
        .iter()
        .map(|id| id["$numberInt"].as_str().expect("an int32").parse().expect("a number"))
        .collect();
    ids.sort_unstable();
    ids.into_iter().map(|id| Bson::Int32(i32::try_from(id).expect("small"))).collect()
}

#[tokio::test]
async fn what_is_written_to_the_old_collection_arrives() {
    let bench = copied().await;
    let run = bench.program(SWITCH).spawn();
    begun(&bench, &run).await;
    let (source, target) = both(&bench);
    set(&source, 1, doc! {"n": 1}).await;
    set(&source, 2, doc! {"valid": false}).await;
    set(&source, 3, doc! {"valid": true}).await;
    source.delete_one(doc! {"_id": 4}).await.expect("a write");
    source.delete_one(doc! {"_id": 5}).await.expect("a write");
    set(&source, 5, doc! {"valid": true, "again": true}).await;
    set(&source, 500, doc! {"valid": true}).await;
    // Others that write the very same to both sides are in nobody's way.
    for collection in [&target, &source] {
        set(collection, 7, doc! {"both": true}).await;
    }
    let done = run.finish().await.expect_exit(0);
    assert_eq!((done.text("/outcome"), done.text("/mode")), ("cut_over", "switch"));
    assert_eq!((done.number("/pause_ms"), done.number("/owned")), (0, 1));
    assert_same(&bytes(&bench, TARGET).await, &bytes_where(&bench, SOURCE, doc! {"valid": true}).await);
    assert_eq!(stage(&bench).await.as_deref(), Some("switched"));
}

#[tokio::test]
async fn what_is_written_to_the_new_collection_stays_and_conflicts_are_told() {
    let bench = copied().await;
    let run = bench.program(SWITCH).spawn();
    begun(&bench, &run).await;
    let (source, target) = both(&bench);
    set(&target, 1, doc! {"by": "target"}).await;
    set(&target, 2, doc! {"by": "target"}).await;
    set(&target, 600, doc! {"by": "target"}).await;
    target.delete_one(doc! {"_id": 4}).await.expect("a write");
    target.delete_one(doc! {"_id": 5}).await.expect("a write");
    // On the other side of what is owned by now.
    set(&source, 2, doc! {"by": "source"}).await;
    set(&source, 4, doc! {"by": "source"}).await;
    set(&source, 7, doc! {"by": "source"}).await;
    let done = run.finish().await.expect_exit(1);
    assert_eq!(done.text("/outcome"), "cut_over");
    assert_eq!(conflicts(&done), [Bson::Int32(2), Bson::Int32(4)]);
    assert_eq!((done.number("/owned"), done.number("/conflicts/count")), (5, 2));
    for id in [1, 2, 600] {
        assert_eq!(writer_of(&target, id).await, "target", "{id}");
    }
    assert_eq!((find(&target, 4).await, find(&target, 5).await), (None, None));
    assert_eq!(writer_of(&target, 7).await, "source");
}

/// Values that are one `_id` to the server, and the same value in other types.
fn same_ids() -> Vec<(Bson, Bson)> {
    let decimal = |text: &str| Bson::Decimal128(text.parse().expect("a decimal"));
    vec![
        (Bson::Int32(77), decimal("77.0")),
        (Bson::Int64(78), Bson::Double(78.0)),
        (doc! {"a": 99}.into(), doc! {"a": 99.0}.into()),
        (doc! {"a": [1, {"b": 2}]}.into(), doc! {"a": [decimal("1E+0"), {"b": 2_i64}]}.into()),
        (Bson::Double(0.5), decimal("0.50")),
        (Bson::Int64(i64::MAX), decimal("9223372036854775807")),
        (decimal("0E+3"), Bson::Double(-0.0)),
        ("text".into(), Bson::Symbol("text".into())),
    ]
}

#[tokio::test]
async fn what_is_one_id_to_the_server_belongs_to_whoever_wrote_it_whatever_its_type() {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let others: Vec<Bson> = vec![79.into(), doc! {"a": 98}.into(), doc! {"b": 99}.into(), 0.1.into()];
    let pairs = same_ids();
    let ids = pairs.iter().map(|(id, _)| id).chain(&others);
    bench.insert_into(SOURCE, ids.map(|id| doc! {"_id": id, "valid": true, "by": "nobody"})).await;
    bench.run("cleanse").await.expect_exit(0);
    let run = bench.program(SWITCH).spawn();
    begun(&bench, &run).await;
    let (source, target) = both(&bench);
    for (id, other) in &pairs {
        target.delete_one(doc! {"_id": {"$eq": id}}).await.expect("a write");
        target.insert_one(doc! {"_id": other, "valid": true, "by": "target"}).await.expect("a write");
    }
    // Another number than 0.1, however close.
    let close: Bson = Bson::Decimal128("0.1000000000000000055511151231257827".parse().expect("a decimal"));
    target.insert_one(doc! {"_id": close, "valid": true}).await.expect("a write");
    let update = doc! {"$set": {"by": "source"}};
    source.update_many(doc! {}, update).await.expect("a write");
    let done = run.finish().await.expect_exit(1);
    let count = pairs.len() as u64;
    assert_eq!((done.number("/owned"), done.number("/conflicts/count")), (count + 1, count));
    for (id, by) in
        pairs.iter().map(|(_, other)| (other, "target")).chain(others.iter().map(|id| (id, "source")))
    {
        let found = target.find_one(doc! {"_id": {"$eq": id}}).await.expect("an answer");
        assert_eq!(found, Some(doc! {"_id": id, "valid": true, "by": by}), "{id}");
    }
}

#[tokio::test]
async fn values_that_change_places_under_a_unique_index_are_never_missing() {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    bench.insert_into(SOURCE, (0..20).map(|id| doc! {"_id": id, "valid": true, "slot": id})).await;
    let options = IndexOptions::builder().unique(true).build();
    let (source, target) = both(&bench);
    let index = IndexModel::builder().keys(doc! {"slot": 1}).options(options).build();
    source.create_index(index).await.expect("an index");
    bench.run("cleanse").await.expect_exit(0);
    let run = bench.program(SWITCH).spawn();
    begun(&bench, &run).await;
    let (stop, watched) = (CancellationToken::new(), target.clone());
    let seen = tokio::spawn({
        let stop = stop.clone();
        async move {
            let mut fewest = u64::MAX;
            while !stop.is_cancelled() {
                fewest = fewest.min(watched.count_documents(doc! {}).await.expect("a count"));
            }
            fewest
        }
    });
    let client = connect(&bench.uri).await;
    let theirs = client.database(bench.database.name()).collection::<Document>(SOURCE);
    for round in 0..60 {
        let (one, other) = (round % 20, (round * 7 + 3) % 20);
        let slot = async |id| find(&source, id).await.expect("it is there").get_i32("slot").expect("a slot");
        let (first, second) = (slot(one).await, slot(other).await);
        if one == other {
            continue;
        }
        let mut session = client.start_session().await.expect("a session");
        session.start_transaction().await.expect("a transaction");
        for (id, value) in [(one, -1), (other, first), (one, second)] {
            let set = doc! {"$set": {"slot": value}};
            theirs.update_one(doc! {"_id": id}, set).session(&mut session).await.expect("a write");
        }
        session.commit_transaction().await.expect("a commit");
    }
    run.finish().await.expect_exit(0);
    stop.cancel();
    assert_eq!(seen.await.expect("no panic"), 20, "documents were missing for a moment");
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
}

/// Writes to the same documents of a collection until stopped; returns the last acknowledged
/// number per document.
fn count_up(
    collection: Collection<Document>,
    seed: u64,
    stop: CancellationToken,
) -> JoinHandle<BTreeMap<i32, i64>> {
    tokio::spawn(async move {
        let (mut random, mut last, mut number) = (random(seed), BTreeMap::new(), 0_i64);
        while !stop.is_cancelled() {
            number += 1;
            let id = 900_000 + i32::try_from(random.below(40)).expect("small");
            let by = i64::try_from(seed).expect("small");
            let fields = doc! {"valid": true, "slot": format!("count-{id}"), "by": by, "number": number};
            let update = doc! {"$set": fields};
            collection.update_one(doc! {"_id": id}, update).upsert(true).await.expect("a write");
            last.insert(id, number);
            tokio::time::sleep(Duration::from_millis(random.below(4) as u64)).await;
        }
        last
    })
}

#[tokio::test]
async fn random_kills_while_both_sides_are_written_to_overwrite_nothing() {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let options = Options { documents: 2_000, writers: 4, target_rate: 400, ..Options::default() };
    let writers = Writers::on(&bench, SOURCE, options).await;
    bench.run("cleanse").await.expect_exit(0);
    let (source, target) = both(&bench);
    let run = bench.program(SWITCH).spawn();
    begun(&bench, &run).await;
    let stop = CancellationToken::new();
    let on_source = count_up(source.clone(), 1, stop.clone());
    tokio::time::sleep(Duration::from_millis(300)).await;
    let on_target = count_up(target.clone(), 2, stop.clone());
    let mut random = random(7);
    let mut run = Some(run);
    for _ in 0..rounds(6) {
        tokio::time::sleep(Duration::from_millis(200 + random.below(1200) as u64)).await;
        run.take().expect("it runs").kill();
        run = Some(bench.program(SWITCH).spawn());
    }
    stop.cancel();
    let (on_source, on_target) = (on_source.await.expect("no panic"), on_target.await.expect("no panic"));
    let journal = writers.stop().await;
    let done = run.expect("it runs").finish().await.expect_exit(1);
    assert!(on_target.len() > 30 && on_source.len() > 30, "both sides were written to");
    for (id, number) in &on_target {
        let found = find(&target, *id).await.expect("it stays");
        let expected = (Some(&Bson::Int64(2)), Some(&Bson::Int64(*number)));
        assert_eq!((found.get("by"), found.get("number")), expected, "{id}: {found}");
    }
    let told = conflicts(&done);
    for id in on_target.keys().filter(|id| on_source.contains_key(id)) {
        assert!(told.contains(&Bson::Int32(*id)), "{id} was written to on both sides: {told:?}");
    }
    for id in on_source.keys().filter(|id| !on_target.contains_key(id)) {
        assert_eq!(find(&target, *id).await, find(&source, *id).await);
    }
    assert_eq!(done.number("/owned"), on_target.len() as u64, "nothing of ours is taken for theirs");
    // What only the old collection was written to has arrived, by the writers' own journal.
    for collection in [&source, &target] {
        collection.delete_many(doc! {"by": {"$exists": true}}).await.expect("a delete");
    }
    expect_collection_equals(&bench, TARGET, &journal.expected(is_valid), &journal).await;
}

#[tokio::test]
async fn what_is_fed_back_can_be_rolled_back() {
    let bench = copied().await;
    let command = format!("{SWITCH} --feed-back");
    let run = bench.program(&command).spawn();
    begun(&bench, &run).await;
    let (source, target) = both(&bench);
    set(&target, 1, doc! {"by": "target"}).await;
    wait_for("the way back", async || {
        run.stderr().contains("follows") && stage(&bench).await.as_deref() == Some("feeding_back")
    })
    .await;
    set(&target, 2, doc! {"by": "target"}).await;
    target.delete_one(doc! {"_id": 4}).await.expect("a write");
    wait_for("the write", async || find(&source, 4).await.is_none()).await;
    run.kill();
    set(&target, 5, doc! {"by": "target"}).await;
    let again = bench.program(&command).spawn();
    wait_for("the write", async || {
        find(&source, 5).await.is_some_and(|found| found.get_str("by").is_ok_and(|by| by == "target"))
    })
    .await;
    set(&target, 700, doc! {"by": "target"}).await;
    let back = bench.run("rollback --quiet-for 2s --yes").await.expect_exit(0);
    again.finish().await.expect_exit(143);
    assert_eq!((back.text("/command"), back.text("/outcome")), ("rollback", "rolled_back"));
    for id in [1, 2, 5, 700] {
        assert_eq!(writer_of(&source, id).await, "target", "{id}");
    }
    assert!(find(&source, 0).await.is_some(), "what is not valid was never touched");
    assert_eq!(bytes(&bench, SOURCE).await.len(), 100);
    // The new collection lacks what is written from now on: nobody may be sent there.
    set(&source, 6, doc! {"by": "source"}).await;
    for command in [SWITCH, "cleanse", "cleanse --restart"] {
        let run = bench.run(command).await.expect_exit(3);
        assert!(run.text("/error/message").contains("taken back"), "{command}: {}", run.stdout);
    }
}

#[tokio::test]
async fn a_switch_is_in_the_way_of_everything_that_would_overwrite() {
    let bench = copied().await;
    let run = bench.program(SWITCH).spawn();
    begun(&bench, &run).await;
    let (_, target) = both(&bench);
    set(&target, 1, doc! {"by": "target"}).await;
    run.signal(crate::program::Signal::Interrupt);
    let stopped = run.finish().await.expect_exit(130);
    assert!(stopped.stderr.contains("goes on"), "{}", stopped.stderr);
    for command in [
        "cleanse",
        "cleanse --restart",
        "cutover --mode keep --yes",
        "cutover --abort",
        "rollback --yes",
        "verify --full --repair --yes",
    ] {
        bench.run(command).await.expect_exit(3);
    }
    let cleanup = format!("cleanup {} --yes", job_name(&bench));
    bench.run(&cleanup).await.expect_exit(3);
    bench.run(SWITCH).await.expect_exit(0);
    assert_eq!(writer_of(&target, 1).await, "target");
    bench.run(&cleanup).await.expect_exit(0);
    let left = bench.state.collection::<Document>("switch_owned").count_documents(doc! {}).await;
    assert_eq!(left.expect("a count"), 0);
}

#[tokio::test]
async fn a_switch_that_nobody_made_use_of_is_taken_back() {
    let bench = copied().await;
    let run = bench.program(SWITCH).spawn();
    begun(&bench, &run).await;
    run.kill();
    let aborted = bench.run("cutover --abort").await.expect_exit(0);
    assert_eq!(aborted.text("/outcome"), "aborted");
    assert_eq!(stage(&bench).await, None);
    let (source, target) = both(&bench);
    set(&source, 1, doc! {"n": 9}).await;
    bench.run("cleanse").await.expect_exit(0);
    assert_eq!(find(&target, 1).await.expect("caught up with").get("n"), Some(&Bson::Int32(9)));
}

#[tokio::test]
async fn what_a_switch_can_not_do_is_said_first() {
    let bench = copied().await;
    bench.run(&format!("{SWITCH} --fence validator")).await.expect_exit(2);
    bench.run(&format!("{SWITCH} --allow-gap")).await.expect_exit(2);
    configure(&bench, &format!("{RULE}\ndedupe = {{ by = ['n'], keep_latest = 'n' }}"));
    bench.run("cleanse --job other --to elsewhere").await.expect_exit(0);
    let refused = bench.run(&format!("{SWITCH} --job other --to elsewhere")).await.expect_exit(2);
    assert!(refused.stderr.contains("dedupe"), "{}", refused.stderr);
    assert_eq!(stage(&bench).await, None);
}

/// An upsert, an update and a delete of ours upon what somebody has written since must yield: both
/// sides write the same documents as fast as they can.
#[tokio::test]
async fn writes_that_meet_yield_to_the_application() {
    let bench = copied().await;
    let run = bench.program(SWITCH).spawn();
    begun(&bench, &run).await;
    let (source, target) = both(&bench);
    let mut random = Random::seeded(3);
    for id in 1_000..1_150 {
        let wait = Duration::from_millis(random.below(40) as u64);
        let on_source = async {
            set(&source, id, doc! {"valid": true, "by": "source"}).await;
            set(&source, id, doc! {"n": 1}).await;
            source.delete_one(doc! {"_id": id}).await.expect("a write");
        };
        let on_target = async {
            tokio::time::sleep(wait).await;
            let update = doc! {"$set": {"by": "target"}};
            // It may meet a transaction of ours, and then tries again.
            while target.update_one(doc! {"_id": id}, update.clone()).upsert(true).await.is_err() {}
        };
        tokio::join!(on_source, on_target);
    }
    let done = run.finish().await;
    assert_eq!(done.text("/outcome"), "cut_over", "{}", done.output());
    let kept = doc! {"_id": {"$gte": 1_000}, "by": "target"};
    assert_eq!(target.count_documents(kept).await.expect("a count"), 150, "{}", done.stdout);
}

#[tokio::test]
async fn killed_at_every_boundary_a_switch_goes_on() {
    let bench = copied().await;
    let (source, target) = both(&bench);
    bench.program(SWITCH).env("MONGOREKEY_CRASH_AT", "switch_begun:1").run().await;
    for (round, point) in ["switch_session_stored", "switch_applied", "switch_owned", "switch_position_saved"]
        .iter()
        .enumerate()
    {
        let run = bench.program(SWITCH).env("MONGOREKEY_CRASH_AT", &format!("{point}:1")).spawn();
        let round = i32::try_from(round).expect("small");
        set(&source, 1_000 + round, doc! {"valid": true}).await;
        set(&target, 2_000 + round, doc! {"by": "target"}).await;
        assert_eq!(run.finish().await.exit, None, "{point}");
    }
    let done = bench.run(SWITCH).await.expect_exit(0);
    assert_eq!(done.number("/owned"), 4, "nothing of ours is taken for theirs");
    target.delete_many(doc! {"by": "target"}).await.expect("a delete");
    assert_same(&bytes(&bench, TARGET).await, &bytes_where(&bench, SOURCE, doc! {"valid": true}).await);
}

/// The old collection holds what the rules reject; nothing else does.
#[tokio::test]
async fn what_was_rejected_is_not_removed_for_what_is_fed_back() {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    bench.insert_into(SOURCE, (0..9).map(|id| doc! {"_id": id, "valid": id % 3 != 0, "slot": id})).await;
    let (source, target) = both(&bench);
    let options = IndexOptions::builder().unique(true).build();
    let index = IndexModel::builder().keys(doc! {"slot": 1}).options(options).build();
    source.create_index(index).await.expect("an index");
    bench.run("cleanse").await.expect_exit(0);
    let run = bench.program(&format!("{SWITCH} --feed-back")).spawn();
    begun(&bench, &run).await;
    set(&target, 100, doc! {"slot": 3}).await;
    set(&target, 101, doc! {"slot": 1_000}).await;
    wait_for("the way back", async || find(&source, 101).await.is_some()).await;
    assert!(find(&source, 3).await.is_some(), "it is nowhere else");
    run.signal(crate::program::Signal::Interrupt);
    let stopped = run.finish().await.expect_exit(130);
    assert_eq!(conflicts(&stopped), [Bson::Int32(100)]);
    // Once the value is free again it is brought back after all.
    source.delete_one(doc! {"_id": 3}).await.expect("a delete");
    let back = bench.run("rollback --quiet-for 1s --yes").await.expect_exit(0);
    assert_eq!(back.text("/outcome"), "rolled_back");
    assert!(find(&source, 100).await.is_some());
}
