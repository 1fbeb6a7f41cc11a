//! What a chunk costs: as many index keys as documents, first and last alike.

use bson::{Bson, RawBson, doc};
use mongorekey::config::Target;
use mongorekey::config::values::{ExtendedJson, ReadPreference, Secret};
use mongorekey::mongo::Mongo;
use mongorekey::mongo::source::{Explained, TargetCollection};
use serde_json::json;

use crate::harness::{Bench, DOCS, uri};
use crate::key_api::KeyApi;

async fn opened(bench: &Bench) -> TargetCollection {
    let mongo = Mongo::connect(&Secret::new(uri()), bench.state.name()).await.expect("a connection");
    let target = Target {
        name: "docs".into(),
        namespace: bench.namespace(DOCS).parse().expect("a namespace"),
        legacy_field: "legacyKey".parse().expect("a path"),
        key_field: "newKey".parse().expect("a path"),
        flag_field: "newKeyFlag".parse().expect("a path"),
        filter: ExtendedJson::default(),
    };
    TargetCollection::open(&mongo, &target, ReadPreference::Primary, false).await.expect("an index")
}

fn cheap(returned: u64) -> Explained {
    Explained { index: Some("mongorekey_docs".into()), keys_examined: returned, returned, sorted: false }
}

async fn explained(collection: &TargetCollection, last: Option<Bson>) -> Explained {
    let last = last.map(|id| RawBson::try_from(id).expect("BSON"));
    collection.explain(last.as_ref(), 100).await.expect("an explain")
}

#[tokio::test]
async fn the_first_and_the_last_chunk_cost_no_more_than_they_return() {
    let bench = Bench::new().await;
    bench.insert((1..=3000).map(|id| doc! {"_id": id, "legacyKey": format!("K{id}")})).await;
    bench
        .insert((1..=3000).map(|id| doc! {"_id": format!("text {id:04}"), "legacyKey": format!("T{id}")}))
        .await;
    bench.create_index().await;
    let collection = opened(&bench).await;
    assert_eq!(explained(&collection, None).await, cheap(100));
    assert_eq!(explained(&collection, Some(1500.into())).await, cheap(100));
    // From numbers on to texts.
    assert_eq!(explained(&collection, Some(2950.into())).await, cheap(100));
    assert_eq!(explained(&collection, Some("text 2950".into())).await, cheap(50));

    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.run("backfill --tps 100000 --limit 5950").await.expect_exit(0);
    run.expect_documents(&[("candidates", 6000), ("filled", 5950), ("candidates_left", 50)]);
    assert_eq!(explained(&collection, None).await, cheap(50));
    assert_eq!(explained(&collection, Some("text 2990".into())).await, cheap(10));

    let status = bench.run("index status").await.expect_exit(0);
    assert_eq!(status.number("/targets/0/candidates"), 50);
    assert_eq!(status.json["targets"][0]["used"], json!(true));
    assert_eq!(status.number("/targets/0/explain/keys_examined"), 50);
    assert_eq!(status.number("/targets/0/explain/returned"), 50);
}
