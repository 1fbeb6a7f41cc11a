//! `verify --unique` finds keys that stand for two, over all targets.

use bson::{Bson, Document, doc};
use serde_json::{Value, json};

use crate::harness::{Bench, DOCS};
use crate::key_api::KeyApi;
use crate::program::Finished;

const LEGACY: &str = "unique legacy keys";
const NEW: &str = "unique new keys";

async fn bench(documents: impl IntoIterator<Item = (i32, Bson, &'static str)>) -> Bench {
    let bench = Bench::new().await;
    let filled =
        documents.into_iter().map(|(id, legacy, key)| doc! {"_id": id, "legacyKey": legacy, "newKey": key});
    bench.insert(filled).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench
}

fn check<'a>(run: &'a Finished, name: &str) -> &'a Value {
    let checks = run.json["checks"].as_array().unwrap_or_else(|| panic!("{}", run.output()));
    checks.iter().find(|check| check["name"] == json!(name)).unwrap_or_else(|| panic!("{}", run.output()))
}

/// The `_id`s of the two documents of each difference.
fn pairs(run: &Finished, name: &str) -> Vec<[i64; 2]> {
    let id =
        |document: &Value| document["_id"]["$numberInt"].as_str().expect("an _id").parse().expect("a number");
    let differences = check(run, name)["differences"].as_array().expect("a list");
    let mut pairs: Vec<[i64; 2]> = differences
        .iter()
        .map(|difference| {
            let mut pair = [id(&difference["between"][0]), id(&difference["between"][1])];
            pair.sort_unstable();
            pair
        })
        .collect();
    pairs.sort_unstable();
    pairs
}

fn decimal(text: &str) -> Bson {
    text.parse::<bson::Decimal128>().expect("a decimal").into()
}

#[tokio::test]
async fn keys_that_stand_for_one_pass_whatever_their_types() {
    let id = bson::oid::ObjectId::from_bytes([7; 12]);
    let bench = bench([
        (1, "A".into(), "N-A"),
        (2, "A".into(), "N-A"),
        (3, "a".into(), "N-a"),
        // One key in five types.
        (10, 42.into(), "N-42"),
        (11, 42_i64.into(), "N-42"),
        (12, 42.0.into(), "N-42"),
        (13, "42".into(), "N-42"),
        (14, decimal("42"), "N-42"),
        // Another one.
        (15, decimal("42.0"), "N-42.0"),
        (20, 0.into(), "N-0"),
        (21, (-0.0).into(), "N-0"),
        (30, id.into(), "N-id"),
        (31, id.to_hex().into(), "N-id"),
        (32, bson::Uuid::from_bytes([3; 16]).into(), "N-uuid"),
        // No usable keys: whatever they have, it is nobody's.
        (40, 1.5.into(), "N-A"),
        (41, f64::NAN.into(), "N-A"),
        (42, f64::INFINITY.into(), "N-A"),
        (43, 1e300.into(), "N-A"),
        (44, decimal("NaN"), "N-A"),
        (45, Bson::Null, "N-A"),
        (46, "".into(), "N-A"),
        (47, Bson::Array(vec!["A".into()]), "N-x"),
    ])
    .await;
    let run = bench.run("verify --unique").await.expect_exit(0);
    assert_eq!(check(&run, NEW)["documents"], json!(22));
}

#[tokio::test]
async fn each_key_that_stands_for_two_is_found_with_its_documents() {
    let bench = bench([
        (1, "A".into(), "N-A"),
        (2, "B".into(), "N-B"),
        (3, "C".into(), "N-B"),
        (4, 7.into(), "N-7"),
        (5, "7".into(), "N-8"),
        (6, "a".into(), "n-a"),
    ])
    .await;
    let run = bench.run("verify --unique").await.expect_exit(1);
    assert_eq!(pairs(&run, NEW), [[2, 3]]);
    assert_eq!(pairs(&run, LEGACY), [[4, 5]]);
    let difference = &check(&run, NEW)["differences"][0];
    assert_eq!(
        (&difference["kind"], &difference["documents"]),
        (&json!("new key of two legacy keys"), &json!(2))
    );
    assert_eq!(difference["between"][0]["collection"], json!(bench.namespace(DOCS)));
    let few = bench.run("verify --unique --max-differences 0").await.expect_exit(1);
    assert_eq!((&check(&few, NEW)["found"], &check(&few, NEW)["differences"]), (&json!(1), &json!([])));
}

#[tokio::test]
async fn a_key_of_two_documents_in_two_targets_is_found() {
    let bench = bench([(1, "A".into(), "N-A")]).await;
    let others: [Document; 2] = [
        doc! {"_id": 2, "old": {"key": "B"}, "key": "N-A"},
        doc! {"_id": 3, "old": {"key": "A"}, "key": "N-C"},
    ];
    bench.insert_into("others", others).await;
    let api = KeyApi::finding();
    let config = bench.config(&api).target("others", &bench.namespace("others"), ["old.key", "key", "flag"]);
    bench.configure(&config);
    let run = bench.run("verify --unique").await.expect_exit(1);
    assert_eq!((pairs(&run, NEW), pairs(&run, LEGACY)), (vec![[1, 2]], vec![[1, 3]]));
    bench.run("verify --unique --target docs").await.expect_exit(0);
}

#[tokio::test]
async fn a_collation_makes_no_two_keys_one() {
    let bench = Bench::new().await;
    let create = doc! {"create": DOCS, "collation": {"locale": "en", "strength": 1}};
    bench.database.run_command(create).await.expect("created");
    let keys = [("a", "N-a"), ("A", "N-A"), ("á", "N-b")];
    bench
        .insert(
            (1..).zip(keys).map(|(id, (legacy, key))| doc! {"_id": id, "legacyKey": legacy, "newKey": key}),
        )
        .await;
    bench.configure(&bench.config(&KeyApi::finding()));
    bench.run("verify --unique").await.expect_exit(0);
}

#[tokio::test]
async fn without_any_key_nothing_is_unique() {
    let bench = Bench::new().await;
    bench.configure(&bench.config(&KeyApi::finding()));
    bench.run("verify --unique").await.expect_exit(1);
    bench.insert([doc! {"_id": 1, "legacyKey": "A"}]).await;
    let run = bench.run("verify --unique").await.expect_exit(1);
    assert_eq!(check(&run, NEW)["passed"], json!(false));
}

#[tokio::test]
async fn after_a_backfill_a_legacy_key_has_one_new_key_without_being_asked() {
    let bench = Bench::with_docs(20).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.run("backfill --tps 100000").await.expect_exit(0);
    bench.run("verify").await.expect_exit(0);
    bench.insert([doc! {"_id": 100, "legacyKey": "K1", "newKey": "N-other"}]).await;
    let run = bench.run("verify").await.expect_exit(1);
    assert_eq!(pairs(&run, LEGACY), [[1, 100]]);
    // A new key of two legacy keys is an error only where the config says so, or the option asks.
    bench.docs().delete_one(doc! {"_id": 100}).await.expect("deleted");
    bench.insert([doc! {"_id": 100, "legacyKey": "X", "newKey": "N-K1"}]).await;
    bench.run("verify").await.expect_exit(0);
    bench.configure(&bench.config(&api).key_api("unique_keys = true"));
    bench.run("verify --unique").await.expect_exit(1);
    let run = bench.run("verify").await.expect_exit(1);
    assert_eq!(pairs(&run, NEW), [[1, 100]]);
}

#[tokio::test]
async fn keys_without_a_legacy_key_are_no_pass() {
    let bench = Bench::new().await;
    bench.insert((0..2).map(|id| doc! {"_id": id, "newKey": "N-1"})).await;
    bench.configure(&bench.config(&KeyApi::finding()));
    let run = bench.run("verify --unique").await.expect_exit(1);
    let remark = check(&run, NEW)["remark"].to_string();
    assert!(remark.contains("legacy_field"), "{remark}");
    bench.insert([doc! {"_id": 3, "legacyKey": "A", "newKey": "N-A"}]).await;
    let run = bench.run("verify --unique").await.expect_exit(0);
    assert_eq!((&check(&run, NEW)["documents"], &check(&run, NEW)["left_out"]), (&json!(3), &json!(2)));
}
