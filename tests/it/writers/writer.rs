//! One writer: an application that writes its own documents, one command after the other, and
//! notes what it is told.

use std::collections::BTreeSet;
use std::time::Duration;

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;
use mongodb::options::{ReadConcern, SelectionCriteria};
use mongodb::{ClientSession, Collection, Database};
use tokio::time::{Instant, timeout};

use super::journal::Journal;
use super::operation::{Answer, Change, Kind, document, identity};
use super::reply::{count, error_at, is_certain, is_duplicate_id, is_open, is_upserted};
use super::{Figures, Options};
use crate::harness::Random;
use crate::soak::random;

/// Where a writer makes sure that its earlier commands come no more.
pub(super) const FENCES: &str = "writers_fences";
/// Statements of a bulk command.
const BULK: usize = 20;
/// No command takes this long where anybody is there.
const PATIENCE: Duration = Duration::from_secs(20);
/// A command is sent so often, as drivers do, before the application sees an error.
pub(super) const ATTEMPTS: usize = 2;
/// An application waits so long after an error.
pub(super) const BACK_OFF: Duration = Duration::from_millis(5);

pub struct Writer {
    pub number: i32,
    pub options: Options,
    pub journal: Journal,
    pub figures: Figures,
    pub(super) database: Database,
    pub(super) live: String,
    /// Commands have rising numbers on this session, so that an earlier one that arrives late is refused.
    session: ClientSession,
    transaction: i64,
    pub(super) transactions: ClientSession,
    random: Random,
    next_slot: u64,
    next_fresh: i32,
    /// Documents whose last write has an unknown outcome.
    open: BTreeSet<i32>,
    was_refused: bool,
    /// Since when nothing was acknowledged, while something is wanted.
    pub(super) waiting: Option<Instant>,
}

/// What became of a command.
enum Sent {
    Reply(Document),
    Refused(String),
    Unknown(String),
}

impl Writer {
    pub async fn new(
        number: i32,
        database: Database,
        live: &str,
        options: Options,
        figures: Figures,
    ) -> Self {
        let session = database.client().start_session().await.expect("a session");
        let transactions = database.client().start_session().await.expect("a session");
        Self {
            number,
            journal: Journal::new(options.cutover),
            figures,
            live: live.into(),
            session,
            transaction: 0,
            transactions,
            random: random(options.seed + u64::try_from(number).expect("small")),
            next_slot: 0,
            next_fresh: 2 * options.documents,
            open: BTreeSet::new(),
            was_refused: false,
            waiting: None,
            database,
            options,
        }
    }

    /// Inserts the documents that are there from the beginning on.
    pub async fn seed(&mut self) {
        let numbers: Vec<i32> = (0..self.options.documents)
            .filter(|number| number % self.options.writers == self.number)
            .collect();
        for part in numbers.chunks(1000) {
            let changes = part.iter().map(|number| (*number, self.insert(*number))).collect();
            self.bulk(Kind::Insert, changes).await;
        }
    }

    /// Writes until it is stopped, at that many operations per second.
    pub async fn run(&mut self, rate: f64) {
        let mut next = Instant::now();
        while !self.figures.is_stopped() {
            tokio::time::sleep_until(next).await;
            let written = if self.open.is_empty() { self.step().await } else { self.settle().await };
            // What was missed is made up for, but not for ever.
            let due = next + Duration::from_secs_f64(f64::from(written.max(1)) / rate);
            next = due.max(Instant::now().checked_sub(Duration::from_millis(500)).unwrap_or(due));
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.open.is_empty() {
            assert!(Instant::now() < deadline, "the writers could not read what became of their writes");
            self.settle().await;
        }
    }

    /// One step of the application; returns how many documents it was about.
    async fn step(&mut self) -> u32 {
        match self.random.below(100) {
            0..6 => self.one_absent(Self::insert).await,
            6..20 => self.one(|writer, _| Change::Operators(writer.version())).await,
            20..33 => self.one(|writer, _| Change::Pipeline(writer.version())).await,
            33..43 => self.one(|_, _| Change::Toggle).await,
            43..51 => self.one(|writer, number| writer.replace(number, false)).await,
            51..55 => self.one_absent(|writer, number| writer.replace(number, true)).await,
            55..59 => {
                self.one_absent(|writer, _| Change::OperatorsOrInsert(writer.version(), writer.slot())).await
            }
            59..66 => self.one(|_, _| Change::Delete).await,
            66..72 => self.delete_and_insert().await,
            72..80 => self.bulk_of(Kind::Update).await,
            80..84 => self.bulk_of(Kind::Insert).await,
            84..90 => self.swap().await,
            90..95 => self.mixed_transaction().await,
            95..97 => self.swap_in_steps().await,
            _ => self.look().await,
        }
    }

    async fn one(&mut self, change: impl Fn(&mut Self, i32) -> Change) -> u32 {
        let number = self.present();
        let change = change(self, number);
        self.single(number, change).await;
        1
    }

    async fn one_absent(&mut self, change: impl Fn(&mut Self, i32) -> Change) -> u32 {
        let number = self.any();
        let change = change(self, number);
        self.single(number, change).await;
        1
    }

    async fn delete_and_insert(&mut self) -> u32 {
        let number = self.present();
        self.single(number, Change::Delete).await;
        if self.open.is_empty() {
            let insert = self.insert(number);
            self.single(number, insert).await;
        }
        2
    }

    async fn bulk_of(&mut self, kind: Kind) -> u32 {
        let mut numbers = BTreeSet::new();
        for _ in 0..BULK {
            numbers.insert(if kind == Kind::Insert { self.any() } else { self.present() });
        }
        let changes: Vec<(i32, Change)> = numbers
            .into_iter()
            .map(|number| {
                let change = match (kind, self.random.below(4)) {
                    (Kind::Insert, _) => self.insert(number),
                    (_, 0) => Change::Operators(self.version()),
                    (_, 1) => Change::Pipeline(self.version()),
                    (_, 2) => Change::Toggle,
                    _ => self.replace(number, true),
                };
                (number, change)
            })
            .collect();
        let count = u32::try_from(changes.len()).expect("few");
        self.bulk(kind, changes).await;
        count
    }

    /// Two documents exchange their values under the unique index.
    async fn swap(&mut self) -> u32 {
        let Some(steps) = self.steps_of_a_swap() else { return 1 };
        self.transact(steps, false).await
    }

    /// The same without a transaction, so that everybody can see the steps.
    async fn swap_in_steps(&mut self) -> u32 {
        let Some(steps) = self.steps_of_a_swap() else { return 1 };
        for (number, change) in steps {
            if !self.single(number, change).await {
                break;
            }
        }
        3
    }

    fn steps_of_a_swap(&mut self) -> Option<Vec<(i32, Change)>> {
        let (one, other) = (self.present(), self.present());
        let slot = |number: i32| {
            let slot = self.journal.document(&identity(number))?.get_str("slot").ok()?;
            Some(slot.to_owned())
        };
        let (first, second) = (slot(one)?, slot(other)?);
        let parked = format!("parked by {}", self.number);
        (one != other).then(|| {
            vec![(one, Change::Slot(parked)), (other, Change::Slot(first)), (one, Change::Slot(second))]
        })
    }

    async fn mixed_transaction(&mut self) -> u32 {
        let (one, other) = (self.present(), self.present());
        let fresh = self.next_fresh * self.options.writers + self.number;
        self.next_fresh += 1;
        let mut changes = vec![(fresh, self.insert(fresh)), (one, Change::Operators(self.version()))];
        if one != other {
            changes.push((other, Change::Delete));
        }
        let aborts = self.random.below(5) == 0;
        self.transact(changes, aborts).await
    }

    /// Reads a document of its own: what was acknowledged must be seen.
    async fn look(&mut self) -> u32 {
        let number = self.present();
        let id = identity(number);
        let found =
            self.live().find_one(doc! {"_id": {"$eq": &id}}).read_concern(ReadConcern::majority()).await;
        if let Ok(found) = found {
            self.journal.read(&id, found.as_ref());
        }
        1
    }

    /// Sends one write; whether it was acknowledged.
    async fn single(&mut self, number: i32, change: Change) -> bool {
        self.bulk(change.kind(), vec![(number, change)]).await;
        self.open.is_empty() && !std::mem::take(&mut self.was_refused)
    }

    /// Sends several writes in one command.
    async fn bulk(&mut self, kind: Kind, changes: Vec<(i32, Change)>) {
        self.was_refused = false;
        let statements =
            changes.iter().map(|(number, change)| change.statement(&identity(*number))).collect();
        let (sent, outcome) = (Instant::now(), self.send(kind.command(&self.live, statements)).await);
        match outcome {
            Sent::Reply(reply) => self.note(&changes, &reply, sent),
            Sent::Refused(reason) => self.note_refused(&changes, &reason),
            Sent::Unknown(reason) => self.note_unknown(&changes, &reason),
        }
        if self.was_refused {
            tokio::time::sleep(BACK_OFF).await;
        }
    }

    /// Notes what the server says of each statement.
    fn note(&mut self, changes: &[(i32, Change)], reply: &Document, sent: Instant) {
        let (mut refused, mut matched_or_nothing) = (Vec::new(), Vec::new());
        let mut acknowledged = 0;
        for (index, (number, change)) in changes.iter().enumerate() {
            let id = identity(*number);
            let answer = match (error_at(reply, index), change.kind()) {
                (Some(error), Kind::Insert) if is_duplicate_id(error) => Answer::Duplicate,
                (Some(error), _) => {
                    refused.push((*number, change.clone(), error.to_string()));
                    continue;
                }
                (None, Kind::Insert) => Answer::Inserted,
                (None, _) if is_upserted(reply, index) => Answer::Inserted,
                (None, _) => {
                    matched_or_nothing.push((*number, change.clone()));
                    continue;
                }
            };
            acknowledged += 1;
            self.journal.acknowledged(&id, change, answer, sent);
        }
        acknowledged += matched_or_nothing.len();
        let upserted = reply.get_array("upserted").map_or(0, Vec::len);
        let total = count(reply).saturating_sub(upserted);
        if changes.first().is_some_and(|(_, change)| change.kind() != Kind::Insert) {
            self.note_total(&matched_or_nothing, total, sent);
        }
        self.note_acknowledged(acknowledged);
        for (number, change, reason) in refused {
            self.note_refused(&[(number, change)], &reason);
        }
    }

    /// The server says only how many of several statements found their document.
    fn note_total(&mut self, changes: &[(i32, Change)], total: usize, sent: Instant) {
        let predicted: Vec<Option<Answer>> = changes
            .iter()
            .map(|(number, change)| self.journal.predicted(&identity(*number), change))
            .collect();
        let expected = predicted.iter().filter(|answer| **answer == Some(Answer::Matched)).count();
        let is_predicted = predicted.iter().all(Option::is_some) && expected == total;
        for ((number, change), predicted) in changes.iter().zip(predicted) {
            let id = identity(*number);
            match (predicted, total) {
                (Some(answer), _) if is_predicted => self.journal.acknowledged(&id, change, answer, sent),
                (_, total) if total == changes.len() => {
                    self.journal.acknowledged(&id, change, Answer::Matched, sent);
                }
                (_, 0) => self.journal.acknowledged(&id, change, Answer::Nothing, sent),
                _ => {
                    self.journal.applied(&id, change, sent);
                    self.open.insert(*number);
                }
            }
        }
    }

    pub(super) fn note_acknowledged(&mut self, count: usize) {
        if count > 0 {
            self.figures.acknowledge(count, self.waiting.take().map(|since| since.elapsed()));
        }
    }

    pub(super) fn note_refused(&mut self, changes: &[(i32, Change)], reason: &str) {
        self.figures.refuse();
        self.was_refused = true;
        for (number, change) in changes {
            self.journal.refused(&identity(*number), change, reason);
        }
    }

    pub(super) fn note_unknown(&mut self, changes: &[(i32, Change)], reason: &str) {
        self.figures.lose_sight();
        for (number, change) in changes {
            self.journal.unknown(&identity(*number), change, reason);
            self.open.insert(*number);
        }
    }

    /// Sends a command under a number of its own; sent again, it is executed once.
    async fn send(&mut self, mut command: Document) -> Sent {
        self.transaction += 1;
        self.waiting.get_or_insert_with(Instant::now);
        command.insert("txnNumber", self.transaction);
        command.insert("writeConcern", doc! {"w": "majority"});
        let mut last = String::new();
        for _ in 0..ATTEMPTS {
            let run = self.database.run_command(command.clone()).session(&mut self.session);
            match timeout(PATIENCE, run.into_future()).await {
                Ok(Ok(reply)) if !reply.contains_key("writeConcernError") && !is_open(&reply) => {
                    return Sent::Reply(reply);
                }
                Ok(Ok(reply)) => last = reply.to_string(),
                Ok(Err(error)) if is_certain(&error) => return Sent::Refused(error.to_string()),
                Ok(Err(error)) => last = error.to_string(),
                Err(_) => last = "no answer".into(),
            }
            tokio::time::sleep(BACK_OFF).await;
        }
        Sent::Unknown(last)
    }

    /// Finds out what became of writes of unknown outcome: first none of them may come any more,
    /// then their documents are read.
    async fn settle(&mut self) -> u32 {
        let fence = doc! {"q": {"_id": self.number}, "u": {"$inc": {"n": 1}}, "upsert": true};
        let command = Kind::Update.command(FENCES, vec![fence]);
        let is_fenced = matches!(self.send(command).await, Sent::Reply(_)) && self.fence_transactions().await;
        if is_fenced && let Ok(found) = self.read_open().await {
            for number in std::mem::take(&mut self.open) {
                let id = identity(number);
                let document = found.iter().find(|document| document.get("_id") == Some(&id));
                self.journal.read(&id, document);
            }
        } else {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        0
    }

    async fn read_open(&self) -> mongodb::error::Result<Vec<Document>> {
        let ids: Vec<Bson> = self.open.iter().map(|number| identity(*number)).collect();
        let live = self.live();
        let find = live.find(doc! {"_id": {"$in": ids}}).read_concern(ReadConcern::majority());
        let primary = SelectionCriteria::ReadPreference(mongodb::options::ReadPreference::Primary);
        find.selection_criteria(primary).await?.try_collect().await
    }

    fn live(&self) -> Collection<Document> {
        self.database.collection(&self.live)
    }

    fn insert(&mut self, number: i32) -> Change {
        let version = self.version();
        Change::Insert(document(&identity(number), version, &self.slot(), version % 3 != 0))
    }

    fn replace(&mut self, number: i32, upsert: bool) -> Change {
        let version = self.version();
        Change::Replace(document(&identity(number), version, &self.slot(), version % 3 != 0), upsert)
    }

    /// A document of its own that may be there or not.
    fn any(&mut self) -> i32 {
        let each = self.options.documents / self.options.writers;
        let below = usize::try_from(each + each / 4 + 10).expect("positive");
        i32::try_from(self.random.below(below)).expect("small") * self.options.writers + self.number
    }

    /// A document of its own that is there, most of the time.
    fn present(&mut self) -> i32 {
        for _ in 0..4 {
            let number = self.any();
            if self.journal.document(&identity(number)).is_some() {
                return number;
            }
        }
        self.any()
    }

    fn version(&mut self) -> i64 {
        i64::try_from(self.random.next() >> 20).expect("positive")
    }

    /// A value that no other document ever had.
    fn slot(&mut self) -> String {
        self.next_slot += 1;
        format!("s{}-{}", self.number, self.next_slot)
    }
}
