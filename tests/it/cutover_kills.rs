//! A cutover under writers with a journal, disturbed at any moment: killed, or through a change of
//! the primary. Started again until it is done it ends where an undisturbed one does, and writers
//! never stay held off.

use std::time::Duration;

use bson::{Bson, Document, doc};
use tokio::time::Instant;

use crate::cleanse_live::RULE;
use crate::cleansing::{SOURCE, configure, job_name, run_when_near};
use crate::harness::{Bench, wait_for};
use crate::own_set::{OwnSet, ThreeNodes};
use crate::program::Running;
use crate::soak::{random, rounds};
use crate::writers::{Cutover, Options, Writers, expect_live_after_cutover, is_valid};

/// Far more than a cutover takes.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

async fn copied(bench: &Bench, documents: i32) -> Writers {
    configure(bench, RULE);
    let options =
        Options { documents, cutover: Cutover::Once(is_valid), target_rate: 400, ..Options::default() };
    let writers = Writers::on(bench, SOURCE, options).await;
    bench.run("cleanse --parallel 2").await.expect_exit(0);
    writers
}

/// The record of the cutover, where one was begun.
async fn record(bench: &Bench) -> Option<Document> {
    let job = bench.job(&job_name(bench)).await.expect("the job");
    job.get_document("cutover").ok().cloned()
}

async fn is_done(bench: &Bench) -> bool {
    record(bench).await.is_some_and(|record| record.get_str("state").is_ok_and(|state| state == "finished"))
}

async fn expect_nothing_lost(bench: &Bench, writers: Writers, ended: Instant) {
    writers.go_on_for(300).await;
    assert!(writers.longest_pause() < LONGEST_PAUSE, "{:?}", writers.longest_pause());
    let journal = writers.stop().await;
    expect_live_after_cutover(bench, SOURCE, &journal, is_valid, ended).await;
    assert_eq!(record(bench).await.expect("a record").get("fence"), Some(&Bson::Null));
}

/// Waits until something is to be undone that was not when `before` was read, or the run has ended.
async fn wait_until_recorded(bench: &Bench, run: &mut Running, before: Option<Document>) {
    let id =
        |record: Option<&Document>| record.and_then(|record| record.get_str("id").ok().map(str::to_owned));
    let before = id(before.as_ref());
    wait_for("the record", async || !run.is_running() || id(record(bench).await.as_ref()) != before).await;
}

/// How many that are in a usual run: in a slow hour each takes half a minute.
const MOMENTS: usize = 4;

/// Kills cutovers at some moments, each on the way to the end of one of as many copies as that takes.
async fn killed_at_some_moments(mode: &str, seed: u64) {
    let (mut random, moments) = (random(seed), rounds(MOMENTS));
    let command = format!("cutover --mode {mode} --max-pause 10s --yes");
    let mut kills = 0;
    while kills < moments {
        let bench = Bench::new().await;
        let writers = copied(&bench, 1_000).await;
        while kills < moments && !is_done(&bench).await {
            let before = record(&bench).await;
            let mut run = bench.program(&command).spawn();
            let delay = if kills % 3 == 0 {
                // From the start on, through the gates.
                random.below(2_500)
            } else {
                wait_until_recorded(&bench, &mut run, before).await;
                random.below(160)
            };
            tokio::time::sleep(Duration::from_millis(u64::try_from(delay).expect("small"))).await;
            kills += usize::from(run.is_running());
            run.kill();
            wait_for("writes after the kill", async || {
                let fence = record(&bench).await.and_then(|record| record.get("fence").cloned());
                matches!(fence, None | Some(Bson::Null))
            })
            .await;
            writers.go_on_for(50).await;
        }
        let last = run_when_near(&bench, &command, None).await.expect_exit(0);
        assert_eq!(last.text("/outcome"), "cut_over");
        expect_nothing_lost(&bench, writers, Instant::now()).await;
    }
}

#[tokio::test]
async fn random_kills_of_a_swap_lose_no_write() {
    killed_at_some_moments("swap", 1).await;
}

#[tokio::test]
async fn random_kills_of_a_keep_lose_no_write() {
    killed_at_some_moments("keep", 3).await;
}

/// A moment of a cutover.
#[derive(Clone, Copy)]
enum Moment {
    /// While the gates compare.
    Gates,
    /// When a command arrives; so many of them are let through before.
    At(&'static str, i32),
}

impl Moment {
    async fn set(self, set: &ThreeNodes, on: bool) {
        let Self::At(command, skip) = self else { return };
        let data = doc! {"failCommands": [command], "blockConnection": true, "blockTimeMS": 4_000};
        for member in &set.members {
            let mode: Bson = if on { doc! {"skip": skip}.into() } else { "off".into() };
            let set = doc! {"configureFailPoint": "failCommand", "mode": mode, "data": data.clone()};
            member.admin().run_command(set).await.expect("the fail point");
        }
    }

    /// Waits for the moment, and changes the primary then: the command is still held up, and who
    /// ends the fail point would wait for it.
    async fn change_primary(self, set: &ThreeNodes, run: &mut Running) {
        match self {
            Self::Gates => {
                wait_for("the gates", async || {
                    assert!(run.is_running(), "{}", run.stderr());
                    run.stderr().contains("comparing")
                })
                .await;
            }
            Self::At(..) => {
                let primary = set.primary().await;
                let entered =
                    doc! {"waitForFailPoint": "failCommand", "timesEntered": 1_i64, "maxTimeMS": 50_000};
                primary.admin().run_command(entered).await.expect("it is reached");
            }
        }
        set.step_down().await;
    }
}

async fn through_a_change_of_the_primary(mode: &str, moments: &[Moment]) {
    let command = format!("cutover --mode {mode} --max-pause 10s --yes");
    for moment in moments {
        // Fail points count from the start of the server on.
        let set = ThreeNodes::start().await;
        let bench = Bench::on(&set.uri).await;
        let writers = copied(&bench, 1_000).await;
        moment.set(&set, true).await;
        let mut run = bench.program(&command).spawn();
        moment.change_primary(&set, &mut run).await;
        moment.set(&set, false).await;
        let first = run.finish().await;
        let cut_over = first.exit == Some(0) && first.text("/outcome") == "cut_over";
        assert!(cut_over || matches!(first.exit, Some(1 | 4 | 5)), "{}", first.output());
        // Otherwise the moment was not hit.
        let is_disturbed = first.exit != Some(0) || first.stderr.contains("attempt 1");
        assert!(is_disturbed || matches!(moment, Moment::Gates), "{}", first.output());
        writers.go_on_for(100).await;
        let last = run_when_near(&bench, &command, None).await.expect_exit(0);
        assert_eq!(last.text("/outcome"), "cut_over", "{}", first.output());
        expect_nothing_lost(&bench, writers, Instant::now()).await;
    }
}

#[tokio::test]
async fn timing_a_step_down_while_a_swap_is_prepared_or_renames_loses_no_write() {
    // The first one gives the copy the name of the attempt.
    through_a_change_of_the_primary("swap", &[Moment::Gates, Moment::At("renameCollection", 1)]).await;
}

#[tokio::test]
async fn timing_a_step_down_while_a_swap_is_fenced_loses_no_write() {
    through_a_change_of_the_primary("swap", &[Moment::At("collMod", 1)]).await;
}

#[tokio::test]
async fn timing_a_step_down_while_a_keep_is_fenced_or_renames_loses_no_write() {
    // The first `applyOps` is the question whether it is permitted.
    through_a_change_of_the_primary("keep", &[Moment::At("collMod", 1), Moment::At("applyOps", 1)]).await;
}

/// Where an answer is lost, somebody looks what has become of the command; where that is told by an
/// error, writes go on and the next command does it.
#[tokio::test]
async fn a_cutover_whose_connection_is_lost_ends_in_a_known_state() {
    let set = OwnSet::start(&[]);
    for (command, exit) in [("renameCollection", 0), ("collMod", 4)] {
        let bench = Bench::on(&set.uri).await;
        let writers = copied(&bench, 500).await;
        let mut data = doc! {"failCommands": [command], "closeConnection": true};
        if command == "collMod" {
            // The one that holds writes off, not the one before.
            data.insert("namespace", bench.namespace(SOURCE));
        }
        let fail_point = async |mode: Bson| {
            let set = doc! {"configureFailPoint": "failCommand", "mode": mode, "data": data.clone()};
            let set = bench.admin().run_command(set).await.expect("the fail point");
            i64::from(set.get_i32("count").expect("a count"))
        };
        // The first rename gives the copy the name of the attempt.
        let before = fail_point(doc! {"skip": i32::from(command == "renameCollection")}.into()).await;
        let cutover = "cutover --mode swap --max-pause 10s --yes";
        let run = bench.program(cutover).spawn();
        let entered =
            doc! {"waitForFailPoint": "failCommand", "timesEntered": before + 1, "maxTimeMS": 50_000};
        bench.admin().run_command(entered).await.expect("it is reached");
        fail_point("off".into()).await;
        let first = run.finish().await.expect_exit(exit);
        assert!(exit != 0 || first.stderr.contains("attempt 1"), "{}", first.stderr);
        let fence = record(&bench).await.expect("a record").get("fence").cloned();
        assert_eq!(fence, Some(Bson::Null), "{command}");
        writers.go_on_for(50).await;
        assert_eq!(bench.run(cutover).await.expect_exit(0).text("/outcome"), "cut_over");
        expect_nothing_lost(&bench, writers, Instant::now()).await;
    }
}
