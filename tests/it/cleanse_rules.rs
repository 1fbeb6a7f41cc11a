//! Which documents a cleanse leaves behind, how it counts them, and what a dry run shows.

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;
use serde_json::{Value, json};

use crate::cleansing::{FailPoint, SOURCE, TARGET, assert_same, bytes, bytes_where, configure, ids};
use crate::harness::{Bench, uri, uri_with};

/// `keep` and two rules that hit some documents both.
const RULES: &str = r#"
keep = '{"n": {"$lt": 80}}'
reject = [
  { name = "even", when = '{"n": {"$mod": [2, 0]}}' },
  { name = "by 3 $ and .", when = '{"$expr": {"$eq": [{"$mod": ["$n", 3]}, 0]}}' },
]"#;

async fn seed(bench: &Bench) {
    bench.insert_into(SOURCE, (0..100).map(|n| doc! {"_id": format!("d{n}"), "n": n})).await;
}

fn kept(n: i32) -> bool {
    n < 80 && n % 2 != 0 && n % 3 != 0
}

/// Every document counts for the first rule that hits it.
fn rejected_by() -> Value {
    let count = |rule: &dyn Fn(i32) -> bool| (0..100).filter(|n| rule(*n)).count();
    json!({
        "keep": count(&|n| n >= 80),
        "even": count(&|n| n < 80 && n % 2 == 0),
        "by 3 $ and .": count(&|n| n < 80 && n % 2 != 0 && n % 3 == 0),
    })
}

#[tokio::test]
async fn a_dry_run_counts_what_a_copy_does() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, RULES);

    let dry = bench.run("cleanse --dry-run").await.expect_exit(0);
    let run = bench.run("cleanse --count-rules").await.expect_exit(0);
    let count = (0..100).filter(|n| kept(*n)).count();
    for (run, copied) in [(&dry, 0), (&run, count)] {
        let documents = &run.json["documents"];
        assert_eq!(documents["source"], json!(100));
        assert_eq!(documents["kept"], json!(count));
        assert_eq!(documents["rejected"], json!(100 - count));
        assert_eq!(documents["rejected_by"], rejected_by());
        assert_eq!(documents["copied"], json!(copied));
    }
    assert_eq!((&dry.json["dry_run"], &run.json["dry_run"]), (&json!(true), &json!(false)));
    assert_eq!(dry.json["plan"]["expected_documents"], json!(count));
    assert_eq!(bytes(&bench, TARGET).await.len(), count);
    let right = doc! {"$expr": {"$and": [
        {"$lt": ["$n", 80]}, {"$ne": [{"$mod": ["$n", 2]}, 0]}, {"$ne": [{"$mod": ["$n", 3]}, 0]},
    ]}};
    assert_same(&bytes(&bench, TARGET).await, &bytes_where(&bench, SOURCE, right).await);
}

#[tokio::test]
async fn samples_are_ids_of_documents_that_the_rule_rejects() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, ids(200).into_iter().map(|id| doc! {"_id": id})).await;
    configure(&bench, r#"keep = '{"_id": {"$type": "objectId"}}'"#);

    let run = bench.run("cleanse --dry-run").await.expect_exit(0);
    let samples = run.json["samples"]["keep"].as_array().expect("samples").clone();
    assert!(!samples.is_empty());
    let collection: Collection<Document> = bench.database.collection(SOURCE);
    for sample in samples {
        let id = Bson::try_from(sample).expect("canonical extended JSON");
        assert!(id.as_object_id().is_none(), "{id}");
        let count = collection.count_documents(doc! {"_id": {"$eq": &id}}).await.expect("a count");
        assert_eq!(count, 1, "{id}");
    }
}

#[tokio::test]
async fn a_dry_run_writes_nothing() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, RULES);
    let before = operation_time(&bench).await;

    bench.run("cleanse --dry-run").await.expect_exit(0);
    assert!(!bench.has_state().await);
    assert_eq!(bench.database.list_collection_names().await.expect("names"), [SOURCE]);
    let oplog: Collection<Document> = bench.admin().client().database("local").collection("oplog.rs");
    let ours = format!("^({}|{})\\.", bench.database.name(), bench.state.name());
    let written: Vec<Document> = oplog
        .find(doc! {"ts": {"$gt": before}, "ns": {"$regex": ours}})
        .await
        .expect("a cursor")
        .try_collect()
        .await
        .expect("entries");
    assert!(written.is_empty(), "{written:?}");
}

/// The time of the last write, whoever made it.
async fn operation_time(bench: &Bench) -> Bson {
    let hello = bench.admin().run_command(doc! {"hello": 1}).await.expect("an answer");
    hello.get("operationTime").expect("the time of the last write").clone()
}

#[tokio::test]
async fn without_count_rules_a_copy_counts_no_rules() {
    let bench = Bench::new().await;
    seed(&bench).await;
    configure(&bench, RULES);

    let run = bench.run("cleanse").await.expect_exit(0);
    assert_eq!(run.json["documents"]["rejected_by"], json!({}));
    assert_eq!(run.number("/documents/rejected"), 100 - run.number("/documents/copied"));
}

#[tokio::test]
async fn rules_that_depend_on_more_than_the_document_are_refused_at_their_key() {
    let bench = Bench::new().await;
    seed(&bench).await;
    let bad = [
        r#"{"$where": "true"}"#,
        r#"{"$expr": {"$lt": ["$at", "$$NOW"]}}"#,
        r#"{"$expr": {"$lt": ["$at", {"$add": ["$$NOW", 1]}]}}"#,
        r#"{"$expr": {"$lt": ["$at", "$$CLUSTER_TIME"]}}"#,
        r#"{"$or": [{"a": 1}, {"$expr": {"$gt": [{"$rand": {}}, 0.5]}}]}"#,
        r#"{"$sampleRate": 0.5}"#,
        r#"{"$text": {"$search": "x"}}"#,
        r#"{"a": {"$near": [0, 0]}}"#,
        r#"{"a": {"$not": {"$nearSphere": [0, 0]}}}"#,
        r#"{"$expr": {"$function": {"body": "", "args": [], "lang": "js"}}}"#,
    ];
    for rule in bad {
        for (line, key) in [
            (format!("keep = '{rule}'"), "cleanse.keep"),
            (
                format!("reject = [{{ name = 'a', when = '{{}}' }}, {{ name = 'b', when = '{rule}' }}]"),
                "cleanse.reject.1.when",
            ),
        ] {
            configure(&bench, &line);
            for command in ["cleanse", "cleanse --dry-run"] {
                let run = bench.run(command).await.expect_exit(2);
                assert!(run.text("/error/message").contains(key), "{rule}: {}", run.stdout);
            }
        }
    }
    assert!(!bench.has_state().await);
    assert_eq!(bench.database.list_collection_names().await.expect("names"), [SOURCE]);
}

#[tokio::test]
async fn rules_that_the_server_does_not_understand_are_refused() {
    let bench = Bench::new().await;
    seed(&bench).await;
    for rule in [
        r#"{"n": {"$grater": 1}}"#,
        r#"{"$expr": {"$noSuchOperator": 1}}"#,
        r#"{"n": {"$in": 5}}"#,
        r#"{"$and": []}"#,
        r#"{"n": {"$regex": "("}}"#,
    ] {
        configure(&bench, &format!("reject = [{{ name = 'a', when = '{rule}' }}]"));
        let run = bench.run("cleanse").await.expect_exit(2);
        assert!(run.text("/error/message").contains("cleanse"), "{rule}: {}", run.stdout);
    }
    assert!(!bench.has_state().await);
}

#[tokio::test]
async fn a_server_that_fails_does_not_make_the_rules_wrong() {
    let bench = Bench::new().await;
    seed(&bench).await;
    bench.configure_text(
        &crate::cleansing::config(&bench, RULES).replace(&uri(), &uri_with("heartbeatFrequencyMS=500")),
    );
    let commands = FailPoint::reserve("failCommand");
    let data = doc! {"failCommands": ["explain"], "namespace": bench.namespace(SOURCE), "errorCode": 11600};
    commands.set(&bench, doc! {"times": 1}, data).await;
    let run = bench.run("cleanse").await;
    assert_ne!(run.exit, Some(2), "{}", run.output());
}
