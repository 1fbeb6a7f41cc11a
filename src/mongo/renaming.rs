//! Renaming a collection that is known by its UUID, whatever name it has by now.

use std::time::Duration;

use bson::Bson;

use super::Mongo;
use super::exchange::Obstacle;
use crate::config::values::Namespace;
use crate::error::{Error, Result, describe_mongo};

/// How long one rename may wait for whoever holds the collection.
const PATIENT: Duration = Duration::from_secs(30);
/// Attempts at a rename.
const ATTEMPTS: u32 = 20;
/// Between two of them.
const PAUSE: Duration = Duration::from_millis(100);

/// How a rename ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renamed {
    /// The collection has the new name.
    Done,
    /// It has a name that it may not be taken away from.
    NotOurs,
    /// Another collection has the new name.
    NameTaken,
    /// There is no such collection.
    Gone,
}

impl Mongo {
    /// Gives the collection of that UUID, which is of the database of `to`, that name. It is left as
    /// it is where `may_be_renamed` does not hold for the name that it has.
    ///
    /// # Errors
    /// A stop where the server can't be asked, or refuses again and again.
    pub async fn rename_by_uuid(
        &self,
        uuid: &Bson,
        to: &Namespace,
        may_be_renamed: impl Fn(&Namespace) -> bool,
    ) -> Result<Renamed> {
        for _ in 0..ATTEMPTS {
            let Some(from) = self.name_of(&to.database, uuid).await? else { return Ok(Renamed::Gone) };
            if from == *to {
                return Ok(Renamed::Done);
            }
            if !may_be_renamed(&from) {
                return Ok(Renamed::NotOurs);
            }
            match self.rename_once(&from, uuid, to).await {
                Ok(()) => return Ok(Renamed::Done),
                Err(error) if Obstacle::of(&error) == Obstacle::NameTaken => return Ok(Renamed::NameTaken),
                // Perhaps it was done, and only the answer was lost.
                Err(error) => {
                    let error = describe_mongo(&error);
                    tracing::debug!(error, "the rename of {from} to {to} is tried again");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        Err(Error::stopped(format!("a collection can't be renamed to {to}"))
            .hint("is the server reachable? Start the same command again"))
    }

    /// The same, sent once whatever comes back; returns whether the collection has the name then.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn try_rename_by_uuid(
        &self,
        uuid: &Bson,
        to: &Namespace,
        may_be_renamed: impl Fn(&Namespace) -> bool,
    ) -> Result<bool> {
        let from = self.name_of(&to.database, uuid).await?;
        if let Some(from) = from.filter(|from| from != to && may_be_renamed(from))
            && let Err(error) = self.rename_once(&from, uuid, to).await
        {
            let error = describe_mongo(&error);
            tracing::debug!(error, "looking whether {from} was renamed to {to}");
        }
        Ok(self.name_of(&to.database, uuid).await?.as_ref() == Some(to))
    }

    async fn rename_once(&self, from: &Namespace, uuid: &Bson, to: &Namespace) -> mongodb::error::Result<()> {
        let mut operation = self.operation().await.map_err(mongodb::error::Error::custom)?;
        self.rename(&mut operation, from, uuid, to, None, PATIENT).await
    }
}
