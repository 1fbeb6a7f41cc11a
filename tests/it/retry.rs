//! Flags taken back and asked for again.

use std::collections::BTreeSet;

use bson::{Bson, DateTime, Document, doc};
use serde_json::json;

use crate::fail_points::{fail, named_uri};
use crate::harness::{Bench, DOCS, wait_for};
use crate::key_api::{Call, KeyApi, Reply};
use crate::key_map::answers;

fn answer(call: &Call) -> Reply {
    match call.key.rsplit('-').next() {
        Some("none") => Reply::not_found(),
        Some("bad") => Reply::empty(422),
        _ => Reply::found(call),
    }
}

/// Documents whose keys are found, not found, rejected and missing, filled by the job `first`.
async fn flagged() -> (Bench, KeyApi) {
    let bench = Bench::new().await;
    bench
        .insert((0..40).map(|id| match id % 8 {
            0 => doc! {"_id": id, "legacyKey": format!("{}-none", id % 16)},
            1 => doc! {"_id": id, "legacyKey": format!("{id}-bad")},
            2 => doc! {"_id": id, "legacyKey": Bson::Null},
            _ => doc! {"_id": id, "legacyKey": format!("{id}")},
        }))
        .await;
    bench.create_index().await;
    let api = KeyApi::start(answer);
    bench.configure(&bench.config(&api).uri(&named_uri(&bench)));
    let run = bench.run("backfill --tps 1000 --job first").await.expect_exit(0);
    run.expect_documents(&[("candidates", 40), ("filled", 25), ("flagged", 15)]);
    (bench, api)
}

fn foreign_flags() -> Vec<Document> {
    let at = DateTime::from_millis(0);
    let ours = doc! {"reason": "not_found", "at": at, "job": "first"};
    vec![
        doc! {"_id": 100, "legacyKey": "100", "newKeyFlag": "not_found"},
        doc! {"_id": 101, "legacyKey": "101", "newKeyFlag": {"reason": "not_found"}},
        doc! {"_id": 102, "legacyKey": "102", "newKeyFlag": [ours.clone()]},
        doc! {"_id": 103, "legacyKey": "103", "newKeyFlag": ours.clone(), "newKey": "theirs"},
        doc! {"_id": 104, "legacyKey": "104", "newKeyFlag": {"reason": "not_found", "at": "yesterday", "job": "first"}},
        doc! {"_id": 105, "legacyKey": "105", "newKeyFlag": {"reason": ["not_found"], "at": at, "job": "first"}},
    ]
}

#[tokio::test]
async fn only_flags_of_the_reason_are_cleared_and_asked_for_again() {
    let (bench, api) = flagged().await;
    bench.insert(foreign_flags()).await;
    api.change(Reply::found);
    let before = api.count();
    let untouched = bench.documents(DOCS).await;
    bench.run("retry --reason not_found").await.expect_exit(2);
    bench.run("retry --reason not_found --target none --yes").await.expect_exit(2);
    assert_eq!(bench.documents(DOCS).await, untouched);

    let run = bench.run("retry --reason not_found --yes").await.expect_exit(0);
    assert_eq!(run.json["targets"], json!([{"collection": bench.namespace(DOCS), "cleared": 5}]));
    assert_eq!(run.number("/answers_forgotten"), 2);
    for (now, before) in bench.documents(DOCS).await.iter().zip(&untouched) {
        let id = before.get_i32("_id").expect("an id");
        let mut wanted = before.clone();
        if id < 100 && id % 8 == 0 {
            wanted.remove("newKeyFlag");
        }
        assert_eq!(*now, wanted);
    }
    let run = bench.run("backfill --tps 1000 --job second").await.expect_exit(0);
    run.expect_documents(&[("candidates", 5), ("filled", 5)]);
    assert_eq!(api.count() - before, 2, "one call per key");
    assert_eq!(bench.count(doc! {"newKey": {"$in": ["N-0-none", "N-8-none"]}}).await, 5);
}

#[tokio::test]
async fn other_reasons_and_one_job_only() {
    let (bench, api) = flagged().await;
    bench.insert((200..203).map(|id| doc! {"_id": id, "legacyKey": format!("{id}-bad")})).await;
    bench.run("backfill --tps 1000 --job second").await.expect_exit(0);
    let run = bench.run("retry --reason rejected --job second --yes").await.expect_exit(0);
    assert_eq!((run.number("/targets/0/cleared"), run.number("/answers_forgotten")), (3, 3));
    assert_eq!(bench.count(doc! {"newKeyFlag.reason": "rejected"}).await, 5);
    let run = bench.run("retry --reason no_legacy_key --job first --yes").await.expect_exit(0);
    assert_eq!((run.number("/targets/0/cleared"), run.number("/answers_forgotten")), (5, 0));
    let before = api.count();
    let run = bench.run("backfill --tps 1000 --job second").await.expect_exit(0);
    run.expect_documents(&[("candidates", 8), ("flagged", 8)]);
    assert_eq!(api.count() - before, 3);
    let run = bench.run("retry --reason rejected --job third --yes").await.expect_exit(0);
    assert_eq!((run.number("/targets/0/cleared"), run.number("/answers_forgotten")), (0, 0));
}

#[tokio::test]
async fn killed_between_its_two_steps_it_ends_right() {
    let (bench, api) = flagged().await;
    // Its second step never reaches the server.
    let data = doc! {"failCommands": ["update"], "closeConnection": true};
    let point = fail(&bench, "alwaysOn", data).await;
    let retry = bench.program("retry --reason not_found --yes").spawn();
    let negatives = async || answers(&bench).await.iter().filter(|answer| answer.1 == "not_found").count();
    wait_for("answers to be forgotten", async || negatives().await == 0).await;
    retry.kill();
    drop(point);
    assert_eq!(bench.count(doc! {"newKeyFlag.reason": "not_found"}).await, 5, "the flags still stand");

    // A backfill in between finds nothing to do and asks nothing.
    let before = api.count();
    bench.run("backfill --tps 1000 --job first").await.expect_exit(0).expect_documents(&[]);
    assert_eq!(api.count(), before);
    let run = bench.run("retry --reason not_found --yes").await.expect_exit(0);
    assert_eq!((run.number("/targets/0/cleared"), run.number("/answers_forgotten")), (5, 0));
    bench.run("backfill --tps 1000 --job first").await.expect_exit(0);
    let asked: BTreeSet<String> =
        api.asked().into_iter().filter(|(_, count)| *count == 2).map(|(key, _)| key).collect();
    assert_eq!(asked, ["0-none", "8-none"].map(str::to_owned).into());
}

#[tokio::test]
async fn it_is_refused_while_the_job_runs() {
    let (bench, api) = flagged().await;
    bench.insert((300..400).map(|id| doc! {"_id": id, "legacyKey": format!("{id}")})).await;
    let before = api.count();
    let backfill = bench.program("backfill --tps 10 --job first").spawn();
    wait_for("calls", async || api.count() > before).await;
    let run = bench.run("retry --reason not_found --yes").await.expect_exit(3);
    assert!(run.text("/error/message").contains(&backfill.pid().to_string()), "{}", run.stdout);
    assert_eq!(bench.count(doc! {"newKeyFlag.reason": "not_found"}).await, 5);
    backfill.kill();
    bench.run("retry --reason not_found --yes").await.expect_exit(0);
}

#[tokio::test]
async fn dotted_flags_under_a_collation_over_many_pages() {
    let bench = Bench::new().await;
    let collation = mongodb::options::Collation::builder()
        .locale("en")
        .strength(mongodb::options::CollationStrength::Secondary)
        .build();
    bench.database.create_collection(DOCS).collation(collation).await.expect("a collection");
    let flag = |reason: &str, job: &str| doc! {"reason": reason, "at": DateTime::now(), "job": job};
    bench
        .insert((0..2500).map(|id| {
            let id: Bson = if id % 2 == 0 { id.into() } else { format!("id{id}").into() };
            doc! {"_id": id, "legacyKey": "k", "meta": {"flag": flag("not_found", "job"), "x": 1}}
        }))
        .await;
    bench
        .insert([
            doc! {"_id": "a", "meta": {"flag": flag("NOT_FOUND", "job")}},
            doc! {"_id": "b", "meta": {"flag": flag("not_found", "JOB")}},
            doc! {"_id": "c", "meta": [{"flag": flag("not_found", "job")}]},
        ])
        .await;
    let api = KeyApi::finding();
    let config = bench.config(&api).no_targets();
    bench.configure(&config.target("docs", &bench.namespace(DOCS), ["legacyKey", "meta.key", "meta.flag"]));
    let run = bench.run("retry --reason not_found --job job --yes").await.expect_exit(0);
    assert_eq!(run.number("/targets/0/cleared"), 2500);
    assert_eq!(bench.count(doc! {"meta": {"x": 1}}).await, 2500);
    assert_eq!(bench.count(doc! {"meta.flag": {"$exists": true}}).await, 3);
}
