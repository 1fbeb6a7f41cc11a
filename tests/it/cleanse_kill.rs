//! A cleanse that is killed, interrupted or hindered ends as if nothing had happened.

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;
use mongorekey::cleanse::ranges::{RangeState, Ranges};
use mongorekey::config::values::Secret;
use mongorekey::job::Job;
use mongorekey::mongo::Mongo;
use mongorekey::mongo::range::Range;

use crate::cleansing::{
    FailPoint, SOURCE, TARGET, assert_same, bytes, bytes_where, config, configure, count_now, delicate,
    every_type, ids, insert_raw, job_name, next_namespace, store_exactly, zero_timestamps,
};
use crate::harness::{Bench, Random, uri, uri_with, wait_for};
use crate::program::{Running, Signal};

const RULES: &str = "keep = '{\"$or\": [{\"bool\": true}, {\"bool\": {\"$exists\": false}}]}'";
/// Waits in front of every batch that is inserted into a collection.
pub const INSERTS: &str = "hangDuringBatchInsert";
/// Waits whenever a reader of a collection lets others run, every thousand documents.
const YIELDS: &str = "setYieldAllLocksWait";

fn valid() -> Document {
    doc! {"$or": [{"bool": true}, {"bool": {"$exists": false}}]}
}

/// A source of all kinds of documents, some of them delicate, some rejected.
async fn seed(bench: &Bench, count: u32) {
    bench.insert_into(SOURCE, (0..).zip(ids(count)).map(|(number, id)| every_type(id, number))).await;
    insert_raw(bench, SOURCE, delicate()).await;
    for document in zero_timestamps() {
        store_exactly(bench, SOURCE, document).await;
    }
    bench
        .database
        .run_command(doc! {"createIndexes": SOURCE, "indexes": [{"key": {"string": 1}, "name": "by string"}]})
        .await
        .expect("an index");
}

async fn copied(bench: &Bench) -> u64 {
    count_now(bench, TARGET, doc! {}).await
}

/// The sessions on which ranges are being copied, as the program recorded them. The range before the
/// lowest `_id` holds nothing and is over at once.
async fn recorded_sessions(bench: &Bench) -> Vec<Bson> {
    let ranges: Collection<Document> = bench.state.collection("ranges");
    let copying = doc! {"state": "copying", "lower": {"$exists": true}};
    let copying: Vec<Document> =
        ranges.find(copying).await.expect("a cursor").try_collect().await.expect("ranges");
    copying.iter().filter_map(|range| range.get_document("session").ok()?.get("id").cloned()).collect()
}

/// How many operations run on these sessions.
async fn running_on(bench: &Bench, sessions: &[Bson]) -> usize {
    let pipeline = [
        doc! {"$currentOp": {"allUsers": true}},
        doc! {"$match": {"active": true, "lsid.id": {"$in": sessions.to_vec()}}},
    ];
    let operations: Vec<Document> =
        bench.admin().aggregate(pipeline).await.expect("a cursor").try_collect().await.expect("operations");
    operations.len()
}

async fn fence(bench: &Bench) -> i64 {
    bench.job(&job_name(bench)).await.and_then(|job| job.get_i64("fence").ok()).unwrap_or(0)
}

async fn expect_end_state(bench: &Bench) {
    let expected = bytes_where(bench, SOURCE, valid()).await;
    assert!(!expected.is_empty());
    assert_same(&bytes(bench, TARGET).await, &expected);
    let target: Collection<Document> = bench.database.collection(TARGET);
    let mut names = target.list_index_names().await.expect("names");
    names.sort();
    assert_eq!(names, ["_id_", "by string"]);
}

/// Starts a cleanse and waits until it stands in front of an insert into the target.
pub async fn start_and_block(bench: &Bench, inserts: &FailPoint, interruptible: bool) -> Running {
    let data = doc! {"nss": next_namespace(bench, "cleanse", TARGET).await, "shouldCheckForInterrupt": interruptible};
    inserts.set(bench, "alwaysOn", data).await;
    let mut run = bench.program("cleanse --parallel 1").spawn();
    wait_for("an operation that copies", async || {
        assert!(run.is_running(), "{}", run.stderr());
        running_on(bench, &recorded_sessions(bench).await).await > 0
    })
    .await;
    run
}

#[tokio::test]
async fn five_kills_leave_what_an_undisturbed_run_leaves() {
    let bench = Bench::new().await;
    seed(&bench, 16_000).await;
    configure(&bench, RULES);
    let yields = FailPoint::reserve(YIELDS);
    yields.set(&bench, "alwaysOn", doc! {"namespace": bench.namespace(SOURCE), "waitForMillis": 60}).await;
    let mut random = Random::seeded(20_260_101);
    for kill in 0..5 {
        let before = fence(&bench).await;
        let mut run = bench.program("cleanse").spawn();
        let moment = u64::try_from(random.below(6000)).expect("small") + 1;
        wait_for("the moment of the kill", async || {
            assert!(run.is_running(), "kill {kill} came too late: {}", run.stderr());
            fence(&bench).await > before && copied(&bench).await >= moment
        })
        .await;
        run.kill();
    }
    yields.off(&bench).await;

    let run = bench.run("cleanse").await.expect_exit(0);
    expect_end_state(&bench).await;
    let undisturbed = bench.run("cleanse --to undisturbed").await.expect_exit(0);
    assert_eq!(run.json["documents"], undisturbed.json["documents"]);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, "undisturbed").await);
}

#[tokio::test]
async fn what_a_killed_run_left_on_the_server_is_ended_before_anything_is_copied() {
    let bench = Bench::new().await;
    seed(&bench, 4000).await;
    configure(&bench, RULES);
    let inserts = FailPoint::reserve(INSERTS);
    let run = start_and_block(&bench, &inserts, true).await;
    let zombies = recorded_sessions(&bench).await;
    run.kill();
    assert!(running_on(&bench, &zombies).await > 0, "the server goes on without its client");

    let mut run = bench.program("cleanse --parallel 1").spawn();
    wait_for("an operation of the new run", async || {
        assert!(run.is_running(), "{}", run.stderr());
        let sessions = recorded_sessions(&bench).await;
        sessions.iter().all(|session| !zombies.contains(session)) && running_on(&bench, &sessions).await > 0
    })
    .await;
    assert_eq!(running_on(&bench, &zombies).await, 0);
    inserts.off(&bench).await;
    run.finish().await.expect_exit(0);
    expect_end_state(&bench).await;
}

#[tokio::test]
async fn an_operation_that_does_not_end_at_once_is_waited_for() {
    let bench = Bench::new().await;
    seed(&bench, 4000).await;
    configure(&bench, RULES);
    let inserts = FailPoint::reserve(INSERTS);
    let run = start_and_block(&bench, &inserts, false).await;
    let zombies = recorded_sessions(&bench).await;
    run.kill();

    let mut run = bench.program("cleanse --parallel 1").spawn();
    wait_for("the kill of the old operation", async || {
        assert!(run.is_running(), "{}", run.stderr());
        let pipeline = [
            doc! {"$currentOp": {"allUsers": true}},
            doc! {"$match": {"lsid.id": {"$in": zombies.clone()}, "killPending": true}},
        ];
        let killed: Vec<Document> = bench
            .admin()
            .aggregate(pipeline)
            .await
            .expect("a cursor")
            .try_collect()
            .await
            .expect("operations");
        !killed.is_empty()
    })
    .await;
    // The old one may still write: nothing else is begun.
    assert_eq!(recorded_sessions(&bench).await, zombies);
    inserts.off(&bench).await;
    run.finish().await.expect_exit(0);
    expect_end_state(&bench).await;
}

#[tokio::test]
async fn sigterm_keeps_the_state_and_the_next_run_goes_on() {
    let bench = Bench::new().await;
    seed(&bench, 16_000).await;
    configure(&bench, RULES);
    let yields = FailPoint::reserve(YIELDS);
    yields.set(&bench, "alwaysOn", doc! {"namespace": bench.namespace(SOURCE), "waitForMillis": 100}).await;
    let mut run = bench.program("cleanse --parallel 2").spawn();
    let ranges: Collection<Document> = bench.state.collection("ranges");
    wait_for("a finished range", async || {
        assert!(run.is_running(), "{}", run.stderr());
        ranges.count_documents(doc! {"state": "done"}).await.expect("a count") > 0
    })
    .await;
    run.signal(Signal::Terminate);
    let run = run.finish().await.expect_exit(143);
    assert_eq!(run.text("/status"), "interrupted");
    assert_eq!(run.text("/error/code"), "interrupted");
    let done = ranges.count_documents(doc! {"state": "done"}).await.expect("a count");
    assert!((1..4).contains(&done), "{done} of 4 ranges are done");
    assert_eq!(ranges.count_documents(doc! {"state": "copying"}).await.expect("a count"), 0);
    yields.off(&bench).await;

    bench.run("cleanse").await.expect_exit(0);
    expect_end_state(&bench).await;
}

#[tokio::test]
async fn passing_failures_of_the_server_are_ridden_out() {
    let (inserts, commands) = (FailPoint::reserve(INSERTS), FailPoint::reserve("failCommand"));
    let failures = [
        doc! {"closeConnection": true},
        doc! {"errorCode": 10107},
        doc! {"errorCode": 11600},
        doc! {"errorCode": 11602},
        doc! {"errorCode": 91},
    ];
    for failure in failures {
        let bench = Bench::new().await;
        seed(&bench, 1500).await;
        // What is made to look like an election is seen through within a moment.
        let quick = uri_with("heartbeatFrequencyMS=500");
        bench.configure_text(&config(&bench, RULES).replace(&uri(), &quick));
        // The second range fails, twice.
        let mut run = start_and_block(&bench, &inserts, true).await;
        let mut data = doc! {"failCommands": ["aggregate"], "namespace": bench.namespace(SOURCE)};
        data.extend(failure.clone());
        commands.set(&bench, doc! {"times": 2}, data).await;
        inserts.off(&bench).await;
        wait_for("the end of the run", async || !run.is_running()).await;
        commands.off(&bench).await;
        let run = run.finish().await;
        assert_eq!(run.exit, Some(0), "{failure}\n{}", run.output());
        assert!(run.stderr.contains("copied again"), "{failure}\n{}", run.stderr);
        expect_end_state(&bench).await;
    }
}

/// Named so that it runs alone: no other test has a server meanwhile.
#[tokio::test]
async fn timing_a_step_down_in_the_middle_of_a_range_is_ridden_out() {
    let bench = Bench::new().await;
    seed(&bench, 3000).await;
    configure(&bench, RULES);
    let inserts = FailPoint::reserve(INSERTS);
    let run = start_and_block(&bench, &inserts, true).await;
    let step_down = doc! {"replSetStepDown": 3, "secondaryCatchUpPeriodSecs": 0, "force": true};
    bench.admin().run_command(step_down).await.expect("stepped down");
    inserts.off(&bench).await;
    run.finish().await.expect_exit(0);
    expect_end_state(&bench).await;
}

/// A range that is cut off by the signal must not be forgotten because another one, whose end is
/// stored a little later, was finished.
#[tokio::test]
async fn sigterm_while_the_last_ranges_are_copied_forgets_none_of_them() {
    const LAST: i32 = 8;
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..4000).map(|id| doc! {"_id": id})).await;
    // Of the eight ranges between the ends the first hangs in front of its inserts, the last takes a
    // second or two.
    let slow = r#"{"$reduce": {"input": {"$range": [0, 200000]}, "initialValue": 0, "in": {"$add": ["$$value", 1]}}}"#;
    configure(
        &bench,
        &format!(
            r#"keep = '{{"$or": [{{"_id": {{"$lt": 300}}}}, {{"_id": {{"$gte": 3980}}, "$expr": {{"$lt": [{slow}, 0]}}}}]}}'"#
        ),
    );
    let inserts = FailPoint::reserve(INSERTS);
    inserts
        .set(
            &bench,
            "alwaysOn",
            doc! {"nss": next_namespace(&bench, "cleanse", TARGET).await, "shouldCheckForInterrupt": true},
        )
        .await;
    let mut run = bench.program("cleanse --parallel 2").spawn();
    let ranges: Collection<Document> = bench.state.collection("ranges");
    let is = async |number: i32, state: &str| {
        let filter = doc! {"_id.number": number, "state": state};
        ranges.count_documents(filter).await.expect("a count") == 1
    };
    wait_for("the last range to be begun", async || {
        assert!(run.is_running(), "{}", run.stderr());
        is(LAST, "copying").await
    })
    .await;
    // Its end can't be stored as long as this transaction is open.
    let mut session = bench.state.client().start_session().await.expect("a session");
    session.start_transaction().await.expect("a transaction");
    ranges
        .update_one(doc! {"_id.number": LAST}, doc! {"$set": {"test": true}})
        .session(&mut session)
        .await
        .expect("the range is locked");
    for number in 2..LAST {
        assert!(is(number, "done").await, "{number}");
    }
    assert!(is(1, "copying").await && is(LAST, "copying").await);
    run.signal(Signal::Terminate);
    wait_for("the first range to be given up", async || is(1, "pending").await).await;
    session.abort_transaction().await.expect("aborted");
    let run = run.finish().await;
    inserts.off(&bench).await;

    assert_eq!(run.exit, Some(143), "{}", run.output());
    bench.run("cleanse").await.expect_exit(0);
    assert_eq!(copied(&bench).await, 300);
}

#[tokio::test]
async fn an_operation_that_somebody_killed_is_begun_again() {
    let bench = Bench::new().await;
    seed(&bench, 3000).await;
    configure(&bench, RULES);
    let inserts = FailPoint::reserve(INSERTS);
    let mut run = start_and_block(&bench, &inserts, true).await;
    let sessions = recorded_sessions(&bench).await;
    let uuids: Vec<Bson> = sessions.iter().map(|id| doc! {"id": id.clone()}.into()).collect();
    bench.admin().run_command(doc! {"killSessions": uuids}).await.expect("killed");
    wait_for("the range to be copied again", async || {
        assert!(run.is_running(), "{}", run.stderr());
        let now = recorded_sessions(&bench).await;
        now.iter().any(|session| !sessions.contains(session)) && running_on(&bench, &now).await > 0
    })
    .await;
    inserts.off(&bench).await;
    run.finish().await.expect_exit(0);
    expect_end_state(&bench).await;
}

/// Elections take ten seconds and more, longer than a lease that nobody renews. Nobody has taken
/// it meanwhile: the job goes on.
#[tokio::test]
async fn timing_an_election_that_takes_longer_than_the_lease_is_ridden_out() {
    let bench = Bench::new().await;
    seed(&bench, 3000).await;
    configure(&bench, RULES);
    let inserts = FailPoint::reserve(INSERTS);
    let run = start_and_block(&bench, &inserts, true).await;
    let step_down = doc! {"replSetStepDown": 14, "secondaryCatchUpPeriodSecs": 0, "force": true};
    bench.admin().run_command(step_down).await.expect("stepped down");
    inserts.off(&bench).await;
    run.finish().await.expect_exit(0);
    expect_end_state(&bench).await;
}

/// It may not know yet that it was replaced: its lease counts by its own clock.
#[tokio::test]
async fn a_run_that_was_replaced_stores_no_range() {
    let bench = Bench::new().await;
    let mongo = Mongo::connect(&Secret::new(uri()), bench.state.name()).await.expect("a connection");
    let job = Job::start(&mongo, "copy", "cleanse", &doc! {}).await.expect("the job");
    let ranges = Ranges::of_run(&mongo, &job);
    ranges.create(&[Range::all()]).await.expect("stored");
    ranges.set(0, &RangeState::Copying(doc! {"id": 1})).await.expect("ours");
    let stored: Collection<Document> = bench.state.collection("ranges");
    let later = doc! {"$set": {"run": job.run() + 1, "session": {"id": 2}}};
    stored.update_one(doc! {}, later).await.expect("an update");
    let refused = ranges.set(0, &RangeState::Done).await.expect_err("it is another run's");
    assert!(refused.message().contains("lease"), "{refused}");
    ranges.advance(0, &Bson::Int32(5)).await.expect_err("it is another run's");
    ranges.clear().await.expect("nothing of its own is left");
    let range = stored.find_one(doc! {}).await.expect("a read").expect("a range");
    assert_eq!(range.get_str("state").ok(), Some("copying"));
    assert_eq!(range.get_document("session").ok(), Some(&doc! {"id": 2}));
}

/// What it stands for would never be copied.
#[tokio::test]
async fn a_range_that_is_missing_stops_the_copy() {
    let bench = Bench::new().await;
    seed(&bench, 400).await;
    configure(&bench, RULES);
    let run = bench.program("cleanse").env("MONGOREKEY_CRASH_AT", "cleanse_ranges_made:1").run().await;
    assert_eq!(run.exit, None, "killed by itself: {}", run.output());
    let run = bench.program("cleanse --parallel 1").env("MONGOREKEY_CRASH_AT", "range_copied:1").run().await;
    assert_eq!(run.exit, None, "killed by itself: {}", run.output());
    let ranges: Collection<Document> = bench.state.collection("ranges");
    ranges.delete_one(doc! {"_id.number": 2}).await.expect("deleted");
    let run = bench.run("cleanse").await.expect_exit(4);
    assert!(run.stderr.contains("--restart"), "{}", run.stderr);
    bench.run("cleanse --restart").await.expect_exit(0);
    expect_end_state(&bench).await;
}
