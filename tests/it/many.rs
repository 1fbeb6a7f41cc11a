//! Many documents, ten of which share a legacy key each, over two collections.

use std::time::{Duration, Instant};

use bson::doc;
use mongodb::Collection;

use crate::harness::Bench;
use crate::key_api::KeyApi;

const KEYS: i32 = 10_000;
/// Of each key, in each collection.
const COPIES: i32 = 5;

#[tokio::test]
async fn a_hundred_thousand_documents_need_one_call_per_key() {
    let bench = Bench::new().await;
    let each = KEYS * COPIES;
    for name in ["users", "accounts"] {
        bench
            .insert_into(name, (0..each).map(|id| doc! {"_id": id, "legacyKey": format!("K{}", id % KEYS)}))
            .await;
    }
    let api = KeyApi::finding();
    let config = bench.config(&api).no_targets();
    let config = ["users", "accounts"].into_iter().fold(config, |config, name| {
        config.target(name, &bench.namespace(name), ["legacyKey", "newKey", "newKeyFlag"])
    });
    bench.configure(&config);
    bench.run("index create").await.expect_exit(0);
    let begun = Instant::now();
    let run = bench.run("backfill --tps 100000").await.expect_exit(0);
    let took = begun.elapsed();
    let all = u64::try_from(2 * each).expect("small");
    run.expect_documents(&[("candidates", all), ("filled", all)]);
    assert_eq!(api.count(), usize::try_from(KEYS).expect("small"));
    run.expect_calls(u64::try_from(KEYS).expect("small"));
    assert!(api.asked().into_values().all(|asked| asked == 1));
    for name in ["users", "accounts"] {
        let collection: Collection<bson::Document> = bench.database.collection(name);
        let right = doc! {"$expr": {"$eq": ["$newKey", {"$concat": ["N-", "$legacyKey"]}]}};
        let count = collection.count_documents(right).await.expect("a count");
        assert_eq!(count, all / 2, "{name}");
    }
    assert!(took < Duration::from_secs(60), "{took:?}");
}
