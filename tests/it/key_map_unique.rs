//! One new key for one legacy key, whoever writes the key map.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use bson::doc;
use mongorekey::config::file::KeyApi as Api;
use mongorekey::config::values::Secret;
use mongorekey::key_map::unique::Conflict;
use mongorekey::key_map::{Answer, KeyMap, Remembered};
use mongorekey::mongo::Mongo;
use serde_json::json;

use crate::harness::{Bench, uri, wait_for};
use crate::key_map::answers;
use crate::program::Signal;

const URL: &str = "http://127.0.0.1:9/{key}";

fn configure(bench: &Bench, unique: bool) {
    bench.configure(&bench.config_for_url(URL).key_api(&format!("unique_keys = {unique}")));
}

#[tokio::test]
async fn a_dump_that_shares_new_keys_is_told_so() {
    let bench = Bench::new().await;
    configure(&bench, true);
    bench.file("keys.csv", "legacyKey,newKey,outcome\nK1,N1,\nK2,N1,\nK3,,not_found\nK4,,not_found\n");
    for options in ["--dry-run", "", ""] {
        let run = bench.run(&format!("key-map import keys.csv {options}")).await.expect_exit(1);
        assert_eq!(run.json["bad_by"], json!({"shared_new_key": 1}), "{options}");
        assert_eq!(run.number("/bad_rows/0/line"), 3);
    }
    assert_eq!(answers(&bench).await.len(), 3);
    // Replacing breaks the rule no more than importing.
    bench.file("more.csv", "legacyKey,newKey,outcome\nK3,N1,\nK4,N4,\nK5,N4,\n");
    let run = bench.run("key-map import more.csv --replace").await.expect_exit(1);
    assert_eq!((run.number("/replaced"), run.json["bad_by"].clone()), (1, json!({"shared_new_key": 2})));
}

#[tokio::test]
async fn the_rule_begins_only_where_it_holds_and_ends_with_the_config() {
    let bench = Bench::new().await;
    configure(&bench, false);
    bench.file("keys.csv", "legacyKey,newKey\nK1,N1\nK2,N1\n");
    bench.run("key-map import keys.csv").await.expect_exit(0);
    configure(&bench, true);
    let run = bench.run("key-map import keys.csv").await.expect_exit(3);
    let message = run.text("/error/message");
    assert!(message.contains("N1") && message.contains("K2"), "{message}");

    bench.file("other.csv", "legacyKey,newKey\nK2,N2\n");
    configure(&bench, false);
    bench.run("key-map import other.csv --replace").await.expect_exit(0);
    configure(&bench, true);
    bench.run("key-map import other.csv").await.expect_exit(0);
    bench.file("third.csv", "legacyKey,newKey\nK3,N2\n");
    bench.run("key-map import third.csv").await.expect_exit(1);
    configure(&bench, false);
    bench.run("key-map import third.csv").await.expect_exit(0);
}

#[tokio::test]
async fn two_processes_at_once_share_no_new_key() {
    let bench = Bench::new().await;
    configure(&bench, true);
    let count = 4000;
    for name in ["a", "b"] {
        let mut text = String::from("legacyKey,newKey\n");
        for number in 0..count {
            writeln!(text, "{name}{number},N{number}").expect("a string");
        }
        bench.file(&format!("{name}.csv"), text);
    }
    let runs = ["a", "b"].map(|name| bench.program(&format!("key-map import {name}.csv")).spawn());
    let (mut imported, mut bad) = (0, 0);
    for run in runs {
        let run = run.finish().await;
        imported += run.number("/imported");
        bad += run.json["bad_by"]["shared_new_key"].as_u64().unwrap_or(0);
    }
    assert_eq!((imported, bad), (count, count));
    let keys: Vec<_> = answers(&bench).await.into_iter().map(|answer| answer.2.expect("a key")).collect();
    assert_eq!(keys.len(), keys.iter().collect::<BTreeSet<_>>().len());
}

#[tokio::test]
async fn remembering_gives_back_what_conflicts() {
    let bench = Bench::new().await;
    let mongo = Mongo::connect(&Secret::new(uri()), bench.state.name()).await.expect("a connection");
    let api = Api { unique_keys: true, ..Api::for_url(URL) };
    let map = KeyMap::open(&mongo, &api, "job");
    map.prepare(&mongo).await.expect("an index");
    map.prepare(&mongo).await.expect("the same index");
    let found = |key: &str, new: &str| {
        (key.to_owned(), Remembered { answer: Answer::Found(new.into()), held: false })
    };
    let none = |key: &str| (key.to_owned(), Remembered { answer: Answer::NotFound, held: true });
    let conflict = |legacy: &str, new: &str, owner: &str| Conflict {
        legacy_key: legacy.into(),
        new_key: new.into(),
        owner: owner.into(),
    };
    let first = [found("K1", "N1"), found("K2", "N2"), found("K3", "N1"), none("K4"), none("K5")];
    assert_eq!(map.remember(&first).await.expect("remembered"), [conflict("K3", "N1", "K1")]);
    // What is known stays and is no conflict; the rest is taken.
    let second = [found("K1", "N9"), found("K6", "N2"), found("K7", "N7"), none("K4")];
    assert_eq!(map.remember(&second).await.expect("remembered"), [conflict("K6", "N2", "K2")]);
    let known = map.look_up(&["K1", "K2", "K3", "K4", "K5", "K6", "K7"]).await.expect("known");
    assert_eq!(known.len(), 5);
    assert_eq!(known["K1"].answer, Answer::Found("N1".into()));
    assert_eq!(known["K7"].answer, Answer::Found("N7".into()));
    let collection = bench.state.collection::<bson::Document>(map.collection_name());
    assert_eq!(collection.count_documents(doc! {"newKey": "N2"}).await.expect("a count"), 1);

    // Without the rule nothing conflicts.
    let free = KeyMap::open(&mongo, &Api::for_url(URL), "job");
    free.prepare(&mongo).await.expect("no index");
    assert!(free.remember(&[found("K8", "N1")]).await.expect("remembered").is_empty());
    assert_eq!(map.look_up(&["K8"]).await.expect("known").len(), 1);
    mongo.close().await;
}

#[tokio::test]
async fn the_rule_does_not_end_under_a_job_that_relies_on_it() {
    let bench = Bench::with_docs(50).await;
    let api = crate::key_api::KeyApi::finding();
    let unique = |unique: bool| bench.config(&api).key_api(&format!("unique_keys = {unique}"));
    bench.configure(&unique(true));
    let run = bench.program("backfill --tps 5").spawn();
    wait_for("a call", async || api.count() > 0).await;
    bench.configure(&unique(false));
    bench.file("keys.csv", "legacyKey,newKey\nX1,N1\nX2,N1\n");
    let refused = bench.run("key-map import keys.csv").await.expect_exit(3);
    assert!(refused.text("/error/message").contains("one legacy key only"), "{}", refused.stdout);
    run.signal(Signal::Interrupt);
    run.finish().await.expect_exit(130);
    bench.run("key-map import keys.csv").await.expect_exit(0);
}
