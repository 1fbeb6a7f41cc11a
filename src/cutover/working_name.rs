//! The name that the incoming collection has during one attempt at an exchange.
//!
//! A rename that was sent in time may arrive late, after somebody has let writes through again. It
//! must find nothing then. So the incoming collection gets a name of this attempt before writes are
//! held off, names are exchanged from that name, and whoever recovers takes it away before anything
//! else: the server refuses a rename of what has another name, by its UUID.
//!
//! The collection is found by its UUID, whichever attempt has named it: an earlier one may have been
//! given up before its first rename arrived.

use std::time::Duration;

use bson::Bson;

use super::order::{Renames, is_working_name, working_name};
use crate::config::values::Namespace;
use crate::error::{Error, Result, describe_mongo};
use crate::mongo::Mongo;
use crate::mongo::exchange::Obstacle;

/// How long one rename may wait for whoever holds the collection.
const PATIENT: Duration = Duration::from_secs(30);
/// Attempts at a rename.
const ATTEMPTS: u32 = 20;
/// Between two of them.
const PAUSE: Duration = Duration::from_millis(100);

/// Gives the incoming collection the name of this attempt.
///
/// # Errors
/// A stop where it is not there, or the server refuses.
pub async fn take(mongo: &Mongo, renames: &Renames) -> Result<()> {
    let Some(working) = &renames.working else { return Ok(()) };
    match rename(mongo, renames, working).await? {
        Renamed::Done => Ok(()),
        Renamed::NameTaken => Err(Error::stopped(format!("{working} exists already"))
            .hint("start the same command again: every attempt has another name")),
    }
}

/// Gives the incoming collection its name back, if it has that of an attempt. From then on no rename of
/// that attempt can happen; one that did has given it the live name.
///
/// # Errors
/// A stop where another collection has the name, or the server refuses.
pub async fn give_back(mongo: &Mongo, renames: &Renames) -> Result<()> {
    match rename(mongo, renames, &renames.incoming).await? {
        Renamed::Done => Ok(()),
        Renamed::NameTaken => Err(name_taken(&renames.incoming)),
    }
}

/// Takes the name of the attempt away, whatever other name the collection gets: writes are let through
/// next, and that must not wait for a name.
///
/// # Errors
/// A stop where the server refuses.
pub async fn take_away(mongo: &Mongo, renames: &Renames) -> Result<()> {
    if rename(mongo, renames, &renames.incoming).await? == Renamed::Done {
        return Ok(());
    }
    let elsewhere = working_name(&renames.incoming, &format!("{:016x}", rand::random::<u64>()));
    tracing::warn!("{}; the copy is called {elsewhere} until then", name_taken(&renames.incoming));
    rename(mongo, renames, &elsewhere).await.map(|_| ())
}

fn name_taken(incoming: &Namespace) -> Error {
    Error::stopped(format!("another collection was made as {incoming}, the name of the copy, meanwhile"))
        .hint(format!("rename or drop {incoming}, then start the same command again"))
}

#[derive(PartialEq)]
enum Renamed {
    /// It has that name, or names were exchanged.
    Done,
    /// Another collection has that name.
    NameTaken,
}

/// Renames the incoming collection, which has its own name or that of an attempt.
async fn rename(mongo: &Mongo, renames: &Renames, to: &Namespace) -> Result<Renamed> {
    let uuid = &renames.incoming_uuid;
    for _ in 0..ATTEMPTS {
        let Some(from) = mongo.name_of(&to.database, uuid).await? else {
            return Err(Error::stopped(format!("the collection that was {} is gone", renames.incoming)));
        };
        let may_be_renamed = from == renames.incoming || is_working_name(&renames.incoming, &from);
        if from == *to || !may_be_renamed {
            return Ok(Renamed::Done);
        }
        match rename_once(mongo, &from, uuid, to).await {
            Ok(()) => return Ok(Renamed::Done),
            Err(error) if Obstacle::of(&error) == Obstacle::NameTaken => return Ok(Renamed::NameTaken),
            // Perhaps it was done, and only the answer was lost.
            Err(error) => {
                tracing::debug!(error = describe_mongo(&error), "the rename to {to} is tried again");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    Err(Error::stopped(format!("{} can't be renamed to {to}", renames.incoming))
        .hint("is the server reachable? Start the same command again"))
}

async fn rename_once(
    mongo: &Mongo,
    from: &Namespace,
    uuid: &Bson,
    to: &Namespace,
) -> mongodb::error::Result<()> {
    let mut operation = mongo.operation().await.map_err(mongodb::error::Error::custom)?;
    mongo.rename(&mut operation, from, uuid, to, None, PATIENT).await
}
