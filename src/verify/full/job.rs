//! The job of a full comparison: whether an interrupted one goes on.

use bson::{Bson, DateTime, Document, doc};

use super::progress::Ranges;
use crate::cutover::gates::CHANGED_AT;
use crate::error::Result;
use crate::event::Events;
use crate::job::{Job, JobState, store};
use crate::mongo::Mongo;
use crate::mongo::feed::after;
use crate::mongo::range::Range;

/// The word of the command in the job document.
const COMMAND: &str = "verify";

/// The field of the job with the moment from which writes may not have been compared.
pub const SINCE: &str = "since";

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

/// The same for the comparison of what the copy has put into its quarantine.
pub fn quarantine_name_beside(copy: &str) -> String {
    format!("{}-quarantine", name_beside(copy))
}

/// Takes the job, to go on with it or to start over.
///
/// # Errors
/// A refusal where another process runs it.
pub async fn begin(
    mongo: &Mongo,
    identity: &Identity,
    copy: &str,
    restart: bool,
    events: &Events,
) -> Result<Job> {
    let stored = store::find(mongo, &identity.name).await?;
    let begun = stored.filter(|stored| !restart && is_unfinished(stored) && layout_of(stored).is_some());
    let outdated = match &begun {
        Some(begun) => {
            let copy = store::find(mongo, copy).await?;
            outdated(begun, identity, copy.as_ref())
        }
        None => None,
    };
    if begun.is_some() && outdated.is_none() {
        return Job::start(mongo, &identity.name, COMMAND, &identity.what).await;
    }
    let job =
        Job::restart(mongo, &identity.name, COMMAND, &identity.what, doc! {"layout": Bson::Null}).await?;
    if let Some(why) = outdated {
        events.note(format!("{why}: starting over"));
    }
    Ok(job)
}

/// Why an unfinished comparison proves nothing any more; `None` where it goes on. `copy` is the
/// job that has made the target, if any has. Pure.
fn outdated(begun: &Document, identity: &Identity, copy: Option<&Document>) -> Option<&'static str> {
    let is_same = begun.get_document("identity").is_ok_and(|what| *what == identity.what)
        && begun.get_document("uuids").is_ok_and(|uuids| *uuids == identity.uuids);
    if !is_same {
        return Some("collections or rules are not those of the interrupted comparison");
    }
    // What it has found equal was read before the change. A job that does not tell when that was
    // had not finished its copy.
    let is_newer = |copy: &Document| match (begun.get_datetime("begun_at"), copy.get_datetime(CHANGED_AT)) {
        (Ok(begun), Ok(changed)) => begun > changed,
        _ => false,
    };
    (!copy.is_none_or(is_newer)).then_some("the copy was changed since the comparison began")
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
    // Before anything is read: what is written later may not have been compared.
    let since = after(mongo.majority_time().await?);
    let begun_at = DateTime::now();
    let ranges = Ranges::of(mongo, job.name(), layout);
    ranges.create(tiles).await?;
    let fields = doc! {
        "layout": layout,
        "begun_at": begun_at,
        SINCE: since,
        "uuids": identity.uuids.clone(),
        "seconds": 0.0,
        "verdict": Bson::Null,
    };
    job.save(fields).await?;
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            name: "verify-a-to-b".into(),
            what: doc! {"source": "app.a", "target": "app.b", "rules": {"keep": "{}"}},
            uuids: doc! {"source": 1, "target": 2},
        }
    }

    fn begun() -> Document {
        doc! {
            "state": "interrupted",
            "layout": 7_i64,
            "begun_at": DateTime::from_millis(2_000),
            "identity": identity().what,
            "uuids": identity().uuids,
        }
    }

    #[test]
    fn only_an_unfinished_comparison_of_the_same_goes_on() {
        assert_eq!(outdated(&begun(), &identity(), None), None);
        for (state, expected) in [
            ("interrupted", true),
            ("running", true),
            ("stopped", true),
            ("completed", false),
            ("incomplete", false),
        ] {
            assert_eq!(is_unfinished(&doc! {"state": state}), expected, "{state}");
        }
        for (field, value) in [
            ("identity", doc! {"source": "app.a", "target": "app.b", "rules": {"keep": "{\"a\":1}"}}),
            ("uuids", doc! {"source": 1, "target": 3}),
        ] {
            let mut other = begun();
            other.insert(field, value);
            assert!(outdated(&other, &identity(), None).is_some(), "{field}");
        }
    }

    #[test]
    fn what_was_read_before_the_last_change_of_the_copy_does_not_count() {
        let changed = |at| doc! {CHANGED_AT: DateTime::from_millis(at)};
        assert_eq!(outdated(&begun(), &identity(), Some(&changed(1_999))), None);
        assert!(outdated(&begun(), &identity(), Some(&changed(2_000))).is_some());
        assert!(outdated(&begun(), &identity(), Some(&doc! {})).is_some(), "a copy that is not finished");
        let mut unknown = begun();
        unknown.remove("begun_at");
        assert!(outdated(&unknown, &identity(), Some(&changed(1_999))).is_some());
    }
}
