//! `check`, `status` and `init`: what is seen before and beside the work.

use bson::{Document, doc};
use serde_json::{Value, json};

use crate::cleansing::{SOURCE, configure, job_name};
use crate::harness::{Bench, DOCS, uri_with, wait_for};
use crate::key_api::{KeyApi, Reply};
use crate::program::Finished;

/// The finding whose name begins so.
fn finding<'a>(run: &'a Finished, name: &str) -> &'a Value {
    let checks = run.json["checks"].as_array().expect("checks");
    checks
        .iter()
        .find(|check| check["name"].as_str().is_some_and(|found| found.starts_with(name)))
        .unwrap_or_else(|| panic!("no {name}: {}", run.stdout))
}

/// Everything that is not right comes with something to do.
fn expect_advice(run: &Finished) {
    for check in run.json["checks"].as_array().expect("checks") {
        assert_eq!(check["level"] == json!("pass"), check["hint"].is_null(), "{check}");
    }
}

#[tokio::test]
async fn good_surroundings_pass_with_one_call() {
    let bench = Bench::with_docs(5).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.run("check").await.expect_exit(0);
    assert_eq!(run.json["passed"], json!(true));
    for name in ["server", "topology", "privileges", "disk", "index", "key API"] {
        assert_eq!(finding(&run, name)["level"], json!("pass"), "{}", run.stdout);
    }
    expect_advice(&run);
    assert_eq!(api.asked().into_iter().collect::<Vec<_>>(), [("K1".to_owned(), 1)]);
    assert_eq!(bench.filled().await, 0);
    assert!(!bench.has_state().await);
}

#[tokio::test]
async fn a_missing_index_is_a_warning() {
    let bench = Bench::new().await;
    bench.insert([doc! {"legacyKey": "a"}]).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.run("check").await.expect_exit(0);
    assert_eq!(finding(&run, "index")["level"], json!("warn"));
    assert!(finding(&run, "index")["hint"].as_str().expect("a hint").contains("index create"));
}

#[tokio::test]
async fn a_missing_collection_fails() {
    let bench = Bench::new().await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.run("check").await.expect_exit(3);
    assert_eq!(run.json["passed"], json!(false));
    assert_eq!(finding(&run, "index")["level"], json!("fail"));
    expect_advice(&run);
}

#[tokio::test]
async fn an_api_that_is_not_what_the_config_says_fails() {
    let bench = Bench::with_docs(5).await;
    let replies: [fn() -> Reply; 5] = [
        || Reply::html(200),
        || Reply::empty(401),
        || Reply::json(200, json!({"other": "x"})),
        || Reply::json(302, json!({})).header("location", "http://127.0.0.1:9/"),
        Reply::reset,
    ];
    for reply in replies {
        let api = KeyApi::start(move |_| reply());
        bench.configure(&bench.config(&api));
        let run = bench.run("check").await.expect_exit(3);
        assert_eq!(finding(&run, "key API")["level"], json!("fail"), "{}", run.stdout);
        expect_advice(&run);
        assert_eq!(api.count(), 1);
    }
}

#[tokio::test]
async fn an_api_that_is_down_or_hangs_fails() {
    let bench = Bench::with_docs(5).await;
    let gone = KeyApi::finding().key_url();
    bench.configure(&bench.config_for_url(&gone));
    let run = bench.run("check").await.expect_exit(3);
    assert_eq!(finding(&run, "key API")["level"], json!("fail"));
    let hanging = KeyApi::start(|_| Reply::hang());
    bench.configure(&bench.config(&hanging).key_api("timeout = '300ms'"));
    let run = bench.run("check").await.expect_exit(3);
    assert_eq!(finding(&run, "key API")["level"], json!("fail"));
}

#[tokio::test]
async fn an_api_that_is_overloaded_is_a_warning() {
    let bench = Bench::with_docs(5).await;
    for status in [429, 503] {
        let api = KeyApi::start(move |_| Reply::empty(status));
        bench.configure(&bench.config(&api));
        let run = bench.run("check").await.expect_exit(0);
        assert_eq!(finding(&run, "key API")["level"], json!("warn"), "{}", run.stdout);
    }
}

#[tokio::test]
async fn a_different_index_fails() {
    let bench = Bench::new().await;
    bench.insert([doc! {"legacyKey": "a"}]).await;
    let index = doc! {"name": "mongorekey_docs", "key": {"newKey": 1}};
    bench.database.run_command(doc! {"createIndexes": DOCS, "indexes": [index]}).await.expect("created");
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.run("check").await.expect_exit(3);
    assert_eq!(finding(&run, "index")["level"], json!("fail"));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_a_refusal_without_the_uri() {
    let bench = Bench::new().await;
    let uri = "mongodb://user:hunter2@127.0.0.1:9/?serverSelectionTimeoutMS=300";
    bench.configure(&bench.config_for_url("http://127.0.0.1:9/{key}").uri(uri));
    for command in ["check", "plan", "status", "index status", "verify"] {
        let run = bench.run(command).await.expect_exit(3);
        assert!(!run.output().contains("hunter2"), "{}", run.output());
    }
}

#[tokio::test]
async fn status_lists_jobs_and_finds_one_by_its_name() {
    let bench = Bench::with_docs(10).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    assert_eq!(bench.run("status").await.expect_exit(0).json["jobs"], json!([]));
    assert!(!bench.has_state().await);
    bench.run("backfill --tps 1000 --job one").await.expect_exit(0);
    bench.insert_into(SOURCE, [doc! {"_id": 1}]).await;
    configure(&bench, "");
    bench.run("cleanse").await.expect_exit(0);

    let run = bench.run("status").await.expect_exit(0);
    let jobs = run.json["jobs"].as_array().expect("jobs");
    let names: Vec<_> = jobs.iter().map(|job| job["_id"].as_str().expect("a name")).collect();
    assert_eq!(names, [job_name(&bench).as_str(), "one"]);
    for job in jobs {
        assert_eq!((&job["state"], &job["running_now"]), (&json!("completed"), &json!(false)));
    }
    let run = bench.run("status one").await.expect_exit(0);
    assert_eq!(run.json["jobs"][0]["command"], json!("backfill"));
    assert_eq!(run.json["jobs"].as_array().expect("jobs").len(), 1);
    let run = bench.run("status two").await.expect_exit(3);
    assert!(run.text("/error/message").contains("two"));
}

#[tokio::test]
async fn status_tells_a_running_job_from_one_that_died() {
    let bench = Bench::with_docs(50).await;
    let api = KeyApi::start(|call| Reply::found(call).after(std::time::Duration::from_millis(20)));
    bench.configure(&bench.config(&api));
    let mut run = bench.program("backfill --tps 1 --job one").spawn();
    wait_for("the first calls", async || {
        assert!(run.is_running(), "{}", run.stderr());
        api.count() > 0
    })
    .await;
    let status = bench.run("status one").await.expect_exit(0);
    assert_eq!(status.json["jobs"][0]["running_now"], json!(true));
    assert_eq!(status.json["jobs"][0]["lease"]["holder"]["pid"], json!(run.pid()));
    run.kill();
    wait_for("the end of its lease", async || {
        bench.run("status one").await.expect_exit(0).json["jobs"][0]["running_now"] == json!(false)
    })
    .await;
    let shown = std::process::Command::new(env!("CARGO_BIN_EXE_mongorekey"))
        .current_dir(&bench.folder)
        .args(["status", "one"])
        .output()
        .expect("the program runs");
    let text = String::from_utf8_lossy(&shown.stdout);
    assert!(text.contains("died"), "{text}");
}

#[tokio::test]
async fn init_writes_a_file_that_passes_and_overwrites_none() {
    let bench = Bench::new().await;
    let file = bench.folder.join("mongorekey.toml");
    let run = bench.run("init").await.expect_exit(0);
    assert_eq!(run.text("/command"), "init");
    let text = std::fs::read_to_string(&file).expect("a config");
    let comments = text.lines().filter(|line| line.starts_with('#')).count();
    assert!(comments > 15, "{text}");
    let nowhere = "mongodb://127.0.0.1:9/?serverSelectionTimeoutMS=300";
    bench.program("status").env("MONGODB_URI", nowhere).run().await.expect_exit(3);
    bench.program("status").env("MONGODB_URI", &uri_with("appName=init")).run().await.expect_exit(0);

    std::fs::write(&file, "mine").expect("written");
    bench.run("init").await.expect_exit(2);
    assert_eq!(std::fs::read_to_string(&file).expect("a config"), "mine");
    bench.run("init --force").await.expect_exit(0);
    assert_eq!(std::fs::read_to_string(&file).expect("a config"), text);
    bench.run("--config nowhere/x.toml init").await.expect_exit(2);
}

#[tokio::test]
async fn a_missing_source_of_the_cleanse_fails() {
    let bench = Bench::new().await;
    let api = KeyApi::finding();
    let rest = bench.config_for_url(&api.key_url()).no_targets().text();
    bench.configure_text(&format!("{rest}\n[cleanse]\nsource = '{}'\n", bench.namespace(SOURCE)));
    bench.run("check").await.expect_exit(3);
}

#[tokio::test]
async fn a_state_database_with_jobs_of_an_application_is_refused_and_left_alone() {
    let bench = Bench::with_docs(3).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let theirs = doc! {"_id": 7, "title": "plumber"};
    let jobs: mongodb::Collection<Document> = bench.state.collection("jobs");
    jobs.insert_one(theirs.clone()).await.expect("theirs");
    let checked = bench.run("check").await.expect_exit(3);
    assert!(checked.stdout.contains("no jobs of mongorekey"), "{}", checked.stdout);
    let probes = api.count();
    let refused = bench.run("backfill --tps 100").await.expect_exit(3);
    assert!(refused.json["error"]["hint"].to_string().contains("state_database"), "{}", refused.stdout);
    assert_eq!(jobs.count_documents(doc! {}).await.expect("a count"), 1);
    assert_eq!((bench.filled().await, api.count()), (0, probes));
    jobs.delete_one(theirs).await.expect("gone");
    bench.run("backfill --tps 100").await.expect_exit(0);
}
