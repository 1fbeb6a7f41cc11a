//! `exists_in`: only documents that another collection knows are copied, whatever is written to both.

use bson::{Bson, Document, doc};
use mongodb::{Collection, IndexModel};
use serde_json::json;

use crate::cleansing::{
    FailPoint, SOURCE, TARGET, assert_same, bytes, configure, delicate, every_type, ids, insert_raw,
    job_name, next_namespace,
};
use crate::harness::{Bench, wait_for};
use crate::judging::Judge;

const MEMBERS: &str = "members";

fn rule(bench: &Bench, foreign: &str) -> String {
    let members = bench.namespace(MEMBERS);
    format!(
        "exists_in = [{{ name = 'a $ stranger.', collection = '{members}', local = 'member', foreign = '{foreign}' }}]"
    )
}

fn judge(foreign: &'static str) -> Judge {
    Judge { exists_in: Some((MEMBERS, foreign)), ..Judge::default() }
}

fn members(bench: &Bench) -> Collection<Document> {
    bench.database.collection(MEMBERS)
}

fn source(bench: &Bench) -> Collection<Document> {
    bench.database.collection(SOURCE)
}

async fn keep_images(bench: &Bench) {
    let command = doc! {"collMod": MEMBERS, "changeStreamPreAndPostImages": {"enabled": true}};
    bench.database.run_command(command).await.expect("changed");
}

/// Documents that ask for members of every kind.
fn asking() -> Vec<Document> {
    let asked: Vec<Bson> = vec![
        1.into(),
        1_i64.into(),
        1.0.into(),
        "1".into(),
        2.into(),
        99.into(),
        Bson::Null,
        Bson::Array(vec![]),
        vec![99, 1].into(),
        vec![99, 98].into(),
        vec![Bson::Null, 1.into()].into(),
        doc! {"a": 1}.into(),
        doc! {"a": 2}.into(),
        "abc".into(),
        "ABC".into(),
    ];
    let mut documents: Vec<Document> =
        (0..).zip(asked).map(|(id, member)| doc! {"_id": id, "member": member}).collect();
    documents.push(doc! {"_id": "missing"});
    documents
}

#[tokio::test]
async fn documents_that_nobody_knows_are_left_behind_and_counted() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, asking()).await;
    let known = [
        doc! {"_id": 1, "n": 1},
        doc! {"_id": "abc", "n": "abc"},
        doc! {"_id": doc! {"a": 1}, "n": {"a": 1}},
    ];
    bench.insert_into(MEMBERS, known).await;
    // They have no value: nobody is known by that.
    bench.insert_into(MEMBERS, [doc! {"_id": "none"}, doc! {"_id": "null", "n": Bson::Null}]).await;
    keep_images(&bench).await;
    for (foreign, target) in [("_id", "by_id"), ("n", "by_n")] {
        configure(&bench, &rule(&bench, foreign));
        let expected = judge(foreign).expected(&bench).await;
        assert_eq!(expected.len(), 6);
        let dry = bench.run(&format!("cleanse --dry-run --to {target}")).await.expect_exit(0);
        let strangers = asking().len() - expected.len();
        assert_eq!(dry.json["documents"]["rejected_by"], json!({"a $ stranger.": strangers}));
        assert_eq!(dry.json["samples"]["a $ stranger."].as_array().map(Vec::len), Some(5));
        let run = bench.run(&format!("cleanse --count-rules --to {target}")).await.expect_exit(0);
        assert_eq!(run.json["documents"]["rejected_by"], dry.json["documents"]["rejected_by"]);
        assert_same(&bytes(&bench, target).await, &expected);
        for check in ["--counts", "--sample 100", "--full"] {
            bench.run(&format!("verify {check} --to {target}")).await.expect_exit(0);
        }
        bench
            .database
            .collection::<Document>(target)
            .insert_one(doc! {"_id": 5, "member": 99})
            .await
            .expect("inserted");
        bench.run(&format!("verify --full --to {target} --settle 100ms")).await.expect_exit(1);
    }
}

#[tokio::test]
async fn rules_count_in_their_order_and_the_first_hit_counts() {
    let bench = Bench::new().await;
    bench
        .insert_into(
            SOURCE,
            (0..60)
                .map(|n| doc! {"_id": n, "n": n, "member": n % 4, "other": n % 5, "team": n / 10, "at": n}),
        )
        .await;
    bench.insert_into(MEMBERS, [0, 1, 2].map(|id| doc! {"_id": id})).await;
    bench.insert_into("others", [0, 1].map(|id| doc! {"_id": id})).await;
    let (members, others) = (bench.namespace(MEMBERS), bench.namespace("others"));
    let rules = format!(
        "keep = '{{\"n\": {{\"$gte\": 6}}}}'
reject = [{{ name = 'seventh', when = '{{\"n\": {{\"$mod\": [7, 0]}}}}' }}]
exists_in = [
  {{ name = 'no member', collection = '{members}', local = 'member', foreign = '_id' }},
  {{ name = 'no other', collection = '{others}', local = 'other', foreign = '_id' }},
]
dedupe = {{ by = ['team'], keep_latest = 'at' }}"
    );
    configure(&bench, &rules);
    let keep = |n: &i32| *n >= 6;
    let seventh = |n: &i32| n % 7 == 0;
    let (member, other) = (|n: &i32| n % 4 < 3, |n: &i32| n % 5 < 2);
    let passing: Vec<i32> = (0..60).filter(|n| keep(n) && !seventh(n) && member(n) && other(n)).collect();
    let winners: Vec<i32> =
        (0..6).filter_map(|team| passing.iter().filter(|n| **n / 10 == team).max().copied()).collect();
    let count = |hit: &dyn Fn(&i32) -> bool| (0..60).filter(|n| hit(n)).count();
    let expected = json!({
        "keep": 6,
        "seventh": count(&|n| keep(n) && seventh(n)),
        "no member": count(&|n| keep(n) && !seventh(n) && !member(n)),
        "no other": count(&|n| keep(n) && !seventh(n) && member(n) && !other(n)),
        "dedupe": passing.len() - winners.len(),
    });
    let dry = bench.run("cleanse --dry-run").await.expect_exit(0);
    assert_eq!(dry.json["documents"]["rejected_by"], expected);
    let run = bench.run("cleanse --count-rules").await.expect_exit(0);
    assert_eq!(run.json["documents"]["rejected_by"], expected);
    let copied: Vec<i32> = bench
        .documents(TARGET)
        .await
        .iter()
        .map(|document| document.get_i32("_id").expect("a number"))
        .collect();
    assert_eq!(copied, winners);
}

#[tokio::test]
async fn known_documents_are_copied_byte_for_byte() {
    let bench = Bench::new().await;
    let with = |mut document: Document| {
        document.insert("member", 1);
        document
    };
    bench.insert_into(SOURCE, (0..).zip(ids(300)).map(|(number, id)| with(every_type(id, number)))).await;
    let delicate = delicate().into_iter().map(|mut document| {
        document.append(bson::cstr!("member"), 1);
        document.append(bson::cstr!("d"), bson::rawdoc! {"m": []});
        document.append(bson::cstr!("m"), 1);
        document
    });
    insert_raw(&bench, SOURCE, delicate.collect()).await;
    bench.insert_into(MEMBERS, [doc! {"_id": 1}]).await;
    let dedupe = "dedupe = { by = ['no.such.field'], keep_latest = 'at' }";
    configure(&bench, &format!("{}\n{dedupe}", rule(&bench, "_id")));
    bench.run("cleanse").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
    source(&bench).update_many(doc! {}, doc! {"$set": {"touched": true}}).await.expect("written");
    bench.run("cleanse").await.expect_exit(0);
    assert_same(&bytes(&bench, TARGET).await, &bytes(&bench, SOURCE).await);
    bench.run("verify --full").await.expect_exit(0);
}

#[tokio::test]
async fn members_that_come_and_go_bring_and_take_their_documents() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..3000).map(|id| doc! {"_id": id, "member": id % 100})).await;
    bench.insert_into(MEMBERS, (0..50).map(|id| doc! {"_id": id})).await;
    configure(&bench, &rule(&bench, "_id"));
    bench.run("cleanse").await.expect_exit(0);
    judge("_id").expect_target(&bench).await;

    members(&bench).delete_many(doc! {"_id": {"$lt": 10}}).await.expect("deleted");
    bench.insert_into(MEMBERS, (60..70).map(|id| doc! {"_id": id})).await;
    members(&bench).delete_one(doc! {"_id": 20}).await.expect("deleted");
    bench.insert_into(MEMBERS, [doc! {"_id": 20.0}]).await;
    source(&bench).update_one(doc! {"_id": 3}, doc! {"$set": {"member": 65}}).await.expect("written");
    source(&bench).update_one(doc! {"_id": 30}, doc! {"$set": {"member": 5}}).await.expect("written");
    bench.run("cleanse").await.expect_exit(0);
    judge("_id").expect_target(&bench).await;
    bench.run("verify --full --counts").await.expect_exit(0);
}

#[tokio::test]
async fn a_value_that_a_member_gave_up_takes_its_documents_along() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..200).map(|id| doc! {"_id": id, "member": id % 20})).await;
    bench.insert_into(MEMBERS, (0..10).map(|id| doc! {"_id": format!("m{id}"), "n": id})).await;
    bench.insert_into(MEMBERS, [doc! {"_id": "list", "n": [12, 13]}]).await;
    keep_images(&bench).await;
    configure(&bench, &rule(&bench, "n"));
    bench.run("cleanse").await.expect_exit(0);
    judge("n").expect_target(&bench).await;

    let set = async |id: &str, n: Bson| {
        members(&bench).update_one(doc! {"_id": id}, doc! {"$set": {"n": n}}).await.expect("written");
    };
    set("m0", 15.into()).await;
    // From one to the next, and on.
    set("m1", 16.into()).await;
    set("m1", 17.into()).await;
    // Another one still has it.
    set("m2", 3.into()).await;
    set("m3", 18.into()).await;
    members(&bench).delete_one(doc! {"_id": "m4"}).await.expect("deleted");
    members(&bench).replace_one(doc! {"_id": "m5"}, doc! {"x": 1}).await.expect("written");
    members(&bench).update_one(doc! {"_id": "list"}, doc! {"$pull": {"n": 13}}).await.expect("written");
    bench.insert_into(MEMBERS, [doc! {"_id": "new", "n": 19}]).await;
    bench.run("cleanse").await.expect_exit(0);
    judge("n").expect_target(&bench).await;
}

#[tokio::test]
async fn members_that_come_and_go_during_the_copy_are_not_lost() {
    for foreign in ["_id", "n"] {
        let bench = Bench::new().await;
        bench.insert_into(SOURCE, (0..600).map(|id| doc! {"_id": id, "member": id % 60})).await;
        bench.insert_into(MEMBERS, (0..40).map(|id| doc! {"_id": id, "n": id})).await;
        keep_images(&bench).await;
        configure(&bench, &rule(&bench, foreign));
        let inserts = FailPoint::reserve("hangDuringBatchInsert");
        let data =
            doc! {"nss": next_namespace(&bench, "cleanse", TARGET).await, "shouldCheckForInterrupt": true};
        let before = inserts.set(&bench, "alwaysOn", data).await;
        let mut run = bench.program("cleanse --parallel 1").spawn();
        wait_for("the copy", async || {
            assert!(run.is_running(), "{}", run.stderr());
            bench
                .job(&job_name(&bench))
                .await
                .is_some_and(|job| job.get_str("phase").is_ok_and(|phase| phase == "copy"))
        })
        .await;
        inserts.wait_until_entered(&bench, before + 1).await;
        members(&bench).delete_many(doc! {"_id": {"$in": [1, 2, 38, 39]}}).await.expect("deleted");
        bench.insert_into(MEMBERS, [50, 51].map(|id| doc! {"_id": id, "n": id})).await;
        members(&bench)
            .update_many(doc! {"n": {"$in": [5, 6]}}, doc! {"$inc": {"n": 47}})
            .await
            .expect("written");
        // What was seen is durable: another run works it off.
        let notes: Collection<Document> = bench.state.collection("members");
        wait_for("the members to be noted", async || {
            notes.count_documents(doc! {}).await.expect("a count") >= 6
        })
        .await;
        run.kill();
        inserts.off(&bench).await;
        bench.run("cleanse").await.expect_exit(0);
        judge(foreign).expect_target(&bench).await;
        assert_eq!(notes.count_documents(doc! {}).await.expect("a count"), 0);
    }
}

#[tokio::test]
async fn what_can_not_be_followed_is_refused_before_anything_is_touched() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, asking()).await;
    // There is no such collection.
    configure(&bench, &rule(&bench, "_id"));
    for command in ["cleanse", "cleanse --dry-run", "verify --counts"] {
        bench.run(command).await.expect_exit(3);
    }
    bench.insert_into(MEMBERS, [doc! {"_id": 1, "n": 1}]).await;
    // It does not tell what a member was before.
    configure(&bench, &rule(&bench, "n"));
    let refused = bench.run("cleanse").await.expect_exit(3);
    assert!(
        refused.json["error"]["hint"].to_string().contains("changeStreamPreAndPostImages"),
        "{}",
        refused.stdout
    );
    // A dry run is not kinder, but shows what it has found.
    let dry = bench.run("cleanse --dry-run").await.expect_exit(3);
    assert_eq!(dry.number("/documents/source"), asking().len() as u64, "{}", dry.stdout);
    assert!(dry.json["plan"]["warnings"].to_string().contains("would be refused"), "{}", dry.stdout);
    // It is in another database, or the target.
    configure(&bench, &rule(&bench, "_id").replace(bench.database.name(), "elsewhere"));
    let refused = bench.run("cleanse").await.expect_exit(2);
    assert!(refused.text("/error/message").contains("another database"), "{}", refused.stdout);
    assert!(refused.text("/error/message").contains("mongorekey.toml:"), "{}", refused.stdout);
    configure(&bench, &rule(&bench, "_id"));
    bench.run(&format!("cleanse --to {MEMBERS}")).await.expect_exit(2);
    bench
        .database
        .run_command(doc! {"create": "view", "viewOn": MEMBERS, "pipeline": []})
        .await
        .expect("created");
    bench
        .database
        .run_command(doc! {"create": "capped", "capped": true, "size": 4096})
        .await
        .expect("created");
    for other in ["view", "capped"] {
        configure(&bench, &rule(&bench, "_id").replace(".members'", &format!(".{other}'")));
        bench.run("cleanse").await.expect_exit(3);
    }
    assert!(!bench.has_state().await);
}

#[tokio::test]
async fn joins_that_would_take_days_are_refused() {
    let bench = Bench::new().await;
    bench.insert_into(SOURCE, (0..100_001).map(|id| doc! {"_id": id, "member": id % 200})).await;
    bench.insert_into(MEMBERS, (0..150).map(|id| doc! {"_id": id, "n": id})).await;
    keep_images(&bench).await;
    configure(&bench, &rule(&bench, "n"));
    let refused = |run: crate::program::Finished, collection: &str| {
        let run = run.expect_exit(3);
        let hint = run.json["error"]["hint"].to_string();
        assert!(hint.contains("createIndex") && hint.contains(collection), "{hint}");
    };
    refused(bench.run("cleanse --dry-run").await, MEMBERS);
    let index = |field: &str| IndexModel::builder().keys(doc! {field: 1}).build();
    members(&bench).create_index(index("n")).await.expect("an index");
    refused(bench.run("cleanse --dry-run").await, SOURCE);
    refused(bench.run("cleanse").await, SOURCE);
    assert!(!bench.has_state().await);
    source(&bench).create_index(index("member")).await.expect("an index");
    let run = bench.run("cleanse").await.expect_exit(0);
    let expected = (0..100_001).filter(|id| id % 200 < 150).count();
    assert_eq!(run.number("/documents/copied"), u64::try_from(expected).expect("small"));
}

#[tokio::test]
async fn members_that_are_dropped_or_renamed_end_the_run_with_the_state_kept() {
    for command in ["drop", "rename", "replace"] {
        let bench = Bench::new().await;
        bench.insert_into(SOURCE, asking()).await;
        bench.insert_into(MEMBERS, [doc! {"_id": 1}]).await;
        bench.insert_into("others", [doc! {"_id": 2}]).await;
        configure(&bench, &rule(&bench, "_id"));
        let run = bench.program("cleanse --follow").spawn();
        wait_for("the copy", async || run.stderr().contains("follows")).await;
        // What happens to others is nothing to us.
        bench.database.create_collection("elsewhere").await.expect("created");
        bench.database.collection::<Document>("elsewhere").drop().await.expect("dropped");
        let (from, to) = if command == "rename" { (MEMBERS, "gone") } else { ("others", MEMBERS) };
        if command == "drop" {
            members(&bench).drop().await.expect("dropped");
        } else {
            let rename = doc! {"renameCollection": bench.namespace(from), "to": bench.namespace(to), "dropTarget": true};
            bench.admin().run_command(rename).await.expect("renamed");
        }
        let ended = run.finish().await.expect_exit(4);
        let event = if command == "drop" { "drop" } else { "rename" };
        assert!(ended.text("/error/message").contains(event), "{}", ended.stdout);
    }
}

/// A member that tells every second that it lives must not have all its documents written anew.
#[tokio::test]
async fn a_change_of_a_member_that_leaves_its_value_alone_writes_nothing() {
    for foreign in ["_id", "n"] {
        let bench = Bench::new().await;
        bench.insert_into(SOURCE, (0..2_000).map(|id| doc! {"_id": id, "member": 1})).await;
        bench.insert_into(MEMBERS, [doc! {"_id": 1, "n": 1, "name": "a"}]).await;
        keep_images(&bench).await;
        configure(&bench, &rule(&bench, foreign));
        bench.run("cleanse").await.expect_exit(0);
        for round in 0..5 {
            let alive = doc! {"$set": {"lastLogin": round}, "$unset": {"name": 1}};
            members(&bench).update_one(doc! {"_id": 1}, alive).await.expect("written");
            members(&bench)
                .replace_one(doc! {"_id": 1}, doc! {"round": round, "n": 1})
                .await
                .expect("written");
        }
        let run = bench.run("cleanse").await.expect_exit(0);
        assert_eq!(run.number("/followed/written"), 0, "{foreign}: {}", run.output());
        judge(foreign).expect_target(&bench).await;
    }
}

/// Changes documents and members all the time, of those that are asked for the first half only; each
/// member has a tenth of a thousand documents.
async fn write_all_the_time(source: Collection<Document>, members: Collection<Document>, foreign: &str) {
    for round in 0_i32.. {
        let member = round % 5;
        if round % 3 == 0 {
            let by_id = doc! {"_id": member};
            if foreign == "n" && round % 2 == 0 {
                members.update_one(by_id, doc! {"$mul": {"n": -1}}).await.expect("a write");
            } else if members.delete_one(by_id).await.expect("a write").deleted_count == 0 {
                members.insert_one(doc! {"_id": member, "n": member}).await.expect("a write");
            }
        } else {
            let change = doc! {"$set": {"member": member, "round": round}};
            source.update_one(doc! {"_id": round * 7 % 500}, change).await.expect("a write");
        }
        tokio::time::sleep(std::time::Duration::from_millis(8)).await;
    }
}

#[tokio::test]
async fn counts_beside_a_follower_leave_out_whose_member_moved_and_find_what_is_lost() {
    for foreign in ["_id", "n"] {
        let bench = Bench::new().await;
        bench
            .insert_into(SOURCE, (0..1_000).map(|id| doc! {"_id": id, "member": id / 500 * 5 + id % 5}))
            .await;
        bench.insert_into(MEMBERS, (0..10).map(|id| doc! {"_id": id, "n": id})).await;
        keep_images(&bench).await;
        configure(&bench, &rule(&bench, foreign));
        let mut follower = bench.program("cleanse --follow").spawn();
        wait_for("the follower", async || follower.stderr().contains("follows")).await;
        let writes = tokio::spawn(write_all_the_time(source(&bench), members(&bench), foreign));
        for _ in 0..6 {
            let run = bench.run("verify --counts --settle 5s").await.expect_exit(0);
            let expected = run.number("/checks/0/expected");
            assert!(expected >= 450, "too little was compared: {}", run.stdout);
        }
        let target: Collection<Document> = bench.database.collection(TARGET);
        target.delete_one(doc! {"_id": 700}).await.expect("a loss");
        bench.run("verify --counts --settle 3s").await.expect_exit(1);
        writes.abort();
        assert!(follower.is_running(), "{}", follower.stderr());
        follower.kill();
    }
}
