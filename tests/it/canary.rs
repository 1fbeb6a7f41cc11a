//! `backfill --canary`: some documents first, shown with what became of them, the others only after a yes.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bson::doc;
use serde_json::{Value, json};

use crate::harness::{Bench, DOCS};
use crate::key_api::{Call, KeyApi, Reply};

/// What a program did at a terminal where somebody answered its question.
struct AtTerminal {
    exit: Option<i32>,
    json: Value,
    screen: String,
    took: Duration,
}

/// Runs the program at a terminal; `answer` is typed when it asks.
async fn at_terminal(bench: &Bench, arguments: &str, answer: &str) -> AtTerminal {
    let stdout = bench.folder.join("terminal.out");
    let mut command = Command::new("python3");
    command
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/terminal.py"))
        .args([stdout.as_os_str(), answer.as_ref(), env!("CARGO_BIN_EXE_mongorekey").as_ref()])
        .args(["--output", "json"])
        .args(arguments.split_whitespace())
        .current_dir(&bench.folder)
        .env_remove("MONGOREKEY_URI");
    let begun = Instant::now();
    let output = tokio::task::spawn_blocking(move || command.output()).await.expect("no panic");
    let output = output.expect("python3 runs");
    let screen = String::from_utf8_lossy(&output.stdout).into_owned();
    let written = std::fs::read_to_string(&stdout).expect("a result");
    let json = serde_json::from_str(&written).unwrap_or_else(|error| panic!("{error}: {written}\n{screen}"));
    AtTerminal { exit: output.status.code(), json, screen, took: begun.elapsed() }
}

/// Thirty documents: the third has no new key, the fifth no legacy key.
async fn bench() -> (Bench, KeyApi) {
    let bench = Bench::with_docs(30).await;
    bench.docs().update_one(doc! {"_id": 5}, doc! {"$unset": {"legacyKey": 1}}).await.expect("an update");
    let answer = |call: &Call| if call.key == "K3" { Reply::not_found() } else { Reply::found(call) };
    let api = KeyApi::start(answer);
    bench.configure(&bench.config(&api));
    (bench, api)
}

async fn touched(bench: &Bench) -> u64 {
    bench.filled().await + bench.flagged().await
}

/// The outcomes of the canary by their documents.
fn told(json: &Value) -> Vec<(i64, String, String)> {
    let list = json["canary"].as_array().unwrap_or_else(|| panic!("no canary in {json}"));
    let mut told: Vec<_> = list
        .iter()
        .map(|entry| {
            let id = entry["document"]["$numberInt"].as_str().expect("canonical extended JSON");
            let word = |name: &str| entry[name].as_str().expect("a text").to_owned();
            (id.parse().expect("a number"), word("outcome"), word("detail"))
        })
        .collect();
    told.sort();
    told
}

fn expected() -> Vec<(i64, String, String)> {
    [(1, "filled", "N-K1"), (2, "filled", "N-K2"), (3, "flagged", "not_found"), (4, "filled", "N-K4")]
        .into_iter()
        .chain([(5, "flagged", "no_legacy_key")])
        .map(|(id, outcome, detail)| (id, outcome.to_owned(), detail.to_owned()))
        .collect()
}

#[tokio::test]
async fn without_a_terminal_and_without_a_yes_nothing_is_touched() {
    let (bench, api) = bench().await;
    let before = bench.documents(DOCS).await;
    let run = bench.run("backfill --tps 1000 --canary 5").await.expect_exit(2);
    assert!(run.json.to_string().contains("--yes"), "{}", run.stdout);
    assert_eq!((api.count(), bench.documents(DOCS).await), (0, before));
    assert!(!bench.has_state().await, "a job was made");
    for nonsense in ["--canary 0", "--canary 5 --limit 9", "--canary 5 --dry-run", "--canary 5 --workers 2"] {
        bench.run(&format!("backfill {nonsense} --yes")).await.expect_exit(2);
    }
    assert_eq!(api.count(), 0);
}

#[tokio::test]
async fn with_a_yes_the_first_are_shown_and_all_are_done() {
    let (bench, api) = bench().await;
    let run = bench.run("backfill --tps 1000 --canary 5 --yes").await.expect_exit(0);
    assert_eq!(touched(&bench).await, 30);
    assert_eq!(api.count(), 29, "one call per key");
    let shown: Vec<&str> = run.stderr.lines().filter(|line| line.contains("canary: ")).collect();
    assert_eq!(shown.len(), 5, "{}", run.stderr);
    for wanted in ["K1 -> filled N-K1", "K3 -> flagged not_found", "(no key) -> flagged no_legacy_key"] {
        assert!(shown.iter().any(|line| line.ends_with(wanted)), "{wanted} in {shown:#?}");
    }
    assert_eq!(told(&run.json), expected());
    assert_eq!(run.number("/job_totals/filled"), 28);
    run.expect_documents(&[("candidates", 30), ("filled", 28), ("flagged", 2)]);
    run.expect_calls(29);
}

#[tokio::test]
async fn what_a_canary_could_not_fill_is_tried_again_with_all_others() {
    let (bench, api) = bench().await;
    bench.configure(&bench.config(&api).key_api("max_attempts = 1"));
    api.change(
        |call| {
            if call.key == "K2" && call.attempt == 0 { Reply::html(200) } else { Reply::found(call) }
        },
    );
    let run = bench.run("backfill --tps 1000 --canary 4 --yes").await.expect_exit(0);
    assert_eq!(told(&run.json)[1].1, "failed");
    run.expect_documents(&[("candidates", 30), ("filled", 29), ("flagged", 1)]);
    assert_eq!(run.json["status"], "completed");
}

#[tokio::test]
async fn a_canary_whose_credentials_are_refused_is_the_end() {
    let (bench, api) = bench().await;
    api.change(|_| Reply::empty(401));
    bench.run("backfill --tps 1000 --canary 5 --yes").await.expect_exit(4);
    assert!((1..=4).contains(&api.count()), "{} calls", api.count());
    assert_eq!(touched(&bench).await, 0);
}

#[tokio::test]
async fn a_canary_that_alarms_the_guard_is_the_end() {
    let bench = Bench::with_docs(300).await;
    let api = KeyApi::start(|_| Reply::not_found());
    bench.configure(&bench.config(&api));
    bench.run("backfill --tps 1000 --canary 150 --yes").await.expect_exit(4);
    assert!(api.count() <= 150, "{} calls", api.count());
    assert_eq!(touched(&bench).await, 0);
}

#[tokio::test]
async fn a_no_ends_after_the_first_documents() {
    let (bench, api) = bench().await;
    let run = at_terminal(&bench, "backfill --tps 1000 --canary 5 --job j", "n").await;
    assert_eq!(run.exit, Some(0), "{}", run.screen);
    assert!(run.screen.contains("3 filled, 2 flagged, 0 failed"), "{}", run.screen);
    assert!(run.screen.contains("25 candidates left"), "{}", run.screen);
    assert_eq!((api.count(), touched(&bench).await), (4, 5));
    assert_eq!(told(&run.json), expected());
    assert_eq!(run.json["documents"]["candidates_left"], json!(25));
    // The rest is there for the next run.
    bench.run("backfill --tps 1000 --job j").await.expect_exit(0).expect_calls(25);
    assert_eq!(touched(&bench).await, 30);
}

#[tokio::test]
async fn a_yes_at_the_terminal_goes_on() {
    let (bench, api) = bench().await;
    let run = at_terminal(&bench, "backfill --tps 1000 --canary 5", "y").await;
    assert_eq!(run.exit, Some(0), "{}", run.screen);
    assert_eq!((api.count(), touched(&bench).await), (29, 30));
    assert_eq!(told(&run.json), expected());
}

#[tokio::test]
async fn an_interrupt_at_the_question_ends_the_run() {
    let (bench, api) = bench().await;
    let run = at_terminal(&bench, "backfill --tps 1000 --canary 5", "^C").await;
    assert_eq!(run.exit, Some(130), "{}", run.screen);
    assert!(run.took < Duration::from_secs(10), "{:?}", run.took);
    assert_eq!((api.count(), touched(&bench).await), (4, 5));
}
