//! The rehearsal API as its clients see it: real sockets, a real client.

use std::error::Error;
use std::io::ErrorKind;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::*;

/// Only reached by a test that fails.
const PATIENCE: Duration = Duration::from_secs(30);

fn percent(number: f64) -> Percent {
    Percent::new(number).unwrap()
}

fn client() -> Client {
    // The provider is global: another test may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder().no_proxy().timeout(PATIENCE).build().unwrap()
}

async fn start(behaviour: Behaviour) -> (MockApi, Client) {
    (MockApi::start(behaviour).await.unwrap(), client())
}

async fn always(faults: Faults) -> (MockApi, Client) {
    start(Behaviour { faults, ..Behaviour::default() }).await
}

fn url_of(api: &MockApi, key: &str) -> String {
    let encoded = utf8_percent_encode(key, NON_ALPHANUMERIC).to_string();
    api.key_url().replace("{key}", &encoded)
}

async fn get(api: &MockApi, client: &Client, key: &str) -> reqwest::Response {
    client.get(url_of(api, key)).send().await.unwrap()
}

async fn post(api: &MockApi, client: &Client, body: impl Into<reqwest::Body>) -> reqwest::Response {
    client.post(api.url()).body(body).send().await.unwrap()
}

/// Waits for what happens without being awaited; a busy machine takes longer.
async fn eventually(mut happened: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !happened() {
        assert!(begin.elapsed() < PATIENCE, "still waiting after {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn json_of(response: reqwest::Response) -> Value {
    assert_eq!(response.headers()["content-type"], "application/json");
    serde_json::from_str(&response.text().await.unwrap()).unwrap()
}

#[tokio::test]
async fn finds_every_key_whatever_it_is_made_of() {
    let (api, client) = start(Behaviour::default()).await;
    let keys = ["K1", "a b", "a/b", "50%", "?x=1#y", "가나다", "🦀", "%2F", "+", "\"q\"", "\n"];
    for key in keys {
        let response = get(&api, &client, key).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(json_of(response).await, json!({"legacyKey": key, "newKey": new_key(0, key)}));
    }
    let seen: Vec<_> = api.calls().into_iter().filter_map(|call| call.key).collect();
    assert_eq!(seen, keys);
    assert_eq!(api.summary().outcomes.found, keys.len() as u64);
}

#[tokio::test]
async fn answers_batches_item_by_item_and_single_keys_in_a_body() {
    let behaviour = Behaviour { seed: 3, not_found: percent(50.0), ..Behaviour::default() };
    let (api, client) = start(behaviour.clone()).await;
    let keys: Vec<_> = (0..100).map(|n| format!("K{n}")).collect();
    let answer = json_of(post(&api, &client, json!({"keys": keys}).to_string()).await).await;
    let expected: Vec<_> = keys
        .iter()
        .map(|key| match behaviour.find(key) {
            Some(new_key) => json!({"legacyKey": key, "newKey": new_key}),
            None => json!({"legacyKey": key, "code": "NO_KEY"}),
        })
        .collect();
    assert_eq!(answer, json!({"items": expected}));
    assert_eq!(api.calls()[0].keys.as_deref(), Some(&keys[..]));

    for key in &keys[..10] {
        let response = post(&api, &client, json!({"legacyKey": key}).to_string()).await;
        let single = get(&api, &client, key).await;
        assert_eq!(response.status(), single.status());
        assert_eq!(json_of(response).await, json_of(single).await);
    }
    let summary = api.summary();
    assert_eq!((summary.calls, summary.outcomes.batch), (21, 1));
    assert_eq!(summary.keys_found + summary.keys_not_found, 120);
}

#[tokio::test]
async fn a_key_not_found_stays_not_found() {
    let behaviour = Behaviour { not_found: percent(20.0), ..Behaviour::default() };
    let (api, client) = start(behaviour.clone()).await;
    for key in (0..50).chain(0..50).map(|n| n.to_string()) {
        let response = get(&api, &client, &key).await;
        if behaviour.find(&key).is_some() {
            assert_eq!(response.status(), StatusCode::OK);
        } else {
            assert_eq!(response.status(), StatusCode::NOT_FOUND);
            assert_eq!(json_of(response).await, json!({"code": "NO_KEY"}));
        }
    }
    let outcomes = api.summary().outcomes;
    assert!(outcomes.not_found > 0 && outcomes.not_found % 2 == 0);
}

#[tokio::test]
async fn only_a_malformed_key_is_refused_in_json() {
    let (api, client) = start(Behaviour::default()).await;
    for path in ["/v1/keys/", "/v1/keys/%FF"] {
        let url = format!("http://{}{path}", api.address());
        let response = client.get(url).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{path}");
        assert_eq!(json_of(response).await, json!({"code": "BAD_KEY"}));
    }
    for (path, status) in [("/", 404), ("/v1/keysX", 404), ("/v1/keys/a/b", 404), ("/v1/keys", 404)] {
        let url = format!("http://{}{path}", api.address());
        let response = client.get(url).send().await.unwrap();
        assert_eq!(response.status(), status, "{path}");
        assert!(!response.text().await.unwrap().starts_with('{'));
    }
    for body in ["", "{}", "[]", "{\"keys\": \"K1\"}", "{\"legacyKey\": 1}", "nonsense"] {
        let response = post(&api, &client, body).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{body}");
        assert!(response.text().await.unwrap().starts_with("expected"));
    }
    let delete = client.delete(api.url()).send().await.unwrap();
    assert_eq!(delete.status(), StatusCode::METHOD_NOT_ALLOWED);
    let summary = api.summary();
    assert_eq!(summary.calls, summary.outcomes.bad_request);
}

#[tokio::test]
async fn takes_its_time_and_logs_it() {
    let behaviour = Behaviour {
        latency: Latency::fixed(Duration::from_millis(100)),
        slow_share: percent(50.0),
        slow_latency: Latency::fixed(Duration::from_millis(200)),
        ..Behaviour::default()
    };
    let slow = Duration::from_millis(200);
    let decided_slow = (0..20).filter(|n| behaviour.decide(*n).latency == slow).count();
    let (api, client) = start(behaviour).await;
    let calls = (0..20).map(|n| {
        let (client, url) = (client.clone(), url_of(&api, &n.to_string()));
        tokio::spawn(async move { client.get(url).send().await.unwrap().status() })
    });
    for call in calls.collect::<Vec<_>>() {
        assert_eq!(call.await.unwrap(), StatusCode::OK);
    }
    let calls = api.stop().await.unwrap();
    assert!(calls.iter().all(|call| call.latency_ms >= 100.0));
    let took_slow = calls.iter().filter(|call| call.latency_ms >= 200.0).count();
    assert!(decided_slow > 0 && took_slow >= decided_slow);
}

#[tokio::test]
async fn refuses_what_is_over_the_limit_and_says_when_to_come_back() {
    let (api, client) = start(Behaviour {
        limit: Some(RateLimit::new(0.01, NonZeroU32::new(5)).unwrap()),
        ..Behaviour::default()
    })
    .await;
    for _ in 0..5 {
        assert_eq!(get(&api, &client, "K").await.status(), StatusCode::OK);
    }
    let response = get(&api, &client, "K").await;
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    let seconds = response.headers()["retry-after"].to_str().unwrap().parse();
    assert!((100 - PATIENCE.as_secs()..=100).contains(&seconds.unwrap()));
    assert_eq!(api.summary().outcomes.rate_limited, 1);
}

#[tokio::test]
async fn answers_500() {
    let (api, client) = always(Faults { server_error: percent(100.0), ..Faults::default() }).await;
    assert_eq!(get(&api, &client, "K").await.status(), 500);
    assert_eq!(api.summary().outcomes.server_error, 1);
}

#[tokio::test]
async fn resets_connections() {
    let (api, client) = always(Faults { reset: percent(100.0), ..Faults::default() }).await;
    let error = client.get(url_of(&api, "K")).send().await.unwrap_err();
    let mut cause: Option<&dyn Error> = Some(&error);
    let mut kinds = Vec::new();
    while let Some(error) = cause {
        kinds.extend(error.downcast_ref().map(std::io::Error::kind));
        cause = error.source();
    }
    assert_eq!(kinds, [ErrorKind::ConnectionReset], "{error:?}");
    assert_eq!(api.calls()[0].outcome, Outcome::Reset);
    assert_eq!(api.calls()[0].status, None);
}

#[tokio::test]
async fn never_answers_and_logs_when_the_client_goes() {
    let (api, client) = always(Faults { timeout: percent(100.0), ..Faults::default() }).await;
    let call = client.get(url_of(&api, "K")).timeout(Duration::from_secs(1));
    assert!(call.send().await.unwrap_err().is_timeout());
    eventually(|| api.summary().calls == 1).await;
    assert_eq!(api.calls()[0].outcome, Outcome::Timeout);
    assert_eq!(api.calls()[0].status, None);
}

#[tokio::test]
async fn garbage_is_no_json_and_html_is_html() {
    let (api, client) =
        always(Faults { garbage: percent(50.0), html: percent(50.0), ..Faults::default() }).await;
    let (mut pages, mut texts, mut bytes) = (0_u64, 0, 0);
    for n in 0..60 {
        let key = format!("K{n}");
        let response = if n % 2 == 0 {
            get(&api, &client, &key).await
        } else {
            post(&api, &client, json!({"keys": [key]}).to_string()).await
        };
        assert_eq!(response.status(), StatusCode::OK);
        let html = response.headers()["content-type"] == "text/html; charset=utf-8";
        let body = response.bytes().await.unwrap();
        assert!(serde_json::from_slice::<Value>(&body).is_err());
        match (html, std::str::from_utf8(&body)) {
            (true, Ok(text)) => pages += u64::from(text.starts_with("<!DOCTYPE html>")),
            (false, Ok(text)) => texts += u64::from(text.starts_with('{')),
            (_, Err(_)) => bytes += 1,
        }
    }
    let outcomes = api.summary().outcomes;
    assert_eq!((pages, texts + bytes), (outcomes.html, outcomes.garbage));
    assert!(pages > 0 && texts > 0 && bytes > 0 && pages + texts + bytes == 60);
}

#[tokio::test]
async fn keeps_connections_open_between_calls() {
    let (api, _) = start(Behaviour::default()).await;
    let mut stream = TcpStream::connect(api.address()).await.unwrap();
    for n in 0..3 {
        let request = format!("GET /v1/keys/{n} HTTP/1.1\r\nhost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = [0; 1024];
        let length = stream.read(&mut answer).await.unwrap();
        assert!(answer[..length].starts_with(b"HTTP/1.1 200 OK\r\n"));
    }
}

#[tokio::test]
async fn stops_at_once_and_logs_the_calls_it_cut_off() {
    let (api, client) =
        start(Behaviour { latency: Latency::fixed(PATIENCE * 2), ..Behaviour::default() }).await;
    let call = tokio::spawn(client.get(url_of(&api, "K")).send());
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (address, begin) = (api.address(), Instant::now());
    let calls = api.stop().await.unwrap();
    assert!(begin.elapsed() < PATIENCE);
    assert!(call.await.unwrap().is_err());
    assert_eq!(calls[0].outcome, Outcome::Abandoned);
    assert!(TcpStream::connect(address).await.is_err());

    let back = MockApi::start_on(address, Behaviour::default()).await.unwrap();
    assert_eq!(get(&back, &client, "K").await.status(), StatusCode::OK);
}

#[tokio::test]
async fn the_log_on_disk_follows_while_calls_come() {
    let path = std::env::temp_dir().join(format!("mock-api-live-{}.log", std::process::id()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let log = Arc::new(CallLog::open(Some(&path)).unwrap());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(serve(listener, Behaviour::default(), log, async {
        let _ = stopped.await;
    }));
    let url = format!("http://{address}/v1/keys");
    client().get(format!("{url}/K1")).send().await.unwrap();
    let read = || std::fs::read_to_string(&path).unwrap();
    eventually(|| read().ends_with('\n')).await;
    let line: Value = serde_json::from_str(&read()).unwrap();
    assert_eq!((&line["key"], &line["outcome"]), (&json!("K1"), &json!("found")));

    client().post(url).body(r#"{"keys":["A","B"]}"#).send().await.unwrap();
    drop(stop);
    let summary = server.await.unwrap().unwrap();
    let text = read();
    std::fs::remove_file(&path).unwrap();
    assert_eq!((summary.calls, text.lines().count()), (2, 2));
    assert!(text.ends_with('\n') && text.contains(r#""key":null,"keys":["A","B"]"#));
}

/// The same calls in the same order get the same answers, faults included.
#[tokio::test]
async fn a_rehearsal_can_be_repeated() {
    let behaviour = Behaviour {
        seed: 11,
        not_found: percent(20.0),
        faults: Faults { server_error: percent(20.0), html: percent(20.0), ..Faults::default() },
        ..Behaviour::default()
    };
    let mut runs = Vec::new();
    for _ in 0..2 {
        let (api, client) = start(behaviour.clone()).await;
        for n in 0..50 {
            get(&api, &client, &n.to_string()).await;
        }
        let calls = api.stop().await.unwrap();
        runs.push(calls.into_iter().map(|call| call.outcome).collect::<Vec<_>>());
    }
    assert_eq!(runs[0], runs[1]);
}
