//! Writes that yield: to a collection that others write to, as of a moment up to
//! which one knows what the others have written. Where anything newer is there,
//! nothing is written.
//!
//! Each write is a transaction that reads as of that moment, so that the server
//! finds out by itself. All of them are on the session of one lane, by which their
//! events are told from those of others; a transaction of the past conflicts with what
//! its lane has done since, so the moment must not be before the last commit.

use bson::{Bson, Document, RawBson, RawDocumentBuf, Timestamp};

use super::by_id::deletion;
use super::command::is_transient;
use super::index::whole_number;
use super::lane::Lane;
use super::state::write_states;
use super::transaction::{is_given_up, is_given_up_code};
use crate::config::values::Namespace;
use crate::error::{Context, Error, Result};

/// The server's code for a value that is in a unique index already.
const DUPLICATE_KEY: i32 = 11000;
/// The server's code for a document that violates the validator.
const INVALID: i32 = 121;
/// The server's code for an `_id` that is equal to the one that is there and not the same.
const OTHER_ID: i32 = 66;

/// Writes that yield to those of others.
#[derive(Debug)]
pub struct Yielding {
    namespace: Namespace,
    lane: Lane,
    /// Whether the collection has refused what stands in the other one: bypassing
    /// its validator takes a privilege.
    bypasses: bool,
    /// Whether an `_id` that is equal and not the same has been in the way: the next
    /// transaction removes what it writes first.
    anew: bool,
}

/// What became of a write.
#[derive(Debug, Clone, PartialEq)]
pub enum Yielded {
    /// It was committed at or before that moment.
    Done(Timestamp),
    /// Nothing was written, because something newer is there.
    Newer,
    /// Nothing was written, because the document with that number has unique values
    /// that stand in another one.
    Taken {
        /// Which of the documents.
        index: usize,
        /// The values.
        values: Document,
    },
}

impl Yielding {
    /// Writes to that collection.
    pub fn to(lane: Lane, namespace: &Namespace) -> Self {
        Self { namespace: namespace.clone(), lane, bypasses: false, anew: false }
    }

    /// The session of the writes, to be recorded before the first: their events bear it.
    pub fn session(&self) -> Document {
        self.lane.session()
    }

    /// Removes documents, then writes others as they are: all at once or not at all.
    /// `at` must be in the past of a majority, not before the last [`Yielded::Done`].
    ///
    /// # Errors
    /// A stop where the server refuses for another reason than what others wrote.
    pub async fn write(
        &mut self,
        at: Timestamp,
        removed: &[RawBson],
        written: &[RawDocumentBuf],
    ) -> Result<Yielded> {
        self.lane.begin_at(at).await?;
        let mut commands = Vec::new();
        if !removed.is_empty() {
            commands.push(deletion(&self.namespace.collection, removed));
        }
        let anew = std::mem::take(&mut self.anew);
        commands.extend(write_states(&self.namespace.collection, written, |_| anew)?);
        if let Some(command) = commands.last_mut().filter(|_| !written.is_empty()) {
            command.append(bson::cstr!("bypassDocumentValidation"), self.bypasses);
        }
        for command in commands {
            if let Some(yielded) = self.send(command).await? {
                self.lane.abort().await;
                return Ok(yielded);
            }
        }
        Ok(self.lane.commit().await?.map_or(Yielded::Newer, Yielded::Done))
    }

    /// Sends one command of the transaction; tells why it can't be committed, if so.
    async fn send(&mut self, command: RawDocumentBuf) -> Result<Option<Yielded>> {
        match self.lane.send(&self.namespace.database, command).await? {
            Ok(reply) => self.judge(&reply),
            Err(error) if is_given_up(&error) || is_transient(&error) => Ok(Some(Yielded::Newer)),
            Err(error) => Err(error).during(format!("writing to {}", self.namespace)),
        }
    }

    fn judge(&mut self, reply: &Document) -> Result<Option<Yielded>> {
        let errors = reply.get_array("writeErrors").map(Vec::as_slice).unwrap_or_default();
        let Some(error) = errors.first().and_then(Bson::as_document) else { return Ok(None) };
        let code = error.get("code").and_then(whole_number).and_then(|code| i32::try_from(code).ok());
        match code {
            Some(DUPLICATE_KEY) => Ok(Some(taken(error))),
            Some(code) if is_given_up_code(code) => Ok(Some(Yielded::Newer)),
            Some(OTHER_ID) => {
                self.anew = true;
                Ok(Some(Yielded::Newer))
            }
            Some(INVALID) if !self.bypasses => {
                // What the other side holds is right, whatever the validator says.
                self.bypasses = true;
                Ok(Some(Yielded::Newer))
            }
            _ => {
                let message = error.get_str("errmsg").unwrap_or("no reason given");
                let namespace = &self.namespace;
                Err(Error::stopped(format!("a document can't be written to {namespace}: {message}"))
                    .hint("mend the cause and start the same command again"))
            }
        }
    }
}

fn taken(error: &Document) -> Yielded {
    let values = error.get_document("keyValue").cloned().unwrap_or_default();
    if values.contains_key("_id") {
        // Somebody has inserted that very document since.
        return Yielded::Newer;
    }
    let index = error.get("index").and_then(whole_number).and_then(|index| usize::try_from(index).ok());
    Yielded::Taken { index: index.unwrap_or(0), values }
}
