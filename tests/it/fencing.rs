//! A cutover that stood still while somebody else ended its right: what it was about to do is not
//! done any more, and what the application was told is written stays where the application reads it.
//!
//! Processes are stopped at a point of the flow (SIGSTOP), as the pause of a virtual machine or the
//! freezer of a cgroup does, and go on when writes have been let through again.

use std::time::Duration;

use bson::{Bson, Document, RawBson, doc};
use mongodb::Collection;
use mongorekey::cleanse::marks::Marks;
use mongorekey::config::values::Secret;
use mongorekey::job::Job;
use mongorekey::mongo::Mongo;

use crate::cleansing::{SOURCE, TARGET, assert_same, bytes, configure, job_name, name_now};
use crate::harness::{Bench, wait_for};
use crate::program::{Finished, Running, Signal, children, is_stopped, signal};

/// A stopped holder loses its lease within ten seconds.
const LEASE: Duration = Duration::from_secs(11);
/// Written by the application after its writes were let through again.
const ACKNOWLEDGED: i32 = 150;

pub async fn copied() -> Bench {
    let bench = Bench::new().await;
    configure(&bench, "keep = '{\"valid\": true}'");
    bench.insert_into(SOURCE, (0..300).map(|id| doc! {"_id": id, "valid": id % 3 != 0})).await;
    bench.run("cleanse").await.expect_exit(0);
    bench
}

pub fn source(bench: &Bench) -> Collection<Document> {
    bench.database.collection(SOURCE)
}

async fn record(bench: &Bench) -> Document {
    let job = bench.job(&job_name(bench)).await.expect("the job");
    job.get_document("cutover").cloned().unwrap_or_default()
}

/// Starts a command that stops at a point, and its watchdog with it.
pub async fn stopped_at(bench: &Bench, command: &str, point: &str) -> (Running, Vec<u32>) {
    let mut run = bench.program(command).env("MONGOREKEY_STOP_AT", &format!("{point}:1")).spawn();
    wait_for("the stop", async || {
        assert!(run.is_running(), "{}", run.stderr());
        is_stopped(run.pid())
    })
    .await;
    let watchdogs = children(run.pid());
    assert_eq!(watchdogs.len(), 1, "a cutover that holds writes off has a watchdog");
    watchdogs.iter().for_each(|watchdog| signal(*watchdog, Signal::Stop));
    (run, watchdogs)
}

/// What an operator types who sees that the application is refused; then the application goes on.
async fn let_through_and_write(bench: &Bench) {
    tokio::time::sleep(LEASE).await;
    bench.run("status").await.expect_exit(0);
    let written = (0..ACKNOWLEDGED).map(|number| doc! {"_id": 1_000 + number, "valid": true});
    source(bench).insert_many(written).await.expect("writes go on");
}

async fn goes_on(run: Running, watchdogs: &[u32]) -> Finished {
    watchdogs.iter().for_each(|watchdog| signal(*watchdog, Signal::Continue));
    run.signal(Signal::Continue);
    run.finish().await
}

/// All that was acknowledged is in the live collection, and nothing holds writes off.
async fn expect_nothing_lost(bench: &Bench, output: &str) {
    let acknowledged = doc! {"_id": {"$gte": 1_000}};
    let found = source(bench).count_documents(acknowledged).await.expect("a count");
    assert_eq!(found, u64::try_from(ACKNOWLEDGED).expect("small"), "acknowledged writes are lost\n{output}");
    source(bench).insert_one(doc! {"_id": "probe", "valid": true}).await.expect("no fence");
    source(bench).delete_one(doc! {"_id": "probe"}).await.expect("no fence");
    assert_eq!(record(bench).await.get("fence"), Some(&Bson::Null), "{output}");
}

async fn stopped_cutover_changes_nothing(mode: &str, point: &str) {
    let bench = copied().await;
    let command = format!("cutover --mode {mode} --yes");
    let (run, watchdogs) = stopped_at(&bench, &command, point).await;
    let_through_and_write(&bench).await;
    let names = bench.database.list_collection_names().await.expect("names");
    assert!(names.iter().any(|name| name == TARGET), "the copy has its name back: {names:?}");
    let late = goes_on(run, &watchdogs).await;
    expect_nothing_lost(&bench, &late.output()).await;
    // It may have begun anew by itself; else nothing is in the way of the next one.
    if late.exit != Some(0) {
        late.expect_exit(4);
        bench.run(&command).await.expect_exit(0);
    }
    assert_eq!(record(&bench).await.get_str("state").ok(), Some("finished"));
    expect_nothing_lost(&bench, "").await;
}

#[tokio::test]
async fn a_swap_that_stood_still_under_its_fence_exchanges_nothing() {
    stopped_cutover_changes_nothing("swap", "cutover_fenced").await;
}

#[tokio::test]
async fn a_swap_that_stood_still_before_its_rename_exchanges_nothing() {
    stopped_cutover_changes_nothing("swap", "cutover_renaming").await;
}

#[tokio::test]
async fn a_swap_that_stood_still_after_its_last_look_at_the_clock_exchanges_nothing() {
    stopped_cutover_changes_nothing("swap", "cutover_deadline_seen").await;
}

#[tokio::test]
async fn a_keep_that_stood_still_before_its_rename_exchanges_nothing() {
    stopped_cutover_changes_nothing("keep", "cutover_renaming").await;
}

#[tokio::test]
async fn a_keep_that_stood_still_after_its_last_look_at_the_clock_exchanges_nothing() {
    stopped_cutover_changes_nothing("keep", "cutover_deadline_seen").await;
}

/// What it does after it stood still it does without the right to: nobody else knows of it.
#[tokio::test]
async fn a_swap_that_stood_still_before_its_fence_leaves_none() {
    stopped_cutover_changes_nothing("swap", "cutover_recorded").await;
}

/// The name of the copy is taken by somebody else meanwhile: writes are let through all the same.
#[tokio::test]
async fn a_fence_is_lifted_although_the_name_of_the_copy_is_taken() {
    let bench = copied().await;
    let (run, watchdogs) = stopped_at(&bench, "cutover --mode swap --yes", "cutover_fenced").await;
    bench.insert_into(TARGET, [doc! {"_id": "somebody else's"}]).await;
    let_through_and_write(&bench).await;
    let late = goes_on(run, &watchdogs).await;
    expect_nothing_lost(&bench, &late.output()).await;
    // It stays where it is until a person has looked.
    let next = bench.run("cutover --mode swap --yes").await;
    assert!(matches!(next.exit, Some(3 | 4)), "{}", next.output());
    expect_nothing_lost(&bench, &next.output()).await;
    bench.database.collection::<Document>(TARGET).drop().await.expect("a drop");
    bench.run("cutover --mode swap --yes").await.expect_exit(0);
    expect_nothing_lost(&bench, "").await;
}

/// A follower that stands still in the middle of its writes; somebody else has taken over and written
/// a newer state by the time that it goes on.
async fn stopped_follower_changes_nothing(point: &str) {
    let bench = copied().await;
    let run = bench.program("cleanse --follow").env("MONGOREKEY_STOP_AT", &format!("{point}:1")).spawn();
    let set = async |version: i32| {
        let change = doc! {"$set": {"version": version}};
        source(&bench).update_one(doc! {"_id": 1}, change).await.expect("a write");
    };
    set(1).await;
    wait_for("the stop", async || is_stopped(run.pid())).await;
    tokio::time::sleep(LEASE).await;
    set(2).await;
    bench.run("cleanse").await.expect_exit(0);
    let target: Collection<Document> = bench.database.collection(TARGET);
    let version = async || {
        let document = target.find_one(doc! {"_id": 1}).await.expect("a read").expect("the document");
        document.get_i32("version").ok()
    };
    assert_eq!(version().await, Some(2));
    signal(run.pid(), Signal::Continue);
    let run = run.finish().await;
    assert_eq!(version().await, Some(2), "{}", run.output());
    assert_eq!(run.exit, Some(4), "{}", run.output());
    assert!(run.stderr.contains("the lease of the job"), "{}", run.output());
}

#[tokio::test]
async fn a_follower_that_stood_still_before_its_transaction_writes_nothing() {
    stopped_follower_changes_nothing("lane_lease_seen").await;
}

#[tokio::test]
async fn a_follower_that_stood_still_within_its_transaction_writes_nothing() {
    stopped_follower_changes_nothing("lane_statement").await;
}

/// Nothing of ours looks at the lease after this: only the server can refuse.
#[tokio::test]
async fn a_follower_that_stood_still_before_its_commit_writes_nothing() {
    stopped_follower_changes_nothing("lane_committing").await;
}

/// The copy had looked which documents are missing; by the time that it goes on somebody else has
/// copied them, and the application has deleted some from both sides.
#[tokio::test]
async fn a_copy_beside_dual_writes_that_stood_still_brings_no_deleted_document_back() {
    let bench = Bench::new().await;
    configure(&bench, "keep = '{\"valid\": true}'");
    bench.insert_into(SOURCE, (0..300).map(|id| doc! {"_id": id, "valid": true})).await;
    let command = "cleanse --dual-write --grace 200ms";
    let run = bench.program(command).env("MONGOREKEY_STOP_AT", "lane_committing:1").spawn();
    wait_for("the stop", async || is_stopped(run.pid())).await;
    tokio::time::sleep(LEASE).await;
    bench.run(command).await.expect_exit(0);
    let target: Collection<Document> = bench.database.collection(TARGET);
    for collection in [&source(&bench), &target] {
        collection.delete_many(doc! {"_id": {"$mod": [2, 0]}}).await.expect("deleted");
    }
    signal(run.pid(), Signal::Continue);
    let run = run.finish().await;
    assert_eq!(target.count_documents(doc! {}).await.expect("a count"), 150, "{}", run.output());
    assert_eq!(run.exit, Some(4), "{}", run.output());
}

/// The server carries a `$merge` or `$out` out whoever sent it. By then the copy has another name.
#[tokio::test]
async fn a_copy_that_is_sent_by_a_former_holder_of_the_job_writes_nothing_that_counts() {
    for (command, at) in [("cleanse --parallel 1", 3), ("cleanse --method out", 1)] {
        let mut tries = 1;
        while !send_copy_late(command, at).await {
            assert!(tries < 5, "{command}: it hears each time in time that its lease is gone");
            tries += 1;
        }
    }
}

/// Returns whether the late command was carried out, elsewhere: its process may hear before that its
/// lease is gone.
async fn send_copy_late(command: &str, at: u32) -> bool {
    let bench = Bench::new().await;
    configure(&bench, "keep = '{\"valid\": true}'");
    bench.insert_into(SOURCE, (0..300).map(|id| doc! {"_id": id, "valid": true})).await;
    let stop = format!("copy_sending:{at}");
    let run = bench.program(command).env("MONGOREKEY_STOP_AT", &stop).spawn();
    wait_for("the stop", async || is_stopped(run.pid())).await;
    // What an operator does who sees a process that hangs: the lease is there for the taking.
    let jobs: Collection<Document> = bench.state.collection("jobs");
    jobs.update_one(doc! {}, doc! {"$unset": {"lease": ""}}).await.expect("given back");
    bench.run(command).await.expect_exit(0);
    source(&bench).delete_many(doc! {"_id": {"$mod": [2, 0]}}).await.expect("deleted");
    bench.run(command).await.expect_exit(0);
    let copied = bytes(&bench, TARGET).await;
    assert_same(&copied, &bytes(&bench, SOURCE).await);

    signal(run.pid(), Signal::Continue);
    run.finish().await.expect_exit(4);
    assert_same(&bytes(&bench, TARGET).await, &copied);
    let is_carried_out = name_now(&bench, TARGET).await != TARGET;
    bench.run(command).await.expect_exit(0);
    assert_eq!(name_now(&bench, TARGET).await, TARGET, "what it made is gone");
    assert_same(&bytes(&bench, TARGET).await, &copied);
    is_carried_out
}

/// Whoever takes over closes all lanes before it reads, those too that are opened meanwhile.
#[tokio::test]
async fn a_lane_is_closed_to_a_former_holder_and_none_is_opened_by_him() {
    let bench = Bench::new().await;
    let mongo = Mongo::connect(&Secret::new(bench.uri.clone()), bench.state.name()).await.expect("connected");
    let former = Job::start(&mongo, "job", "write", &doc! {}).await.expect("a job");
    let right = former.right(&mongo);
    let mut lane = right.lane("a").await.expect("a lane");
    let target = bench.namespace(TARGET).parse().expect("a namespace");
    let nothing = doc! {"_id": "nothing"};
    assert!(lane.delete_all("deleting", &target, &nothing).await.expect("an answer").is_none());
    // What an operator does who sees a process that hangs: the lease is there for the taking.
    let jobs: Collection<Document> = bench.state.collection("jobs");
    jobs.update_one(doc! {"_id": "job"}, doc! {"$unset": {"lease": ""}}).await.expect("given back");
    let _holder = Job::start(&mongo, "job", "write", &doc! {}).await.expect("taken");
    let refused = lane.delete_all("deleting", &target, &nothing).await.expect_err("refused");
    assert!(refused.to_string().contains("lease of the job"), "{refused}");
    let refused = right.lane("b").await.expect_err("refused");
    assert!(refused.to_string().contains("lease of the job"), "{refused}");
    let lanes: Collection<Document> = bench.state.collection("lanes");
    assert_eq!(lanes.count_documents(doc! {}).await.expect("a count"), 1, "none came into being");
}

/// The removal of a mark is sent again when its connection breaks: the second one must not take a mark
/// that was set meanwhile, or a change of the source is forgotten.
#[tokio::test]
async fn a_removal_of_a_mark_that_arrives_twice_takes_no_later_mark() {
    let bench = Bench::new().await;
    let mongo = Mongo::connect(&Secret::new(&bench.uri), bench.state.name()).await.expect("connected");
    let marks = Marks::of(&mongo, "job");
    let touched = [RawBson::Int32(1)];
    marks.set(&touched).await.expect("a mark");
    let first = marks.some(10).await.expect("the marks");
    marks.remove(&first).await.expect("removed");
    marks.set(&touched).await.expect("a mark");
    marks.remove(&first).await.expect("nothing to remove");
    assert_eq!(marks.count().await.expect("a count"), 1);
    let second = marks.some(10).await.expect("the marks");
    marks.remove(&second).await.expect("removed");
    assert_eq!(marks.count().await.expect("a count"), 0);
}
