//! Elections, and members that die, freeze or lag behind. Each test has three members of its own.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bson::{Bson, Document, doc};
use mongodb::Collection;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cleansing::{
    SOURCE, TARGET, assert_same, bytes, bytes_where, configure, count_now, every_type, ids,
};
use crate::harness::{Bench, DOCS, Random, wait_for};
use crate::key_api::{KeyApi, Reply};
use crate::own_set::ThreeNodes;
use crate::program::Finished;

const DOCUMENTS: i32 = 600;
/// Every third document shares its key with another one.
const KEYS: usize = 400;
const COMMAND: &str = "backfill --tps 100 --chunk 40 --concurrency 8";

/// A backfill of four seconds, and an application that fills keys meanwhile.
struct UnderWay {
    bench: Bench,
    api: KeyApi,
    application: JoinHandle<BTreeSet<i32>>,
    stop: CancellationToken,
}

impl UnderWay {
    async fn on(set: &ThreeNodes) -> Self {
        let bench = Bench::on(&set.uri).await;
        let key = |id: i32| id % i32::try_from(KEYS).expect("small");
        let documents = (0..DOCUMENTS).map(|id| doc! {"_id": id, "legacyKey": format!("K{}", key(id))});
        bench.insert(documents).await;
        bench.create_index().await;
        let api = KeyApi::start(|call| Reply::found(call).after(Duration::from_millis(10)));
        bench.configure(&bench.config(&api));
        let stop = CancellationToken::new();
        let application = tokio::spawn(fill_some(bench.docs(), stop.clone()));
        Self { bench, api, application, stop }
    }

    async fn until_called(&self, calls: usize) {
        wait_for("calls", async || self.api.count() >= calls).await;
    }

    /// Nothing is lost, overwritten or asked for twice, and the counts are those of the documents.
    async fn expect_complete(self, run: &Finished) {
        self.stop.cancel();
        let by_application = self.application.await.expect("no panic");
        let (mut ours, mut theirs) = (0, BTreeSet::new());
        for document in self.bench.documents(DOCS).await {
            let id = document.get_i32("_id").expect("an id");
            let (legacy, key) = (document.get_str("legacyKey"), document.get_str("newKey"));
            match key.unwrap_or_else(|_| panic!("not filled: {document}\n{}", run.output())) {
                key if key == format!("APP-{id}") => drop(theirs.insert(id)),
                key => {
                    assert_eq!(key, format!("N-{}", legacy.expect("kept")), "{document}");
                    ours += 1;
                }
            }
            assert_eq!(document.len(), 3, "{document}");
        }
        assert!(by_application.len() > 5, "the application filled {} documents only", by_application.len());
        assert_eq!(theirs, by_application, "what the application wrote stays");
        run.expect_documents(&[
            ("candidates", run.number("/documents/candidates")),
            ("filled", ours),
            ("already_filled", run.number("/documents/already_filled")),
        ]);
        let asked = self.api.asked();
        let twice: Vec<_> = asked.iter().filter(|(_, times)| **times > 1).collect();
        assert!(twice.is_empty(), "asked for more than once: {twice:?}");
        assert!(asked.len() <= KEYS);
        run.expect_calls(u64::try_from(asked.len()).expect("small"));
    }
}

/// Fills documents that nobody has filled; returns those whose key a majority has.
async fn fill_some(docs: Collection<Document>, stop: CancellationToken) -> BTreeSet<i32> {
    let mut random = Random::seeded(5);
    let mut filled = BTreeSet::new();
    while !stop.is_cancelled() {
        let id = i32::try_from(random.below(usize::try_from(DOCUMENTS).expect("small"))).expect("small");
        let untouched = doc! {"_id": id, "newKey": Bson::Null};
        let set = doc! {"$set": {"newKey": format!("APP-{id}")}};
        // A write whose answer is lost may have been done: it is looked at until that is known.
        loop {
            let majority = mongodb::options::WriteConcern::majority();
            match docs.update_one(untouched.clone(), set.clone()).write_concern(majority).await {
                Ok(_) => break,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
        loop {
            match docs.find_one(doc! {"_id": id}).await {
                Ok(found) => {
                    let document = found.expect("the document");
                    if document.get_str("newKey").is_ok_and(|key| key.starts_with("APP-")) {
                        filled.insert(id);
                    }
                    break;
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    filled
}

#[tokio::test]
async fn timing_elections_in_the_middle_of_a_backfill_cost_nothing() {
    let set = ThreeNodes::start().await;
    let work = UnderWay::on(&set).await;
    let run = work.bench.program(COMMAND).spawn();
    for calls in [40, 120, 200] {
        work.until_called(calls).await;
        set.step_down().await;
    }
    let run = run.finish().await.expect_exit(0);
    work.expect_complete(&run).await;
}

#[tokio::test]
async fn timing_a_primary_that_is_killed_costs_nothing() {
    let set = ThreeNodes::start().await;
    let work = UnderWay::on(&set).await;
    let run = work.bench.program(COMMAND).spawn();
    work.until_called(100).await;
    set.primary().await.kill();
    let run = run.finish().await.expect_exit(0);
    work.expect_complete(&run).await;
}

#[tokio::test]
async fn timing_a_primary_that_freezes_costs_nothing() {
    let set = ThreeNodes::start().await;
    let work = UnderWay::on(&set).await;
    let run = work.bench.program(COMMAND).spawn();
    work.until_called(100).await;
    let frozen = set.primary().await;
    frozen.freeze();
    let started = Instant::now();
    let run = run.finish().await;
    frozen.thaw();
    let run = run.expect_exit(0);
    assert!(started.elapsed() < Duration::from_secs(60), "it took {:?}", started.elapsed());
    work.expect_complete(&run).await;
}

#[tokio::test]
async fn timing_a_frozen_secondary_holds_up_neither_reads_nor_majorities() {
    let set = ThreeNodes::start().await;
    let work = UnderWay::on(&set).await;
    let run = work.bench.program(COMMAND).spawn();
    work.until_called(100).await;
    let frozen = set.secondaries().await[0];
    frozen.freeze();
    let started = Instant::now();
    let run = run.finish().await;
    frozen.thaw();
    let run = run.expect_exit(0);
    assert!(started.elapsed() < Duration::from_secs(60), "it took {:?}", started.elapsed());
    work.expect_complete(&run).await;
}

/// From here on one secondary stands still at what it has, and the other one, which keeps majorities
/// going, takes no reads.
async fn let_one_lag(set: &ThreeNodes, bench: &Bench, documents: u64) {
    let [lagging, other] = set.secondaries().await[..] else { panic!("two secondaries") };
    wait_for("the member to have all documents", async || {
        let docs: Collection<Document> = lagging.database(bench.database.name()).collection(DOCS);
        docs.estimated_document_count().await.expect("a count") == documents
    })
    .await;
    lagging.fail_point("rsSyncApplyStop", doc! {}).await;
    other.admin().run_command(doc! {"replSetMaintenance": true}).await.expect("no reads");
}

#[tokio::test]
async fn what_only_a_lagging_member_takes_for_a_candidate_is_neither_asked_for_nor_written() {
    let set = ThreeNodes::start().await;
    let bench = Bench::with_docs_on(&set.uri, 300).await;
    let_one_lag(&set, &bench, 300).await;
    let fill = vec![doc! {"$set": {"newKey": {"$concat": ["APP-", "$legacyKey"]}}}];
    bench.docs().update_many(doc! {"_id": {"$mod": [2, 0]}}, fill).await.expect("an update");
    bench.docs().delete_many(doc! {"_id": {"$gt": 280}}).await.expect("a delete");

    let api = KeyApi::finding();
    for preference in ["secondary", "secondaryPreferred", "nearest"] {
        bench.configure(&bench.config(&api).backfill(&format!("read_preference = '{preference}'")));
        let run = bench.run("backfill --tps 2000 --chunk 5").await.expect_exit(0);
        assert_eq!(run.number("/documents/candidates_left"), 0, "{preference}: {}", run.stdout);
        assert_eq!(run.number("/documents/failed"), 0, "{preference}: {}", run.stdout);
        assert_eq!(api.count(), 140, "{preference}");
    }
    assert_eq!(bench.documents(DOCS).await.len(), 280, "a deleted document is not made again");
    for document in bench.documents(DOCS).await {
        let id = document.get_i32("_id").expect("an id");
        let whose = if id % 2 == 0 { "APP" } else { "N" };
        assert_eq!(document.get_str("newKey").ok(), Some(&*format!("{whose}-K{id}")), "{document}");
    }
}

#[tokio::test]
async fn candidates_that_a_lagging_member_does_not_show_yet_are_filled_all_the_same() {
    let set = ThreeNodes::start().await;
    let bench = Bench::with_docs_on(&set.uri, 100).await;
    let_one_lag(&set, &bench, 100).await;
    bench.insert((101..=200).map(|id| doc! {"_id": id, "legacyKey": format!("K{id}")})).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api).backfill("read_preference = 'secondary'"));
    let run = bench.run("backfill --tps 2000 --chunk 20").await.expect_exit(0);
    run.expect_documents(&[("candidates", 200), ("filled", 200)]);
    assert_eq!((bench.filled().await, api.count()), (200, 200));
}

/// A copy of some seconds.
async fn copy_on(set: &ThreeNodes) -> Bench {
    let bench = Bench::on(&set.uri).await;
    bench.insert_into(SOURCE, (0..).zip(ids(12_000)).map(|(number, id)| every_type(id, number))).await;
    configure(&bench, "keep = '{\"bool\": true}'");
    let slow = doc! {"namespace": bench.namespace(SOURCE), "waitForMillis": 150};
    set.primary().await.fail_point("setYieldAllLocksWait", slow).await;
    bench
}

async fn until_copying(bench: &Bench) {
    wait_for("the copy", async || count_now(bench, TARGET, doc! {}).await > 0).await;
}

async fn expect_copied(bench: &Bench, run: &Finished) {
    let expected = bytes_where(bench, SOURCE, doc! {"bool": true}).await;
    assert!(expected.len() > 5000);
    assert_same(&bytes(bench, TARGET).await, &expected);
    let copied = u64::try_from(expected.len()).expect("small");
    assert_eq!(run.number("/documents/copied"), copied, "{}", run.stdout);
    let undisturbed = bench.run("cleanse --to undisturbed").await.expect_exit(0);
    assert_eq!(run.json["documents"], undisturbed.json["documents"]);
    assert_same(&bytes(bench, TARGET).await, &bytes(bench, "undisturbed").await);
}

#[tokio::test]
async fn timing_elections_in_the_middle_of_a_copy_change_nothing() {
    let set = ThreeNodes::start().await;
    let bench = copy_on(&set).await;
    let mut run = bench.program("cleanse --parallel 2").spawn();
    until_copying(&bench).await;
    assert!(run.is_running(), "the copy was over too early: {}", run.stderr());
    set.step_down().await;
    set.step_down().await;
    let run = run.finish().await.expect_exit(0);
    expect_copied(&bench, &run).await;
}

#[tokio::test]
async fn timing_a_primary_that_is_killed_in_the_middle_of_a_copy_changes_nothing() {
    let set = ThreeNodes::start().await;
    let bench = copy_on(&set).await;
    let mut run = bench.program("cleanse --parallel 2").spawn();
    until_copying(&bench).await;
    assert!(run.is_running(), "the copy was over too early: {}", run.stderr());
    set.primary().await.kill();
    let run = run.finish().await.expect_exit(0);
    expect_copied(&bench, &run).await;
}
