//! `cleanup`: what a job has left goes, what is the application's stays.

use bson::{Document, doc};
use mongodb::Collection;

use crate::cleansing::{SOURCE, TARGET, bytes, configure, job_name, name_now};
use crate::harness::{Bench, wait_for};

async fn cleansed() -> Bench {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..300).map(|id| doc! {"_id": id, "valid": id % 3 != 0})).await;
    configure(&bench, "keep = '{\"valid\": true}'");
    bench.run("cleanse").await.expect_exit(0);
    bench
}

fn state(bench: &Bench, name: &str) -> Collection<Document> {
    bench.state.collection(name)
}

async fn left(bench: &Bench, name: &str) -> u64 {
    state(bench, name).count_documents(doc! {}).await.expect("a count")
}

#[tokio::test]
async fn a_finished_job_goes_and_the_collections_stay() {
    let bench = cleansed().await;
    let job = job_name(&bench);
    bench.run("verify --full").await.expect_exit(0);
    state(&bench, "keys_of_an_api").insert_one(doc! {"_id": "K1", "newKey": "N1"}).await.expect("a write");
    // Marks of a job whose name begins with the same letters are another's.
    let other = doc! {"_id": {"job": format!("{job}2"), "id": 1}, "generation": 1_i64};
    state(&bench, "marks").insert_one(other).await.expect("a write");
    let own = doc! {"_id": {"job": &job, "id": "x"}, "generation": 1_i64};
    state(&bench, "marks").insert_one(own).await.expect("a write");

    let unasked = bench.run(&format!("cleanup {job}")).await.expect_exit(2);
    assert!(unasked.stderr.contains("1 marks") && unasked.stderr.contains("ranges"), "{}", unasked.stderr);
    assert!(bench.job(&job).await.is_some(), "removed without an answer");

    let run = bench.run(&format!("cleanup {job} --yes")).await.expect_exit(0);
    assert_eq!((run.number("/removed/marks"), run.number("/removed/jobs")), (1, 1));
    assert!(run.number("/removed/ranges") >= 4, "{}", run.stdout);
    assert!(bench.job(&job).await.is_none());
    assert_eq!((left(&bench, "ranges").await, left(&bench, "marks").await), (0, 1));
    assert_eq!(left(&bench, "lanes").await, 0);
    assert_eq!((left(&bench, "keys_of_an_api").await, bytes(&bench, TARGET).await.len()), (1, 200));
    assert!(left(&bench, "verify_ranges").await > 0, "the comparison is a job of its own");

    let verify = format!("verify-{}-to-{TARGET}", bench.namespace(SOURCE));
    bench.run(&format!("cleanup {verify} --yes")).await.expect_exit(0);
    assert_eq!((left(&bench, "verify_ranges").await, left(&bench, "pulse").await), (0, 0));
    bench.run(&format!("cleanup {job} --yes")).await.expect_exit(3);
    // The target is nobody's now.
    bench.run("cleanse").await.expect_exit(3);
}

/// While it is copied it has a name that nobody would look for.
#[tokio::test]
async fn an_unfinished_copy_is_named_and_dropped_where_that_is_asked_for() {
    for (flag, is_dropped) in [("", false), (" --drop-old-collection", true)] {
        let bench = Bench::new().await;
        bench.insert_into(SOURCE, (0..300).map(|id| doc! {"_id": id})).await;
        configure(&bench, "");
        let run =
            bench.program("cleanse --parallel 1").env("MONGOREKEY_CRASH_AT", "range_copied:3").run().await;
        assert_eq!(run.exit, None, "killed by itself: {}", run.output());
        let name = name_now(&bench, TARGET).await;
        assert_ne!(name, TARGET);
        let other = bench.run("cleanse --job other").await.expect_exit(3);
        assert!(other.text("/error/message").contains(&job_name(&bench)), "{}", other.stdout);
        let run = bench.run(&format!("cleanup {} --yes{flag}", job_name(&bench))).await.expect_exit(0);
        assert!(run.stderr.contains(&name), "{}", run.stderr);
        assert_eq!(name_now(&bench, TARGET).await == TARGET, is_dropped, "{}", run.stderr);
        bench.run("cleanse --job other").await.expect_exit(0);
        assert_eq!(bytes(&bench, TARGET).await.len(), 300);
    }
}

#[tokio::test]
async fn a_running_job_and_an_unsettled_cutover_are_refused() {
    let bench = cleansed().await;
    let job = job_name(&bench);
    let run = bench.program("cleanse --follow").spawn();
    wait_for("the follower", async || run.stderr().contains("follows")).await;
    let refused = bench.run(&format!("cleanup {job} --yes")).await.expect_exit(3);
    assert!(refused.text("/error/message").contains("is being run"), "{}", refused.stdout);
    bench.run(&format!("control {job} stop")).await.expect_exit(0);
    run.finish().await.expect_exit(143);

    let jobs = state(&bench, "jobs");
    let fenced = doc! {"$set": {"cutover.state": "fenced"}};
    jobs.update_one(doc! {"_id": &job}, fenced).await.expect("a write");
    let refused = bench.run(&format!("cleanup {job} --yes")).await.expect_exit(3);
    assert!(refused.text("/error/hint").contains("--abort"), "{}", refused.stdout);
    assert!(left(&bench, "ranges").await >= 4);
}

#[tokio::test]
async fn a_cleanup_that_is_killed_leaves_nothing_that_could_be_taken_for_a_whole_job() {
    let bench = cleansed().await;
    let job = job_name(&bench);
    let jobs = state(&bench, "jobs");
    // A copy that has just begun: without its ranges it would seem complete.
    jobs.update_one(doc! {"_id": &job}, doc! {"$set": {"phase": "copy"}}).await.expect("a write");
    let run = bench.program(&format!("cleanup {job} --yes"));
    let run = run.env("MONGOREKEY_CRASH_AT", "cleanup_removed:1").run().await;
    assert_eq!(run.exit, None, "it was not killed: {}", run.output());
    bench.run("cleanse").await.expect_exit(3);
    assert_eq!(bytes(&bench, TARGET).await.len(), 200);
    bench.run(&format!("cleanup {job} --yes")).await.expect_exit(0);
    assert!(bench.job(&job).await.is_none());
}

#[tokio::test]
async fn collections_that_were_set_aside_go_only_when_asked_for_and_only_if_they_are_the_same() {
    for (flag, replaced) in [("", false), (" --drop-old-collection", false), (" --drop-old-collection", true)]
    {
        let bench = cleansed().await;
        let job = job_name(&bench);
        // As a cutover leaves it: the former source under another name.
        let rename = doc! {"renameCollection": bench.namespace(SOURCE), "to": bench.namespace("old")};
        bench.admin().run_command(rename).await.expect("renamed");
        let known = doc! {"$set": {"old_collection": bench.namespace("old"), "cutover.state": "finished"}};
        state(&bench, "jobs").update_one(doc! {"_id": &job}, known).await.expect("a write");
        if replaced {
            let old: Collection<Document> = bench.database.collection("old");
            old.drop().await.expect("dropped");
            bench.insert_into("old", [doc! {"_id": "somebody else's"}]).await;
        }
        let run = bench.run(&format!("cleanup {job} --yes{flag}")).await.expect_exit(0);
        let (dropped, documents) = match (flag, replaced) {
            ("", _) => (0, 300),
            (_, false) => (1, 0),
            (_, true) => (0, 1),
        };
        assert_eq!(run.json["dropped"].as_array().map(Vec::len), Some(dropped), "{}", run.stdout);
        assert_eq!(bytes(&bench, "old").await.len(), documents, "{}", run.stdout);
        assert_eq!(bytes(&bench, TARGET).await.len(), 200);
    }
}

#[tokio::test]
async fn a_quarantine_is_kept_unless_its_end_is_asked_for() {
    for (flag, documents) in [("", 100), (" --drop-old-collection", 0)] {
        let bench = Bench::new().await;
        bench.insert_into(SOURCE, (0..300).map(|id| doc! {"_id": id, "valid": id % 3 != 0})).await;
        configure(&bench, "keep = '{\"valid\": true}'");
        bench.run("cleanse --quarantine rejected").await.expect_exit(0);
        bench.run(&format!("cleanup {} --yes{flag}", job_name(&bench))).await.expect_exit(0);
        assert_eq!(bytes(&bench, "rejected").await.len(), documents);
    }
}
