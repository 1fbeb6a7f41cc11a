//! What may stand in the fields: paths, types, collations, writes that are refused.

use bson::{Binary, Bson, Document, doc, spec::BinarySubtype};
use serde_json::json;

use crate::harness::{Bench, DOCS};
use crate::key_api::{KeyApi, Reply};

const FAST: &str = "backfill --tps 100000";

#[tokio::test]
async fn dotted_paths_are_written_where_their_parents_allow_it() {
    let bench = Bench::new().await;
    let documents = [
        ("missing", doc! {}),
        ("empty", doc! {"ids": {}}),
        ("other", doc! {"ids": {"other": 1, "new": {"x.y": 2}}}),
        ("null", doc! {"ids": Bson::Null}),
        ("inner-null", doc! {"ids": {"new": Bson::Null}}),
        ("scalar", doc! {"ids": 5}),
        ("text", doc! {"ids": {"new": "text"}}),
        ("array", doc! {"ids": [{"new": {}}]}),
        ("inner-array", doc! {"ids": {"new": [{"a": 1}]}}),
    ];
    bench
        .insert(documents.iter().map(|(name, rest)| {
            let mut document = doc! {"_id": *name, "old": {"key": format!("K-{name}")}};
            document.extend(rest.clone());
            document
        }))
        .await;
    let before = bench.documents(DOCS).await;
    let api = KeyApi::finding();
    let config = bench.config(&api).no_targets().target(
        "docs",
        &bench.namespace(DOCS),
        ["old.key", "ids.new.key", "ids.flag.of.it"],
    );
    bench.configure(&config);
    bench.run("index create").await.expect_exit(0);

    let run = bench.run(FAST).await.expect_exit(1);
    run.expect_documents(&[("candidates", 9), ("filled", 3), ("failed", 6), ("candidates_left", 6)]);
    assert_eq!(run.json["documents"]["failed_by"], json!({"unwritable_path": 6}));
    run.expect_calls(3);
    for (document, original) in bench.documents(DOCS).await.into_iter().zip(before) {
        let wanted = match document.get_str("_id").expect("a name") {
            "missing" | "empty" => doc! {"new": {"key": format!("N-K-{}", text(&document, "_id"))}},
            "other" => doc! {"other": 1, "new": {"x.y": 2, "key": "N-K-other"}},
            _ => {
                assert_eq!(document, original);
                continue;
            }
        };
        assert_eq!(document.get_document("ids").ok(), Some(&wanted), "{document}");
    }
}

#[tokio::test]
async fn a_dotted_flag_is_written_too() {
    let bench = Bench::new().await;
    bench.insert([doc! {"_id": 1, "old": {"key": 7}, "meta": {"a": 1}}, doc! {"_id": 2, "old": 7}]).await;
    let api = KeyApi::start(|_| Reply::not_found());
    let config = bench.config(&api).no_targets().target(
        "docs",
        &bench.namespace(DOCS),
        ["old.key", "newKey", "meta.flag"],
    );
    bench.configure(&config);
    bench.run("index create").await.expect_exit(0);
    bench.run(FAST).await.expect_exit(0).expect_documents(&[("candidates", 2), ("flagged", 2)]);
    assert_eq!(bench.count(doc! {"meta.flag.reason": "not_found", "meta.a": 1}).await, 1);
    assert_eq!(bench.count(doc! {"_id": 2, "meta.flag.reason": "no_legacy_key"}).await, 1);
}

#[tokio::test]
async fn every_type_of_legacy_value_is_asked_for_or_flagged() {
    let id = bson::oid::ObjectId::parse_str("507f1f77bcf86cd799439011").expect("an id");
    let uuid = bson::Uuid::parse_str("00112233-4455-6677-8899-aabbccddeeff").expect("a uuid");
    let decimal = |text: &str| Bson::from(text.parse::<bson::Decimal128>().expect("a decimal"));
    let usable: Vec<(Bson, &str)> = vec![
        ("K1".into(), "K1"),
        (" ".into(), " "),
        (i64::MAX.into(), "9223372036854775807"),
        ((-7).into(), "-7"),
        (1e15.into(), "1000000000000000"),
        (decimal("5.0"), "5.0"),
        (id.into(), "507f1f77bcf86cd799439011"),
        (uuid.into(), "00112233-4455-6677-8899-aabbccddeeff"),
        ("a\u{0}b".into(), "a\u{0}b"),
    ];
    let binary = |subtype, length| Bson::from(Binary { subtype, bytes: vec![1; length] });
    let unusable: Vec<Bson> = vec![
        Bson::Null,
        "".into(),
        true.into(),
        1.5.into(),
        f64::NAN.into(),
        f64::INFINITY.into(),
        9_007_199_254_740_992.0.into(),
        decimal("NaN"),
        decimal("Infinity"),
        vec![Bson::from("K1"), Bson::from("K2")].into(),
        Bson::Array(Vec::new()),
        doc! {"K1": 1}.into(),
        bson::DateTime::from_millis(0).into(),
        bson::Timestamp { time: 1, increment: 1 }.into(),
        bson::Regex { pattern: "K1".try_into().expect("no zero"), options: "".try_into().expect("no zero") }
            .into(),
        binary(BinarySubtype::Generic, 16),
        binary(BinarySubtype::UuidOld, 16),
        binary(BinarySubtype::Generic, 3),
        binary(BinarySubtype::Generic, 100_000),
        Bson::MinKey,
        Bson::MaxKey,
    ];
    let bench = Bench::new().await;
    bench.insert(usable.iter().map(|(value, text)| doc! {"legacyKey": value, "is": *text})).await;
    bench.insert(unusable.iter().map(|value| doc! {"legacyKey": value})).await;
    bench.insert([doc! {}]).await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));

    let (usables, unusables) = (count(&usable), count(&unusable) + 1);
    let plan = bench.run("plan").await.expect_exit(0);
    assert_eq!(plan.number("/targets/0/candidates"), usables + unusables);
    assert_eq!(plan.number("/targets/0/distinct_keys"), usables);
    assert_eq!(plan.number("/calls"), usables);
    let planned = plan.json["targets"][0]["unusable"].as_object().expect("an object");
    assert_eq!(planned.values().filter_map(serde_json::Value::as_u64).sum::<u64>(), unusables, "{planned:?}");

    let run = bench.run(FAST).await.expect_exit(0);
    run.expect_documents(&[("candidates", usables + unusables), ("filled", usables), ("flagged", unusables)]);
    run.expect_calls(usables);
    for (_, text) in usable {
        let filled = bench.count(doc! {"is": text, "newKey": format!("N-{text}")}).await;
        assert_eq!((api.asked().get(text), filled), (Some(&1), 1), "{text:?}");
    }
    assert_eq!(bench.count(doc! {"newKeyFlag.reason": "no_legacy_key"}).await, unusables);
}

#[tokio::test]
async fn an_explicit_null_is_a_candidate_and_another_value_is_not() {
    let bench = Bench::new().await;
    bench
        .insert([
            doc! {"_id": 1, "legacyKey": "K1", "newKey": Bson::Null, "newKeyFlag": Bson::Null},
            doc! {"_id": 2, "legacyKey": "K2", "newKey": Bson::Null},
            doc! {"_id": 3, "legacyKey": "K3", "newKey": ""},
            doc! {"_id": 4, "legacyKey": "K4", "newKeyFlag": false},
            doc! {"_id": 5, "legacyKey": "K5", "newKey": []},
        ])
        .await;
    let untouched: Vec<Document> = bench.documents(DOCS).await.split_off(2);
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.run(FAST).await.expect_exit(0).expect_documents(&[("candidates", 2), ("filled", 2)]);
    let after = bench.documents(DOCS).await;
    let filled = doc! {"_id": 1, "legacyKey": "K1", "newKey": "N-K1", "newKeyFlag": Bson::Null};
    assert_eq!(after[0], filled);
    assert_eq!(after[2..], untouched);
}

#[tokio::test]
async fn a_filter_of_the_target_limits_what_is_filled() {
    let bench = Bench::with_docs(50).await;
    let api = KeyApi::finding();
    bench.configure(
        &bench.config(&api).target_line("filter = '{\"_id\": {\"$gt\": {\"$numberInt\": \"40\"}}}'"),
    );
    let run = bench.run(&format!("{FAST} --chunk 3")).await.expect_exit(0);
    run.expect_documents(&[("candidates", 10), ("filled", 10)]);
    assert_eq!(bench.count(doc! {"_id": {"$lte": 40}, "newKey": Bson::Null}).await, 40);
}

#[tokio::test]
async fn one_refused_write_is_a_failure_of_its_document() {
    let bench = Bench::new().await;
    let validator = doc! {"newKey": {"$not": {"$regex": "bad$"}}};
    bench.database.run_command(doc! {"create": DOCS, "validator": validator}).await.expect("a collection");
    bench
        .insert((0..60).map(|id| {
            let suffix = if id % 15 == 7 { "bad" } else { "good" };
            doc! {"_id": id, "legacyKey": format!("{id}-{suffix}")}
        }))
        .await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.run(FAST).await.expect_exit(1);
    run.expect_documents(&[("candidates", 60), ("filled", 56), ("failed", 4), ("candidates_left", 4)]);
    assert_eq!(run.json["documents"]["failed_by"], json!({"write_refused": 4}));

    // The key map has the answers: the next run needs no call.
    bench.database.run_command(doc! {"collMod": DOCS, "validator": {}}).await.expect("no validator");
    let again = bench.run(FAST).await.expect_exit(0);
    again.expect_documents(&[("candidates", 4), ("filled", 4)]);
    again.expect_calls(0);
}

#[tokio::test]
async fn a_run_of_refused_writes_stops_the_calls() {
    let bench = Bench::new().await;
    let validator = doc! {"newKey": {"$exists": false}};
    bench.database.run_command(doc! {"create": DOCS, "validator": validator}).await.expect("a collection");
    bench.insert((0..2000).map(|id| doc! {"_id": id, "legacyKey": format!("K{id}")})).await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.run("backfill --tps 1000 --concurrency 4").await.expect_exit(4);
    assert_eq!(run.text("/status"), "stopped");
    assert!(run.text("/error/message").contains("121"), "{}", run.stdout);
    assert!(api.count() < 200, "{} calls were spent", api.count());
    assert_eq!(run.number("/documents/candidates_left"), 2000);
}

#[tokio::test]
async fn a_unique_index_refuses_the_second_document_only() {
    let bench = Bench::with_docs(10).await;
    let unique = doc! {"key": {"newKey": 1}, "name": "unique", "unique": true, "sparse": true};
    bench.database.run_command(doc! {"createIndexes": DOCS, "indexes": [unique]}).await.expect("an index");
    let api = KeyApi::start(|call| {
        let same = matches!(&*call.key, "K3" | "K7");
        if same { Reply::key(call, "N-same") } else { Reply::found(call) }
    });
    bench.configure(&bench.config(&api));
    let run = bench.run(FAST).await.expect_exit(1);
    run.expect_documents(&[("candidates", 10), ("filled", 9), ("failed", 1), ("candidates_left", 1)]);
    assert_eq!(run.json["documents"]["failed_by"], json!({"write_refused": 1}));
}

fn text<'a>(document: &'a Document, field: &str) -> &'a str {
    document.get_str(field).unwrap_or_else(|_| panic!("no {field} in {document}"))
}

fn count<T>(items: &[T]) -> u64 {
    u64::try_from(items.len()).expect("small")
}
