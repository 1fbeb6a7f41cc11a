//! The rejected documents are kept: what is kept and what is quarantined together are the source,
//! document by document and byte for byte.

use std::collections::BTreeMap;

use bson::{Bson, Document, RawDocument, RawDocumentBuf, Timestamp, doc, rawdoc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use crate::cleansing::{
    Bytes, SOURCE, TARGET, assert_same, bytes, bytes_where, configure, delicate, every_type, ids, insert_raw,
    job_name, store_exactly, zero_timestamps,
};
use crate::harness::Bench;
use crate::program::Finished;

pub const QUARANTINE: &str = "rejected";
pub const COMMAND: &str = "cleanse --quarantine rejected";
/// The largest document that a server accepts.
const LARGEST: usize = 16 * 1024 * 1024;

const RULES: &str = r#"keep = '{"bool": {"$ne": false}}'
reject = [
    { name = "low.$number", when = '{"int": {"$lt": 500}}' },
    { name = "no number", when = '{"int": {"$exists": false}}' },
]"#;

fn hits() -> Vec<(&'static str, Document)> {
    vec![
        ("keep", doc! {"bool": false}),
        ("low.$number", doc! {"bool": {"$ne": false}, "int": {"$lt": 500}}),
        ("no number", doc! {"bool": {"$ne": false}, "int": {"$exists": false}}),
    ]
}

fn valid() -> Document {
    doc! {"bool": {"$ne": false}, "int": {"$gte": 500}}
}

/// What stands in the quarantine, with the parts of large documents put together: by rule, the
/// documents by the bytes of their `_id`s.
pub async fn quarantined(bench: &Bench) -> BTreeMap<String, Bytes> {
    let mut by_rule: BTreeMap<String, Bytes> = BTreeMap::new();
    for (id, stored) in bytes(bench, QUARANTINE).await {
        let stored = RawDocumentBuf::from_bytes(stored).expect("valid BSON");
        let fields: Vec<String> =
            stored.iter().map(|field| field.expect("valid BSON").0.as_str().to_owned()).collect();
        let document = if fields == ["_id", "rule", "document"] {
            stored.get_document("document").expect("a document").as_bytes().to_vec()
        } else {
            joined_parts(bench, &stored).await
        };
        let inner = RawDocument::from_bytes(&document).expect("valid BSON");
        let id_of = |document: &RawDocument| format!("{:?}", document.get("_id"));
        assert_eq!(id_of(inner), id_of(&stored));
        let rule = stored.get_str("rule").expect("a rule").to_owned();
        by_rule.entry(rule).or_default().insert(id, document);
    }
    by_rule
}

async fn joined_parts(bench: &Bench, head: &RawDocument) -> Vec<u8> {
    let parts: Collection<Document> = bench.database.collection(&format!("{QUARANTINE}.parts"));
    let id = Document::try_from(head.to_owned()).expect("valid BSON").get("_id").expect("an _id").clone();
    let found: Vec<Document> = parts
        .find(doc! {"_id.of": {"$eq": id}})
        .sort(doc! {"_id.part": 1})
        .await
        .expect("a cursor")
        .try_collect()
        .await
        .expect("parts");
    assert_eq!(i32::try_from(found.len()), Ok(head.get_i32("parts").expect("a number of parts")));
    found.iter().flat_map(|part| part.get_binary_generic("bytes").expect("bytes").clone()).collect()
}

/// Every document of the source is in the target or, under its rule, in the quarantine.
pub async fn expect_split(bench: &Bench, valid: Document, hits: &[(&str, Document)]) {
    assert_same(&bytes(bench, TARGET).await, &bytes_where(bench, SOURCE, valid).await);
    let mut found = quarantined(bench).await;
    for (rule, condition) in hits {
        let expected = bytes_where(bench, SOURCE, condition.clone()).await;
        assert_same(&found.remove(*rule).unwrap_or_default(), &expected);
    }
    assert!(found.is_empty(), "rules that reject nothing: {:?}", found.keys());
    let count = async |collection: &str| bytes(bench, collection).await.len();
    assert_eq!(count(TARGET).await + count(QUARANTINE).await, count(SOURCE).await);
}

fn collection(bench: &Bench, name: &str) -> Collection<Document> {
    bench.database.collection(name)
}

#[tokio::test]
async fn what_each_rule_rejects_is_kept_byte_for_byte_under_ids_of_all_types() {
    let bench = Bench::new().await;
    let mut ids = ids(3000);
    // An odd number is rejected by `keep`.
    ids.insert(701, Bson::Null);
    bench.insert_into(SOURCE, (0..).zip(ids).map(|(number, id)| every_type(id, number))).await;
    insert_raw(&bench, SOURCE, delicate()).await;
    let mut twice = rawdoc! {"_id": "twice", "a": 1};
    twice.append(bson::cstr!("a"), 3);
    insert_raw(&bench, SOURCE, vec![twice]).await;
    for document in zero_timestamps() {
        store_exactly(&bench, SOURCE, document).await;
    }
    configure(&bench, RULES);

    let run = bench.run(COMMAND).await.expect_exit(0);
    expect_split(&bench, valid(), &hits()).await;
    assert_eq!(run.text("/quarantine"), bench.namespace(QUARANTINE));
    let number = |name: &str| run.number(&format!("/documents/{name}"));
    assert!(number("quarantined") > 1000 && number("kept") > 1000);
    assert_eq!(number("kept") + number("quarantined"), number("source"));
    // Nothing of the making is left.
    let indexes = collection(&bench, QUARANTINE).list_index_names().await.expect("names");
    assert_eq!(indexes, ["_id_"]);
    let names = bench.database.list_collection_names().await.expect("names");
    assert!(!names.contains(&format!("{QUARANTINE}.parts")), "{names:?}");
}

#[tokio::test]
async fn rejected_documents_that_leave_no_room_for_their_rule_are_kept_in_parts() {
    let bench = Bench::new().await;
    let sized = |id: i32, size: usize| {
        let empty = rawdoc! {"_id": id, "bool": false, "s": ""}.as_bytes().len();
        rawdoc! {"_id": id, "bool": false, "s": "x".repeat(size - empty)}
    };
    // `{_id, rule, document}` is 39 bytes larger for an int and `keep`.
    for (id, size) in [(1, LARGEST), (2, LARGEST - 38), (3, LARGEST - 39), (4, LARGEST - 40)] {
        insert_raw(&bench, SOURCE, vec![sized(id, size)]).await;
    }
    let zero = Timestamp { time: 0, increment: 0 };
    store_exactly(&bench, SOURCE, doc! {"_id": 5, "bool": false, "t": zero, "s": "x".repeat(LARGEST - 100)})
        .await;
    let deep = (0..178).fold(rawdoc! {"x": 1}, |inner, _| rawdoc! {"n": inner});
    insert_raw(&bench, SOURCE, vec![rawdoc! {"_id": 6, "bool": false, "d": deep}]).await;
    insert_raw(&bench, SOURCE, (7..100).map(|id| rawdoc! {"_id": id, "bool": id % 2 == 0}).collect()).await;
    configure(&bench, r#"keep = '{"bool": true}'"#);
    let expect = async || expect_split(&bench, doc! {"bool": true}, &[("keep", doc! {"bool": false})]).await;

    bench.run(COMMAND).await.expect_exit(0);
    expect().await;
    let parts = collection(&bench, &format!("{QUARANTINE}.parts"));
    let large: Vec<i32> = vec![1, 2, 6];
    let kept_in_parts = async || {
        let heads = collection(&bench, QUARANTINE);
        let mut found: Vec<i32> = Vec::new();
        let mut cursor = heads.find(doc! {"parts": {"$exists": true}}).await.expect("a cursor");
        while let Some(head) = cursor.try_next().await.expect("a document") {
            found.push(head.get_i32("_id").expect("an id"));
        }
        found.sort_unstable();
        found
    };
    let found = kept_in_parts().await;
    assert!(
        large.iter().all(|id| found.contains(id)) && !found.contains(&4) && !found.contains(&3),
        "{found:?}"
    );

    // One becomes valid, one is deleted, one shrinks and one grows.
    let source = collection(&bench, SOURCE);
    source.update_one(doc! {"_id": 1}, doc! {"$set": {"bool": true}}).await.expect("a write");
    source.delete_one(doc! {"_id": 6}).await.expect("a write");
    source.update_one(doc! {"_id": 2}, doc! {"$set": {"s": "small"}}).await.expect("a write");
    let grown = "y".repeat(LARGEST - 50);
    source.update_one(doc! {"_id": 7}, doc! {"$set": {"s": grown}}).await.expect("a write");
    bench.run(COMMAND).await.expect_exit(0);
    expect().await;
    let left: Vec<Bson> = parts.distinct("_id.of", doc! {}).await.expect("values");
    assert!(!left.contains(&1.into()) && !left.contains(&2.into()) && !left.contains(&6.into()), "{left:?}");
    assert!(left.contains(&7.into()), "{left:?}");
}

#[tokio::test]
async fn a_touched_document_changes_sides_and_rules() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..60).map(|id| doc! {"_id": id, "bool": id % 2 == 0, "int": 600})).await;
    configure(&bench, RULES);
    bench.run(COMMAND).await.expect_exit(0);
    expect_split(&bench, valid(), &hits()).await;
    let source = collection(&bench, SOURCE);
    let update = async |id: i32, set: Document| {
        source.update_one(doc! {"_id": id}, doc! {"$set": set}).await.expect("a write");
    };
    update(0, doc! {"bool": false}).await;
    update(1, doc! {"bool": true}).await;
    update(2, doc! {"int": 1}).await;
    update(3, doc! {"bool": true, "int": 2}).await;
    update(5, doc! {"more": "of the same rule"}).await;
    source.delete_one(doc! {"_id": 7}).await.expect("a write");
    source.delete_one(doc! {"_id": 8}).await.expect("a write");
    // Comes back as an equal number of another type.
    source.delete_one(doc! {"_id": 9}).await.expect("a write");
    source.insert_one(doc! {"_id": 9_i64, "bool": false}).await.expect("a write");
    source.insert_one(doc! {"_id": Bson::Null, "bool": false}).await.expect("a write");
    source.insert_one(doc! {"_id": "new", "bool": true}).await.expect("a write");
    bench.run(COMMAND).await.expect_exit(0);
    expect_split(&bench, valid(), &hits()).await;
}

#[tokio::test]
async fn a_quarantine_follows_the_order_of_a_collation_and_of_a_clustered_source() {
    for options in [
        doc! {"collation": {"locale": "en", "strength": 2}},
        doc! {"clusteredIndex": {"key": {"_id": 1}, "unique": true}},
    ] {
        let bench = Bench::new().await;
        let mut create = doc! {"create": SOURCE};
        create.extend(options);
        bench.database.run_command(create).await.expect("a collection");
        let mixed = |n: i32| if n % 2 == 0 { format!("Key-{n:04}") } else { format!("kEY-{n:04}") };
        bench
            .insert_into(SOURCE, (0..2000).map(|n| doc! {"_id": mixed(n), "bool": n % 5 != 0, "int": n}))
            .await;
        configure(&bench, RULES);
        bench.run(&format!("{COMMAND} --parallel 4")).await.expect_exit(0);
        expect_split(&bench, valid(), &hits()).await;
        let source = collection(&bench, SOURCE);
        source.update_many(doc! {"int": {"$gt": 1900}}, doc! {"$set": {"int": 3}}).await.expect("a write");
        bench.run(COMMAND).await.expect_exit(0);
        expect_split(&bench, valid(), &hits()).await;
    }
}

#[tokio::test]
async fn a_dry_run_names_the_quarantine_and_makes_none() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..10).map(|id| doc! {"_id": id, "bool": false})).await;
    configure(&bench, RULES);
    let run = bench.run(&format!("{COMMAND} --dry-run")).await.expect_exit(0);
    assert_eq!(run.text("/quarantine"), bench.namespace(QUARANTINE));
    assert!(bench.text(&format!("{COMMAND} --dry-run")).await.contains(&bench.namespace(QUARANTINE)));
    let without = bench.run("cleanse --dry-run").await.expect_exit(0);
    assert!(without.json["quarantine"].is_null());
    assert_eq!(bench.database.list_collection_names().await.expect("names"), [SOURCE]);
}

#[tokio::test]
async fn a_quarantine_that_is_not_the_jobs_own_is_refused() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..10).map(|id| doc! {"_id": id, "bool": id % 2 == 0, "int": 600})).await;
    configure(&bench, RULES);
    for name in ["source", "target", &bench.namespace("source")] {
        bench.run(&format!("cleanse --quarantine {name}")).await.expect_exit(2);
    }
    for name in [QUARANTINE, "rejected.parts"] {
        bench.insert_into(name, [doc! {"_id": "somebody's"}]).await;
        let run = bench.run(COMMAND).await.expect_exit(3);
        assert!(run.text("/error/message").contains(name), "{}", run.stdout);
        assert_eq!(collection(&bench, name).count_documents(doc! {}).await.expect("a count"), 1);
        bench.run(&format!("{COMMAND} --restart")).await.expect_exit(3);
        collection(&bench, name).drop().await.expect("dropped");
    }
    let names = bench.database.list_collection_names().await.expect("names");
    assert_eq!(names, [SOURCE], "nothing was made");

    bench.run(COMMAND).await.expect_exit(0);
    collection(&bench, QUARANTINE).drop().await.expect("dropped");
    let run = bench.run(COMMAND).await.expect_exit(3);
    assert!(run.text("/error/message").contains("is gone"), "{}", run.stdout);
    // Somebody else's in its place.
    bench.insert_into(QUARANTINE, [doc! {"_id": "somebody's"}]).await;
    bench.run(COMMAND).await.expect_exit(3);
    bench.run(&format!("{COMMAND} --restart")).await.expect_exit(3);
    collection(&bench, QUARANTINE).drop().await.expect("dropped");
    bench.run(&format!("{COMMAND} --restart")).await.expect_exit(0);
    expect_split(&bench, valid(), &hits()).await;
}

#[tokio::test]
async fn a_job_with_a_quarantine_is_another_than_without() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..10).map(|id| doc! {"_id": id, "bool": id % 2 == 0, "int": 600})).await;
    configure(&bench, RULES);
    bench.run("cleanse").await.expect_exit(0);
    bench.run("cleanse").await.expect_exit(0);
    let run = bench.run(COMMAND).await.expect_exit(3);
    assert!(run.text("/error/message").contains("quarantine: was nothing"), "{}", run.stdout);

    bench.run(&format!("{COMMAND} --restart")).await.expect_exit(0);
    expect_split(&bench, valid(), &hits()).await;
    let job = bench.job(&job_name(&bench)).await.expect("a job");
    assert_eq!(job.get_str("quarantine").ok(), Some(bench.namespace(QUARANTINE).as_str()));
    assert!(job.get("quarantine_uuid").is_some_and(|uuid| *uuid != Bson::Null));
    let run = bench.run("cleanse").await.expect_exit(3);
    assert!(run.text("/error/message").contains("is nothing"), "{}", run.stdout);
    let run = bench.run("cleanse --quarantine other").await.expect_exit(3);
    assert!(run.text("/error/message").contains("rejected"), "{}", run.stdout);

    // Copying anew without it drops it: all of it is in the source.
    bench.run("cleanse --restart").await.expect_exit(0);
    let mut names = bench.database.list_collection_names().await.expect("names");
    names.sort();
    assert_eq!(names, [SOURCE, TARGET]);
}

/// After a swap the live collection is the cleansed one: the quarantine is the only place where
/// the rejected documents still are.
#[tokio::test]
async fn copying_anew_never_drops_a_quarantine_whose_source_is_gone() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..100).map(|id| doc! {"_id": id, "bool": id % 2 == 0, "int": 600})).await;
    configure(&bench, RULES);
    bench.run(COMMAND).await.expect_exit(0);
    let rename = doc! {
        "renameCollection": bench.namespace(TARGET), "to": bench.namespace(SOURCE), "dropTarget": true,
    };
    bench.admin().run_command(rename).await.expect("swapped");
    for command in [format!("{COMMAND} --restart"), "cleanse --restart".into()] {
        let run = bench.run(&command).await.expect_exit(3);
        assert!(run.text("/error/message").contains("nowhere else"), "{}", run.stdout);
        assert_eq!(collection(&bench, QUARANTINE).count_documents(doc! {}).await.expect("a count"), 50);
    }
}

/// The named check of a verification.
fn check<'a>(run: &'a Finished, name: &str) -> &'a serde_json::Value {
    let checks = run.json["checks"].as_array().expect("checks");
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name} in {}", run.stdout))
}

#[tokio::test]
async fn verification_looks_at_the_quarantine_too() {
    const SAMPLE: &str = "sample quarantine to source";
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..).zip(ids(1500)).map(|(number, id)| every_type(id, number))).await;
    let empty = rawdoc! {"_id": "large", "bool": false, "s": ""}.as_bytes().len();
    let large = rawdoc! {"_id": "large", "bool": false, "s": "x".repeat(LARGEST - empty)};
    insert_raw(&bench, SOURCE, vec![large]).await;
    configure(&bench, RULES);
    bench.run(COMMAND).await.expect_exit(0);
    let run = bench.run("verify").await.expect_exit(0);
    let count = u64::try_from(bytes(&bench, SOURCE).await.len()).expect("small");
    assert_eq!(check(&run, "quarantine")["found"]["documents"], count);
    assert!(check(&run, SAMPLE)["found"].as_u64().expect("a number") > 700, "{}", run.stdout);
    let run = bench.run("verify --full").await.expect_exit(0);
    assert_eq!(
        check(&run, "full quarantine")["found"],
        collection(&bench, QUARANTINE).count_documents(doc! {}).await.expect("a count")
    );

    let quarantine = collection(&bench, QUARANTINE);
    let expect_fails = async |name: &str, kind: &str| {
        for command in
            ["verify --sample 5000 --counts --settle 100ms", "verify --full --sample 5000 --settle 100ms"]
        {
            let run = bench.run(command).await.expect_exit(1);
            let failed = check(&run, name);
            assert_eq!(failed["passed"], false, "{command}: {}", run.stdout);
            // The whole of it is looked at too; under which rule a document stands is not.
            let whole = run.json["checks"].as_array().expect("checks").iter();
            let mut whole = whole.filter(|check| check["name"] == "full quarantine");
            assert!(whole.all(|check| check["passed"] == (kind == "extra")), "{command}: {}", run.stdout);
            let kinds: Vec<_> = failed["differences"].as_array().into_iter().flatten().collect();
            assert!(kind.is_empty() || kinds.iter().any(|found| found["kind"] == kind), "{}", run.stdout);
        }
    };
    let some = quarantine.find_one(doc! {"rule": "keep", "_id": {"$type": "objectId"}}).await;
    let some = some.expect("a read").expect("a document");
    let filter = doc! {"_id": some.get("_id").expect("an _id").clone()};
    let put_back = async || {
        quarantine.replace_one(filter.clone(), some.clone()).upsert(true).await.expect("a write");
        bench.run("verify").await.expect_exit(0);
    };
    quarantine.delete_one(filter.clone()).await.expect("a write");
    expect_fails("quarantine", "").await;
    put_back().await;
    let update = async |update: Document| {
        quarantine.update_one(filter.clone(), update).await.expect("a write");
    };
    update(doc! {"$set": {"document.double": 0.5}}).await;
    expect_fails(SAMPLE, "different").await;
    put_back().await;
    update(doc! {"$set": {"rule": "low.$number"}}).await;
    expect_fails(SAMPLE, "extra").await;
    put_back().await;
    let parts = collection(&bench, &format!("{QUARANTINE}.parts"));
    parts.delete_one(doc! {"_id.part": 1}).await.expect("a write");
    expect_fails(SAMPLE, "unreadable").await;
}

#[tokio::test]
async fn a_failed_verification_takes_back_the_pass_of_the_quarantine_too() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..).zip(ids(1500)).map(|(number, id)| every_type(id, number))).await;
    configure(&bench, RULES);
    bench.run(COMMAND).await.expect_exit(0);
    bench.run("verify --full").await.expect_exit(0);
    let names = ["", "-quarantine"].map(|end| format!("verify-{}-to-{TARGET}{end}", bench.namespace(SOURCE)));
    let passed = async || {
        let mut passed = Vec::new();
        for name in &names {
            let job = bench.job(name).await.expect("a job");
            passed.push(job.get_document("verdict").expect("a verdict").get_bool("passed").expect("a word"));
        }
        passed
    };
    assert_eq!(passed().await, [true, true]);
    collection(&bench, QUARANTINE).delete_one(doc! {"rule": "keep"}).await.expect("deleted");
    bench.run("verify --counts --settle 1ms").await.expect_exit(1);
    assert_eq!(passed().await, [false, false]);
    let refused = bench.run("cutover --mode swap --max-pause 10s --yes").await.expect_exit(3);
    let gates = refused.json["gates"].as_array().expect("gates");
    let gate = gates.iter().find(|gate| gate["name"] == "verify quarantine");
    assert!(gate.is_some_and(|gate| gate["passed"] == false), "{}", refused.stdout);
}
