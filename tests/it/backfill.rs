//! What a backfill reaches, and what it asks for.

use bson::{Bson, doc, oid::ObjectId};
use serde_json::json;

use crate::harness::{Bench, DOCS};
use crate::key_api::{KeyApi, Reply};

/// A second's worth of these is more than any test has.
const FAST: &str = "backfill --tps 100000";

#[tokio::test]
async fn every_type_of_id_is_reached() {
    let bench = Bench::new().await;
    let mut ids: Vec<Bson> = Vec::new();
    for number in 0..2000_i32 {
        let uuid = bson::Uuid::from_bytes(u128::from(number.unsigned_abs()).to_be_bytes());
        ids.push(
            ObjectId::from_bytes([
                u8::try_from(number % 251).expect("small"),
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                1,
                u8::try_from(number / 256).expect("small"),
                u8::try_from(number % 256).expect("small"),
            ])
            .into(),
        );
        ids.push(if number % 2 == 0 { number.into() } else { (i64::from(number) << 32).into() });
        ids.push(format!("id-{number}").into());
        ids.push(uuid.into());
        ids.push(doc! {"year": 2000 + number % 20, "number": number}.into());
        ids.push(bson::DateTime::from_millis(i64::from(number) * 86_400_000).into());
    }
    ids.extend([
        Bson::Double(0.5),
        Bson::Double(-1e300),
        Bson::Double(f64::NAN),
        Bson::Double(f64::INFINITY),
    ]);
    ids.extend([Bson::Null, Bson::Boolean(true), Bson::Boolean(false), Bson::MinKey, Bson::MaxKey]);
    ids.push("3.25".parse::<bson::Decimal128>().expect("a decimal").into());
    ids.push("$weird".into());
    ids.push(String::new().into());
    ids.push(doc! {}.into());
    ids.push(doc! {"a": Bson::Null}.into());
    ids.push(bson::Timestamp { time: 5, increment: 6 }.into());
    let count = ids.len();
    bench
        .insert(
            ids.into_iter().enumerate().map(|(index, id)| doc! {"_id": id, "legacyKey": format!("K{index}")}),
        )
        .await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let count = u64::try_from(count).expect("small");

    let run = bench.run(&format!("{FAST} --chunk 97")).await.expect_exit(0);
    run.expect_documents(&[("candidates", count), ("filled", count)]);
    run.expect_calls(count);
    for document in bench.documents(DOCS).await {
        let legacy = document.get_str("legacyKey").expect("kept");
        assert_eq!(document.get_str("newKey").ok(), Some(&*format!("N-{legacy}")), "{document}");
    }
}

#[tokio::test]
async fn one_call_answers_every_document_of_a_key_over_many_chunks() {
    let bench = Bench::new().await;
    // The documents of a key lie far apart.
    bench.insert((0..1000).map(|id| doc! {"_id": id, "legacyKey": format!("K{}", id % 100)})).await;
    bench.create_index().await;
    let api = KeyApi::start(|call| Reply::found(call).after(std::time::Duration::from_millis(40)));
    bench.configure(&bench.config(&api));

    let run = bench.run(&format!("{FAST} --chunk 7 --concurrency 16")).await.expect_exit(0);
    run.expect_documents(&[("candidates", 1000), ("filled", 1000)]);
    run.expect_calls(100);
    assert_eq!(api.count(), 100);
    assert!(api.most_in_flight() <= 16);
    for document in bench.documents(DOCS).await {
        let legacy = document.get_str("legacyKey").expect("kept");
        assert_eq!(document.get_str("newKey").ok(), Some(&*format!("N-{legacy}")), "{document}");
    }
}

#[tokio::test]
async fn equal_numbers_and_their_text_are_one_key() {
    let bench = Bench::new().await;
    let values: [Bson; 5] = [42_i32.into(), 42_i64.into(), 42.0.into(), "42".into(), (-0.0).into()];
    bench
        .insert(values.into_iter().enumerate().map(|(index, value)| {
            doc! {"_id": i64::try_from(index).expect("small"), "legacyKey": value}
        }))
        .await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));

    bench.run(FAST).await.expect_exit(0).expect_calls(2);
    let asked = api.asked();
    assert_eq!(asked.get("42"), Some(&1));
    assert_eq!(asked.get("0"), Some(&1));
    assert_eq!(bench.count(doc! {"newKey": "N-42"}).await, 4);
}

#[tokio::test]
async fn keys_arrive_as_they_are() {
    let keys = [
        "a b",
        "a/b",
        "a?b",
        "100%",
        "%2F",
        "%",
        "😀",
        "홍길동",
        "a+b",
        "a&b=c",
        "#1",
        "\"quoted\"",
        "'",
        "a\\b",
        " leading",
        "trailing ",
        "..a",
        "...",
        "./x",
        "{key}",
        "line\nbreak",
        "tab\t",
        ";",
        ":",
        "@",
        "\u{e9}",
        "e\u{301}",
        "a//b",
        "[x]",
        "\u{7f}",
        "<a>",
    ];
    let bench = Bench::new().await;
    bench.insert(keys.iter().map(|key| doc! {"legacyKey": *key})).await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api).key_api("echo_pointer = '/legacyKey'"));

    let run = bench.run(FAST).await.expect_exit(0);
    run.expect_calls(u64::try_from(keys.len()).expect("small"));
    for key in keys {
        assert_eq!(api.asked().get(key), Some(&1), "{key:?}");
        assert_eq!(bench.count(doc! {"legacyKey": key, "newKey": format!("N-{key}")}).await, 1, "{key:?}");
    }
}

#[tokio::test]
async fn dots_that_a_url_would_swallow_fail_without_a_call() {
    let bench = Bench::new().await;
    bench.insert([".", "..", "K1"].map(|key| doc! {"_id": key, "legacyKey": key})).await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));

    let run = bench.run(FAST).await.expect_exit(1);
    run.expect_documents(&[("candidates", 3), ("filled", 1), ("failed", 2), ("candidates_left", 2)]);
    assert_eq!(run.json["documents"]["failed_by"], json!({"unsendable_key": 2}));
    assert_eq!(run.text("/status"), "incomplete");
    run.expect_calls(1);
    assert_eq!(bench.documents(DOCS).await[0], doc! {"_id": ".", "legacyKey": "."});
}
