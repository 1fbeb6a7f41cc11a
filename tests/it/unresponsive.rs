//! A server that takes commands and answers none, or is gone: a signal ends every run in time.

use std::time::{Duration, Instant};

use bson::doc;

use crate::cleansing::{SOURCE, TARGET, configure};
use crate::harness::{Bench, wait_for};
use crate::key_api::KeyApi;
use crate::own_set::OwnSet;
use crate::program::{Running, Signal};

/// From the first signal to the end of the process.
const LONGEST: Duration = Duration::from_secs(10);

/// A command under way on a bench of its own.
struct Case {
    command: &'static str,
    bench: Bench,
    run: Running,
    _api: Option<KeyApi>,
}

impl Case {
    async fn backfill(set: &OwnSet) -> Self {
        let bench = Bench::with_docs_on(&set.uri, 600).await;
        let api = KeyApi::finding();
        bench.configure(&bench.config(&api));
        let command = "backfill --tps 30 --chunk 20 --workers 3";
        let run = bench.program(command).spawn();
        wait_for("calls", async || api.count() > 20).await;
        Self { command, bench, run, _api: Some(api) }
    }

    /// A command about two collections, of which the program has said these words.
    async fn cleanse(set: &OwnSet, command: &'static str, words: &str) -> Self {
        let bench = Bench::on(&set.uri).await;
        bench.insert_into(SOURCE, (0..3000).map(|id| doc! {"_id": id})).await;
        if command.starts_with("verify") {
            bench.insert_into(TARGET, (0..3000).map(|id| doc! {"_id": id, "differs": id == 7})).await;
        }
        configure(&bench, "");
        let run = bench.program(command).spawn();
        wait_for(words, async || run.stderr().contains(words)).await;
        Self { command, bench, run, _api: None }
    }

    /// One that was only just started.
    async fn index(set: &OwnSet) -> Self {
        let bench = Bench::with_docs_on(&set.uri, 10).await;
        let command = "index create";
        Self { command, run: bench.program(command).spawn(), bench, _api: None }
    }

    /// Waits for its end; tells what is wrong with it.
    async fn problem(self, signalled: Instant) -> (Bench, Option<String>) {
        let run = self.run.finish().await;
        let took = signalled.elapsed();
        let told = run.json["error"]["code"].as_str().unwrap_or_default();
        // One that was done already when it was told to stop has nothing to tell.
        let is_done = run.exit == Some(0) && self.command == "index create";
        let is_right = is_done || (run.exit == Some(143) && told == "interrupted");
        let problem = format!("{} after {took:?}: {:?} {}", self.command, run.exit, run.output());
        (self.bench, (took > LONGEST || !is_right).then_some(problem))
    }
}

async fn all(set: &OwnSet) -> Vec<Case> {
    vec![
        Case::backfill(set).await,
        Case::cleanse(set, "cleanse --documents-per-second 100", "copy: ").await,
        Case::cleanse(set, "cleanse --follow", "and follows").await,
        Case::cleanse(set, "verify --full --settle 10m", "differ").await,
        Case::index(set).await,
    ]
}

/// Tells all of them to stop; what went wrong then, and their benches.
async fn stop_all(cases: Vec<Case>) -> (Vec<Bench>, Vec<String>) {
    let signalled = Instant::now();
    cases.iter().for_each(|case| case.run.signal(Signal::Terminate));
    let ends = futures_util::future::join_all(cases.into_iter().map(|case| case.problem(signalled))).await;
    let (benches, problems): (Vec<_>, Vec<_>) = ends.into_iter().unzip();
    (benches, problems.into_iter().flatten().collect())
}

#[tokio::test]
async fn timing_a_signal_ends_every_run_in_time_while_the_server_hangs() {
    let set = OwnSet::start(&[]);
    let cases = all(&set).await;
    let members = set.members().await;
    members[0].freeze();
    // What is sent now is not answered.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (benches, problems) = stop_all(cases).await;
    members[0].thaw();
    drop(benches);
    assert!(problems.is_empty(), "{}", problems.join("\n\n"));
}

#[tokio::test]
async fn timing_a_signal_ends_every_run_in_time_when_the_server_is_gone() {
    let set = OwnSet::start(&[]);
    let cases = all(&set).await;
    set.members().await[0].kill();
    // What fails now is sent again.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (benches, problems) = stop_all(cases).await;
    benches.into_iter().for_each(Bench::abandon);
    assert!(problems.is_empty(), "{}", problems.join("\n\n"));
}
