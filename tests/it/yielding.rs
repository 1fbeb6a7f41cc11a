//! Writes that yield: whatever anybody has written since the moment that they are as of, they do
//! nothing, as a whole.

use bson::{Document, RawBson, RawDocumentBuf, Timestamp, doc, rawdoc};
use mongodb::options::IndexOptions;
use mongodb::{Collection, IndexModel};
use mongorekey::config::values::Secret;
use mongorekey::job::Job;
use mongorekey::mongo::Mongo;
use mongorekey::mongo::yielding::{Yielded, Yielding};

use crate::cleansing::{TARGET, bytes};
use crate::harness::Bench;

struct Yard {
    bench: Bench,
    mongo: Mongo,
    /// Gives the right to write as long as it is held.
    _job: Job,
    writer: Yielding,
    theirs: Collection<Document>,
}

impl Yard {
    async fn new() -> Self {
        let bench = Bench::new().await;
        bench.insert_into(TARGET, (0..5).map(|id| doc! {"_id": id, "slot": id})).await;
        let mongo = Mongo::connect(&Secret::new(bench.uri.clone()), bench.state.name()).await;
        let mongo = mongo.expect("a connection");
        let namespace = bench.namespace(TARGET).parse().expect("a namespace");
        let job = Job::start(&mongo, "job", "write", &doc! {}).await.expect("a job");
        let lane = job.right(&mongo).lane("writer").await.expect("a lane");
        let writer = Yielding::to(lane, &namespace);
        let theirs = bench.database.collection(TARGET);
        Self { bench, mongo, _job: job, writer, theirs }
    }

    async fn now(&self) -> Timestamp {
        self.mongo.last_write_time().await.expect("a time")
    }

    async fn write(&mut self, at: Timestamp, removed: &[i32], written: &[RawDocumentBuf]) -> Yielded {
        let removed: Vec<RawBson> = removed.iter().map(|id| RawBson::Int32(*id)).collect();
        self.writer.write(at, &removed, written).await.expect("an answer")
    }

    /// Somebody writes, and of ours nothing is left: neither of that document nor of the others.
    async fn expect_newer(&mut self, ours: RawDocumentBuf, theirs: impl AsyncFnOnce(&Collection<Document>)) {
        let at = self.now().await;
        theirs(&self.theirs).await;
        let before = bytes(&self.bench, TARGET).await;
        let other = rawdoc! {"_id": 4, "slot": 4, "by": "us"};
        assert_eq!(self.write(at, &[3], &[other.clone(), ours.clone()]).await, Yielded::Newer);
        assert_eq!(bytes(&self.bench, TARGET).await, before);
        let at = self.now().await;
        assert!(matches!(self.write(at, &[], &[ours]).await, Yielded::Done(_)), "nothing newer than that");
    }
}

#[tokio::test]
async fn it_yields_to_whatever_is_newer() {
    let mut yard = Yard::new().await;
    yard.expect_newer(rawdoc! {"_id": 0, "slot": 0, "by": "us"}, async |theirs| {
        theirs.update_one(doc! {"_id": 0}, doc! {"$set": {"by": "them"}}).await.expect("a write");
    })
    .await;
    yard.expect_newer(rawdoc! {"_id": 1, "slot": 1, "by": "us"}, async |theirs| {
        theirs.delete_one(doc! {"_id": 1}).await.expect("a write");
    })
    .await;
    yard.expect_newer(rawdoc! {"_id": 9, "slot": 9, "by": "us"}, async |theirs| {
        theirs.insert_one(doc! {"_id": 9, "by": "them"}).await.expect("a write");
    })
    .await;
}

#[tokio::test]
async fn a_delete_yields_too() {
    let mut yard = Yard::new().await;
    let at = yard.now().await;
    yard.theirs.update_one(doc! {"_id": 2}, doc! {"$set": {"by": "them"}}).await.expect("a write");
    assert_eq!(yard.write(at, &[2], &[]).await, Yielded::Newer);
    assert_eq!(bytes(&yard.bench, TARGET).await.len(), 5);
}

#[tokio::test]
async fn values_change_places_at_once_and_what_is_taken_is_told() {
    let mut yard = Yard::new().await;
    let options = IndexOptions::builder().unique(true).build();
    let index = IndexModel::builder().keys(doc! {"slot": 1}).options(options).build();
    yard.theirs.create_index(index).await.expect("an index");
    let swapped = [rawdoc! {"_id": 0, "slot": 1}, rawdoc! {"_id": 1, "slot": 0}];
    let at = yard.now().await;
    let taken = Yielded::Taken { index: 0, values: doc! {"slot": 1} };
    assert_eq!(yard.write(at, &[], &swapped).await, taken);
    let at = yard.now().await;
    assert!(matches!(yard.write(at, &[0, 1], &swapped).await, Yielded::Done(_)));
    let found = yard.theirs.find_one(doc! {"_id": 0}).await.expect("an answer").expect("it is there");
    assert_eq!(found, doc! {"_id": 0, "slot": 1});
}
