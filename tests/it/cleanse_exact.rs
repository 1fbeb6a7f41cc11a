//! What is brought up to date is afterwards exactly what the source holds, whatever stood there before.

use bson::{Document, RawBson, doc, rawdoc};
use mongodb::Collection;
use mongorekey::cleanse::marks::Marks;
use mongorekey::config::values::Secret;
use mongorekey::mongo::Mongo;

use crate::cleansing::{SOURCE, TARGET, assert_same, bytes, configure, insert_raw, job_name};
use crate::harness::Bench;
use crate::quarantine::COMMAND;

/// The server ends itself where it is to compute the difference of two versions of which one has a
/// field twice.
#[tokio::test]
async fn a_field_that_stands_twice_is_brought_along_and_the_server_lives() {
    let bench = Bench::new().await;
    configure(&bench, "keep = '{\"valid\": true}'");
    let pad = "x".repeat(300);
    let mut documents = Vec::new();
    for id in 0..8 {
        let mut document = rawdoc! {"_id": id, "valid": true, "pad": pad.as_str(), "x": 1};
        document.append(bson::cstr!("x"), 2);
        let mut nested = rawdoc! {"y": 1};
        nested.append(bson::cstr!("y"), 2);
        document.append(bson::cstr!("list"), bson::RawArrayBuf::from_iter([nested]));
        documents.push(document);
    }
    insert_raw(&bench, SOURCE, documents).await;
    bench.run(COMMAND).await.expect_exit(0);
    assert_same(&bytes(&bench, SOURCE).await, &bytes(&bench, TARGET).await);

    let source: Collection<Document> = bench.database.collection(SOURCE);
    let change = async |id: i32, change: Document| {
        source.update_one(doc! {"_id": id}, change).await.expect("a change by the application");
    };
    change(0, doc! {"$unset": {"x": 1}}).await;
    change(1, doc! {"$set": {"pad": "y"}}).await;
    change(2, doc! {"$unset": {"x": 1, "list": 1}}).await;
    // To the quarantine, and back again later.
    change(3, doc! {"$set": {"valid": false}}).await;
    bench.run(COMMAND).await.expect_exit(0);
    change(3, doc! {"$set": {"valid": true}, "$unset": {"x": 1}}).await;
    bench.run(COMMAND).await.expect_exit(0);
    assert_same(&bytes(&bench, SOURCE).await, &bytes(&bench, TARGET).await);
}

/// Under a collation an `_id` that comes back in another spelling is equal and not the same.
#[tokio::test]
async fn ids_that_come_back_in_another_spelling_are_brought_along() {
    let bench = Bench::new().await;
    configure(&bench, "keep = '{\"valid\": true}'");
    let create = doc! {"create": SOURCE, "collation": {"locale": "en", "strength": 2}};
    bench.database.run_command(create).await.expect("a collection");
    let documents = (0..200).map(|id| doc! {"_id": format!("a{id}"), "valid": true});
    bench.insert_into(SOURCE, documents).await;
    bench.run("cleanse").await.expect_exit(0);
    let source: Collection<Document> = bench.database.collection(SOURCE);
    for id in 0..100 {
        source.delete_one(doc! {"_id": format!("a{id}")}).await.expect("deleted");
        source.insert_one(doc! {"_id": format!("A{id}"), "valid": true, "new": 1}).await.expect("inserted");
    }
    // As a copy that was interrupted leaves them: the new spelling comes first, and by itself.
    let mongo = Mongo::connect(&Secret::new(bench.uri.clone()), bench.state.name()).await.expect("connected");
    let marked: Vec<RawBson> = (0..50).map(|id| RawBson::String(format!("A{id}"))).collect();
    Marks::of(&mongo, &job_name(&bench)).set(&marked).await.expect("marked");
    bench.run("cleanse").await.expect_exit(0);
    assert_same(&bytes(&bench, SOURCE).await, &bytes(&bench, TARGET).await);
}
