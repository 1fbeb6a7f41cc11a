//! Killed under load, at each boundary of its phases and at any moment; and under load through a
//! change of the primary in each phase: the run that follows ends where an undisturbed one does, by
//! the writers' own journal.
//!
//! The points are compiled into debug builds only; see src/crash.rs.

use std::time::Duration;

use bson::{Bson, doc};
use mongodb::{Collection, IndexModel};

use crate::cleanse_live::{expect_target, live, wait_until_in_step};
use crate::cleansing::{FailPoint, SOURCE, configure, job_name};
use crate::harness::{Bench, wait_for};
use crate::own_set::ThreeNodes;
use crate::program::Signal;
use crate::soak::{random, rounds};
use crate::writers::{Options, Writers};

const COMMAND: &str = "cleanse --parallel 2";
/// So many that most are written once at the most after a kill: another write would mend what the
/// kill has broken.
const DOCUMENTS: i32 = 20_000;

/// Kills a run at each of these points in turn, the so manieth time it is reached, under load. Nothing
/// is begun anew between them, so that what one has broken is seen in the end.
async fn killed_at(bench: &Bench, writers: &Writers, command: &str, points: &[(&str, u64)]) {
    for (point, time) in points {
        writers.go_on_for(100).await;
        let crash = format!("{point}:{time}");
        let run = bench.program(command).env("MONGOREKEY_CRASH_AT", &crash).run().await;
        assert_eq!(run.exit, None, "{crash} was never reached: {}", run.output());
    }
}

async fn expect_all_in_the_end(bench: &Bench, writers: Writers) {
    bench.run(COMMAND).await.expect_exit(0);
    let journal = writers.stop().await;
    bench.run(COMMAND).await.expect_exit(0);
    expect_target(bench, &journal).await;
}

#[tokio::test]
async fn kills_at_each_boundary_of_the_phases_lose_no_write() {
    let (bench, writers) = live(DOCUMENTS).await;
    // Copying lasts so long that something is marked meanwhile.
    let yields = FailPoint::reserve("setYieldAllLocksWait");
    yields.set(&bench, "alwaysOn", doc! {"namespace": bench.namespace(SOURCE), "waitForMillis": 300}).await;
    let points = [
        ("cleanse_target_made", 1),
        ("cleanse_begun", 1),
        ("cleanse_ranges_made", 1),
        ("cleanse_created", 1),
        // The third begins when another one is done: what is touched of that is found by its marks only.
        ("range_begun", 3),
        ("marks_set", 1),
        ("marks_position_saved", 1),
        ("range_copied", 1),
    ];
    killed_at(&bench, &writers, COMMAND, &points).await;
    yields.off(&bench).await;
    let points = [
        ("cleanse_copied", 1),
        ("lanes_opened", 1),
        ("cleanse_fetched", 1),
        ("cleanse_indexed", 1),
        ("marks_applied", 1),
        ("marks_removed", 1),
        ("lane_statement", 1),
        ("lane_committed", 1),
        ("changes_applied", 1),
        ("cleanse_unique", 1),
        ("cleanse_options", 1),
        ("cleanse_last_indexes", 1),
        ("cleanse_done", 1),
    ];
    killed_at(&bench, &writers, COMMAND, &points).await;
    expect_all_in_the_end(&bench, writers).await;
}

#[tokio::test]
async fn kills_while_following_or_beginning_anew_lose_no_write() {
    let (bench, writers) = live(DOCUMENTS).await;
    bench.run(COMMAND).await.expect_exit(0);
    let points = [
        ("lanes_opened", 1),
        ("lane_statement", 2),
        ("lane_committed", 2),
        ("changes_applied", 2),
        ("changes_position_saved", 2),
        ("parties_removed", 1),
        ("parties_removed", 2),
    ];
    killed_at(&bench, &writers, "cleanse --follow", &points).await;
    expect_all_in_the_end(&bench, writers).await;

    let (bench, writers) = live(2_000).await;
    bench.run(COMMAND).await.expect_exit(0);
    killed_at(&bench, &writers, "cleanse --restart", &[("cleanse_dropped", 1)]).await;
    killed_at(&bench, &writers, COMMAND, &[("cleanse_cleared", 1)]).await;
    expect_all_in_the_end(&bench, writers).await;
}

#[tokio::test]
async fn random_kills_at_any_moment_lose_no_write() {
    let (bench, writers) = live(DOCUMENTS).await;
    let mut random = random(42);
    for kill in 0..rounds(10) {
        let command = match kill % 10 {
            // Copied anew, so that copying, marking and finishing are hit again and again.
            0 => "cleanse --restart",
            1..6 => COMMAND,
            _ => "cleanse --follow",
        };
        let run = bench.program(command).spawn();
        let moment = u64::try_from(50 + random.below(700)).expect("small");
        tokio::time::sleep(Duration::from_millis(moment)).await;
        run.kill();
    }
    expect_all_in_the_end(&bench, writers).await;
}

/// Waits for this state of the job.
async fn wait_for_phase(bench: &Bench, phase: &str) {
    let order = ["create", "copy", "finish", "done"];
    let rank = |phase: &str| order.iter().position(|other| *other == phase);
    wait_for(phase, async || {
        let stored = bench.job(&job_name(bench)).await;
        let stored = stored.and_then(|job| job.get_str("phase").ok().and_then(rank));
        assert!(stored <= rank(phase), "{phase} is over already");
        stored == rank(phase)
    })
    .await;
}

async fn set_on_all(set: &ThreeNodes, name: &str, data: &bson::Document) {
    for member in &set.members {
        member.fail_point(name, data.clone()).await;
    }
}

async fn end_on_all(set: &ThreeNodes, name: &str) {
    for member in &set.members {
        member.end_fail_point(name).await;
    }
}

#[tokio::test]
async fn timing_a_step_down_in_each_phase_loses_no_write() {
    let set = ThreeNodes::start().await;
    let bench = Bench::on(&set.uri).await;
    configure(&bench, crate::cleanse_live::RULE);
    let options = Options { documents: 12_000, ..Options::default() };
    let writers = Writers::on(&bench, SOURCE, options).await;
    let source: Collection<bson::Document> = bench.database.collection(SOURCE);
    let plain = IndexModel::builder().keys(doc! {"version": 1}).build();
    source.create_index(plain).await.expect("an index");
    // Copying takes so long that it can be hit, and building indexes until it was.
    let slow = doc! {"namespace": bench.namespace(SOURCE), "waitForMillis": 200};
    set_on_all(&set, "setYieldAllLocksWait", &slow).await;
    let term = set.term().await;
    let mut run = bench.program(&format!("{COMMAND} --follow")).spawn();
    wait_for("the job", async || bench.job(&job_name(&bench)).await.is_some()).await;
    set.step_down().await;
    wait_for_phase(&bench, "copy").await;
    set_on_all(&set, "hangAfterStartingIndexBuild", &doc! {}).await;
    set.step_down().await;
    let marks: Collection<bson::Document> = bench.state.collection("marks");
    // What is touched while a range is copied is marked, and so slow a copy is written to enough.
    wait_for("marks", async || marks.count_documents(doc! {}).await.is_ok_and(|marked| marked > 1_000)).await;
    end_on_all(&set, "setYieldAllLocksWait").await;
    wait_for_phase(&bench, "finish").await;
    let marked = marks.count_documents(doc! {}).await.expect("a count");
    wait_for("an index build", async || is_building(&set).await).await;
    set.step_down().await;
    end_on_all(&set, "hangAfterStartingIndexBuild").await;
    wait_for("fewer marks", async || marks.count_documents(doc! {}).await.is_ok_and(|left| left < marked))
        .await;
    set.step_down().await;
    wait_for("the follower", async || {
        assert!(run.is_running(), "{}", run.stderr());
        run.stderr().contains("follows")
    })
    .await;
    writers.go_on_for(250).await;
    set.step_down().await;
    writers.go_on_for(250).await;
    assert!(set.term().await >= term + 5, "five elections");
    let journal = writers.stop().await;
    wait_until_in_step(&bench, &journal, &mut run).await;
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
}

async fn is_building(set: &ThreeNodes) -> bool {
    let operations =
        set.primary().await.admin().run_command(doc! {"currentOp": 1}).await.expect("operations");
    let operations = operations.get_array("inprog").expect("a list");
    operations.iter().filter_map(Bson::as_document).any(|operation| {
        operation.get_str("msg").is_ok_and(|message| message.starts_with("Index Build"))
            || operation.get_document("command").is_ok_and(|command| command.contains_key("createIndexes"))
    })
}
