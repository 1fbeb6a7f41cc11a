//! `verify --repair` makes a target what the source says, and nothing else.

use std::time::Duration;

use bson::{Document, doc};
use mongodb::Collection;
use serde_json::{Value, json};

use crate::cleansing::{
    SOURCE, TARGET, assert_same, bytes, bytes_where, config, configure, every_type, ids, job_name,
};
use crate::fail_points::{fail, named_uri};
use crate::harness::{Bench, wait_for};
use crate::program::{Finished, Signal};

const RULE: &str = "keep = '{\"valid\": true}'";
const REPAIR: &str = "verify --full --repair --yes --settle 1ms";

/// A copy with documents of every kind, one in ten of which is not valid.
async fn copied() -> Bench {
    let bench = Bench::new().await;
    let documents = (0..).zip(ids(2_500)).map(|(number, id)| {
        let mut document = every_type(id, number);
        document.insert("valid", number % 10 != 0);
        document
    });
    bench.insert_into(SOURCE, documents).await;
    bench.configure_text(&config(&bench, RULE).replace(&bench.uri, &named_uri(&bench)));
    bench.run("cleanse").await.expect_exit(0);
    bench
}

fn collection(bench: &Bench, name: &str) -> Collection<Document> {
    bench.database.collection(name)
}

/// Plants documents of each kind; returns how many are missing, extra and different.
async fn plant(bench: &Bench) -> [u64; 3] {
    let target = collection(bench, TARGET);
    let missing = target.delete_many(doc! {"long": {"$lt": 300}}).await.expect("deleted").deleted_count;
    let change = doc! {"$set": {"int": 7.5}};
    let changed =
        target.update_many(doc! {"long": {"$gte": 2_000}}, change).await.expect("changed").modified_count;
    // One that the rules reject, one that the source does not have.
    let rejected = collection(bench, SOURCE).find_one(doc! {"valid": false}).await.expect("an answer");
    bench.insert_into(TARGET, [rejected.expect("a document"), doc! {"_id": {"extra": 1}}]).await;
    [missing, 2, changed]
}

async fn expect_right(bench: &Bench) {
    assert_same(&bytes(bench, TARGET).await, &bytes_where(bench, SOURCE, doc! {"valid": true}).await);
}

fn full(run: &Finished) -> &Value {
    let checks = run.json["checks"].as_array().unwrap_or_else(|| panic!("{}", run.output()));
    checks.iter().find(|check| check["name"] == json!("full")).unwrap_or_else(|| panic!("{}", run.output()))
}

#[tokio::test]
async fn what_differs_is_repaired_and_verified_again() {
    let bench = copied().await;
    let [missing, extra, different] = plant(&bench).await;
    let job = bench.job(&job_name(&bench)).await.expect("the job");
    let run = bench.run(REPAIR).await.expect_exit(0);
    expect_right(&bench).await;
    assert_eq!((&run.json["passed"], &full(&run)["passed"]), (&json!(true), &json!(true)));
    let before = |kind: &str| run.number(&format!("/repair/before/full/{kind}"));
    assert_eq!([before("missing"), before("extra"), before("different")], [missing, extra, different]);
    assert_eq!(run.json["repair"]["before"]["check"]["passed"], json!(false));
    assert_eq!(run.number("/repair/differing"), missing + extra + different);
    // Only what differs is touched.
    assert_eq!(run.number("/repair/written"), missing + different);
    assert_eq!(run.number("/repair/removed"), extra);
    let after = bench.job(&job_name(&bench)).await.expect("the job");
    assert_eq!((after.get("state"), after.get("lease")), (job.get("state"), None));
    assert_eq!(after.get("feed"), job.get("feed"), "the source is followed from where it was");
    // Nothing is left to do, for the repair and for the cleanse.
    let again = bench.run(REPAIR).await.expect_exit(0);
    assert_eq!(again.json["repair"]["needed"], json!(false));
    bench.run("cleanse").await.expect_exit(0);
    expect_right(&bench).await;
}

/// Before the repair the target holds other numbers of documents, and one that was rejected.
#[tokio::test]
async fn what_a_repair_changes_is_judged_after_it() {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    bench.insert_into(SOURCE, (0..100).map(|id| doc! {"_id": id, "valid": id % 10 != 0})).await;
    bench.run("cleanse --quarantine rejected").await.expect_exit(0);
    let [target, rejected] = [TARGET, "rejected"].map(|name| collection(&bench, name));
    target.delete_many(doc! {"_id": {"$lt": 30}}).await.expect("deleted");
    target.insert_one(doc! {"_id": 50, "valid": false}).await.expect("a write");
    rejected.delete_one(doc! {"_id": 50}).await.expect("deleted");
    bench.run(&format!("{REPAIR} --counts --sample 50")).await.expect_exit(0);
    expect_right(&bench).await;
}

#[tokio::test]
async fn a_killed_repair_is_gone_on_with() {
    for point in ["repair_marked", "lane_statement", "lane_committed", "repair_applied"] {
        let bench = copied().await;
        plant(&bench).await;
        let killed = bench.program(REPAIR).env("MONGOREKEY_CRASH_AT", &format!("{point}:1")).run().await;
        assert_eq!(killed.exit, None, "{point}: {}", killed.output());
        if point == "repair_marked" {
            // What is marked is brought along by a cleanse as well.
            bench.run("cleanse").await.expect_exit(0);
        }
        let run = bench.run(REPAIR).await;
        assert_eq!(run.exit, Some(0), "{point}: {}", run.output());
        expect_right(&bench).await;
    }
}

#[tokio::test]
async fn what_was_written_since_is_repaired_by_what_the_source_has_now() {
    let bench = copied().await;
    plant(&bench).await;
    let source = collection(&bench, SOURCE);
    source.update_one(doc! {"long": 5}, doc! {"$set": {"valid": false}}).await.expect("changed");
    source.delete_one(doc! {"long": 2_001}).await.expect("deleted");
    source.update_one(doc! {"long": 2_002}, doc! {"$set": {"string": "new"}}).await.expect("changed");
    source.update_one(doc! {"long": 20}, doc! {"$set": {"valid": true}}).await.expect("changed");
    bench.run(REPAIR).await.expect_exit(0);
    expect_right(&bench).await;
}

#[tokio::test]
async fn it_asks_first_and_only_with_full() {
    let bench = copied().await;
    plant(&bench).await;
    let before = bytes(&bench, TARGET).await;
    for command in [
        "verify --repair --yes",
        "verify --counts --repair --yes",
        "verify --full --repair --settle 1ms",
        "verify --full --yes",
    ] {
        bench.run(command).await.expect_exit(2);
    }
    assert_same(&bytes(&bench, TARGET).await, &before);
}

#[tokio::test]
async fn what_is_no_finished_copy_of_this_job_is_refused() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, [doc! {"_id": 1, "valid": true}]).await;
    bench.insert_into(TARGET, [doc! {"_id": 2}]).await;
    configure(&bench, RULE);
    bench.run(REPAIR).await.expect_exit(3);
    assert!(!bench.has_state().await, "nothing was touched");
    bench.run("cleanse --dual-write").await.expect_exit(0);
    let refused = bench.run(REPAIR).await.expect_exit(3);
    assert!(refused.text("/error/message").contains("application"), "{}", refused.stdout);

    let bench = copied().await;
    plant(&bench).await;
    let before = bytes(&bench, TARGET).await;
    configure(&bench, "keep = '{\"valid\": false}'");
    bench.run(REPAIR).await.expect_exit(3);
    configure(&bench, RULE);
    let copy = [doc! {"$match": {}}, doc! {"$out": "other"}];
    collection(&bench, TARGET).aggregate(copy).await.expect("a copy");
    let rename = doc! {"renameCollection": bench.namespace("other"), "to": bench.namespace(TARGET), "dropTarget": true};
    bench.admin().run_command(rename).await.expect("renamed");
    bench.run(REPAIR).await.expect_exit(3);
    assert_same(&bytes(&bench, TARGET).await, &before);
}

#[tokio::test]
async fn beside_a_follower_and_after_a_cutover_nothing_is_repaired() {
    let bench = copied().await;
    let follower = bench.program("cleanse --follow").spawn();
    wait_for("the follower", async || follower.stderr().contains("follows")).await;
    collection(&bench, TARGET).delete_one(doc! {"long": 5}).await.expect("deleted");
    let refused = bench.run(REPAIR).await.expect_exit(3);
    assert!(refused.text("/error/message").contains("is being run by"), "{}", refused.stdout);
    follower.signal(Signal::Interrupt);
    follower.finish().await.expect_exit(130);
    bench.run(REPAIR).await.expect_exit(0);
    expect_right(&bench).await;
    bench.run("cutover --mode swap --max-pause 10s --yes").await.expect_exit(0);
    let refused = bench.run(REPAIR).await.expect_exit(3);
    assert!(refused.text("/error/message").contains("cut over"), "{}", refused.stdout);
}

#[tokio::test]
async fn a_collection_that_takes_the_name_of_the_target_meanwhile_is_not_written_to() {
    let bench = copied().await;
    bench.insert_into("other", [doc! {"_id": 1}]).await;
    let target = collection(&bench, TARGET);
    let change = doc! {"$set": {"int": 7.5}};
    target.update_many(doc! {"long": {"$gte": 2_000}}, change).await.expect("changed");
    let slow = doc! {
        "failCommands": ["update"], "namespace": bench.namespace(TARGET),
        "blockConnection": true, "blockTimeMS": 4_000,
    };
    let point = fail(&bench, "alwaysOn", slow).await;
    let run = bench.program(REPAIR).spawn();
    let marks: Collection<Document> = bench.state.collection("marks");
    wait_for("the marks", async || marks.count_documents(doc! {}).await.expect("a count") > 0).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let rename = doc! {"renameCollection": bench.namespace("other"), "to": bench.namespace(TARGET), "dropTarget": true};
    bench.admin().run_command(rename).await.expect("renamed");
    let run = run.finish().await.expect_exit(4);
    drop(point);
    assert_eq!(run.json["passed"], json!(false));
    assert_eq!(bench.documents(TARGET).await, [doc! {"_id": 1}]);
}

#[tokio::test]
async fn a_failed_verification_takes_the_pass_away_that_a_cutover_would_go_by() {
    let bench = copied().await;
    let verdict = async || {
        let job = bench.job(&format!("verify-{}-to-{TARGET}", bench.namespace(SOURCE))).await.expect("a job");
        job.get_document("verdict").expect("a verdict").get_bool("passed").expect("a word")
    };
    let cutover = "cutover --mode swap --max-pause 10s --yes";
    for command in ["verify --sample 100000 --settle 1ms", "verify --counts --settle 1ms"] {
        bench.run("verify --full").await.expect_exit(0);
        assert!(verdict().await);
        let gone = collection(&bench, TARGET).find_one_and_delete(doc! {"long": 5}).await.expect("deleted");
        bench.run(command).await.expect_exit(1);
        assert!(!verdict().await, "{command}");
        let refused = bench.run(cutover).await.expect_exit(3);
        assert_eq!(refused.json["gates"][0]["passed"], json!(false), "{command}: {}", refused.stdout);
        bench.insert_into(TARGET, [gone.expect("a document")]).await;
    }
    // An index that is missing is no document, and no pass either.
    let index = doc! {"createIndexes": SOURCE, "indexes": [{"key": {"int": 1}, "name": "int"}]};
    bench.database.run_command(index).await.expect("an index");
    let failed = bench.run("verify --full --settle 100ms").await.expect_exit(1);
    let advice = failed.json["checks"].to_string();
    assert!(advice.contains("createIndexes"), "{advice}");
    assert!(!verdict().await);
    let refused = bench.run(cutover).await.expect_exit(3);
    assert!(refused.json["gates"][0]["found"].to_string().contains("index"), "{}", refused.stdout);
    collection(&bench, SOURCE).drop_index("int").await.expect("dropped");
    bench.run(cutover).await.expect_exit(0);
}

#[tokio::test]
async fn a_repair_does_not_wait_for_what_nobody_changes() {
    let bench = copied().await;
    let target = collection(&bench, TARGET);
    target.update_many(doc! {}, doc! {"$set": {"int": 7.5}}).await.expect("changed");
    let settle = Duration::from_secs(5);
    let begun = std::time::Instant::now();
    bench.run("verify --full --repair --yes --settle 5s --parallel 4").await.expect_exit(0);
    let taken = begun.elapsed();
    expect_right(&bench).await;
    let ranges: Collection<Document> = bench.state.collection("verify_ranges");
    let ranges = u32::try_from(ranges.count_documents(doc! {}).await.expect("a count")).expect("few");
    assert!(ranges >= 4, "{ranges}");
    // Once, when it was compared first.
    assert!(taken >= settle && taken < settle * ranges, "{taken:?} for {ranges} ranges");
}

#[tokio::test]
async fn an_interrupted_repair_is_no_pass_and_is_gone_on_with() {
    let bench = copied().await;
    plant(&bench).await;
    let slow = doc! {
        "failCommands": ["update", "bulkWrite", "delete"], "namespace": bench.namespace(TARGET),
        "blockConnection": true, "blockTimeMS": 2_000,
    };
    let point = fail(&bench, "alwaysOn", slow).await;
    let run = bench.program(REPAIR).spawn();
    let marks: Collection<Document> = bench.state.collection("marks");
    wait_for("the marks", async || marks.count_documents(doc! {}).await.expect("a count") > 0).await;
    run.signal(Signal::Interrupt);
    let run = run.finish().await.expect_exit(130);
    drop(point);
    assert_eq!((&run.json["passed"], run.text("/error/code")), (&json!(false), "interrupted"));
    let job = bench.job(&job_name(&bench)).await.expect("the job");
    assert_eq!((job.get_str("state").ok(), job.get("lease")), (Some("completed"), None));
    bench.run(REPAIR).await.expect_exit(0);
    expect_right(&bench).await;
}
