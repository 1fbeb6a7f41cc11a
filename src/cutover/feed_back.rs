//! `cutover --feed-back`: after an exchange of names that kept the old collection,
//! what is written to the live one is brought back into it until that is stopped.
//! So a rollback has little left to do, however far back the cutover is and however
//! short the oplog.

use tokio_util::sync::CancellationToken;

use super::report::Report;
use super::rollback::{backward, check, cut_over, renames, take_kept_position};
use super::run::stored_job;
use crate::cleanse::follow::{Followed, Follower};
use crate::cleanse::steer::Steered;
use crate::error::{Class, Error, Result};
use crate::job::Job;
use crate::mongo::feed::Position;

/// Feeds back until it is stopped, which is the only end.
///
/// # Errors
/// The interruption; a refusal where the old collection is not there or the oplog
/// no longer reaches back; a stop where a document can't be brought back.
pub async fn run(steered: &Steered, job: &Job, report: &mut Report) -> Result<()> {
    let context = &steered.context;
    let stored = stored_job(context, job.name()).await?;
    let record = cut_over(job.name(), &stored)?;
    let renames = renames(job, &stored, &record)?;
    let options = check(context, &renames).await?;
    let follower = backward(steered, job, &renames.live, &renames.incoming, options);
    let position = take_kept_position(job, &stored).await?.ok_or_else(|| {
        Error::refused(format!(
            "the job {} does not tell from where {} is to be followed",
            job.name(),
            renames.live
        ))
    })?;
    let followed = report.feed_back.insert(Followed::default());
    follow(&follower, position, &context.stop, followed).await?;
    Err(context.interrupted("interrupted; started again it goes on feeding back"))
}

async fn follow(
    follower: &Follower<'_>,
    mut position: Position,
    stop: &CancellationToken,
    followed: &mut Followed,
) -> Result<()> {
    let mut lanes = follower.catch_up().await?;
    let reached = follower.drain(&mut lanes, &mut position, false, stop, followed).await;
    let reached = reached.map_err(|error| match error.class() {
        Class::Refused => Error::refused(error.message()).hint(format!(
            "what was written to {} since then can't be brought back any more; `rollback \
             --discard-writes-since-cutover` goes back without it",
            follower.source
        )),
        _ => error,
    })?;
    if reached {
        follower.events.note(format!("{} is up to date and follows {}", follower.target, follower.source));
        follower.drain(&mut lanes, &mut position, true, stop, followed).await?;
    }
    Ok(())
}
