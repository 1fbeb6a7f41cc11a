//! Schedules drawn by a seed: a network that holds commands back, delivers them late or twice, loses
//! answers, breaks connections or freezes, and processes that stand still, beside writers with a
//! journal. Whatever it was, what was acknowledged is in the live collection at the end.

use std::time::Duration;

use bson::{Bson, Document};
use tokio::time::Instant;

use crate::cleanse_live::RULE;
use crate::cleansing::{SOURCE, configure, job_name, run_when_near};
use crate::harness::{Bench, Random, wait_for};
use crate::lying_network::{Network, Rule};
use crate::program::{Running, Signal};
use crate::soak::{random, rounds};
use crate::writers::{Cutover, Options, Writers, expect_live_after_cutover, is_valid};

/// A command that is disturbed for longer is killed.
const PATIENCE: Duration = Duration::from_secs(20);
/// What a disturbed process may be doing.
const COMMANDS: [&str; 3] =
    ["cleanse", "cutover --mode swap --max-pause 5s --yes", "cutover --mode keep --max-pause 5s --yes"];
/// Commands of the program that change something, each with how many of them a run may make first.
const DISTURBED: [(&str, usize); 6] = [
    ("update", 12),
    ("commitTransaction", 6),
    ("findAndModify", 6),
    ("renameCollection", 2),
    ("applyOps", 2),
    ("insert", 3),
];

fn milliseconds(random: &mut Random, end: usize) -> Duration {
    Duration::from_millis(u64::try_from(random.below(end)).expect("small"))
}

/// Disturbs a run once; returns what was done, for whoever reads of a failure.
async fn disturb(network: &Network, run: &mut Running, random: &mut Random) -> String {
    let (name, most) = DISTURBED[random.below(DISTURBED.len())];
    let skip = random.below(most);
    let rule = Rule::on(name).after(skip);
    let pause = milliseconds(random, 2_500);
    match random.below(7) {
        0 => network.lose_reply(rule),
        1 => network.break_at(rule),
        2 => {
            tokio::time::sleep(milliseconds(random, 1_500)).await;
            network.freeze();
            tokio::time::sleep(pause).await;
            network.thaw();
            return format!("frozen for {pause:?}");
        }
        3 => {
            tokio::time::sleep(milliseconds(random, 1_500)).await;
            if run.is_running() {
                run.signal(Signal::Stop);
                tokio::time::sleep(pause).await;
                run.signal(Signal::Continue);
            }
            return format!("stood still for {pause:?}");
        }
        4 => network.slow_down(milliseconds(random, 100)),
        kind => {
            let mut held = network.hold(rule);
            if tokio::time::timeout(PATIENCE / 4, held.arrived()).await.is_err() {
                return format!("{name} {skip} never came");
            }
            tokio::time::sleep(pause).await;
            if kind == 5 {
                held.deliver_copy().await;
            }
            held.release().await;
            return format!("{name} {skip} {pause:?} late, kind {kind}");
        }
    }
    format!("{name} {skip} without an answer, or all of them slow")
}

/// Waits for the end of a run, or kills it.
async fn ended(mut run: Running) -> String {
    let deadline = Instant::now() + PATIENCE;
    while run.is_running() {
        if Instant::now() > deadline {
            let said = run.stderr();
            run.kill();
            return format!("killed: {said}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    run.finish().await.output()
}

async fn fence(bench: &Bench) -> Option<Bson> {
    let job: Document = bench.job(&job_name(bench)).await.expect("the job");
    job.get_document("cutover").ok().and_then(|record| record.get("fence").cloned())
}

#[expect(clippy::print_stderr, reason = "the course of a schedule that has failed")]
async fn one_schedule(seed: u64) {
    let mut random = Random::seeded(seed);
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let options = Options { documents: 300, cutover: Cutover::Once(is_valid), seed, ..Options::default() };
    let writers = Writers::on(&bench, SOURCE, options).await;
    bench.run("cleanse --parallel 2").await.expect_exit(0);
    for _ in 0..=random.below(2) {
        let network = Network::before(&bench.uri).await;
        let command = COMMANDS[random.below(COMMANDS.len())];
        let mut run = bench.program(command).env("MONGOREKEY_URI", &network.uri()).spawn();
        let done = disturb(&network, &mut run, &mut random).await;
        let said = ended(run).await;
        eprintln!("seed {seed}: {command}: {done}\n{said}");
        if matches!(fence(&bench).await, None | Some(Bson::Null)) {
            continue;
        }
        // A process that was killed leaves it to its watchdog, or to whoever looks.
        bench.run("status").await.expect_exit(0);
        wait_for("writes to be let through", async || fence(&bench).await == Some(Bson::Null)).await;
    }
    writers.go_on_for(50).await;
    let last = "cutover --mode swap --max-pause 10s --yes";
    let last = run_when_near(&bench, last, None).await.expect_exit(0);
    assert_eq!(last.text("/outcome"), "cut_over", "seed {seed}");
    let ended = Instant::now();
    writers.go_on_for(50).await;
    let journal = writers.stop().await;
    expect_live_after_cutover(&bench, SOURCE, &journal, is_valid, ended).await;
    assert_eq!(fence(&bench).await, Some(Bson::Null), "seed {seed}");
}

#[tokio::test]
async fn random_schedules_of_a_lying_network_lose_no_write() {
    let mut random = random(21);
    for _ in 0..rounds(2) {
        one_schedule(random.next()).await;
    }
}
