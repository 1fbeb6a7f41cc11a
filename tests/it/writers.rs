//! Applications that write to a live collection, all kinds of writes at a steady rate, and keep a
//! journal of what was acknowledged: at the end the collection is what the journal says, whatever
//! was done to it meanwhile.
//!
//! Each writer has `_id`s of its own, so that what a document must be follows from the journal of one
//! writer alone. A write that is refused was not applied. One of unknown outcome leaves two states
//! open, until its writer has made sure that it comes no more and has read the document.

mod journal;
mod operation;
mod reply;
mod transaction;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bson::{Document, doc};
use mongodb::options::IndexOptions;
use mongodb::{Collection, Database, IndexModel};
use tokio::task::JoinSet;

pub use journal::{
    Cutover, Journal, expect_collection_equals, expect_live_after_cutover, expect_live_after_rollback,
};
use writer::Writer;

use crate::harness::{Bench, connect, wait_for};

/// How the writers are to be.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How many there are.
    pub writers: i32,
    /// Documents that are there from the beginning on.
    pub documents: i32,
    /// Documents written per second by all of them.
    pub target_rate: u32,
    /// Whether the field `slot` has a unique index; its values change places.
    pub unique: bool,
    /// What may befall invalid documents meanwhile.
    pub cutover: Cutover,
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            writers: 8,
            documents: 8_000,
            // What matters is what is written when, not how much: other tests need the server too.
            target_rate: 400,
            unique: true,
            cutover: Cutover::None,
            seed: 1,
        }
    }
}

/// Writers under way, on a thread of their own.
pub struct Writers {
    figures: Figures,
    thread: Option<JoinHandle<Journal>>,
}

/// What all writers count.
#[derive(Debug, Clone, Default)]
pub struct Figures(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    started: AtomicBool,
    stopped: AtomicBool,
    operations: AtomicU64,
    refused: AtomicU64,
    unknown: AtomicU64,
    longest_pause_micros: AtomicU64,
}

/// The rule of the writers' documents.
pub fn is_valid(document: &Document) -> bool {
    document.get_bool("valid").unwrap_or(false)
}

impl Writers {
    /// Fills the collection, which must not exist, and starts to write; returns when it is filled.
    pub async fn start(uri: &str, database: &Database, live: &str, options: Options) -> Self {
        let figures = Figures::default();
        let (uri, name, live) = (uri.to_owned(), database.name().to_owned(), live.to_owned());
        let theirs = figures.clone();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(write(&uri, &name, &live, options, theirs))
        });
        let writers = Self { figures, thread: Some(thread) };
        wait_for("the writers", async || {
            assert!(!writers.has_ended(), "the writers failed");
            writers.figures.0.started.load(Ordering::SeqCst)
        })
        .await;
        writers
    }

    /// The same for a collection of a bench.
    pub async fn on(bench: &Bench, live: &str, options: Options) -> Self {
        Self::start(&bench.uri, &bench.database, live, options).await
    }

    /// Documents written so far, each time they were.
    pub fn operations(&self) -> u64 {
        self.figures.operations()
    }

    /// Writes that were refused so far.
    pub fn refused(&self) -> u64 {
        self.figures.0.refused.load(Ordering::SeqCst)
    }

    /// Writes so far of which nobody knew whether they were applied, until they were settled.
    pub fn unknown(&self) -> u64 {
        self.figures.0.unknown.load(Ordering::SeqCst)
    }

    /// The longest time that a writer wanted to write and nothing was acknowledged to it, since the
    /// start or since that was forgotten.
    pub fn longest_pause(&self) -> Duration {
        Duration::from_micros(self.figures.0.longest_pause_micros.load(Ordering::SeqCst))
    }

    pub fn forget_pauses(&self) {
        self.figures.0.longest_pause_micros.store(0, Ordering::SeqCst);
    }

    /// Waits until so many more documents were written.
    pub async fn go_on_for(&self, operations: u64) {
        let goal = self.operations() + operations;
        wait_for("writes", async || {
            assert!(!self.has_ended(), "the writers failed");
            self.operations() >= goal
        })
        .await;
    }

    /// Ends them; what they know is in the journal.
    pub async fn stop(mut self) -> Journal {
        self.figures.0.stopped.store(true, Ordering::SeqCst);
        let thread = self.thread.take().expect("not stopped yet");
        let journal = tokio::task::spawn_blocking(move || thread.join()).await.expect("no panic");
        journal.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.figures.0.stopped.store(true, Ordering::SeqCst);
    }
}

impl Figures {
    fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::SeqCst)
    }

    fn operations(&self) -> u64 {
        self.0.operations.load(Ordering::SeqCst)
    }

    fn acknowledge(&self, count: usize, pause: Option<Duration>) {
        self.0.operations.fetch_add(u64::try_from(count).expect("few"), Ordering::SeqCst);
        let micros = pause.map_or(0, |pause| u64::try_from(pause.as_micros()).expect("not that long"));
        self.0.longest_pause_micros.fetch_max(micros, Ordering::SeqCst);
    }

    fn lose_sight(&self) {
        self.0.unknown.fetch_add(1, Ordering::SeqCst);
    }

    fn refuse(&self) {
        self.0.refused.fetch_add(1, Ordering::SeqCst);
    }
}

async fn write(uri: &str, database: &str, live: &str, options: Options, figures: Figures) -> Journal {
    let client = connect(uri).await;
    let database = client.database(database);
    let collection: Collection<Document> = database.collection(live);
    if options.unique {
        let unique = IndexOptions::builder().unique(true).build();
        let index = IndexModel::builder().keys(doc! {"slot": 1}).options(unique).build();
        collection.create_index(index).await.expect("an index");
    }
    let mut seeding = JoinSet::new();
    for number in 0..options.writers {
        let (database, live, figures) = (database.clone(), live.to_owned(), figures.clone());
        seeding.spawn(async move {
            let mut writer = Writer::new(number, database, &live, options, figures).await;
            writer.seed().await;
            writer
        });
    }
    let seeded = seeding.join_all().await;
    figures.0.operations.store(0, Ordering::SeqCst);
    figures.0.longest_pause_micros.store(0, Ordering::SeqCst);
    figures.0.started.store(true, Ordering::SeqCst);
    let rate = f64::from(options.target_rate) / f64::from(options.writers);
    let mut writing = JoinSet::new();
    for mut writer in seeded {
        writing.spawn(async move {
            writer.run(rate).await;
            writer.journal
        });
    }
    let mut journal = Journal::new(options.cutover);
    for one in writing.join_all().await {
        journal.merge(one);
    }
    journal
}
