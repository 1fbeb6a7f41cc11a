//! The ranges of a copy, each with its own durable state.

use bson::{Bson, DateTime, Document, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use crate::error::{Error, Result};
use crate::job::Job;
use crate::job::lease::lost;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::range::Range;

/// The collection of ranges in the state database.
const COLLECTION: &str = "ranges";

/// A range of a job.
#[derive(Debug, Clone)]
pub struct JobRange {
    /// Its number within the job.
    pub number: i32,
    /// The bounds of what is not copied yet.
    pub range: Range,
    /// How far it is.
    pub state: RangeState,
}

/// How far a range is.
#[derive(Debug, Clone, PartialEq)]
pub enum RangeState {
    /// Nothing of it is in the target.
    Pending,
    /// An operation on this session copies it, or did when its client died.
    Copying(Document),
    /// All of it is in the target.
    Done,
}

/// The stored ranges of one job.
#[derive(Debug, Clone)]
pub struct Ranges {
    collection: Collection<Document>,
    job: String,
    /// The run that writes them: one that was replaced, and does not know yet, can't
    /// write over what its successor has stored.
    run: i64,
}

impl Ranges {
    /// The ranges of a job, to be read.
    pub fn of(mongo: &Mongo, job: &str) -> Self {
        Self { collection: mongo.state(COLLECTION), job: job.into(), run: 0 }
    }

    /// The ranges of a job that this process runs.
    pub fn of_run(mongo: &Mongo, job: &Job) -> Self {
        Self { run: job.run(), ..Self::of(mongo, job.name()) }
    }

    /// Stores the ranges of a new copy; those of an unfinished attempt go.
    ///
    /// # Errors
    /// A stop where they can't be stored.
    pub async fn create(&self, ranges: &[Range]) -> Result<()> {
        self.clear().await?;
        let of = i32::try_from(ranges.len()).unwrap_or(i32::MAX);
        let documents: Vec<Document> = ranges
            .iter()
            .enumerate()
            .map(|(number, range)| {
                let number = i32::try_from(number).unwrap_or(i32::MAX);
                let mut document =
                    doc! {"_id": self.id(number), "v": 1, "of": of, "state": "pending", "run": self.run};
                // An absent bound is open; a bound may itself be null.
                for (name, bound) in [("lower", &range.lower), ("upper", &range.upper)] {
                    if let Some(bound) = bound {
                        document.insert(name, bound.clone());
                    }
                }
                document
            })
            .collect();
        retrying(format!("storing the ranges of {}", self.job), || {
            let insert = self.collection.insert_many(&documents);
            async move { insert.await }
        })
        .await
        .map(|_| ())
    }

    /// All ranges in their order.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn load(&self) -> Result<Vec<JobRange>> {
        Ok(self.documents().await?.into_iter().map(read).collect())
    }

    /// All ranges of a copy that has begun.
    ///
    /// # Errors
    /// As [`Self::load`]; a stop where some are gone: what they stand for would never be copied.
    pub async fn load_whole(&self) -> Result<Vec<JobRange>> {
        let documents = self.documents().await?;
        // Those of an early version do not say how many there are.
        let is_whole = |range: &Document| {
            range.get_i32("of").map_or(true, |of| usize::try_from(of) == Ok(documents.len()))
        };
        if documents.is_empty() || !documents.iter().all(is_whole) {
            return Err(Error::stopped(format!(
                "ranges of the job {} are missing in the state database",
                self.job
            ))
            .hint("copy anew with --restart"));
        }
        Ok(documents.into_iter().map(read).collect())
    }

    async fn documents(&self) -> Result<Vec<Document>> {
        let filter = doc! {"_id.job": &self.job};
        retrying(format!("reading the ranges of {}", self.job), || {
            let find = self.collection.find(filter.clone()).sort(doc! {"_id.number": 1});
            async move { find.await?.try_collect().await }
        })
        .await
    }

    /// Forgets all ranges but those that a later run has stored.
    ///
    /// # Errors
    /// A stop where they can't be removed.
    pub async fn clear(&self) -> Result<()> {
        let filter = doc! {"_id.job": &self.job, "run": {"$not": {"$gt": self.run}}};
        retrying(format!("forgetting the ranges of {}", self.job), || {
            let delete = self.collection.delete_many(filter.clone());
            async move { delete.await }
        })
        .await
        .map(|_| ())
    }

    /// Stores how far a range is.
    ///
    /// # Errors
    /// A stop where it can't be stored, or a later run has it.
    pub async fn set(&self, number: i32, state: &RangeState) -> Result<()> {
        let (word, session) = match state {
            RangeState::Pending => ("pending", Bson::Null),
            RangeState::Copying(session) => ("copying", session.clone().into()),
            RangeState::Done => ("done", Bson::Null),
        };
        self.update(number, doc! {"state": word, "session": session}).await
    }

    /// Stores that everything of a range below this `_id` is in the target, and
    /// nothing else of it.
    ///
    /// # Errors
    /// A stop where it can't be stored, or a later run has it.
    pub async fn advance(&self, number: i32, reached: &Bson) -> Result<()> {
        let fields = doc! {"state": "pending", "session": Bson::Null, "reached": reached.clone()};
        self.update(number, fields).await
    }

    async fn update(&self, number: i32, mut fields: Document) -> Result<()> {
        fields.extend(doc! {"at": DateTime::now(), "run": self.run});
        let filter = doc! {"_id": self.id(number), "run": {"$not": {"$gt": self.run}}};
        let update = doc! {"$set": fields};
        let updated = retrying(format!("storing how far a range of {} is", self.job), || {
            let update = self.collection.update_one(filter.clone(), update.clone());
            async move { update.await }
        })
        .await?;
        if updated.matched_count == 0 { Err(lost(&self.job)) } else { Ok(()) }
    }

    fn id(&self, number: i32) -> Document {
        doc! {"job": &self.job, "number": number}
    }
}

fn read(mut document: Document) -> JobRange {
    let number = document.get_document("_id").and_then(|id| id.get_i32("number")).unwrap_or(0);
    let state = match (document.get_str("state").unwrap_or("pending"), document.get("session")) {
        ("done", _) => RangeState::Done,
        ("copying", Some(Bson::Document(session))) => RangeState::Copying(session.clone()),
        ("copying", _) => RangeState::Copying(Document::new()),
        _ => RangeState::Pending,
    };
    let lower = document.remove("reached").or_else(|| document.remove("lower"));
    let range = Range { lower, upper: document.remove("upper") };
    JobRange { number, range, state }
}
