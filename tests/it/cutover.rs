//! A cutover of a live collection: the live name bears what the rule makes of all acknowledged
//! writes, by the writers' own journal.

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use bson::{Bson, Document, doc};
use mongodb::Collection;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::cleanse_live::{RULE, live};
use crate::cleansing::{SOURCE, TARGET, bytes, configure, job_name, run_when_near};
use crate::harness::{Bench, wait_for};
use crate::own_set::OwnSet;
use crate::program::Finished;
use crate::writers::{Cutover, Journal, Options, Writers, expect_live_after_cutover, is_valid};

/// Far more than a cutover takes here, even beside other tests.
const PATIENT: &str = "--max-pause 10s --yes";

/// A bench whose source is being written to, so many documents per second, and was copied.
async fn copied(documents: i32, target_rate: u32) -> (Bench, Writers) {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let options = Options { documents, target_rate, cutover: Cutover::Once(is_valid), ..Options::default() };
    let writers = Writers::on(&bench, SOURCE, options).await;
    bench.run("cleanse --parallel 2").await.expect_exit(0);
    (bench, writers)
}

/// A bench with a few documents and no writers, copied.
async fn small() -> Bench {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    bench.insert_into(SOURCE, (0..100).map(|id| doc! {"_id": id, "valid": id % 3 != 0})).await;
    bench.run("cleanse").await.expect_exit(0);
    bench
}

async fn exists(bench: &Bench, collection: &str) -> bool {
    let names = bench.database.list_collection_names().await.expect("names");
    names.iter().any(|name| name == collection)
}

fn kept_name(bench: &Bench) -> String {
    format!("{SOURCE}_before_{}", job_name(bench))
}

/// Nothing holds writes off any more, and nothing says so.
pub async fn expect_no_fence(bench: &Bench) {
    let job = bench.job(&job_name(bench)).await.expect("the job");
    assert_eq!(job.get_document("cutover").expect("a record").get("fence"), Some(&Bson::Null));
    let live = bench.database.collection::<Document>(SOURCE);
    live.insert_one(doc! {"_id": "probe"}).await.expect("writes go on");
    live.delete_one(doc! {"_id": "probe"}).await.expect("writes go on");
}

async fn expect_live(bench: &Bench, journal: &Journal, ended: Instant) {
    expect_live_after_cutover(bench, SOURCE, journal, is_valid, ended).await;
}

/// Writes go on for a while; then the live collection is compared with the journal.
async fn expect_nothing_lost(bench: &Bench, writers: Writers, ended: Instant) {
    writers.go_on_for(250).await;
    let journal = writers.stop().await;
    expect_live(bench, &journal, ended).await;
}

#[tokio::test]
async fn a_swap_loses_no_write() {
    let (bench, writers) = copied(10_000, 1_200).await;
    let command = format!("cutover --mode swap {PATIENT}");
    let done = run_when_near(&bench, &command, None).await.expect_exit(0);
    let ended = Instant::now();
    assert_eq!(done.text("/outcome"), "cut_over", "{}", done.stdout);
    assert!(done.json["pause_ms"].as_f64().is_some_and(|pause| pause > 0.0), "{}", done.stdout);
    expect_nothing_lost(&bench, writers, ended).await;
    assert!(!exists(&bench, TARGET).await);
    expect_no_fence(&bench).await;
}

#[tokio::test]
async fn a_keep_loses_no_write_and_keeps_the_old_collection() {
    let (bench, writers) = copied(10_000, 1_200).await;
    let command = format!("cutover --mode keep {PATIENT}");
    let done = run_when_near(&bench, &command, None).await.expect_exit(0);
    let ended = Instant::now();
    let old = kept_name(&bench);
    assert_eq!(done.text("/old_collection"), bench.namespace(&old));
    let before = bytes(&bench, &old).await;
    expect_nothing_lost(&bench, writers, ended).await;
    assert_eq!(bytes(&bench, &old).await, before, "the old collection is not written any more");
    assert!(!exists(&bench, TARGET).await);
    expect_no_fence(&bench).await;
}

/// In the gap updates find nothing, which the application is told; what it inserts must be there.
#[tokio::test]
async fn a_keep_with_a_gap_loses_no_insert() {
    let bench = small().await;
    let stop = CancellationToken::new();
    let inserting = insert_until(bench.database.collection(SOURCE), stop.clone());
    let command = format!("cutover --mode keep --fence validator --allow-gap {PATIENT}");
    let done = bench.run(&command).await.expect_exit(0);
    assert_eq!(done.text("/outcome"), "cut_over");
    stop.cancel();
    let acknowledged = inserting.await.expect("no panic");
    let found = bench.documents(SOURCE).await;
    let ids: Vec<i32> = found.iter().filter_map(|document| document.get_i32("_id").ok()).collect();
    let missing: Vec<&i32> = acknowledged.iter().filter(|id| !ids.contains(id)).collect();
    assert!(missing.is_empty(), "{missing:?} of {}", acknowledged.len());
    expect_no_fence(&bench).await;
}

/// The way back drops what the server has made for the inserts into the gap: they were acknowledged.
#[tokio::test]
async fn a_second_rename_that_fails_loses_no_insert_into_the_gap() {
    let set = OwnSet::start(&[]);
    let bench = small_on(&set).await;
    let fail_point = async |mode: Bson| {
        let data = doc! {"failCommands": ["renameCollection"], "errorCode": 96};
        let set = doc! {"configureFailPoint": "failCommand", "mode": mode, "data": data};
        bench.admin().run_command(set).await.expect("the fail point");
    };
    // The copy gets the name of the attempt, and the old collection its new one.
    fail_point(doc! {"skip": 2}.into()).await;
    let stop = CancellationToken::new();
    let live = bench.database.collection::<Document>(SOURCE);
    let inserting = insert_until(live.clone(), stop.clone());
    // Known to the old collection, so that it can be inserted into the gap only.
    let twice = tokio::spawn(async move {
        while live.insert_one(doc! {"_id": 1, "gap": true}).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    });
    let command = format!("cutover --mode keep --fence validator --allow-gap {PATIENT}");
    let run = bench.program(&command).spawn();
    // The second rename is given up after twenty attempts; then comes the way back.
    let way_back = doc! {"waitForFailPoint": "failCommand", "timesEntered": 21_i64, "maxTimeMS": 50_000};
    bench.admin().run_command(way_back).await.expect("it is reached");
    fail_point("off".into()).await;
    let given_up = run.finish().await.expect_exit(1);
    stop.cancel();
    let acknowledged = inserting.await.expect("no panic");
    twice.await.expect("no panic");
    assert_eq!(given_up.text("/outcome"), "given_up", "{}", given_up.stdout);
    let found = bench.documents(SOURCE).await;
    let ids: Vec<i32> = found.iter().filter_map(|document| document.get_i32("_id").ok()).collect();
    let missing: Vec<&i32> = acknowledged.iter().filter(|id| !ids.contains(id)).collect();
    assert!(missing.is_empty(), "{missing:?} of {}", acknowledged.len());
    let conflicts = given_up.json["gap"]["conflicts"].to_string();
    assert_eq!(conflicts, r#"[{"$numberInt":"1"}]"#, "{}", given_up.stdout);
    expect_no_fence(&bench).await;
}

pub async fn small_on(set: &OwnSet) -> Bench {
    let bench = Bench::on(&set.uri).await;
    configure(&bench, RULE);
    bench.insert_into(SOURCE, (0..100).map(|id| doc! {"_id": id, "valid": id % 3 != 0})).await;
    bench.run("cleanse").await.expect_exit(0);
    bench
}

async fn hold_up(bench: &Bench, command: &str, collection: &str, milliseconds: i32) {
    let data = doc! {
        "failCommands": [command], "namespace": bench.namespace(collection),
        "blockConnection": true, "blockTimeMS": milliseconds,
    };
    let once = doc! {"configureFailPoint": "failCommand", "mode": {"times": 1}, "data": data};
    bench.admin().run_command(once).await.expect("the fail point");
}

/// Writes are let through, and the next attempt does better.
#[tokio::test]
async fn a_majority_that_is_late_costs_an_attempt_and_no_more() {
    let set = OwnSet::start(&[]);
    // The question whether it is permitted; the one that holds writes off.
    for (command, attempts) in [("applyOps", 0), ("collMod", 1)] {
        let bench = small_on(&set).await;
        let late =
            doc! {"code": 50, "codeName": "MaxTimeMSExpired", "errmsg": "operation exceeded time limit"};
        let mut data = doc! {"failCommands": [command], "writeConcernError": late};
        if command == "collMod" {
            data.insert("namespace", bench.namespace(SOURCE));
        }
        let once = doc! {"configureFailPoint": "failCommand", "mode": {"times": 1}, "data": data};
        bench.admin().run_command(once).await.expect("the fail point");
        let done = bench.run(&format!("cutover --mode keep {PATIENT}")).await.expect_exit(0);
        assert_eq!(done.text("/outcome"), "cut_over");
        assert_eq!(done.stderr.matches("attempt 1").count(), attempts, "{command}: {}", done.stderr);
        let entered = doc! {"waitForFailPoint": "failCommand", "timesEntered": 1_i64, "maxTimeMS": 1_000};
        bench.admin().run_command(entered).await.expect("it was met");
    }
}

/// What takes long before writes are held off is nobody's loss.
#[tokio::test]
async fn a_cutover_that_takes_long_before_it_holds_writes_off_is_not_ended() {
    let set = OwnSet::start(&[]);
    let bench = small_on(&set).await;
    hold_up(&bench, "renameCollection", TARGET, 33_000).await;
    let begun = Instant::now();
    let done = bench.run(&format!("cutover --mode swap {PATIENT}")).await.expect_exit(0);
    assert!(begun.elapsed().as_secs() >= 33, "it was held up");
    assert_eq!(done.text("/outcome"), "cut_over");
}

#[tokio::test]
async fn what_was_written_past_validation_is_reported_after_a_crash_too() {
    let set = OwnSet::start(&[]);
    let bench = small_on(&set).await;
    let data = doc! {"failCommands": ["renameCollection"], "blockConnection": true, "blockTimeMS": 2_000};
    // Not the one that gives the copy the name of the attempt.
    let second = doc! {"configureFailPoint": "failCommand", "mode": {"skip": 1}, "data": data};
    bench.admin().run_command(second).await.expect("the fail point");
    let command = format!("cutover --mode swap {PATIENT}");
    let run = bench.program(&command).env("MONGOREKEY_CRASH_AT", "cutover_renamed:1").spawn();
    let entered = doc! {"waitForFailPoint": "failCommand", "timesEntered": 1_i64, "maxTimeMS": 50_000};
    bench.admin().run_command(entered).await.expect("it is reached");
    let live = bench.database.collection::<Document>(SOURCE);
    let past = live.insert_one(doc! {"_id": "past", "valid": true}).bypass_document_validation(true);
    past.await.expect("a write past validation");
    assert_eq!(run.finish().await.exit, None);
    let job = job_name(&bench);
    wait_for("the watchdog", async || {
        let record = bench.job(&job).await.expect("the job");
        record.get_document("cutover").expect("a record").get("fence") == Some(&Bson::Null)
    })
    .await;
    let next = bench.run(&command).await.expect_exit(1);
    assert_eq!(next.text("/outcome"), "cut_over");
    assert_eq!(next.json["lost_writes"].to_string(), r#"["past"]"#, "{}", next.stdout);
}

/// The record of a cutover that has left its fence and then lost its live collection.
async fn leave_a_fence(bench: &Bench, job: &Document) {
    let refusing = doc! {"collMod": TARGET, "validator": {"$expr": false}};
    bench.database.run_command(refusing).await.expect("a fence");
    let original = doc! {"validator": "{}", "validationLevel": "strict", "validationAction": "error"};
    let record = doc! {
        "v": 1, "id": "left", "mode": "keep", "is_rollback": false, "state": "fenced",
        "live": bench.namespace(SOURCE), "live_uuid": job.get("source_uuid").cloned(),
        "incoming": bench.namespace(TARGET), "incoming_uuid": job.get("target_uuid").cloned(),
        "retired": bench.namespace(&kept_name(bench)),
        "fence": {"kind": "validator", "live": original.clone(), "incoming": original},
    };
    let jobs = bench.state.collection::<Document>("jobs");
    let filter = doc! {"_id": job.get("_id").cloned()};
    jobs.update_one(filter, doc! {"$set": {"cutover": record}}).await.expect("a record");
}

async fn expect_writable(bench: &Bench, id: &str) {
    let target = bench.database.collection::<Document>(TARGET);
    target.insert_one(doc! {"_id": id}).await.expect("writes are let through");
}

#[tokio::test]
async fn an_orphan_that_nobody_understands_lets_writes_through_and_others_go_on() {
    let bench = small().await;
    let job = bench.job(&job_name(&bench)).await.expect("the job");
    let mut newer = job.clone();
    newer.insert("_id", "a-newer-one");
    newer.insert("cutover", doc! {"v": 99, "fence": {}});
    bench.state.collection::<Document>("jobs").insert_one(newer).await.expect("another job");
    bench.database.collection::<Document>(SOURCE).drop().await.expect("dropped");
    leave_a_fence(&bench, &job).await;
    let status = bench.run("status").await.expect_exit(0);
    assert!(status.stderr.contains("a-newer-one"), "{}", status.stderr);
    assert!(status.stderr.contains("can't be established"), "{}", status.stderr);
    expect_writable(&bench, "after status").await;
    leave_a_fence(&bench, &job).await;
    bench.run("cutover --abort").await.expect_exit(5);
    expect_writable(&bench, "after the abort").await;
    bench.run("cutover --abort").await.expect_exit(5);
}

#[tokio::test]
async fn killed_between_two_renames_the_old_collection_comes_back() {
    let bench = small().await;
    let command = format!("cutover --mode keep --fence validator --allow-gap {PATIENT}");
    let killed = bench.program(&command).env("MONGOREKEY_CRASH_AT", "cutover_gap:1").run().await;
    assert_eq!(killed.exit, None, "{}", killed.output());
    wait_for("the watchdog", async || exists(&bench, SOURCE).await).await;
    let done = bench.run(&command).await.expect_exit(0);
    assert_eq!(done.text("/outcome"), "cut_over");
    assert_eq!(bytes(&bench, SOURCE).await.len(), 66);
    assert_eq!(bytes(&bench, &kept_name(&bench)).await.len(), 100);
    expect_no_fence(&bench).await;
}

#[tokio::test]
async fn a_follower_hands_over() {
    let (bench, writers) = copied(3_000, 400).await;
    let run = bench.program("cleanse --follow").spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    let done = bench.run(&format!("cutover --mode swap {PATIENT}")).await.expect_exit(0);
    let ended = Instant::now();
    assert_eq!(done.text("/outcome"), "cut_over");
    run.finish().await.expect_exit(143);
    expect_nothing_lost(&bench, writers, ended).await;
}

/// Kills a cutover at these points, each of another copy, and starts it again.
async fn kill_at(mode: &str, points: &[&str]) {
    for point in points {
        let (bench, writers) = copied(2_000, 400).await;
        let command = format!("cutover --mode {mode} {PATIENT}");
        let killed = run_when_near(&bench, &command, Some(&format!("{point}:1"))).await;
        assert_eq!(killed.exit, None, "{point}: {}", killed.output());
        // The watchdog lets writes through again, without anybody's help.
        let job = job_name(&bench);
        wait_for("the watchdog", async || {
            let record = bench.job(&job).await.expect("the job");
            record.get_document("cutover").expect("a record").get("fence") == Some(&Bson::Null)
        })
        .await;
        writers.go_on_for(200).await;
        let done = run_when_near(&bench, &command, None).await;
        let ended = Instant::now();
        assert_eq!(done.exit, Some(0), "{mode} {point}: {}", done.output());
        assert_eq!(done.text("/outcome"), "cut_over", "{mode} {point}");
        expect_nothing_lost(&bench, writers, ended).await;
        expect_no_fence(&bench).await;
    }
}

#[tokio::test]
async fn a_swap_killed_at_every_boundary_and_started_again_loses_nothing() {
    let points = ["cutover_recorded", "cutover_fenced", "cutover_renaming", "cutover_renamed"];
    kill_at("swap", &points).await;
}

#[tokio::test]
async fn a_keep_killed_at_every_boundary_and_started_again_loses_nothing() {
    kill_at("keep", &["cutover_fenced", "cutover_renaming", "cutover_renamed"]).await;
}

#[tokio::test]
async fn a_copy_that_differs_is_not_cut_over() {
    let bench = small().await;
    let target = bench.database.collection::<Document>(TARGET);
    target.delete_one(doc! {"_id": 1}).await.expect("a write");
    let refused = bench.run(&format!("cutover --mode swap {PATIENT}")).await.expect_exit(3);
    assert_eq!(refused.text("/outcome"), "refused");
    let gate = &refused.json["gates"][0];
    assert_eq!((&gate["name"], &gate["passed"]), (&"verify".into(), &false.into()));
    assert_eq!(bytes(&bench, SOURCE).await.len(), 100, "nothing was touched");
}

#[tokio::test]
async fn a_pause_that_would_be_too_long_is_not_begun() {
    let bench = small().await;
    let refused = bench.run("cutover --mode swap --max-pause 1ms --yes").await.expect_exit(3);
    let gates = refused.json["gates"].as_array().expect("gates").clone();
    let failed: Vec<&str> = gates
        .iter()
        .filter(|gate| gate["passed"] == false)
        .filter_map(|gate| gate["name"].as_str())
        .collect();
    assert_eq!(failed, ["predicted pause"], "{}", refused.stdout);
}

#[tokio::test]
async fn an_open_transaction_ends_in_writes_going_on() {
    // It would hold up whoever locks the whole server, as a keep does.
    let set = OwnSet::start(&[]);
    let bench = small_on(&set).await;
    let client = crate::harness::connect(&bench.uri).await;
    let mut session = client.start_session().await.expect("a session");
    session.start_transaction().await.expect("a transaction");
    let live = client.database(bench.database.name()).collection::<Document>(SOURCE);
    live.update_one(doc! {"_id": 1}, doc! {"$set": {"open": true}})
        .session(&mut session)
        .await
        .expect("a write");
    let given_up = bench.run("cutover --mode swap --max-pause 2s --yes").await.expect_exit(1);
    assert_eq!(given_up.text("/outcome"), "given_up", "{}", given_up.stdout);
    expect_no_fence(&bench).await;
    session.commit_transaction().await.expect("it can be committed");
    let done = bench.run(&format!("cutover --mode swap {PATIENT}")).await.expect_exit(0);
    assert_eq!(done.text("/outcome"), "cut_over");
    let found = bench.documents(SOURCE).await;
    assert!(
        found.iter().any(|document| document.get_bool("open").unwrap_or(false)),
        "the transaction is there"
    );
}

#[tokio::test]
async fn the_validator_is_what_it_was() {
    let bench = small().await;
    let validator = doc! {"$expr": {"$gt": [{"$strLenCP": {"$toString": "$_id"}}, 0]}};
    let modify = doc! {"collMod": SOURCE, "validator": validator.clone(), "validationLevel": "moderate"};
    bench.database.run_command(modify).await.expect("a validator");
    let stopped = bench.run("cleanse").await.expect_exit(4);
    assert!(stopped.stderr.contains("modify"), "{}", stopped.stderr);
    bench.run("cleanse --restart").await.expect_exit(0);
    bench.run(&format!("cutover --mode keep {PATIENT}")).await.expect_exit(0);
    let list = doc! {"listCollections": 1, "filter": {}};
    let reply = bench.database.run_command(list).await.expect("collections");
    let entries =
        reply.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch")).expect("entries");
    let mut seen = 0;
    for entry in entries.iter().filter_map(Bson::as_document) {
        let name = entry.get_str("name").expect("a name");
        if name == SOURCE || name == kept_name(&bench) {
            let options = entry.get_document("options").expect("options");
            assert_eq!(options.get_document("validator").ok(), Some(&validator), "{name}");
            assert_eq!(options.get_str("validationLevel").ok(), Some("moderate"), "{name}");
            seen += 1;
        }
    }
    assert_eq!(seen, 2);
}

#[tokio::test]
async fn what_is_cut_over_is_not_cut_over_again() {
    let bench = small().await;
    bench.run(&format!("cutover --mode swap {PATIENT}")).await.expect_exit(0);
    let before = bytes(&bench, SOURCE).await;
    let again = bench.run(&format!("cutover --mode swap {PATIENT}")).await.expect_exit(0);
    assert!(again.json["pause_ms"].is_null());
    let refused: Finished = bench.run("cleanse").await.expect_exit(3);
    assert!(refused.stderr.contains("cut over already"), "{}", refused.stderr);
    bench.run("cleanse --restart").await.expect_exit(3);
    assert_eq!(bytes(&bench, SOURCE).await, before);
}

#[tokio::test]
async fn usage_is_checked_before_anything_is_touched() {
    let bench = small().await;
    for (line, code) in [
        ("cutover --mode swap", 2),
        ("cutover", 2),
        ("cutover --fence validator --yes", 2),
        ("cutover --mode swap --feed-back --yes", 2),
        ("rollback", 2),
        ("rollback --yes", 3),
        ("cutover --mode swap --fence apply-ops --yes", 2),
        ("cutover --mode swap --allow-gap --yes", 2),
        ("cutover --mode keep --fence validator --yes", 2),
        ("cutover --mode keep --fence write-block --yes", 3),
        ("cutover --mode swap --job nobody --yes", 3),
        ("fence-watchdog", 2),
    ] {
        let run = bench.run(line).await;
        assert_eq!(run.exit, Some(code), "{line}: {}", run.output());
    }
    let nothing = bench.run("cutover --abort").await.expect_exit(0);
    assert_eq!(nothing.text("/outcome"), "nothing_to_abort");
    assert_eq!(bytes(&bench, SOURCE).await.len(), 100);
}

#[tokio::test]
async fn all_writes_are_blocked_where_that_is_permitted() {
    let set = OwnSet::start(&["--auth"]);
    let bench = Bench::on(&set.uri).await;
    configure(&bench, RULE);
    bench.insert_into(SOURCE, (0..100).map(|id| doc! {"_id": id, "valid": id % 3 != 0})).await;
    bench.run("cleanse").await.expect_exit(0);
    let command = format!("cutover --mode keep --fence write-block {PATIENT}");
    let done = bench.run(&command).await.expect_exit(0);
    assert_eq!(done.text("/outcome"), "cut_over", "{}", done.stdout);
    assert_eq!(bytes(&bench, SOURCE).await.len(), 66);
    assert_eq!(bytes(&bench, &kept_name(&bench)).await.len(), 100);
    expect_no_fence(&bench).await;
}

#[tokio::test]
async fn a_copy_that_is_not_finished_is_refused() {
    let (bench, writers) = live(500).await;
    let refused = bench.run(&format!("cutover --mode swap {PATIENT}")).await.expect_exit(3);
    assert!(refused.stderr.contains("nothing was copied"), "{}", refused.stderr);
    writers.stop().await;
}

/// Inserts until it is told to stop; tells what was acknowledged.
fn insert_until(live: Collection<Document>, stop: CancellationToken) -> JoinHandle<Vec<i32>> {
    tokio::spawn(async move {
        let mut acknowledged = Vec::new();
        let mut id = 1_000;
        while !stop.is_cancelled() {
            if live.insert_one(doc! {"_id": id, "valid": true}).await.is_ok() {
                acknowledged.push(id);
            }
            id += 1;
            tokio::time::sleep(std::time::Duration::from_millis(4)).await;
        }
        acknowledged
    })
}

/// A small bench that was cut over by a keep and written to since in all ways.
async fn kept_and_written() -> Bench {
    let bench = small().await;
    bench.run(&format!("cutover --mode keep {PATIENT}")).await.expect_exit(0);
    let live = bench.database.collection::<Document>(SOURCE);
    live.insert_one(doc! {"_id": "new", "valid": false}).await.expect("a write");
    live.update_one(doc! {"_id": 1}, doc! {"$set": {"since": true}}).await.expect("a write");
    live.delete_one(doc! {"_id": 2}).await.expect("a write");
    bench
}

/// All that was there before the cutover, with what was written since.
async fn expect_taken_back(bench: &Bench, acknowledged: &[i32]) {
    let found = bench.documents(SOURCE).await;
    let has = |id: Bson| found.iter().any(|document| document.get("_id") == Some(&id));
    assert!(has(Bson::Int32(0)), "what the rules rejected is back");
    assert!(has("new".into()) && !has(Bson::Int32(2)));
    assert!(found.iter().any(|document| document.get_bool("since").unwrap_or(false)));
    let missing: Vec<&i32> = acknowledged.iter().filter(|id| !has(Bson::Int32(**id))).collect();
    assert!(missing.is_empty(), "{missing:?} of {}", acknowledged.len());
    assert_eq!(found.len(), 100 + acknowledged.len());
    expect_no_fence(bench).await;
}

#[tokio::test]
async fn a_rollback_brings_the_old_collection_back_with_what_was_written_since() {
    let bench = kept_and_written().await;
    let stop = CancellationToken::new();
    let inserting = insert_until(bench.database.collection(SOURCE), stop.clone());
    let done = bench.run(&format!("rollback {PATIENT}")).await.expect_exit(0);
    assert_eq!((done.text("/command"), done.text("/outcome")), ("rollback", "rolled_back"));
    stop.cancel();
    expect_taken_back(&bench, &inserting.await.expect("no panic")).await;
    assert!(!exists(&bench, &kept_name(&bench)).await);
    assert!(exists(&bench, TARGET).await, "the clean collection has its own name again");
    // What was live holds more than the rules allow, so it must be copied anew.
    let refused = bench.run("cleanse").await.expect_exit(3);
    assert!(refused.stderr.contains("--restart"), "{}", refused.stderr);
    bench.run("cleanse --restart").await.expect_exit(0);
    let again = bench.run(&format!("cutover --mode swap {PATIENT}")).await.expect_exit(0);
    assert_eq!(again.text("/outcome"), "cut_over");
}

#[tokio::test]
async fn a_rollback_that_is_killed_at_every_boundary_loses_nothing() {
    for point in ["cutover_recorded", "cutover_fenced", "cutover_renaming", "cutover_renamed"] {
        let bench = kept_and_written().await;
        let stop = CancellationToken::new();
        let inserting = insert_until(bench.database.collection(SOURCE), stop.clone());
        let command = format!("rollback {PATIENT}");
        let killed = bench.program(&command).env("MONGOREKEY_CRASH_AT", &format!("{point}:1")).run().await;
        assert_eq!(killed.exit, None, "{point}: {}", killed.output());
        let done = bench.run(&command).await.expect_exit(0);
        assert_eq!(done.text("/outcome"), "rolled_back", "{point}");
        stop.cancel();
        expect_taken_back(&bench, &inserting.await.expect("no panic")).await;
    }
}

#[tokio::test]
async fn after_a_swap_there_is_nothing_to_go_back_to() {
    let bench = small().await;
    bench.run(&format!("cutover --mode swap {PATIENT}")).await.expect_exit(0);
    let refused = bench.run(&format!("rollback {PATIENT}")).await.expect_exit(3);
    assert!(refused.stderr.contains("drops the old collection"), "{}", refused.stderr);
}

#[tokio::test]
async fn writes_since_the_cutover_are_discarded_only_where_that_is_asked_for() {
    let bench = small().await;
    bench.run(&format!("cutover --mode keep {PATIENT}")).await.expect_exit(0);
    let live = bench.database.collection::<Document>(SOURCE);
    live.insert_one(doc! {"_id": "new"}).await.expect("a write");
    let jobs = bench.state.collection::<Document>("jobs");
    let lost = doc! {"$unset": {"feed_back": ""}};
    jobs.update_one(doc! {"_id": job_name(&bench)}, lost).await.expect("a write");
    let refused = bench.run(&format!("rollback {PATIENT}")).await.expect_exit(3);
    assert!(refused.stderr.contains("--discard-writes-since-cutover"), "{}", refused.stderr);
    let command = format!("rollback --discard-writes-since-cutover {PATIENT}");
    bench.run(&command).await.expect_exit(0);
    assert_eq!(bytes(&bench, SOURCE).await.len(), 100);
}

/// Which collection is which, and what there is to compare, is told by the job.
#[tokio::test]
async fn after_a_cutover_and_after_its_way_back_other_commands_know_which_collection_is_which() {
    let bench = small().await;
    let report = async || bench.run(&format!("report {} --to r.html", job_name(&bench))).await.expect_exit(0);
    bench.run("verify --full --settle 1ms").await.expect_exit(0);
    bench.run(&format!("cutover --mode keep {PATIENT}")).await.expect_exit(0);
    bench.database.collection(SOURCE).insert_one(doc! {"_id": "new"}).await.expect("a write");
    for command in ["verify", "verify --full --counts", "verify --sample 5"] {
        let refused = bench.run(command).await.expect_exit(3);
        let kept = format!("{} is the former one", kept_name(&bench));
        assert!(refused.text("/error/message").contains(&kept), "{}", refused.stdout);
    }
    let told = report().await;
    assert!(told.text("/verdict/sentence").contains("Cut over by keep"), "{}", told.stdout);
    // Whoever names both means what has these names now.
    let [live, kept] = [SOURCE.to_owned(), kept_name(&bench)].map(|name| bench.namespace(&name));
    let named = format!("verify --full --settle 1ms --source {live} --to {kept}");
    bench.run(&named).await.expect_exit(1);
    bench.run(&format!("rollback {PATIENT}")).await.expect_exit(0);
    let refused = bench.run("verify --full").await.expect_exit(3);
    assert!(refused.text("/error/message").contains("was taken back"), "{}", refused.stdout);
    let told = report().await;
    assert!(told.text("/verdict/sentence").contains("was taken back"), "{}", told.stdout);
    bench.run("cleanse --restart").await.expect_exit(0);
    bench.run("verify --full --settle 1ms").await.expect_exit(0);
    let target = bench.database.collection::<Document>(TARGET);
    target.delete_one(doc! {"_id": 1}).await.expect("a write");
    bench.run("verify --full --settle 1ms").await.expect_exit(1);
    let told = report().await;
    assert!(told.text("/verdict/sentence").contains("FAILED"), "{}", told.stdout);
    assert_eq!(told.json["verdict"]["passed"], json!(false), "{}", told.stdout);
}

fn verify_gate(run: &Finished) -> &Value {
    let gates = run.json["gates"].as_array().unwrap_or_else(|| panic!("no gates: {}", run.output()));
    let gate = gates.iter().find(|gate| gate["name"] == json!("verify"));
    gate.unwrap_or_else(|| panic!("no verify gate: {}", run.output()))
}

/// The comparison has passed; what somebody else writes to the copy afterwards it knows nothing of.
#[tokio::test]
async fn a_copy_that_others_have_written_to_since_it_was_verified_is_compared_anew() {
    let bench = small().await;
    bench.run("verify --full --settle 1ms").await.expect_exit(0);
    let target = bench.database.collection::<Document>(TARGET);
    target.update_one(doc! {"_id": 1}, doc! {"$set": {"n": 1}}).await.expect("a write");
    let refused = bench.run(&format!("cutover --mode swap {PATIENT}")).await.expect_exit(3);
    assert_eq!(verify_gate(&refused)["passed"], json!(false), "{}", refused.output());
    assert!(refused.stderr.contains("others have written to"), "{}", refused.stderr);
}

/// What the follower writes is what it was verified for, in whichever run; and a document that is gone
/// from both sides, as by their TTL indexes, is not missing.
#[tokio::test]
async fn a_copy_that_only_the_follower_has_written_to_since_it_was_verified_is_not_compared_again() {
    let bench = small().await;
    bench.run("verify --full --settle 1ms").await.expect_exit(0);
    let [source, target] = [SOURCE, TARGET].map(|name| bench.database.collection::<Document>(name));
    for number in 0..2 {
        source.update_many(doc! {}, doc! {"$set": {"n": number}}).await.expect("a write");
        bench.run("cleanse").await.expect_exit(0);
    }
    for collection in [&source, &target] {
        collection.delete_one(doc! {"_id": 1}).await.expect("a write");
    }
    let done = bench.run(&format!("cutover --mode swap {PATIENT}")).await.expect_exit(0);
    let found = verify_gate(&done)["found"].as_str().unwrap_or_default();
    assert!(found.starts_with("passed at"), "{}", done.output());
}
