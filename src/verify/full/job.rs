//! The job of a full comparison: whether an interrupted one goes on.

use bson::{Bson, Document, doc};

use super::progress::Ranges;
use crate::error::Result;
use crate::event::Events;
use crate::job::{Job, JobState, store};
use crate::mongo::Mongo;
use crate::mongo::range::Range;

/// The word of the command in the job document.
const COMMAND: &str = "verify";

/// What a comparison is about; an interrupted one goes on only for the same.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Name of the job.
    pub name: String,
    /// The two collections by name, and the rules.
    pub what: Document,
    /// The identities of the collections, which a drop and a rename end.
    pub uuids: Document,
}

/// The name of the comparison that belongs to a copy, beside that of the copy.
pub fn name_beside(copy: &str) -> String {
    format!("verify-{}", copy.strip_prefix("cleanse-").unwrap_or(copy))
}

/// Takes the job, to go on with it or to start over.
///
/// # Errors
/// A refusal where another process runs it.
pub async fn begin(mongo: &Mongo, identity: &Identity, restart: bool, events: &Events) -> Result<Job> {
    let stored = store::list(mongo, Some(&identity.name)).await?.into_iter().next();
    let goes_on = !restart && stored.as_ref().is_some_and(|stored| continues(stored, identity));
    if goes_on {
        return Job::start(mongo, &identity.name, COMMAND, &identity.what).await;
    }
    let was_begun =
        stored.as_ref().is_some_and(|stored| is_unfinished(stored) && layout_of(stored).is_some());
    let job =
        Job::restart(mongo, &identity.name, COMMAND, &identity.what, doc! {"layout": Bson::Null}).await?;
    if was_begun && !restart {
        events.note("collections or rules are not those of the interrupted comparison: starting over");
    }
    Ok(job)
}

/// Whether what is stored is an unfinished comparison of just this. Pure.
fn continues(stored: &Document, identity: &Identity) -> bool {
    is_unfinished(stored)
        && layout_of(stored).is_some()
        && stored.get_document("identity").is_ok_and(|what| *what == identity.what)
        && stored.get_document("uuids").is_ok_and(|uuids| *uuids == identity.uuids)
}

fn is_unfinished(stored: &Document) -> bool {
    let finished = [JobState::Completed, JobState::Incomplete].map(JobState::as_str);
    !stored.get_str("state").is_ok_and(|state| finished.contains(&state))
}

fn layout_of(stored: &Document) -> Option<i64> {
    stored.get("layout").and_then(Bson::as_i64)
}

/// The ranges that are begun already; `None` where there are none.
pub fn known_ranges(mongo: &Mongo, job: &Job) -> Option<Ranges> {
    job.stored("layout").and_then(Bson::as_i64).map(|layout| Ranges::of(mongo, job.name(), layout))
}

/// How long all runs of an unfinished comparison took so far.
pub fn seconds_before(job: &Job) -> f64 {
    let is_known = job.stored("layout").and_then(Bson::as_i64).is_some();
    job.stored("seconds").and_then(Bson::as_f64).filter(|_| is_known).unwrap_or(0.0)
}

/// Lays out the ranges of a new comparison. Until the layout is stored with the
/// job, what is begun does not count.
///
/// # Errors
/// A stop where they can't be stored.
pub async fn lay_out(mongo: &Mongo, job: &Job, identity: &Identity, tiles: &[Range]) -> Result<Ranges> {
    let layout = i64::from(rand::random::<u32>());
    let ranges = Ranges::of(mongo, job.name(), layout);
    ranges.create(tiles).await?;
    let fields =
        doc! {"layout": layout, "uuids": identity.uuids.clone(), "seconds": 0.0, "verdict": Bson::Null};
    job.save(fields).await?;
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_unfinished_comparison_of_the_same_goes_on() {
        let identity = Identity {
            name: "verify-a-to-b".into(),
            what: doc! {"source": "app.a", "target": "app.b", "rules": {"keep": "{}"}},
            uuids: doc! {"source": 1, "target": 2},
        };
        let stored = doc! {
            "state": "interrupted",
            "layout": 7_i64,
            "identity": identity.what.clone(),
            "uuids": identity.uuids.clone(),
        };
        assert!(continues(&stored, &identity));
        for state in ["running", "stopped"] {
            let mut other = stored.clone();
            other.insert("state", state);
            assert!(continues(&other, &identity), "{state}");
        }
        for (field, value) in [
            ("state", Bson::from("completed")),
            ("state", "incomplete".into()),
            ("layout", Bson::Null),
            ("identity", doc! {"source": "app.a", "target": "app.b", "rules": {"keep": "{\"a\":1}"}}.into()),
            ("uuids", doc! {"source": 1, "target": 3}.into()),
        ] {
            let mut other = stored.clone();
            other.insert(field, value);
            assert!(!continues(&other, &identity), "{field}");
        }
    }
}
