//! The target of a cleanse has the options and the indexes of its source.

use bson::{Document, Timestamp, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;
use serde_json::json;

use crate::cleansing::{SOURCE, TARGET, assert_same, bytes, configure};
use crate::harness::Bench;

async fn create(bench: &Bench, options: Document) {
    let mut command = doc! {"create": SOURCE};
    command.extend(options);
    bench.database.run_command(command).await.expect("the source is created");
}

async fn create_indexes(bench: &Bench, indexes: Vec<Document>) {
    let command = doc! {"createIndexes": SOURCE, "indexes": indexes};
    bench.database.run_command(command).await.expect("the indexes are created");
}

async fn options(bench: &Bench, collection: &str) -> Document {
    let list = doc! {"listCollections": 1, "filter": {"name": collection}};
    let found: Vec<Document> =
        bench.database.run_cursor_command(list).await.expect("a list").try_collect().await.expect("entries");
    let mut options =
        found.first().expect("the collection").get_document("options").expect("options").clone();
    if options.contains_key("validator") {
        // The server stores the defaults only where they were spelt out.
        for (name, default) in [("validationLevel", "strict"), ("validationAction", "error")] {
            options.entry(name).or_insert_with(|| default.into());
        }
    }
    options
}

async fn indexes(bench: &Bench, collection: &str) -> Vec<Document> {
    let list = doc! {"listIndexes": collection};
    let mut found: Vec<Document> =
        bench.database.run_cursor_command(list).await.expect("a list").try_collect().await.expect("indexes");
    found.sort_by_key(|index| index.get_str("name").expect("a name").to_owned());
    found
}

/// Cleanses and compares everything.
async fn expect_same_shape(bench: &Bench) -> crate::program::Finished {
    configure(bench, "");
    let run = bench.run("cleanse").await.expect_exit(0);
    assert_eq!(options(bench, TARGET).await, options(bench, SOURCE).await);
    assert_eq!(indexes(bench, TARGET).await, indexes(bench, SOURCE).await);
    assert_same(&bytes(bench, TARGET).await, &bytes(bench, SOURCE).await);
    run
}

#[tokio::test]
async fn indexes_of_every_kind_are_rebuilt() {
    let bench = Bench::new().await;
    let place = doc! {"type": "Point", "coordinates": [127.0, 37.5]};
    bench
        .insert_into(
            SOURCE,
            (0..300)
                .map(|n| doc! {"_id": n, "email": format!("e{n}"), "n": n, "text": "가 나", "place": &place}),
        )
        .await;
    create_indexes(
        &bench,
        vec![
            doc! {"name": "unique", "key": {"email": 1}, "unique": true},
            doc! {"name": "sparse", "key": {"nick": -1}, "sparse": true},
            doc! {"name": "partial", "key": {"n": 1}, "partialFilterExpression": {"n": {"$gt": 100}}},
            doc! {"name": "ttl", "key": {"at": 1}, "expireAfterSeconds": 3600},
            doc! {"name": "hidden", "key": {"h": 1}, "hidden": true},
            doc! {"name": "collated", "key": {"c": 1}, "collation": {"locale": "ko", "strength": 1}},
            doc! {"name": "text", "key": {"text": "text", "title": "text"}, "weights": {"title": 5},
            "default_language": "none", "language_override": "lang"},
            doc! {"name": "place", "key": {"place": "2dsphere"}},
            doc! {"name": "plane", "key": {"xy": "2d"}, "bits": 20, "min": -10, "max": 10},
            doc! {"name": "wildcard", "key": {"$**": 1}, "wildcardProjection": {"secret": 0}},
            doc! {"name": "some", "key": {"sub.$**": 1}},
            doc! {"name": "hashed", "key": {"email": "hashed"}},
            doc! {"name": "compound", "key": {"n": 1, "email": -1, "text": 1}},
            doc! {"name": "of doubles", "key": {"d": 1.0}},
        ],
    )
    .await;
    expect_same_shape(&bench).await;
    assert_eq!(indexes(&bench, TARGET).await.len(), 15);
}

#[tokio::test]
async fn a_default_collation_and_ids_that_differ_in_case_only_elsewhere_are_kept() {
    let bench = Bench::new().await;
    create(&bench, doc! {"collation": {"locale": "en", "strength": 2}}).await;
    let mixed = |n: u32| if n.is_multiple_of(2) { format!("Key-{n:04}") } else { format!("kEY-{n:04}") };
    bench.insert_into(SOURCE, (0..3000).map(|n| doc! {"_id": mixed(n), "name": format!("N{n}")})).await;
    create_indexes(&bench, vec![doc! {"name": "name", "key": {"name": 1}, "unique": true}]).await;
    let run = expect_same_shape(&bench).await;
    assert_eq!(run.number("/documents/copied"), 3000);
}

#[tokio::test]
async fn a_validator_comes_last_and_what_violates_it_is_copied_and_counted() {
    for level in ["strict", "moderate"] {
        for action in ["error", "warn"] {
            let bench = Bench::new().await;
            bench
                .insert_into(SOURCE, (0..50).map(|n| doc! {"_id": n, "age": if n < 7 { -1 } else { n }}))
                .await;
            let validator = doc! {"$jsonSchema": {"properties": {"age": {"minimum": 0}}}};
            let command = doc! {
                "collMod": SOURCE, "validator": validator,
                "validationLevel": level, "validationAction": action,
            };
            bench.database.run_command(command).await.expect("a validator");
            let run = expect_same_shape(&bench).await;
            assert_eq!(run.number("/documents/validator_violations"), 7);
        }
    }
}

#[tokio::test]
async fn a_validator_given_at_creation_is_the_same_afterwards() {
    let bench = Bench::new().await;
    create(&bench, doc! {"validator": {"a": {"$exists": true}}}).await;
    bench.insert_into(SOURCE, [doc! {"_id": 1, "a": 1}]).await;
    let run = expect_same_shape(&bench).await;
    assert_eq!(run.number("/documents/validator_violations"), 0);
}

#[tokio::test]
async fn other_options_are_kept() {
    let bench = Bench::new().await;
    create(
        &bench,
        doc! {
            "changeStreamPreAndPostImages": {"enabled": true},
            "storageEngine": {"wiredTiger": {"configString": "block_compressor=zstd"}},
            "indexOptionDefaults": {"storageEngine": {"wiredTiger": {"configString": "prefix_compression=false"}}},
        },
    )
    .await;
    bench.insert_into(SOURCE, [doc! {"_id": 1}]).await;
    expect_same_shape(&bench).await;
}

/// Expired documents may not vanish while others are still being copied.
#[tokio::test]
async fn what_deletes_documents_is_built_when_all_are_copied() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..1000).map(|n| doc! {"_id": n, "email": format!("e{n}")})).await;
    create_indexes(
        &bench,
        vec![
            doc! {"name": "ttl", "key": {"at": 1}, "expireAfterSeconds": 5},
            doc! {"name": "unique", "key": {"email": 1}, "unique": true},
        ],
    )
    .await;
    expect_same_shape(&bench).await;

    let built = |name: &str| {
        doc! {"ns": format!("{}.$cmd", bench.database.name()), "$or": [
            {"o.commitIndexBuild": TARGET, "o.indexes.name": name},
            {"o.createIndexes": TARGET, "o.name": name},
        ]}
    };
    let (ttl, unique) = (last(&bench, built("ttl")).await, last(&bench, built("unique")).await);
    let copying = doc! {"$regex": format!("^{}\\.mongorekey-", bench.namespace(TARGET).replace('.', "\\."))};
    let copied = last(
        &bench,
        doc! {"$or": [
            {"ns": &copying, "op": "i"},
            {"o.applyOps.ns": &copying},
        ]},
    )
    .await;
    assert!(copied < ttl && unique < ttl, "copied {copied}, unique {unique}, ttl {ttl}");
}

/// When the oplog last saw such an entry.
async fn last(bench: &Bench, filter: Document) -> Timestamp {
    let oplog: Collection<Document> = bench.admin().client().database("local").collection("oplog.rs");
    let entry =
        oplog.find_one(filter.clone()).sort(doc! {"$natural": -1}).await.expect("the oplog is readable");
    entry.unwrap_or_else(|| panic!("no {filter}")).get_timestamp("ts").expect("a time")
}

#[tokio::test]
async fn a_dry_run_tells_the_indexes_and_options_to_come() {
    let bench = Bench::new().await;
    create(&bench, doc! {"collation": {"locale": "en", "strength": 2}}).await;
    bench.insert_into(SOURCE, (0..10).map(|n| doc! {"_id": n})).await;
    create_indexes(&bench, vec![doc! {"name": "n", "key": {"n": 1}}]).await;
    configure(&bench, "");

    let run = bench.run("cleanse --dry-run").await.expect_exit(0);
    assert_eq!(run.json["plan"]["indexes"], json!(["n"]));
    assert_eq!(run.json["plan"]["options"]["collation"]["strength"], json!(2));
}

#[tokio::test]
async fn a_clustered_collection_stays_clustered() {
    let bench = Bench::new().await;
    create(
        &bench,
        doc! {
            "clusteredIndex": {"key": {"_id": 1}, "unique": true, "name": "by id"},
            "expireAfterSeconds": 1_000_000_000_i64,
        },
    )
    .await;
    let date = |n: i64| bson::DateTime::from_millis(1_700_000_000_000 + n);
    bench.insert_into(SOURCE, (0..1500).map(|n| doc! {"_id": date(n), "n": n})).await;
    bench.insert_into(SOURCE, (0..1500).map(|n| doc! {"_id": format!("s{n}"), "n": n})).await;
    create_indexes(&bench, vec![doc! {"name": "n", "key": {"n": 1}}]).await;
    expect_same_shape(&bench).await;
}

#[tokio::test]
async fn an_index_without_the_collation_of_its_collection_stays_without() {
    let bench = Bench::new().await;
    create(&bench, doc! {"collation": {"locale": "en", "strength": 2}}).await;
    bench.insert_into(SOURCE, [doc! {"_id": 1, "a": "x"}, doc! {"_id": 2, "a": "X"}]).await;
    let simple = doc! {"locale": "simple"};
    create_indexes(
        &bench,
        vec![
            doc! {"name": "simple", "key": {"a": 1}, "unique": true, "collation": &simple},
            doc! {"name": "text", "key": {"t": "text"}, "collation": &simple},
        ],
    )
    .await;
    expect_same_shape(&bench).await;
}

/// They know of no collation, whatever their collection compares by.
#[tokio::test]
async fn indexes_of_the_first_version_are_built_under_a_default_collation_too() {
    let bench = Bench::new().await;
    create(&bench, doc! {"collation": {"locale": "en", "strength": 2}}).await;
    bench.insert_into(SOURCE, (0..10).map(|n| doc! {"_id": n, "n": n})).await;
    create_indexes(&bench, vec![doc! {"name": "n", "key": {"n": 1}, "v": 1}]).await;
    configure(&bench, "");
    bench.run("cleanse").await.expect_exit(0);
    bench.run("verify --full --settle 1ms").await.expect_exit(0);
}
