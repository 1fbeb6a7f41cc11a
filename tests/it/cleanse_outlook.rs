//! What a dry run tells beforehand, and that it only reads.

use bson::{Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use crate::cleansing::{SOURCE, TARGET, configure};
use crate::harness::{Bench, connect, uri};
use crate::own_set::OwnSet;

async fn seeded(bench: &Bench) {
    bench
        .insert_into(SOURCE, (0..1_000).map(|n| doc! {"_id": n, "n": n % 10, "mail": format!("m{n}")}))
        .await;
    configure(bench, "keep = '{\"n\": {\"$lt\": 8}}'\nreject = [{ name = \"three\", when = '{\"n\": 3}' }]");
}

#[tokio::test]
async fn it_tells_time_room_oplog_and_violations() {
    let bench = Bench::new().await;
    seeded(&bench).await;
    let validator = doc! {"collMod": SOURCE, "validator": {"n": {"$nin": [5, 9]}}};
    bench.database.run_command(validator).await.expect("a validator");
    let index =
        doc! {"createIndexes": SOURCE, "indexes": [{"key": {"mail": 1}, "name": "mail", "unique": true}]};
    bench.database.run_command(index).await.expect("an index");

    let run = bench.run("cleanse --dry-run").await.expect_exit(0);
    let plan = &run.json["plan"];
    assert_eq!(plan["validator_violations"], 100, "only of those that are copied");
    assert_eq!(plan["expected_seconds_from"], "a guess of 30 MB/s");
    assert!(run.number("/plan/disk/free_bytes") > 0 && run.number("/plan/disk/needed_bytes") > 0);
    assert_eq!(plan["disk"]["fits"], true);
    assert!(plan["oplog"]["window_seconds"].is_u64(), "{}", run.stdout);
    assert_eq!(plan["unique_conflicts"][0]["index"], "mail");
    assert_eq!(plan["unique_conflicts"][0]["documents"], 0);

    bench.run("cleanse").await.expect_exit(0);
    let again = bench.run("cleanse --dry-run").await.expect_exit(0);
    assert_eq!(again.json["plan"]["expected_seconds_from"], "an earlier copy");
    let slow = bench.run("cleanse --dry-run --documents-per-second 10").await.expect_exit(0);
    assert_eq!(slow.json["plan"]["expected_seconds_from"], "the documents/s limit");
    assert!((slow.json["plan"]["expected_seconds"].as_f64().expect("a time") - 100.0).abs() < 0.01);
}

#[tokio::test]
async fn it_names_the_change_streams_that_a_rename_would_end() {
    let bench = Bench::new().await;
    seeded(&bench).await;
    let others: Collection<Document> = bench.database.collection("others");
    others.insert_one(doc! {}).await.expect("a write");
    let source: Collection<Document> = bench.database.collection(SOURCE);
    let streams = async |run: &str| {
        let run = bench.run(run).await.expect_exit(0);
        let streams = run.json["plan"]["change_streams"].as_array().expect("streams").clone();
        // Other tests may follow their whole deployment.
        let ours = streams.into_iter().filter(|stream| stream["scope"] != "cluster");
        let mut scopes: Vec<String> =
            ours.map(|stream| stream["scope"].as_str().unwrap_or("").to_owned()).collect();
        scopes.sort();
        scopes
    };
    let _elsewhere = others.watch().await.expect("a stream");
    assert!(streams("cleanse --dry-run").await.is_empty());
    let _on_it = source.watch().await.expect("a stream");
    let _on_all = bench.database.watch().await.expect("a stream");
    assert_eq!(streams("cleanse --dry-run").await, ["collection", "database"]);
    let text = bench.text("cleanse --dry-run").await;
    assert!(text.contains("a rename would end these change streams"), "{text}");
}

#[tokio::test]
async fn documents_in_the_way_of_others_in_a_target_that_is_written_to_are_counted() {
    let bench = Bench::new().await;
    seeded(&bench).await;
    let target: Collection<Document> = bench.database.collection(TARGET);
    // The same document, another one with its value, and one that is not copied.
    target
        .insert_many([
            doc! {"_id": 1, "mail": "m1"},
            doc! {"_id": "x", "mail": "m2"},
            doc! {"_id": "y", "mail": "m3"},
        ])
        .await
        .expect("a write");
    let index =
        doc! {"createIndexes": TARGET, "indexes": [{"key": {"mail": 1}, "name": "mail", "unique": true}]};
    bench.database.run_command(index).await.expect("an index");
    let run = bench.run("cleanse --dry-run --dual-write").await.expect_exit(0);
    let conflict = &run.json["plan"]["unique_conflicts"][0];
    assert_eq!((&conflict["index"], &conflict["documents"]), (&"mail".into(), &1.into()), "{}", run.stdout);
    assert_eq!(conflict["samples"][0]["$numberInt"], "2", "{}", run.stdout);
}

#[tokio::test]
async fn the_server_sees_only_commands_that_read() {
    const READS: [&str; 10] = [
        "find",
        "aggregate",
        "count",
        "distinct",
        "getMore",
        "explain",
        "listCollections",
        "listIndexes",
        "collStats",
        "dbStats",
    ];
    let bench = Bench::new().await;
    seeded(&bench).await;
    let name = format!("dry-{}", bench.database.name());
    let text = crate::cleansing::config(&bench, "keep = '{\"n\": {\"$lt\": 8}}'")
        .replace(&uri(), &crate::harness::uri_with(&format!("appName={name}")));
    bench.configure_text(&text);
    bench.database.run_command(doc! {"profile": 2}).await.expect("the profiler");
    bench.run("cleanse --dry-run").await.expect_exit(0);
    bench.database.run_command(doc! {"profile": 0}).await.expect("the profiler");
    let profile: Collection<Document> = bench.database.collection("system.profile");
    let seen: Vec<Document> = profile
        .find(doc! {"appName": name})
        .await
        .expect("a cursor")
        .try_collect()
        .await
        .expect("operations");
    assert!(seen.len() > 4, "the profiler saw {} operations", seen.len());
    for operation in &seen {
        let command = operation.get_document("command").expect("a command");
        let what = command.keys().next().expect("a name").as_str();
        assert!(READS.contains(&what), "{what}: {operation}");
        let text = format!("{command}");
        assert!(!text.contains("\"$merge\"") && !text.contains("\"$out\""), "{text}");
        let written = ["nMatched", "ninserted", "ndeleted", "nModified", "keysInserted"];
        assert!(written.iter().all(|figure| !operation.contains_key(*figure)), "{operation}");
    }
    assert!(!bench.has_state().await);
}

#[tokio::test]
async fn what_a_modest_user_may_not_see_is_said() {
    let set = OwnSet::start(&["--auth"]);
    let bench = Bench::on(&set.uri).await;
    seeded(&bench).await;
    let role = |name: &str| doc! {"role": "readWrite", "db": name};
    let user = doc! {
        "createUser": "modest",
        "pwd": "modest",
        "roles": [role(bench.database.name()), role(bench.state.name())],
    };
    connect(&set.uri).await.database("admin").run_command(user).await.expect("a user");
    let text = crate::cleansing::config(&bench, "").replace("root:throw-away@", "modest:modest@");
    bench.configure_text(&text);
    let run = bench.run("cleanse --dry-run").await.expect_exit(0);
    assert!(run.json["plan"]["change_streams"].is_null(), "{}", run.stdout);
    assert!(run.json["plan"]["oplog"]["window_seconds"].is_null(), "{}", run.stdout);
    assert!(run.json["plan"]["warnings"].to_string().contains("inprog"), "{}", run.stdout);
    // And a start works all the same.
    bench.run("cleanse").await.expect_exit(0);
}
