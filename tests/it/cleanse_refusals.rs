//! What a cleanse does not touch, and how it says so.

use bson::{Document, doc};
use mongodb::Collection;
use serde_json::json;

use crate::cleansing::{
    FailPoint, SOURCE, TARGET, assert_same, bytes, bytes_where, config, configure, job_name, name_now,
    next_namespace,
};
use crate::harness::{Bench, wait_for};
use crate::program::{Finished, Running};

const LOW: &str = "keep = '{\"n\": {\"$lt\": 500}}'";
const HIGH: &str = "keep = '{\"n\": {\"$gte\": 500}}'";

async fn seed(bench: &Bench) {
    bench.insert_into(SOURCE, (0..1000).map(|n| doc! {"_id": n, "n": n})).await;
}

async fn collections(bench: &Bench) -> Vec<String> {
    let mut names = bench.database.list_collection_names().await.expect("names");
    names.sort();
    names
}

#[track_caller]
fn expect_refusal(run: Finished, words: &str) -> Finished {
    let run = run.expect_exit(3);
    assert_eq!(run.text("/error/code"), "refused");
    let said = format!("{} {}", run.text("/error/message"), run.json["error"]["hint"]);
    assert!(said.contains(words), "{said}");
    run
}

#[tokio::test]
async fn sources_that_cannot_be_copied_are_refused() {
    let bench = Bench::new().await;
    bench.insert_into("plain", [doc! {"_id": 1}]).await;
    let cases = [
        (doc! {"create": SOURCE, "capped": true, "size": 100_000}, "capped"),
        (doc! {"create": SOURCE, "timeseries": {"timeField": "at"}}, "time-series"),
        (doc! {"create": SOURCE, "viewOn": "plain", "pipeline": []}, "view"),
    ];
    for (command, word) in cases {
        bench.database.run_command(command).await.expect("created");
        configure(&bench, "");
        for command in ["cleanse", "cleanse --dry-run"] {
            expect_refusal(bench.run(command).await, word);
        }
        assert!(!collections(&bench).await.iter().any(|name| name == TARGET));
        bench.database.collection::<Document>(SOURCE).drop().await.expect("dropped");
    }
    assert!(!bench.has_state().await);
}

#[tokio::test]
async fn a_missing_source_is_refused() {
    let bench = Bench::new().await;
    configure(&bench, "");
    for command in ["cleanse", "cleanse --dry-run"] {
        expect_refusal(bench.run(command).await, SOURCE);
    }
    assert!(!bench.has_state().await && collections(&bench).await.is_empty());
}

#[tokio::test]
async fn a_target_that_somebody_else_made_is_not_touched() {
    let bench = Bench::new().await;
    seed(&bench).await;
    for documents in [vec![], vec![doc! {"_id": "theirs"}]] {
        bench.database.create_collection(TARGET).await.expect("created");
        bench.insert_into(TARGET, documents.clone()).await;
        configure(&bench, "");
        for command in ["cleanse", "cleanse --restart"] {
            expect_refusal(bench.run(command).await, TARGET);
            assert_eq!(bench.documents(TARGET).await, documents);
        }
        bench.database.collection::<Document>(TARGET).drop().await.expect("dropped");
    }
    assert!(!bench.has_state().await);
}

#[tokio::test]
async fn a_target_that_was_replaced_is_not_touched() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, "");
    bench.run("cleanse").await.expect_exit(0);
    bench.database.collection::<Document>(TARGET).drop().await.expect("dropped");
    bench.insert_into(TARGET, [doc! {"_id": "theirs"}]).await;
    for command in ["cleanse", "cleanse --restart"] {
        expect_refusal(bench.run(command).await, TARGET);
    }
    assert_eq!(bench.documents(TARGET).await, [doc! {"_id": "theirs"}]);
}

#[tokio::test]
async fn a_collection_is_not_copied_onto_itself() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, "");
    bench.run(&format!("cleanse --to {SOURCE}")).await.expect_exit(2);
    assert_eq!(bytes(&bench, SOURCE).await.len(), 1000);
}

#[tokio::test]
async fn names_that_are_no_collections_are_usage_errors() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, "");
    for name in ["system.users", "a$b"] {
        bench.run(&format!("cleanse --to {name}")).await.expect_exit(2);
    }
    bench.program("cleanse").argument("--to").argument("").run().await.expect_exit(2);
    assert_eq!(collections(&bench).await, [SOURCE]);
}

#[tokio::test]
async fn a_finished_job_says_so_and_catches_up() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, LOW);
    let first = bench.run("cleanse").await.expect_exit(0);
    bench.insert_into(SOURCE, [doc! {"_id": "new", "n": 1}]).await;
    let before = bytes(&bench, TARGET).await;

    let second = bench.run("cleanse").await.expect_exit(0);
    assert!(second.stderr.contains("complete"), "{}", second.stderr);
    assert_eq!(second.number("/documents/copied"), first.number("/documents/copied") + 1);
    let mut after = bytes(&bench, TARGET).await;
    after.retain(|id, _| before.contains_key(id));
    assert_same(&after, &before);
}

#[tokio::test]
async fn changed_rules_are_refused_with_the_difference_and_restart_copies_anew() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, LOW);
    bench.run("cleanse").await.expect_exit(0);
    configure(&bench, HIGH);

    let run = expect_refusal(bench.run("cleanse").await, "rules");
    let message = run.text("/error/message");
    assert!(message.contains("$lt") && message.contains("$gte"), "{message}");
    assert_same(&bytes(&bench, TARGET).await, &bytes_where(&bench, SOURCE, doc! {"n": {"$lt": 500}}).await);
    bench.run("cleanse --restart").await.expect_exit(0);
    let high = bytes_where(&bench, SOURCE, doc! {"n": {"$gte": 500}}).await;
    assert_same(&bytes(&bench, TARGET).await, &high);
    bench.run("cleanse").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &high);
}

#[tokio::test]
async fn a_restart_copies_what_has_changed_since() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, "");
    bench.run("cleanse").await.expect_exit(0);
    let source: Collection<Document> = bench.database.collection(SOURCE);
    source.delete_many(doc! {"n": {"$lt": 10}}).await.expect("deleted");
    source.update_many(doc! {}, doc! {"$set": {"new": true}}).await.expect("changed");

    bench.run("cleanse --restart").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
}

#[tokio::test]
async fn a_target_that_was_dropped_by_hand_is_missed() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, "");
    bench.run("cleanse").await.expect_exit(0);
    bench.database.collection::<Document>(TARGET).drop().await.expect("dropped");

    expect_refusal(bench.run("cleanse").await, "--restart");
    assert_eq!(collections(&bench).await, [SOURCE]);
    bench.run("cleanse --restart").await.expect_exit(0);
    assert_eq!(bytes(&bench, TARGET).await.len(), 1000);
}

/// Starts a cleanse that stands still until the fail point is off.
async fn start_and_hold(bench: &Bench, inserts: &FailPoint) -> Running {
    let data = doc! {"nss": next_namespace(bench, "cleanse", TARGET).await, "shouldCheckForInterrupt": true};
    inserts.set(bench, "alwaysOn", data).await;
    let mut run = bench.program("cleanse").spawn();
    wait_for("ranges being copied", async || {
        assert!(run.is_running(), "{}", run.stderr());
        let ranges: Collection<Document> = bench.state.collection("ranges");
        ranges.count_documents(doc! {"state": "copying"}).await.expect("a count") > 0
    })
    .await;
    run
}

#[tokio::test]
async fn a_second_start_while_the_first_runs_is_refused() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, "");
    let inserts = FailPoint::reserve("hangDuringBatchInsert");
    let first = start_and_hold(&bench, &inserts).await;
    for command in ["cleanse", "cleanse --restart"] {
        expect_refusal(bench.run(command).await, "process");
    }
    inserts.off(&bench).await;
    first.finish().await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
}

#[tokio::test]
async fn a_job_of_another_command_is_not_taken() {
    let bench = Bench::with_docs(1).await;
    let api = crate::key_api::KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.run("backfill --tps 1000 --job same").await.expect_exit(0);
    configure(&bench, "");
    seed(&bench).await;
    expect_refusal(bench.run("cleanse --job same").await, "backfill");
    assert!(!collections(&bench).await.iter().any(|name| name == TARGET));
}

#[tokio::test]
async fn the_default_state_is_left_alone_by_what_is_refused() {
    let bench = Bench::new().await;
    seed(&bench).await;
    bench.configure_text(&config(&bench, "").replace("to = 'target'", ""));
    let run = bench.run("cleanse").await.expect_exit(2);
    assert!(run.text("/error/hint").contains("--to"), "{}", run.stdout);
    assert_eq!(run.json["command"], json!("cleanse"));
    assert!(!bench.has_state().await);
}

#[tokio::test]
async fn a_finished_job_whose_restart_is_killed_early_is_not_taken_for_the_new_one() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, LOW);
    bench.run("cleanse").await.expect_exit(0);
    // The restart under new rules has taken the job and looks at the source when it is killed.
    configure(&bench, HIGH);
    let commands = FailPoint::reserve("failCommand");
    let data = doc! {
        "failCommands": ["count"], "namespace": bench.namespace(SOURCE),
        "blockConnection": true, "blockTimeMS": 1000,
    };
    let entered = commands.set(&bench, doc! {"times": 1}, data).await;
    let restart = bench.program("cleanse --restart").spawn();
    commands.wait_until_entered(&bench, entered + 1).await;
    restart.kill();
    drop(commands);

    let run = bench.run("cleanse").await;
    if run.exit != Some(0) {
        expect_refusal(run, "--restart");
        bench.run("cleanse --restart").await.expect_exit(0);
    }
    assert_same(&bytes(&bench, TARGET).await, &bytes_where(&bench, SOURCE, doc! {"n": {"$gte": 500}}).await);
}

#[tokio::test]
async fn a_restart_that_is_killed_early_mixes_no_rules() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, HIGH);
    // A run that dies in the middle, some ranges done.
    let inserts = FailPoint::reserve("hangDuringBatchInsert");
    let mut first = start_and_hold(&bench, &inserts).await;
    let ranges: Collection<Document> = bench.state.collection("ranges");
    wait_for("the lower ranges, which have nothing to copy", async || {
        assert!(first.is_running(), "{}", first.stderr());
        ranges.count_documents(doc! {"state": "done"}).await.expect("a count") > 0
            && ranges.count_documents(doc! {"state": "copying"}).await.expect("a count") > 0
    })
    .await;
    first.kill();
    inserts.off(&bench).await;
    let locked = async || {
        let mut session = bench.state.client().start_session().await.expect("a session");
        session.start_transaction().await.expect("a transaction");
        let touch = doc! {"$set": {"test": true}};
        ranges.update_many(doc! {}, touch).session(&mut session).await.expect("locked");
        session
    };
    // The restart under new rules dies while it ends what the first run had begun.
    configure(&bench, LOW);
    let mut session = locked().await;
    let mut restart = bench.program("cleanse --restart").spawn();
    wait_for("the new rules in the job", async || {
        assert!(restart.is_running(), "{}", restart.stderr());
        bench.job(&job_name(&bench)).await.expect("a job").to_string().contains("$lt")
    })
    .await;
    restart.kill();
    session.abort_transaction().await.expect("aborted");

    let run = bench.run("cleanse").await;
    if run.exit != Some(0) {
        expect_refusal(run, "--restart");
        bench.run("cleanse --restart").await.expect_exit(0);
    }
    assert_same(&bytes(&bench, TARGET).await, &bytes_where(&bench, SOURCE, doc! {"n": {"$lt": 500}}).await);
}

#[tokio::test]
async fn a_restart_that_is_killed_while_it_creates_the_target_can_be_repeated() {
    for again in ["cleanse", "cleanse --restart"] {
        let bench = Bench::new().await;
        seed(&bench).await;
        configure(&bench, "");
        bench.run("cleanse").await.expect_exit(0);
        let commands = FailPoint::reserve("failCommand");
        let name = next_namespace(&bench, "cleanse", TARGET).await;
        let data = doc! {
            "failCommands": ["create"], "namespace": name,
            "blockConnection": true, "blockTimeMS": 1500,
        };
        let entered = commands.set(&bench, doc! {"times": 1}, data).await;
        let restart = bench.program("cleanse --restart").spawn();
        commands.wait_until_entered(&bench, entered + 1).await;
        restart.kill();
        wait_for("the server to create the target", async || name_now(&bench, TARGET).await != TARGET).await;
        drop(commands);

        bench.run(again).await.expect_exit(0);
        assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
    }
}

/// A source of the same name that somebody made anew is another one.
#[tokio::test]
async fn a_source_that_was_replaced_in_between_is_noticed() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, "");
    let inserts = FailPoint::reserve("hangDuringBatchInsert");
    start_and_hold(&bench, &inserts).await.kill();
    inserts.off(&bench).await;
    bench.database.collection::<Document>(SOURCE).drop().await.expect("dropped");
    seed(&bench).await;

    let run = bench.run("cleanse").await;
    assert!(matches!(run.exit, Some(3 | 4)), "{}", run.output());
}
