//! Seeds `app.users` the way a collection looks after some years of real use: `_id`s of six types,
//! legacy keys as text and as numbers, many documents per key, keys already filled, explicit nulls,
//! documents without a key, and garbage that an upsert bug left behind.
//!
//! The same `--count` and `--seed` always give the same documents.

#![expect(clippy::print_stdout, clippy::disallowed_methods, reason = "a program of its own")]

use std::error::Error;
use std::time::Instant;

use clap::Parser;
use mongodb::bson::oid::ObjectId;
use mongodb::bson::{Bson, DateTime, Document, Uuid, doc};
use mongodb::options::IndexOptions;
use mongodb::{Client, Collection, IndexModel};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinSet;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Documents per insert command: enough to make the round trip cheap.
const BATCH: usize = 5_000;
/// Inserts on their way while the next batch is made.
const INSERTS_IN_FLIGHT: usize = 3;
/// 2019-01-01T00:00:00Z, when the first user joined.
const FIRST_DAY: i64 = 1_546_300_800_000;
const DAY: i64 = 86_400_000;
/// The users joined over five years, however many they are.
const JOINING_TIME: i64 = 5 * 365 * DAY;

const FAMILY_NAMES: [&str; 10] = ["김", "이", "박", "최", "정", "강", "조", "윤", "한", "황보"];
const GIVEN_NAMES: [&str; 10] =
    ["서준", "하윤", "도윤", "지우", "민준", "서연", "예은", "지훈", "가람", "별"];
const FOREIGN_NAMES: [&str; 8] = [
    "Ana María Núñez",
    "John O'Brien",
    "Łukasz Żak",
    "Nguyễn Văn An",
    "山田 太郎",
    "Мария Иванова",
    "Zoë Müller",
    "محمد علي",
];
const PLACES: [(&str, &str); 6] = [
    ("KR", "서울특별시"),
    ("KR", "부산광역시"),
    ("KR", "제주시"),
    ("JP", "東京"),
    ("US", "New York"),
    ("DE", "Köln"),
];
const TAGS: [&str; 5] = ["newsletter", "vip", "뉴스", "mobile", "imported-2021"];

/// Seed `app.users` with documents to rehearse on
#[derive(Parser)]
struct Options {
    /// Connection string of the replica set
    #[arg(long, env = "MONGODB_URI")]
    uri: String,
    /// How many documents to make
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(i32).range(1..))]
    count: i32,
    /// Number that all documents are derived from
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Drop `app.users` first, if it is there
    #[arg(long)]
    drop: bool,
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let options = Options::parse();
    let started = Instant::now();
    let users = Client::with_uri_str(&options.uri).await?.database("app").collection("users");
    if options.drop {
        users.drop().await?;
    }
    if users.find_one(doc! {}).await?.is_some() {
        return Err("app.users is not empty; --drop drops it first".into());
    }
    insert(&users, &mut UserMaker::new(options.count, options.seed)).await?;
    users.create_indexes(indexes()).await?;
    println!(
        "app.users: {} documents in {:.1} s (seed {})",
        users.estimated_document_count().await?,
        started.elapsed().as_secs_f64(),
        options.seed
    );
    Ok(())
}

async fn insert(users: &Collection<Document>, maker: &mut UserMaker) -> Outcome<()> {
    let mut inserts = JoinSet::new();
    for first in (0..maker.count).step_by(BATCH) {
        let batch: Vec<_> = (first..maker.count).take(BATCH).map(|number| maker.document(number)).collect();
        if inserts.len() == INSERTS_IN_FLIGHT {
            finish_one(&mut inserts).await?;
        }
        let users = users.clone();
        inserts.spawn(async move { users.insert_many(batch).ordered(false).await.map(drop) });
    }
    while !inserts.is_empty() {
        finish_one(&mut inserts).await?;
    }
    Ok(())
}

async fn finish_one(inserts: &mut JoinSet<mongodb::error::Result<()>>) -> Outcome<()> {
    if let Some(insert) = inserts.join_next().await {
        insert??;
    }
    Ok(())
}

/// What a system of some age has: an index for a screen, and a unique one that tolerates gaps.
fn indexes() -> [IndexModel; 2] {
    let place = doc! { "profile.address.country": 1, "joinedAt": -1 };
    let unique_where_present = IndexOptions::builder()
        .unique(true)
        .partial_filter_expression(doc! { "email": { "$type": "string" } })
        .build();
    [
        IndexModel::builder().keys(place).build(),
        IndexModel::builder().keys(doc! { "email": 1 }).options(unique_where_present).build(),
    ]
}

/// Makes the documents one after the other, all from one stream of random numbers.
struct UserMaker {
    random: StdRng,
    count: i32,
    distinct_keys: i32,
}

impl UserMaker {
    fn new(count: i32, seed: u64) -> Self {
        // About three documents per legacy key, as when one person has several accounts.
        Self { random: StdRng::seed_from_u64(seed), count, distinct_keys: (count / 3).max(1) }
    }

    /// Each kind is drawn, never laid out in a run, so that all kinds are spread evenly over the
    /// `_id`s: a real run of documents without a key would rightly stop a backfill.
    fn document(&mut self, number: i32) -> Document {
        let joined = FIRST_DAY + JOINING_TIME / i64::from(self.count) * i64::from(number);
        let updated = DateTime::from_millis(joined + self.random.random_range(0..365 * DAY));
        let id = self.id(number, joined);
        match self.percent() {
            0..2 => doc! { "_id": id, "updatedAt": updated },
            2..4 => doc! { "_id": id, "lastSeen": updated },
            _ => self.user(id, number, DateTime::from_millis(joined), updated),
        }
    }

    /// Unique in every type because `number` is in it.
    fn id(&mut self, number: i32, joined: i64) -> Bson {
        match self.percent() {
            0..3 => number.into(),
            3..6 => (5_000_000_000 + i64::from(number)).into(),
            6..9 => format!("user:{number:08}").into(),
            9..11 => doc! { "region": self.pick(&["kr", "jp", "us"]), "number": number }.into(),
            11..14 => self.uuid(number).into(),
            _ => self.object_id(number, joined).into(),
        }
    }

    fn user(&mut self, id: Bson, number: i32, joined: DateTime, updated: DateTime) -> Document {
        let mut user = doc! { "_id": id, "name": self.name() };
        self.add_keys(&mut user);
        if self.percent() < 80 {
            user.insert("email", format!("user{number}@example.com"));
        }
        let status = match self.percent() {
            0..85 => "active",
            85..95 => "dormant",
            _ => "withdrawn",
        };
        user.extend(doc! {
            "status": status,
            "profile": self.profile(),
            "visits": self.random.random_range(0..2_000),
            "joinedAt": joined,
            "updatedAt": updated,
        });
        user
    }

    /// One in ten has its new key already, three in a hundred have no usable legacy key.
    fn add_keys(&mut self, user: &mut Document) {
        let legacy = match self.percent() {
            0 => None,
            1 => Some(Bson::Null),
            2 => Some(Bson::String(String::new())),
            _ => Some(self.legacy_key()),
        };
        user.extend(legacy.map(|key| ("legacyKey".to_owned(), key)));
        match self.percent() {
            0..10 => drop(user.insert("newKey", format!("N-{:016X}", self.random.random::<u64>()))),
            10..30 => drop(user.insert("newKey", Bson::Null)),
            _ => {}
        }
    }

    /// Most keys are text; some are numbers, which were stored in whatever type a program had; a
    /// few have characters that must be encoded in a path.
    fn legacy_key(&mut self) -> Bson {
        let key = self.random.random_range(0..self.distinct_keys);
        let number = 4_000_000 + key;
        match key % 20 {
            0 => odd_key(key).into(),
            1..4 => (9_000_000_000 + i64::from(key)).into(),
            4..8 => match self.percent() {
                0..70 => number.into(),
                70..85 => i64::from(number).into(),
                85..95 => f64::from(number).into(),
                _ => number.to_string().into(),
            },
            _ => format!("MBR-{key:07}").into(),
        }
    }

    fn name(&mut self) -> String {
        if self.percent() < 70 {
            return format!("{}{}", self.pick(&FAMILY_NAMES), self.pick(&GIVEN_NAMES));
        }
        self.pick(&FOREIGN_NAMES).to_owned()
    }

    fn profile(&mut self) -> Document {
        let (country, city) = self.pick(&PLACES);
        let mut profile = doc! {
            "birthDate": DateTime::from_millis(self.random.random_range(-10_000 * DAY..14_000 * DAY)),
            "address": { "country": country, "city": city },
        };
        if self.percent() < 60 {
            profile.insert("tags", [self.pick(&TAGS), self.pick(&TAGS)].map(Bson::from).to_vec());
        }
        profile
    }

    /// As a driver makes it: time, machine, counter.
    fn object_id(&mut self, number: i32, joined: i64) -> ObjectId {
        let seconds = u32::try_from(joined / 1_000).unwrap_or(u32::MAX).to_be_bytes();
        let machine = self.pick(&[*b"\x5f\x1a\x90\xc3\x07", *b"\x83\xee\x21\x4b\xd8"]);
        let counter = &number.to_be_bytes()[1..];
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&seconds);
        bytes[4..9].copy_from_slice(&machine);
        bytes[9..].copy_from_slice(counter);
        ObjectId::from_bytes(bytes)
    }

    /// Random as version 4 is, but for the last four bytes, which make it unique.
    fn uuid(&mut self, number: i32) -> Uuid {
        let mut bytes: [u8; 16] = self.random.random();
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        bytes[12..].copy_from_slice(&number.to_be_bytes());
        Uuid::from_bytes(bytes)
    }

    fn percent(&mut self) -> u8 {
        self.random.random_range(0..100)
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.random.random_range(0..choices.len())]
    }
}

fn odd_key(key: i32) -> String {
    match key / 20 % 6 {
        0 => format!("Seoul Branch {key}"),
        1 => format!("2019/07/{key}"),
        2 => format!("회원-{key}"),
        3 => format!("50%-{key}?"),
        4 => format!("a+b&c=#{key}"),
        _ => format!("\u{2b50}{key}"),
    }
}
