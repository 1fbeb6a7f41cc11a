//! `verify --sample` draws the same documents again by its seed, and finds as much as statistics
//! promise.

use std::collections::BTreeSet;

use bson::{Bson, Document, doc};
use mongodb::Collection;
use serde_json::{Value, json};

use crate::cleansing::{SOURCE, TARGET, configure, ids};
use crate::harness::Bench;
use crate::program::Finished;

/// Differences are reported after one more look.
const AT_ONCE: &str = "verify --settle 1ms --max-differences 100000";
const FORWARD: &str = "sample source to target";
const BACKWARD: &str = "sample target to source";

/// Documents on both sides; what `change` makes of a document stands in the target.
async fn sides(
    source: impl IntoIterator<Item = Document>,
    change: impl Fn(usize, Document) -> Option<Document>,
) -> Bench {
    let bench = Bench::new().await;
    let documents: Vec<Document> = source.into_iter().collect();
    let target: Vec<Document> = documents
        .iter()
        .cloned()
        .enumerate()
        .filter_map(|(number, document)| change(number, document))
        .collect();
    bench.insert_into(SOURCE, documents).await;
    bench.insert_into(TARGET, target).await;
    configure(&bench, "");
    bench
}

fn numbered(count: i32) -> impl Iterator<Item = Document> {
    (0..count).map(|id| doc! {"_id": id, "a": id % 7})
}

fn changed(mut document: Document) -> Document {
    document.insert("b", 1);
    document
}

fn target(bench: &Bench) -> Collection<Document> {
    bench.database.collection(TARGET)
}

fn check<'a>(run: &'a Finished, name: &str) -> &'a Value {
    let checks = run.json["checks"].as_array().unwrap_or_else(|| panic!("{}", run.output()));
    checks.iter().find(|check| check["name"] == json!(name)).unwrap_or_else(|| panic!("{}", run.output()))
}

/// The `_id`s of the differences of a check.
fn found(run: &Finished, name: &str) -> BTreeSet<String> {
    let differences = check(run, name)["differences"].as_array().expect("a list");
    differences.iter().map(|difference| difference["_id"].to_string()).collect()
}

fn differing(run: &Finished, name: &str) -> u64 {
    let check = check(run, name);
    check["expected"].as_u64().expect("a number") - check["found"].as_u64().expect("a number")
}

/// Between so many hits lies a sample of `size` with a share of 5%, but for one in a million.
fn interval(size: u32) -> std::ops::RangeInclusive<u64> {
    let (size, share) = (f64::from(size), 0.05);
    let mean = size * share;
    // Five standard deviations, and a little for the skew of the distribution.
    let wide = 5.0 * (mean * (1.0 - share)).sqrt() + 3.0;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]
    let bound = |value: f64| value.max(0.0) as u64;
    bound(mean - wide)..=bound(mean + wide)
}

#[tokio::test]
async fn the_same_seed_draws_the_same_documents_and_another_one_others() {
    let bench = sides(numbered(6_000), |number, document| match number % 10 {
        0 => Some(changed(document)),
        1 => None,
        _ => Some(document),
    })
    .await;
    let run = async |seed: u64| bench.run(&format!("{AT_ONCE} --sample 500 --seed {seed}")).await;
    let (first, again, other) = (run(7).await, run(7).await, run(u64::MAX).await);
    for name in [FORWARD, BACKWARD] {
        assert_eq!(check(&first, name)["expected"], json!(500));
        assert_eq!(found(&first, name), found(&again, name));
        assert!(!found(&first, name).is_empty());
        assert_ne!(found(&first, name), found(&other, name));
    }
    assert_eq!((&first.json["seed"], &other.json["seed"]), (&json!(7), &json!(u64::MAX)));
    // What comes and goes elsewhere changes nothing for the others.
    let name = FORWARD;
    bench.insert_into(SOURCE, (10_000..10_010).map(|id| doc! {"_id": id})).await;
    bench.insert_into(TARGET, (10_000..10_010).map(|id| doc! {"_id": id})).await;
    let later = run(7).await;
    let lost = found(&first, name).difference(&found(&later, name)).count();
    assert!(lost <= 10, "{lost} documents are no longer drawn");
}

#[tokio::test]
async fn a_seed_that_was_not_given_is_told_and_can_be_given() {
    let bench = sides(numbered(3_000), |number, document| {
        Some(if number % 5 == 0 { changed(document) } else { document })
    })
    .await;
    let first = bench.run(&format!("{AT_ONCE} --sample 300")).await.expect_exit(1);
    let seed = first.number("/seed");
    let again = bench.run(&format!("{AT_ONCE} --sample 300 --seed {seed}")).await.expect_exit(1);
    assert_eq!(found(&first, FORWARD), found(&again, FORWARD));
}

#[tokio::test]
async fn a_sample_finds_corruption_in_the_proportion_that_statistics_promise() {
    // One document in twenty lacks, one is another, one is too many.
    let bench = sides(numbered(20_000), |number, document| match number % 20 {
        3 => None,
        7 => Some(changed(document)),
        _ => Some(document),
    })
    .await;
    bench.insert_into(TARGET, (0..1_000).map(|id| doc! {"_id": format!("extra {id}")})).await;
    for seed in 1..=3 {
        let run = bench.run(&format!("{AT_ONCE} --sample 2000 --seed {seed}")).await.expect_exit(1);
        let of_kind = |name: &str, kind: &str| {
            let differences = check(&run, name)["differences"].as_array().expect("a list");
            differences.iter().filter(|difference| difference["kind"] == json!(kind)).count() as u64
        };
        for (name, kind) in
            [(FORWARD, "missing"), (FORWARD, "different"), (BACKWARD, "different"), (BACKWARD, "extra")]
        {
            let count = of_kind(name, kind);
            assert!(interval(2_000).contains(&count), "seed {seed}: {count} {kind} {name}");
        }
        assert_eq!(of_kind(FORWARD, "extra") + of_kind(BACKWARD, "missing"), 0);
        // The true share of each side, one tenth, lies within what it says.
        let confidence = &check(&run, FORWARD)["confidence"];
        let bound = |name: &str| confidence[name].as_f64().expect("a share");
        assert!(bound("share_from") < 0.1 && bound("share_to") > 0.1, "{confidence}");
        assert!(check(&run, FORWARD)["remark"].as_str().expect("words").contains("at 95%"));
    }
}

#[tokio::test]
async fn ids_of_all_types_are_drawn_alike() {
    let all = ids(4_000);
    let count = all.len();
    let bench = sides(all.into_iter().map(|id| doc! {"_id": id}), |number, document| {
        // Every type in its turn, see `ids`.
        Some(if number % 20 < 10 { changed(document) } else { document })
    })
    .await;
    let run = bench.run(&format!("{AT_ONCE} --sample 2000 --seed 3")).await.expect_exit(1);
    let half = differing(&run, FORWARD);
    assert!((850..=1150).contains(&half), "{half} of 2000, half of which differ");
    let kinds: BTreeSet<String> = found(&run, FORWARD)
        .iter()
        .map(|id| id.split(':').next().unwrap_or_default().trim_matches(['{', '"']).to_owned())
        .collect();
    for kind in [
        "$oid",
        "$numberInt",
        "$numberLong",
        "$numberDouble",
        "$numberDecimal",
        "$binary",
        "year",
        "$date",
        "$timestamp",
    ] {
        assert!(kinds.contains(kind), "no {kind} among {kinds:?}");
    }
    // All of them, each once.
    let run = bench.run("verify --settle 1ms --sample 1000000").await.expect_exit(1);
    assert_eq!(check(&run, FORWARD)["expected"], json!(count));
    assert!(check(&run, FORWARD)["remark"].as_str().expect("words").contains("all of them"));
}

#[tokio::test]
async fn as_many_valid_documents_are_compared_as_asked_for_however_few_are_valid() {
    let bench = sides(numbered(0), |_, document| Some(document)).await;
    bench.insert_into(SOURCE, (0..20_000).map(|id| doc! {"_id": id, "valid": id % 50 == 0})).await;
    bench.insert_into(TARGET, (0..400).map(|id| doc! {"_id": id * 50, "valid": true})).await;
    configure(&bench, "keep = '{\"valid\": true}'");
    let run = bench.run(&format!("{AT_ONCE} --sample 200 --seed 1")).await.expect_exit(0);
    for name in [FORWARD, BACKWARD] {
        assert_eq!(check(&run, name)["expected"], json!(200), "{}", run.stdout);
    }
    target(&bench).delete_many(doc! {"_id": {"$lt": 10_000}}).await.expect("deleted");
    let run = bench.run(&format!("{AT_ONCE} --sample 200 --seed 1")).await.expect_exit(1);
    let missing = differing(&run, FORWARD);
    assert!((60..=140).contains(&missing), "{missing} of 200, half of which are missing");
    // What the rules reject and the target has is found from its side.
    bench.insert_into(TARGET, [doc! {"_id": 1, "valid": false}]).await;
    let run = bench.run(&format!("{AT_ONCE} --sample 5000")).await.expect_exit(1);
    assert_eq!(found(&run, BACKWARD), BTreeSet::from([Bson::Int32(1).into_canonical_extjson().to_string()]));
}

#[tokio::test]
async fn a_difference_that_passes_is_none() {
    let bench = sides(numbered(2_000), |_, document| Some(document)).await;
    target(&bench).delete_one(doc! {"_id": 5}).await.expect("deleted");
    let run = bench.program("verify --sample 100000 --settle 20s").spawn();
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    bench.insert_into(TARGET, [doc! {"_id": 5, "a": 5}]).await;
    run.finish().await.expect_exit(0);
}

#[tokio::test]
async fn a_sample_of_few_documents_is_not_all_of_them() {
    let bench = sides(numbered(150), |_, document| Some(document)).await;
    let run = bench.run(&format!("{AT_ONCE} --sample 100")).await.expect_exit(0);
    for name in [FORWARD, BACKWARD] {
        assert_eq!(check(&run, name)["confidence"]["all"], json!(false), "{}", run.stdout);
    }
    let run = bench.run(&format!("{AT_ONCE} --sample 150")).await.expect_exit(0);
    for name in [FORWARD, BACKWARD] {
        assert_eq!(check(&run, name)["confidence"]["all"], json!(true), "{}", run.stdout);
    }
}
