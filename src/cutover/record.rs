//! What a job document says of its cutover: written before anything happens,
//! so that whoever comes later knows what to look for.

use bson::{Bson, Document, Timestamp, doc};
use mongodb::Collection;
use mongodb::options::{ReturnDocument, UpdateModifications};

use super::order::Renames;
use crate::cleanse::follow::Direction;
use crate::cli::cutover::Mode;
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::job::{Job, store};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::exchange::Validation;

/// The field of the job document.
pub const FIELD: &str = "cutover";
/// In the record of a way back: that of the cutover.
const BEFORE: &str = "before";
/// Version of the layout.
const VERSION: i32 = 1;

/// How far an exchange of names is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Writes may be held off; everything written before was or is being brought along.
    Fenced,
    /// Everything written before is brought along; names may be exchanged.
    Renaming,
    /// All is done.
    Finished,
    /// Nothing was exchanged.
    GivenUp,
    /// A finished cutover was taken back.
    RolledBack,
}

impl State {
    const ALL: [Self; 5] = [Self::Fenced, Self::Renaming, Self::Finished, Self::GivenUp, Self::RolledBack];

    /// The word that is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fenced => "fenced",
            Self::Renaming => "renaming",
            Self::Finished => "finished",
            Self::GivenUp => "given_up",
            Self::RolledBack => "rolled_back",
        }
    }
}

/// A fence that may be up.
#[derive(Debug, Clone, PartialEq)]
pub enum Fence {
    /// Validators that refuse, instead of these.
    Validator {
        /// On the collection that was live.
        live: Box<Validation>,
        /// On the collection that takes its place: until what came at the last moment
        /// is brought along, nobody may write upon it.
        incoming: Box<Validation>,
    },
    /// The block of all writes.
    WriteBlock,
}

impl Fence {
    fn to_document(&self) -> Document {
        match self {
            Self::Validator { live, incoming } => {
                doc! {"kind": "validator", "live": live.to_document(), "incoming": incoming.to_document()}
            }
            Self::WriteBlock => doc! {"kind": "write-block"},
        }
    }

    fn from_document(document: &Document) -> Option<Self> {
        match document.get_str("kind").ok()? {
            "validator" => {
                let original = |name: &str| Validation::from_document(document.get_document(name).ok()?);
                Some(Self::Validator {
                    live: Box::new(original("live")?),
                    incoming: Box::new(original("incoming")?),
                })
            }
            "write-block" => Some(Self::WriteBlock),
            _ => None,
        }
    }
}

/// The record of one exchange of names.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Tells this attempt from others.
    pub id: String,
    /// What was asked for.
    pub mode: Mode,
    /// Whether this is the way back.
    pub is_rollback: bool,
    /// How far it is.
    pub state: State,
    /// What is exchanged.
    pub renames: Renames,
    /// The fence that may be up.
    pub fence: Option<Fence>,
    /// The session that the renames run on.
    pub session: Option<Document>,
    /// Since when writes were held off, where that is known.
    pub fenced_at: Option<Timestamp>,
}

impl Record {
    /// As it is stored.
    pub fn to_document(&self) -> Document {
        let renames = &self.renames;
        doc! {
            "v": VERSION,
            "id": &self.id,
            "mode": mode_word(self.mode),
            "is_rollback": self.is_rollback,
            "state": self.state.as_str(),
            "live": renames.live.to_string(),
            "live_uuid": renames.live_uuid.clone(),
            "incoming": renames.incoming.to_string(),
            "incoming_uuid": renames.incoming_uuid.clone(),
            "retired": renames.retired.as_ref().map(ToString::to_string),
            "working": renames.working.as_ref().map(ToString::to_string),
            "fence": self.fence.as_ref().map(Fence::to_document),
            "session": self.session.clone(),
            "fenced_at": self.fenced_at,
        }
    }

    /// Reads the record of a job document; `None` where there is none.
    ///
    /// # Errors
    /// A stop where it can't be understood: it may be of a newer version.
    pub fn of(job: &Document) -> Result<Option<Self>> {
        let Ok(stored) = job.get_document(FIELD) else { return Ok(None) };
        Self::from_document(stored).map(Some).ok_or_else(|| {
            Error::stopped(format!(
                "the record of the cutover of {} can't be understood",
                job.get_str("_id").unwrap_or("a job")
            ))
            .hint("was it written by a newer version of mongorekey? Use that one")
        })
    }

    fn from_document(stored: &Document) -> Option<Self> {
        let namespace =
            |name: &str| stored.get_str(name).ok().and_then(|text| text.parse::<Namespace>().ok());
        (stored.get_i32("v").ok()? == VERSION).then_some(())?;
        let state = stored.get_str("state").ok()?;
        let mode = stored.get_str("mode").ok()?;
        Some(Self {
            id: stored.get_str("id").ok()?.to_owned(),
            mode: [Mode::Switch, Mode::Swap, Mode::Keep].into_iter().find(|word| mode_word(*word) == mode)?,
            is_rollback: stored.get_bool("is_rollback").ok()?,
            state: State::ALL.into_iter().find(|known| known.as_str() == state)?,
            renames: Renames {
                live: namespace("live")?,
                live_uuid: stored.get("live_uuid")?.clone(),
                incoming: namespace("incoming")?,
                incoming_uuid: stored.get("incoming_uuid")?.clone(),
                retired: namespace("retired"),
                working: namespace("working"),
            },
            fence: match stored.get("fence") {
                Some(Bson::Document(fence)) => Some(Fence::from_document(fence)?),
                _ => None,
            },
            session: stored.get_document("session").ok().cloned(),
            fenced_at: stored.get_timestamp("fenced_at").ok(),
        })
    }

    /// What a fence says of its exchange: enough to undo it without the job.
    pub fn about(&self, job: &str, state_database: &str) -> Document {
        doc! {"job": job, "state": state_database, "record": self.to_document()}
    }

    /// Reads what [`Record::about`] made: the job, the state database and the record.
    pub fn from_about(about: &Document) -> Option<(String, String, Self)> {
        let text = |name: &str| about.get_str(name).ok().map(str::to_owned);
        Some((text("job")?, text("state")?, Self::from_document(about.get_document("record").ok()?)?))
    }

    /// From which collection to which changes are brought along.
    pub fn direction(&self) -> Direction {
        if self.is_rollback { Direction::Back } else { Direction::Forward }
    }

    /// What it is when all is done.
    pub fn end(&self) -> State {
        if self.is_rollback { State::RolledBack } else { State::Finished }
    }

    /// Whether the new collection bears the live name.
    pub fn is_done(&self) -> bool {
        self.state == State::Finished && !self.is_rollback
    }

    /// Where a job of ours may have left writes held off.
    pub fn with_a_fence() -> Document {
        doc! {format!("{FIELD}.fence"): {"$type": "object"}}
    }
}

/// The word of a mode, as it is typed and stored.
pub fn mode_word(mode: Mode) -> &'static str {
    match mode {
        Mode::Switch => "switch",
        Mode::Swap => "swap",
        Mode::Keep => "keep",
    }
}

/// The record of the cutover that is about to be taken back, to stand in that of
/// the way back: should that be given up, the cutover is what it was.
///
/// # Errors
/// A stop where the job can't be read.
pub async fn before(mongo: &Mongo, job: &str) -> Result<Document> {
    let Some(record) = stored(mongo, job).await? else { return Ok(Document::new()) };
    // One that was cut short has it from the one before.
    let before = record.get_document(BEFORE).unwrap_or(&record);
    Ok(doc! {BEFORE: before.clone()})
}

/// The record as it is stored with the job; `None` where no exchange was begun.
async fn stored(mongo: &Mongo, job: &str) -> Result<Option<Document>> {
    let job = store::find(mongo, job).await?.unwrap_or_default();
    Ok(job.get_document(FIELD).ok().cloned())
}

/// The right to say what became of an exchange: of the process that began it, or of one that recovers.
///
/// A claim takes the right from whoever had it, for good: its number only rises, what the holder of the
/// job stores about the exchange asks for no claim at all, and what a recovery stores asks for its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim(Option<i64>);

impl Claim {
    /// The right of the process that began the exchange, as long as nobody has claimed it.
    pub const BEGINNER: Self = Self(None);

    /// Finds the job as long as this right is not lost.
    pub fn condition(self, id: &str) -> Document {
        let number = self.0.map_or(Bson::Null, Bson::Int64);
        doc! {format!("{FIELD}.id"): id, format!("{FIELD}.claim"): number}
    }
}

/// Stores a new record instead of the one that is there, if that is closed; false where somebody else has
/// stored one, or has claimed this one already.
///
/// A command that arrives twice must not take a claim back, nor open again what is over: it is compared
/// with the record that is there now, and no id comes twice.
///
/// # Errors
/// A stop where the lease is lost or the job can't be read or written.
pub async fn store(mongo: &Mongo, job: &Job, record: &Record, fields: Document) -> Result<bool> {
    let former = stored(mongo, job.name()).await?.unwrap_or_default();
    let former = former.get("id").cloned().unwrap_or(Bson::Null);
    let closed = doc! {format!("{FIELD}.id"): former, format!("{FIELD}.fence"): Bson::Null};
    if job.save_where(closed, doc! {FIELD: fields}).await? {
        return Ok(true);
    }
    // Its first copy may have been carried out, and only the answer was lost.
    let now = stored(mongo, job.name()).await?.unwrap_or_default();
    Ok(now.get_str("id").ok() == Some(&record.id)
        && now.get("claim").is_none_or(|claim| *claim == Bson::Null))
}

/// Claims the recovery of an exchange; `None` where somebody else has just done that.
///
/// # Errors
/// A stop where the job can't be written.
pub async fn claim(mongo: &Mongo, job: &str, id: &str) -> Result<Option<Claim>> {
    let jobs: Collection<Document> = mongo.state("jobs");
    let field = |name: &str| format!("{FIELD}.{name}");
    let token = format!("{:016x}", rand::random::<u64>());
    // Others wait for whoever claimed it a moment ago; a claim whose answer was lost is our own.
    let is_old = doc! {"$lt": [
        {"$ifNull": [format!("${FIELD}.claimed_at"), 0]},
        {"$subtract": ["$$NOW", CLAIM_MILLISECONDS]},
    ]};
    let is_ours = doc! {"$eq": [format!("${FIELD}.claimant"), &token]};
    let filter = doc! {
        "_id": job,
        field("id"): id,
        field("fence"): {"$type": "object"},
        "$expr": {"$or": [is_old, is_ours]},
    };
    let next = doc! {"$add": [{"$ifNull": [format!("${FIELD}.claim"), 0_i64]}, 1_i64]};
    let update = vec![doc! {"$set": {
        field("claimed_at"): "$$NOW",
        field("claimant"): &token,
        field("claim"): next,
    }}];
    let claimed = retrying(format!("claiming the fence of {job}"), || {
        let claim = jobs.find_one_and_update(filter.clone(), update.clone());
        async move { claim.return_document(ReturnDocument::After).await }
    })
    .await?;
    let number = claimed.as_ref().and_then(|job| job.get_document(FIELD).ok()?.get_i64("claim").ok());
    Ok(number.map(|number| Claim(Some(number))))
}

/// Lets others look at once: this one could not do it.
///
/// # Errors
/// A stop where the job can't be written.
pub async fn release(mongo: &Mongo, job: &str, id: &str, claim: Claim) -> Result<()> {
    let update = doc! {"$set": {format!("{FIELD}.claimed_at"): Bson::Null}};
    update_where(mongo, job, claim.condition(id), update, "giving back the fence of").await.map(|_| ())
}

/// How long others leave a recovery to whoever has claimed it.
const CLAIM_MILLISECONDS: i64 = 20_000;

/// Stores what an exchange of names came to, and what belongs to that; the fence is down. False where
/// somebody else has the right to do so by now and has not done it yet.
///
/// # Errors
/// A stop where the job can't be written.
pub async fn close(
    mongo: &Mongo,
    job: &str,
    id: &str,
    claim: Claim,
    state: State,
    mut fields: Document,
) -> Result<bool> {
    let is_all = fields.is_empty();
    fields.extend(doc! {
        format!("{FIELD}.state"): state.as_str(),
        format!("{FIELD}.fence"): Bson::Null,
        format!("{FIELD}.claimed_at"): Bson::Null,
    });
    let update: UpdateModifications = if state == State::GivenUp && is_all {
        // A way back that was given up leaves the cutover as it was.
        let before = doc! {"$ifNull": [format!("${FIELD}.{BEFORE}"), format!("${FIELD}")]};
        vec![doc! {"$set": fields}, doc! {"$set": {FIELD: before}}].into()
    } else {
        doc! {"$set": fields}.into()
    };
    if update_where(mongo, job, claim.condition(id), update, "storing what became of the cutover of").await? {
        return Ok(true);
    }
    // Somebody else may have closed it, or we did and the answer was lost.
    let open = doc! {format!("{FIELD}.id"): id, format!("{FIELD}.fence"): {"$type": "object"}};
    Ok(!store::exists(mongo, job, open).await?)
}

/// Writes to the job where it meets the condition; returns whether it did.
async fn update_where(
    mongo: &Mongo,
    job: &str,
    mut condition: Document,
    update: impl Into<UpdateModifications>,
    doing: &str,
) -> Result<bool> {
    let jobs: Collection<Document> = mongo.state("jobs");
    condition.insert("_id", job);
    let update = update.into();
    let updated = retrying(format!("{doing} {job}"), || {
        let update = jobs.update_one(condition.clone(), update.clone());
        async move { update.await }
    })
    .await?;
    Ok(updated.matched_count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_what_is_read() {
        let validation = Validation::of(&doc! {"validator": {"$expr": {"$gt": ["$a", 1]}}});
        let record = Record {
            id: "x1".into(),
            mode: Mode::Keep,
            is_rollback: true,
            state: State::Renaming,
            renames: Renames {
                live: "app.users".parse().expect("valid"),
                live_uuid: 1.into(),
                incoming: "app.users_v2".parse().expect("valid"),
                incoming_uuid: 2.into(),
                retired: Some("app.users_before_j".parse().expect("valid")),
                working: Some("app.users_v2.x1".parse().expect("valid")),
            },
            fence: Some(Fence::Validator {
                live: Box::new(validation),
                incoming: Box::new(Validation::of(&doc! {})),
            }),
            session: Some(doc! {"id": 5}),
            fenced_at: Some(Timestamp { time: 1, increment: 2 }),
        };
        let swap = Record {
            mode: Mode::Swap,
            renames: Renames { retired: None, ..record.renames.clone() },
            fence: None,
            session: None,
            fenced_at: None,
            ..record.clone()
        };
        for record in [record, swap] {
            let job = doc! {"_id": "j", FIELD: record.to_document()};
            let about = record.about("j", "state");
            assert_eq!(Record::from_about(&about), Some(("j".into(), "state".into(), record.clone())));
            assert_eq!(Record::of(&job).expect("understood"), Some(record));
        }
        assert_eq!(Record::of(&doc! {}).expect("none"), None);
        assert!(Record::of(&doc! {FIELD: {"v": 99}}).is_err());
    }
}
