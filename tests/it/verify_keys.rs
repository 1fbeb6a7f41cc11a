//! `verify --keys` asks the API again within the ceiling, tells what is wrong and writes nothing.

use std::time::{Duration, Instant};

use bson::{Document, doc};
use serde_json::{Value, json};

use crate::harness::{Bench, DOCS, wait_for};
use crate::key_api::{Call, KeyApi, Reply};
use crate::program::{Finished, Signal};

/// A collection of filled documents, one of which has no key.
async fn filled(count: i32, api: &KeyApi) -> Bench {
    let bench = Bench::with_docs(count).await;
    bench.insert([doc! {"_id": "no key", "newKey": "N-own"}]).await;
    bench.configure(&bench.config(api).key_api("max_attempts = 1"));
    bench.run("backfill --tps 100000").await.expect_exit(0);
    bench
}

fn check(run: &Finished) -> &Value {
    let checks = run.json["checks"].as_array().unwrap_or_else(|| panic!("{}", run.output()));
    checks.iter().find(|check| check["name"] == json!("keys")).unwrap_or_else(|| panic!("{}", run.output()))
}

fn counts(run: &Finished) -> [u64; 5] {
    ["right", "wrong", "changed", "vanished", "unanswered"]
        .map(|name| check(run)["keys"][name].as_u64().expect("a count"))
}

fn kind_of(run: &Finished, id: i32) -> String {
    let id = json!({"$numberInt": id.to_string()});
    let differences = check(run)["differences"].as_array().expect("a list");
    let found = differences.iter().find(|difference| difference["_id"] == id);
    found.and_then(|found| found["kind"].as_str()).unwrap_or("none").to_owned()
}

#[tokio::test]
async fn keys_asked_again_are_right_wrong_changed_or_vanished() {
    let api = KeyApi::finding();
    let bench = filled(60, &api).await;
    bench.docs().update_one(doc! {"_id": 5}, doc! {"$set": {"newKey": "N-K6"}}).await.expect("changed");
    bench.docs().update_one(doc! {"_id": 6}, doc! {"$set": {"newKey": 6}}).await.expect("changed");
    api.change(|call: &Call| match call.key.as_str() {
        "K3" => Reply::key(call, "N-other"),
        "K7" => Reply::not_found(),
        "K8" => Reply::json(422, json!({})),
        "K9" => Reply::html(200),
        _ => Reply::found(call),
    });
    let (before, job, calls) = (bench.end_state(DOCS).await, bench.job(&name(&bench)).await, api.count());
    let run = bench.run("verify --keys 1000 --seed 1").await.expect_exit(1);
    assert_eq!(counts(&run), [54, 2, 1, 2, 1], "{}", run.stdout);
    for (id, kind) in [
        (3, "changed"),
        (5, "wrong"),
        (6, "wrong"),
        (7, "vanished"),
        (8, "vanished"),
        (9, "unanswered"),
        (10, "none"),
    ] {
        assert_eq!(kind_of(&run, id), kind, "{id}");
    }
    assert_eq!(api.count() - calls, 60);
    let api_counts = &check(&run)["api"];
    assert_eq!(api_counts["calls"], json!(60));
    assert_eq!(api_counts["outcomes"]["found"], json!(57));
    assert_eq!(
        (&api_counts["outcomes"]["not_found"], &api_counts["outcomes"]["invalid"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(check(&run)["keys"]["not_asked"], json!(1), "the document without a legacy key");
    assert_eq!(check(&run)["confidence"]["all"], json!(false), "two were not judged: {}", run.stdout);
    assert_eq!(bench.end_state(DOCS).await, before, "nothing is written");
    let now = bench.job(&name(&bench)).await.expect("the job");
    let job = job.expect("the job");
    for field in ["state", "totals", "identity"] {
        assert_eq!(now.get(field), job.get(field), "{field}");
    }
    assert!(now.get("lease").is_none());
}

fn name(bench: &Bench) -> String {
    format!("backfill-{}", bench.namespace(DOCS))
}

#[tokio::test]
async fn a_part_of_the_keys_is_drawn_by_the_seed_and_says_what_it_proves() {
    let api = KeyApi::finding();
    let bench = filled(400, &api).await;
    bench.run("verify --keys 50 --seed 4").await.expect_exit(0);
    let asked = |calls: usize| {
        let mut keys: Vec<String> = api.calls().into_iter().skip(calls).map(|call| call.key).collect();
        keys.sort_unstable();
        keys
    };
    let first = asked(400);
    assert_eq!(first.len(), 50);
    let run = bench.run("verify --keys 50 --seed 4").await.expect_exit(0);
    assert_eq!(asked(450), first);
    assert!(
        check(&run)["remark"].as_str().expect("words").starts_with("0 of 50 differ: below"),
        "{}",
        run.stdout
    );
    let run = bench.run("verify --keys 50").await.expect_exit(0);
    assert!(run.json["seed"].is_u64());
    assert_ne!(asked(500), first);
}

#[tokio::test]
async fn the_ceiling_holds_when_keys_are_asked_again() {
    let api = KeyApi::finding();
    let bench = filled(100, &api).await;
    bench.configure(&bench.config(&api).backfill("tps = 20"));
    let calls = api.count();
    let begun = Instant::now();
    bench.run("verify --keys 60").await.expect_exit(0);
    assert!(begun.elapsed() >= Duration::from_millis(2_900), "{:?}", begun.elapsed());
    let times: Vec<Instant> = api.calls().iter().skip(calls).map(|call| call.at).collect();
    for (number, first) in times.iter().enumerate() {
        let within =
            times[number..].iter().filter(|at| at.duration_since(*first) < Duration::from_secs(1)).count();
        assert!(within <= 21, "{within} calls within a second");
    }
}

#[tokio::test]
async fn keys_are_asked_in_batches_where_the_api_takes_them() {
    let api = KeyApi::start(Reply::found_all);
    let bench = Bench::with_docs(25).await;
    bench.configure(&bench.config_for_url(&api.batch_url()).key_api("method = 'POST'").batch(10));
    bench.run("backfill --tps 100000").await.expect_exit(0);
    let calls = api.count();
    let run = bench.run("verify --keys 100").await.expect_exit(0);
    assert_eq!(counts(&run), [25, 0, 0, 0, 0]);
    assert_eq!(api.count() - calls, 3);
    api.change(|call| Reply::items(call.keys.iter().filter(|key| *key != "K4").map(|key| Reply::item(key))));
    bench.configure(
        &bench
            .config_for_url(&api.batch_url())
            .key_api("method = 'POST'")
            .key_api("max_attempts = 1")
            .batch(10),
    );
    let run = bench.run("verify --keys 100").await.expect_exit(1);
    assert_eq!((counts(&run), kind_of(&run, 4)), ([24, 0, 0, 0, 1], "unanswered".into()));
}

#[tokio::test]
async fn an_api_that_does_not_answer_is_no_pass() {
    let api = KeyApi::finding();
    let bench = filled(300, &api).await;
    for reply in
        [Reply::reset, || Reply::html(200), || Reply::empty(503), || Reply::new(302, "text/html", "")]
    {
        let calls = api.count();
        api.change(move |_| reply());
        let run = bench.run("verify --keys 300").await.expect_exit(1);
        assert_eq!(run.json["passed"], json!(false));
        assert_eq!(counts(&run)[0], 0);
        assert!(api.count() - calls < 100, "an API that is down is not asked on and on");
        assert!(check(&run)["remark"].as_str().expect("words").contains("does not answer"), "{}", run.stdout);
    }
}

#[tokio::test]
async fn refused_credentials_stop() {
    let api = KeyApi::finding();
    let bench = filled(30, &api).await;
    for status in [401, 403] {
        api.change(move |_| Reply::empty(status));
        let run = bench.run("verify --keys 30").await.expect_exit(4);
        assert_eq!((&run.json["passed"], run.text("/error/code")), (&json!(false), "stopped"));
    }
    // The job can be gone on with.
    api.change(Reply::found);
    bench.run("verify --keys 30").await.expect_exit(0);
    bench.run("backfill --tps 100000").await.expect_exit(0);
}

#[tokio::test]
async fn beside_a_backfill_no_key_is_asked() {
    let bench = Bench::with_docs(50).await;
    let api = KeyApi::start(|call| Reply::found(call).after(Duration::from_millis(300)));
    bench.configure(&bench.config(&api));
    let backfill = bench.program("backfill --tps 5").spawn();
    wait_for("a call", async || api.count() > 0).await;
    let run = bench.run("verify --keys 5").await.expect_exit(3);
    assert!(run.text("/error/message").contains("is being run"), "{}", run.stdout);
    backfill.signal(Signal::Interrupt);
    backfill.finish().await.expect_exit(130);
}

#[tokio::test]
async fn nothing_to_ask_is_no_pass_and_leaves_no_backfill_behind() {
    let bench = Bench::with_docs(5).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.run("verify --keys 5").await.expect_exit(1);
    assert_eq!(api.count(), 0);
    assert!(bench.job(&name(&bench)).await.is_none(), "there was no backfill");
    bench.run("verify").await.expect_exit(3);
}

#[tokio::test]
async fn a_document_that_changes_meanwhile_is_not_judged_by_what_it_was() {
    let api = KeyApi::finding();
    let bench = filled(20, &api).await;
    let docs = bench.docs();
    bench.docs().update_one(doc! {"_id": 4}, doc! {"$set": {"newKey": "N-wrong"}}).await.expect("changed");
    api.change(|call| Reply::found(call).after(Duration::from_secs(2)));
    let calls = api.count();
    let run = bench.program("verify --keys 100 --seed 1").spawn();
    wait_for("the calls", async || api.count() > calls).await;
    let mended: Document = doc! {"$set": {"newKey": "N-K4"}};
    docs.update_one(doc! {"_id": 4}, mended).await.expect("mended");
    let run = run.finish().await.expect_exit(0);
    assert_eq!((counts(&run), &check(&run)["keys"]["moved"]), ([19, 0, 0, 0, 0], &json!(1)));
}

#[tokio::test]
async fn beside_a_backfill_of_more_targets_no_key_of_one_is_asked() {
    let api = KeyApi::finding();
    let bench = filled(20, &api).await;
    bench.insert_into("more", (0..100).map(|id| doc! {"_id": id, "legacyKey": format!("more{id}")})).await;
    let more = bench.namespace("more");
    bench.configure(&bench.config(&api).target("more", &more, ["legacyKey", "newKey", "newKeyFlag"]));
    bench.run("index create").await.expect_exit(0);
    let calls = api.count();
    let backfill = bench.program("backfill --tps 5").spawn();
    wait_for("a call", async || api.count() > calls).await;
    let one = "verify --keys 5 --target docs";
    let run = bench.run(one).await.expect_exit(3);
    assert!(run.text("/error/message").contains("is being run"), "{}", run.stdout);
    backfill.signal(Signal::Interrupt);
    backfill.finish().await.expect_exit(130);
    bench.run(one).await.expect_exit(0);
}
