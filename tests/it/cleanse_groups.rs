//! `dedupe`: of documents with equal values only the latest is copied, whatever is written
//! meanwhile and whenever the program is killed.

use bson::{Bson, DateTime, Document, doc};
use mongodb::{Collection, IndexModel};
use serde_json::json;

use crate::cleansing::{FailPoint, SOURCE, TARGET, bytes, configure, count_now, next_namespace};
use crate::harness::{Bench, Random, wait_for};
use crate::judging::Judge;
use crate::program::Signal;

const DEDUPE: &str = "keep = '{\"valid\": true}'\ndedupe = { by = ['team'], keep_latest = 'at' }";
const JUDGE: Judge = Judge { keep: true, exists_in: None, dedupe: true };

fn source(bench: &Bench) -> Collection<Document> {
    bench.database.collection(SOURCE)
}

fn player(id: impl Into<Bson>, team: impl Into<Bson>, at: impl Into<Bson>) -> Document {
    doc! {"_id": id.into(), "valid": true, "team": team.into(), "at": at.into(), "text": "x".repeat(20)}
}

async fn set(bench: &Bench, id: impl Into<Bson>, fields: Document) {
    let changed = source(bench).update_one(doc! {"_id": id.into()}, doc! {"$set": fields}).await;
    assert_eq!(changed.expect("a write").matched_count, 1);
}

async fn delete(bench: &Bench, id: impl Into<Bson>) {
    assert_eq!(source(bench).delete_one(doc! {"_id": id.into()}).await.expect("a write").deleted_count, 1);
}

/// Documents whose team and time are of every kind that decides differently.
fn of_every_kind() -> Vec<Document> {
    let mut documents = vec![
        // Equal numbers are one team, whatever their types.
        player("n1", 7, 1),
        player("n2", 7_i64, 3),
        player("n3", 7.0, 2),
        // A text is another one.
        player("s1", "7", 1),
        player("s2", "7", 1_i64),
        // A tie is decided by the highest `_id`, of any type.
        player(5, "tie", 1),
        player("5", "tie", 1.0),
        player(9, "tie", 1),
        // Times of several types: a date is later than a text, than a number, than null.
        player("t1", "types", Bson::Null),
        player("t2", "types", 9),
        player("t3", "types", "a"),
        player("t4", "types", DateTime::from_millis(-5)),
        // Without a time or with none at all.
        player("m1", "missing", Bson::Null),
        // An object is a value.
        player("o1", doc! {"a": 1}, 1),
        player("o2", doc! {"a": 1}, 2),
        player("o3", doc! {"a": 2}, 0),
        // In no team.
        player("z1", Bson::Null, 1),
        player("z2", Bson::Null, 2),
        player("z3", vec![1, 2], 1),
        player("z4", vec![1, 2], 2),
        player("z5", vec![7], 2),
        doc! {"_id": "z6", "valid": true, "at": 1},
        doc! {"_id": "z7", "valid": true, "at": 2},
        doc! {"_id": "m2", "valid": true, "team": "missing"},
        // The latest is not kept, the next one is.
        doc! {"_id": "r1", "valid": false, "team": "rejected", "at": 9},
        player("r2", "rejected", 5),
        player("r3", "rejected", 4),
    ];
    documents.extend((0..300).map(|id| player(format!("p{id}"), format!("team{}", id % 40), id % 7)));
    documents
}

#[tokio::test]
async fn only_the_latest_of_a_group_is_kept_and_counted() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, of_every_kind()).await;
    configure(&bench, DEDUPE);
    let kept = JUDGE.valid(&bench).await.len();
    let losers = of_every_kind().len() - kept - 1;

    let dry = bench.run("cleanse --dry-run").await.expect_exit(0);
    assert_eq!(dry.json["documents"]["rejected_by"], json!({"keep": 1, "dedupe": losers}));
    assert_eq!(dry.number("/documents/kept"), u64::try_from(kept).expect("small"));
    let valid = JUDGE.expected(&bench).await;
    let samples = dry.json["samples"]["dedupe"].as_array().expect("samples").clone();
    assert_eq!(samples.len(), 5);
    for sample in samples {
        let id = Bson::try_from(sample).expect("extended JSON");
        assert!(!valid.contains_key(&crate::harness::id_bytes(&doc! {"_id": id.clone()})), "{id} is valid");
    }
    assert!(!bench.has_state().await);

    let run = bench.run("cleanse --count-rules").await.expect_exit(0);
    assert_eq!(run.json["documents"]["rejected_by"], dry.json["documents"]["rejected_by"]);
    assert_eq!(run.json["documents"]["copied"], dry.json["documents"]["kept"]);
    JUDGE.expect_target(&bench).await;
}

#[tokio::test]
async fn verification_knows_which_of_a_group_belongs_into_the_target() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, of_every_kind()).await;
    configure(&bench, DEDUPE);
    bench.run("cleanse").await.expect_exit(0);
    let all = ["verify --counts", "verify --sample 1000", "verify --sample 40", "verify --full"];
    for command in all {
        bench.run(command).await.expect_exit(0);
    }
    // As many as before, but one who lost instead of the winner.
    let target: Collection<Document> = bench.database.collection(TARGET);
    target.delete_one(doc! {"_id": "r2"}).await.expect("deleted");
    bench.run("verify --counts --settle 100ms").await.expect_exit(1);
    bench.run("verify --full --settle 100ms").await.expect_exit(1);
    target.insert_one(player("r3", "rejected", 4)).await.expect("inserted");
    bench.run("verify --counts").await.expect_exit(0);
    let full = bench.run("verify --full --settle 100ms").await.expect_exit(1);
    let differences = full.json["checks"][0]["differences"].to_string();
    assert!(differences.contains("r2") && differences.contains("r3"), "{differences}");
    bench.run("verify --sample 1000 --settle 100ms").await.expect_exit(1);
}

#[tokio::test]
async fn groups_and_members_follow_the_collation_of_the_source() {
    let bench = Bench::new().await;
    let collation = doc! {"locale": "en", "strength": 2};
    for name in [SOURCE, "members"] {
        bench
            .database
            .run_command(doc! {"create": name, "collation": collation.clone()})
            .await
            .expect("created");
    }
    let with = |id: &str, team: &str, at: i32, member: &str| {
        doc! {"_id": id, "valid": true, "team": team, "at": at, "member": member}
    };
    bench
        .insert_into(
            SOURCE,
            [
                with("1", "ABC", 1, "x"),
                with("2", "abc", 2, "X"),
                with("3", "Abc", 3, "y"),
                with("4", "d", 1, "X"),
            ],
        )
        .await;
    bench.insert_into("members", [doc! {"_id": "x"}]).await;
    let exists_in = format!(
        "exists_in = [{{ name = 'm', collection = '{}', local = 'member', foreign = '_id' }}]",
        bench.namespace("members")
    );
    configure(&bench, &format!("{DEDUPE}\n{exists_in}"));
    let ids = async || {
        bench
            .documents(TARGET)
            .await
            .iter()
            .map(|d| d.get_str("_id").expect("text").into())
            .collect::<Vec<String>>()
    };
    let run = bench.run("cleanse --count-rules").await.expect_exit(0);
    assert_eq!(run.json["documents"]["rejected_by"], json!({"keep": 0, "m": 1, "dedupe": 1}));
    assert_eq!(ids().await, ["2", "4"]);
    bench.database.collection::<Document>("members").insert_one(doc! {"_id": "Y"}).await.expect("inserted");
    bench.run("cleanse").await.expect_exit(0);
    assert_eq!(ids().await, ["3", "4"]);
    set(&bench, "3", doc! {"at": 0}).await;
    bench.run("cleanse").await.expect_exit(0);
    assert_eq!(ids().await, ["2", "4"]);
    bench.run("verify --full --counts").await.expect_exit(0);
}

#[tokio::test]
async fn whatever_happens_to_a_winner_the_next_one_takes_its_place() {
    let bench = Bench::new().await;
    let teams = [
        "deleted", "rejected", "lowered", "left", "joined", "twice", "via", "end", "swap1", "swap2",
        "chain1", "chain2", "chain3", "gone", "list", "retyped", "emptied", "born", "raised",
    ];
    // In every team 1 loses, 2 is the next and 3 wins.
    let of_team =
        |team: &str| (1..=3).map(|at| player(format!("{team}{at}"), team, at * 10)).collect::<Vec<_>>();
    bench.insert_into(SOURCE, teams.iter().flat_map(|team| of_team(team))).await;
    bench.insert_into(SOURCE, [player(77, "retyped", 99), player("alone", "single", 1)]).await;
    source(&bench)
        .create_index(IndexModel::builder().keys(doc! {"team": 1}).build())
        .await
        .expect("an index");
    configure(&bench, DEDUPE);
    bench.run("cleanse").await.expect_exit(0);
    JUDGE.expect_target(&bench).await;

    delete(&bench, "deleted3").await;
    set(&bench, "rejected3", doc! {"valid": false}).await;
    set(&bench, "lowered3", doc! {"at": 15}).await;
    set(&bench, "left3", doc! {"team": "joined", "at": 99}).await;
    set(&bench, "twice3", doc! {"team": "via", "at": 99}).await;
    set(&bench, "twice3", doc! {"team": "end"}).await;
    set(&bench, "swap13", doc! {"team": "swap2"}).await;
    set(&bench, "swap23", doc! {"team": "swap1"}).await;
    set(&bench, "chain13", doc! {"team": "chain2", "at": 99}).await;
    set(&bench, "chain23", doc! {"team": "chain3", "at": 99}).await;
    set(&bench, "chain33", doc! {"team": "chain1", "at": 99}).await;
    source(&bench).update_one(doc! {"_id": "gone3"}, doc! {"$unset": {"team": ""}}).await.expect("a write");
    set(&bench, "list3", doc! {"team": ["list"]}).await;
    delete(&bench, 77).await;
    bench.insert_into(SOURCE, [player(77.0, "retyped", 98)]).await;
    for at in 1..=3 {
        delete(&bench, format!("emptied{at}")).await;
    }
    bench.insert_into(SOURCE, [player("new", "born", 99), player("only", "fresh", 1)]).await;
    set(&bench, "raised1", doc! {"at": 99}).await;
    set(&bench, "alone", doc! {"team": "elsewhere"}).await;

    let run = bench.run("cleanse").await.expect_exit(0);
    assert!(run.number("/followed/changes") >= 20, "{}", run.stdout);
    JUDGE.expect_target(&bench).await;
    bench.run("verify --full --counts").await.expect_exit(0);
}

#[tokio::test]
async fn changes_while_the_copy_stands_still_are_not_lost() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..600).map(|id| player(id, id % 150, id))).await;
    configure(&bench, DEDUPE);
    let inserts = FailPoint::reserve("hangDuringBatchInsert");
    let data = doc! {"nss": next_namespace(&bench, "cleanse", TARGET).await, "shouldCheckForInterrupt": true};
    let before = inserts.set(&bench, "alwaysOn", data).await;
    let mut run = bench.program("cleanse --parallel 1").spawn();
    wait_for("the copy", async || {
        assert!(run.is_running(), "{}", run.stderr());
        bench
            .job(&crate::cleansing::job_name(&bench))
            .await
            .is_some_and(|job| job.get_str("phase").is_ok_and(|phase| phase == "copy"))
    })
    .await;
    inserts.wait_until_entered(&bench, before + 1).await;
    // What is read already, and what is not read yet.
    for id in [450, 451, 452, 597, 598, 599] {
        set(&bench, id, doc! {"team": 1000 + id % 5}).await;
    }
    delete(&bench, 453).await;
    delete(&bench, 596).await;
    set(&bench, 454, doc! {"valid": false}).await;
    set(&bench, 595, doc! {"at": -1}).await;
    inserts.off(&bench).await;
    run.finish().await.expect_exit(0);
    JUDGE.expect_target(&bench).await;
}

/// Random changes of few documents in few groups, so that everything happens to everybody.
async fn change_at_random(bench: &Bench, random: &mut Random, count: usize) {
    let small = |number: usize| i32::try_from(number).expect("small");
    for _ in 0..count {
        let id = small(random.below(40));
        let team = small(random.below(8));
        let at = small(random.below(1000));
        let filter = doc! {"_id": id};
        let update = match random.below(9) {
            0 => {
                source(bench).delete_one(filter).await.expect("a write");
                continue;
            }
            1 | 2 => {
                let fresh = player(id, team, at);
                source(bench).replace_one(filter, fresh).upsert(true).await.expect("a write");
                continue;
            }
            3 => vec![doc! {"$set": {"valid": {"$not": ["$valid"]}}}],
            4 | 5 => vec![doc! {"$set": {"team": team}}],
            6 => vec![doc! {"$set": {"team": team, "at": at}}],
            7 => vec![doc! {"$unset": "team"}],
            _ => vec![doc! {"$set": {"at": at}}],
        };
        source(bench).update_one(filter, update).await.expect("a write");
    }
}

#[tokio::test]
async fn kills_between_the_steps_forget_no_group() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..40).map(|id| player(id, id % 8, id))).await;
    configure(&bench, DEDUPE);
    bench.run("cleanse").await.expect_exit(0);
    let mut random = Random::seeded(11);
    let mut kills = 0;
    for point in
        ["groups_noted:1", "groups_first:1", "groups_removed:1", "groups_written:1", "groups_written:2"]
    {
        for changes in [3, 12, 40] {
            change_at_random(&bench, &mut random, changes).await;
            let killed = bench.program("cleanse").env("MONGOREKEY_CRASH_AT", point).run().await;
            assert!(matches!(killed.exit, None | Some(0)), "{}", killed.output());
            kills += usize::from(killed.exit.is_none());
            // What a look has shown is no longer so.
            change_at_random(&bench, &mut random, changes).await;
            bench.run("cleanse").await.expect_exit(0);
            JUDGE.expect_target(&bench).await;
        }
    }
    assert!(kills >= 10, "{kills} kills");
}

/// When the copy of a winner is gone, nothing tells of its group any more: the next one must stand
/// there already.
#[tokio::test]
async fn the_next_winner_is_there_before_the_former_one_is_gone() {
    let bench = Bench::new().await;
    bench
        .insert_into(SOURCE, (0..5).flat_map(|team| (0..3).map(move |at| player(10 * team + at, team, at))))
        .await;
    configure(&bench, DEDUPE);
    bench.run("cleanse").await.expect_exit(0);
    for team in 0..5 {
        delete(&bench, 10 * team + 2).await;
    }
    let killed = bench.program("cleanse").env("MONGOREKEY_CRASH_AT", "groups_removed:1").run().await;
    assert_eq!(killed.exit, None, "{}", killed.output());
    bench.run("cleanse").await.expect_exit(0);
    JUDGE.expect_target(&bench).await;
}

/// The one group whose new winner comes from another group: when the copy that told of it is lost, and
/// that winner moves on, only the note tells of it.
#[tokio::test]
async fn a_group_is_not_forgotten_when_its_next_winner_moves_on_after_a_kill() {
    let bench = Bench::new().await;
    let documents =
        [player("x", "g", 50), player("next", "g", 10), player("z", "m", 60), player("other", "m", 1)];
    bench.insert_into(SOURCE, documents).await;
    configure(&bench, DEDUPE);
    bench.run("cleanse").await.expect_exit(0);
    delete(&bench, "x").await;
    set(&bench, "z", doc! {"team": "g"}).await;
    let killed = bench.program("cleanse").env("MONGOREKEY_CRASH_AT", "groups_removed:1").run().await;
    assert_eq!(killed.exit, None, "{}", killed.output());
    set(&bench, "z", doc! {"team": "k"}).await;
    bench.run("cleanse").await.expect_exit(0);
    JUDGE.expect_target(&bench).await;
}

#[tokio::test]
async fn a_unique_index_in_the_way_of_a_winner_loses_no_group() {
    let bench = Bench::new().await;
    let with = |id: &str, team: &str, at: i32, mail: &str| {
        let mut document = player(id, team, at);
        document.insert("mail", mail);
        document
    };
    bench
        .insert_into(SOURCE, [with("y", "g", 50, "u"), with("x", "g", 20, "v"), with("next", "g", 10, "w")])
        .await;
    let unique = mongodb::options::IndexOptions::builder().unique(true).build();
    let index = IndexModel::builder().keys(doc! {"mail": 1}).options(unique).build();
    source(&bench).create_index(index).await.expect("an index");
    configure(&bench, DEDUPE);
    bench.run("cleanse").await.expect_exit(0);
    // The winner leaves its group and its address, which the next one takes.
    set(&bench, "y", doc! {"team": "h", "mail": "free"}).await;
    set(&bench, "x", doc! {"mail": "u", "at": 60}).await;
    let killed = bench.program("cleanse").env("MONGOREKEY_CRASH_AT", "groups_unblocked:1").run().await;
    assert_eq!(killed.exit, None, "{}", killed.output());
    // And is gone before anybody looks again.
    set(&bench, "x", doc! {"team": "k"}).await;
    bench.run("cleanse").await.expect_exit(0);
    JUDGE.expect_target(&bench).await;
}

#[tokio::test]
async fn a_crowd_larger_than_what_is_read_at_once_is_thinned_out() {
    let bench = Bench::new().await;
    bench
        .insert_into(SOURCE, (0..12_000).map(|id| doc! {"_id": id, "valid": true, "team": "all", "at": id}))
        .await;
    configure(&bench, DEDUPE);
    bench.run("cleanse").await.expect_exit(0);
    assert_eq!(bytes(&bench, TARGET).await.len(), 1);
    JUDGE.expect_target(&bench).await;
}

#[tokio::test]
async fn a_changed_rule_is_another_job() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, of_every_kind()).await;
    configure(&bench, DEDUPE);
    bench.run("cleanse").await.expect_exit(0);
    configure(&bench, &DEDUPE.replace("'at'", "'text'"));
    bench.run("cleanse").await.expect_exit(3);
    configure(&bench, "keep = '{\"valid\": true}'");
    bench.run("cleanse").await.expect_exit(3);
}

#[tokio::test]
async fn a_large_source_needs_an_index_that_finds_groups() {
    let bench = Bench::new().await;
    bench
        .insert_into(SOURCE, (0..100_001).map(|id| doc! {"_id": id, "valid": true, "team": id / 2, "at": id}))
        .await;
    configure(&bench, DEDUPE);
    let refused = bench.run("cleanse").await.expect_exit(3);
    assert!(refused.json["error"]["hint"].to_string().contains("createIndex"), "{}", refused.stdout);
    assert!(!bench.has_state().await);
    // To look costs one scan, whatever indexes there are.
    let dry = bench.run("cleanse --dry-run").await.expect_exit(3);
    assert_eq!(dry.json["documents"]["rejected_by"]["dedupe"], json!(50_000));
    source(&bench)
        .create_index(IndexModel::builder().keys(doc! {"team": 1}).build())
        .await
        .expect("an index");
    // With it the copy begins; what becomes of groups is looked at on smaller ones.
    let run = bench.program("cleanse").spawn();
    wait_for("the copy", async || count_now(&bench, TARGET, doc! {}).await > 0).await;
    run.signal(Signal::Terminate);
    run.finish().await.expect_exit(143);
}
