//! What becomes of every kind of answer: the counts, the documents, the exit code.

use std::collections::BTreeMap;

use bson::{Document, doc};
use serde_json::json;

use crate::harness::{Bench, DOCS};
use crate::key_api::{Call, KeyApi, Reply};

/// What a document ends as.
#[derive(Clone, Copy)]
enum Fate {
    Filled,
    Flagged(&'static str),
    Failed,
}

/// The name of a case is the legacy key.
struct Case {
    name: &'static str,
    reply: fn(&Call) -> Reply,
    /// The outcome of each call.
    outcomes: &'static [&'static str],
    fate: Fate,
}

const fn case(
    name: &'static str,
    outcomes: &'static [&'static str],
    fate: Fate,
    reply: fn(&Call) -> Reply,
) -> Case {
    Case { name, reply, outcomes, fate }
}

const MAX_ATTEMPTS: usize = 3;
const INVALID: &[&str] = &["invalid"; MAX_ATTEMPTS];
const CONNECT: &[&str] = &["connect"; MAX_ATTEMPTS];

#[rustfmt::skip]
const CASES: &[Case] = &[
    case("found", &["found"], Fate::Filled, Reply::found),
    case("created", &["found"], Fate::Filled, |call| Reply::json(201, json!({"legacyKey": call.key, "newKey": "N-created"}))),
    case("404 json", &["not_found"], Fate::Flagged("not_found"), |_| Reply::not_found()),
    case("404 empty", &["not_found"], Fate::Flagged("not_found"), |_| Reply::empty(404)),
    case("404 html", INVALID, Fate::Failed, |_| Reply::html(404)),
    case("400 json", &["rejected"], Fate::Flagged("rejected"), |_| Reply::json(400, json!({"code": "BAD"}))),
    case("422 empty", &["rejected"], Fate::Flagged("rejected"), |_| Reply::empty(422)),
    case("400 html", INVALID, Fate::Failed, |_| Reply::html(400)),
    case("410 json", INVALID, Fate::Failed, |_| Reply::json(410, json!({}))),
    case("200 html", INVALID, Fate::Failed, |_| Reply::html(200)),
    case("204", INVALID, Fate::Failed, |_| Reply::empty(204)),
    case("200 not found", INVALID, Fate::Failed, |_| Reply::json(200, json!({"code": "NO_KEY"}))),
    case("half a json", INVALID, Fate::Failed, |_| Reply::new(200, "application/json", "{\"legacyKey\":\"half a json\",\"newKey\":\"N-ha")),
    case("not utf-8", INVALID, Fate::Failed, |_| Reply::new(200, "application/json", b"{\"legacyKey\":\"not utf-8\",\"newKey\":\"N-\xff\"}")),
    case("other echo", INVALID, Fate::Failed, |_| Reply::json(200, json!({"legacyKey": "found", "newKey": "N-found"}))),
    case("no echo", INVALID, Fate::Failed, |_| Reply::json(200, json!({"newKey": "N-found"}))),
    case("pattern", INVALID, Fate::Failed, |call| Reply::key(call, "undefined")),
    case("empty key", INVALID, Fate::Failed, |call| Reply::key(call, "")),
    case("blank key", INVALID, Fate::Failed, |call| Reply::key(call, "  ")),
    case("number", INVALID, Fate::Failed, |call| Reply::json(200, json!({"legacyKey": call.key, "newKey": 17}))),
    case("null", INVALID, Fate::Failed, |call| Reply::json(200, json!({"legacyKey": call.key, "newKey": null}))),
    case("two megabytes", INVALID, Fate::Failed, |call| Reply::json(200, json!({"legacyKey": call.key, "newKey": "N-1", "pad": "x".repeat(2 << 20)}))),
    case("redirect", &["redirect"; MAX_ATTEMPTS], Fate::Failed, |_| Reply::empty(302).header("location", "/v1/keys/found")),
    case("redirect loop", &["redirect"; MAX_ATTEMPTS], Fate::Failed, |call| Reply::json(307, json!({"legacyKey": call.key, "newKey": "N-1"})).header("location", call.target.clone())),
    case("503", &["server_error"; MAX_ATTEMPTS], Fate::Failed, |_| Reply::json(503, json!({}))),
    case("500 then good", &["server_error", "server_error", "found"], Fate::Filled, |call| if call.attempt < 2 { Reply::html(500) } else { Reply::found(call) }),
    case("429 then good", &["rate_limited", "rate_limited", "rate_limited", "found"], Fate::Filled, |call| if call.attempt < 3 { Reply::empty(429) } else { Reply::found(call) }),
    case("garbage then good", &["invalid", "found"], Fate::Filled, |call| if call.attempt < 1 { Reply::html(200) } else { Reply::found(call) }),
    case("hang", &["timeout"; MAX_ATTEMPTS], Fate::Failed, |_| Reply::hang()),
    case("hanging body", &["timeout"; MAX_ATTEMPTS], Fate::Failed, |call| Reply::found(call).hang_in_body()),
    case("endless", INVALID, Fate::Failed, |call| Reply::found(call).followed_by(64 << 20)),
    case("reset", CONNECT, Fate::Failed, |_| Reply::reset()),
    case("cut off", CONNECT, Fate::Failed, |call| Reply::found(call).cut_off()),
    case("reset then good", &["connect", "found"], Fate::Filled, |call| if call.attempt < 1 { Reply::reset() } else { Reply::found(call) }),
];

fn answer(call: &Call) -> Reply {
    let case = CASES.iter().find(|case| case.name == call.key).expect("a known key");
    (case.reply)(call)
}

fn count(fate: fn(Fate) -> bool) -> u64 {
    u64::try_from(CASES.iter().filter(|case| fate(case.fate)).count()).expect("small")
}

#[tokio::test]
async fn every_kind_of_answer_has_its_outcome() {
    let bench = Bench::new().await;
    bench.insert(CASES.iter().map(|case| doc! {"_id": case.name, "legacyKey": case.name})).await;
    bench.create_index().await;
    let api = KeyApi::start(answer);
    let config = bench
        .config(&api)
        .key_api("echo_pointer = '/legacyKey'")
        .key_api("key_pattern = '^N-'")
        .key_api("timeout = '700ms'")
        .key_api(&format!("max_attempts = {MAX_ATTEMPTS}"));
    bench.configure(&config);

    let run = bench.run("backfill --tps 1000").await.expect_exit(1);
    assert_eq!(run.text("/status"), "incomplete");
    let filled = count(|fate| matches!(fate, Fate::Filled));
    let flagged = count(|fate| matches!(fate, Fate::Flagged(_)));
    let failed = count(|fate| matches!(fate, Fate::Failed));
    run.expect_documents(&[
        ("candidates", filled + flagged + failed),
        ("filled", filled),
        ("flagged", flagged),
        ("failed", failed),
        ("candidates_left", failed),
    ]);
    assert_eq!(run.json["documents"]["flagged_by"], json!({"not_found": 2, "rejected": 2}));

    let mut outcomes: BTreeMap<&str, u64> = BTreeMap::new();
    let mut failed_by: BTreeMap<&str, u64> = BTreeMap::new();
    for case in CASES {
        case.outcomes.iter().for_each(|outcome| *outcomes.entry(outcome).or_default() += 1);
        if let Fate::Failed = case.fate {
            *failed_by.entry(case.outcomes[0]).or_default() += 1;
        }
        assert_eq!(api.asked().get(case.name), Some(&case.outcomes.len()), "calls for {}", case.name);
    }
    for (name, count) in run.json["api"]["outcomes"].as_object().expect("an object") {
        assert_eq!(
            count.as_u64(),
            Some(outcomes.remove(name.as_str()).unwrap_or(0)),
            "{name}: {}",
            run.stdout
        );
    }
    assert!(outcomes.is_empty(), "missing outcomes: {outcomes:?}");
    assert_eq!(run.json["documents"]["failed_by"], json!(failed_by));
    let calls: usize = CASES.iter().map(|case| case.outcomes.len()).sum();
    run.expect_calls(u64::try_from(calls).expect("small"));
    assert_eq!(run.number("/api/retries"), u64::try_from(calls - CASES.len()).expect("small"));
    expect_fates(&bench).await;

    // The next run asks for the failed ones only.
    let before = api.count();
    let config = config.key_api("not_found_when = []").text().replace("max_attempts = 3", "max_attempts = 1");
    bench.configure_text(&config);
    let again = bench.run("backfill --tps 1000").await.expect_exit(1);
    again.expect_documents(&[("candidates", failed), ("failed", failed), ("candidates_left", failed)]);
    assert_eq!(u64::try_from(api.count() - before).expect("small"), failed);
    expect_fates(&bench).await;
}

/// Every document holds what its case says and nothing else.
async fn expect_fates(bench: &Bench) {
    let documents = bench.documents(DOCS).await;
    for case in CASES {
        let document = documents.iter().find(|document| document.get_str("_id").ok() == Some(case.name));
        let document = document.unwrap_or_else(|| panic!("{} is gone", case.name));
        let mut wanted = doc! {"_id": case.name, "legacyKey": case.name};
        match case.fate {
            Fate::Filled => drop(wanted.insert("newKey", format!("N-{}", case.name))),
            Fate::Flagged(reason) => expect_flag(document, reason, bench, &mut wanted),
            Fate::Failed => {}
        }
        assert_eq!(*document, wanted, "{}", case.name);
    }
}

fn expect_flag(document: &Document, reason: &str, bench: &Bench, wanted: &mut Document) {
    let flag = document.get_document("newKeyFlag").unwrap_or_else(|_| panic!("no flag in {document}"));
    assert_eq!(flag.get_str("reason").ok(), Some(reason), "{document}");
    assert_eq!(flag.get_str("job").ok(), Some(&*format!("backfill-{}", bench.namespace(DOCS))), "{document}");
    let age = bson::DateTime::now().timestamp_millis()
        - flag.get_datetime("at").expect("a time").timestamp_millis();
    assert!((0..150_000).contains(&age), "{document}");
    assert_eq!(flag.len(), 3, "{document}");
    wanted.insert("newKeyFlag", flag.clone());
}

async fn refused_credentials_stop(status: u16) {
    let bench = Bench::with_docs(500).await;
    // The first calls still are answered.
    let api = KeyApi::start(move |call| match call.number {
        0..20 => Reply::found(call),
        _ => Reply::json(status, json!({"code": "EXPIRED"})),
    });
    bench.configure(&bench.config(&api));
    let run = bench.run("backfill --tps 200 --concurrency 4").await.expect_exit(4);
    assert_eq!(run.text("/status"), "stopped");
    assert_eq!(run.text("/error/code"), "stopped");
    run.expect_documents(&[("candidates", 500), ("filled", 20), ("candidates_left", 480)]);
    assert!(api.count() <= 20 + 4, "{} calls after the refusal", api.count() - 20);
    assert_eq!((bench.filled().await, bench.flagged().await), (20, 0));

    api.change(Reply::found);
    let again = bench.run("backfill --tps 1000").await.expect_exit(0);
    again.expect_documents(&[("candidates", 480), ("filled", 480)]);
}

#[tokio::test]
async fn unauthorized_stops_the_job_and_touches_nothing() {
    refused_credentials_stop(401).await;
}

#[tokio::test]
async fn forbidden_stops_the_job_and_touches_nothing() {
    refused_credentials_stop(403).await;
}

#[tokio::test]
async fn a_not_found_must_be_proven_where_the_config_asks_for_it() {
    let bench = Bench::new().await;
    bench.insert(["proven", "route", "empty"].map(|key| doc! {"_id": key, "legacyKey": key})).await;
    bench.create_index().await;
    let api = KeyApi::start(|call| match &*call.key {
        "proven" => Reply::json(200, json!({"error": {"code": "NO_KEY"}})),
        "route" => Reply::json(404, json!({"error": {"code": "NO_ROUTE"}})),
        _ => Reply::empty(404),
    });
    let config = bench
        .config(&api)
        .key_api("not_found_status = [200, 404]")
        .key_api("not_found_when = [{ pointer = '/error/code', equals = 'NO_KEY' }]")
        .key_api("max_attempts = 1");
    bench.configure(&config);
    let run = bench.run("backfill --tps 1000").await.expect_exit(1);
    run.expect_documents(&[("candidates", 3), ("flagged", 1), ("failed", 2), ("candidates_left", 2)]);
    assert_eq!(bench.count(doc! {"_id": "proven", "newKeyFlag.reason": "not_found"}).await, 1);
}
