//! A backfill changes key and flag and nothing else, whatever a document holds.

use bson::{RawDocumentBuf, doc};
use futures_util::TryStreamExt as _;
use mongodb::Collection;

use crate::any_document::{document, documents, element, enclose, insert_raw, null, string};
use crate::from_key_map::{FROM_KEY_MAP, dump};
use crate::harness::{Bench, DOCS};
use crate::key_api::KeyApi;
use crate::soak;

const COUNT: usize = 300;

/// The documents of a collection, as bytes in natural order.
async fn stored(bench: &Bench) -> Vec<Vec<u8>> {
    let collection: Collection<RawDocumentBuf> = bench.database.collection(DOCS);
    let cursor = collection.find(doc! {}).sort(doc! {"$natural": 1}).await.expect("a cursor");
    let documents: Vec<RawDocumentBuf> = cursor.try_collect().await.expect("all documents");
    documents.into_iter().map(RawDocumentBuf::into_bytes).collect()
}

async fn started_at(bench: &Bench) -> bson::Bson {
    let status = bench.admin().run_command(doc! {"serverStatus": 1}).await.expect("the server lives");
    status.get("pid").expect("a process").clone()
}

/// The document with its new key behind all other fields.
fn with_key(document: &[u8], key: &str) -> Vec<u8> {
    let fields = &document[4..document.len() - 1];
    enclose(&[fields, &string(b"newKey", key.as_bytes())].concat())
}

/// Whether the number of documents is that of the outcomes.
fn check_account(run: &crate::program::Finished) {
    let of = |name: &str| run.number(&format!("/documents/{name}"));
    let settled = of("filled") + of("flagged") + of("already_filled") + of("changed") + of("failed");
    assert_eq!(of("candidates"), settled, "{}", run.stdout);
    assert_eq!(of("candidates_left"), of("failed"), "{}", run.stdout);
}

async fn fill_any(arguments: &str, with_key_map: bool, seed: u64) {
    let bench = Bench::new().await;
    let mut random = soak::random(seed);
    let key = |number: usize| format!("K{}", number % 50);
    let documents: Vec<Vec<u8>> = (0..COUNT)
        .map(|number| document(&mut random, number, &[string(b"legacyKey", key(number).as_bytes())]))
        .collect();
    insert_raw(&bench.uri, bench.database.name(), DOCS, &documents).await;
    bench.create_index().await;
    let before = stored(&bench).await;
    let server = started_at(&bench).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    if with_key_map {
        bench.file("keys.csv", dump((0..50).map(key)));
        bench.run("key-map import keys.csv").await.expect_exit(0);
    }
    let run = bench.run(arguments).await.expect_exit(1);
    check_account(&run);
    assert_eq!(started_at(&bench).await, server, "the server was started again");
    let mut unchanged = 0;
    for (number, (now, before)) in stored(&bench).await.iter().zip(&before).enumerate() {
        if now == before {
            unchanged += 1;
        } else {
            assert!(*now == with_key(before, &format!("N-{}", key(number))), "document {number}: {now:?}");
        }
    }
    assert_eq!(run.number("/documents/failed"), unchanged, "{}", run.stdout);
    // Each document without a key is named.
    let listed = run.number("/documents/failed_by/unreadable_id");
    assert_eq!(listed, unchanged, "{}", run.stdout);
    let name = format!("backfill-{}", bench.namespace(DOCS));
    let failures: Collection<bson::Document> = bench.state.collection("failures");
    let failures = failures.count_documents(doc! {"job": name}).await.expect("a count");
    assert_eq!(failures, unchanged);
}

#[test]
fn a_seed_draws_the_same_documents_again() {
    assert!(documents(7, 40) == documents(7, 40));
    assert!(documents(7, 40) != documents(8, 40));
}

#[tokio::test]
async fn random_documents_receive_their_keys_and_nothing_else() {
    for round in 0..soak::rounds(1) {
        fill_any("backfill --tps 100000 --chunk 7", false, 41 + round as u64).await;
    }
}

#[tokio::test]
async fn random_documents_are_filled_from_the_key_map_and_not_changed() {
    for round in 0..soak::rounds(1) {
        fill_any(FROM_KEY_MAP, true, 43 + round as u64).await;
    }
}

#[tokio::test]
async fn a_field_that_stands_twice_is_left_alone_and_harms_no_server() {
    let bench = Bench::new().await;
    let legacy = |key: &str| string(b"legacyKey", key.as_bytes());
    let id = |number: u8| element(0x10, b"_id", &[number, 0, 0, 0]);
    let array = |items: &[u8]| element(0x04, b"newKey", &enclose(items));
    let documents = [
        // A key that stands twice, and arrays that count as null.
        [id(1), legacy("A"), null(b"newKey"), string(b"newKey", b"APP")].concat(),
        [id(2), legacy("A"), null(b"newKey"), null(b"newKey")].concat(),
        [id(3), legacy("A"), array(&null(b"0"))].concat(),
        [id(4), legacy("A"), null(b"notFound"), array(&[null(b"0"), null(b"1")].concat())].concat(),
        // What else stands twice is no obstacle.
        [id(5), legacy("A"), legacy("B")].concat(),
        [id(6), string(b"x", b"1"), string(b"x", b"2"), string(b"7", b"n"), legacy("A")].concat(),
        [id(7), string(b"legacyKey", b"not \xFF UTF-8")].concat(),
    ];
    let documents: Vec<Vec<u8>> = documents.iter().map(|fields| enclose(fields)).collect();
    insert_raw(&bench.uri, bench.database.name(), DOCS, &documents).await;
    bench.create_index().await;
    let server = started_at(&bench).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.run("backfill --tps 100000").await.expect_exit(1);
    check_account(&run);
    run.expect_documents(&[("candidates", 7), ("filled", 2), ("failed", 5), ("candidates_left", 5)]);
    assert_eq!(
        run.json["documents"]["failed_by"],
        serde_json::json!({"unwritable_path": 4, "unreadable_key": 1})
    );
    run.expect_calls(1);
    assert_eq!(started_at(&bench).await, server, "the server was started again");
    let mut wanted = documents.clone();
    for filled in [4, 5] {
        wanted[filled] = with_key(&wanted[filled], "N-A");
    }
    assert!(stored(&bench).await == wanted, "{:?}", stored(&bench).await);
}

#[tokio::test]
async fn an_id_that_is_not_utf_8_hides_no_document_behind_it() {
    let bench = Bench::new().await;
    let document = |number: usize| {
        let mut text = format!("id-{number:03}").into_bytes();
        if number == 50 {
            text.push(0xFF);
        }
        enclose(&[string(b"_id", &text), string(b"legacyKey", format!("K{number}").as_bytes())].concat())
    };
    let documents: Vec<Vec<u8>> = (0..201).map(document).collect();
    insert_raw(&bench.uri, bench.database.name(), DOCS, &documents).await;
    bench.create_index().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.run("backfill --tps 100000 --chunk 1").await.expect_exit(1);
    run.expect_documents(&[("candidates", 201), ("filled", 200), ("failed", 1), ("candidates_left", 1)]);
    run.expect_calls(200);
    check_account(&run);
}
