//! Documents of every kind that the server stores pass through everything that a cleanse writes
//! and compares, byte for byte: fields that stand twice, texts that are not UTF-8, in `_id`s too.

use std::collections::BTreeMap;

use bson::{Document, RawArrayBuf, RawBson, RawDocument, RawDocumentBuf, Timestamp, doc, rawdoc};
use mongorekey::mongo::exact;
use mongorekey::mongo::quarantine::{Read, read};

use crate::cleansing::{Bytes, SOURCE, TARGET, assert_same, bytes, configure};
use crate::harness::{Bench, Random};
use crate::program::Signal;
use crate::quarantine::{COMMAND, QUARANTINE};
use crate::quarantine_restore::{INTO, restore};
use crate::soak::{random, rounds};

const DOCUMENTS: usize = 120;
const CHANGES: usize = 150;
const REPAIR: &str = "verify --full --repair --yes --settle 1ms";

/// A text as a value, whatever its bytes.
fn text(bytes: &[u8]) -> RawBson {
    let mut document = i32::try_from(bytes.len() + 12).expect("small").to_le_bytes().to_vec();
    document.extend([0x02, 0]);
    document.extend(i32::try_from(bytes.len() + 1).expect("small").to_le_bytes());
    document.extend(bytes);
    document.extend([0, 0]);
    exact::from_bytes(&document).expect("a value")
}

fn array(items: &[RawBson]) -> RawBson {
    let mut document = RawDocumentBuf::new();
    for (number, item) in items.iter().enumerate() {
        exact::append(&mut document, &number.to_string(), item.as_raw_bson_ref());
    }
    let mut bytes = rawdoc! {"": document}.into_bytes();
    bytes[4] = 0x04;
    exact::from_bytes(&bytes).expect("an array")
}

fn value(random: &mut Random, depth: usize) -> RawBson {
    match random.below(if depth == 0 { 9 } else { 13 }) {
        0 => 1.into(),
        1 => RawBson::Int64(-7),
        2 => RawBson::Double([-0.0, f64::NAN, 1.0][random.below(3)]),
        3 => RawBson::Timestamp(Timestamp { time: 0, increment: 0 }),
        4 => text(b"caf\xe9"),
        5 => text("값".as_bytes()),
        6 => RawBson::Null,
        7 => RawBson::Undefined,
        8 => RawBson::Boolean(true),
        9 | 10 => fields(random, RawDocumentBuf::new(), depth - 1).into(),
        _ => {
            let items: Vec<RawBson> = (0..random.below(4)).map(|_| value(random, depth - 1)).collect();
            array(&items)
        }
    }
}

/// Adds fields, of which some stand there twice.
fn fields(random: &mut Random, mut document: RawDocumentBuf, depth: usize) -> RawDocumentBuf {
    const NAMES: [&str; 8] = ["a", "a", "b", "x.y", "$d", "", "0", "ü"];
    for _ in 0..random.below(7) {
        let (name, value) = (NAMES[random.below(NAMES.len())], value(random, depth));
        exact::append(&mut document, name, value.as_raw_bson_ref());
    }
    document
}

/// One of a few `_id`s: of each kind some that are equal under a collation.
fn id(random: &mut Random) -> RawBson {
    let number = random.below(30);
    match random.below(7) {
        0 => i32::try_from(number).expect("small").into(),
        1 => RawBson::Double(100.0 + f64::from(u32::try_from(number).expect("small"))),
        2 => text(format!("a{number}").as_bytes()),
        3 => text(format!("A{number}").as_bytes()),
        4 => text(&[b"x\xff", number.to_string().as_bytes()].concat()),
        5 => exact::single("n", text(&[b"y\xfe", number.to_string().as_bytes()].concat()).as_raw_bson_ref())
            .into(),
        _ => {
            let mut twice = rawdoc! {"d": i32::try_from(number).expect("small")};
            twice.append(bson::cstr!("d"), 2);
            twice.into()
        }
    }
}

/// Large enough that the server would rather compute differences.
fn document(random: &mut Random, id: &RawBson) -> RawDocumentBuf {
    let mut document = exact::single("_id", id.as_raw_bson_ref());
    document.append(bson::cstr!("valid"), random.below(4) > 0);
    document.append(bson::cstr!("pad"), "x".repeat(random.below(2) * 300).as_str());
    fields(random, document, 2)
}

async fn command(bench: &Bench, command: RawDocumentBuf) {
    let reply = exact::answered(bench.database.run_raw_command(command).await).expect("the server lives");
    assert!(!reply.contains_key("writeErrors"), "{reply}");
}

async fn update(bench: &Bench, collection: &str, statement: RawDocumentBuf) {
    let updates = RawArrayBuf::from_iter([statement]);
    command(bench, rawdoc! {"update": collection, "updates": updates}).await;
}

async fn delete(bench: &Bench, collection: &str, id: &RawBson) {
    let deletes = RawArrayBuf::from_iter([rawdoc! {"q": {"_id": exact::equal(id)}, "limit": 1}]);
    command(bench, rawdoc! {"delete": collection, "deletes": deletes}).await;
}

/// Stores a document as it is in place of an equal one.
async fn store(bench: &Bench, collection: &str, document: &RawDocument) {
    let id = exact::id_of(document).expect("an _id");
    delete(bench, collection, &id).await;
    let stages = RawArrayBuf::from_iter([rawdoc! {"$replaceWith": {"$literal": document.to_owned()}}]);
    let nothing = rawdoc! {"_id": exact::equal(&id), "$nor": [{}]};
    update(bench, collection, rawdoc! {"q": nothing, "u": stages, "upsert": true}).await;
}

/// What an application does.
async fn change(bench: &Bench, collection: &str, random: &mut Random) {
    let id = id(random);
    let operators = match random.below(6) {
        0 => return delete(bench, collection, &id).await,
        1 => rawdoc! {"$unset": {"a": 1}},
        2 => rawdoc! {"$set": {"pad": "short"}},
        3 => rawdoc! {"$set": {"valid": random.below(2) > 0}},
        _ => return store(bench, collection, &document(random, &id)).await,
    };
    update(bench, collection, rawdoc! {"q": {"_id": exact::equal(&id)}, "u": operators}).await;
}

/// The documents of the source that should be in the target, and those that should not.
async fn sorted(bench: &Bench) -> (Bytes, Bytes) {
    bytes(bench, SOURCE).await.into_iter().partition(|(_, bytes)| {
        RawDocument::from_bytes(bytes).expect("BSON").get_bool("valid").expect("told")
    })
}

async fn expect_in_step(bench: &Bench) {
    let (kept, rejected) = sorted(bench).await;
    assert_same(&bytes(bench, TARGET).await, &kept);
    let quarantined = bytes(bench, QUARANTINE).await.into_iter().map(|(id, bytes)| {
        let stored = RawDocumentBuf::from_bytes(bytes).expect("BSON");
        let Ok(Read::Whole(document)) = read(&stored) else { panic!("in parts: {stored:?}") };
        (id, document.as_bytes().to_vec())
    });
    assert_same(&quarantined.collect::<BTreeMap<_, _>>(), &rejected);
}

async fn source(collation: &Document, random: &mut Random) -> Bench {
    let bench = Bench::new().await;
    configure(&bench, "keep = '{\"valid\": true}'");
    for collection in [SOURCE, INTO] {
        let mut create = doc! {"create": collection};
        if !collation.is_empty() {
            create.insert("collation", collation.clone());
        }
        bench.database.run_command(create).await.expect("a collection");
    }
    for _ in 0..DOCUMENTS {
        let id = id(random);
        store(&bench, SOURCE, &document(random, &id)).await;
    }
    bench
}

fn collations() -> [Document; 2] {
    [doc! {}, doc! {"locale": "en", "strength": 2}]
}

#[tokio::test]
async fn random_documents_of_every_kind_survive_copy_and_catch_up() {
    let mut random = random(20_261_201);
    for round in 0..rounds(2) {
        let bench = source(&collations()[round % 2], &mut random).await;
        let copying = bench.program(COMMAND).spawn();
        for _ in 0..CHANGES / 3 {
            change(&bench, SOURCE, &mut random).await;
        }
        copying.finish().await.expect_exit(0);
        bench.run(COMMAND).await.expect_exit(0);
        expect_in_step(&bench).await;
        // What comes while it stands still, and while it follows.
        for _ in 0..CHANGES / 3 {
            change(&bench, SOURCE, &mut random).await;
        }
        let following = bench.program(&format!("{COMMAND} --follow")).spawn();
        for _ in 0..CHANGES / 3 {
            change(&bench, SOURCE, &mut random).await;
        }
        following.signal(Signal::Interrupt);
        following.finish().await.expect_exit(130);
        bench.run(COMMAND).await.expect_exit(0);
        expect_in_step(&bench).await;
        for args in ["--full", "--sample 50"] {
            bench.run(&format!("verify {args} --settle 1ms")).await.expect_exit(0);
        }
    }
}

#[tokio::test]
async fn random_documents_of_every_kind_survive_repair_and_restoration() {
    let mut random = random(20_261_202);
    for round in 0..rounds(2) {
        let bench = source(&collations()[round % 2], &mut random).await;
        bench.run(COMMAND).await.expect_exit(0);
        for _ in 0..CHANGES / 3 {
            change(&bench, TARGET, &mut random).await;
        }
        let found = bench.run("verify --full --settle 1ms").await.expect_exit(1);
        // The number of documents is judged before the repair.
        bench.run(REPAIR).await;
        bench.run("verify --full --settle 1ms").await.expect_exit(0);
        expect_in_step(&bench).await;
        assert!(!found.output().contains("invalid BSON"), "{}", found.output());

        let restored = restore(&bench).await;
        let (_, rejected) = sorted(&bench).await;
        assert_same(&bytes(&bench, INTO).await, &rejected);
        assert_eq!(usize::try_from(restored.restored).expect("small"), rejected.len());
    }
}

#[tokio::test]
async fn random_documents_of_every_kind_survive_dual_writes() {
    let mut random = random(20_261_203);
    for round in 0..rounds(2) {
        let bench = source(&collations()[round % 2], &mut random).await;
        let command = "cleanse --dual-write --grace 50ms";
        bench.run(command).await.expect_exit(0);
        // What the application has missed on one of the sides.
        for _ in 0..CHANGES / 3 {
            change(&bench, SOURCE, &mut random).await;
            change(&bench, TARGET, &mut random).await;
        }
        let mut ids = bytes(&bench, TARGET).await;
        ids.extend(bytes(&bench, SOURCE).await);
        for id in ids.into_keys() {
            // Marks are what it is told by: each document is touched in the source too.
            let id = exact::from_bytes(&id).expect("an _id");
            let touch = rawdoc! {"$set": {"touched": i64::try_from(random.below(1_000_000)).expect("small")}};
            update(&bench, SOURCE, rawdoc! {"q": {"_id": exact::equal(&id)}, "u": touch}).await;
        }
        let repaired = bench.run(command).await.expect_exit(0);
        assert!(repaired.number("/dual_write/repaired") > 10, "{}", repaired.output());
        let (kept, _) = sorted(&bench).await;
        let target = bytes(&bench, TARGET).await;
        let kept_there: Bytes = target.into_iter().filter(|(id, _)| kept.contains_key(id)).collect();
        assert_same(&kept_there, &kept);
    }
}
