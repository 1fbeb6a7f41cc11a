//! An interrupted `verify --full` goes on where it was, and one that could not be done never passes.

use bson::{Bson, Document, doc};
use mongodb::Collection;
use serde_json::{Value, json};

use crate::cleansing::{SOURCE, TARGET, config, configure};
use crate::fail_points::{fail, named_uri};
use crate::harness::{Bench, wait_for};
use crate::program::{Finished, Signal};

const COMMAND: &str = "verify --full --settle 1ms --parallel 2";

/// Two equal collections, in four ranges at least.
async fn pair() -> Bench {
    let bench = Bench::new().await;
    for name in [SOURCE, TARGET] {
        bench.insert_into(name, (0..4000).map(|n| doc! {"_id": n, "a": n % 7})).await;
    }
    // By a name of its own, so that failures can be made for the tested program alone.
    bench.configure_text(&config(&bench, "").replace(&bench.uri, &named_uri(&bench)));
    bench
}

fn job_name(bench: &Bench) -> String {
    format!("verify-{}-to-{TARGET}", bench.namespace(SOURCE))
}

fn ranges(bench: &Bench) -> Collection<Document> {
    bench.state.collection("verify_ranges")
}

async fn done_ranges(bench: &Bench) -> u64 {
    ranges(bench).count_documents(doc! {"state": "equal"}).await.expect("a count")
}

fn target(bench: &Bench) -> Collection<Document> {
    bench.database.collection(TARGET)
}

fn text<'a>(job: &'a Document, field: &str) -> &'a str {
    job.get_str(field).expect("a text")
}

async fn kill_after(bench: &Bench, ranges: u32) {
    let at = format!("after_range:{ranges}");
    let run = bench.program(COMMAND).env("MONGOREKEY_CRASH_AT", &at).run().await;
    assert_eq!(run.exit, None, "it was not killed: {}", run.output());
}

#[track_caller]
fn expect_whole(run: &Finished, resumed: u64) {
    assert_eq!(run.exit, Some(0), "{}", run.output());
    assert_eq!(run.number("/full/documents"), 4000);
    assert_eq!(run.number("/full/ranges"), run.number("/full/ranges_compared"));
    assert_eq!(run.number("/full/ranges_of_earlier_runs"), resumed, "{}", run.output());
    assert_eq!(run.json["full"]["source"], run.json["full"]["target"]);
}

#[tokio::test]
async fn a_killed_comparison_goes_on_and_sees_the_rest() {
    let bench = pair().await;
    let whole = bench.run(COMMAND).await.expect_exit(0);
    expect_whole(&whole, 0);
    assert!(whole.number("/full/ranges") >= 4);
    for killed in 1..=3 {
        kill_after(&bench, 1).await;
        assert_eq!(done_ranges(&bench).await, killed);
    }
    let run = bench.run(COMMAND).await;
    expect_whole(&run, 3);
    let job = bench.job(&job_name(&bench)).await.expect("a job");
    assert_eq!([text(&job, "command"), text(&job, "state")], ["verify", "completed"]);
    // A finished one is no reason to look at nothing.
    expect_whole(&bench.run(COMMAND).await, 0);
}

#[tokio::test]
async fn what_is_planted_after_a_kill_is_found_where_it_was_not_read_yet() {
    let bench = pair().await;
    kill_after(&bench, 1).await;
    let ranges = ranges(&bench);
    let pending = ranges.find_one(doc! {"state": "pending", "lower": {"$type": "int"}});
    let id = pending.await.expect("an answer").expect("a range").get_i32("lower").expect("a bound");
    target(&bench).update_one(doc! {"_id": id}, doc! {"$set": {"a": "x"}}).await.expect("changed");
    let run = bench.run(COMMAND).await.expect_exit(1);
    assert_eq!(run.number("/full/different"), 1);
    assert_eq!(run.number("/full/ranges_of_earlier_runs"), 1);
    target(&bench).update_one(doc! {"_id": id}, doc! {"$set": {"a": id % 7}}).await.expect("mended");
    expect_whole(&bench.run(COMMAND).await, 0);
}

#[tokio::test]
async fn other_collections_other_rules_and_restart_start_over() {
    let bench = pair().await;
    kill_after(&bench, 2).await;
    expect_whole(&bench.run(&format!("{COMMAND} --restart")).await, 0);

    kill_after(&bench, 2).await;
    let copy = [doc! {"$match": {}}, doc! {"$out": "copy"}];
    target(&bench).aggregate(copy).await.expect("a copy");
    let rename = doc! {
        "renameCollection": bench.namespace("copy"), "to": bench.namespace(TARGET), "dropTarget": true,
    };
    bench.admin().run_command(rename).await.expect("renamed");
    let run = bench.run(COMMAND).await;
    expect_whole(&run, 0);
    assert!(run.stderr.contains("starting over"), "{}", run.stderr);

    kill_after(&bench, 2).await;
    configure(&bench, "keep = '{\"a\": {\"$lt\": 6}}'");
    let run = bench.run(COMMAND).await.expect_exit(1);
    assert_eq!(run.number("/full/ranges_of_earlier_runs"), 0);
    assert_eq!(run.number("/full/extra"), (0..4000).filter(|n| n % 7 == 6).count() as u64);
}

#[tokio::test]
async fn an_interrupted_comparison_says_so_and_goes_on() {
    for (signal, exit) in [(Signal::Interrupt, 130), (Signal::Terminate, 143)] {
        let bench = pair().await;
        let slow = doc! {"failCommands": ["find"], "blockConnection": true, "blockTimeMS": 700};
        let point = fail(&bench, "alwaysOn", slow).await;
        let run = bench.program("verify --full --parallel 1").spawn();
        wait_for("a finished range", async || done_ranges(&bench).await > 0).await;
        run.signal(signal);
        let run = run.finish().await.expect_exit(exit);
        drop(point);
        assert_eq!((&run.json["passed"], run.text("/error/code")), (&json!(false), "interrupted"));
        let job = bench.job(&job_name(&bench)).await.expect("a job");
        assert_eq!(text(&job, "state"), "interrupted");
        let done = done_ranges(&bench).await;
        assert!((1..4).contains(&done), "{done} ranges");
        expect_whole(&bench.run(COMMAND).await, done);
    }
}

#[tokio::test]
async fn an_interrupted_recheck_is_no_verdict() {
    let bench = pair().await;
    target(&bench).update_one(doc! {"_id": 5}, doc! {"$set": {"a": "x"}}).await.expect("changed");
    let run = bench.program("verify --full --settle 60s --log-format json").spawn();
    wait_for("the other ranges", async || done_ranges(&bench).await >= 3).await;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    run.signal(Signal::Interrupt);
    let run = run.finish().await.expect_exit(130);
    assert_eq!(run.json["passed"], json!(false));
    let job = bench.job(&job_name(&bench)).await.expect("a job");
    assert_eq!(job.get("verdict"), Some(&Bson::Null));
}

#[tokio::test]
async fn a_connection_that_breaks_costs_nothing_but_time() {
    let bench = pair().await;
    for command in ["find", "getMore"] {
        let broken = doc! {"failCommands": [command], "closeConnection": true};
        let point = fail(&bench, doc! {"times": 5}, broken).await;
        let run = bench.run(COMMAND).await;
        drop(point);
        expect_whole(&run, 0);
    }
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_no_pass() {
    let bench = pair().await;
    kill_after(&bench, 1).await;
    // Reading fails for good from here on, within a range.
    let broken = doc! {"failCommands": ["find"], "errorCode": 13, "namespace": bench.namespace(TARGET)};
    let point = fail(&bench, doc! {"skip": 1}, broken).await;
    let run = bench.run(COMMAND).await.expect_exit(4);
    drop(point);
    assert_eq!((&run.json["passed"], run.text("/error/code")), (&json!(false), "stopped"));
    assert!(run.text("/error/message").contains("13"), "{}", run.stdout);
    let done = done_ranges(&bench).await;
    expect_whole(&bench.run(COMMAND).await, done);
}

#[tokio::test]
async fn a_collection_that_is_replaced_meanwhile_is_no_pass() {
    let bench = pair().await;
    target(&bench).aggregate([doc! {"$match": {}}, doc! {"$out": "copy"}]).await.expect("a copy");
    let slow = doc! {"failCommands": ["find"], "blockConnection": true, "blockTimeMS": 500};
    let point = fail(&bench, "alwaysOn", slow).await;
    let run = bench.program("verify --full --parallel 1").spawn();
    wait_for("a finished range", async || done_ranges(&bench).await > 0).await;
    let rename = doc! {
        "renameCollection": bench.namespace("copy"), "to": bench.namespace(TARGET), "dropTarget": true,
    };
    bench.admin().run_command(rename).await.expect("renamed");
    let run = run.finish().await.expect_exit(4);
    drop(point);
    assert_eq!(run.json["passed"], json!(false));
    expect_whole(&bench.run(COMMAND).await, 0);
}

#[tokio::test]
async fn a_failed_verification_takes_back_the_pass_of_an_earlier_one() {
    let bench = pair().await;
    let verdict = async || {
        let job = bench.job(&job_name(&bench)).await.expect("a job");
        let passed = job.get_document("verdict").expect("a verdict").get_bool("passed").expect("a word");
        (passed, job.get_str("state").expect("a state").to_owned())
    };
    bench.run(COMMAND).await.expect_exit(0);
    assert_eq!(verdict().await, (true, "completed".into()));
    target(&bench).delete_one(doc! {"_id": 5}).await.expect("deleted");
    bench.run(COMMAND).await.expect_exit(1);
    assert_eq!(verdict().await, (false, "incomplete".into()));
    let stored = ranges(&bench).find_one(doc! {"state": "differs"}).await.expect("an answer");
    assert_eq!(stored.expect("a range").get_i64("missing").expect("a count"), 1);
    target(&bench).drop().await.expect("dropped");
    bench.run(COMMAND).await.expect_exit(1);
    assert_eq!(verdict().await, (false, "incomplete".into()));
}

#[tokio::test]
async fn one_comparison_runs_at_a_time() {
    let bench = pair().await;
    let slow = doc! {"failCommands": ["find"], "blockConnection": true, "blockTimeMS": 700};
    let point = fail(&bench, "alwaysOn", slow).await;
    let first = bench.program("verify --full --parallel 1").spawn();
    wait_for("a finished range", async || done_ranges(&bench).await > 0).await;
    let second = bench.run(COMMAND).await.expect_exit(3);
    assert_eq!(second.text("/error/code"), "refused");
    drop(point);
    first.finish().await.expect_exit(0);
}

#[tokio::test]
async fn what_was_read_before_the_copy_was_changed_is_read_again() {
    let cutover = "cutover --mode swap --max-pause 10s --yes";
    for (command, exit) in [(COMMAND, 1), (cutover, 3)] {
        let bench = Bench::new().await;
        bench.insert_into(SOURCE, (0..4000).map(|n| doc! {"_id": n, "a": n % 7})).await;
        configure(&bench, "");
        // All is copied, but not what was written meanwhile.
        let killed = bench.program("cleanse").env("MONGOREKEY_CRASH_AT", "cleanse_indexed:1").run().await;
        assert_eq!(killed.exit, None, "{}", killed.output());
        // Before the first range that holds anything there is one that is open and empty.
        kill_after(&bench, 2).await;
        let bound = doc! {"$type": "int"};
        let equal = ranges(&bench).find_one(doc! {"state": "equal", "lower": &bound, "upper": &bound}).await;
        let equal = equal.expect("an answer").expect("a range");
        let id = equal.get_i32("upper").expect("a bound") - 1;
        target(&bench).update_one(doc! {"_id": id}, doc! {"$set": {"a": "x"}}).await.expect("changed");
        bench.run("cleanse").await.expect_exit(0);
        let run = bench.run(command).await.expect_exit(exit);
        assert!(run.stderr.contains("changed since the comparison began: starting over"), "{}", run.stderr);
        // Nothing has changed since: the same comparison goes on.
        target(&bench).update_one(doc! {"_id": id}, doc! {"$set": {"a": id % 7}}).await.expect("mended");
        kill_after(&bench, 1).await;
        expect_whole(&bench.run(&format!("{COMMAND} --report r.html")).await, 1);
        // The report tells how old the oldest of it is.
        let report = std::fs::read_to_string(bench.folder.join("r.json")).expect("a report");
        let report: Value = serde_json::from_str(&report).expect("one JSON document");
        let comparison = &report["comparisons"][0];
        let moment = |value: &Value| value.as_str().expect("a moment").to_owned();
        let begun = moment(&comparison["begun_at"]);
        assert!(begun < moment(&comparison["started_at"]), "{comparison}");
        let ranges = comparison["ranges"].as_array().expect("ranges");
        assert!(ranges.iter().all(|range| moment(&range["at"]) >= begun), "{comparison}");
    }
}
