//! A machine that was suspended: the clock that programs wait by stood still, while the lease that
//! others judge ran out.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use bson::{Document, doc};
use mongodb::Collection;

use crate::cleansing::{SOURCE, TARGET, configure};
use crate::harness::{Bench, wait_for};
use crate::lying_network::Network;
use crate::program::{Signal, is_stopped, signal};

/// A suspended holder loses its lease within ten seconds.
const SUSPENDED: Duration = Duration::from_secs(11);

/// The library that puts the clock back; `None` where there is no C compiler.
#[expect(clippy::print_stderr, reason = "the only way for a test to say that it was skipped")]
fn still_clock(bench: &Bench) -> Option<PathBuf> {
    let library = bench.folder.join("still_clock.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/still_clock.c");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
    match compiled {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: there is no C compiler (cc)");
            None
        }
        compiled => {
            assert!(compiled.expect("the compiler runs").success(), "the library is not compiled");
            Some(library)
        }
    }
}

async fn set_version(bench: &Bench, version: i32) {
    let source: Collection<Document> = bench.database.collection(SOURCE);
    source.update_one(doc! {"_id": 1}, doc! {"$set": {"version": version}}).await.expect("a write");
}

/// The server would refuse it; the follower does not even ask.
#[tokio::test]
async fn lying_clock_stood_still_for_longer_than_the_lease_and_the_follower_commits_nothing() {
    let bench = Bench::new().await;
    let Some(library) = still_clock(&bench) else { return };
    configure(&bench, "keep = '{\"valid\": true}'");
    bench.insert_into(SOURCE, (0..100).map(|id| doc! {"_id": id, "valid": true})).await;
    bench.run("cleanse").await.expect_exit(0);
    let network = Network::before(&bench.uri).await;
    let behind = bench.folder.join("seconds_behind");
    let run = bench
        .program("cleanse --follow")
        .env("MONGOREKEY_URI", &network.uri())
        .env("MONGOREKEY_STOP_AT", "lane_statement:1")
        .env("LD_PRELOAD", &library.to_string_lossy())
        .env("STILL_CLOCK", &behind.to_string_lossy())
        .spawn();
    set_version(&bench, 1).await;
    wait_for("the stop", async || is_stopped(run.pid())).await;
    tokio::time::sleep(SUSPENDED).await;
    set_version(&bench, 2).await;
    bench.run("cleanse").await.expect_exit(0);
    std::fs::write(&behind, SUSPENDED.as_secs().to_string()).expect("the clock is put back");
    let before = network.log().len();
    signal(run.pid(), Signal::Continue);
    let run = run.finish().await.expect_exit(4);
    assert!(run.stderr.contains("the lease of the job"), "{}", run.output());
    let sent = network.log().split_off(before);
    assert!(!sent.iter().any(|command| command.starts_with("commitTransaction")), "{sent:?}");
    let target: Collection<Document> = bench.database.collection(TARGET);
    let document = target.find_one(doc! {"_id": 1}).await.expect("a read").expect("the document");
    assert_eq!(document.get_i32("version").ok(), Some(2));
}
