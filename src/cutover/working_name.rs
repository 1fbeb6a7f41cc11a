//! The name that the incoming collection has during one attempt at an exchange.
//!
//! A rename that was sent in time may arrive late, after somebody has let writes through again. It
//! must find nothing then. So the incoming collection gets a name of this attempt before writes are
//! held off, names are exchanged from that name, and whoever recovers takes it away before anything
//! else: the server refuses a rename of what has another name, by its UUID.
//!
//! The collection is found by its UUID, whichever attempt has named it: an earlier one may have been
//! given up before its first rename arrived.

use super::order::{Renames, is_working_name, working_name};
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::renaming::Renamed;

/// Gives the incoming collection the name of this attempt; false where it does not have it then.
///
/// It is asked for once: sent again, the first command could arrive after somebody has taken the name
/// away, and give it back.
///
/// # Errors
/// A stop where the collection is not there, or can't be looked for.
pub async fn take(mongo: &Mongo, renames: &Renames) -> Result<bool> {
    let Some(working) = &renames.working else { return Ok(true) };
    let uuid = &renames.incoming_uuid;
    mongo.try_rename_by_uuid(uuid, working, |from| may_be_renamed(renames, from)).await
}

/// Gives the incoming collection its name back, if it has that of an attempt. From then on no rename of
/// that attempt can happen; one that did has given it the live name.
///
/// # Errors
/// A stop where another collection has the name, or the server refuses.
pub async fn give_back(mongo: &Mongo, renames: &Renames) -> Result<()> {
    match rename(mongo, renames, &renames.incoming).await? {
        Renamed::NameTaken => Err(name_taken(&renames.incoming)),
        _ => Ok(()),
    }
}

/// Takes the name of the attempt away, whatever other name the collection gets: writes are let through
/// next, and that must not wait for a name.
///
/// # Errors
/// A stop where the server refuses.
pub async fn take_away(mongo: &Mongo, renames: &Renames) -> Result<()> {
    if rename(mongo, renames, &renames.incoming).await? != Renamed::NameTaken {
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

/// Renames the incoming collection, which has its own name or that of an attempt. Any other name says
/// that names were exchanged.
async fn rename(mongo: &Mongo, renames: &Renames, to: &Namespace) -> Result<Renamed> {
    let uuid = &renames.incoming_uuid;
    match mongo.rename_by_uuid(uuid, to, |from| may_be_renamed(renames, from)).await? {
        Renamed::Gone => Err(Error::stopped(format!("the collection that was {} is gone", renames.incoming))),
        renamed => Ok(renamed),
    }
}

/// Whether a name is not one that the collection got by the exchange. Pure.
fn may_be_renamed(renames: &Renames, from: &Namespace) -> bool {
    *from == renames.incoming || is_working_name(&renames.incoming, from)
}
