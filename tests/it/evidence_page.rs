//! Reports as a browser shows them: by day, by night, on a narrow screen and on paper.
//! `MONGOREKEY_IT_SCREENSHOTS=FOLDER` keeps the pictures.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bson::{Bson, DateTime, Document, doc};
use mongodb::Collection;

use crate::cleansing::{SOURCE, TARGET, configure, ids, job_name};
use crate::harness::{Bench, Random};
use crate::key_api::{KeyApi, Reply};

/// Told by `scripts/check-report` where there is no browser.
const SKIPPED: i32 = 77;

fn check(bench: &Bench, files: &[&str]) -> Option<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/check-report");
    let mut command = Command::new(script);
    command.current_dir(&bench.folder);
    if let Ok(folder) = std::env::var("MONGOREKEY_IT_SCREENSHOTS") {
        command.args(["--screenshots", &folder]);
    }
    let output = command.args(files).output().expect("python3 runs the script");
    let told =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.code() == Some(SKIPPED) {
        let _closed = std::io::stderr().write_all(told.as_bytes());
        return None;
    }
    assert!(output.status.success(), "{told}");
    Some(())
}

/// What a job of three days with a night between two runs would have kept.
fn long_series() -> Document {
    let mut random = Random::seeded(7);
    let mut at = 1_790_000_000_000_i64;
    let mut columns: [Vec<Bson>; 7] = Default::default();
    for number in 0..240 {
        at += if number == 150 { 9 * 3_600_000 } else { 1_024_000 };
        let noise = |random: &mut Random, width: usize| i64::try_from(random.below(width)).expect("small");
        let calls = 10_000 + noise(&mut random, 240) - if (60..75).contains(&number) { 7_000 } else { 0 };
        let p50 = 280.0 + noise(&mut random, 40) as f64;
        let slow = if (60..75).contains(&number) { 4.0 } else { 1.0 };
        let values: [Bson; 7] = [
            DateTime::from_millis(at).into(),
            1024.0.into(),
            (calls + noise(&mut random, 900)).into(),
            calls.into(),
            (p50 * slow).into(),
            (p50 * 1.6 * slow).into(),
            (p50 * 2.4 * slow + noise(&mut random, 300) as f64).into(),
        ];
        columns.iter_mut().zip(values).for_each(|(column, value)| column.push(value));
    }
    let [at, seconds, documents, operations, p50, p95, p99] = columns;
    doc! {"v": 1, "interval": 1024.0, "at": at, "seconds": seconds, "documents": documents,
    "operations": operations, "p50": p50, "p95": p95, "p99": p99}
}

async fn keep_series(bench: &Bench, job: &str) {
    let jobs: Collection<Document> = bench.state.collection("jobs");
    jobs.update_one(doc! {"_id": job}, doc! {"$set": {"series": long_series()}}).await.expect("stored");
}

#[tokio::test]
async fn reports_of_verifications_stand_up_to_a_browser() {
    let bench = Bench::new().await;
    for name in [SOURCE, TARGET] {
        let people = (0..6000).map(|n| doc! {"_id": n, "name": format!("홍길동 {n}"), "n": n % 7});
        bench.insert_into(name, people).await;
        bench.insert_into(name, ids(40).into_iter().skip(30).map(|id| doc! {"_id": id})).await;
    }
    configure(&bench, "keep = '{\"n\": {\"$not\": {\"$gt\": 6}}}'");
    bench.run("verify --full --counts --sample 500 --report passed.html").await.expect_exit(0);
    let target: Collection<Document> = bench.database.collection(TARGET);
    target.delete_many(doc! {"_id": {"$gt": 100, "$lt": 120}}).await.expect("deleted");
    target
        .update_many(doc! {"n": 3, "_id": {"$lt": 900}}, doc! {"$set": {"n": 3_i64}})
        .await
        .expect("changed");
    let reordered = [doc! {"$replaceWith": {"_id": "$_id", "n": "$n", "name": "$name"}}];
    target.update_many(doc! {"_id": {"$gt": 5990}}, reordered.to_vec()).await.expect("changed");
    let long = "가나다라마바사".repeat(40);
    let evil = [
        "<script>alert(document.cookie)</script>".to_owned(),
        "x".repeat(400),
        long,
        "\u{202e}gnp.exe".into(),
    ];
    target.insert_many(evil.map(|id| doc! {"_id": id})).await.expect("inserted");
    target.create_index(mongodb::IndexModel::builder().keys(doc! {"n": 1}).build()).await.expect("an index");
    bench
        .run("verify --full --counts --sample 500 --settle 1ms --max-differences 250 --report failed.html")
        .await
        .expect_exit(1);
    if check(&bench, &["passed.html", "failed.html"]).is_none() {
        return;
    }
    // Whether the check finds anything at all.
    let page = std::fs::read_to_string(bench.folder.join("passed.html")).expect("a page");
    for (name, from, to) in [
        ("wide.html", "<main>", "<main><div style='width: 2000px'>wide</div>"),
        ("faint.html", "<main>", "<main><p style='color: #bbbbbb; background: #ffffff'>faint</p>"),
        ("asking.html", "<main>", "<main><img alt='' src='https://127.0.0.1:9/x.png'>"),
        ("nameless.html", "<main>", "<main><svg viewBox='0 0 9 9'></svg>"),
    ] {
        std::fs::write(bench.folder.join(name), page.replacen(from, to, 1)).expect("written");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/check-report");
        let output = Command::new(script).current_dir(&bench.folder).arg(name).output().expect("python3");
        let told = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{name}: {told}");
    }
}

#[tokio::test]
async fn reports_of_jobs_stand_up_to_a_browser() {
    let bench = Bench::with_docs(400).await;
    let api = KeyApi::start(|call| match call.number % 9 {
        0 | 1 => Reply::not_found(),
        2 => Reply::html(500),
        _ => Reply::found(call).after(Duration::from_millis(5)),
    });
    bench.configure(&bench.config(&api));
    let run = bench.run("backfill --tps 400").await;
    let job = run.text("/job").to_owned();
    keep_series(&bench, &job).await;
    bench.run(&format!("report {job} --to backfill.html")).await.expect_exit(0);

    bench.insert_into(SOURCE, (0..3000).map(|id| doc! {"_id": id, "n": id % 10, "ownerId": id % 3})).await;
    let rules = "keep = '{\"n\": {\"$lt\": 8}}'\nreject = [{ name = \"<b>탈퇴한 회원</b>\", when = '{\"ownerId\": 0}' }]";
    configure(&bench, rules);
    bench.run("cleanse --count-rules").await.expect_exit(0);
    bench.run("verify --full").await.expect_exit(0);
    let job = job_name(&bench);
    bench.run(&format!("report {job} --to short.html")).await.expect_exit(0);
    keep_series(&bench, &job).await;
    bench.run(&format!("report {job} --to cleanse.html")).await.expect_exit(0);
    check(&bench, &["backfill.html", "cleanse.html", "short.html"]);
}
