//! Holding writes off while names are exchanged, and letting them through again.

use std::time::Duration;

use bson::{Bson, Timestamp};

use super::order::{Method, Renames};
use super::record::Fence;
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::exchange::{Obstacle, Validation};

/// A fence waits behind open transactions, and everybody else behind it: no
/// longer than this, whatever pause is allowed.
pub const LONGEST_WAIT: Duration = Duration::from_millis(500);
/// So long an attempt to let writes through again waits for open transactions: it
/// is repeated, because everybody else waits behind it.
const LIFTING: Duration = Duration::from_millis(300);

/// What came of an attempt.
#[derive(Debug)]
pub enum Raised {
    /// It is up from that moment on.
    Up(Timestamp),
    /// Somebody held the collection for too long, or a majority did not have it in
    /// time: then it is up all the same, and has to be lifted.
    NotInTime,
}

/// The fence that a method needs, with what it replaces.
///
/// # Errors
/// A stop where one of the collections is not what it was, a refusal where one
/// refuses writes already.
pub async fn planned(mongo: &Mongo, method: &Method, renames: &Renames) -> Result<Fence> {
    if method.is_blocking_all {
        return Ok(Fence::WriteBlock);
    }
    Ok(Fence::Validator {
        live: Box::new(original(mongo, &renames.live, &renames.live_uuid).await?),
        incoming: Box::new(original(mongo, &renames.incoming, &renames.incoming_uuid).await?),
    })
}

async fn original(mongo: &Mongo, namespace: &Namespace, uuid: &Bson) -> Result<Validation> {
    let found = mongo.describe(namespace).await?;
    let found = found.filter(|found| found.uuid.as_ref() == Some(uuid)).ok_or_else(|| {
        Error::stopped(format!("{namespace} is no longer the collection that this job knows"))
    })?;
    let original = Validation::of(&found.options);
    if original.is_refusing() {
        return Err(Error::refused(format!("{namespace} refuses all writes already")).hint(format!(
            "was a cutover cut short? `mongorekey cutover --abort --source {namespace}` lifts what it has \
                 left; otherwise remove the validator {{$expr: false}}, if nobody needs it"
        )));
    }
    Ok(original)
}

/// Raises the part of a fence that nobody waits for: around the collection that
/// nobody uses yet.
///
/// # Errors
/// A stop where the server refuses.
pub async fn prepare(mongo: &Mongo, fence: &Fence, renames: &Renames, refusing: &Validation) -> Result<()> {
    if *fence == Fence::WriteBlock {
        return Ok(());
    }
    set(mongo, renames.incoming_now(), &renames.incoming_uuid, refusing).await
}

/// Raises a fence that is in the record already.
///
/// # Errors
/// A stop where the server refuses, or it is not known whether it is up.
pub async fn raise(
    mongo: &Mongo,
    fence: &Fence,
    renames: &Renames,
    refusing: &Validation,
    max_pause: Duration,
) -> Result<Raised> {
    let limit = (max_pause / 2).min(LONGEST_WAIT).max(Duration::from_millis(20));
    let raised = match fence {
        Fence::Validator { .. } => {
            mongo.set_validation(&renames.live, &renames.live_uuid, refusing, limit).await
        }
        Fence::WriteBlock => mongo.block_writes(true).await,
    };
    match raised {
        Ok(Some(moment)) => Ok(Raised::Up(moment)),
        Ok(None) => Err(Error::stopped("the server does not tell since when writes are held off")),
        Err(error) => match Obstacle::of(&error) {
            Obstacle::NotInTime | Obstacle::NotOnMajority => Ok(Raised::NotInTime),
            _ => Err(error).during(format!("holding off the writes to {}", renames.live)),
        },
    }
}

/// Lets writes through again that this attempt holds off, wherever the collection is
/// now. The fence of another attempt stays. Repeatable.
///
/// # Errors
/// A stop where the server refuses.
pub async fn lift(mongo: &Mongo, fence: &Fence, renames: &Renames, attempt: &str) -> Result<()> {
    match fence {
        Fence::WriteBlock => {
            retrying("letting all writes through again", || mongo.block_writes(false)).await.map(|_| ())
        }
        Fence::Validator { live, incoming } => {
            // First the one that the application waits for.
            lift_from(mongo, renames, &renames.incoming_uuid, incoming, attempt).await?;
            lift_from(mongo, renames, &renames.live_uuid, live, attempt).await
        }
    }
}

/// Restores the validator of a collection, whichever name it bears. One that was
/// dropped took its fence with it.
async fn lift_from(
    mongo: &Mongo,
    renames: &Renames,
    uuid: &Bson,
    original: &Validation,
    attempt: &str,
) -> Result<()> {
    // Whatever its name is: that of the copy may be somebody else's by now.
    let Some(namespace) = mongo.name_of(&renames.live.database, uuid).await? else { return Ok(()) };
    let found = mongo.describe(&namespace).await?.filter(|found| found.uuid.as_ref() == Some(uuid));
    match found {
        Some(found) if Validation::of(&found.options).is_fence_of(attempt) => {
            set(mongo, &namespace, uuid, original).await
        }
        _ => Ok(()),
    }
}

async fn set(mongo: &Mongo, namespace: &Namespace, uuid: &Bson, validation: &Validation) -> Result<()> {
    retrying(format!("changing which writes {namespace} refuses"), || {
        mongo.set_validation(namespace, uuid, validation, LIFTING)
    })
    .await
    .map(|_| ())
}
