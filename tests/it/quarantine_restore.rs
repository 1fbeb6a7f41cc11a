//! Quarantined documents come back as they were, and never over one that is there.

use bson::{Bson, RawDocumentBuf, Timestamp, doc, rawdoc};
use mongodb::Collection;
use mongorekey::cleanse::restore::{Since, restore_into};
use mongorekey::config::values::{Namespace, Secret};
use mongorekey::job::{Job, JobState};
use mongorekey::mongo::Mongo;
use mongorekey::mongo::feed::Position;
use mongorekey::mongo::quarantine::{LARGEST, Stored, parts_of, wrap};
use mongorekey::mongo::restore::Restore;
use mongorekey::mongo::restore::progress::Restored;
use mongorekey::throttle::pace::Pace;
use tokio_util::sync::CancellationToken;

use crate::cleansing::{
    Bytes, SOURCE, assert_same, bytes, bytes_where, delicate, every_type, ids, insert_raw, store_exactly,
    zero_timestamps,
};
use crate::harness::Bench;

const QUARANTINE: &str = "rejected";
pub const INTO: &str = "into";

async fn mongo(bench: &Bench) -> Mongo {
    let uri = Secret::new(bench.uri.clone());
    Mongo::connect(&uri, bench.state.name()).await.expect("a connection")
}

fn namespace(bench: &Bench, collection: &str) -> Namespace {
    bench.namespace(collection).parse().expect("a namespace")
}

/// Puts all documents of `source` into the quarantine.
async fn quarantine_all(bench: &Bench) {
    let (mut wholes, mut parts_of_all) = (Vec::new(), Vec::new());
    for document in bytes(bench, SOURCE).await.into_values() {
        let document = RawDocumentBuf::from_bytes(document).expect("valid BSON");
        match wrap("rule", &document).expect("a form") {
            Stored::Whole(whole) => wholes.push(whole),
            Stored::InParts { head, parts } => {
                wholes.push(head);
                parts_of_all.extend(parts);
            }
        }
    }
    insert_raw(bench, QUARANTINE, wholes).await;
    if !parts_of_all.is_empty() {
        let parts = parts_of(&namespace(bench, QUARANTINE));
        insert_raw(bench, &parts.collection, parts_of_all).await;
    }
}

/// Puts all of it back.
pub async fn restore(bench: &Bench) -> Restored {
    let mut restored = Restored::default();
    restore_from(bench, &mut restored, false).await;
    assert!(restored.is_complete);
    restored
}

/// Goes on, for one batch or to the end.
async fn restore_from(bench: &Bench, restored: &mut Restored, stops_after_one: bool) {
    let mongo = mongo(bench).await;
    let (from, into) = (namespace(bench, QUARANTINE), namespace(bench, INTO));
    // As a collection that is live: it exists.
    let _exists = bench.database.create_collection(INTO).await;
    let now = Position::Time(mongo.majority_time().await.expect("a moment"));
    let mut since = Since::of(&mongo, &into, &from, "job", now).await.expect("a feed");
    let job = Job::start(&mongo, "job", "restore", &doc! {}).await.expect("a job");
    let lane = job.right(&mongo).lane("restore").await.expect("a lane");
    let mut restore = Restore::new(lane, &from, &into).await.expect("a quarantine");
    let stop = CancellationToken::new();
    let saved = async |_: &Restored, _: &Position| {
        if stops_after_one {
            stop.cancel();
        }
        Ok(())
    };
    restore_into(&mut restore, &mut since, &Pace::new(0), restored, &stop, saved).await.expect("restored");
    job.finish(JobState::Completed, doc! {}).await.expect("given back");
}

fn count(bytes: &Bytes) -> u64 {
    u64::try_from(bytes.len()).expect("small")
}

#[tokio::test]
async fn quarantined_documents_of_all_kinds_come_back_byte_for_byte() {
    let bench = Bench::new().await;
    let mut all = ids(3000);
    all.push(Bson::Null);
    bench.insert_into(SOURCE, (0..).zip(all).map(|(number, id)| every_type(id, number))).await;
    insert_raw(&bench, SOURCE, delicate()).await;
    let mut twice = rawdoc! {"_id": "twice", "a": 1};
    twice.append(bson::cstr!("a"), 3);
    insert_raw(&bench, SOURCE, vec![twice]).await;
    for document in zero_timestamps() {
        store_exactly(&bench, SOURCE, document).await;
    }
    quarantine_all(&bench).await;

    let before = bytes(&bench, SOURCE).await;
    let restored = restore(&bench).await;
    assert_same(&bytes(&bench, INTO).await, &before);
    assert_eq!((restored.restored, restored.kept, restored.refused), (count(&before), 0, 0));
    // Once more changes nothing.
    let again = restore(&bench).await;
    assert_same(&bytes(&bench, INTO).await, &before);
    assert_eq!((again.restored, again.kept), (count(&before), 0));
}

#[tokio::test]
async fn quarantined_documents_of_the_largest_size_and_depth_come_back() {
    let bench = Bench::new().await;
    let zero = Timestamp { time: 0, increment: 0 };
    let empty = rawdoc! {"_id": 1, "s": ""}.as_bytes().len();
    insert_raw(&bench, SOURCE, vec![rawdoc! {"_id": 1, "s": "x".repeat(LARGEST - empty)}]).await;
    store_exactly(&bench, SOURCE, doc! {"_id": 2, "t": zero, "s": "x".repeat(LARGEST - 40)}).await;
    insert_raw(&bench, SOURCE, vec![rawdoc! {"_id": 3, "s": "x".repeat(LARGEST - 100)}]).await;
    insert_raw(&bench, SOURCE, vec![rawdoc! {"_id": 4, "s": "x".repeat(LARGEST / 2)}]).await;
    let mut deep = rawdoc! {"x": 1};
    for _ in 0..178 {
        deep = rawdoc! {"n": deep};
    }
    insert_raw(&bench, SOURCE, vec![rawdoc! {"_id": 5, "d": deep}]).await;
    quarantine_all(&bench).await;

    let restored = restore(&bench).await;
    assert_eq!(restored.restored, 5);
    assert_same(&bytes(&bench, INTO).await, &bytes(&bench, SOURCE).await);
}

#[tokio::test]
async fn what_is_there_already_is_never_overwritten_by_the_quarantine() {
    let bench = Bench::new().await;
    let zero = Timestamp { time: 0, increment: 0 };
    bench.insert_into(SOURCE, (0..500).map(|id| doc! {"_id": id, "v": "old"})).await;
    for id in 500..520 {
        store_exactly(&bench, SOURCE, doc! {"_id": id, "t": zero, "v": "old"}).await;
    }
    quarantine_all(&bench).await;
    // Written by the application since; two of them as bare as a document can be.
    let newer = (0..520).filter(|id| id % 3 == 0).map(|id| rawdoc! {"_id": id, "v": "new", "$odd.name": 1});
    insert_raw(&bench, INTO, newer.collect()).await;
    insert_raw(&bench, INTO, vec![rawdoc! {"_id": 1}, rawdoc! {"_id": 502}]).await;
    let newer = bytes(&bench, INTO).await;

    let restored = restore(&bench).await;
    assert_eq!((restored.restored, restored.kept), (520 - count(&newer), count(&newer)));
    let mut expected = bytes(&bench, SOURCE).await;
    expected.extend(newer);
    assert_same(&bytes(&bench, INTO).await, &expected);
}

#[tokio::test]
async fn quarantined_documents_that_a_unique_index_keeps_out_are_told() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..50).map(|id| doc! {"_id": id, "email": format!("e{id}")})).await;
    quarantine_all(&bench).await;
    let index =
        doc! {"createIndexes": INTO, "indexes": [{"key": {"email": 1}, "name": "email", "unique": true}]};
    bench.database.run_command(index).await.expect("an index");
    // Another document has the value of 7, and 8 is there itself.
    bench
        .insert_into(INTO, [doc! {"_id": 1000, "email": "e7"}, doc! {"_id": 8, "email": "e8", "v": 1}])
        .await;

    let restored = restore(&bench).await;
    assert_eq!((restored.restored, restored.kept, restored.refused), (48, 1, 1));
    assert_eq!(restored.kept_ids, [Bson::Int32(8)]);
    let refusal = &restored.refusals[0];
    assert!(refusal.id == Bson::Int32(7) && refusal.reason.contains("email"), "{refusal:?}");
}

#[tokio::test]
async fn quarantined_documents_come_back_past_a_validator() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..50).map(|id| doc! {"_id": id, "v": id % 2})).await;
    quarantine_all(&bench).await;
    bench.database.run_command(doc! {"create": INTO, "validator": {"v": 1}}).await.expect("a collection");

    assert_eq!(restore(&bench).await.restored, 50);
    assert_same(&bytes(&bench, INTO).await, &bytes(&bench, SOURCE).await);
}

#[tokio::test]
async fn a_restoration_goes_on_from_where_it_was_stopped() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, ids(2500).into_iter().map(|id| doc! {"_id": id})).await;
    quarantine_all(&bench).await;
    let mut restored = Restored::default();
    restore_from(&bench, &mut restored, true).await;
    assert!(!restored.is_complete && restored.restored == 1000, "{restored:?}");
    // What the application deletes meanwhile does not come back.
    let into: Collection<bson::Document> = bench.database.collection(INTO);
    let gone = into.find_one(doc! {}).await.expect("a read").expect("a document");
    into.delete_one(gone.clone()).await.expect("a write");

    restore_from(&bench, &mut restored, false).await;
    assert!(restored.is_complete && restored.kept == 0, "{restored:?}");
    let mut expected = bytes(&bench, SOURCE).await;
    for key in bytes_where(&bench, SOURCE, gone).await.keys() {
        expected.remove(key);
    }
    assert_same(&bytes(&bench, INTO).await, &expected);
}
