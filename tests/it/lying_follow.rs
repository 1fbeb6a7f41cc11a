//! A follower whose writes arrive late, after another process has taken the job over, or to which the
//! network lets nothing through any more.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bson::{Document, doc};
use mongodb::Collection;
use tokio::time::Instant;

use crate::cleansing::{SOURCE, TARGET, configure};
use crate::harness::{Bench, wait_for};
use crate::lying_network::{Command, Network, Rule};
use crate::program::Signal;

/// A run ends so soon after the first signal, and a little for a busy machine.
const LONGEST_END: Duration = Duration::from_secs(13);

async fn copied() -> Bench {
    let bench = Bench::new().await;
    configure(&bench, "keep = '{\"valid\": true}'");
    bench.insert_into(SOURCE, (0..300).map(|id| doc! {"_id": id, "valid": id % 3 != 0})).await;
    bench.run("cleanse").await.expect_exit(0);
    bench
}

async fn set_version(bench: &Bench, version: i32) {
    let source: Collection<Document> = bench.database.collection(SOURCE);
    source.update_one(doc! {"_id": 1}, doc! {"$set": {"version": version}}).await.expect("a write");
}

async fn version(bench: &Bench) -> Option<i32> {
    let target: Collection<Document> = bench.database.collection(TARGET);
    let document = target.find_one(doc! {"_id": 1}).await.expect("a read").expect("the document");
    document.get_i32("version").ok()
}

/// Killed while a command of its transaction is on its way, which is delivered after another process
/// has written a newer state.
async fn late_command_changes_nothing(rule: Rule) {
    let bench = copied().await;
    let network = Network::before(&bench.uri).await;
    let mut held = network.hold(rule);
    let run = bench.program("cleanse --follow").env("MONGOREKEY_URI", &network.uri()).spawn();
    set_version(&bench, 1).await;
    let late = held.arrived().await;
    run.kill();
    set_version(&bench, 2).await;
    bench.run("cleanse").await.expect_exit(0);
    assert_eq!(version(&bench).await, Some(2));
    for answer in [held.deliver_copy().await, held.release().await] {
        let is_refused = answer.get_f64("ok").unwrap_or(0.0) < 1.0 || answer.contains_key("writeErrors");
        assert!(is_refused, "{late:?}: {answer}");
        assert_eq!(version(&bench).await, Some(2), "{late:?}");
    }
}

/// The commit of a transaction after a document of the target was written.
fn commit_of_a_write() -> Rule {
    let is_written = AtomicBool::new(false);
    Rule::any().that(move |command| {
        if command.name == "update" && command.collection() == TARGET {
            is_written.store(true, Ordering::SeqCst);
        }
        command.name == "commitTransaction" && is_written.load(Ordering::SeqCst)
    })
}

/// Part of a transaction, and about this collection.
fn within_a_transaction(name: &'static str, collection: &'static str) -> Rule {
    Rule::on(name).of(collection).that(|command| command.body.contains_key("autocommit"))
}

fn begins(command: &Command) -> bool {
    command.body.contains_key("startTransaction")
}

#[tokio::test]
async fn lying_network_delivers_the_gate_of_a_former_follower_and_it_is_closed() {
    late_command_changes_nothing(within_a_transaction("update", "lanes").that(begins)).await;
}

#[tokio::test]
async fn lying_network_delivers_the_update_of_a_former_follower_and_nothing_changes() {
    late_command_changes_nothing(within_a_transaction("update", TARGET)).await;
}

#[tokio::test]
async fn lying_network_delivers_the_commit_of_a_former_follower_and_nothing_changes() {
    late_command_changes_nothing(commit_of_a_write()).await;
}

/// The server has committed, and the follower is not told.
#[tokio::test]
async fn lying_network_loses_the_answer_to_a_commit_and_the_change_is_there_once() {
    let bench = copied().await;
    let network = Network::before(&bench.uri).await;
    set_version(&bench, 1).await;
    network.lose_reply(commit_of_a_write());
    bench.program("cleanse").env("MONGOREKEY_URI", &network.uri()).run().await.expect_exit(0);
    assert!(network.is_done(), "no answer was lost: {:?}", network.log());
    assert_eq!(version(&bench).await, Some(1));
}

/// What is told to stop while nothing gets through ends nevertheless.
#[tokio::test]
async fn lying_network_freezes_and_a_follower_ends_soon_after_the_signal() {
    let bench = copied().await;
    let network = Network::before(&bench.uri).await;
    let run = bench.program("cleanse --follow").env("MONGOREKEY_URI", &network.uri()).spawn();
    set_version(&bench, 1).await;
    wait_for("the change", async || version(&bench).await == Some(1)).await;
    network.freeze();
    set_version(&bench, 2).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let told = Instant::now();
    run.signal(Signal::Terminate);
    let run = run.finish().await;
    assert!(told.elapsed() < LONGEST_END, "{:?}\n{}", told.elapsed(), run.output());
    network.thaw();
    bench.run("cleanse").await.expect_exit(0);
    assert_eq!(version(&bench).await, Some(2));
}
