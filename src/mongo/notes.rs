//! What must not be forgotten before it is worked off, durable on a majority:
//! groups whose winner is on its way, members that came or went during a copy.
//!
//! A note has a generation, so that one that is made anew while it is being
//! worked off is not removed by accident.

use std::collections::HashSet;

use bson::spec::BinarySubtype;
use bson::{Binary, Bson, Document, RawDocumentBuf, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use super::command::retrying;
use super::exact;
use super::index::whole_number;
use super::{Mongo, majority_document};
use crate::error::{Error, Result};

/// The notes of one kind of one owner.
#[derive(Debug, Clone)]
pub struct Notes {
    mongo: Mongo,
    collection: Collection<Document>,
    owner: String,
}

/// A note.
#[derive(Debug, Clone)]
pub struct Note {
    /// What it says, by which it is found.
    pub content: Vec<u8>,
    /// What it was made from, where that is another value.
    pub original: Option<Vec<u8>>,
    generation: i64,
}

impl Notes {
    /// The notes of an owner in that collection of the state database.
    pub fn of(mongo: &Mongo, collection: &str, owner: &str) -> Self {
        Self { mongo: mongo.clone(), collection: mongo.state(collection), owner: owner.into() }
    }

    /// Makes notes.
    ///
    /// # Errors
    /// A stop where they can't be made durable.
    pub async fn add(&self, contents: &[Vec<u8>]) -> Result<()> {
        let updates: Vec<Document> = contents
            .iter()
            .map(|content| {
                let update = doc! {"$set": {"generation": generation()}};
                doc! {"q": {"_id": self.key(content)}, "u": update, "upsert": true}
            })
            .collect();
        self.command("update", "updates", updates).await
    }

    /// Makes notes, each together with what its content was made from.
    ///
    /// # Errors
    /// A stop where they can't be made durable.
    pub async fn add_made_from(&self, notes: &[(Vec<u8>, Vec<u8>)]) -> Result<()> {
        let updates: Vec<Document> = notes
            .iter()
            .map(|(content, original)| {
                let update = doc! {"$set": {"generation": generation(), "original": binary(original)}};
                doc! {"q": {"_id": self.key(content)}, "u": update, "upsert": true}
            })
            .collect();
        self.command("update", "updates", updates).await
    }

    /// Some of the notes, in no order.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn some(&self, most: i64) -> Result<Vec<Note>> {
        let documents: Vec<Document> = retrying("reading notes", || {
            let find = self.collection.find(self.all()).limit(most);
            async move { find.await?.try_collect().await }
        })
        .await?;
        Ok(documents.iter().filter_map(read).collect())
    }

    /// Some of the notes in the order of what they say, from after the given one on.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn page(&self, after: Option<&[u8]>, most: i64) -> Result<Vec<Note>> {
        let mut filter = self.all();
        if let (Some(content), Ok(bounds)) = (after, filter.get_document_mut("_id")) {
            bounds.remove("$gte");
            bounds.insert("$gt", self.key(content));
        }
        let documents: Vec<Document> = retrying("reading notes", || {
            let find = self.collection.find(filter.clone()).sort(doc! {"_id": 1}).limit(most);
            async move { find.await?.try_collect().await }
        })
        .await?;
        Ok(documents.iter().filter_map(read).collect())
    }

    /// Those of the contents that were noted.
    ///
    /// # Errors
    /// A stop where they can't be read.
    pub async fn among(&self, contents: &[Vec<u8>]) -> Result<HashSet<Vec<u8>>> {
        let keys: Vec<Document> = contents.iter().map(|content| self.key(content)).collect();
        let documents: Vec<Document> = retrying("reading notes", || {
            let find = self.collection.find(doc! {"_id": {"$in": &keys}});
            async move { find.await?.try_collect().await }
        })
        .await?;
        Ok(documents.iter().filter_map(read).map(|note| note.content).collect())
    }

    /// How many there are.
    ///
    /// # Errors
    /// A stop where they can't be counted.
    pub async fn count(&self) -> Result<u64> {
        retrying("counting notes", || {
            let count = self.collection.count_documents(self.all());
            async move { count.await }
        })
        .await
    }

    /// Removes notes that were not made again since they were read.
    ///
    /// # Errors
    /// A stop where they can't be removed.
    pub async fn remove(&self, notes: &[Note]) -> Result<()> {
        let deletes: Vec<Document> = notes
            .iter()
            .map(|note| {
                let filter = doc! {"_id": self.key(&note.content), "generation": note.generation};
                doc! {"q": filter, "limit": 1}
            })
            .collect();
        self.command("delete", "deletes", deletes).await
    }

    /// Removes notes, however often they were made.
    ///
    /// # Errors
    /// A stop where they can't be removed.
    pub async fn forget(&self, contents: &[Vec<u8>]) -> Result<()> {
        let delete = |content: &Vec<u8>| doc! {"q": {"_id": self.key(content)}, "limit": 1};
        self.command("delete", "deletes", contents.iter().map(delete).collect()).await
    }

    /// Forgets all notes.
    ///
    /// # Errors
    /// A stop where they can't be removed.
    pub async fn clear(&self) -> Result<()> {
        retrying("forgetting notes", || {
            let delete = self.collection.delete_many(self.all());
            async move { delete.await }
        })
        .await
        .map(|_| ())
    }

    /// Bounds on `_id`, which an index follows: a key begins with the owner.
    fn all(&self) -> Document {
        let bound = |note: Bson| doc! {"owner": &self.owner, "note": note};
        doc! {"_id": {"$gte": bound(Bson::MinKey), "$lte": bound(Bson::MaxKey)}}
    }

    fn key(&self, content: &[u8]) -> Document {
        doc! {"owner": &self.owner, "note": binary(content)}
    }

    async fn command(&self, name: &str, field: &str, statements: Vec<Document>) -> Result<()> {
        if statements.is_empty() {
            return Ok(());
        }
        let command = doc! {
            name: self.collection.name(),
            field: statements,
        };
        write(&self.mongo, &self.collection, exact::encoded(&command)?, "a note").await
    }
}

/// A number that tells one setting of a note from every other. It is drawn, because a note that was
/// removed and made again must not count from the beginning: a removal that arrives twice would take
/// the new one.
pub fn generation() -> i64 {
    rand::random()
}

/// Sends a command that makes or removes what must not be forgotten, until it is
/// durable. Two upserts of one `_id` at once are one: the other one has made it.
///
/// # Errors
/// A stop where one of `what` can't be written.
pub async fn write(
    mongo: &Mongo,
    collection: &Collection<Document>,
    mut command: RawDocumentBuf,
    what: &str,
) -> Result<()> {
    command.append(bson::cstr!("ordered"), false);
    command.append(bson::cstr!("writeConcern"), exact::encoded(&majority_document())?);
    let database = mongo.database(&collection.namespace().db);
    let reply = retrying(format!("writing {what}"), || {
        let (database, command) = (database.clone(), command.clone());
        async move {
            let reply = exact::answered(database.run_raw_command(command).await)?;
            super::sink::check_write_concern(&reply)?;
            Ok(reply)
        }
    })
    .await?;
    let errors = reply.get_array("writeErrors").map(Vec::as_slice).unwrap_or_default();
    let is_race = |error: &Bson| {
        error.as_document().and_then(|error| error.get("code")).and_then(whole_number) == Some(11000)
    };
    match errors.iter().find(|error| !is_race(error)) {
        Some(error) => Err(Error::stopped(format!("{what} could not be written: {error}"))),
        None => Ok(()),
    }
}

fn binary(bytes: &[u8]) -> Binary {
    Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() }
}

fn read(document: &Document) -> Option<Note> {
    let content = document.get_document("_id").ok()?.get_binary_generic("note").ok()?.clone();
    let original = document.get_binary_generic("original").ok().cloned();
    Some(Note { content, original, generation: document.get_i64("generation").unwrap_or(0) })
}
