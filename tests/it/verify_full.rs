//! `verify --full` finds every document that is not the same, names what differs, and does not
//! mistake nothing for agreement.

use std::collections::BTreeSet;
use std::time::Duration;

use bson::spec::BinarySubtype;
use bson::{Binary, Bson, DateTime, Document, cstr, doc, rawdoc};
use mongodb::Collection;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::cleansing::{
    SOURCE, TARGET, bytes, configure, every_type, ids, insert_raw, store_exactly, zero_timestamps,
};
use crate::harness::Bench;
use crate::program::Finished;

/// Differences are reported after one more look.
const AT_ONCE: &str = "verify --full --settle 1ms";

/// Documents of every kind on both sides, the target being a true copy.
async fn pair(count: u32) -> Bench {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..).zip(ids(count)).map(|(number, id)| every_type(id, number))).await;
    copy(&bench).await;
    configure(&bench, "");
    bench
}

async fn copy(bench: &Bench) {
    collection(bench, SOURCE).aggregate([doc! {"$match": {}}, doc! {"$out": TARGET}]).await.expect("a copy");
}

fn collection(bench: &Bench, name: &str) -> Collection<Document> {
    bench.database.collection(name)
}

fn check<'a>(run: &'a Finished, name: &str) -> &'a Value {
    let checks = run.json["checks"].as_array().unwrap_or_else(|| panic!("no checks: {}", run.output()));
    checks.iter().find(|check| check["name"] == json!(name)).unwrap_or_else(|| panic!("{}", run.output()))
}

fn differences(run: &Finished) -> &Vec<Value> {
    check(run, "full")["differences"].as_array().expect("a list")
}

#[track_caller]
fn expect_mismatches(run: &Finished, missing: u64, extra: u64, different: u64) {
    assert_eq!(run.exit, Some(1), "{}", run.output());
    assert_eq!((&run.json["passed"], &check(run, "full")["passed"]), (&json!(false), &json!(false)));
    let found = ["missing", "extra", "different"].map(|kind| run.number(&format!("/full/{kind}")));
    assert_eq!(found, [missing, extra, different], "{}", run.output());
}

/// The `_id`s of the differences of a kind, as text.
fn ids_of(run: &Finished, kind: &str) -> BTreeSet<String> {
    let of_kind = differences(run).iter().filter(|difference| difference["kind"] == json!(kind));
    of_kind.map(|difference| difference["_id"].to_string()).collect()
}

fn texts(ids: impl IntoIterator<Item = Bson>) -> BTreeSet<String> {
    ids.into_iter().map(|id| id.into_canonical_extjson().to_string()).collect()
}

#[tokio::test]
async fn a_true_copy_passes_whatever_its_ids() {
    let bench = pair(3000).await;
    for document in zero_timestamps() {
        for name in [SOURCE, TARGET] {
            store_exactly(&bench, name, document.clone()).await;
        }
    }
    let documents = bytes(&bench, SOURCE).await;
    let run = bench.run("verify --full").await.expect_exit(0);
    assert_eq!(run.json["passed"], json!(true));
    let full = check(&run, "full");
    assert_eq!((&full["expected"], &full["found"]), (&json!(documents.len()), &json!(documents.len())));
    assert_eq!(full["differences"], json!([]));
    assert!(run.number("/full/ranges") > 1, "{}", run.stdout);
    assert_eq!(run.number("/full/documents"), documents.len() as u64);
    let size: usize = documents.values().map(Vec::len).sum();
    assert_eq!(run.number("/full/bytes"), 2 * size as u64);
    assert_eq!(run.json["full"]["source"], run.json["full"]["target"]);
    assert_eq!(run.number("/full/rechecked"), 0);
}

#[tokio::test]
async fn every_document_that_one_side_lacks_is_found_whatever_its_id() {
    let bench = pair(3000).await;
    let missing: Vec<Bson> = ids(3000).into_iter().step_by(3).collect();
    for id in &missing {
        // By `$expr`: equality to null or a regular expression would mean something else.
        let only = doc! {"$expr": {"$eq": ["$_id", {"$literal": id}]}};
        let deleted = collection(&bench, TARGET).delete_many(only).await.expect("deleted").deleted_count;
        assert_eq!(deleted, 1, "{id}");
    }
    let run = bench.run(&format!("{AT_ONCE} --max-differences 100000")).await;
    expect_mismatches(&run, missing.len() as u64, 0, 0);
    assert_eq!(ids_of(&run, "missing"), texts(missing.clone()));

    let swapped =
        format!("{AT_ONCE} --max-differences 100000 --source {} --to {SOURCE}", bench.namespace(TARGET));
    let run = bench.run(&swapped).await;
    expect_mismatches(&run, 0, missing.len() as u64, 0);
    assert_eq!(ids_of(&run, "extra"), texts(missing));
}

#[tokio::test]
async fn sides_whose_ids_have_nothing_in_common_are_compared_to_their_ends() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..3000).map(|n| doc! {"_id": n})).await;
    bench.insert_into(TARGET, (0..3000).map(|n| doc! {"_id": n + 2000})).await;
    bench.insert_into(TARGET, (0..500).map(|n| doc! {"_id": format!("x{n}")})).await;
    bench.insert_into(TARGET, [doc! {"_id": Bson::MinKey}, doc! {"_id": Bson::MaxKey}]).await;
    // Types that share their place in the order with others.
    bench
        .insert_into(
            TARGET,
            [Bson::Symbol("x2s".into()), Bson::Symbol("a".into())].map(|id| doc! {"_id": id}),
        )
        .await;
    configure(&bench, "");
    expect_mismatches(&bench.run(AT_ONCE).await, 2000, 2504, 0);
}

/// What stands in the source, what in the target, and how the difference is named.
pub fn planted() -> Vec<(Document, Document, &'static str, &'static str, &'static str)> {
    let date = DateTime::from_millis;
    let decimal = |text: &str| text.parse::<bson::Decimal128>().expect("a decimal");
    let binary = |subtype| Binary { subtype, bytes: vec![1, 2, 3] };
    vec![
        (doc! {"v": "a"}, doc! {"v": "b"}, "value", "v", "another string"),
        (doc! {"v": 1, "w": 1}, doc! {"v": 1}, "value", "w", "missing"),
        (doc! {"v": 1}, doc! {"v": 1, "w": 1}, "value", "w", "not in the source"),
        (
            doc! {"v": 1, "w": 2},
            doc! {"w": 2, "v": 1},
            "order",
            "(top level)",
            "the same fields in another order",
        ),
        (doc! {"v": 5_i64}, doc! {"v": 5}, "numeric_type", "v", "int instead of long"),
        (doc! {"v": 5}, doc! {"v": 5.0}, "numeric_type", "v", "double instead of int"),
        (doc! {"v": 0.0}, doc! {"v": -0.0}, "value", "v", "-0.0 instead of 0.0"),
        (
            doc! {"v": f64::NAN},
            doc! {"v": f64::from_bits(f64::NAN.to_bits() | 1)},
            "value",
            "v",
            "another NaN",
        ),
        (doc! {"v": date(1000)}, doc! {"v": date(1001)}, "value", "v", "1 ms later"),
        (
            doc! {"v": decimal("1.10")},
            doc! {"v": decimal("1.1")},
            "value",
            "v",
            "the same number with another precision",
        ),
        (doc! {"v": [1, 2, 3]}, doc! {"v": [1, 3, 2]}, "value", "v", "the same elements in another order"),
        (doc! {"v": [1, {"w": "a"}]}, doc! {"v": [1, {"w": "b"}]}, "value", "v.1.w", "another string"),
        (doc! {"v": {"w": {"x": 1}}}, doc! {"v": {"w": {"x": 2}}}, "value", "v.w.x", "another int"),
        (
            doc! {"v": "\u{d64d}"},
            doc! {"v": "\u{1112}\u{1169}\u{11bc}"},
            "value",
            "v",
            "the same text in another Unicode normalization",
        ),
        (
            doc! {"v": binary(BinarySubtype::Generic)},
            doc! {"v": binary(BinarySubtype::UserDefined(0x80))},
            "value",
            "v",
            "the same bytes with binary subtype 128 instead of 0",
        ),
        (doc! {"newKey": "N-1"}, doc! {"newKey": "N-2"}, "value", "newKey", "another string"),
        (doc! {"v": Bson::Null}, doc! {}, "value", "v", "missing"),
    ]
}

#[tokio::test]
async fn every_planted_difference_is_found_and_named() {
    let bench = pair(3000).await;
    let cases = planted();
    for (number, (source, target, ..)) in cases.iter().enumerate() {
        for (name, document) in [(SOURCE, source), (TARGET, target)] {
            let mut document = document.clone();
            document.insert("_id", format!("planted {number}"));
            bench.insert_into(name, [document]).await;
        }
    }
    let run = bench.run(AT_ONCE).await;
    expect_mismatches(&run, 0, 0, cases.len() as u64);
    for (number, (source, _, kind, path, detail)) in cases.iter().enumerate() {
        let id = json!(format!("planted {number}"));
        let found = differences(&run).iter().find(|found| found["_id"] == id);
        let found = found.unwrap_or_else(|| panic!("{source} was not found: {}", run.stdout));
        assert_eq!(found["kind"], json!("different"));
        assert_eq!(found["difference"], json!(kind), "{found}");
        assert_eq!(found["fields"], json!([path]), "{found}");
        assert_eq!(found["details"], json!([{"path": path, "kind": kind, "detail": detail}]));
        assert!(found["age_seconds"].as_f64().is_some(), "{found}");
    }
    assert_eq!(run.number("/full/rechecked"), cases.len() as u64);
}

#[tokio::test]
async fn all_differences_are_counted_and_no_more_listed_than_asked_for() {
    let bench = pair(3000).await;
    let count = bytes(&bench, SOURCE).await.len() as u64;
    collection(&bench, TARGET).update_many(doc! {}, doc! {"$set": {"new": 1}}).await.expect("changed");
    for most in [3, 0] {
        let run = bench.run(&format!("{AT_ONCE} --max-differences {most}")).await;
        expect_mismatches(&run, 0, 0, count);
        assert_eq!(differences(&run).len(), most);
        assert_eq!(check(&run, "full")["found"], json!(0));
    }
}

#[tokio::test]
async fn only_what_the_rules_keep_belongs_into_the_target() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..3000).map(|n| doc! {"_id": n, "a": n % 3})).await;
    configure(&bench, "keep = '{\"a\": {\"$lt\": 2}}'\nreject = [{ name = \"one\", when = '{\"a\": 1}' }]");
    bench.run("cleanse").await.expect_exit(0);
    let run = bench.run("verify --full").await.expect_exit(0);
    assert_eq!(check(&run, "full")["expected"], json!(1000));
    bench.insert_into(TARGET, [doc! {"_id": 1, "a": 1}]).await;
    collection(&bench, TARGET).delete_one(doc! {"_id": 3}).await.expect("deleted");
    let run = bench.run(AT_ONCE).await;
    expect_mismatches(&run, 1, 1, 0);
    assert_eq!(ids_of(&run, "extra"), texts([1.into()]));
    assert_eq!(ids_of(&run, "missing"), texts([3.into()]));
}

#[tokio::test]
async fn nothing_to_compare_never_passes() {
    // Source, target, rules.
    let cases: [(Option<usize>, Option<usize>, &str); 7] = [
        (Some(1), None, ""),
        (Some(1), Some(0), ""),
        (None, None, ""),
        (Some(0), Some(0), ""),
        (None, Some(1), ""),
        (Some(0), Some(1), ""),
        (Some(1), Some(1), "keep = '{\"a\": 2}'"),
    ];
    for (source, target, rules) in cases {
        let bench = Bench::new().await;
        for (name, count) in [(SOURCE, source), (TARGET, target)] {
            let Some(count) = count else { continue };
            bench.database.create_collection(name).await.expect("created");
            if count > 0 {
                bench.insert_into(name, [doc! {"_id": 1, "a": 1}]).await;
            }
        }
        configure(&bench, rules);
        let run = bench.run(AT_ONCE).await;
        assert_eq!(run.exit, Some(1), "{source:?} {target:?} {rules}: {}", run.output());
        assert_eq!(run.json["passed"], json!(false));
        assert_eq!(check(&run, "full")["passed"], json!(false));
    }
}

/// Documents without an `_id`, or with one of many, can't be matched.
#[tokio::test]
async fn views_are_not_compared() {
    let bench = pair(10).await;
    for view in ["one", "other"] {
        let command = doc! {"create": view, "viewOn": SOURCE, "pipeline": [{"$project": {"_id": 0}}]};
        bench.database.run_command(command).await.expect("a view");
    }
    let sides = format!("verify --full --source {} --to other", bench.namespace("one"));
    let run = bench.run(&sides).await.expect_exit(3);
    assert!(run.text("/error/message").contains("is a view"), "{}", run.stdout);
}

#[tokio::test]
async fn a_wrong_name_and_a_collection_beside_itself_do_not_pass() {
    let bench = pair(50).await;
    bench.run(&format!("{AT_ONCE} --to targte")).await.expect_exit(1);
    bench
        .run(&format!("{AT_ONCE} --source {} --to {TARGET}", bench.namespace("sourec")))
        .await
        .expect_exit(1);
    bench.run(&format!("{AT_ONCE} --source {0} --to {SOURCE}", bench.namespace(SOURCE))).await.expect_exit(2);
    bench.configure(&bench.config_for_url("http://127.0.0.1:9/{key}"));
    bench.run("verify --full").await.expect_exit(2);
}

#[tokio::test]
async fn ids_that_a_collation_takes_for_equal_are_different_documents() {
    let strength = |strength: i32| doc! {"locale": "en", "strength": strength};
    let cases = [
        (Some(strength(2)), Some(strength(2))),
        (Some(strength(2)), None),
        (None, Some(strength(1))),
        (Some(strength(3)), Some(strength(2))),
    ];
    for (source, target) in cases {
        let bench = Bench::new().await;
        for (name, collation) in [(SOURCE, &source), (TARGET, &target)] {
            let mut create = doc! {"create": name};
            create.extend(
                collation.iter().map(|collation| ("collation".to_owned(), Bson::from(collation.clone()))),
            );
            bench.database.run_command(create).await.expect("created");
            let names = (0..3000).map(|n| doc! {"_id": format!("{}Name-{n}", ["a", "B", "ö"][n % 3])});
            bench.insert_into(name, names).await;
        }
        configure(&bench, "");
        let is_same = source == target;
        let run = bench.run(AT_ONCE).await;
        assert_eq!(run.number("/full/missing") + run.number("/full/extra"), 0, "{}", run.output());
        assert_eq!(run.exit, Some(if is_same { 0 } else { 1 }), "{}", run.output());
        assert_eq!(check(&run, "full")["passed"], json!(true));
        assert_eq!(check(&run, "options")["passed"], json!(is_same));

        bench.insert_into(SOURCE, [doc! {"_id": "abc"}]).await;
        bench.insert_into(TARGET, [doc! {"_id": "ABC"}]).await;
        let run = bench.run(AT_ONCE).await;
        expect_mismatches(&run, 1, 1, 0);
        assert_eq!(ids_of(&run, "missing"), texts(["abc".into()]));
        assert_eq!(ids_of(&run, "extra"), texts(["ABC".into()]));
    }
}

#[tokio::test]
async fn clustered_collections_are_compared() {
    let bench = Bench::new().await;
    for name in [SOURCE, TARGET] {
        let create = doc! {"create": name, "clusteredIndex": {"key": {"_id": 1}, "unique": true}};
        bench.database.run_command(create).await.expect("created");
        bench.insert_into(name, (0..).zip(ids(2500)).map(|(n, id)| doc! {"_id": id, "n": n})).await;
    }
    configure(&bench, "");
    let run = bench.run(AT_ONCE).await.expect_exit(0);
    assert!(run.number("/full/ranges") > 1);
    collection(&bench, TARGET).delete_one(doc! {"_id": "$weird"}).await.expect("deleted");
    collection(&bench, TARGET)
        .update_one(doc! {"_id": true}, doc! {"$set": {"n": 7.5}})
        .await
        .expect("changed");
    expect_mismatches(&bench.run(AT_ONCE).await, 1, 0, 1);
}

#[tokio::test]
async fn documents_of_megabytes_are_compared_to_the_last_byte() {
    let bench = Bench::new().await;
    let large = |id: i32, end: &str| doc! {"_id": id, "v": format!("{}{end}", "x".repeat(15 << 20))};
    for name in [SOURCE, TARGET] {
        for id in 0..2 {
            bench.insert_into(name, [large(id, "a")]).await;
        }
        bench.insert_into(name, (10..3000).map(|id| doc! {"_id": id})).await;
    }
    configure(&bench, "");
    bench.run(AT_ONCE).await.expect_exit(0);
    collection(&bench, TARGET).replace_one(doc! {"_id": 1}, large(1, "b")).await.expect("replaced");
    let run = bench.run(AT_ONCE).await;
    expect_mismatches(&run, 0, 0, 1);
    assert_eq!(differences(&run)[0]["fields"], json!(["v"]));
}

#[tokio::test]
async fn indexes_and_options_are_compared() {
    let bench = pair(100).await;
    let index = |name: &str, index: Document| doc! {"createIndexes": name, "indexes": [index]};
    let unique = doc! {"key": {"int": 1}, "name": "int", "unique": true};
    bench.database.run_command(index(SOURCE, unique.clone())).await.expect("an index");
    let run = bench.run(AT_ONCE).await.expect_exit(1);
    assert_eq!(check(&run, "full")["passed"], json!(true));
    assert_eq!(check(&run, "indexes")["differences"][0]["kind"], json!("missing"));
    bench
        .database
        .run_command(index(TARGET, doc! {"key": {"int": 1}, "name": "int"}))
        .await
        .expect("an index");
    let run = bench.run(AT_ONCE).await.expect_exit(1);
    assert_eq!(check(&run, "indexes")["differences"][0]["kind"], json!("different"));
    collection(&bench, TARGET).drop_index("int").await.expect("dropped");
    bench.database.run_command(index(TARGET, unique)).await.expect("an index");
    bench.run(AT_ONCE).await.expect_exit(0);

    let validator = doc! {"collMod": SOURCE, "validator": {"int": {"$type": "int"}}};
    bench.database.run_command(validator).await.expect("a validator");
    let run = bench.run(AT_ONCE).await.expect_exit(1);
    let options = check(&run, "options")["differences"].as_array().expect("a list");
    assert!(options.iter().any(|found| found["option"] == json!("validator")), "{options:?}");
}

/// Updates the source until that moment, and the target with the same a little later.
async fn write_behind(bench: &Bench, until: Instant, lag: Duration) -> u64 {
    let (sender, mut queue) = mpsc::channel::<(Instant, i32, i64)>(10_000);
    let (source, target) = (collection(bench, SOURCE), collection(bench, TARGET));
    let set = |id: i32, value: i64| (doc! {"_id": id}, doc! {"$set": {"counter": value}});
    let follower = tokio::spawn(async move {
        while let Some((written, id, value)) = queue.recv().await {
            tokio::time::sleep_until(written + lag).await;
            let (filter, update) = (doc! {"_id": id}, doc! {"$set": {"counter": value}});
            target.update_one(filter, update).await.expect("followed");
        }
    });
    let mut writes = 0;
    while Instant::now() < until {
        let id = i32::try_from(writes * 7919 % 20_000).expect("small");
        let (filter, update) = set(id, i64::try_from(writes).expect("small"));
        source.update_one(filter, update).await.expect("written");
        sender.send((Instant::now(), id, i64::try_from(writes).expect("small"))).await.expect("a follower");
        writes += 1;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(sender);
    follower.await.expect("a follower");
    writes
}

#[tokio::test]
async fn differences_that_converge_are_none_while_writers_are_live() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..20_000).map(|n| doc! {"_id": n, "counter": 0_i64})).await;
    copy(&bench).await;
    configure(&bench, "");
    let until = Instant::now() + Duration::from_secs(14);
    let (writes, (live, broken)) =
        tokio::join!(write_behind(&bench, until, Duration::from_millis(300)), async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let live = bench.run("verify --full").await.expect_exit(0);
            // One that nobody mends is found among those that move.
            let id = 19_999;
            collection(&bench, TARGET)
                .update_one(doc! {"_id": id}, doc! {"$set": {"x": 1}})
                .await
                .expect("broken");
            let broken = bench.run("verify --full --settle 3s").await;
            (live, broken)
        });
    assert!(writes > 500, "{writes} writes");
    assert!(live.number("/full/rechecked") > 0, "the writers were never noticed: {}", live.stdout);
    expect_mismatches(&broken, 0, 0, 1);
    assert_eq!(differences(&broken)[0]["_id"], json!({"$numberInt": "19999"}));
    assert!(differences(&broken)[0]["age_seconds"].as_f64().expect("an age") >= 2.0, "{}", broken.stdout);
}

#[tokio::test]
async fn an_id_in_which_a_field_stands_twice_is_compared_too() {
    let bench = pair(50).await;
    copy(&bench).await;
    let mut id = rawdoc! {"a": 1};
    id.append(cstr!("a"), 2);
    let with_id = |value: i32| rawdoc! {"_id": id.clone(), "value": value};
    insert_raw(&bench, SOURCE, vec![with_id(1)]).await;
    let missing = bench.run("verify --full --settle 1ms").await.expect_exit(1);
    expect_mismatches(&missing, 1, 0, 0);
    bench.run("verify --sample 100 --settle 1ms").await.expect_exit(1);
    insert_raw(&bench, TARGET, vec![with_id(2)]).await;
    expect_mismatches(&bench.run("verify --full --settle 1ms").await.expect_exit(1), 0, 0, 1);
    collection(&bench, TARGET).delete_one(doc! {"value": 2}).await.expect("deleted");
    insert_raw(&bench, TARGET, vec![with_id(1)]).await;
    bench.run("verify --full --settle 1ms").await.expect_exit(0);
}
