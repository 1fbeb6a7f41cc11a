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
const LONGEST_WAIT: Duration = Duration::from_millis(500);
/// So long an attempt to let writes through again waits for open transactions: it
/// is repeated, because everybody else waits behind it.
const LIFTING: Duration = Duration::from_millis(300);

/// What came of an attempt.
#[derive(Debug)]
pub enum Raised {
    /// It is up from that moment on.
    Up(Timestamp),
    /// Somebody held the collection for too long; nothing is held off.
    NotInTime,
}

/// The fence that a method needs, with what it replaces.
///
/// # Errors
/// A stop where the live collection can't be looked at.
pub async fn planned(mongo: &Mongo, method: &Method, renames: &Renames) -> Result<Fence> {
    if method.is_blocking_all {
        return Ok(Fence::WriteBlock);
    }
    let live = mongo.describe(&renames.live).await?;
    let live = live.filter(|live| live.uuid.as_ref() == Some(&renames.live_uuid)).ok_or_else(|| {
        Error::stopped(format!("{} is no longer the collection that was copied", renames.live))
    })?;
    let original = Validation::of(&live.options);
    if original == Validation::refusing() {
        return Err(Error::refused(format!("{} refuses all writes already", renames.live))
            .hint("remove its validator {$expr: false} first, if nobody needs it"));
    }
    Ok(Fence::Validator(original))
}

/// Raises a fence that is in the record already.
///
/// # Errors
/// A stop where the server refuses, or it is not known whether it is up.
pub async fn raise(mongo: &Mongo, fence: &Fence, renames: &Renames, max_pause: Duration) -> Result<Raised> {
    let limit = (max_pause / 2).min(LONGEST_WAIT).max(Duration::from_millis(20));
    let raised = match fence {
        Fence::Validator(_) => {
            let refusing = Validation::refusing();
            mongo.set_validation(&renames.live, &renames.live_uuid, &refusing, limit).await
        }
        Fence::WriteBlock => mongo.block_writes(true).await,
    };
    match raised {
        Ok(Some(moment)) => Ok(Raised::Up(moment)),
        Ok(None) => Err(Error::stopped("the server does not tell since when writes are held off")),
        Err(error) if Obstacle::of(&error) == Obstacle::NotInTime => Ok(Raised::NotInTime),
        Err(error) => Err(error).during(format!("holding off the writes to {}", renames.live)),
    }
}

/// Lets writes through again, wherever the collection is now. Repeatable.
///
/// # Errors
/// A stop where the server refuses.
pub async fn lift(mongo: &Mongo, fence: &Fence, renames: &Renames) -> Result<()> {
    match fence {
        Fence::WriteBlock => {
            retrying("letting all writes through again", || mongo.block_writes(false)).await.map(|_| ())
        }
        Fence::Validator(original) => {
            for namespace in std::iter::once(&renames.live).chain(&renames.retired) {
                let found = mongo.describe(namespace).await?;
                if let Some(found) = found.filter(|found| found.uuid.as_ref() == Some(&renames.live_uuid)) {
                    if Validation::of(&found.options) != Validation::refusing() {
                        return Ok(());
                    }
                    return restore(mongo, namespace, &renames.live_uuid, original).await;
                }
            }
            // It was dropped, and its fence with it.
            Ok(())
        }
    }
}

async fn restore(mongo: &Mongo, namespace: &Namespace, uuid: &Bson, original: &Validation) -> Result<()> {
    retrying(format!("letting the writes to {namespace} through again"), || {
        mongo.set_validation(namespace, uuid, original, LIFTING)
    })
    .await
    .map(|_| ())
}
