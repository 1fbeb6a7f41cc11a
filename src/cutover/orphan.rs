//! A fence whose job is gone, as with its state database: it says itself whose it is, what it was for
//! and what stood there before, so that it can be lifted all the same.

use bson::Document;

use super::exchange::take_name;
use super::fence;
use super::gap::{self, PATIENCE};
use super::record::{Record, State};
use super::recover::{Found, forbid, look, unknown};
use super::residual::Residue;
use crate::clock::Moment;
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::job::store;
use crate::mongo::Mongo;
use crate::mongo::giving_way::GivingWay;
use crate::mongo::source::to_bson;

/// A fence that no job knows.
#[derive(Debug)]
pub struct Orphan {
    /// The job that it was for.
    pub job: String,
    /// The database that holds that job.
    state_database: String,
    record: Record,
}

/// What became of its exchange.
#[derive(Debug)]
pub struct Lifted {
    /// Whether names were exchanged.
    pub state: State,
    /// What came at the last moment.
    pub residue: Residue,
}

/// The fences in a database that nobody looks after: each of an attempt that its job does not know.
///
/// # Errors
/// A stop where the server can't be asked.
pub async fn find(mongo: &Mongo, database: &str) -> Result<Vec<Orphan>> {
    let mut found: Vec<Orphan> = Vec::new();
    for about in mongo.fences(database).await? {
        let Some(orphan) = Orphan::of(&about) else { continue };
        let is_new = found.iter().all(|known| known.record.id != orphan.record.id);
        if is_new && !orphan.is_known(mongo).await? {
            found.push(orphan);
        }
    }
    Ok(found)
}

impl Orphan {
    /// By what a fence says.
    pub fn of(about: &Document) -> Option<Self> {
        let (job, state_database, record) = Record::from_about(about)?;
        Some(Self { job, state_database, record })
    }

    /// The collection whose writes it holds off.
    pub fn live(&self) -> &Namespace {
        &self.record.renames.live
    }

    /// Whether it is that of this attempt.
    pub fn is_of(&self, attempt: &str) -> bool {
        self.record.id == attempt
    }

    /// For the reader of any command.
    pub fn told(&self) -> String {
        let live = self.live();
        format!(
            "writes to {live} are held off by a cutover of the job {} that was cut short, and nobody looks \
             after it: `mongorekey cutover --abort --source {live}` lets them through",
            self.job
        )
    }

    /// Whether its job knows of it: then that is who looks after it.
    async fn is_known(&self, mongo: &Mongo) -> Result<bool> {
        if self.state_database != mongo.state_database() {
            return Ok(false);
        }
        let Some(job) = store::find(mongo, &self.job).await? else {
            return Ok(false);
        };
        let record = Record::of(&job)?;
        Ok(record.is_some_and(|record| record.id == self.record.id && record.fence.is_some()))
    }

    /// Lets writes through, and tells what became of the exchange.
    ///
    /// # Errors
    /// A refusal with another state database: what is on its way can't be stopped from there. An
    /// unknown outcome; a stop where the server does not do as asked.
    pub async fn lift(&self, mongo: &Mongo) -> Result<Lifted> {
        if self.state_database != mongo.state_database() {
            return Err(Error::refused(format!(
                "the cutover that holds off writes to {} keeps its state in the database {}",
                self.live(),
                self.state_database
            ))
            .hint("use its config, or that `state_database`"));
        }
        let record = &self.record;
        if let Some(session) = &record.session {
            mongo.end_operations(std::slice::from_ref(session)).await?;
        }
        forbid(mongo, record).await?;
        let found = self.to_one_side(mongo).await;
        if let Some(fence) = &record.fence {
            fence::lift(mongo, fence, &record.renames, &record.id).await?;
        }
        self.finish(mongo, found?).await
    }

    /// Not between two renames.
    async fn to_one_side(&self, mongo: &Mongo) -> Result<Found> {
        let renames = &self.record.renames;
        if let (Found::Between, Some(retired)) = (look(mongo, renames).await?, &renames.retired) {
            take_name(mongo, &self.record, retired, &renames.live_uuid).await?;
        }
        look(mongo, renames).await
    }

    async fn finish(&self, mongo: &Mongo, found: Found) -> Result<Lifted> {
        let (record, renames) = (&self.record, &self.record.renames);
        let state = match found {
            Found::Exchanged => record.end(),
            Found::AsBefore => State::GivenUp,
            Found::Between | Found::Unknown => return Err(unknown(renames)),
        };
        let mut residue = Residue::default();
        if found == Found::Exchanged {
            self.bring_deletes_along(mongo, &mut residue).await?;
        }
        let gap = gap::merge(mongo, &self.job, record, record.fenced_at).await?;
        residue.lost.extend(gap.left);
        residue.gap = gap.merged;
        residue.gap.conflicts = gap::conflicts(mongo, &self.job).await?;
        Ok(Lifted { state, residue })
    }

    /// What was deleted at the last moment, by what the change stream tells since before the fence. What
    /// was written past validation can't be told from what was brought along.
    async fn bring_deletes_along(&self, mongo: &Mongo, residue: &mut Residue) -> Result<()> {
        let renames = &self.record.renames;
        let Some(from) = self.record.fenced_at else { return Ok(()) };
        let history = mongo.name_history(&renames.live, from, &renames.to_become_live(), true).await?;
        let mut live = GivingWay::new(mongo, &renames.live, history.taken_at)?;
        let given = live.delete(&history.deleted, Moment::now().deadline(PATIENCE)).await?;
        residue.deletes = u64::try_from(given.done).unwrap_or(u64::MAX);
        for id in given.too_late.iter().chain(&given.left) {
            residue.lost.push(to_bson(id)?);
        }
        Ok(())
    }
}
