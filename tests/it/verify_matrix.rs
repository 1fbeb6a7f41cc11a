//! What each way of verifying finds of planted corruption, beside writers and a follower too, and
//! that none passes on nothing.

use std::time::Duration;

use bson::{Document, doc};
use mongodb::Collection;
use serde_json::{Value, json};

use crate::cleanse_live::RULE;
use crate::cleansing::{FailPoint, SOURCE, TARGET, config, configure, every_type, ids};
use crate::fail_points::{fail, named_uri};
use crate::harness::{Bench, DOCS, wait_for};
use crate::key_api::{KeyApi, Reply};
use crate::own_set::OwnSet;
use crate::program::{Finished, Running, Signal};
use crate::verify_full::planted;
use crate::writers::{Options, Writers};

fn collection(bench: &Bench, name: &str) -> Collection<Document> {
    bench.database.collection(name)
}

fn check<'a>(run: &'a Finished, name: &str) -> &'a Value {
    let checks = run.json["checks"].as_array().unwrap_or_else(|| panic!("{}", run.output()));
    checks.iter().find(|check| check["name"] == json!(name)).unwrap_or_else(|| panic!("{}", run.output()))
}

/// The differences of a check without their ages, by their `_id`s.
fn differences(run: &Finished, name: &str) -> Vec<String> {
    let mut found = check(run, name)["differences"].as_array().expect("a list").clone();
    for difference in &mut found {
        difference.as_object_mut().expect("an object").remove("age_seconds").expect("an age");
    }
    let mut found: Vec<String> = found.iter().map(Value::to_string).collect();
    found.sort_unstable();
    found
}

#[tokio::test]
async fn a_sample_names_what_it_finds_as_the_full_comparison_does() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..).zip(ids(500)).map(|(number, id)| every_type(id, number))).await;
    let copy = [doc! {"$match": {}}, doc! {"$out": TARGET}];
    collection(&bench, SOURCE).aggregate(copy).await.expect("a copy");
    let cases = planted();
    for (number, (source, target, ..)) in cases.iter().enumerate() {
        for (name, document) in [(SOURCE, source), (TARGET, target)] {
            let mut document = document.clone();
            document.insert("_id", format!("planted {number}"));
            bench.insert_into(name, [document]).await;
        }
    }
    bench.insert_into(SOURCE, [doc! {"_id": "missing"}]).await;
    bench.insert_into(TARGET, [doc! {"_id": "extra"}]).await;
    configure(&bench, "");
    let full = bench.run("verify --full --settle 1ms").await.expect_exit(1);
    let sample = bench.run("verify --sample 100000 --settle 1ms").await.expect_exit(1);
    let mut both = differences(&sample, "sample source to target");
    both.extend(differences(&sample, "sample target to source"));
    both.sort_unstable();
    both.dedup();
    assert_eq!(both.len(), cases.len() + 2);
    assert_eq!(both, differences(&full, "full"));
}

/// Users with keys of their own on both sides, but for what happened to the target.
async fn users(plant: impl AsyncFnOnce(&Collection<Document>)) -> Bench {
    let bench = Bench::new().await;
    let user = |id: i32| doc! {"_id": id, "legacyKey": format!("K{id}"), "newKey": format!("N{id}")};
    for name in [SOURCE, TARGET] {
        bench.insert_into(name, (0..500).map(user)).await;
    }
    plant(&collection(&bench, TARGET)).await;
    configure(&bench, "");
    bench
}

async fn set_key(users: &Collection<Document>, id: i32, key: &str) {
    users.update_one(doc! {"_id": id}, doc! {"$set": {"newKey": key}}).await.expect("changed");
}

/// Fails unless both ways find that exactly these users have another key.
async fn expect_other_keys(bench: &Bench, ids: &[i32]) {
    let commands = [
        ("verify --full --settle 1ms", "full"),
        ("verify --sample 1000 --settle 1ms", "sample source to target"),
    ];
    for (command, name) in commands {
        let run = bench.run(command).await.expect_exit(1);
        let found = check(&run, name)["differences"].as_array().expect("a list");
        let mut found: Vec<String> = found
            .iter()
            .map(|difference| {
                assert_eq!(difference["kind"], json!("different"), "{difference}");
                assert_eq!(difference["difference"], json!("value"), "{difference}");
                assert_eq!(difference["fields"], json!(["newKey"]), "{difference}");
                difference["_id"]["$numberInt"].as_str().expect("an _id").to_owned()
            })
            .collect();
        found.sort_unstable();
        assert_eq!(found, ids.iter().map(ToString::to_string).collect::<Vec<_>>(), "{command}");
        let counts = bench.run("verify --counts --settle 1ms").await.expect_exit(0);
        assert_eq!(check(&counts, "counts")["found"], json!(500), "numbers alone say nothing about keys");
    }
}

#[tokio::test]
async fn two_users_whose_keys_were_exchanged_are_both_named() {
    let exchange = async |users: &Collection<Document>| {
        set_key(users, 11, "N12").await;
        set_key(users, 12, "N11").await;
    };
    expect_other_keys(&users(exchange).await, &[11, 12]).await;
}

#[tokio::test]
async fn of_two_users_with_one_key_the_one_that_got_it_is_named() {
    let bench = users(async |users: &Collection<Document>| set_key(users, 11, "N12").await).await;
    expect_other_keys(&bench, &[11]).await;
}

#[tokio::test]
async fn beside_writers_and_a_follower_nothing_differs_but_what_is_planted() {
    let bench = Bench::new().await;
    configure(&bench, RULE);
    let options = Options { documents: 8_000, target_rate: 500, ..Options::default() };
    let writers = Writers::on(&bench, SOURCE, options).await;
    let mut follower = bench.program("cleanse --follow --parallel 2").spawn();
    wait_for("the follower", async || follower.stderr().contains("follows")).await;
    let before = writers.operations();
    let full = bench.run("verify --full").await.expect_exit(0);
    let counts = bench.run("verify --counts").await.expect_exit(0);
    let sample = bench.run("verify --sample 4000").await.expect_exit(0);
    assert!(writers.operations() > before + 500, "nothing moved");
    assert!(full.number("/full/rechecked") > 0, "the writers were never noticed: {}", full.stdout);
    assert!(check(&counts, "counts")["moved"]["documents"].is_u64(), "{}", counts.stdout);
    assert_eq!(check(&sample, "sample source to target")["differences"], json!([]));
    // One that nobody mends is found among those that move.
    bench.insert_into(TARGET, [doc! {"_id": "planted"}]).await;
    let full = bench.run("verify --full --settle 5s").await.expect_exit(1);
    let planted = json!("planted");
    let found: Vec<&Value> = check(&full, "full")["differences"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|difference| &difference["_id"])
        .collect();
    assert_eq!(found, [&planted], "{}", full.stdout);
    let counts = bench.run("verify --counts --settle 5s").await.expect_exit(1);
    let (expected, found) = (&check(&counts, "counts")["expected"], &check(&counts, "counts")["found"]);
    assert_eq!(expected.as_u64().map(|expected| expected + 1), found.as_u64(), "{}", counts.stdout);
    assert!(follower.is_running(), "{}", follower.stderr());
    follower.signal(Signal::Interrupt);
    follower.finish().await.expect_exit(130);
    drop(writers.stop().await);
}

#[tokio::test]
async fn counts_add_up_by_rule_and_tell_what_came_and_went() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..1_000).map(|id| doc! {"_id": id, "a": id % 10})).await;
    configure(
        &bench,
        "keep = '{\"a\": {\"$lt\": 8}}'\nreject = [{ name = \"one\", when = '{\"a\": {\"$lte\": 1}}' }, \
         { name = \"zero\", when = '{\"a\": {\"$in\": [0, 2]}}' }]",
    );
    bench.run("cleanse").await.expect_exit(0);
    let run = bench.run("verify --counts").await.expect_exit(0);
    let ledger = |run: &Finished| check(run, "counts")["ledger"].clone();
    let expected = json!({"keep": 200, "one": 200, "zero": 100});
    assert_eq!(ledger(&run)["rejected_by"], expected);
    assert_eq!((&ledger(&run)["kept"], &ledger(&run)["rejected"]), (&json!(500), &json!(500)));
    let source = collection(&bench, SOURCE);
    source.delete_many(doc! {"_id": {"$lt": 100}}).await.expect("deleted");
    bench.insert_into(SOURCE, [doc! {"_id": 5_000, "a": 7}]).await;
    // Nobody follows: what the target does not have is lacking.
    let behind = bench.run("verify --counts --settle 1ms").await.expect_exit(1);
    assert_eq!(
        (&check(&behind, "counts")["expected"], &check(&behind, "counts")["found"]),
        (&json!(451), &json!(500))
    );
    assert_eq!(check(&behind, "counts")["moved"], Value::Null);
    bench.run("cleanse").await.expect_exit(0);
    let run = bench.run("verify --counts").await.expect_exit(0);
    let figures = ["source_at_start", "inserted_during", "deleted_during", "source", "kept", "in_target"]
        .map(|name| ledger(&run)[name].as_u64().unwrap_or_else(|| panic!("{name}: {}", run.stdout)));
    assert_eq!(figures, [1_000, 1, 100, 901, 451, 451]);
    // As many as expected by number, but of other rules: no rule may take the place of another.
    configure(&bench, "keep = '{\"a\": {\"$lt\": 5}}'");
    let other = bench.run("verify --counts --settle 1ms").await.expect_exit(1);
    assert_eq!(ledger(&other)["source_at_start"], Value::Null, "the job has other rules");
}

#[tokio::test]
async fn without_flags_a_planted_document_is_found_and_named_whatever_the_sample_sees() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..20_000).map(|id| doc! {"_id": id, "a": id})).await;
    configure(&bench, "");
    bench.run("cleanse").await.expect_exit(0);
    let run = bench.run("verify").await.expect_exit(0);
    for name in ["full", "counts", "sample source to target", "sample target to source", "indexes", "options"]
    {
        assert_eq!(check(&run, name)["passed"], json!(true), "{name}");
    }
    let change = doc! {"$set": {"a": 77_i64}};
    collection(&bench, TARGET).update_one(doc! {"_id": 77}, change).await.expect("changed");
    let run = bench.run("verify --settle 1ms").await.expect_exit(1);
    let difference = &check(&run, "full")["differences"][0];
    assert_eq!((&difference["fields"], &difference["difference"]), (&json!(["a"]), &json!("numeric_type")));
    // After a cutover there is nothing left to compare it with.
    collection(&bench, TARGET).update_one(doc! {"_id": 77}, doc! {"$set": {"a": 77}}).await.expect("mended");
    bench.run("cutover --mode swap --max-pause 10s --yes").await.expect_exit(0);
    let refused = bench.run("verify").await.expect_exit(3);
    assert!(refused.text("/error/message").contains("Cut over by swap"), "{}", refused.stdout);
}

/// Two equal collections and filled documents; the program has a name of its own.
async fn equal() -> (Bench, KeyApi) {
    let bench = Bench::with_docs(50).await;
    let api = KeyApi::start(|call| Reply::found(call).after(Duration::from_millis(20)));
    for name in [SOURCE, TARGET] {
        bench.insert_into(name, (0..4_000).map(|id| doc! {"_id": id})).await;
    }
    let target = bench.config(&api).text();
    let targets = &target[target.find("[[backfill.targets]]").expect("a target")..];
    let cleanse = config(&bench, "");
    let text = cleanse.replace("[cleanse]", &format!("{targets}\n[cleanse]"));
    let text =
        text.replace("http://127.0.0.1:9/{key}", &api.key_url()).replace(&bench.uri, &named_uri(&bench));
    bench.configure_text(&text);
    bench.run("backfill --tps 100000").await.expect_exit(0);
    (bench, api)
}

#[tokio::test]
async fn a_server_that_refuses_in_mid_run_is_no_pass() {
    let (bench, _api) = equal().await;
    for (command, namespace) in [
        ("verify --sample 1000", TARGET),
        ("verify --counts", SOURCE),
        ("verify --unique", DOCS),
        ("verify --keys 5", DOCS),
    ] {
        bench.run(command).await.expect_exit(0);
        let broken = doc! {
            "failCommands": ["find", "aggregate", "getMore"], "errorCode": 13, "namespace": bench.namespace(namespace),
        };
        let point = fail(&bench, "alwaysOn", broken).await;
        let run = bench.run(command).await.expect_exit(4);
        drop(point);
        assert_ne!(run.json["passed"], json!(true), "{command}");
        assert_eq!(run.text("/error/code"), "stopped", "{command}");
    }
    // What passes is gone on with.
    for command in ["verify --sample 1000", "verify --counts", "verify --unique"] {
        let broken = doc! {"failCommands": ["find", "aggregate"], "closeConnection": true};
        let point = fail(&bench, doc! {"times": 3}, broken).await;
        bench.run(command).await.expect_exit(0);
        drop(point);
    }
}

#[tokio::test]
async fn an_interrupted_verification_is_no_pass() {
    let (bench, _api) = equal().await;
    for command in
        ["verify", "verify --sample 4000", "verify --counts", "verify --unique", "verify --keys 50"]
    {
        let slow =
            doc! {"failCommands": ["find", "aggregate"], "blockConnection": true, "blockTimeMS": 3_000};
        let point = fail(&bench, "alwaysOn", slow).await;
        let run = bench.program(command).spawn();
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        run.signal(Signal::Interrupt);
        let run = run.finish().await.expect_exit(130);
        drop(point);
        assert_ne!(run.json["passed"], json!(true), "{command}");
        assert_eq!(run.text("/error/code"), "interrupted", "{command}");
    }
}

/// A follower each of whose writes takes so long, and the copy of this many documents.
async fn held_up(documents: i32, milliseconds: i32) -> (Bench, Running, FailPoint) {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..documents).map(|id| doc! {"_id": id})).await;
    bench.configure_text(&config(&bench, "").replace(&bench.uri, &named_uri(&bench)));
    let follower = bench.program("cleanse --follow").spawn();
    wait_for("the follower", async || follower.stderr().contains("follows")).await;
    let blocked = doc! {
        "failCommands": ["update", "bulkWrite", "insert", "delete"],
        "namespace": bench.namespace(TARGET), "blockConnection": true, "blockTimeMS": milliseconds,
    };
    let point = fail(&bench, "alwaysOn", blocked).await;
    (bench, follower, point)
}

/// A follower that holds its job and writes nothing, and the copy of this many documents.
async fn stuck(documents: i32) -> (Bench, Running, FailPoint) {
    held_up(documents, 50_000).await
}

#[tokio::test]
async fn a_document_that_never_rests_is_judged_by_what_it_was_a_moment_before() {
    const HOT: i32 = 7;
    // The target is never as new as the source.
    let (bench, follower, point) = held_up(500, 60).await;
    let source = collection(&bench, SOURCE);
    let writer = tokio::spawn(async move {
        for n in 1_i64.. {
            source.update_one(doc! {"_id": HOT}, doc! {"$set": {"n": n}}).await.expect("written");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    for command in ["verify --full --settle 6s", "verify --sample 500 --settle 6s"] {
        bench.run(command).await.expect_exit(0);
    }
    // Who does not follow is not in step with it.
    follower.kill();
    let full = bench.run("verify --full --settle 2s").await.expect_exit(1);
    writer.abort();
    drop(point);
    let found = check(&full, "full")["differences"].as_array().expect("a list");
    assert_eq!(found.len(), 1, "{}", full.stdout);
    assert_eq!(found[0]["_id"], json!({"$numberInt": HOT.to_string()}));
}

#[tokio::test]
async fn where_every_document_moved_nothing_was_counted() {
    let (bench, follower, point) = stuck(50).await;
    let change = doc! {"$set": {"a": 1}};
    collection(&bench, SOURCE).update_many(doc! {}, change).await.expect("changed");
    let run = bench.run("verify --counts --settle 1ms").await.expect_exit(1);
    assert_eq!(check(&run, "counts")["moved"]["documents"], json!(50), "{}", run.stdout);
    drop(point);
    follower.kill();
}

#[tokio::test]
async fn a_follower_that_is_stuck_hides_no_loss() {
    let (bench, follower, point) = stuck(50).await;
    let change = doc! {"$set": {"a": 1}};
    collection(&bench, SOURCE).update_one(doc! {"_id": 7}, change).await.expect("changed");
    collection(&bench, TARGET).delete_one(doc! {"_id": 7}).await.expect("deleted");
    tokio::time::sleep(Duration::from_secs(35)).await;
    assert!(follower.stderr().contains("follows"), "{}", follower.stderr());
    let run = bench.run("verify --counts --settle 1ms").await.expect_exit(1);
    assert_eq!(check(&run, "counts")["moved"], Value::Null, "{}", run.stdout);
    drop(point);
    follower.kill();
}

/// The same with documents that a backfill would be busy with for long.
async fn equal_and_unfilled() -> (Bench, KeyApi) {
    let (bench, api) = equal().await;
    bench.insert((1_000..1_100).map(|id| doc! {"_id": id, "legacyKey": format!("more{id}")})).await;
    (bench, api)
}

const WITH_KEYS: &str = "verify --full --parallel 1 --keys 5 --settle 1ms --report r.html";

#[tokio::test]
async fn beside_a_backfill_nothing_is_compared_for_hours_before_keys_are_refused() {
    let (bench, api) = equal_and_unfilled().await;
    let calls = api.count();
    let backfill = bench.program("backfill --tps 1").spawn();
    wait_for("a call", async || api.count() > calls).await;
    let run = bench.run(WITH_KEYS).await.expect_exit(3);
    assert!(run.text("/error/message").contains("is being run"), "{}", run.stdout);
    let job = bench.job(&format!("verify-{}-to-{TARGET}", bench.namespace(SOURCE))).await;
    assert!(job.is_none(), "{job:?}");
    backfill.signal(Signal::Interrupt);
    backfill.finish().await.expect_exit(130);
}

#[tokio::test]
async fn what_was_compared_is_told_though_keys_can_not_be_asked_any_more() {
    let (bench, api) = equal_and_unfilled().await;
    let calls = api.count();
    let slow = doc! {
        "failCommands": ["find"], "namespace": bench.namespace(TARGET), "blockConnection": true, "blockTimeMS": 10_000,
    };
    let point = fail(&bench, "alwaysOn", slow).await;
    let run = bench.program(WITH_KEYS).spawn();
    let ranges = bench.state.collection::<Document>("verify_ranges");
    wait_for("the ranges", async || ranges.count_documents(doc! {}).await.expect("a count") > 0).await;
    let backfill = bench.program("backfill --tps 1").spawn();
    wait_for("a call", async || api.count() > calls).await;
    drop(point);
    let run = run.finish().await.expect_exit(3);
    assert!(run.text("/error/message").contains("is being run"), "{}", run.stdout);
    assert_eq!((&run.json["passed"], &check(&run, "full")["passed"]), (&json!(false), &json!(true)));
    assert!(bench.folder.join("r.html").exists() && bench.folder.join("r.json").exists());
    backfill.signal(Signal::Interrupt);
    backfill.finish().await.expect_exit(130);
}

/// Lets a command wait for the server in the middle of its reading, and kills the server.
async fn expect_no_pass_without_server(command: &str, wait_in: &[&str]) {
    let set = OwnSet::start(&[]);
    let bench = Bench::on(&set.uri).await;
    for name in [SOURCE, TARGET] {
        bench.insert_into(name, (0..4_000).map(|id| doc! {"_id": id})).await;
    }
    let at_once = format!("{}&serverSelectionTimeoutMS=300&connectTimeoutMS=300&appName=tested", set.uri);
    bench.configure_text(&config(&bench, "").replace(&set.uri, &at_once));
    bench.run(command).await.expect_exit(0);
    let wait = doc! {
        "failCommands": wait_in, "namespace": bench.namespace(TARGET), "appName": "tested",
        "blockConnection": true, "blockTimeMS": 60_000,
    };
    let members = set.members().await;
    members[0].fail_point("failCommand", wait).await;
    let mut run = bench.program(&format!("{command} --report r.html")).spawn();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(run.is_running(), "{command} ended before: {}", run.stderr());
    members[0].kill();
    let run = run.finish().await;
    assert_ne!(run.exit, Some(0), "{command}: {}", run.output());
    assert_ne!(run.json["passed"], json!(true), "{command}");
    assert_eq!(run.text("/error/code"), "stopped", "{command}");
    let report = std::fs::read_to_string(bench.folder.join("r.json")).expect("a report");
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!((&report["verdict"]["finished"], &report["verdict"]["passed"]), (&json!(false), &Value::Null));
    bench.abandon();
}

#[tokio::test]
async fn a_server_that_is_gone_for_good_in_mid_run_is_no_pass() {
    tokio::join!(
        expect_no_pass_without_server("verify --full", &["find", "aggregate", "getMore"]),
        expect_no_pass_without_server("verify --sample 4000", &["getMore"]),
        expect_no_pass_without_server("verify --counts", &["aggregate"]),
    );
}
