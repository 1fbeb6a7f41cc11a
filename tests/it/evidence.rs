//! Evidence reports: what stands in them, that nobody else's markup or secrets do, and that two
//! runs over the same data can be compared.

use std::path::PathBuf;

use bson::{Document, RawDocument, RawDocumentBuf, doc};
use futures_util::TryStreamExt as _;
use mongodb::Collection;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::cleansing::{SOURCE, TARGET, config, configure, job_name};
use crate::fail_points::{fail, named_uri};
use crate::harness::{Bench, DOCS, wait_for};
use crate::key_api::{KeyApi, Reply};
use crate::program::{Finished, Signal};

const FULL: &str = "verify --full --settle 1ms --report r.html";

/// Two equal collections in several ranges, with names and an `_id` that look like markup.
async fn pair() -> Bench {
    let bench = Bench::new().await;
    for name in [SOURCE, TARGET] {
        let people = (0..4000).map(|n| doc! {"_id": n, "name": format!("홍길동 {n}"), "n": n % 7});
        bench.insert_into(name, people).await;
        bench.insert_into(name, [doc! {"_id": "<script>alert('x')</script>", "n": 1}]).await;
    }
    configure(&bench, "");
    bench
}

fn collection(bench: &Bench, name: &str) -> Collection<Document> {
    bench.database.collection(name)
}

fn path(bench: &Bench, name: &str) -> PathBuf {
    bench.folder.join(name)
}

fn read(bench: &Bench, name: &str) -> String {
    std::fs::read_to_string(path(bench, name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn document(bench: &Bench, name: &str) -> Value {
    serde_json::from_str(&read(bench, name)).expect("one JSON document")
}

/// Files of this bench that belong to reports, temporary ones among them.
fn written(bench: &Bench) -> Vec<String> {
    let names = std::fs::read_dir(&bench.folder).expect("a folder").flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> =
        names.filter(|name| [".html", ".json", ".tmp"].iter().any(|end| name.ends_with(end))).collect();
    names.sort();
    names
}

/// The bounds and the digests of both sides of every range.
fn ranges(report: &Value) -> Vec<[Value; 4]> {
    let ranges = report["comparisons"][0]["ranges"].as_array().expect("ranges");
    let of = |range: &Value| {
        [range["from"].clone(), range["below"].clone(), range["source"].clone(), range["target"].clone()]
    };
    ranges.iter().map(of).collect()
}

/// The hash of a report, as a program in another language would compute it.
fn hash(report: &Value) -> String {
    fn sorted(value: &Value) -> String {
        match value {
            Value::Array(items) => format!("[{}]", items.iter().map(sorted).collect::<Vec<_>>().join(",")),
            Value::Object(members) => {
                let mut members: Vec<_> = members.iter().collect();
                members.sort_by(|one, other| one.0.cmp(other.0));
                let members =
                    members.iter().map(|(name, value)| format!("{}:{}", json!(name), sorted(value)));
                format!("{{{}}}", members.collect::<Vec<_>>().join(","))
            }
            plain => plain.to_string(),
        }
    }
    let mut rest = report.clone();
    rest.as_object_mut().expect("an object").remove("hash");
    Sha256::digest(sorted(&rest)).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn planted_differences_stand_in_the_report_with_their_paths() {
    let bench = pair().await;
    let target = collection(&bench, TARGET);
    target.delete_one(doc! {"_id": 5}).await.expect("deleted");
    target.insert_one(doc! {"_id": "추가된 문서"}).await.expect("inserted");
    let change = |id: i32, update: Document| target.update_one(doc! {"_id": id}, doc! {"$set": update});
    change(6, doc! {"name": "김철수"}).await.expect("changed");
    change(7, doc! {"n": 0_i64}).await.expect("changed");
    target
        .update_one(doc! {"_id": "<script>alert('x')</script>"}, doc! {"$set": {"n": 2}})
        .await
        .expect("changed");
    let run = bench.run(FULL).await.expect_exit(1);
    let (report, page) = (document(&bench, "r.json"), read(&bench, "r.html"));
    assert_eq!(report["verdict"]["passed"], json!(false));
    assert_eq!(report["verdict"]["finished"], json!(true));
    let sentence = report["verdict"]["sentence"].as_str().expect("a sentence");
    assert!(sentence.contains("missing: 1, extra: 1, different: 3"), "{sentence}");
    let counted = &report["differences"]["counted_by_full"];
    assert_eq!(*counted, json!({"missing": 1, "extra": 1, "different": 3}));
    assert_eq!(
        report["differences"]["listed_by_kind"],
        json!({"different: numeric_type": 1, "different: value": 2, "extra": 1, "missing": 1})
    );
    let checks = report["checks"].as_array().expect("checks");
    let full = checks.iter().find(|check| check["name"] == json!("full")).expect("the full check");
    let listed = full["differences"].as_array().expect("differences");
    let named = |id: Value| listed.iter().find(|entry| entry["_id"] == id).expect("a difference");
    assert_eq!(named(json!({"$numberInt": "6"}))["fields"], json!(["name"]));
    assert_eq!(named(json!({"$numberInt": "5"}))["kind"], json!("missing"));
    for told in ["추가된 문서", "int instead", "<code>name</code>", "long instead of int"] {
        assert!(page.contains(told) || told == "int instead", "{told} is not in the page");
    }
    assert!(page.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"), "the `_id` is not there");
    assert!(!page.contains("<script"), "markup of an `_id` is");
    // What is told of the report is what stands in it.
    assert_eq!(run.text("/report/sha256"), report["hash"]["value"]);
    assert_eq!(report["hash"]["value"], json!(hash(&report)));
    assert!(page.contains(run.text("/report/sha256")));
    assert_eq!(written(&bench), ["r.html", "r.json"]);
}

#[tokio::test]
async fn who_when_what_and_how_stand_in_it() {
    let bench = pair().await;
    let rules =
        "keep = '{\"name\": {\"$type\": \"string\"}}'\nreject = [{ name = \"six\", when = '{\"n\": 6}' }]";
    configure(&bench, rules);
    collection(&bench, TARGET).delete_many(doc! {"n": 6}).await.expect("deleted");
    collection(&bench, TARGET).delete_many(doc! {"name": null}).await.expect("deleted");
    bench.run(&format!("{FULL} --counts --max-differences 7")).await.expect_exit(0);
    let report = document(&bench, "r.json");
    assert_eq!((&report["schema"], &report["kind"]), (&json!(1), &json!("mongorekey evidence report")));
    assert_eq!(report["verdict"]["passed"], json!(true), "{}", report["verdict"]);
    let collections = report["subject"]["collections"].as_array().expect("collections");
    let names: Vec<&Value> = collections.iter().map(|collection| &collection["namespace"]).collect();
    assert_eq!(names, [&json!(bench.namespace(SOURCE)), &json!(bench.namespace(TARGET))]);
    let uuid = collections[0]["uuid"].as_str().expect("an identity");
    let list = doc! {"listCollections": 1, "filter": {"name": SOURCE}};
    let cursor = bench.database.run_cursor_command(list).await.expect("an answer");
    let listed: Vec<Document> = cursor.try_collect().await.expect("collections");
    let info = listed[0].get_document("info").expect("info");
    let Some(bson::Bson::Binary(stored)) = info.get("uuid") else { panic!("{info}") };
    assert_eq!(uuid, stored.to_uuid().expect("a UUID").to_string());
    let words = report["subject"]["words"].to_string();
    assert!(
        words.contains("name is of type") && words.contains("six") && words.contains("n is 6"),
        "{words}"
    );
    assert_eq!(report["subject"]["rules"]["reject"][0]["name"], json!("six"));
    let place = &report["place"];
    assert!(place["server"].as_str().is_some_and(|server| server.starts_with("MongoDB ")), "{place}");
    assert!(place["server_time"].is_string() && place["host"].is_string(), "{place}");
    let time = &report["time"];
    assert!(time["started_at"].as_str() < time["ended_at"].as_str(), "{time}");
    let line = report["run"]["command_line"].as_str().expect("a line");
    assert!(
        line.starts_with("mongorekey --output json verify --full --settle 1ms --report r.html"),
        "{line}"
    );
    let options = report["run"]["options"].as_array().expect("options");
    let option = |name: &str| options.iter().find(|option| option["name"] == json!(name)).expect("an option");
    assert_eq!(option("--max-differences")["value"], json!("7"));
    assert_eq!(option("--parallel")["is_default"], json!(true));
    let page = read(&bench, "r.html");
    for told in
        ["Passed", uuid, "n is 6", "--max-differences", "Checked by", "prefers-color-scheme", "@media print"]
    {
        assert!(page.contains(told), "{told} is not in the page");
    }
    for foreign in ["http://", "https://", "src=", "@import", "url("] {
        assert!(!page.contains(foreign), "{foreign} is in the page");
    }
}

#[tokio::test]
async fn two_runs_over_the_same_data_can_be_compared_range_by_range() {
    let bench = pair().await;
    bench.run(FULL).await.expect_exit(0);
    let first = document(&bench, "r.json");
    assert!(ranges(&first).len() >= 4, "{}", first["comparisons"]);
    for [from, below, source, target] in ranges(&first) {
        assert_eq!(source, target, "from {from} below {below}");
    }
    bench.run(FULL).await.expect_exit(0);
    let second = document(&bench, "r.json");
    assert_eq!(ranges(&first), ranges(&second));
    // Somebody else cuts it elsewhere, and finds the same whole.
    let mut other = config(&bench, "");
    other = other.replace(bench.state.name(), &format!("{}_other", bench.state.name()));
    bench.configure_text(&other);
    bench.run(FULL).await.expect_exit(0);
    let third = document(&bench, "r.json");
    let other_state = bench.state.name().to_owned() + "_other";
    let client = crate::harness::connect(&bench.uri).await;
    client.database(&other_state).drop().await.expect("dropped");
    for side in ["source", "target"] {
        assert_eq!(first["comparisons"][0][side], third["comparisons"][0][side]);
    }
    configure(&bench, "");
    // One byte.
    let change = doc! {"$set": {"name": "홍길동 2001"}};
    collection(&bench, TARGET).update_one(doc! {"_id": 2000}, change).await.expect("changed");
    bench.run(FULL).await.expect_exit(1);
    let fourth = document(&bench, "r.json");
    let (before, after) = (ranges(&first), ranges(&fourth));
    assert_eq!(before.len(), after.len());
    let changed: Vec<_> = before.iter().zip(&after).filter(|(before, after)| before != after).collect();
    assert_eq!(changed.len(), 1, "{changed:?}");
    let (before, after) = changed[0];
    assert_eq!(before[..3], after[..3], "bounds and source are as they were");
    assert_ne!(before[3]["digest"], after[3]["digest"]);
    assert_eq!(before[3]["bytes"], after[3]["bytes"]);
}

#[tokio::test]
async fn the_hash_of_a_range_can_be_computed_without_the_tool() {
    let bench = pair().await;
    bench.run(FULL).await.expect_exit(0);
    let report = document(&bench, "r.json");
    let number = |bound: &Value| bound["$numberInt"].as_str().and_then(|number| number.parse::<i32>().ok());
    let inner = ranges(&report)
        .into_iter()
        .find_map(|[from, below, source, _]| Some((number(&from)?, number(&below)?, source)));
    let (from, below, told) = inner.expect("a range between two numbers");
    let raw: Collection<RawDocumentBuf> = bench.database.collection(SOURCE);
    let cursor = raw.find(doc! {"_id": {"$gte": from, "$lt": below}}).sort(doc! {"_id": -1});
    let documents: Vec<RawDocumentBuf> =
        cursor.await.expect("a cursor").try_collect().await.expect("documents");
    let first_128_bits = |document: &RawDocument| {
        let hash = Sha256::digest(document.as_bytes());
        u128::from_be_bytes(hash[..16].try_into().expect("sixteen bytes"))
    };
    let sum = documents.iter().fold(0_u128, |sum, document| sum.wrapping_add(first_128_bits(document)));
    assert_eq!(told["digest"], json!(format!("{sum:032x}")));
    assert_eq!(told["documents"], json!(documents.len()));
}

#[tokio::test]
async fn a_name_that_can_not_be_written_stops_before_anything_is_done() {
    let bench = pair().await;
    std::fs::create_dir(path(&bench, "taken.json")).expect("a folder");
    for (file, told) in [
        ("r.pdf", ".html or .json"),
        ("report", ".html or .json"),
        ("nowhere/r.html", "nowhere"),
        ("taken.html", "is a folder"),
    ] {
        let run = bench.run(&format!("verify --full --report {file}")).await.expect_exit(2);
        assert_eq!(run.text("/error/code"), "usage");
        assert!(run.stdout.contains(told), "{}", run.stdout);
        bench.run(&format!("report some-job --to {file}")).await.expect_exit(2);
    }
    bench.run("report").await.expect_exit(2);
    assert!(!bench.has_state().await, "something was done");
    assert_eq!(written(&bench), ["taken.json"]);
    bench.run("report nobody").await.expect_exit(3);
    // What is refused is no evidence of anything.
    std::fs::write(path(&bench, "r.html"), "an earlier one").expect("written");
    bench.run("verify --source a.b --to b --report r.html").await.expect_exit(2);
    assert_eq!(read(&bench, "r.html"), "an earlier one");
}

#[tokio::test]
async fn the_name_of_either_file_stands_for_both() {
    let bench = pair().await;
    for name in ["a.json", "b.html"] {
        bench.run(&format!("verify --counts --report {name}")).await.expect_exit(0);
    }
    assert_eq!(written(&bench), ["a.html", "a.json", "b.html", "b.json"]);
}

#[tokio::test]
async fn an_interrupted_verification_says_that_it_is_not_finished() {
    let bench = pair().await;
    bench.configure_text(&config(&bench, "").replace(&bench.uri, &named_uri(&bench)));
    let slow = doc! {"failCommands": ["find"], "blockConnection": true, "blockTimeMS": 700};
    let point = fail(&bench, "alwaysOn", slow).await;
    let run = bench.program(&format!("{FULL} --parallel 1")).spawn();
    let stored: Collection<Document> = bench.state.collection("verify_ranges");
    let done = async || stored.count_documents(doc! {"state": "equal"}).await.expect("a count") > 0;
    wait_for("a finished range", done).await;
    run.signal(Signal::Interrupt);
    let run = run.finish().await.expect_exit(130);
    drop(point);
    let (report, page) = (document(&bench, "r.json"), read(&bench, "r.html"));
    assert_eq!(report["verdict"]["finished"], json!(false));
    assert_eq!(report["verdict"]["passed"], Value::Null);
    assert!(report["verdict"]["sentence"].as_str().is_some_and(|text| text.contains("not finished")));
    assert!(page.contains("Not finished") && !page.contains("✓</span> Passed"), "{page}");
    let compared = &report["comparisons"][0];
    assert!(compared["ranges_equal"].as_u64() > Some(0), "{compared}");
    assert!(compared["ranges_not_compared"].as_u64() > Some(0), "{compared}");
    assert_eq!(run.text("/report/sha256"), report["hash"]["value"]);
}

async fn backfilled(bench: &Bench) -> KeyApi {
    let api = KeyApi::start(|call| match call.number % 4 {
        0 => Reply::not_found(),
        _ => Reply::found(call).after(std::time::Duration::from_millis(20)),
    });
    let url = format!("{}?token=hunter3", api.key_url());
    let secret = "headers = { Authorization = 'Bearer hunter1' }";
    bench.configure(&bench.config_for_url(&url).key_api(secret));
    api
}

fn entry(report: &Value, group: usize, name: &str) -> u64 {
    let entries = report["outcomes"][group]["entries"].as_array().expect("entries");
    let found = entries.iter().find(|entry| entry["name"] == json!(name));
    found.unwrap_or_else(|| panic!("no {name} in {entries:?}"))["count"].as_u64().expect("a count")
}

fn expect_no_secret(bench: &Bench, run: &Finished, name: &str) {
    for text in [read(bench, &format!("{name}.html")), read(bench, &format!("{name}.json")), run.output()] {
        for secret in ["hunter1", "hunter2", "hunter3"] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
}

#[tokio::test]
async fn a_backfill_has_a_report_over_all_its_runs() {
    let bench = Bench::with_docs(300).await;
    let api = backfilled(&bench).await;
    bench.run("backfill --tps 100 --limit 120").await.expect_exit(0);
    let run = bench.run("backfill --tps 100").await.expect_exit(0);
    let job = run.text("/job").to_owned();
    let run = bench.run(&format!("report {job}")).await.expect_exit(0);
    let (html, json) = (format!("{job}.html"), format!("{job}.json"));
    assert_eq!([run.text("/report/html"), run.text("/report/json")], [&*html, &*json]);
    let report = document(&bench, &json);
    assert_eq!(report["verdict"]["passed"], json!(true), "{report:#}");
    assert_eq!(entry(&report, 0, "received their key"), bench.filled().await);
    assert_eq!(entry(&report, 0, "flagged: not found"), bench.flagged().await);
    let answered = entry(&report, 1, "found") + entry(&report, 1, "not found");
    assert_eq!(answered, api.count() as u64);
    assert_eq!(report["time"]["runs"], json!(2));
    let samples = report["series"]["samples"].as_array().expect("samples");
    let sum = |name: &str| samples.iter().filter_map(|sample| sample[name].as_u64()).sum::<u64>();
    assert_eq!((sum("documents"), sum("operations")), (300, api.count() as u64));
    let slow = samples.iter().any(|sample| sample["p95_ms"].as_f64().is_some_and(|p95| p95 >= 20.0));
    assert!(slow, "{samples:?}");
    let words = report["subject"]["words"][0].as_str().expect("words");
    assert!(words.contains("receive in newKey") && words.contains("legacyKey"), "{words}");
    let line = report["run"]["command_line"].as_str().expect("a line");
    assert_eq!(line, "mongorekey --output json backfill --tps 100");
    let page = read(&bench, &html);
    for told in ["Outcomes", "Throughput over time", "Latency of the key API", "flagged: not found", "<svg"] {
        assert!(page.contains(told), "{told} is not in the page");
    }
    expect_no_secret(&bench, &run, &job);
}

#[tokio::test]
async fn a_secret_on_the_command_line_is_not_in_the_report() {
    let bench = Bench::with_docs(40).await;
    let api = backfilled(&bench).await;
    let url = format!("{}?token=hunter2", api.key_url());
    let run = bench.program("backfill --tps 500 --api-url").argument(&url).run().await.expect_exit(0);
    let job = run.text("/job").to_owned();
    let run = bench.run(&format!("report {job} --to b.html")).await.expect_exit(0);
    expect_no_secret(&bench, &run, "b");
    let run = bench.program("verify --report v.html --api-url").argument(&url).run().await.expect_exit(0);
    expect_no_secret(&bench, &run, "v");
    assert!(read(&bench, "v.json").contains("mongorekey --output json verify --report v.html"));
}

#[tokio::test]
async fn a_cleanse_has_a_report_with_its_ledger() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..3000).map(|id| doc! {"_id": id, "n": id % 10})).await;
    configure(
        &bench,
        "keep = '{\"n\": {\"$lt\": 8}}'\nreject = [{ name = \"<b>zero\", when = '{\"n\": 0}' }]",
    );
    bench.run("cleanse --count-rules").await.expect_exit(0);
    let job = job_name(&bench);
    let report_of = async || {
        bench.run(&format!("report {job} --to c.json")).await.expect_exit(0);
        document(&bench, "c.json")
    };
    let report = report_of().await;
    assert_eq!(report["verdict"]["passed"], json!(true), "{report:#}");
    let sentence = report["verdict"]["sentence"].as_str().expect("a sentence");
    assert!(
        sentence.contains("balances") && sentence.contains("No full comparison has passed"),
        "{sentence}"
    );
    assert_eq!(report["ledger"]["balanced"], json!(true));
    assert_eq!(report["ledger"]["rejected_by"], json!({"keep": 600, "<b>zero": 300}));
    assert_eq!((entry(&report, 0, "kept"), entry(&report, 0, "rejected by <b>zero")), (2100, 300));
    let collections = report["subject"]["collections"].as_array().expect("collections");
    for collection in collections {
        assert_eq!(collection["uuid"], collection["uuid_in_job"], "{collection}");
    }
    let samples = report["series"]["samples"].as_array().expect("samples");
    let copied: u64 = samples.iter().filter_map(|sample| sample["documents"].as_u64()).sum();
    assert_eq!(copied, 2100, "{samples:?}");
    let page = read(&bench, "c.html");
    assert!(
        page.contains("Ledger") && page.contains("It balances") && page.contains("n is less than 8"),
        "{page}"
    );
    assert!(page.contains("&lt;b&gt;zero") && !page.contains("<b>"), "{page}");

    bench.run("verify --full").await.expect_exit(0);
    let report = report_of().await;
    let sentence = report["verdict"]["sentence"].as_str().expect("a sentence");
    assert!(sentence.contains("A full comparison passed at 20"), "{sentence}");
    assert_eq!(report["comparisons"][0]["source"]["documents"], json!(2100));
}

#[tokio::test]
async fn a_job_of_an_earlier_version_and_one_that_died_have_a_report_too() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..500).map(|id| doc! {"_id": id})).await;
    configure(&bench, "");
    let crash = bench.program("cleanse").env("MONGOREKEY_CRASH_AT", "cleanse_copied:1").run().await;
    assert_eq!(crash.exit, None, "it was not killed: {}", crash.output());
    let job = job_name(&bench);
    bench.run(&format!("report {job} --to d.html")).await.expect_exit(0);
    let report = document(&bench, "d.json");
    assert_eq!(report["verdict"]["finished"], json!(false), "{}", report["verdict"]);
    assert!(read(&bench, "d.html").contains("died"));
    bench.run("cleanse").await.expect_exit(0);
    let jobs: Collection<Document> = bench.state.collection("jobs");
    let unset = doc! {"$unset": {"series": "", "ran": "", "result": "", "totals": ""}};
    jobs.update_one(doc! {"_id": &job}, unset).await.expect("as it was");
    bench.run(&format!("report {job} --to d.html")).await.expect_exit(0);
    let report = document(&bench, "d.json");
    assert_eq!((&report["verdict"]["passed"], &report["series"]), (&json!(true), &Value::Null));
    bench.run("cleanse").await.expect_exit(0);
    // A comparison has its report from `verify` itself.
    bench.run("verify --full").await.expect_exit(0);
    let name = job.replace("cleanse-", "verify-");
    let run = bench.run(&format!("report {name}")).await.expect_exit(3);
    assert!(run.stdout.contains("verify --report"), "{}", run.stdout);
}

#[tokio::test]
async fn a_report_that_was_changed_is_found_out() {
    let bench = pair().await;
    bench.run(FULL).await.expect_exit(0);
    let check = async || bench.run("report --check r.json").await;
    let run = check().await.expect_exit(0);
    assert_eq!((&run.json["unchanged"], &run.json["page_unchanged"]), (&json!(true), &json!(true)));
    let (original, page) = (read(&bench, "r.json"), read(&bench, "r.html"));
    std::fs::write(path(&bench, "r.json"), original.replacen("4001", "4002", 1)).expect("written");
    let run = check().await.expect_exit(1);
    assert_eq!(run.json["unchanged"], json!(false));
    std::fs::write(path(&bench, "r.json"), &original).expect("written");
    std::fs::write(path(&bench, "r.html"), page.replacen("Passed", "Perfect", 1)).expect("written");
    let run = check().await.expect_exit(1);
    assert_eq!((&run.json["unchanged"], &run.json["page_unchanged"]), (&json!(true), &json!(false)));
    std::fs::write(path(&bench, "other.json"), "{}").expect("written");
    bench.run("report --check other.json").await.expect_exit(2);
    bench.run("report --check nowhere.json").await.expect_exit(2);
}

#[tokio::test]
async fn a_report_claims_no_comparison_that_was_not_made() {
    let bench = Bench::new().await;
    let keys = |n: i32| doc! {"_id": n, "legacyKey": format!("K{n}"), "newKey": format!("N{}", n / 2)};
    bench.insert((0..20).map(keys)).await;
    bench.insert_into(TARGET, (0..20).map(keys)).await;
    let api = KeyApi::finding();
    let text = bench.config(&api).text();
    let cleanse = format!("\n[cleanse]\nsource = \"{}\"\nto = \"{TARGET}\"\n", bench.namespace(DOCS));
    bench.configure_text(&format!("{text}{cleanse}"));
    let roles = |report: &Value| -> Vec<String> {
        let collections = report["subject"]["collections"].as_array().expect("collections");
        collections.iter().map(|found| found["role"].as_str().expect("a role").to_owned()).collect()
    };

    bench.run("verify --unique --report r.html").await.expect_exit(1);
    let report = document(&bench, "r.json");
    assert_eq!(report["about"]["title"], json!("Verification of a backfill"));
    assert_eq!(roles(&report), ["filled"]);
    assert_eq!(report["subject"]["rules"], Value::Null);
    assert_eq!(report["differences"]["listed_by_kind"], json!({"new key of two legacy keys": 10}));
    assert!(read(&bench, "r.html").contains("unique new keys: new key of two legacy keys"));

    bench.run("verify --full --unique --settle 1ms --report r.html").await.expect_exit(1);
    let report = document(&bench, "r.json");
    let title = report["about"]["title"].as_str().expect("a title");
    assert!(title.contains(" against ") && title.ends_with("and of a backfill"), "{title}");
    assert_eq!(roles(&report), ["source", "target", "filled"]);
    assert!(read(&bench, "r.html").contains("unique new keys: new key of two legacy keys"));
}

#[tokio::test]
async fn the_bound_of_a_sample_is_not_rounded_away() {
    let bench = pair().await;
    bench.run("verify --sample 3500 --settle 1ms --report r.html").await.expect_exit(0);
    let report = document(&bench, "r.json");
    let checks = report["checks"].as_array().expect("checks");
    let bound = checks[0]["confidence"]["share_to"].as_str().expect("decimal text");
    assert!(bound.starts_with("0.000855"), "{bound}");
    assert!(read(&bench, "r.html").contains(bound));
}
