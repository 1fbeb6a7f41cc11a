//! With access control and a failing API: passwords, tokens and header values are nowhere to be
//! found in what the program writes, stores or shows of itself.

use bson::doc;

use crate::command_line::expect_no_secret;
use crate::harness::{Bench, wait_for};
use crate::key_api::{Call, KeyApi, Reply};
use crate::own_set::OwnSet;
use crate::program::{Running, Signal};

/// The password of `scripts/mongod --auth`, and what the config of these tests adds.
const SECRETS: [&str; 4] = ["throw-away", "hunter1", "hunter2", "hunter3"];
const HEADERS: &str = "headers = { Authorization = 'Bearer hunter1', X-Api-Key = '${IT_KEY}' }";

/// Answers that repeat everything that was sent, half of the time.
fn echo(call: &Call) -> Reply {
    let sent = format!("{} {:?}", call.target, call.headers);
    match call.number % 8 {
        0 => Reply::new(500, "text/plain", sent),
        1 => Reply::new(200, "text/html", sent),
        2 => Reply::empty(302).header("location", format!("{}&again", call.target)),
        3 => Reply::new(429, "text/plain", sent),
        _ => Reply::found(call),
    }
}

/// What every user of this machine can see of a process.
fn shown(run: &Running) -> String {
    let read = |file: &str| {
        let bytes = std::fs::read(format!("/proc/{}/{file}", run.pid())).expect("a running process");
        String::from_utf8_lossy(&bytes).replace('\0', " ")
    };
    format!("{} {}", read("cmdline"), read("comm"))
}

fn config_text(bench: &Bench, api: &KeyApi) -> String {
    let url = format!("{}?token=hunter3", api.key_url());
    let config = bench.config_for_url(&url).key_api(HEADERS).key_api("max_attempts = 3");
    format!("{}\n[cleanse]\nsource = '{}'\nto = 'copy'\n", config.text(), bench.namespace("docs"))
}

#[tokio::test]
async fn with_access_control_no_secret_is_written_stored_or_shown() {
    let set = OwnSet::start(&["--auth"]);
    let bench = Bench::with_docs_on(&set.uri, 60).await;
    let api = KeyApi::start(echo);
    bench.configure_text(&config_text(&bench, &api));
    for command in
        ["check -vv", "plan -vv", "backfill --tps 500 -vv", "backfill --tps 500 -vvv --log-format json"]
            .into_iter()
            .chain(["verify -vv", "cleanse -vvv", "status -vv", "index status -vv"])
    {
        let run = bench.program(command).env("IT_KEY", "hunter2").run().await;
        assert!(matches!(run.exit, Some(0 | 1)), "{command}: {}", run.output());
        expect_no_secret(&bench, &run, &SECRETS).await;
    }
    assert!(bench.filled().await > 0);
    let sent = &api.calls()[0];
    assert_eq!((&*sent.headers["authorization"], &*sent.headers["x-api-key"]), ("Bearer hunter1", "hunter2"));
}

#[tokio::test]
async fn the_title_of_the_process_holds_no_secret() {
    let set = OwnSet::start(&["--auth"]);
    let bench = Bench::with_docs_on(&set.uri, 60).await;
    let api = KeyApi::start(echo);
    bench.configure_text(&config_text(&bench, &api).replace(&set.uri, "mongodb://127.0.0.1:9"));
    for options in [vec!["--uri".to_owned(), set.uri.clone()], vec![format!("--uri={}", set.uri)]] {
        let before = api.count();
        let program = bench.program("backfill --tps 5 -vv").env("IT_KEY", "hunter2");
        let run = options.iter().fold(program, |program, option| program.argument(option)).spawn();
        wait_for("a call", async || api.count() > before).await;
        let seen = shown(&run);
        assert!(seen.contains("backfill"), "{seen}");
        for secret in SECRETS {
            assert!(!seen.contains(secret), "{seen}");
        }
        run.signal(Signal::Terminate);
        let run = run.finish().await.expect_exit(143);
        expect_no_secret(&bench, &run, &SECRETS).await;
    }
}

#[tokio::test]
async fn the_title_of_the_process_holds_no_token_of_the_api_url() {
    let bench = Bench::with_docs(60).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config_for_url("http://127.0.0.1:9/{key}"));
    let url = format!("{}?token=hunter3", api.key_url());
    let run = bench.program("backfill --tps 5 --api-url").argument(&url).spawn();
    wait_for("a call", async || api.count() > 0).await;
    let seen = shown(&run);
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
    assert!(api.calls()[0].target.ends_with("?token=hunter3"));
    assert!(seen.contains("backfill") && !seen.contains("hunter3"), "{seen}");
}

#[tokio::test]
async fn a_wrong_password_is_refused_and_not_repeated() {
    let set = OwnSet::start(&["--auth"]);
    let bench = Bench::with_docs_on(&set.uri, 3).await;
    let api = KeyApi::finding();
    let right = "root:throw-away@";
    for credentials in ["root:hunter5@", "hunter5:hunter6@", "root:hunter5%40%2Fhunter6@"] {
        let uri = set.uri.replace(right, credentials);
        bench.configure(&bench.config(&api).uri(&uri));
        for command in ["check -vvv", "backfill -vvv --log-format json", "status"] {
            let run = bench.run(command).await.expect_exit(3);
            expect_no_secret(&bench, &run, &["hunter5", "hunter6", "throw-away"]).await;
        }
    }
    assert_eq!((api.count(), bench.filled().await), (0, 0));
}

#[tokio::test]
async fn who_may_not_write_is_told_so_before_a_call_is_made() {
    let set = OwnSet::start(&["--auth"]);
    let bench = Bench::with_docs_on(&set.uri, 30).await;
    let api = KeyApi::finding();
    bench.configure(&bench.config(&api));
    let root = bench.run("check").await.expect_exit(0);
    let roles = [doc! {"role": "read", "db": bench.database.name()}];
    let user = doc! {"createUser": "reader", "pwd": "hunter7", "roles": roles};
    bench.admin().run_command(user).await.expect("a user");
    let uri = set.uri.replace("root:throw-away@", "reader:hunter7@").replace("/?", "/?authSource=admin&");
    bench.configure(&bench.config(&api).uri(&uri));
    let check = bench.run("check -vv").await.expect_exit(3);
    let level = |run: &crate::program::Finished| {
        let checks = run.json["checks"].as_array().expect("checks").clone();
        let privileges =
            checks.iter().find(|check| check["name"].as_str().expect("a name").starts_with("privileges"));
        privileges.expect("a line about privileges")["level"].as_str().expect("a level").to_owned()
    };
    assert_eq!((&*level(&root), &*level(&check)), ("pass", "fail"), "{}", check.stdout);
    let before = api.count();
    let run = bench.run("backfill -vvv").await;
    assert!(matches!(run.exit, Some(3 | 4)), "{}", run.output());
    for run in [&check, &run] {
        expect_no_secret(&bench, run, &["hunter7"]).await;
    }
    assert_eq!((api.count(), bench.filled().await), (before, 0), "{}", run.output());
}

#[tokio::test]
async fn a_mistake_in_the_config_repeats_no_secret() {
    let bench = Bench::new().await;
    let mistakes = [
        "[key_api]\nurl = 'http://h/{key}'\nheaders = { Authorization = 'Bearer hunter1' ",
        "[key_api]\nurl = 'http://h/{key}'\nheaders = { Authorization = ['Bearer hunter1'] }",
        "[key_api]\nurl = 'http://h/{key}'\nheaders = ['Bearer hunter1']",
        "[key_api]\nurl = 'http://h/{key}'\nheaders = 'Authorization: Bearer hunter1'",
        "[key_api]\nurl = 'http://h/{key}'\ntoken = 'hunter1'",
        "[key_api]\nurl = 'ftp://h/{key}?token=hunter1'",
        "[key_api]\nurl = 'http://h/?token=hunter1'",
        "[key_api]\nurl = ['http://h/{key}?token=hunter1']",
        "[mongodb]\nuri = 'mongodb://root:hunter2@h' junk",
        "[mongodb]\nuri = ['mongodb://root:hunter2@h']",
        "[mongodb]\nurl = 'mongodb://root:hunter2@h'",
        "mongodb = 'mongodb://root:hunter2@h'",
    ];
    let mut told = Vec::new();
    for mistake in mistakes {
        bench.configure_text(mistake);
        let run = bench.run("backfill -vvv").await.expect_exit(2);
        if run.output().contains("hunter") {
            told.push(run.text("/error/message").to_owned());
        }
    }
    assert!(told.is_empty(), "{told:#?}");
}
