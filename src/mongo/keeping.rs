//! Writes that leave alone what somebody else has written: inserts that never
//! replace, and replacements of just the version that was read.

use std::collections::HashSet;
use std::time::Duration;

use bson::{
    Bson, Document, RawArrayBuf, RawBson, RawBsonRef, RawDocument, RawDocumentBuf, Timestamp, rawdoc,
};

use super::command::is_transient_code;
use super::index::whole_number;
use super::numbered::NumberedWrites;
use super::sink::id_bytes;
use crate::config::values::Namespace;
use crate::error::{Error, Result};

/// The server's code for a duplicate key.
const DUPLICATE_KEY: u64 = 11000;
/// The server's code for a document that the validator does not accept.
const INVALID_DOCUMENT: u64 = 121;
/// Bytes that the two versions of a document may have together in one command.
const MOST_BYTES: usize = 15 << 20;
/// Attempts for documents whose write fails for a passing reason.
const ATTEMPTS: usize = 8;
/// Between two of them.
const PAUSE: Duration = Duration::from_millis(500);

/// What became of documents that were to be inserted.
#[derive(Debug, Default)]
pub struct Inserted {
    /// Documents that were not there and are now.
    pub inserted: u64,
    /// Documents that were there, and stay as they are.
    pub existing: u64,
    /// Documents that the target does not accept as it stands.
    pub refused: Vec<RawBson>,
}

/// A document that could not be written.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// Why, in the server's words.
    pub reason: String,
    /// The values that another document has under a unique index.
    pub values: Option<Document>,
}

/// What is to be done about one document, if the target still holds the version
/// that was read.
#[derive(Debug)]
pub enum Change {
    /// It is not there and should be.
    Insert(RawDocumentBuf),
    /// It is there and should not be.
    Remove(RawDocumentBuf),
    /// It is there (first) and should be another one (second).
    Replace(RawDocumentBuf, RawDocumentBuf),
}

impl NumberedWrites {
    /// Inserts those documents whose `_id` is not in the collection yet.
    ///
    /// # Errors
    /// A stop where the server can't be written.
    pub async fn insert_absent(
        &mut self,
        namespace: &Namespace,
        documents: Vec<RawDocumentBuf>,
    ) -> Result<Inserted> {
        let mut result = Inserted::default();
        let ids: Vec<RawBson> = documents.iter().filter_map(|document| id_of(document)).collect();
        // An insert that is refused costs the server several times what this look does.
        let existing: HashSet<Option<Vec<u8>>> =
            self.mongo().existing_ids(namespace, &ids, id_bytes).await?.into_iter().collect();
        let total = documents.len();
        let absent = documents.into_iter().filter(|document| !existing.contains(&id_bytes(document)));
        let (delicate, plain): (Vec<_>, Vec<_>) =
            absent.partition(|document| is_changed_by_inserts(document));
        result.existing = u64::try_from(total - delicate.len() - plain.len()).unwrap_or(0);
        self.until_accepted(namespace, plain, insert_command, &mut result).await?;
        self.until_accepted(namespace, delicate, upsert_command, &mut result).await?;
        Ok(result)
    }

    async fn until_accepted(
        &mut self,
        namespace: &Namespace,
        mut documents: Vec<RawDocumentBuf>,
        command: impl Fn(&Namespace, &[RawDocumentBuf]) -> Result<RawDocumentBuf>,
        result: &mut Inserted,
    ) -> Result<()> {
        for _ in 0..ATTEMPTS {
            if documents.is_empty() {
                return Ok(());
            }
            let reply = self.send(namespace, command(namespace, &documents)?).await?;
            let errors = errors(&reply);
            result.inserted += u64::try_from(documents.len().saturating_sub(errors.len())).unwrap_or(0);
            let mut again = Vec::new();
            for (index, error) in errors {
                let Some(document) = documents.get(index) else { continue };
                let code = error.get("code").and_then(whole_number).unwrap_or(0);
                match code {
                    DUPLICATE_KEY if is_about_id(&error) => result.existing += 1,
                    DUPLICATE_KEY | INVALID_DOCUMENT => result.refused.extend(id_of(document)),
                    _ if i32::try_from(code).is_ok_and(is_transient_code) => again.push(document.clone()),
                    _ => return Err(refused(namespace, &error)),
                }
            }
            if !again.is_empty() {
                tokio::time::sleep(PAUSE).await;
            }
            documents = again;
        }
        Err(Error::stopped(format!("{} documents can't be written to {namespace}", documents.len()))
            .hint("look at the state of the server and start the same command again"))
    }

    /// Makes these changes where the collection holds what was read; for each one
    /// why it was refused, if it was. A change whose document is another one by
    /// now does nothing.
    ///
    /// # Errors
    /// A stop where the server can't be written.
    pub async fn change(
        &mut self,
        namespace: &Namespace,
        changes: &[Change],
    ) -> Result<Vec<Option<Refusal>>> {
        let mut refusals: Vec<Option<Refusal>> = changes.iter().map(|_| None).collect();
        // Removed first: what is written may need the room under a unique index.
        for removes in [true, false] {
            let (mut statements, mut positions) = (RawArrayBuf::new(), Vec::new());
            for (position, change) in changes.iter().enumerate() {
                if matches!(change, Change::Remove(_)) == removes {
                    statements.push(statement(change)?);
                    positions.push(position);
                }
            }
            if positions.is_empty() {
                continue;
            }
            let name = namespace.collection.as_str();
            let mut command = if removes {
                rawdoc! {"delete": name, "ordered": false}
            } else {
                rawdoc! {"update": name, "ordered": false}
            };
            let field = if removes { bson::cstr!("deletes") } else { bson::cstr!("updates") };
            command.append(field, statements);
            let reply = self.send(namespace, command).await?;
            for (index, error) in errors(&reply) {
                let refusal = positions.get(index).and_then(|position| refusals.get_mut(*position));
                if let Some(refusal) = refusal {
                    *refusal = Some(read_refusal(&error));
                }
            }
        }
        Ok(refusals)
    }
}

fn insert_command(namespace: &Namespace, documents: &[RawDocumentBuf]) -> Result<RawDocumentBuf> {
    let mut array = RawArrayBuf::new();
    for document in documents {
        array.push(document.clone());
    }
    let mut command = rawdoc! {"insert": namespace.collection.as_str(), "ordered": false};
    command.append(bson::cstr!("documents"), array);
    Ok(command)
}

fn upsert_command(namespace: &Namespace, documents: &[RawDocumentBuf]) -> Result<RawDocumentBuf> {
    let mut updates = RawArrayBuf::new();
    for document in documents {
        updates.push(upsert(document)?);
    }
    let mut command = rawdoc! {"update": namespace.collection.as_str(), "ordered": false};
    command.append(bson::cstr!("updates"), updates);
    Ok(command)
}

fn statement(change: &Change) -> Result<RawDocumentBuf> {
    Ok(match change {
        Change::Insert(document) => upsert(document)?,
        Change::Remove(old) => rawdoc! {"q": only_if(old, old.as_bytes().len())?, "limit": 1},
        Change::Replace(old, new) => {
            let bytes = old.as_bytes().len() + new.as_bytes().len();
            rawdoc! {"q": only_if(old, bytes)?, "u": whole(new), "upsert": false}
        }
    })
}

/// Inserts a document whatever its fields and values are. The condition matches
/// nothing, so that one with the same `_id` is a duplicate and never replaced.
pub(super) fn upsert(document: &RawDocument) -> Result<RawDocumentBuf> {
    let id = id_of(document).ok_or_else(|| Error::stopped("a document has no `_id`"))?;
    Ok(rawdoc! {
        "q": {"_id": {"$eq": id}, "$nor": [{}]},
        "u": whole(document),
        "upsert": true,
    })
}

fn whole(document: &RawDocument) -> RawArrayBuf {
    let mut pipeline = RawArrayBuf::new();
    pipeline.push(rawdoc! {"$replaceWith": {"$literal": document.to_owned()}});
    pipeline
}

/// Matches the document as long as it is the one that was read. Two versions
/// that do not fit into one command are told apart by their size.
fn only_if(old: &RawDocument, bytes: usize) -> Result<RawDocumentBuf> {
    let id = id_of(old).ok_or_else(|| Error::stopped("a document has no `_id`"))?;
    let same = if bytes <= MOST_BYTES {
        rawdoc! {"$eq": ["$$ROOT", {"$literal": old.to_owned()}]}
    } else {
        let size = i64::try_from(old.as_bytes().len()).unwrap_or(i64::MAX);
        rawdoc! {"$eq": [{"$bsonSize": "$$ROOT"}, size]}
    };
    Ok(rawdoc! {"_id": {"$eq": id}, "$expr": same})
}

/// Whether an insert would change it: a `Timestamp(0, 0)` at the top level
/// becomes the time of day.
pub(super) fn is_changed_by_inserts(document: &RawDocument) -> bool {
    let zero = RawBsonRef::Timestamp(Timestamp { time: 0, increment: 0 });
    document.iter().any(|field| field.is_ok_and(|(_, value)| value == zero))
}

fn id_of(document: &RawDocument) -> Option<RawBson> {
    document.get("_id").ok().flatten().map(RawBson::from)
}

/// The errors of single statements, by their place in the command.
fn errors(reply: &Document) -> Vec<(usize, Document)> {
    let errors = reply.get_array("writeErrors").map(Vec::as_slice).unwrap_or_default();
    let index =
        |error: &Document| error.get("index").and_then(whole_number).and_then(|at| usize::try_from(at).ok());
    errors
        .iter()
        .filter_map(Bson::as_document)
        .filter_map(|error| Some((index(error)?, error.clone())))
        .collect()
}

fn is_about_id(error: &Document) -> bool {
    error.get_document("keyPattern").is_ok_and(|pattern| pattern.len() == 1 && pattern.contains_key("_id"))
}

fn read_refusal(error: &Document) -> Refusal {
    let values = error.get_document("keyValue").ok().filter(|values| !values.contains_key("_id")).cloned();
    let reason = match error.get("code").and_then(whole_number) {
        // The server's words hold the values, which may be nobody's business.
        Some(DUPLICATE_KEY) => {
            let fields = error
                .get_document("keyPattern")
                .map(|pattern| pattern.keys().map(String::as_str).collect::<Vec<_>>().join(", "));
            format!("another document has the same {}", fields.unwrap_or_default())
        }
        Some(INVALID_DOCUMENT) => "the validator does not accept it".into(),
        _ => error.get_str("errmsg").unwrap_or("no reason given").to_owned(),
    };
    Refusal { reason, values }
}

fn refused(namespace: &Namespace, error: &Document) -> Error {
    let message = error.get_str("errmsg").unwrap_or("no reason given");
    Error::stopped(format!("a document can't be written to {namespace}: {message}"))
        .hint("mend the cause and start the same command again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::doc;

    #[test]
    fn what_an_insert_would_change_is_seen() {
        let zero = Timestamp { time: 0, increment: 0 };
        assert!(is_changed_by_inserts(&rawdoc! {"_id": 1, "a": 1, "t": zero}));
        assert!(is_changed_by_inserts(&rawdoc! {"_id": zero}));
        assert!(!is_changed_by_inserts(&rawdoc! {"_id": 1, "n": {"t": zero}, "l": [zero]}));
        assert!(!is_changed_by_inserts(&rawdoc! {"_id": 1, "t": Timestamp { time: 0, increment: 1 }}));
    }

    #[test]
    fn large_versions_are_told_apart_by_their_size() {
        let old = rawdoc! {"_id": 1, "a": 2};
        let guard = |bytes| Document::try_from(only_if(&old, bytes).expect("a condition")).expect("valid");
        assert_eq!(
            guard(100),
            doc! {"_id": {"$eq": 1}, "$expr": {"$eq": ["$$ROOT", {"$literal": {"_id": 1, "a": 2}}]}}
        );
        let size = i64::try_from(old.as_bytes().len()).expect("small");
        assert_eq!(
            guard(MOST_BYTES + 1),
            doc! {"_id": {"$eq": 1}, "$expr": {"$eq": [{"$bsonSize": "$$ROOT"}, size]}}
        );
    }

    #[test]
    fn a_refusal_tells_fields_and_no_values() {
        let error = doc! {"code": 11000, "errmsg": "dup key: { email: \"a@b\" }",
        "keyPattern": {"email": 1}, "keyValue": {"email": "a@b"}};
        let refusal = read_refusal(&error);
        assert_eq!(refusal.reason, "another document has the same email");
        assert!(refusal.values.is_some());
        assert!(!is_about_id(&error) && is_about_id(&doc! {"keyPattern": {"_id": 1}}));
    }
}
