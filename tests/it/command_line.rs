//! What is typed and configured: mistakes name their place and touch nothing.

use bson::doc;
use serde_json::{Value, json};

use crate::config::Config;
use crate::harness::{Bench, DOCS, uri};
use crate::key_api::{KeyApi, Reply};
use crate::program::Finished;

/// A usage error with all that the contract says.
#[track_caller]
fn expect_usage_error(run: Finished, command: &str, words: &[&str]) {
    let run = run.expect_exit(2);
    assert_eq!(run.json["schema"], json!(1), "{}", run.stdout);
    assert_eq!(run.json["command"], json!(command), "{}", run.stdout);
    assert_eq!(run.json.get("job"), Some(&Value::Null), "{}", run.stdout);
    assert_eq!(run.text("/error/code"), "usage");
    assert!(run.json["error"].get("hint").is_some(), "{}", run.stdout);
    for word in words {
        assert!(run.text("/error/message").contains(word), "no {word} in {}", run.stdout);
    }
    assert_eq!(run.stdout.lines().count(), 1, "{}", run.stdout);
    assert!(run.stderr.contains(run.text("/error/message")), "{}", run.stderr);
}

/// A mistake in a config that is right otherwise; the line that holds `marker` is the wrong one.
async fn expect_config_error(bench: &Bench, config: &Config, marker: &str, key: &str) {
    let text = config.text();
    let index = text.lines().position(|line| line.contains(marker)).expect("the mistake");
    bench.configure_text(&text);
    let run = bench.run("backfill --tps 1000").await;
    expect_usage_error(run, "backfill", &[&format!("mongorekey.toml:{}", index + 1), key]);
}

#[tokio::test]
async fn every_mistake_in_the_config_names_file_line_and_key() {
    let bench = Bench::with_docs(3).await;
    let api = KeyApi::finding();
    let config = || bench.config(&api);
    let cases: [(Config, &str, &str); 20] = [
        (config().key_api("key_pointr = '/newKey'"), "key_pointr", "key_pointr"),
        (config().backfill("max_not_found_shar = 0.9"), "max_not_found_shar", "max_not_found_shar"),
        (config().target_line("legcy = 'a'"), "legcy", "legcy"),
        (config().key_api("key_pointer = 'newKey'"), "key_pointer", "key_api.key_pointer"),
        (config().key_api("echo_pointer = '/a~b'"), "echo_pointer", "key_api.echo_pointer"),
        (config().key_api("key_pattern = '('"), "key_pattern", "key_api.key_pattern"),
        (config().key_api("timeout = '5 apples'"), "timeout", "key_api.timeout"),
        (config().key_api("timeout = 5"), "timeout", "key_api.timeout"),
        (config().key_api("max_attempts = 'many'"), "max_attempts", "key_api.max_attempts"),
        (
            config().key_api("headers = { Authorization = 'Bearer ${MONGOREKEY_IT_UNSET}' }"),
            "headers",
            "MONGOREKEY_IT_UNSET",
        ),
        (
            config().key_api("not_found_when = [{ pointer = 'code', equals = 1 }]"),
            "not_found_when",
            "key_api.not_found_when",
        ),
        (config().target_line("filter = '{\"a\": }'"), "filter", "backfill.targets.filter"),
        (config().target_line("filter = '{\"a\": {\"$oid\": \"1\"}}'"), "filter", "backfill.targets.filter"),
        (config().backfill("windows = ['25:00-26:00']"), "windows", "backfill.windows"),
        (config().backfill("windows = ['1-2']"), "windows", "backfill.windows"),
        (config().backfill("time_zone = 'Asia/Soul'"), "time_zone", "backfill.time_zone"),
        (config().backfill("tps = 0"), "tps", "backfill.tps"),
        (
            config().backfill("max_not_found_share = 1.5"),
            "max_not_found_share",
            "backfill.max_not_found_share",
        ),
        (config().backfill("concurrency = 'lots'"), "concurrency", "backfill.concurrency"),
        (config().backfill("chunk = 0"), "chunk", "backfill.chunk"),
    ];
    for (config, marker, key) in &cases {
        expect_config_error(&bench, config, marker, key).await;
    }
    bench.configure_text("[mongodb\n");
    expect_usage_error(bench.run("backfill").await, "backfill", &["mongorekey.toml:1"]);
    assert!(!bench.has_state().await);
    assert_eq!(api.count(), 0);
    assert_eq!(bench.filled().await, 0);
}

#[tokio::test]
async fn what_no_call_can_carry_is_refused_before_the_job_begins() {
    let bench = Bench::with_docs(3).await;
    let api = KeyApi::finding();
    for (line, named) in [
        ("headers = { 'X Y' = 'a' }", "X Y"),
        ("headers = { Authorization = \"Bearer hunter1\\n\" }", "key_api.headers.Authorization"),
        ("idempotency_header = 'a b'", "idempotency_header"),
    ] {
        bench.configure(&bench.config(&api).key_api(line));
        for command in ["backfill", "backfill --dry-run"] {
            let run = bench.run(command).await;
            assert!(!run.output().contains("hunter1"), "{}", run.output());
            expect_usage_error(run, "backfill", &[named]);
        }
    }
    bench.configure(&bench.config(&api));
    for without in ["--canary 1 --yes", "--workers 2", "--join"] {
        let run = bench.run(&format!("backfill --from-key-map {without}")).await;
        expect_usage_error(run, "backfill", &["--from-key-map"]);
    }
    assert!(!bench.has_state().await);
    assert_eq!(api.count(), 0);
}

#[tokio::test]
async fn targets_that_can_not_be_are_refused() {
    let bench = Bench::with_docs(3).await;
    let api = KeyApi::finding();
    let docs = bench.namespace(DOCS);
    for (fields, key) in [
        (["a", "a.b", "flag"], "key_field"),
        (["a", "b", "b"], "flag_field"),
        (["a", "_id", "flag"], "key_field"),
        (["$a", "b", "flag"], "legacy_field"),
        (["a", "b.0", "flag"], "key_field"),
        (["a", "b", ""], "flag_field"),
    ] {
        let config = bench.config(&api).no_targets().target("docs", &docs, fields);
        bench.configure(&config);
        expect_usage_error(bench.run("backfill").await, "backfill", &["mongorekey.toml:", key]);
    }
    let fields = ["a", "b", "c"];
    bench.configure(&bench.config(&api).target("docs", "x.y", fields));
    expect_usage_error(bench.run("backfill").await, "backfill", &["mongorekey.toml:", "name"]);
    bench.configure(&bench.config(&api).no_targets().target("docs", "users", fields));
    expect_usage_error(bench.run("backfill").await, "backfill", &["mongorekey.toml:", "collection"]);
    bench.configure(&bench.config(&api));
    expect_usage_error(bench.run("backfill --target users").await, "backfill", &["users"]);
    assert!(!bench.has_state().await);
}

#[tokio::test]
async fn a_config_that_is_not_there_is_named() {
    let bench = Bench::new().await;
    let run = bench.run("--config nowhere.toml backfill").await;
    expect_usage_error(run, "backfill", &["nowhere.toml"]);
}

#[tokio::test]
async fn options_alone_are_enough() {
    let bench = Bench::with_docs(5).await;
    let api = KeyApi::finding();
    let docs = bench.namespace(DOCS);
    // The only thing without an option; everything else stays as it is by default.
    bench.configure_text(&format!("[mongodb]\nstate_database = '{}'\n", bench.state.name()));
    let run = bench
        .program("backfill --tps 100 --api-url")
        .argument(&api.key_url())
        .arguments("--collection")
        .argument(&docs)
        .env("MONGOREKEY_URI", &uri())
        .run()
        .await
        .expect_exit(0);
    run.expect_documents(&[("candidates", 5), ("filled", 5)]);
}

#[tokio::test]
async fn mistakes_on_the_command_line_are_json_too() {
    let bench = Bench::with_docs(3).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    for line in ["backfill --tps 0", "backfill --window 1-2", "backfill --chunk 0", "backfill --nonsense"] {
        let run = bench.run(line).await.expect_exit(2);
        assert_eq!(run.text("/error/code"), "usage", "{line}");
        assert_eq!(run.json["schema"], json!(1), "{line}");
        assert!(run.json.get("job").is_some() && run.json.get("command").is_some(), "{}", run.stdout);
    }
    assert!(!bench.has_state().await);
}

#[tokio::test]
async fn a_dry_run_calls_and_writes_nothing() {
    let bench = Bench::with_docs(12).await;
    let before = bench.documents(DOCS).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let run = bench.run("backfill --dry-run").await.expect_exit(0);
    run.expect_documents(&[("candidates", 12), ("candidates_left", 12)]);
    run.expect_calls(0);
    for command in ["plan", "index status", "status"] {
        bench.run(command).await.expect_exit(0);
    }
    assert_eq!(api.count(), 0);
    assert_eq!(bench.documents(DOCS).await, before);
    assert!(!bench.has_state().await, "a look has left something");
}

/// Looks for secrets in all that was written, the state database included.
pub async fn expect_no_secret(bench: &Bench, run: &Finished, secrets: &[&str]) {
    let mut written = run.output();
    for name in bench.state.list_collection_names().await.expect("names") {
        let documents: Vec<bson::Document> = {
            use futures_util::TryStreamExt as _;
            let collection = bench.state.collection(&name);
            collection.find(doc! {}).await.expect("a cursor").try_collect().await.expect("documents")
        };
        documents.iter().for_each(|document| written.push_str(&document.to_string()));
    }
    for secret in secrets {
        assert!(!written.contains(secret), "{secret} in {written}");
    }
}

#[tokio::test]
async fn secrets_are_nowhere_in_what_is_written() {
    let bench = Bench::with_docs(8).await;
    let api = KeyApi::start(|call| match call.number % 7 {
        0 => Reply::reset(),
        1 => Reply::html(500),
        2 => Reply::empty(302).header("location", "http://u:hunter4@127.0.0.1:9/"),
        3 => Reply::new(200, "text/html", format!("<pre>{:?}</pre>", call.headers)),
        4 => Reply::found(call).cut_off(),
        5 => Reply::json(401, json!({"you sent": call.headers})),
        _ => Reply::found(call),
    });
    let url = format!("{}?token=hunter3", api.key_url());
    let config = bench
        .config_for_url(&url)
        .key_api("headers = { Authorization = 'Bearer hunter1', X-Api-Key = '${MONGOREKEY_IT_KEY}' }")
        .key_api("max_attempts = 2");
    bench.configure(&config);
    let secrets = ["hunter1", "hunter2", "hunter3", "hunter4"];
    for verbosity in ["", "-v", "-vv", "-vvv --log-format json"] {
        let run = bench
            .program(&format!("backfill --tps 1000 {verbosity}"))
            .env("MONGOREKEY_IT_KEY", "hunter2")
            .run()
            .await;
        assert!(matches!(run.exit, Some(1 | 4)), "{}", run.output());
        expect_no_secret(&bench, &run, &secrets).await;
    }
    let sent = &api.calls()[0];
    assert_eq!(sent.headers["authorization"], "Bearer hunter1");
    assert_eq!(sent.headers["x-api-key"], "hunter2");
    assert!(sent.target.ends_with("?token=hunter3"), "{}", sent.target);
    for command in ["check -vv", "status -vv", "plan -vv"] {
        let run = bench.program(command).env("MONGOREKEY_IT_KEY", "hunter2").run().await;
        expect_no_secret(&bench, &run, &secrets).await;
    }
}

#[tokio::test]
async fn a_password_is_never_repeated() {
    let bench = Bench::with_docs(1).await;
    let api = KeyApi::finding();
    let with = |credentials: &str| uri().replacen("mongodb://", &format!("mongodb://{credentials}@"), 1);
    let uris = [
        with("root:hunter2"),
        with("root:hunter2%2F%40x"),
        with("root:hunter2@x"),
        with("root:hunter2").replace("replicaSet=", "replicaSet=no&authMechanism=NONE&x="),
        "mongodb://root:hunter2@".to_owned(),
        "postgres://root:hunter2@localhost/".to_owned(),
    ];
    for uri in uris {
        bench.configure(&bench.config(&api).uri(&uri));
        let run = bench.run("backfill -vvv").await;
        assert!(matches!(run.exit, Some(2 | 3)), "{}", run.output());
        assert!(!run.output().contains("hunter2"), "{}", run.output());
        let run = bench.program("backfill --uri").argument(&uri).run().await;
        assert!(matches!(run.exit, Some(2 | 3)), "{}", run.output());
        assert!(!run.output().contains("hunter2"), "{}", run.output());
    }
}
