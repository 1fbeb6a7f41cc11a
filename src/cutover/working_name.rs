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

/// Gives the incoming collection the name of this attempt.
///
/// # Errors
/// A stop where it is not there, or the server refuses.
pub async fn take(mongo: &Mongo, renames: &Renames) -> Result<()> {
    let Some(working) = &renames.working else { return Ok(()) };
    match rename(mongo, renames, working).await? {
        Renamed::NameTaken => Err(Error::stopped(format!("{working} exists already"))
            .hint("start the same command again: every attempt has another name")),
        _ => Ok(()),
    }
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
    let may_be_renamed =
        |from: &Namespace| *from == renames.incoming || is_working_name(&renames.incoming, from);
    match mongo.rename_by_uuid(&renames.incoming_uuid, to, may_be_renamed).await? {
        Renamed::Gone => Err(Error::stopped(format!("the collection that was {} is gone", renames.incoming))),
        renamed => Ok(renamed),
    }
}
