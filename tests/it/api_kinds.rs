//! Kinds of key APIs: those that take many keys at once, those behind a private CA, a client
//! certificate or a proxy, and those whose answers never end.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mongorekey::config::file::{Batch, KeyApi as Api, Method, PointerEquals};
use mongorekey::config::values::{HumanDuration, Secret};
use mongorekey::key_api::batch::{Answers, BatchOutcome, bisect};
use mongorekey::key_api::classify::Outcome;
use mongorekey::key_api::client::Client;
use mongorekey_mock_api::{Behaviour, Faults, MockApi, Percent, RateLimit, new_key};
use serde_json::{Value, json};

use crate::config::Config;
use crate::harness::Bench;
use crate::key_api::KeyApi;
use crate::wire::{Authority, Endless, Identity, Seen, Server, TunnelProxy};

fn client(api: Api) -> Client {
    Client::new(api, 4, "job").expect("a valid client")
}

/// What the rehearsal API takes and answers, in batches.
fn batched(url: &str) -> Api {
    let mut api = Api::for_url(url);
    api.method = Method::Post;
    api.echo_pointer = "/legacyKey".parse().ok();
    api.not_found_when =
        vec![PointerEquals { pointer: "/code".parse().expect("a pointer"), equals: json!("NO_KEY") }];
    api.batch = Some(Batch {
        size: 100,
        body: r#"{"keys": {keys_json}}"#.into(),
        items_pointer: "/items".parse().expect("a pointer"),
    });
    api
}

fn keys(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("K{number} \"/홍길동")).collect()
}

#[track_caller]
fn answers(outcome: BatchOutcome) -> Answers {
    match outcome {
        BatchOutcome::Answered(answers) => answers,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn failure(outcome: BatchOutcome) -> Outcome {
    match outcome {
        BatchOutcome::Failed(outcome) => outcome,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_batch_gives_every_key_its_own_answer_by_one_call() {
    let behaviour =
        Behaviour { not_found: Percent::new(20.0).expect("a percentage"), ..Behaviour::default() };
    let mock = MockApi::start(behaviour.clone()).await.expect("a port");
    let client = client(batched(&mock.url()));
    let keys = keys(200);
    let call = client.call_batch(&keys).await;
    let expected: Vec<Outcome> =
        keys.iter().map(|key| behaviour.find(key).map_or(Outcome::NotFound, Outcome::Found)).collect();
    assert_eq!(answers(call.outcome), Answers { outcomes: expected.clone(), stray: 0 });
    assert!(expected.contains(&Outcome::NotFound) && call.latency > Duration::ZERO);
    assert_eq!(mock.calls().len(), 1);

    // A single call is a batch of one.
    for (key, outcome) in keys.iter().zip(&expected).take(20) {
        assert_eq!(client.call(key).await.outcome, *outcome);
    }
    assert_eq!(mock.calls().len(), 21);
}

type IsExpected = fn(&Outcome) -> bool;

#[tokio::test]
async fn what_befalls_a_whole_batch_answers_no_key() {
    let all = || Percent::new(100.0).expect("a percentage");
    let cases: [(Faults, IsExpected); 5] = [
        (Faults { server_error: all(), ..Faults::default() }, |outcome| {
            *outcome == Outcome::ServerError(500, None)
        }),
        (Faults { timeout: all(), ..Faults::default() }, |outcome| *outcome == Outcome::Timeout),
        (Faults { reset: all(), ..Faults::default() }, |outcome| matches!(outcome, Outcome::Connect(_))),
        (Faults { garbage: all(), ..Faults::default() }, |outcome| matches!(outcome, Outcome::Invalid(_))),
        (Faults { html: all(), ..Faults::default() }, |outcome| matches!(outcome, Outcome::Invalid(_))),
    ];
    for (faults, expected) in cases {
        let mock = MockApi::start(Behaviour { faults, ..Behaviour::default() }).await.expect("a port");
        let mut api = batched(&mock.url());
        api.timeout = HumanDuration(Duration::from_millis(400));
        let outcome = failure(client(api).call_batch(&keys(50)).await.outcome);
        assert!(expected(&outcome), "{faults:?}: {outcome:?}");
    }
    let limit = Some(RateLimit::new(0.1, None).expect("a limit"));
    let mock = MockApi::start(Behaviour { limit, ..Behaviour::default() }).await.expect("a port");
    let client = client(batched(&mock.url()));
    answers(client.call_batch(&keys(3)).await.outcome);
    let outcome = failure(client.call_batch(&keys(3)).await.outcome);
    assert!(matches!(outcome, Outcome::RateLimited(Some(_))), "{outcome:?}");
}

/// The keys of a batch as they arrived.
fn asked(seen: &Seen) -> Vec<String> {
    let body: Value = serde_json::from_slice(&seen.body).expect("JSON");
    serde_json::from_value(body["keys"].clone()).expect("an array of texts")
}

#[tokio::test]
async fn one_malformed_key_is_found_by_halves_and_costs_no_other() {
    let server = Server::start(None, |seen| {
        let keys = asked(seen);
        if keys.iter().any(|key| key.contains("bad")) {
            return (422, json!({"code": "BAD_KEY"}).to_string().into_bytes());
        }
        let items: Vec<Value> =
            keys.iter().rev().map(|key| json!({"legacyKey": key, "newKey": format!("N-{key}")})).collect();
        (200, json!({ "items": items }).to_string().into_bytes())
    })
    .await;
    let client = client(batched(&format!("http://{}/keys", server.address)));
    let mut all = keys(64);
    all[37] = "bad".into();
    let mut settled: HashMap<String, Outcome> = HashMap::new();
    let mut left = vec![all.clone()];
    while let Some(batch) = left.pop() {
        assert!(server.seen().len() < 100, "no end of it");
        match client.call_batch(&batch).await.outcome {
            BatchOutcome::Refused(422) => {
                let (first, second) = bisect(&batch);
                left.extend([first.to_vec(), second.to_vec()]);
            }
            outcome => settled.extend(batch.into_iter().zip(answers(outcome).outcomes)),
        }
    }
    assert_eq!(settled.len(), 64);
    for key in &all {
        let expected = if key == "bad" { Outcome::Rejected } else { Outcome::Found(format!("N-{key}")) };
        assert_eq!(settled[key], expected, "{key}");
    }
    // The whole, and two halves on each of six levels.
    assert_eq!(server.seen().len(), 13);
}

#[tokio::test]
async fn a_longer_batch_may_have_a_longer_answer() {
    let server = Server::start(None, |seen| {
        let keys = asked(seen);
        let item = |key: &String| json!({"legacyKey": key, "newKey": "N", "pad": "x".repeat((3 << 19) / keys.len())});
        let items: Vec<Value> = keys.iter().map(item).collect();
        (200, json!({ "items": items }).to_string().into_bytes())
    })
    .await;
    let client = client(batched(&format!("http://{}/keys", server.address)));
    let outcomes = answers(client.call_batch(&keys(200)).await.outcome).outcomes;
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Found("N".into())));
    let outcome = failure(client.call_batch(&keys(10)).await.outcome);
    assert!(matches!(&outcome, Outcome::Invalid(reason) if reason.contains("longer")), "{outcome:?}");
}

/// The most memory that this process ever held, in KiB.
fn most_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a figure");
    line.trim_end_matches("kB").trim().parse().expect("a number")
}

#[tokio::test]
async fn an_answer_without_an_end_is_left_after_a_megabyte() {
    let endless = Endless::start(vec![b' '; 64 * 1024], Duration::ZERO).await;
    let mut api = Api::for_url(&format!("http://{}/{{key}}", endless.address));
    api.timeout = HumanDuration(Duration::from_secs(20));
    let client = client(api);
    let (started, before) = (Instant::now(), most_memory());
    for call in 1..=20 {
        let outcome = client.call("K1").await.outcome;
        assert!(matches!(&outcome, Outcome::Invalid(reason) if reason.contains("longer")), "{outcome:?}");
        // What was sent beyond the limit waits in the buffers of the two sockets.
        assert!(endless.sent() < call * (16 << 20), "{} bytes in {call} calls", endless.sent());
    }
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    let grown = most_memory() - before;
    assert!(grown < 32 * 1024, "{grown} KiB more than before");
}

#[tokio::test]
async fn an_answer_that_trickles_or_stops_is_a_timeout() {
    for pause in [Duration::from_millis(20), Duration::from_secs(3600)] {
        let endless = Endless::start(b" ".to_vec(), pause).await;
        let mut api = Api::for_url(&format!("http://{}/{{key}}", endless.address));
        api.timeout = HumanDuration(Duration::from_millis(500));
        let call = client(api).call("K1").await;
        assert_eq!(call.outcome, Outcome::Timeout);
        assert!((450..5000).contains(&call.latency.as_millis()), "{:?}", call.latency);
        assert!(endless.sent() > 0);
    }
}

#[tokio::test]
async fn a_redirect_in_circles_is_one_call() {
    let server = Server::start(None, |_| (307, Vec::new())).await;
    let outcome =
        client(Api::for_url(&format!("http://{}/{{key}}", server.address))).call("K1").await.outcome;
    assert_eq!(outcome, Outcome::Redirect(307));
    let outcome = client(batched(&format!("http://{}/", server.address))).call_batch(&keys(2)).await.outcome;
    assert_eq!(failure(outcome), Outcome::Redirect(307));
    assert_eq!(server.seen().len(), 2);
}

/// A folder for the files of a test, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("mongorekey-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        Self(folder)
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).expect("a writable folder");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Fails only where a panic came before it was made.
        let _removed = std::fs::remove_dir_all(&self.0);
    }
}

fn https(server: &Server) -> Api {
    Api::for_url(&format!("https://127.0.0.1:{}/keys/{{key}}", server.address.port()))
}

fn found() -> Outcome {
    Outcome::Found("N-K1".into())
}

#[tokio::test]
async fn only_a_server_of_a_known_authority_and_of_its_name_is_asked() {
    let folder = Folder::new("ca");
    let ours = Authority::new("Ours");
    let known = folder.file("ours.pem", &ours.pem());
    let other = folder.file("other.pem", &Authority::new("Other").pem());
    let both = std::fs::read_to_string(&other).expect("written") + "\n" + &ours.pem();
    let both = folder.file("both.pem", &both);
    let server = Server::finding(Some(ours.server("127.0.0.1", None))).await;
    let elsewhere = Server::finding(Some(ours.server("keys.example.com", None))).await;

    let call = async |server: &Server, ca_file: Option<&PathBuf>| {
        let mut api = https(server);
        api.ca_file = ca_file.cloned();
        client(api).call("K1").await.outcome
    };
    for unknown in [None, Some(&other)] {
        let outcome = call(&server, unknown).await;
        assert!(
            matches!(&outcome, Outcome::Connect(reason) if reason.contains("UnknownIssuer")),
            "{outcome:?}"
        );
    }
    assert!(server.seen().is_empty());
    for trusted in [&known, &both] {
        assert_eq!(call(&server, Some(trusted)).await, found());
    }
    let outcome = call(&elsewhere, Some(&known)).await;
    assert!(matches!(outcome, Outcome::Connect(_)), "{outcome:?}");
    assert!(elsewhere.seen().is_empty());
}

#[tokio::test]
async fn a_server_that_asks_for_a_certificate_gets_ours() {
    let folder = Folder::new("mtls");
    let (authority, staff, strangers) =
        (Authority::new("CA"), Authority::new("Staff"), Authority::new("Strangers"));
    let ca_file = folder.file("ca.pem", &authority.pem());
    let server = Server::finding(Some(authority.server("127.0.0.1", Some(&staff)))).await;
    let call = async |identity: Option<Identity>| {
        let mut api = https(&server);
        api.ca_file = Some(ca_file.clone());
        if let Some(identity) = identity {
            api.client_cert_file = Some(folder.file("client.pem", &identity.certificate));
            api.client_key_file = Some(folder.file("client.key", &identity.key));
        }
        client(api).call("K1").await.outcome
    };
    for refused in [None, Some(strangers.issue("client"))] {
        let outcome = call(refused).await;
        assert!(matches!(outcome, Outcome::Connect(_)), "{outcome:?}");
    }
    assert!(server.seen().is_empty());
    assert_eq!(call(Some(staff.issue("client"))).await, found());
}

#[tokio::test]
async fn a_tunnel_is_made_only_through_the_proxy_that_is_named() {
    let folder = Folder::new("tunnel");
    let authority = Authority::new("CA");
    let server = Server::finding(Some(authority.server("127.0.0.1", None))).await;
    // user:hunter2
    let proxy = TunnelProxy::start(Some("Basic dXNlcjpodW50ZXIy")).await;
    let api = |proxy: Option<String>| {
        let mut api = https(&server);
        api.ca_file = Some(folder.file("ca.pem", &authority.pem()));
        api.proxy = proxy.map(Secret::new);
        api
    };
    assert_eq!(client(api(None)).call("K1").await.outcome, found());
    assert!(proxy.requests().is_empty());

    let through = client(api(Some(format!("http://user:hunter2@{}", proxy.address))));
    for _ in 0..3 {
        assert_eq!(through.call("K1").await.outcome, found());
    }
    // One tunnel is enough for calls that come one after the other.
    assert_eq!(proxy.requests(), [format!("CONNECT {} HTTP/1.1", server.address)]);
    assert_eq!(server.seen().len(), 4);
    assert_eq!(server.seen()[3].proxy_authorization, None);

    for wrong in [format!("http://user:hunter3@{}", proxy.address), format!("http://{}", proxy.address)] {
        let outcome = client(api(Some(wrong))).call("K1").await.outcome;
        assert!(matches!(outcome, Outcome::Connect(_)), "{outcome:?}");
        assert!(!outcome.describe().contains("hunter"), "{outcome:?}");
    }
    assert_eq!(server.seen().len(), 4);
}

#[tokio::test]
async fn a_proxy_for_plain_http_is_asked_for_the_whole_address() {
    let proxy = Server::finding(None).await;
    let mut api = Api::for_url("http://keys.invalid/keys/{key}");
    api.proxy = Some(Secret::new(format!("http://user:hunter2@{}", proxy.address)));
    assert_eq!(client(api).call("K1").await.outcome, found());
    let seen = &proxy.seen()[0];
    assert_eq!(seen.target, "http://keys.invalid/keys/K1");
    assert_eq!(seen.proxy_authorization.as_deref(), Some("Basic dXNlcjpodW50ZXIy"));
}

/// A config for an API with this URL; few attempts.
fn config(bench: &Bench, url: &str) -> Config {
    bench.config_for_url(url).key_api("max_attempts = 1")
}

#[tokio::test]
async fn a_backfill_trusts_the_authority_that_its_config_names() {
    let bench = Bench::with_docs(5).await;
    let authority = Authority::new("CA");
    let server = Server::finding(Some(authority.server("127.0.0.1", None))).await;
    let config = config(&bench, &https(&server).url);
    bench.configure(&config);
    let run = bench.run("backfill --tps 1000").await.expect_exit(1);
    run.expect_documents(&[("candidates", 5), ("failed", 5), ("candidates_left", 5)]);
    assert_eq!(run.number("/api/outcomes/connect"), 5);
    assert_eq!((bench.filled().await, bench.flagged().await), (0, 0));

    std::fs::write(bench.folder.join("ca.pem"), authority.pem()).expect("written");
    bench.configure(&config.key_api("ca_file = 'ca.pem'"));
    let run = bench.run("backfill --tps 1000").await.expect_exit(0);
    run.expect_documents(&[("candidates", 5), ("filled", 5)]);
}

#[tokio::test]
async fn only_the_proxy_of_the_config_is_used_and_its_password_is_nowhere() {
    let bench = Bench::with_docs(6).await;
    let api = KeyApi::finding();
    let proxy = Server::start(None, |_| (502, b"<html>user:hunter2</html>".to_vec())).await;
    let address = format!("http://user:hunter2@{}", proxy.address);
    bench.configure(&config(&bench, &api.key_url()).key_api(&format!("proxy = '{address}'")));
    let run = bench.run("backfill --tps 1000 -vvv").await.expect_exit(1);
    assert_eq!(run.number("/api/outcomes/server_error"), 6);
    assert_eq!((proxy.seen().len(), api.count()), (6, 0));
    for secret in ["hunter2", "dXNlcjpodW50ZXIy"] {
        assert!(!run.output().contains(secret), "{}", run.output());
    }
    let job = bench.job(&format!("backfill-{}", bench.namespace(crate::harness::DOCS))).await.expect("a job");
    assert!(!job.to_string().contains("hunter2"), "{job}");

    bench.configure(&config(&bench, &api.key_url()));
    let mut program = bench.program("backfill --tps 1000");
    for variable in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy"] {
        program = program.env(variable, &address);
    }
    program.run().await.expect_exit(0).expect_documents(&[("candidates", 6), ("filled", 6)]);
    assert_eq!((proxy.seen().len(), api.count()), (6, 6));
}

#[tokio::test]
async fn files_that_can_not_be_used_are_refused_before_anything_is_touched() {
    let bench = Bench::with_docs(2).await;
    let authority = Authority::new("CA");
    let (one, other) = (authority.issue("one"), authority.issue("other"));
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let cut = &one.key[..one.key.len() / 2];
    for (name, content) in [
        ("ca.pem", &*authority.pem()),
        ("one.pem", &one.certificate),
        ("one.key", &one.key),
        ("other.key", &other.key),
        ("empty.pem", ""),
        ("broken.pem", broken),
        ("cut.key", cut),
    ] {
        std::fs::write(bench.folder.join(name), content).expect("written");
    }
    let identity = |certificate: &str, key: &str| {
        vec![format!("client_cert_file = '{certificate}'"), format!("client_key_file = '{key}'")]
    };
    let cases = [
        (vec!["ca_file = 'nowhere.pem'".to_owned()], "ca_file", "nowhere.pem"),
        (vec!["ca_file = 'empty.pem'".to_owned()], "ca_file", "no certificate"),
        (vec!["ca_file = 'one.key'".to_owned()], "ca_file", "no certificate"),
        (vec!["ca_file = 'broken.pem'".to_owned()], "ca_file", "broken.pem"),
        (vec!["client_cert_file = 'one.pem'".to_owned()], "client_cert_file", "client_key_file"),
        (vec!["client_key_file = 'one.key'".to_owned()], "client_key_file", "client_cert_file"),
        (identity("one.pem", "other.key"), "client_key_file", "does not go with"),
        (identity("one.pem", "one.pem"), "client_key_file", "no private key"),
        (identity("one.pem", "cut.key"), "client_key_file", "no private key"),
        (identity("one.key", "one.key"), "client_cert_file", "no certificate"),
        (identity("broken.pem", "one.key"), "client_cert_file", "can't be used"),
        (vec!["proxy = 'socks5://u:hunter2@127.0.0.1:9'".to_owned()], "proxy", "http://"),
    ];
    for (lines, key, reason) in cases {
        let config = lines
            .iter()
            .fold(bench.config_for_url("https://127.0.0.1:9/{key}"), |config, line| config.key_api(line));
        let text = config.text();
        let line =
            1 + text.lines().position(|line| line.starts_with(&format!("{key} ="))).expect("the mistake");
        bench.configure_text(&text);
        let run = bench.run("backfill").await.expect_exit(2);
        let message = run.text("/error/message");
        let place = format!("mongorekey.toml:{line}: `key_api.{key}`");
        assert!(message.contains(&place) && message.contains(reason), "{place}, {reason}: {message}");
        let quoted = one.key.lines().nth(1).expect("a line of the key");
        assert!(!run.output().contains("hunter2") && !run.output().contains(quoted), "{}", run.output());
    }
    assert!(!bench.has_state().await);
    // What makes no call needs no certificate.
    bench.configure(&bench.config_for_url("https://127.0.0.1:9/{key}").key_api("ca_file = 'nowhere.pem'"));
    bench.run("plan").await.expect_exit(0);
}

#[tokio::test]
async fn mistakes_about_batches_name_their_line() {
    let bench = Bench::with_docs(1).await;
    let text = |lines: [&str; 3], batch: [&str; 3]| {
        let head = bench.config_for_url("http://127.0.0.1:9/keys");
        let head = lines.iter().fold(head, |config, line| config.key_api(line)).text();
        format!("{head}\n[key_api.batch]\n{}\n", batch.join("\n"))
    };
    let echo = "echo_pointer = '/legacyKey'";
    let good = ["size = 10", "body = '{\"keys\": {keys_json}}'", "items_pointer = '/items'"];
    let cases = [
        (text(["", "", ""], good), "[key_api.batch]", "echo_pointer"),
        (text([echo, "method = 'GET'", ""], good), "method = ", "POST"),
        (text([echo, "method = 'POST'", "body = '{key_json}'"], good), "body = '{key_json}'", "key_api.body"),
        (text([echo, "", ""], ["size = 0", good[1], good[2]]), "size = 0", "10000"),
        (text([echo, "", ""], ["size = 10001", good[1], good[2]]), "size = ", "10000"),
        (text([echo, "", ""], [good[0], "body = '{key_json}'", good[2]]), "body = ", "{keys_json}"),
        (text([echo, "", ""], [good[0], good[1], "items_pointer = 'items'"]), "items_pointer", "pointer"),
    ];
    for (text, marker, reason) in cases {
        let line = 1 + text.lines().position(|line| line.starts_with(marker)).expect("the mistake");
        bench.configure_text(&text);
        let run = bench.run("plan").await.expect_exit(2);
        let message = run.text("/error/message");
        let place = format!("mongorekey.toml:{line}: `key_api");
        assert!(message.contains(&place) && message.contains(reason), "{place}, {reason}: {message}");
    }
}

#[tokio::test]
async fn check_asks_an_api_of_batches_too() {
    let bench = Bench::with_docs(1).await;
    let mock = MockApi::start(Behaviour::default()).await.expect("a port");
    assert_eq!(client(batched(&mock.url())).call("K1").await.outcome, Outcome::Found(new_key(0, "K1")));
    let config = bench.config_for_url(&mock.url()).key_api("echo_pointer = '/legacyKey'").text();
    let batch = "[key_api.batch]\nsize = 10\nbody = '{\"keys\": {keys_json}}'\nitems_pointer = '/items'\n";
    bench.configure_text(&format!("{config}\n{batch}"));
    let run = bench.run("check").await;
    let checks = run.json["checks"].as_array().expect("checks").clone();
    let probe = checks.iter().find(|check| check.to_string().contains("key API")).expect("a probe");
    assert!(probe.to_string().contains("found in"), "{probe}");
    assert_eq!(mock.calls()[1].keys.as_deref(), Some(&["K1".to_owned()][..]));
}
