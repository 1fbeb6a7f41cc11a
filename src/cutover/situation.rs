//! What became of a copy since it was made: whoever looks at its job later must know
//! which collection is which.

use bson::Document;

use super::record::{Record, State, mode_word};
use super::switch::stage::Stage;
use crate::error::{Error, Result};

/// What became of a copy.
#[derive(Debug, Clone)]
pub enum Situation {
    /// Its collection bears the live name.
    CutOver(Box<Record>),
    /// It did, and the former collection is live again.
    TakenBack(Box<Record>),
    /// The application is being deployed to it, or was.
    Switch {
        /// How far that is.
        stage: Stage,
        /// The collection that was copied.
        source: String,
        /// The copy.
        target: String,
    },
}

impl Situation {
    /// As the job tells; `None` where it was only copied, or copied anew since.
    ///
    /// # Errors
    /// A stop where its record can't be understood.
    pub fn of(job: &Document) -> Result<Option<Self>> {
        if let Some(stage) = Stage::of(job) {
            let identity = job.get_document("identity").cloned().unwrap_or_default();
            let name = |role: &str| identity.get_str(role).unwrap_or("a collection").to_owned();
            return Ok(Some(Self::Switch { stage, source: name("source"), target: name("target") }));
        }
        Ok(match Record::of(job)? {
            Some(record) if record.is_done() => Some(Self::CutOver(Box::new(record))),
            Some(record) if record.state == State::RolledBack && is_of_copy(&record, job) => {
                Some(Self::TakenBack(Box::new(record)))
            }
            _ => None,
        })
    }

    /// In words, for whoever looks at the job.
    pub fn sentence(&self) -> String {
        match self {
            Self::CutOver(record) => {
                let (live, mode) = (&record.renames.live, mode_word(record.mode));
                match &record.renames.retired {
                    Some(kept) => format!(
                        "Cut over by {mode}: {live} is the clean collection now, {kept} is the former one."
                    ),
                    None => format!(
                        "Cut over by {mode}: {live} is the clean collection now, the former one was dropped."
                    ),
                }
            }
            Self::TakenBack(record) => format!(
                "The cutover by {} was taken back: {} is the former collection again.",
                mode_word(record.mode),
                record.renames.live
            ),
            Self::Switch { stage, source, target } => match stage {
                Stage::Switching => format!("The application is being switched from {source} to {target}."),
                Stage::Switched => format!("The application was switched from {source} to {target}."),
                Stage::FeedingBack => format!(
                    "The application was switched from {source} to {target}, which is fed back to {source}."
                ),
                Stage::RolledBack => {
                    format!("The switch to {target} was taken back: {source} is the live collection again.")
                }
            },
        }
    }

    /// The refusal to compare source and copy of the job: they are not to be the same any more.
    pub fn not_compared(&self) -> Error {
        let error = Error::refused(format!("there is nothing to verify. {}", self.sentence()));
        match self {
            Self::CutOver(record) => match &record.renames.retired {
                Some(kept) => error.hint(format!(
                    "they differ by what was written since; to compare them all the same: --source {kept} --to {}",
                    record.renames.live
                )),
                None => error.hint("what it was made from is gone, so that nothing can be compared"),
            },
            Self::TakenBack(_) => error.hint(
                "the copy was live meanwhile and has what was written then: copy anew with `cleanse --restart`",
            ),
            Self::Switch { .. } => error.hint(
                "both sides were written to: `cutover --mode switch` tells where they differ; to compare them \
                 all the same name both by --source and --to",
            ),
        }
    }
}

/// Whether the collection that was live until a way back is still what the job has copied to.
fn is_of_copy(record: &Record, job: &Document) -> bool {
    job.get("target_uuid") == Some(&record.renames.live_uuid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::doc;

    #[test]
    fn a_job_tells_what_became_of_its_copy() {
        assert!(Situation::of(&doc! {}).expect("readable").is_none());
        let record = |state: &str, is_rollback: bool| {
            doc! {"target_uuid": 1, "identity": {"source": "a.b", "target": "a.c"}, "cutover": {
                "v": 1, "id": "x", "mode": "keep", "is_rollback": is_rollback, "state": state, "live": "a.b",
                "live_uuid": 1, "incoming": "a.c", "incoming_uuid": 2, "retired": "a.b_before",
            }}
        };
        let told = |job: &Document| Situation::of(job).expect("readable");
        assert!(told(&record("given_up", false)).is_none() && told(&record("fenced", false)).is_none());
        let cut_over = told(&record("finished", false)).expect("cut over");
        assert!(cut_over.sentence().contains("a.b_before is the former one"));
        let mut job = record("rolled_back", true);
        assert!(told(&job).expect("taken back").sentence().contains("was taken back"));
        job.insert("target_uuid", 3);
        assert!(told(&job).is_none(), "copied anew");
        for (stage, word) in [("switching", "is being switched"), ("rolled_back", "was taken back")] {
            let mut job = record("given_up", false);
            job.insert("switch", doc! {"stage": stage});
            let situation = told(&job).expect("a switch");
            assert!(situation.sentence().contains(word), "{stage}");
        }
    }
}
