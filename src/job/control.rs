//! Live control: what operators ask of a running job, from any machine.
//!
//! A wish is written into the job document, with who made it and when; the
//! runner sees it with the next renewal of its lease, within a second.

use bson::{Bson, Document, doc};
use mongodb::Collection;
use mongodb::options::ReturnDocument;
use tokio::sync::watch;

use super::holder::Holder;
use super::store::{self, COLLECTION};
use crate::config::values::{Concurrency, Tps};
use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::index::whole_number;

/// So many changes are remembered in a job document.
const AUDITED: i32 = 200;

/// One wish.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// Make no calls until further notice.
    Pause,
    /// Go on.
    Resume,
    /// Finish what is under way, save, end.
    Stop,
    /// Another ceiling.
    Tps(Tps),
    /// Candidates per read.
    Chunk(usize),
    /// Calls in flight.
    Concurrency(Concurrency),
    /// Documents that are copied or caught up with per second; 0 means no limit.
    DocumentsPerSecond(u32),
}

impl Change {
    /// Reads `tps=20`, `chunk=500`, `concurrency=auto` or `documents-per-second=2000`.
    ///
    /// # Errors
    /// A message for people.
    pub fn parse_setting(text: &str) -> Result<Self, String> {
        let (name, value) =
            text.split_once('=').ok_or_else(|| format!("`{text}` is not of the form name=value"))?;
        match name {
            "tps" => value.parse().map(Self::Tps),
            "chunk" => match value.parse() {
                Ok(chunk) if (1..=100_000).contains(&chunk) => Ok(Self::Chunk(chunk)),
                _ => Err(format!("`{value}`: a chunk must be from 1 to 100000")),
            },
            "concurrency" => value.parse().map(Self::Concurrency),
            "documents-per-second" => value
                .parse()
                .map(Self::DocumentsPerSecond)
                .map_err(|_| format!("`{value}`: documents per second are a whole number, 0 means no limit")),
            _ => Err(format!("`{name}` can't be set; tps, chunk, concurrency and documents-per-second can")),
        }
    }

    /// The field of `control` it goes into.
    fn field(&self) -> &'static str {
        match self {
            Self::Pause | Self::Resume => "paused",
            Self::Stop => "stop",
            Self::Tps(_) => "tps",
            Self::Chunk(_) => "chunk",
            Self::Concurrency(_) => "concurrency",
            Self::DocumentsPerSecond(_) => "documents_per_second",
        }
    }

    /// Whether a run of that command can do as it is told.
    fn suits(&self, command: &str) -> bool {
        match self {
            Self::Stop => matches!(command, "backfill" | "cleanse" | "verify"),
            Self::Pause | Self::Resume => matches!(command, "backfill" | "cleanse"),
            Self::Tps(_) | Self::Chunk(_) | Self::Concurrency(_) => command == "backfill",
            Self::DocumentsPerSecond(_) => command == "cleanse",
        }
    }

    fn value(&self) -> Bson {
        match self {
            Self::Pause => true.into(),
            Self::Resume => false.into(),
            // Which run is to stop: the next one is not.
            Self::Stop => "$fence".into(),
            Self::Tps(tps) => tps.per_second().into(),
            Self::Chunk(chunk) => i64::try_from(*chunk).unwrap_or(i64::MAX).into(),
            Self::Concurrency(concurrency) => concurrency.to_string().into(),
            Self::DocumentsPerSecond(documents) => i64::from(*documents).into(),
        }
    }

    /// Settings hold in place of what the run was started with; `paused` and
    /// `stop` stand for themselves.
    fn is_setting(&self) -> bool {
        !matches!(self, Self::Pause | Self::Resume | Self::Stop)
    }

    /// The stages that write it down: the wish and its audit entry.
    fn stages(&self, who: &str) -> Vec<Document> {
        let field = self.field();
        let (before, wish): (Bson, Bson) = if self.is_setting() {
            let configured = format!("$settings.{field}");
            (
                doc! {"$ifNull": [format!("$control.{field}.value"), &configured]}.into(),
                doc! {"value": {"$literal": self.value()}, "instead_of": configured}.into(),
            )
        } else {
            (doc! {"$ifNull": [format!("$control.{field}"), Bson::Null]}.into(), self.value())
        };
        let entry = doc! {
            "at": "$$NOW",
            "who": {"$literal": who},
            "what": field,
            "from": before,
            "to": if self.is_setting() { doc! {"$literal": self.value()}.into() } else { self.value() },
        };
        let audit = doc! {"$slice": [
            {"$concatArrays": [{"$ifNull": ["$audit", []]}, [entry]]},
            -AUDITED,
        ]};
        vec![doc! {"$set": {"audit": audit}}, doc! {"$set": {format!("control.{field}"): wish}}]
    }
}

/// What operators want of a run at this moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Control {
    /// Make no calls.
    pub paused: bool,
    /// End.
    pub stop: bool,
    /// Instead of the ceiling that the run was started with.
    pub tps: Option<Tps>,
    /// Instead of the chunk size that the run was started with.
    pub chunk: Option<usize>,
    /// Instead of the concurrency that the run was started with.
    pub concurrency: Option<Concurrency>,
    /// Instead of the documents per second that the run was started with.
    pub documents_per_second: Option<u32>,
}

impl Control {
    /// Reads the wishes of a job document. A setting that was changed in place
    /// of another value than the run has now is outdated: whoever started the
    /// run with a new value knew better.
    pub fn read(job: &Document) -> Self {
        let Ok(control) = job.get_document("control") else { return Self::default() };
        let settings = job.get_document("settings").ok();
        let setting = |name: &str| {
            let wish = control.get_document(name).ok()?;
            let current = settings.and_then(|settings| settings.get(name));
            (wish.get("instead_of") == current).then(|| wish.get("value")).flatten()
        };
        Self {
            paused: control.get_bool("paused").unwrap_or(false),
            stop: control.get("stop").is_some_and(|fence| Some(fence) == job.get("fence")),
            tps: setting("tps").and_then(Bson::as_f64).and_then(|tps| Tps::new(tps).ok()),
            chunk: setting("chunk").and_then(whole_number).and_then(|chunk| usize::try_from(chunk).ok()),
            concurrency: setting("concurrency").and_then(Bson::as_str).and_then(|text| text.parse().ok()),
            documents_per_second: setting("documents_per_second")
                .and_then(whole_number)
                .and_then(|documents| u32::try_from(documents).ok()),
        }
    }
}

/// Who made the last wish, as far as it is known.
pub fn last_wish_by(job: &Document) -> &str {
    job.get_array("audit")
        .ok()
        .and_then(|audit| audit.last())
        .and_then(Bson::as_document)
        .and_then(|entry| entry.get_str("who").ok())
        .unwrap_or("somebody")
}

/// Waits until this run is asked to stop; returns who asked, or `None` where the
/// run ends without.
pub async fn stop_asked(mut documents: watch::Receiver<Document>) -> Option<String> {
    let asked = documents.wait_for(|document| Control::read(document).stop).await.ok()?;
    Some(last_wish_by(&asked).to_owned())
}

/// Writes wishes into a job document; returns the document as it is then.
///
/// # Errors
/// A refusal where there is no such job, nobody runs it, or it can't be steered.
pub async fn request(mongo: &Mongo, job: &str, changes: &[Change]) -> Result<Document> {
    let stored = store::find(mongo, job).await?.ok_or_else(|| {
        Error::refused(format!("there is no job `{job}`")).hint("`mongorekey status` lists all jobs")
    })?;
    let command = stored.get_str("command").unwrap_or("unknown");
    if let Some(change) = changes.iter().find(|change| !change.suits(command)) {
        return Err(unsuitable(job, command, change));
    }
    // A pause outlives a restart, so it may be asked for and ended at any time.
    let needs_runner = changes.iter().any(|change| !matches!(change, Change::Pause | Change::Resume));
    if needs_runner && !store::is_running(&stored) {
        return Err(Error::refused(format!("nobody runs the job `{job}`"))
            .hint("give what you want as options when you start it"));
    }
    let who = who();
    let stages: Vec<Document> = changes.iter().flat_map(|change| change.stages(&who)).collect();
    let collection: Collection<Document> = mongo.state(COLLECTION);
    let updated = retrying(format!("steering the job {job}"), || {
        let update = collection
            .find_one_and_update(doc! {"_id": job}, stages.clone())
            .return_document(ReturnDocument::After);
        async move { update.await }
    })
    .await?;
    updated.ok_or_else(|| Error::refused(format!("the job `{job}` has just been removed")))
}

/// Says what can be asked of a job instead.
fn unsuitable(job: &str, command: &str, change: &Change) -> Error {
    let hint = match command {
        "backfill" => "a backfill takes pause, resume, stop and set with tps, chunk and concurrency",
        "cleanse" => "a cleanse takes pause, resume, stop and set with documents-per-second",
        "verify" => "a comparison takes stop; started again, it goes on where it was",
        _ => "a signal (SIGTERM) ends it safely; the same command resumes it",
    };
    let asked = change.field().replace('_', "-");
    Error::refused(format!("`{job}` is a {command}, which knows no `{asked}`")).hint(hint)
}

/// The person behind this process, as well as it can be told.
fn who() -> String {
    let user = ["SUDO_USER", "USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok());
    let holder = Holder::current();
    format!("{}@{} ({holder})", user.unwrap_or_else(|| "unknown".into()), holder.host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_checked() {
        let tps = Change::parse_setting("tps=0.5").expect("valid");
        assert_eq!(tps, Change::Tps(Tps::new(0.5).expect("valid")));
        assert_eq!(Change::parse_setting("chunk=5"), Ok(Change::Chunk(5)));
        assert_eq!(Change::parse_setting("concurrency=auto"), Ok(Change::Concurrency(Concurrency::Auto)));
        assert_eq!(Change::parse_setting("documents-per-second=0"), Ok(Change::DocumentsPerSecond(0)));
        for bad in [
            "tps",
            "tps=0",
            "tps=x",
            "chunk=0",
            "concurrency=0",
            "documents-per-second=-1",
            "documents-per-second=many",
            "speed=9",
            "",
        ] {
            assert!(Change::parse_setting(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn each_command_is_asked_only_what_it_can_do() {
        let (tps, documents) = (Change::Tps(Tps::new(5.0).expect("valid")), Change::DocumentsPerSecond(5));
        for (change, command, suits) in [
            (&tps, "backfill", true),
            (&tps, "cleanse", false),
            (&documents, "cleanse", true),
            (&documents, "backfill", false),
            (&Change::Pause, "cleanse", true),
            (&Change::Pause, "verify", false),
            (&Change::Stop, "verify", true),
            (&Change::Stop, "key-map", false),
        ] {
            assert_eq!(change.suits(command), suits, "{change:?} of {command}");
        }
    }

    #[test]
    fn wishes_for_other_settings_or_runs_do_not_count() {
        let mut job = doc! {
            "fence": 7_i64,
            "settings": {"tps": 10.0, "chunk": 1000_i64, "concurrency": "auto"},
            "control": {
                "paused": true,
                "stop": 7_i64,
                "tps": {"value": 5.0, "instead_of": 10.0},
                "chunk": {"value": 50_i64, "instead_of": 900_i64},
            },
        };
        let control = Control::read(&job);
        assert!(control.paused && control.stop);
        assert_eq!(control.tps, Tps::new(5.0).ok());
        assert_eq!((control.chunk, control.concurrency), (None, None));
        job.insert("fence", 8_i64);
        assert!(!Control::read(&job).stop, "a stop is for one run");
        assert_eq!(Control::read(&doc! {}), Control::default());
    }
}
