//! What a cleanse copies: every document that it keeps, byte for byte.

use bson::{Bson, RawDocumentBuf, Timestamp, doc, rawdoc};
use mongodb::Collection;

use crate::cleansing::{
    SOURCE, TARGET, assert_same, bytes, bytes_where, configure, delicate, every_type, ids, insert_raw,
    store_exactly, zero_timestamps,
};
use crate::harness::Bench;
use crate::program::Finished;

/// The largest document that a server accepts.
const LARGEST: usize = 16 * 1024 * 1024;

fn expect_counts(run: &Finished, source: usize, copied: usize) {
    let (source, copied) = (u64::try_from(source).expect("small"), u64::try_from(copied).expect("small"));
    let expected = [("source", source), ("kept", copied), ("copied", copied), ("rejected", source - copied)];
    for (name, count) in expected {
        assert_eq!(run.number(&format!("/documents/{name}")), count, "{name} in {}", run.stdout);
    }
}

#[tokio::test]
async fn documents_of_all_types_under_ids_of_all_types_arrive_byte_for_byte() {
    let bench = Bench::new().await;
    let ids = ids(12_000);
    let count = ids.len();
    bench.insert_into(SOURCE, (0..).zip(ids).map(|(number, id)| every_type(id, number))).await;
    configure(&bench, "");

    let run = bench.run("cleanse").await.expect_exit(0);
    expect_counts(&run, count, count);
    let copied = bytes(&bench, TARGET).await;
    assert_eq!(copied.len(), count);
    assert_same(&copied, &bytes(&bench, SOURCE).await);
}

#[tokio::test]
async fn more_ranges_at_once_copy_the_same() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, ids(2000).into_iter().map(|id| doc! {"_id": id})).await;
    configure(&bench, "");

    bench.run("cleanse --parallel 16").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
}

#[tokio::test]
async fn rules_decide_for_ids_of_all_types() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..).zip(ids(3000)).map(|(number, id)| every_type(id, number))).await;
    configure(
        &bench,
        "keep = '{\"bool\": true}'\nreject = [{ name = \"low\", when = '{\"int\": {\"$lt\": 500}}' }]",
    );

    bench.run("cleanse").await.expect_exit(0);
    let valid = bytes_where(&bench, SOURCE, doc! {"bool": true, "int": {"$gte": 500}}).await;
    assert!(valid.len() > 1000);
    assert_same(&bytes(&bench, TARGET).await, &valid);
}

#[tokio::test]
async fn names_with_dots_and_dollars_and_zero_timestamps_are_not_interpreted() {
    let bench = Bench::new().await;
    insert_raw(&bench, SOURCE, delicate()).await;
    for document in zero_timestamps() {
        store_exactly(&bench, SOURCE, document).await;
    }
    let before = bytes(&bench, SOURCE).await;
    configure(&bench, "");

    bench.run("cleanse").await.expect_exit(0);
    let copied = bytes(&bench, TARGET).await;
    assert_eq!(copied.len(), delicate().len() + zero_timestamps().len());
    assert_same(&copied, &before);
    assert_same(&bytes(&bench, SOURCE).await, &before);
}

#[tokio::test]
async fn a_field_name_that_occurs_twice_stays_twice() {
    let bench = Bench::new().await;
    let mut twice = rawdoc! {"_id": 1};
    twice.append(bson::cstr!("a"), 1);
    twice.append(bson::cstr!("b"), 2);
    twice.append(bson::cstr!("a"), 3);
    insert_raw(&bench, SOURCE, vec![twice]).await;
    configure(&bench, "");

    bench.run("cleanse").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
}

#[tokio::test]
async fn the_largest_documents_are_copied() {
    let bench = Bench::new().await;
    let empty = rawdoc! {"_id": 1, "s": ""}.as_bytes().len();
    let large: RawDocumentBuf = rawdoc! {"_id": 1, "s": "x".repeat(LARGEST - empty)};
    assert_eq!(large.as_bytes().len(), LARGEST);
    insert_raw(&bench, SOURCE, vec![large]).await;
    insert_raw(&bench, SOURCE, (2..50).map(|id| rawdoc! {"_id": id}).collect()).await;
    configure(&bench, "");

    let run = bench.run("cleanse").await.expect_exit(0);
    expect_counts(&run, 49, 49);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
}

#[tokio::test]
async fn a_large_document_with_a_zero_timestamp_is_copied() {
    let bench = Bench::new().await;
    let zero = Timestamp { time: 0, increment: 0 };
    store_exactly(&bench, SOURCE, doc! {"_id": 1, "t": zero, "s": "x".repeat(LARGEST - 1000)}).await;
    configure(&bench, "");

    bench.run("cleanse").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
}

#[tokio::test]
async fn many_zero_timestamps_are_copied() {
    let bench = Bench::new().await;
    let count = 350;
    let collection: Collection<bson::Document> = bench.database.collection(SOURCE);
    bench.insert_into(SOURCE, (0..count).map(|id| doc! {"_id": id, "n": id % 7})).await;
    let zero = doc! {"$set": {"t": {"$literal": Timestamp { time: 0, increment: 0 }}}};
    collection.update_many(doc! {}, vec![zero]).await.expect("timestamps are set");
    assert_eq!(bytes_where(&bench, SOURCE, doc! {"t": Timestamp { time: 0, increment: 0 }}).await.len(), 350);
    configure(&bench, "keep = '{\"n\": {\"$gt\": 2}}'");

    let run = bench.run("cleanse").await.expect_exit(0);
    let valid = bytes_where(&bench, SOURCE, doc! {"n": {"$gt": 2}}).await;
    expect_counts(&run, 350, valid.len());
    assert_same(&bytes(&bench, TARGET).await, &valid);
}

#[tokio::test]
async fn an_empty_collection_becomes_an_empty_target() {
    let bench = Bench::new().await;
    bench.database.create_collection(SOURCE).await.expect("a collection");
    configure(&bench, "");

    let run = bench.run("cleanse").await.expect_exit(0);
    expect_counts(&run, 0, 0);
    let names = bench.database.list_collection_names().await.expect("names");
    assert!(names.iter().any(|name| name == TARGET), "{names:?}");
}

#[tokio::test]
async fn a_single_document_is_copied_whatever_its_id() {
    for id in [Bson::Int32(1), Bson::MinKey, Bson::MaxKey, Bson::Double(f64::NAN)] {
        let bench = Bench::new().await;
        bench.insert_into(SOURCE, [doc! {"_id": id, "a": 1}]).await;
        configure(&bench, "");

        let run = bench.run("cleanse").await.expect_exit(0);
        expect_counts(&run, 1, 1);
        assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
    }
}

#[tokio::test]
async fn rules_that_no_document_passes_leave_the_target_empty() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..500).map(|id| doc! {"_id": id})).await;
    configure(&bench, "keep = '{\"a\": 1}'");

    let run = bench.run("cleanse").await.expect_exit(0);
    expect_counts(&run, 500, 0);
    assert!(bytes(&bench, TARGET).await.is_empty());
}

#[tokio::test]
async fn a_document_that_is_nothing_but_our_mark_survives() {
    let bench = Bench::new().await;
    insert_raw(&bench, SOURCE, vec![rawdoc! {"_id": 1, "__mongorekey_pending": true}, rawdoc! {"_id": 2}])
        .await;
    configure(&bench, "");

    bench.run("cleanse").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
}

#[tokio::test]
async fn a_document_whose_id_is_null_is_copied() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, ids(300).into_iter().map(|id| doc! {"_id": id})).await;
    bench.insert_into(SOURCE, [doc! {"_id": Bson::Null, "a": 1}]).await;
    configure(&bench, "");

    bench.run("cleanse").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
}
