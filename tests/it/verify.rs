//! `verify` finds every difference and never passes because there was nothing to look at.

use bson::{Bson, Document, RawDocumentBuf, doc, rawdoc};
use mongodb::Collection;
use serde_json::{Value, json};

use crate::cleansing::{SOURCE, TARGET, bytes, config, configure, every_type, ids, insert_raw};
use crate::harness::{Bench, DOCS};
use crate::key_api::{KeyApi, Reply};
use crate::program::Finished;

/// Differences are reported after one more look.
const ALL: &str = "verify --counts --sample 100000 --settle 1ms";

/// Documents of every kind on both sides, the target being a true copy.
async fn pair() -> Bench {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..).zip(ids(1200)).map(|(number, id)| every_type(id, number))).await;
    let copy = [doc! {"$match": {}}, doc! {"$out": TARGET}];
    let source: Collection<Document> = bench.database.collection(SOURCE);
    source.aggregate(copy).await.expect("a copy");
    configure(&bench, "");
    bench
}

fn target(bench: &Bench) -> Collection<Document> {
    bench.database.collection(TARGET)
}

fn check<'a>(run: &'a Finished, name: &str) -> &'a Value {
    let checks = run.json["checks"].as_array().expect("checks");
    checks
        .iter()
        .find(|check| check["name"] == json!(name))
        .unwrap_or_else(|| panic!("no {name}: {}", run.stdout))
}

/// Both samples' differences.
fn differences(run: &Finished) -> Vec<Value> {
    ["sample source to target", "sample target to source"]
        .iter()
        .flat_map(|name| of_check(run, name))
        .collect()
}

/// The differences of a check, without their ages.
fn of_check(run: &Finished, name: &str) -> Vec<Value> {
    let mut differences = check(run, name)["differences"].as_array().expect("a list").clone();
    for difference in &mut differences {
        let age = difference.as_object_mut().and_then(|difference| difference.remove("age_seconds"));
        assert!(age.is_some_and(|age| age.is_number()), "{difference}");
    }
    differences
}

/// Fails unless the whole verification failed at these checks and at no other.
#[track_caller]
fn expect_failed(run: &Finished, failed: &[&str]) {
    assert_eq!(run.exit, Some(1), "{}", run.output());
    assert_eq!(run.json["passed"], json!(false));
    for check in run.json["checks"].as_array().expect("checks") {
        let name = check["name"].as_str().expect("a name");
        assert_eq!(check["passed"], json!(!failed.contains(&name)), "{name}: {}", run.stdout);
    }
}

const COUNTS: &str = "counts";
const FORWARD: &str = "sample source to target";
const BACKWARD: &str = "sample target to source";

#[tokio::test]
async fn a_true_copy_passes_whatever_its_ids() {
    let bench = pair().await;
    let count = bytes(&bench, SOURCE).await.len();
    let run = bench.run(ALL).await.expect_exit(0);
    assert_eq!(run.json["passed"], json!(true));
    for name in [COUNTS, FORWARD, BACKWARD] {
        let check = check(&run, name);
        assert_eq!((&check["expected"], &check["found"]), (&json!(count), &json!(count)), "{name}");
        assert_eq!(check["differences"], json!([]));
    }
}

#[tokio::test]
async fn missing_documents_are_found_whatever_their_ids() {
    for id in ids(10) {
        let bench = Bench::new().await;
        bench.insert_into(SOURCE, [doc! {"_id": &id}, doc! {"_id": "other"}]).await;
        bench.insert_into(TARGET, [doc! {"_id": "other"}]).await;
        configure(&bench, "");
        let run = bench.run(ALL).await;
        expect_failed(&run, &[COUNTS, FORWARD]);
        let expected = [json!({"_id": id.into_canonical_extjson(), "kind": "missing"})];
        assert_eq!(of_check(&run, FORWARD), expected);
    }
}

#[tokio::test]
async fn extra_documents_are_found() {
    let bench = pair().await;
    bench.insert_into(TARGET, [doc! {"_id": {"extra": 1}}]).await;
    let run = bench.run(ALL).await;
    expect_failed(&run, &[COUNTS, BACKWARD]);
    assert_eq!(of_check(&run, BACKWARD), [json!({"_id": {"extra": {"$numberInt": "1"}}, "kind": "extra"})]);
}

#[tokio::test]
async fn equal_counts_hide_nothing() {
    let bench = pair().await;
    target(&bench).delete_one(doc! {"int": 7}).await.expect("deleted");
    bench.insert_into(TARGET, [doc! {"_id": "extra"}]).await;
    let run = bench.run(ALL).await;
    expect_failed(&run, &[FORWARD, BACKWARD]);
    let kinds: Vec<_> = differences(&run).iter().map(|difference| difference["kind"].clone()).collect();
    assert_eq!(kinds, [json!("missing"), json!("extra")]);
    expect_failed(&bench.run("verify --sample 100000 --settle 1ms").await, &[FORWARD, BACKWARD]);
    bench.run("verify --counts").await.expect_exit(0);
}

#[tokio::test]
async fn what_the_rules_reject_may_not_be_in_the_target() {
    let bench = pair().await;
    configure(&bench, r#"reject = [{ name = "x", when = '{"int": 7}' }]"#);
    let run = bench.run(ALL).await;
    expect_failed(&run, &[COUNTS, BACKWARD]);
    assert_eq!(differences(&run).len(), 1);
    assert_eq!(differences(&run)[0]["kind"], json!("extra"));
}

/// What was changed, the kind of the change and the fields that differ.
fn changes() -> [(RawDocumentBuf, &'static str, &'static [&'static str]); 12] {
    [
        (
            rawdoc! {"_id": {"year": 1}, "a": 2, "b": {"c": "x", "d": [1, 2]}, "e": 0.0, "f": "1", "g": null, "n": 5_i64},
            "value",
            &["a"],
        ),
        (
            rawdoc! {"_id": {"year": 1}, "b": {"c": "x", "d": [1, 2]}, "e": 0.0, "f": "1", "g": null, "n": 5_i64},
            "value",
            &["a"],
        ),
        (
            rawdoc! {"_id": {"year": 1}, "a": 1, "b": {"c": "x", "d": [1, 2]}, "e": 0.0, "f": "1", "g": null, "n": 5_i64, "z": 1},
            "value",
            &["z"],
        ),
        (
            rawdoc! {"_id": {"year": 1}, "b": {"c": "x", "d": [1, 2]}, "a": 1, "e": 0.0, "f": "1", "g": null, "n": 5_i64},
            "order",
            &["(top level)"],
        ),
        (
            rawdoc! {"_id": {"year": 1}, "a": 1, "b": {"d": [1, 2], "c": "x"}, "e": 0.0, "f": "1", "g": null, "n": 5_i64},
            "order",
            &["b"],
        ),
        (
            rawdoc! {"_id": {"year": 1}, "a": 1_i64, "b": {"c": "x", "d": [1, 2]}, "e": 0.0, "f": "1", "g": null, "n": 5_i64},
            "numeric_type",
            &["a"],
        ),
        (
            rawdoc! {"_id": {"year": 1}, "a": 1.0, "b": {"c": "x", "d": [1, 2]}, "e": 0.0, "f": "1", "g": null, "n": 5.0},
            "numeric_type",
            &["a", "n"],
        ),
        (
            rawdoc! {"_id": {"year": 1}, "a": 1, "b": {"c": "x", "d": [1, 2]}, "e": -0.0, "f": "1", "g": null, "n": 5_i64},
            "value",
            &["e"],
        ),
        (
            rawdoc! {"_id": {"year": 1}, "a": 1, "b": {"c": "y", "d": [1, 2]}, "e": 0.0, "f": "1", "g": null, "n": 5_i64},
            "value",
            &["b.c"],
        ),
        (
            rawdoc! {"_id": {"year": 1}, "a": 1, "b": {"c": "x", "d": [2, 1]}, "e": 0.0, "f": "1", "g": null, "n": 5_i64},
            "value",
            &["b.d"],
        ),
        (
            rawdoc! {"_id": {"year": 1}, "a": 1, "b": {"c": "x", "d": [1, 2]}, "e": 0.0, "f": 1, "g": null, "n": 5_i64},
            "value",
            &["f"],
        ),
        (
            rawdoc! {"_id": {"year": 1}, "a": 1, "b": {"c": "x", "d": [1, 2]}, "e": 0.0, "f": "1", "n": 5_i64},
            "value",
            &["g"],
        ),
    ]
}

#[tokio::test]
async fn every_change_of_a_document_is_found_with_its_fields() {
    let id = Bson::Document(doc! {"year": 1});
    let original = rawdoc! {
        "_id": {"year": 1}, "a": 1, "b": {"c": "x", "d": [1, 2]}, "e": 0.0, "f": "1", "g": null, "n": 5_i64,
    };
    let bench = pair().await;
    insert_raw(&bench, SOURCE, vec![original]).await;
    for (document, kind, fields) in changes() {
        insert_raw(&bench, TARGET, vec![document]).await;
        let run = bench.run(ALL).await;
        expect_failed(&run, &[FORWARD, BACKWARD]);
        for difference in differences(&run) {
            assert_eq!(difference["_id"], id.clone().into_canonical_extjson());
            assert_eq!(difference["kind"], json!("different"));
            assert_eq!(difference["difference"], json!(kind), "{difference}");
            assert_eq!(difference["fields"], json!(fields), "{difference}");
        }
        assert_eq!(differences(&run).len(), 2);
        target(&bench).delete_one(doc! {"_id": &id}).await.expect("deleted");
    }
}

#[tokio::test]
async fn an_id_of_an_equal_value_but_another_type_is_another_document() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, [doc! {"_id": 1}, doc! {"_id": {"a": 1}}]).await;
    bench.insert_into(TARGET, [doc! {"_id": 1_i64}, doc! {"_id": {"a": 1.0}}]).await;
    configure(&bench, "");
    let run = bench.run(ALL).await;
    expect_failed(&run, &[FORWARD, BACKWARD]);
    assert_eq!(differences(&run).len(), 4);
}

#[tokio::test]
async fn ids_that_a_collation_takes_for_equal_are_different_documents() {
    let bench = Bench::new().await;
    for name in [SOURCE, TARGET] {
        let collation = doc! {"locale": "en", "strength": 2};
        bench.database.run_command(doc! {"create": name, "collation": collation}).await.expect("created");
    }
    bench.insert_into(SOURCE, [doc! {"_id": "abc"}]).await;
    bench.insert_into(TARGET, [doc! {"_id": "ABC"}]).await;
    configure(&bench, "");
    expect_failed(&bench.run(ALL).await, &[FORWARD, BACKWARD]);
}

#[tokio::test]
async fn no_more_differences_are_listed_than_asked_for() {
    let bench = pair().await;
    target(&bench).update_many(doc! {}, doc! {"$set": {"new": 1}}).await.expect("changed");
    let run = bench.run(&format!("{ALL} --max-differences 3")).await;
    expect_failed(&run, &[FORWARD, BACKWARD]);
    assert_eq!(differences(&run).len(), 6);
    let none = bench.run(&format!("{ALL} --max-differences 0")).await;
    expect_failed(&none, &[FORWARD, BACKWARD]);
    assert!(differences(&none).is_empty());
    assert_eq!(check(&none, FORWARD)["found"], json!(0));
}

#[tokio::test]
async fn a_small_sample_says_what_it_proves() {
    let bench = pair().await;
    let run = bench.run("verify --sample 100").await.expect_exit(0);
    assert_eq!(check(&run, FORWARD)["expected"], json!(100));
    assert!(check(&run, FORWARD)["remark"].as_str().expect("a remark").contains("95%"), "{}", run.stdout);
}

#[tokio::test]
async fn nothing_to_look_at_never_passes() {
    let seeded = doc! {"_id": 1, "a": 1};
    // Source, target, rules, and how the run ends.
    let cases: [(Option<usize>, Option<usize>, &str); 7] = [
        (Some(1), None, ""),
        (Some(1), Some(0), ""),
        (None, None, ""),
        (Some(0), Some(0), ""),
        (None, Some(1), ""),
        (Some(0), Some(1), ""),
        (Some(1), Some(0), "keep = '{\"a\": 2}'"),
    ];
    for (source, target, rules) in cases {
        let bench = Bench::new().await;
        for (name, count) in [(SOURCE, source), (TARGET, target)] {
            let Some(count) = count else { continue };
            bench.database.create_collection(name).await.expect("created");
            if count > 0 {
                bench.insert_into(name, [seeded.clone()]).await;
            }
        }
        configure(&bench, rules);
        for command in [ALL, "verify --counts", "verify --sample 10 --settle 1ms"] {
            let run = bench.run(command).await;
            assert_eq!(run.exit, Some(1), "{source:?} {target:?} {rules} {command}: {}", run.output());
            assert_eq!(run.json["passed"], json!(false));
        }
    }
}

#[tokio::test]
async fn a_wrong_name_does_not_pass() {
    let bench = pair().await;
    expect_failed(&bench.run("verify --counts --to targte").await, &[COUNTS]);
    let named = format!(
        "verify --counts --sample 10 --settle 1ms --source {} --to {TARGET}",
        bench.namespace("sourec")
    );
    expect_failed(&bench.run(&named).await, &[COUNTS, FORWARD, BACKWARD]);
}

#[tokio::test]
async fn without_any_job_there_is_nothing_to_verify() {
    let bench = pair().await;
    let run = bench.run("verify").await.expect_exit(3);
    assert_eq!(run.text("/error/code"), "refused");
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.run("verify").await.expect_exit(3);
    assert!(!bench.has_state().await);
}

#[tokio::test]
async fn after_a_cleanse_everything_is_verified_without_being_asked() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..500).map(|n| doc! {"_id": n})).await;
    configure(&bench, "keep = '{\"_id\": {\"$lt\": 400}}'");
    bench.run("cleanse").await.expect_exit(0);

    let run = bench.run("verify").await.expect_exit(0);
    assert_eq!(check(&run, COUNTS)["expected"], json!(400));
    assert_eq!(check(&run, BACKWARD)["found"], json!(400));
    target(&bench).update_one(doc! {"_id": 5}, doc! {"$set": {"a": 1}}).await.expect("changed");
    expect_failed(&bench.run("verify --settle 1ms").await, &["full", FORWARD, BACKWARD]);
}

#[tokio::test]
async fn candidates_that_a_backfill_left_fail_the_verification() {
    let bench = Bench::with_docs(20).await;
    let api = KeyApi::start(|call| match call.key.as_str() {
        "K3" => Reply::not_found(),
        "K5" => Reply::html(200),
        _ => Reply::found(call),
    });
    bench.configure(&bench.config(&api).key_api("max_attempts = 1"));
    bench.run("backfill --tps 100000").await.expect_exit(1);

    let (candidates, accounted) =
        (format!("candidates {}", bench.namespace(DOCS)), format!("accounted {}", bench.namespace(DOCS)));
    let run = bench.run("verify").await;
    expect_failed(&run, &[&candidates]);
    assert_eq!(check(&run, &candidates)["found"], json!(1));
    assert_eq!(check(&run, &accounted)["found"], json!(20));
    let figures = ["filled", "flagged", "candidates"].map(|name| check(&run, &accounted)[name].clone());
    assert_eq!(figures, [json!(18), json!({"not_found": 1}), json!(1)]);
    api.change(Reply::found);
    bench.run("backfill --tps 100000").await.expect_exit(0);
    bench.run("verify").await.expect_exit(0);
    bench.docs().drop().await.expect("dropped");
    expect_failed(&bench.run("verify").await, &[&candidates]);
}

#[tokio::test]
async fn flags_without_a_reason_are_accounted_for() {
    let bench = Bench::with_docs(5).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.run("backfill --tps 100000").await.expect_exit(0);
    // Somebody else's flags.
    for (id, flag) in [(1, Bson::from("later")), (2, doc! {"reason": 5}.into()), (3, doc! {"why": 1}.into())]
    {
        let change = doc! {"$set": {"newKeyFlag": flag}, "$unset": {"newKey": ""}};
        bench.docs().update_one(doc! {"_id": id}, change).await.expect("changed");
    }
    bench.run("verify").await.expect_exit(0);
}

#[tokio::test]
async fn a_filter_that_matches_nothing_is_no_pass_of_a_backfill() {
    let bench = Bench::with_docs(5).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api).target_line("filter = '{\"nosuch\": 1}'"));
    bench.run("backfill --tps 100000").await.expect_exit(0);
    assert_eq!(api.count(), 0);
    let accounted = format!("accounted {}", bench.namespace(DOCS));
    expect_failed(&bench.run("verify").await, &[&accounted]);
}

#[tokio::test]
async fn documents_that_come_meanwhile_are_accounted_for() {
    let bench = Bench::with_docs(400).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    bench.run("backfill --tps 100000").await.expect_exit(0);
    let docs = bench.docs();
    let writer = tokio::spawn(async move {
        for id in 10_000.. {
            docs.insert_one(doc! {"_id": id, "legacyKey": "K", "newKey": "N-K"}).await.expect("inserted");
        }
    });
    for _ in 0..5 {
        let run = bench.run("verify --counts").await.expect_exit(0);
        let name = format!("accounted {}", bench.namespace(DOCS));
        assert!(check(&run, &name)["found"].as_u64().is_some_and(|found| found > 400), "{}", run.stdout);
    }
    writer.abort();
}

/// The config says where from, and who has copied has said where to.
#[tokio::test]
async fn a_copy_is_verified_where_only_its_job_tells_the_target() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..50).map(|id| doc! {"_id": id})).await;
    bench.configure_text(&config(&bench, "").replace(&format!("to = '{TARGET}'"), ""));
    let sample = bench.run("verify --sample 10").await.expect_exit(2);
    assert!(sample.json.to_string().contains("--sample"), "{}", sample.stdout);
    bench.run(&format!("cleanse --to {TARGET}")).await.expect_exit(0);
    bench.run("verify").await.expect_exit(0);
    target(&bench).delete_many(doc! {}).await.expect("deleted");
    for checks in ["", "--counts", "--sample 10", "--full"] {
        bench.run(&format!("verify --settle 1ms {checks}")).await.expect_exit(1);
    }
    bench.run("cleanse --to other").await.expect_exit(0);
    let run = bench.run("verify").await.expect_exit(2);
    assert!(run.json.to_string().contains("--to COLLECTION"), "{}", run.stdout);
    bench.run("verify --to other").await.expect_exit(0);
}
