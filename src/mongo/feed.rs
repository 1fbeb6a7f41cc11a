//! The change feed of a collection: which documents were touched, and how far
//! one has to read to have seen everything up to a moment.

use std::collections::HashSet;
use std::time::Duration;

use bson::{Bson, Document, RawBson, RawDocumentBuf, Timestamp, doc};
use mongodb::change_stream::ChangeStream;
use mongodb::change_stream::event::ResumeToken;
use mongodb::error::{Error as DriverError, ErrorKind};
use mongodb::options::FullDocumentBeforeChangeType;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Mongo;
use super::command::{is_transient, retrying};
use super::exact;
use super::watched::{Member, Watched};
use crate::error::{Context, Error, Result};

/// For how long changes are gathered that keep coming.
const WAIT: Duration = Duration::from_millis(500);
/// How long the server waits for a change before it answers that there is none, and
/// how far that holds. Whoever ends a run waits for that answer too.
const ANSWER: Duration = Duration::from_millis(100);
/// The same where somebody waits for the answer.
const SHORT_WAIT: Duration = Duration::from_millis(10);
/// Changes per answer of the server: without a limit it sends megabytes at once,
/// each change with a token several times its size.
const FETCHED: u32 = 2_000;
/// The server's codes for a token that its oplog no longer holds.
const LOST: [i32; 4] = [136, 222, 280, 286];
/// How long to try to open a feed again, through elections.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two tries.
const RETRY: Duration = Duration::from_millis(500);
/// While a feed rests, the oplog is asked this often.
const LOOK: Duration = Duration::from_millis(250);

/// From where a feed is read.
#[derive(Debug, Clone, PartialEq)]
pub enum Position {
    /// From a moment on.
    Time(Timestamp),
    /// After what this token stands for.
    Token(Bson),
}

impl Position {
    /// As it is stored in a job.
    pub fn to_document(&self) -> Document {
        match self {
            Self::Time(time) => doc! {"time": *time},
            Self::Token(token) => doc! {"token": token.clone()},
        }
    }

    /// Reads what [`Position::to_document`] made.
    pub fn from_document(document: &Document) -> Option<Self> {
        match (document.get("token"), document.get("time")) {
            (Some(token), _) => Some(Self::Token(token.clone())),
            (None, Some(Bson::Timestamp(time))) => Some(Self::Time(*time)),
            _ => None,
        }
    }

    /// Whether it is not before that moment.
    pub fn has_reached(&self, moment: Timestamp) -> bool {
        self.time().is_some_and(|time| (time.time, time.increment) >= (moment.time, moment.increment))
    }

    /// The moment it stands for.
    pub fn time(&self) -> Option<Timestamp> {
        match self {
            Self::Time(time) => Some(*time),
            Self::Token(token) => token_time(token),
        }
    }
}

/// The moment that a token stands for. Tokens are strings of hexadecimal digits
/// that begin with the type of a timestamp and its eight bytes.
fn token_time(token: &Bson) -> Option<Timestamp> {
    let data = token.as_document()?.get_str("_data").ok()?;
    let digits = data.strip_prefix("82")?;
    let time = u32::from_str_radix(digits.get(..8)?, 16).ok()?;
    let increment = u32::from_str_radix(digits.get(8..16)?, 16).ok()?;
    Some(Timestamp { time, increment })
}

/// What was read at once.
#[derive(Debug, Default)]
pub struct Changes {
    /// The `_id`s of touched documents, in order, repeated where they were
    /// touched again.
    pub touched: Vec<RawBson>,
    /// For each of `touched` the session of the transaction that touched it, where
    /// it was one.
    pub sessions: Vec<Option<Vec<u8>>>,
    /// Those of them that were written, not deleted.
    pub written: Vec<RawBson>,
    /// Those of them that were deleted.
    pub deleted: Vec<RawBson>,
    /// Documents of other collections that were touched, which decide about ours.
    pub members: Vec<Member>,
    /// The moment of the last of them.
    pub time: Option<Timestamp>,
    /// When documents came and went: true where one came.
    pub came_or_went: Vec<(Timestamp, bool)>,
    /// Whether the options of the collection were changed.
    pub modified: bool,
    /// What ended the collection as we know it, such as `drop`.
    pub ended_by: Option<Ended>,
}

impl Changes {
    /// Whether nothing after this may be read at once with it.
    fn is_turn(&self) -> bool {
        self.modified || self.ended_by.is_some()
    }
}

/// What ended a collection as it was known.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// The type of the event.
    pub event: String,
    /// When it happened.
    pub at: Option<Timestamp>,
}

impl Changes {
    /// The `_id`s of what others touched than transactions of these sessions.
    pub fn by_others(&self, ours: &HashSet<Vec<u8>>) -> Vec<RawBson> {
        let is_ours = |session: &Option<Vec<u8>>| session.as_ref().is_some_and(|id| ours.contains(id));
        let touched = self.touched.iter().zip(&self.sessions);
        touched.filter(|(_, session)| !is_ours(session)).map(|(id, _)| id.clone()).collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.touched.len() + self.members.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An open feed.
pub struct Feed {
    mongo: Mongo,
    watched: Watched,
    stream: ChangeStream<RawDocumentBuf>,
    position: Position,
    wait: Duration,
}

impl Mongo {
    /// A moment that every majority read from now on has reached: a feed from
    /// here on misses nothing that such a read does not see.
    ///
    /// # Errors
    /// A refusal where this is no replica set.
    pub async fn majority_time(&self) -> Result<Timestamp> {
        let hello = self.hello().await?;
        hello
            .get_document("lastWrite")
            .and_then(|last| last.get_document("majorityOpTime"))
            .ok()
            .and_then(|time| time.get_timestamp("ts").ok())
            .ok_or_else(|| {
                Error::refused("changes can only be followed on a replica set")
                    .hint("a replica set of one member will do")
            })
    }

    /// The moment of the last write so far, whatever its durability.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn last_write_time(&self) -> Result<Timestamp> {
        let hello = self.hello().await?;
        let last = hello.get_document("lastWrite").and_then(|last| last.get_document("opTime"));
        last.ok()
            .and_then(|time| time.get_timestamp("ts").ok())
            .ok_or_else(|| Error::stopped("the server does not tell its last write"))
    }

    /// Opens a feed.
    ///
    /// # Errors
    /// A refusal where the oplog no longer reaches back that far, a stop where
    /// the server can't be read.
    pub async fn feed(&self, watched: &Watched, from: Position) -> Result<Feed> {
        self.feed_waiting(watched, from, WAIT).await
    }

    /// Opens a feed that answers at once: in small portions, with the price of
    /// asking the server many times a second.
    ///
    /// # Errors
    /// As [`Mongo::feed`].
    pub async fn prompt_feed(&self, watched: &Watched, from: Position) -> Result<Feed> {
        self.feed_waiting(watched, from, SHORT_WAIT).await
    }

    async fn feed_waiting(&self, watched: &Watched, from: Position, wait: Duration) -> Result<Feed> {
        let stream = open(self, watched, &from, wait).await?;
        // Where nothing has changed, the server says at once how far that holds.
        let token = stream.resume_token().and_then(|token| bson::serialize_to_bson(&token).ok());
        let position = token.map_or(from, Position::Token);
        Ok(Feed { mongo: self.clone(), watched: watched.clone(), stream, position, wait })
    }
}

async fn open(
    mongo: &Mongo,
    watched: &Watched,
    from: &Position,
    wait: Duration,
) -> Result<ChangeStream<RawDocumentBuf>> {
    let namespace = &watched.source;
    let collection = mongo.collection(namespace).clone_with_type::<Document>();
    let database = mongo.database(&namespace.database);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut watch = if watched.memberships.is_empty() { collection.watch() } else { database.watch() };
        watch = watch
            .pipeline(watched.pipeline())
            .show_expanded_events(true)
            .read_concern(mongodb::options::ReadConcern::majority())
            .batch_size(FETCHED)
            .max_await_time(wait.min(ANSWER));
        if watched.needs_images() {
            // Not every collection has them, and those that must are checked.
            watch = watch.full_document_before_change(FullDocumentBeforeChangeType::WhenAvailable);
        }
        watch = match from {
            Position::Time(time) => watch.start_at_operation_time(*time),
            Position::Token(token) => watch.start_after(read_token(token)?),
        };
        match watch.await {
            Ok(stream) => return Ok(stream.with_type()),
            Err(error) if is_lost(&error) => {
                return Err(Error::refused(format!(
                    "the oplog no longer holds the changes of {namespace} since the last run"
                ))
                .hint("copy anew with --restart; a larger oplog bridges longer pauses"));
            }
            Err(error) if is_transient(&error) && Instant::now() < deadline => {
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(error).during(format!("opening the change stream of {namespace}")),
        }
    }
}

fn read_token(token: &Bson) -> Result<ResumeToken> {
    bson::deserialize_from_bson(token.clone())
        .map_err(|error| Error::stopped(format!("the stored resume token can't be read: {error}")))
}

fn is_lost(error: &DriverError) -> bool {
    matches!(error.kind.as_ref(), ErrorKind::Command(command) if LOST.contains(&command.code))
}

impl Feed {
    /// The next changes: at most so many, fewer or none where there are no more
    /// for a moment, or have been coming for half a second.
    ///
    /// # Errors
    /// A refusal where the oplog no longer holds what comes next.
    pub async fn next(&mut self, most: usize) -> Result<Changes> {
        let mut changes = Changes::default();
        let began = Instant::now();
        // Few changes that never pause must not be waited for until they are many.
        while changes.len() < most && !changes.is_turn() && began.elapsed() < self.wait {
            match self.stream.next_if_any().await {
                Ok(Some(event)) => take(&self.watched, &event, &mut changes),
                Ok(None) => break,
                Err(error) if is_lost(&error) || is_transient(&error) => {
                    // The driver has tried to go on by itself already.
                    self.stream = open(&self.mongo, &self.watched, &self.position, self.wait).await?;
                    return Ok(Changes::default());
                }
                Err(error) => return Err(error).during(format!("following {}", self.watched.source)),
            }
        }
        if let Some(token) = self.stream.resume_token() {
            let token = bson::serialize_to_bson(&token)
                .map_err(|error| Error::stopped(format!("a resume token can't be stored: {error}")))?;
            self.position = Position::Token(token);
        }
        Ok(changes)
    }

    /// Moves on without reading while nothing happens: for so long as the oplog
    /// itself tells that, and `ended` is not cancelled, but no longer than `most`.
    /// Returns whether the oplog tells anything at all.
    ///
    /// # Errors
    /// A refusal where the oplog no longer holds what comes next.
    pub async fn rest(&mut self, most: Duration, ended: &CancellationToken) -> Result<bool> {
        let began = Instant::now();
        let (mut has_moved, mut can_tell) = (false, true);
        while can_tell && began.elapsed() < most && !ended.is_cancelled() {
            let _ended = tokio::time::timeout(LOOK, ended.cancelled()).await;
            let Some(after) = self.position.time() else { break };
            let until = self.mongo.majority_time().await?;
            match self.mongo.is_quiet(&self.watched, after, until).await {
                Some(true) => {
                    self.position = Position::Time(until);
                    has_moved = true;
                }
                Some(false) => break,
                None => can_tell = false,
            }
        }
        if has_moved {
            self.stream = open(&self.mongo, &self.watched, &self.position, self.wait).await?;
        }
        Ok(can_tell)
    }

    /// Where one has to go on to miss nothing after what was read.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// Whether everything up to that moment was read.
    pub fn has_reached(&self, time: Timestamp) -> bool {
        self.position.has_reached(time)
    }
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Feed").field("watched", &self.watched).finish_non_exhaustive()
    }
}

fn take(watched: &Watched, event: &RawDocumentBuf, changes: &mut Changes) {
    let kind = event.get_str("operationType").unwrap_or("unknown");
    match kind {
        "insert" | "update" | "replace" | "delete" => {
            let key = event.get_document("documentKey").ok();
            let is_of_source = watched.is_of_source(event);
            let id = key.filter(|_| is_of_source).and_then(exact::id_of);
            let which = if kind == "delete" { &mut changes.deleted } else { &mut changes.written };
            which.extend(id.clone());
            if let Some(id) = id {
                changes.touched.push(id);
                changes.sessions.push(session_of(event));
            }
            match watched.members(event) {
                Ok(members) => changes.members.extend(members),
                Err(event) => changes.ended_by = Some(Ended { event, at: None }),
            }
            let time = event.get_timestamp("clusterTime").ok();
            changes.time = time.or(changes.time);
            if let (true, Some(time), "insert" | "delete") = (is_of_source, time, kind) {
                changes.came_or_went.push((time, kind == "insert"));
            }
        }
        // They leave the documents as they are.
        "create" | "createIndexes" | "dropIndexes" => {}
        "modify" if watched.is_of_source(event) => changes.modified = true,
        other => {
            let at = event.get_timestamp("clusterTime").ok();
            changes.ended_by = Some(Ended { event: watched.named(other, event), at });
        }
    }
}

fn session_of(event: &RawDocumentBuf) -> Option<Vec<u8>> {
    Some(event.get_document("lsid").ok()?.get_binary("id").ok()?.bytes.to_vec())
}

/// The next moment: a feed that has reached it has told everything of this one, of which
/// a transaction may have many changes.
pub fn after(time: Timestamp) -> Timestamp {
    Timestamp { increment: time.increment + 1, ..time }
}

/// Waits until a write of ours is in the feed's past: without any, a feed of an
/// idle server would never reach the present.
///
/// # Errors
/// A stop where the server can't be written.
pub async fn nudge(mongo: &Mongo) -> Result<()> {
    let collection = mongo.state::<Document>("pulse");
    retrying("writing a pulse", || {
        let update = collection.update_one(doc! {"_id": 1}, doc! {"$inc": {"n": 1_i64}}).upsert(true);
        async move { update.await }
    })
    .await
    .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::rawdoc;

    #[test]
    fn a_token_tells_its_moment() {
        let token = doc! {"_data": "8263754A3E000000022B0229296E04"};
        let time = Timestamp { time: 0x6375_4A3E, increment: 2 };
        assert_eq!(Position::Token(token.clone().into()).time(), Some(time));
        assert_eq!(token_time(&doc! {"_data": "nonsense"}.into()), None);
        for position in [Position::Token(token.into()), Position::Time(time)] {
            assert_eq!(Position::from_document(&position.to_document()), Some(position));
        }
    }

    #[test]
    fn touched_documents_are_told_from_what_ends_a_collection() {
        let source = "app.users".parse().expect("a namespace");
        let watched = Watched { source, memberships: Vec::new() };
        let mut changes = Changes::default();
        let time = Timestamp { time: 5, increment: 1 };
        take(
            &watched,
            &rawdoc! {"operationType": "update", "documentKey": {"_id": 7}, "clusterTime": time},
            &mut changes,
        );
        take(&watched, &rawdoc! {"operationType": "createIndexes"}, &mut changes);
        assert_eq!((changes.touched.len(), changes.time, changes.is_turn()), (1, Some(time), false));
        assert!(changes.came_or_went.is_empty());
        for kind in ["insert", "delete"] {
            let event = rawdoc! {"operationType": kind, "documentKey": {"_id": 7}, "clusterTime": time};
            take(&watched, &event, &mut changes);
        }
        assert_eq!(changes.came_or_went, [(time, true), (time, false)]);
        assert_eq!((changes.touched.len(), changes.written.len(), changes.deleted.len()), (3, 2, 1));
        take(&watched, &rawdoc! {"operationType": "modify"}, &mut changes);
        assert!(changes.is_turn() && changes.ended_by.is_none());
        take(&watched, &rawdoc! {"operationType": "rename", "clusterTime": time}, &mut changes);
        assert_eq!(changes.ended_by, Some(Ended { event: "rename".into(), at: Some(time) }));
    }
}
