//! What `plan` says about a moment by which the work must be done, and about days and batches.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::harness::Bench;
use crate::key_api::KeyApi;
use crate::program::Finished;

const DAY: u64 = 24 * 3600;

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a time after 1970").as_secs()
}

/// A moment, in seconds since 1970, as `2026-12-24T06:00:00Z`.
fn written(at: u64) -> String {
    let at = bson::DateTime::from_millis(i64::try_from(at * 1000).expect("small"));
    at.try_to_rfc3339_string().expect("a time")
}

/// The midnight of UTC that comes in so many days, and its date; 1 is the next one.
fn midnight(days: u64) -> (u64, String) {
    let at = (now() / DAY + days) * DAY;
    (at, written(at)[..10].to_owned())
}

#[track_caller]
fn close(run: &Finished, pointer: &str, expected: f64) {
    let found = run.json.pointer(pointer).and_then(Value::as_f64);
    let found = found.unwrap_or_else(|| panic!("no number at {pointer} in {}", run.stdout));
    assert!((found - expected).abs() < expected * 1e-3, "{pointer}: {found}, not {expected}");
}

#[tokio::test]
async fn a_deadline_tells_the_rate_that_it_needs() {
    let bench = Bench::with_docs(1000).await;
    bench.configure(&bench.config(&KeyApi::finding()));
    let (at, date) = midnight(7);
    let run = bench.run(&format!("plan --deadline {date}")).await.expect_exit(0);
    assert_eq!(run.json["deadline"]["at"], json!(format!("{date}T00:00:00Z")));
    close(&run, "/deadline/tps_nonstop", 1000.0 / (at - now()) as f64);
    assert_eq!(run.json["deadline"]["tps_in_windows"], Value::Null);
    assert_eq!(run.json["deadline"]["impossible_because_of"], Value::Null);

    // In Seoul the day begins nine hours before.
    let run = bench
        .run(&format!("plan --deadline {date} --window 00:00-06:00 --time-zone Asia/Seoul"))
        .await
        .expect_exit(0);
    close(&run, "/deadline/tps_nonstop", 1000.0 / (at - 9 * 3600 - now()) as f64);
    let nights = run.json["deadline"]["tps_in_windows"].as_f64().expect("a rate");
    // Five nights of six hours, and what is left of today's.
    assert!((1000.0 / (6.01 * 21_600.0)..=1000.0 / (4.99 * 21_600.0)).contains(&nights), "{nights}");

    let run = bench.run(&format!("plan --deadline {date}T12:00:00+12:00")).await.expect_exit(0);
    assert_eq!(run.json["deadline"]["at"], json!(format!("{date}T00:00:00Z")));
    assert_eq!(bench.run("plan").await.expect_exit(0).json["deadline"], Value::Null);
}

#[tokio::test]
async fn a_deadline_that_can_not_be_is_refused_or_said_to_be_impossible() {
    let bench = Bench::with_docs(100).await;
    bench.configure(&bench.config(&KeyApi::finding()).backfill("max_calls_per_day = 40"));
    for past in ["2020-01-01", "2020-01-01T00:00:00Z", "2020-01-01T12:00"] {
        let run = bench.run(&format!("plan --deadline {past}")).await.expect_exit(2);
        assert!(run.text("/error/message").contains("in the past"), "{}", run.stdout);
    }
    for nonsense in ["tomorrow", "2026-02-30", "24.12.2026"] {
        bench.run(&format!("plan --deadline {nonsense}")).await.expect_exit(2);
    }
    // Today and tomorrow allow 80 calls.
    let run = bench.run(&format!("plan --deadline {}", midnight(2).1)).await.expect_exit(0);
    assert_eq!(run.json["deadline"]["tps_nonstop"], Value::Null);
    assert_eq!(run.json["deadline"]["impossible_because_of"], json!("max_calls_per_day"));
    let run = bench.run(&format!("plan --deadline {}", midnight(4).1)).await.expect_exit(0);
    assert!(run.json["deadline"]["tps_nonstop"].as_f64().is_some_and(|tps| tps > 0.0), "{}", run.stdout);

    // A window that opens only after the deadline.
    let soon = (now() / 3600 + 1) * 3600;
    let hour = (soon / 3600 + 2) % 24;
    let line = format!("plan --window {hour:02}:00-{hour:02}:30 --deadline {}", written(soon + 1));
    let run = bench.run(&line).await.expect_exit(0);
    assert_eq!(run.json["deadline"]["tps_in_windows"], Value::Null, "{}", run.stdout);
    assert_eq!(run.json["deadline"]["impossible_because_of"], json!("windows"));
}

#[tokio::test]
async fn the_time_of_a_plan_respects_the_calls_of_a_day() {
    let bench = Bench::with_docs(250).await;
    let config = bench.config(&KeyApi::finding()).backfill("max_calls_per_day = 100").backfill("tps = 10");
    bench.configure(&config);
    let run = bench.run("plan").await.expect_exit(0);
    // A hundred today and tomorrow, fifty in five seconds of the day after.
    close(&run, "/seconds_nonstop", (midnight(2).0 - now() + 5) as f64);
    assert_eq!(run.json["seconds_in_windows"], Value::Null);
    let run = bench.run("plan --window 00:00-24:00").await.expect_exit(0);
    close(&run, "/seconds_in_windows", (midnight(2).0 - now() + 5) as f64);
}

#[tokio::test]
async fn keys_that_are_asked_for_in_batches_need_fewer_calls() {
    let bench = Bench::with_docs(250).await;
    let config =
        bench.config_for_url("http://127.0.0.1:9/keys").key_api("echo_pointer = '/legacyKey'").text();
    let batch = "[key_api.batch]\nsize = 100\nbody = '{keys_json}'\nitems_pointer = '/items'\n";
    bench.configure_text(&format!("{config}\n{batch}"));
    let run = bench.run("plan --tps 0.5").await.expect_exit(0);
    assert_eq!((run.number("/calls"), run.number("/keys_to_ask")), (3, 250));
    assert_eq!(run.json["seconds_nonstop"], json!(6.0));
}
