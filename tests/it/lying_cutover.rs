//! Exchanges of names whose commands arrive late: after their process has been killed, somebody has
//! let writes through again, and the application was told that what it wrote is stored.

use bson::{Bson, Document, doc};
use mongodb::Collection;

use crate::cleansing::{SOURCE, configure, job_name};
use crate::harness::{Bench, wait_for};
use crate::lying_network::{Network, Rule};

/// Written by the application after its writes were let through again.
const ACKNOWLEDGED: i32 = 150;

async fn copied() -> Bench {
    let bench = Bench::new().await;
    configure(&bench, "keep = '{\"valid\": true}'");
    bench.insert_into(SOURCE, (0..300).map(|id| doc! {"_id": id, "valid": id % 3 != 0})).await;
    bench.run("cleanse").await.expect_exit(0);
    bench
}

fn source(bench: &Bench) -> Collection<Document> {
    bench.database.collection(SOURCE)
}

async fn fence(bench: &Bench) -> Option<Bson> {
    let job = bench.job(&job_name(bench)).await.expect("the job");
    job.get_document("cutover").ok().and_then(|record| record.get("fence").cloned())
}

async fn expect_acknowledged(bench: &Bench, count: i32) {
    let found = source(bench).count_documents(doc! {"_id": {"$gte": 1_000}}).await.expect("a count");
    assert_eq!(found, u64::try_from(count).expect("small"), "acknowledged writes are lost");
}

/// Whether the server has refused a command, or part of it.
fn is_refused(answer: &Document) -> bool {
    answer.get_f64("ok").unwrap_or(0.0) < 1.0 || answer.contains_key("writeErrors")
}

/// Killed while a command of the exchange is on its way, which is delivered once writes go on.
async fn late_command_exchanges_nothing(mode: &str, rule: Rule) {
    let bench = copied().await;
    let network = Network::before(&bench.uri).await;
    let mut held = network.hold(rule);
    let command = format!("cutover --mode {mode} --yes");
    let run = bench.program(&command).env("MONGOREKEY_URI", &network.uri()).spawn();
    let late = held.arrived().await;
    assert_ne!(fence(&bench).await, Some(Bson::Null), "{late:?}");
    run.kill();
    wait_for("writes to be let through", async || fence(&bench).await == Some(Bson::Null)).await;
    let written = (0..ACKNOWLEDGED).map(|number| doc! {"_id": 1_000 + number, "valid": true});
    source(&bench).insert_many(written).await.expect("writes go on");

    // First as if the connection were another one, then over its own.
    for answer in [held.deliver_copy().await, held.release().await] {
        assert!(is_refused(&answer), "{late:?}: {answer}");
    }
    expect_acknowledged(&bench, ACKNOWLEDGED).await;
    source(&bench).insert_one(doc! {"_id": 5_000, "valid": true}).await.expect("no fence");
    bench.run(&command).await.expect_exit(0);
    expect_acknowledged(&bench, ACKNOWLEDGED + 1).await;
}

#[tokio::test]
async fn lying_network_delivers_the_rename_of_a_swap_after_writes_go_on_and_nothing_is_exchanged() {
    // The first one gives the copy the name of the attempt.
    late_command_exchanges_nothing("swap", Rule::on("renameCollection").after(1)).await;
}

#[tokio::test]
async fn lying_network_delivers_the_exchange_of_a_keep_after_writes_go_on_and_nothing_is_exchanged() {
    // The first one is the question whether it is permitted.
    late_command_exchanges_nothing("keep", Rule::on("applyOps").after(1)).await;
}

/// The exchange has happened, and its process is told nothing.
async fn lost_answer_ends_in_a_known_state(mode: &str, rule: Rule) {
    let bench = copied().await;
    let network = Network::before(&bench.uri).await;
    network.lose_reply(rule);
    let run = bench.program(&format!("cutover --mode {mode} --yes"));
    let run = run.env("MONGOREKEY_URI", &network.uri()).run().await.expect_exit(0);
    assert!(network.is_done(), "no answer was lost: {:?}", network.log());
    assert_eq!(run.text("/outcome"), "cut_over", "{}", run.output());
    assert_eq!(fence(&bench).await, Some(Bson::Null));
    assert_eq!(source(&bench).count_documents(doc! {}).await.expect("a count"), 200);
    source(&bench).insert_one(doc! {"_id": 5_000, "valid": true}).await.expect("no fence");
}

#[tokio::test]
async fn lying_network_loses_the_answer_to_the_exchange_and_the_cutover_ends_in_a_known_state() {
    lost_answer_ends_in_a_known_state("swap", Rule::on("renameCollection").after(1)).await;
    lost_answer_ends_in_a_known_state("keep", Rule::on("applyOps").after(1)).await;
}

/// Updates of the job that set this field.
fn stores(field: &'static str) -> Rule {
    Rule::on("update").of("jobs").that(move |command| {
        let updates = command.body.get_array("updates").ok();
        let update = updates.and_then(|updates| updates.first()?.as_document()?.get_document("u").ok());
        update.and_then(|update| update.get_document("$set").ok()).is_some_and(|set| set.contains_key(field))
    })
}

/// Sends a command again that was carried out already, by another number of another session, as a client
/// does that tries for long; it finds nothing to do.
async fn again_changes_nothing(bench: &Bench, mut command: Document) {
    let record = async || bench.job(&job_name(bench)).await.expect("the job").get("cutover").cloned();
    let ended = record().await;
    for name in ["lsid", "txnNumber", "$clusterTime", "$db"] {
        command.remove(name);
    }
    let answer = bench.state.run_command(command).await.expect("an answer");
    assert_eq!(answer.get_i32("n").ok(), Some(0), "{answer}");
    assert_eq!(record().await, ended);
    source(bench).insert_one(doc! {"_id": 5_000, "valid": true}).await.expect("no fence");
}

#[tokio::test]
async fn lying_network_brings_the_record_again_after_a_recovery_and_it_stays_closed() {
    let bench = copied().await;
    let network = Network::before(&bench.uri).await;
    let mut held = network.hold(stores("cutover"));
    let run = bench.program("cutover --mode swap --yes").env("MONGOREKEY_URI", &network.uri()).spawn();
    let command = held.arrived().await.body;
    // It is killed as soon as the record is there.
    let mut next = network.hold(Rule::on("update").of("jobs"));
    assert!(!is_refused(&held.release().await), "it is stored once");
    next.arrived().await;
    run.kill();
    wait_for("the end of the attempt", async || fence(&bench).await == Some(Bson::Null)).await;
    again_changes_nothing(&bench, command).await;
    bench.run("cutover --mode swap --yes").await.expect_exit(0);
    assert_eq!(source(&bench).count_documents(doc! {"_id": 5_000}).await.expect("a count"), 1);
}

#[tokio::test]
async fn lying_network_brings_a_save_again_after_the_end_and_the_record_stays_closed() {
    let bench = copied().await;
    let network = Network::before(&bench.uri).await;
    let mut held = network.hold(stores("cutover.state"));
    let run = bench.program("cutover --mode swap --yes --max-pause 10s");
    let run = run.env("MONGOREKEY_URI", &network.uri()).spawn();
    let command = held.arrived().await.body;
    assert!(!is_refused(&held.release().await), "it is stored once");
    run.finish().await.expect_exit(0);
    again_changes_nothing(&bench, command).await;
}
