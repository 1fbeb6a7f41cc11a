//! How the program tells what came out: results that are lost, and what is said last.

use std::fs::OpenOptions;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::harness::Bench;

/// Runs the program with its result going to a device that is full.
fn into_a_full_device(bench: &Bench, arguments: &str) -> Output {
    let full = OpenOptions::new().write(true).open("/dev/full").expect("a device that is full");
    Command::new(env!("CARGO_BIN_EXE_mongorekey"))
        .current_dir(&bench.folder)
        .args(arguments.split_whitespace())
        .stdout(full)
        .output()
        .expect("the program ends")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn a_result_that_cannot_be_written_is_an_error() {
    let bench = Bench::with_docs(3).await;
    for arguments in ["status", "status --output json", "plan --output json"] {
        let run = into_a_full_device(&bench, arguments);
        assert_eq!(run.status.code(), Some(4), "{arguments}: {}", said(&run));
        assert!(said(&run).contains("can't be written to stdout"), "{arguments}: {}", said(&run));
    }
    // What went wrong before counts for more.
    let run = into_a_full_device(&bench, "plan --output json --target nobody");
    assert_eq!(run.status.code(), Some(2), "{}", said(&run));
}

#[tokio::test]
async fn where_logs_are_json_the_last_line_is_json_too() {
    let bench = Bench::with_docs(3).await;
    for arguments in ["plan --log-format json --target nobody", "plan --log-format json --nonsense"] {
        let run = bench.run(arguments).await.expect_exit(2);
        for line in run.stderr.lines() {
            let line: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"));
            assert!(line["message"].is_string(), "{line}");
        }
        let last: Value = serde_json::from_str(run.stderr.lines().last().expect("a line")).expect("JSON");
        assert_eq!(last["level"], json!("error"), "{last}");
        assert_eq!(last["message"], run.json["error"]["message"], "{last}");
    }
}
