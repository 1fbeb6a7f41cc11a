//! How far a switch is, as the job document tells.

use bson::{Bson, Document, doc};

use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::job::Job;

/// The field of the job document.
pub const FIELD: &str = "switch";

/// How far a switch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The new collection may be written to, and follows the old one.
    Switching,
    /// The old collection was quiet for long enough.
    Switched,
    /// The old collection follows the new one.
    FeedingBack,
    /// The application is on the old collection again.
    RolledBack,
}

impl Stage {
    const ALL: [Self; 4] = [Self::Switching, Self::Switched, Self::FeedingBack, Self::RolledBack];

    /// The word that is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Switching => "switching",
            Self::Switched => "switched",
            Self::FeedingBack => "feeding_back",
            Self::RolledBack => "rolled_back",
        }
    }

    /// How far the switch of a job is; `None` where there is none.
    pub fn of(job: &Document) -> Option<Self> {
        let stored = job.get_document(FIELD).ok()?.get_str("stage").ok()?;
        Self::ALL.into_iter().find(|stage| stage.as_str() == stored)
    }

    /// Stores how far it is.
    ///
    /// # Errors
    /// A stop where that can't be stored.
    pub async fn save(self, job: &Job) -> Result<()> {
        job.save(doc! {format!("{FIELD}.v"): 1, format!("{FIELD}.stage"): self.as_str()}).await
    }
}

/// The refusal of whatever would use a copy whose switch was taken back.
pub fn taken_back(source: &Namespace, target: &Namespace) -> Error {
    Error::refused(format!(
        "the switch to {target} was taken back: it lacks what was written to {source} since"
    ))
    .hint("`cleanup` forgets the job; drop the former copy then, and copy anew by `cleanse`")
}

/// The sessions of the writes of all runs so far.
pub fn sessions(job: &Document) -> Vec<Document> {
    let stored = job.get_document(FIELD).ok().and_then(|switch| switch.get_array("sessions").ok());
    let sessions = stored.map(Vec::as_slice).unwrap_or_default();
    sessions.iter().filter_map(Bson::as_document).cloned().collect()
}

/// What a session's events are known by.
pub fn session_id(session: &Document) -> Option<Vec<u8>> {
    match session.get("id") {
        Some(Bson::Binary(id)) => Some(id.bytes.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_read_as_it_was_stored() {
        for stage in Stage::ALL {
            assert_eq!(Stage::of(&doc! {FIELD: {"stage": stage.as_str()}}), Some(stage));
        }
        assert_eq!(Stage::of(&doc! {}), None);
    }
}
