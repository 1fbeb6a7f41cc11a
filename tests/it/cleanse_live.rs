//! A cleanse of a collection that is written to: at the end the target is what the rules make of
//! all acknowledged writes, document by document, by the writers' own journal.

use std::time::Duration;

use bson::{Document, cstr, doc, rawdoc};
use mongodb::options::Collation;
use mongodb::{Collection, IndexModel};

use crate::cleansing::{SOURCE, TARGET, bytes, configure, insert_raw};
use crate::harness::{Bench, connect, wait_for};
use crate::program::{Running, Signal, is_stopped};
use crate::writers::{Journal, Options, Writers, expect_collection_equals, is_valid};

/// The rule that the writers' documents are kept by.
pub const RULE: &str = "keep = '{\"valid\": true}'";
const COMMAND: &str = "cleanse --parallel 2";

/// A bench whose source is being written to.
pub async fn live(documents: i32) -> (Bench, Writers) {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let writers = Writers::on(&bench, SOURCE, Options { documents, ..Options::default() }).await;
    (bench, writers)
}

/// The target is what the rule makes of all acknowledged writes.
pub async fn expect_target(bench: &Bench, journal: &Journal) {
    expect_collection_equals(bench, TARGET, &journal.expected(is_valid), journal).await;
    expect_collection_equals(bench, SOURCE, &journal.expected(|_| true), journal).await;
}

/// Waits until a follower has caught up with everything that was written.
pub async fn wait_until_in_step(bench: &Bench, journal: &Journal, run: &mut Running) {
    let expected = journal.expected(is_valid);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    // Where it does not, the comparison that follows says how they differ.
    while bytes(bench, TARGET).await != expected && tokio::time::Instant::now() < deadline {
        assert!(run.is_running(), "{}", run.stderr());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    expect_target(bench, journal).await;
}

/// Documents `{_id, valid}` without writers.
async fn bench(documents: i32) -> Bench {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let all = (0..documents).map(|id| doc! {"_id": id, "valid": id % 3 != 0, "x.y": i64::from(id)});
    bench.insert_into(SOURCE, all).await;
    bench
}

fn source(bench: &Bench) -> Collection<Document> {
    bench.database.collection(SOURCE)
}

#[tokio::test]
async fn all_kinds_of_writes_before_during_and_after_each_phase_are_in_the_target() {
    let (bench, writers) = live(10_000).await;
    writers.go_on_for(250).await;
    // Copying, indexes, catching up.
    let run = bench.run(COMMAND).await.expect_exit(0);
    assert!(run.number("/followed/changes") > 0, "{}", run.stdout);
    // Not every operation changes something, but far more than half of them do.
    writers.go_on_for(500).await;
    // What was written after its end is caught up with by the same command.
    let again = bench.run(COMMAND).await.expect_exit(0);
    assert_eq!(again.text("/status"), "completed");
    assert!(again.number("/followed/changes") >= 250, "{}", again.stdout);
    let mut run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    writers.go_on_for(1_500).await;
    let journal = writers.stop().await;
    wait_until_in_step(&bench, &journal, &mut run).await;
    run.signal(Signal::Terminate);
    let ended = run.finish().await.expect_exit(143);
    assert!(ended.number("/followed/changes") >= 750, "{}", ended.stdout);
    // And nothing is left to be done.
    let last = bench.run(COMMAND).await.expect_exit(0);
    assert_eq!(last.number("/followed/changes"), 0);
    expect_target(&bench, &journal).await;
}

#[tokio::test]
async fn a_source_that_is_written_to_by_many_is_followed_from_its_copy_on() {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let options = Options { documents: 5_000, unique: false, seed: 2, ..Options::default() };
    let writers = Writers::on(&bench, SOURCE, options).await;
    let mut run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the copy", async || run.stderr().contains("follows")).await;
    writers.go_on_for(1_250).await;
    let journal = writers.stop().await;
    wait_until_in_step(&bench, &journal, &mut run).await;
    run.signal(Signal::Interrupt);
    run.finish().await.expect_exit(130);
}

#[tokio::test]
async fn values_that_swap_places_under_a_unique_index_end_right() {
    expect_swapped(None, |email| email).await;
}

/// The server names the key of such an index, by which no document is found.
#[tokio::test]
async fn values_that_swap_places_under_a_unique_index_with_a_collation_end_right() {
    let strength = mongodb::options::CollationStrength::Secondary;
    let collation = Collation::builder().locale("en").strength(strength).build();
    expect_swapped(Some(collation), |email| email.to_uppercase()).await;
}

async fn create_unique_index(source: &Collection<Document>, collation: Option<Collation>) {
    let unique = mongodb::options::IndexOptions::builder().unique(true).collation(collation).build();
    let index = IndexModel::builder().keys(doc! {"email": 1}).options(unique).build();
    source.create_index(index).await.expect("an index");
}

/// The target becomes what the source is, byte for byte.
async fn expect_in_step(bench: &Bench, mut run: Running) {
    wait_for("the target in step", async || {
        assert!(run.is_running(), "{}", run.stderr());
        bytes(bench, SOURCE).await == bytes(bench, TARGET).await
    })
    .await;
    run.signal(Signal::Interrupt);
    run.finish().await.expect_exit(130);
}

async fn expect_swapped(collation: Option<Collation>, passed_on: fn(String) -> String) {
    let bench = bench(0).await;
    let source = source(&bench);
    let count = 400;
    let account = |id: i32| doc! {"_id": id, "valid": true, "email": format!("e{id}")};
    bench.insert_into(SOURCE, (0..count).map(account)).await;
    create_unique_index(&source, collation).await;
    let run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the copy", async || run.stderr().contains("follows")).await;
    for round in 0..300 {
        let (one, other) = (round % count, (round * 7 + 1) % count);
        if one == other {
            continue;
        }
        let email = async |id: i32| {
            let found = source.find_one(doc! {"_id": id}).await.expect("a read").expect("there");
            found.get_str("email").expect("an email").to_owned()
        };
        let (first, second) = (email(one).await, email(other).await);
        let set = async |id: i32, email: String| {
            let update = doc! {"$set": {"email": email}};
            source.update_one(doc! {"_id": id}, update).await.expect("a write");
        };
        set(one, "free".into()).await;
        set(other, passed_on(first)).await;
        set(one, passed_on(second)).await;
    }
    expect_in_step(&bench, run).await;
}

/// Each document in the way of another is in the way of a third itself, and nothing has told of it yet.
#[tokio::test]
async fn a_value_that_went_through_many_hands_ends_right() {
    const HANDS: i32 = 60;
    let bench = bench(0).await;
    let source = source(&bench);
    let account = |id: i32| doc! {"_id": id, "valid": true, "email": format!("e{id}"), "other": id >= HANDS};
    bench.insert_into(SOURCE, (0..9_000).map(account)).await;
    create_unique_index(&source, None).await;
    let run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the copy", async || run.stderr().contains("follows")).await;
    // It hears of the first of them long before it hears of the others.
    run.signal(Signal::Stop);
    let set = async |id: i32, email: String| {
        let update = doc! {"$set": {"email": email}};
        source.update_one(doc! {"_id": id}, update).await.expect("a write");
    };
    set(0, "free".into()).await;
    source.update_many(doc! {"other": true}, doc! {"$set": {"v": 1}}).await.expect("a write");
    for id in 1..HANDS {
        set(id, format!("e{}", id - 1)).await;
    }
    set(0, format!("e{}", HANDS - 1)).await;
    run.signal(Signal::Continue);
    expect_in_step(&bench, run).await;
}

/// What is not there any more is not deleted: the copy may be all that is left.
#[tokio::test]
async fn a_source_that_is_dropped_or_replaced_takes_no_document_of_the_target_along() {
    for replace in [false, true] {
        let bench = bench(300).await;
        // So slow that most of what is changed is still to be looked at when the source is gone.
        let run = bench.program(&format!("{COMMAND} --follow --documents-per-second 50")).spawn();
        wait_for("the copy", async || run.stderr().contains("follows")).await;
        let copied = async |filter: Document| {
            let target: Collection<Document> = bench.database.collection(TARGET);
            target.count_documents(filter).await.expect("a count")
        };
        assert_eq!(copied(doc! {}).await, 200);
        source(&bench).update_many(doc! {}, doc! {"$set": {"changed": true}}).await.expect("a write");
        if replace {
            bench
                .insert_into("other", (0..300).map(|id| doc! {"_id": id, "valid": true, "foreign": true}))
                .await;
            let command = doc! {
                "renameCollection": bench.namespace("other"), "to": bench.namespace(SOURCE), "dropTarget": true,
            };
            bench.admin().run_command(command).await.expect("renamed");
        } else {
            source(&bench).drop().await.expect("dropped");
        }
        let ended = run.finish().await.expect_exit(4);
        assert!(ended.text("/error/hint").contains("--restart"), "{}", ended.stdout);
        assert_eq!((copied(doc! {}).await, copied(doc! {"foreign": true}).await), (200, 0));
    }
}

#[tokio::test]
async fn a_source_that_is_dropped_or_renamed_ends_the_run_with_the_state_kept() {
    for rename in [false, true] {
        let bench = bench(500).await;
        let run = bench.program(&format!("{COMMAND} --follow")).spawn();
        wait_for("the copy", async || run.stderr().contains("follows")).await;
        if rename {
            let command =
                doc! {"renameCollection": bench.namespace(SOURCE), "to": bench.namespace("elsewhere")};
            bench.admin().run_command(command).await.expect("renamed");
        } else {
            source(&bench).drop().await.expect("dropped");
        }
        let ended = run.finish().await.expect_exit(4);
        let event = if rename { "rename" } else { "drop" };
        assert!(ended.text("/error/message").contains(event), "{}", ended.stdout);
    }
}

/// How many documents are read at once goes by the size of those before, which says nothing.
#[tokio::test]
async fn large_documents_after_small_ones_do_not_fill_the_memory() {
    const MOST_MEMORY: u64 = 256 << 20;
    let bench = bench(20_000).await;
    for id in 0..120 {
        let large = doc! {"_id": format!("large {id}"), "valid": true, "text": "x".repeat(4 << 20)};
        bench.insert_into(SOURCE, [large]).await;
    }
    let run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    let small = doc! {"_id": {"$type": "int"}};
    source(&bench).update_many(small, doc! {"$set": {"v": 1}}).await.expect("a write");
    let large = doc! {"_id": {"$type": "string"}};
    source(&bench).update_many(large.clone(), doc! {"$set": {"v": 1}}).await.expect("a write");
    let target: Collection<Document> = bench.database.collection(TARGET);
    let mut applied = large;
    applied.insert("v", 1);
    wait_for("the large documents", async || {
        target.count_documents(applied.clone()).await.expect("a count") == 120
    })
    .await;
    let peak = run.peak_memory().expect("it runs");
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
    assert!(peak < MOST_MEMORY, "{} MiB", peak >> 20);
}

/// All changes of a transaction are of one moment, here the very last one before the run looks how
/// far it has to go: it ends when it has brought along all of them.
#[tokio::test]
async fn a_transaction_of_the_last_moment_is_brought_along_as_a_whole() {
    const DOCUMENTS: i32 = 6_000;
    let bench = bench(DOCUMENTS).await;
    bench.run("cleanse").await.expect_exit(0);
    let run = bench.program("cleanse").env("MONGOREKEY_STOP_AT", "drain_begins:1").spawn();
    wait_for("the stop", async || is_stopped(run.pid())).await;
    let client = connect(&bench.uri).await;
    let mut session = client.start_session().await.expect("a session");
    session.start_transaction().await.expect("a transaction");
    let change = doc! {"$set": {"together": true}};
    let live = client.database(bench.database.name()).collection::<Document>(SOURCE);
    live.update_many(doc! {}, change).session(&mut session).await.expect("a write");
    session.commit_transaction().await.expect("a commit");
    run.signal(Signal::Continue);
    run.finish().await.expect_exit(0);
    let target: Collection<Document> = bench.database.collection(TARGET);
    let without = target.count_documents(doc! {"together": {"$ne": true}}).await.expect("a count");
    assert_eq!(without, 0);
}

/// What the driver would ask for is another `_id`, and the document would seem to be gone.
#[tokio::test]
async fn a_write_to_an_id_in_which_a_field_stands_twice_is_brought_along() {
    let bench = bench(20).await;
    let mut id = rawdoc! {"a": 1};
    id.append(cstr!("a"), 2);
    insert_raw(&bench, SOURCE, vec![rawdoc! {"_id": id, "valid": true, "odd": true}]).await;
    let run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    let target: Collection<Document> = bench.database.collection(TARGET);
    let odd = doc! {"odd": true};
    assert_eq!(target.count_documents(odd.clone()).await.expect("a count"), 1);
    source(&bench).update_one(odd.clone(), doc! {"$set": {"v": 1}}).await.expect("a write");
    let changed = doc! {"odd": true, "v": 1};
    wait_for("the write", async || target.count_documents(changed.clone()).await.expect("a count") == 1)
        .await;
    source(&bench).delete_one(odd.clone()).await.expect("a delete");
    wait_for("the delete", async || target.count_documents(odd.clone()).await.expect("a count") == 0).await;
    run.signal(Signal::Interrupt);
    run.finish().await.expect_exit(130);
}

/// Only the source can tell what has become of it.
#[tokio::test]
async fn duplicates_after_the_source_has_lost_its_unique_index_are_named_with_a_way_on() {
    let bench = bench(0).await;
    let source = source(&bench);
    let account = |id: i32| doc! {"_id": id, "valid": true, "email": format!("e{id}")};
    bench.insert_into(SOURCE, (0..50).map(account)).await;
    create_unique_index(&source, None).await;
    let run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    source.drop_index("email_1").await.expect("dropped");
    source.update_one(doc! {"_id": 1}, doc! {"$set": {"email": "e2"}}).await.expect("a write");
    let stopped = run.finish().await.expect_exit(4);
    let hint = stopped.json["error"]["hint"].to_string();
    assert!(hint.contains("does not have the unique index email_1 any more"), "{}", stopped.output());
    let target: Collection<Document> = bench.database.collection(TARGET);
    target.drop_index("email_1").await.expect("dropped");
    bench.run(COMMAND).await.expect_exit(0);
    assert_eq!(bytes(&bench, TARGET).await, bytes(&bench, SOURCE).await);
}
