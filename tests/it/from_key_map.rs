//! Filling from the key map: without a call.

use std::fmt::Write as _;

use bson::oid::ObjectId;
use bson::{Bson, Decimal128, Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;
use mongodb::options::CollationStrength;

use crate::cleansing::{FailPoint, store_exactly};
use crate::harness::{Bench, DOCS, Random, wait_for};
use crate::key_api::KeyApi;

pub const FROM_KEY_MAP: &str = "backfill --from-key-map";
/// Hangs each single update.
const UPDATES: &str = "hangDuringBatchUpdate";

/// A CSV file with a key for each of these legacy keys.
pub fn dump(keys: impl IntoIterator<Item = String>) -> String {
    keys.into_iter().fold(String::from("legacyKey,newKey\n"), |mut text, key| {
        writeln!(text, "{key},N-{key}").expect("a string");
        text
    })
}

/// A legacy value of any type, usable or not.
fn legacy_value(random: &mut Random, number: i32) -> Bson {
    match random.below(14) {
        0 => number.into(),
        1 => (i64::from(number) << 33).into(),
        2 => f64::from(number).into(),
        3 => (f64::from(number) + 0.5).into(),
        4 => [-0.0, f64::NAN, f64::INFINITY, 9_007_199_254_740_991.0, -9_007_199_254_740_992.0, 1e15]
            [random.below(6)]
        .into(),
        5 => ObjectId::from_bytes(
            u128::from(number.unsigned_abs()).to_be_bytes()[4..].try_into().expect("12 bytes"),
        )
        .into(),
        6 => decimal(random).into(),
        7 => Bson::Null,
        8 => [
            Bson::from(true),
            "".into(),
            bson::Bson::MaxKey,
            vec![Bson::from("K1")].into(),
            doc! {"a": 1}.into(),
        ][random.below(5)]
        .clone(),
        9 => bson::DateTime::from_millis(i64::from(number)).into(),
        10 => number.to_string().into(),
        _ => format!("K{}", number % 5000).into(),
    }
}

/// A decimal of any form that reads differently.
fn decimal(random: &mut Random) -> Decimal128 {
    let forms = [
        "NaN",
        "-NaN",
        "Infinity",
        "-Infinity",
        "0",
        "-0",
        "0.00",
        "0E+3",
        "-0E-7",
        "5.0",
        "5.00",
        "1E+3",
        "1E-7",
        "0.000001",
        "0.0000001",
        "1E+33",
        "1E+34",
        "9.999999999999999999999999999999999E+6144",
        "1E-6176",
    ];
    match random.below(3) {
        0 => forms[random.below(forms.len())].parse().expect("a decimal"),
        1 => {
            let digits = random.next() % 10_u64.pow(u32::try_from(1 + random.below(19)).expect("small"));
            let exponent = i32::try_from(random.below(80)).expect("small") - 40;
            format!("{digits}E{exponent}").parse().expect("a decimal")
        }
        _ => {
            // Any bits at all, those without a canonical form too.
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&random.next().to_le_bytes());
            bytes[8..].copy_from_slice(&random.next().to_le_bytes());
            Decimal128::from_bytes(bytes)
        }
    }
}

pub async fn collections(bench: &Bench) -> Vec<String> {
    let mut names = bench.database.list_collection_names().await.expect("names");
    names.sort();
    names
}

#[tokio::test]
async fn decimals_have_the_same_text_on_the_server() {
    let bench = Bench::new().await;
    let mut random = Random::seeded(128);
    bench.insert((0..20_000).map(|id| doc! {"_id": id, "d": decimal(&mut random)})).await;
    let project = doc! {"$project": {"d": 1, "text": {"$toString": "$d"}}};
    let cursor = bench.docs().aggregate([project]).await.expect("a cursor");
    let documents: Vec<Document> = cursor.try_collect().await.expect("all documents");
    let differences: Vec<String> = documents
        .iter()
        .filter_map(|document| {
            let ours = document.get("d").and_then(|value| match value {
                Bson::Decimal128(value) => Some(value.to_string()),
                _ => None,
            });
            let theirs = document.get_str("text").ok();
            let special = theirs.is_some_and(|text| text.contains("NaN") || text.contains("Inf"));
            (!special && ours.as_deref() != theirs).then(|| format!("{ours:?} {theirs:?}"))
        })
        .collect();
    assert!(
        differences.is_empty(),
        "{} differ: {:?}",
        differences.len(),
        &differences[..differences.len().min(20)]
    );
}

#[tokio::test]
async fn the_end_state_is_that_of_a_backfill_for_every_type() {
    let documents = |count: i32| {
        let mut random = Random::seeded(77);
        (0..count)
            .map(move |id| doc! {"_id": id, "legacyKey": legacy_value(&mut random, id)})
            .collect::<Vec<_>>()
    };
    // A backfill that asks for every key.
    let asked = Bench::new().await;
    asked.insert(documents(6000)).await;
    asked.create_index().await;
    let api = KeyApi::finding();
    asked.configure(&asked.config(&api).backfill("max_no_legacy_key_share = 1.0"));
    asked.run("backfill --tps 100000 --concurrency 64").await.expect_exit(0);
    asked.run("key-map export all.jsonl").await.expect_exit(0);

    // The same documents filled from what it had learnt.
    let filled = Bench::new().await;
    filled.insert(documents(6000)).await;
    filled.create_index().await;
    let silent = KeyApi::finding();
    filled.configure(&filled.config(&silent));
    std::fs::copy(asked.folder.join("all.jsonl"), filled.folder.join("all.jsonl")).expect("a copy");
    filled.run("key-map import all.jsonl").await.expect_exit(0);
    let run = filled.run(FROM_KEY_MAP).await.expect_exit(0);
    run.expect_calls(0);
    assert_eq!(silent.count(), 0);
    assert_eq!(run.text("/status"), "completed");
    let keyed = asked.count(doc! {"newKey": {"$type": "string"}}).await;
    assert_eq!(run.number("/documents/filled"), keyed);
    assert_eq!(run.number("/documents/candidates_left"), 6000 - keyed);
    for (asked, filled) in asked.documents(DOCS).await.iter_mut().zip(filled.documents(DOCS).await) {
        asked.remove("newKeyFlag");
        // Not by `==`: a NaN differs from itself.
        assert_eq!(asked.to_string(), filled.to_string());
    }
    assert_eq!(collections(&filled).await, [DOCS], "the copy of the keys is gone");
}

#[tokio::test]
async fn a_hundred_thousand_documents_take_no_call() {
    let bench = Bench::new().await;
    let mut random = Random::seeded(5);
    let key = |random: &mut Random| i32::try_from(random.below(30_000)).expect("small");
    bench
        .insert((0..100_000).map(|id| {
            let legacy: Bson = match id % 4 {
                0 => key(&mut random).into(),
                1 => i64::from(key(&mut random)).into(),
                2 => f64::from(key(&mut random)).into(),
                _ => key(&mut random).to_string().into(),
            };
            let id: Bson = if id % 2 == 0 { id.into() } else { format!("id-{id}").into() };
            doc! {"_id": id, "legacyKey": legacy, "x.y": 1, "more": {"a": [1, 2]}}
        }))
        .await;
    // What no insert and no replacement keeps.
    store_exactly(
        &bench,
        DOCS,
        doc! {"_id": -1, "legacyKey": "1", "$odd": 1, "t": bson::Timestamp { time: 0, increment: 0 }},
    )
    .await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    // One key in a hundred is not known.
    let known = (0..30_000).filter(|key| key % 100 != 7);
    bench.file("keys.csv", dump(known.map(|key| key.to_string())));
    bench.run("key-map import keys.csv").await.expect_exit(0);
    let before = bench.documents(DOCS).await;
    let run = bench.run(FROM_KEY_MAP).await.expect_exit(0);
    run.expect_calls(0);
    let left = run.number("/documents/candidates_left");
    assert!((500..1500).contains(&left), "{left}");
    assert_eq!(run.number("/documents/filled"), 100_001 - left);
    for (mut before, after) in before.into_iter().zip(bench.documents(DOCS).await) {
        let legacy = match before.get("legacyKey").expect("a legacy key") {
            Bson::Int32(key) => key.to_string(),
            Bson::Int64(key) => key.to_string(),
            Bson::Double(key) => key.to_string(),
            Bson::String(key) => key.clone(),
            other => panic!("{other}"),
        };
        let is_known = legacy.parse::<i32>().expect("a number") % 100 != 7;
        if is_known {
            before.insert("newKey", format!("N-{legacy}"));
        }
        assert_eq!(before, after);
    }
    assert_eq!(api.count(), 0);
    bench
        .run("backfill --tps 100000 --concurrency 32")
        .await
        .expect_exit(0)
        .expect_documents(&[("candidates", left), ("filled", left)]);
}

#[tokio::test]
async fn what_the_application_writes_meanwhile_stays() {
    let bench = Bench::with_docs(100).await;
    bench.insert([doc! {"_id": 101, "legacyKey": 42}]).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let keys = (1..=100).map(|id| format!("K{id}")).chain(["42".into(), "C3".into()]);
    bench.file("keys.csv", dump(keys));
    bench.run("key-map import keys.csv").await.expect_exit(0);
    let updates = FailPoint::reserve(UPDATES);
    let data = doc! {"nss": bench.namespace(DOCS), "shouldCheckForInterrupt": true};
    let entered = updates.set(&bench, "alwaysOn", data).await;
    let run = bench.program(FROM_KEY_MAP).spawn();
    updates.wait_until_entered(&bench, entered + 1).await;
    // The candidates are read and joined; nothing is written yet.
    let writes = [
        (1, doc! {"$set": {"newKey": "APP"}}),
        (2, doc! {"$set": {"newKeyFlag": "theirs"}}),
        (3, doc! {"$set": {"legacyKey": "C3"}}),
        (4, doc! {"$set": {"legacyKey": ["K4"]}}),
        (5, doc! {"$unset": {"legacyKey": ""}}),
        (6, doc! {"$set": {"more": 1}}),
        (101, doc! {"$set": {"legacyKey": 43}}),
    ];
    for (id, write) in writes {
        bench
            .docs()
            .find_one_and_update(doc! {"_id": id}, write)
            .await
            .expect("a write")
            .expect("a document");
    }
    bench.docs().delete_one(doc! {"_id": 7}).await.expect("a delete");
    updates.off(&bench).await;
    let run = run.finish().await.expect_exit(0);
    let documents = bench.documents(DOCS).await;
    let wanted = [
        doc! {"_id": 1, "legacyKey": "K1", "newKey": "APP"},
        doc! {"_id": 2, "legacyKey": "K2", "newKeyFlag": "theirs"},
        doc! {"_id": 3, "legacyKey": "C3"},
        doc! {"_id": 4, "legacyKey": ["K4"]},
        doc! {"_id": 5},
        doc! {"_id": 6, "legacyKey": "K6", "more": 1, "newKey": "N-K6"},
        doc! {"_id": 8, "legacyKey": "K8", "newKey": "N-K8"},
    ];
    assert_eq!(documents[..7], wanted);
    assert_eq!(documents.last(), Some(&doc! {"_id": 101, "legacyKey": 43}));
    assert_eq!(documents.len(), 100, "a deleted document is not made again");
    assert_eq!(run.number("/documents/candidates_left"), 4);
    // A second start fills what has a known key now.
    let run = bench.run(FROM_KEY_MAP).await.expect_exit(0);
    run.expect_documents(&[("candidates", 4), ("filled", 1), ("candidates_left", 3)]);
}

#[tokio::test]
async fn dotted_paths_are_written_where_they_can_be() {
    let bench = Bench::new().await;
    let parents: [Option<Bson>; 6] = [
        None,
        Some(doc! {"x": 1, "d.e": 2}.into()),
        Some(Bson::Null),
        Some(5.into()),
        Some(vec![Bson::from(doc! {"x": 1})].into()),
        Some(doc! {"k": {"n": Bson::Null}}.into()),
    ];
    bench
        .insert(parents.iter().enumerate().map(|(id, parent)| {
            let mut document = doc! {"_id": i32::try_from(id).expect("small"), "l": {"key": "K"}};
            document.extend(parent.clone().map(|parent| ("a".to_owned(), parent)));
            document
        }))
        .await;
    let api = KeyApi::finding();
    let config = bench.config(&api).no_targets();
    bench.configure(&config.target("docs", &bench.namespace(DOCS), ["l.key", "a.k.n", "flags.new"]));
    bench.run("index create").await.expect_exit(0);
    bench.file("keys.csv", dump(["K".into()]));
    bench.run("key-map import keys.csv").await.expect_exit(0);
    let before = bench.documents(DOCS).await;
    let run = bench.run(FROM_KEY_MAP).await.expect_exit(1);
    run.expect_documents(&[("candidates", 6), ("filled", 3), ("failed", 3), ("candidates_left", 3)]);
    let after = bench.documents(DOCS).await;
    let key = || Bson::from(doc! {"n": "N-K"});
    assert_eq!(after[0], doc! {"_id": 0, "l": {"key": "K"}, "a": {"k": key()}});
    assert_eq!(after[1], doc! {"_id": 1, "l": {"key": "K"}, "a": {"x": 1, "d.e": 2, "k": key()}});
    assert_eq!(after[2..5], before[2..5]);
    assert_eq!(after[5], doc! {"_id": 5, "l": {"key": "K"}, "a": {"k": key()}});
}

#[tokio::test]
async fn a_document_that_breaks_a_validator_holds_up_no_other() {
    let bench = Bench::new().await;
    let validator = doc! {"$or": [{"newKey": {"$exists": false}}, {"_id": {"$ne": 30}}]};
    bench.database.create_collection(DOCS).validator(validator).await.expect("a collection");
    bench.insert((0..100).map(|id| doc! {"_id": id, "legacyKey": format!("K{id}")})).await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.file("keys.csv", dump((0..100).map(|id| format!("K{id}"))));
    bench.run("key-map import keys.csv").await.expect_exit(0);
    let run = bench.run(FROM_KEY_MAP).await.expect_exit(1);
    run.expect_documents(&[("candidates", 100), ("filled", 99), ("failed", 1), ("candidates_left", 1)]);
    assert_eq!(run.text("/status"), "incomplete");
    assert!(run.stderr.contains("121"), "{}", run.stderr);
}

#[tokio::test]
async fn a_collation_takes_no_key_for_another() {
    let bench = Bench::new().await;
    let collation =
        mongodb::options::Collation::builder().locale("en").strength(CollationStrength::Secondary).build();
    bench.database.create_collection(DOCS).collation(collation).await.expect("a collection");
    bench
        .insert([
            doc! {"_id": 1, "legacyKey": "abc"},
            doc! {"_id": 2, "legacyKey": "ABC"},
            doc! {"_id": 3, "legacyKey": "Abc"},
        ])
        .await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.file("keys.csv", dump(["abc".into(), "ABC".into()]));
    bench.run("key-map import keys.csv").await.expect_exit(0);
    bench.run(FROM_KEY_MAP).await.expect_exit(0).expect_documents(&[
        ("candidates", 3),
        ("filled", 2),
        ("candidates_left", 1),
    ]);
    let keys: Vec<_> = bench.documents(DOCS).await;
    let keys: Vec<_> = keys.iter().map(|document| document.get_str("newKey").ok()).collect();
    assert_eq!(keys, [Some("N-abc"), Some("N-ABC"), None]);
}

#[tokio::test]
async fn held_answers_are_left_to_a_backfill_and_a_limit_is_kept() {
    let bench = Bench::new().await;
    let uuid = bson::Uuid::from_bytes([7; 16]);
    bench
        .insert([
            doc! {"_id": Bson::Null, "legacyKey": "K1"},
            doc! {"_id": 1, "legacyKey": "K1"},
            doc! {"_id": 2, "legacyKey": "K1"},
            doc! {"_id": 3, "legacyKey": uuid},
            doc! {"_id": 4, "legacyKey": "K4"},
        ])
        .await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.file("keys.csv", dump(["K1".into(), uuid.to_string(), "K4".into()]));
    let run = bench.run("key-map import keys.csv").await.expect_exit(0);
    let entries: Collection<Document> = bench.state.collection(run.text("/collection"));
    entries.update_one(doc! {"_id": "K4"}, doc! {"$set": {"held": true}}).await.expect("an update");
    let run = bench.run(&format!("{FROM_KEY_MAP} --limit 2")).await.expect_exit(0);
    assert!(run.number("/documents/filled") <= 2, "{}", run.stdout);
    let run = bench.run(FROM_KEY_MAP).await.expect_exit(0);
    assert_eq!(run.number("/documents/candidates_left"), 1, "{}", run.stdout);
    assert_eq!(run.number("/job_totals/filled"), 4);
    entries.update_one(doc! {"_id": "K4"}, doc! {"$unset": {"held": ""}}).await.expect("an update");
    let run = bench.run("backfill --tps 1000").await.expect_exit(0);
    run.expect_documents(&[("candidates", 1), ("filled", 1)]);
    run.expect_calls(0);
}

#[tokio::test]
async fn without_a_key_map_or_with_a_running_backfill_it_is_refused() {
    let bench = Bench::with_docs(100).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api).backfill("key_map = false"));
    bench.run(FROM_KEY_MAP).await.expect_exit(2);
    bench.configure(&bench.config(&api));
    let backfill = bench.program("backfill --tps 5").spawn();
    wait_for("calls", async || api.count() > 0).await;
    bench.run(FROM_KEY_MAP).await.expect_exit(3);
    backfill.kill();
    // A dry run counts and touches nothing.
    let run = bench.run(&format!("{FROM_KEY_MAP} --dry-run")).await.expect_exit(0);
    assert_eq!(run.number("/documents/filled"), 0);
}

/// Chunks that have begun are finished; the next ones wait.
#[tokio::test]
async fn it_pauses_and_stops_when_asked() {
    const DOCUMENTS: i32 = 45_000;
    let bench = Bench::with_docs(DOCUMENTS).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.file("keys.csv", dump((1..=DOCUMENTS).map(|id| format!("K{id}"))));
    bench.run("key-map import keys.csv").await.expect_exit(0);
    let updates = FailPoint::reserve(UPDATES);
    let hold = async || {
        let data = doc! {"nss": bench.namespace(DOCS), "shouldCheckForInterrupt": true};
        let entered = updates.set(&bench, "alwaysOn", data).await;
        let run = bench.program(FROM_KEY_MAP).spawn();
        updates.wait_until_entered(&bench, entered + 1).await;
        run
    };
    let job = format!("backfill-{}", bench.namespace(DOCS));
    let run = hold().await;
    bench.run(&format!("control {job} pause")).await.expect_exit(0);
    wait_for("the pause", async || run.stderr().contains("paused")).await;
    updates.off(&bench).await;
    wait_for("the chunks under way", async || bench.filled().await >= 1000).await;
    // Nothing further is filled, once they are done.
    let mut filled = 0;
    wait_for("the end of the chunks under way", async || {
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        let before = std::mem::replace(&mut filled, bench.filled().await);
        before == filled
    })
    .await;
    assert!(filled <= 20_000, "{filled} were filled in spite of the pause");
    bench.run(&format!("control {job} resume")).await.expect_exit(0);
    wait_for("another chunk", async || bench.filled().await > filled).await;
    run.finish().await.expect_exit(0).expect_documents(&[("candidates", 45_000), ("filled", 45_000)]);

    bench.docs().update_many(doc! {}, doc! {"$unset": {"newKey": 1}}).await.expect("an update");
    let run = hold().await;
    bench.run(&format!("control {job} stop")).await.expect_exit(0);
    wait_for("the stop", async || run.stderr().contains("stopping")).await;
    updates.off(&bench).await;
    let run = run.finish().await.expect_exit(143);
    assert!(run.number("/documents/candidates_left") >= 25_000, "{}", run.stdout);
}
