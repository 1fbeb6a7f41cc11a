//! Writes that leave alone what somebody else has written: inserts that never
//! replace, and replacements of just the version that was read.

use std::collections::HashSet;

use bson::{Document, RawArrayBuf, RawBson, RawDocument, RawDocumentBuf, rawdoc};

use super::exact;
use super::index::whole_number;
use super::lane::Lane;
use super::sink::id_bytes;
use super::state::{insertion, is_changed_by_inserts, is_replaceable};
use crate::config::values::Namespace;
use crate::error::{Error, Result};

/// The server's code for a duplicate key.
const DUPLICATE_KEY: u64 = 11000;
/// The server's code for a document that the validator does not accept.
const INVALID_DOCUMENT: u64 = 121;
/// Bytes that the two versions of a document may have together in one command.
const MOST_BYTES: usize = 15 << 20;

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

impl Lane {
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
        for (documents, command) in [(plain, inserts as fn(&str, &[_]) -> _), (delicate, insertions)] {
            let name = namespace.collection.as_str();
            let refused = self.write_each(namespace, &documents, |part| command(name, part)).await?;
            result.inserted += u64::try_from(documents.len() - refused.len()).unwrap_or(0);
            for (index, error) in refused {
                match error.get("code").and_then(whole_number) {
                    Some(DUPLICATE_KEY) if is_about_id(&error) => result.existing += 1,
                    Some(DUPLICATE_KEY | INVALID_DOCUMENT) => {
                        result.refused.extend(documents.get(index).and_then(|document| id_of(document)));
                    }
                    _ => return Err(refusal(namespace, &error)),
                }
            }
        }
        Ok(result)
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
        for way in [Way::Remove, Way::Write] {
            let these: Vec<(usize, &Change)> =
                changes.iter().enumerate().filter(|(_, change)| change.way() == way).collect();
            let refused = self.write_each(namespace, &these, |part| way.command(namespace, part)).await?;
            for (index, error) in refused {
                let refusal = these.get(index).and_then(|(position, _)| refusals.get_mut(*position));
                if let Some(refusal) = refusal {
                    *refusal = Some(read_refusal(&error));
                }
            }
        }
        for (change, refusal) in changes.iter().zip(&mut refusals) {
            if let Change::Replace(old, new) = change
                && change.way() == Way::RemoveAndWrite
            {
                let commands = anew(namespace, old, new)?;
                let operation = format!("writing to {namespace}");
                let refused = self.write_if_first(&operation, &namespace.database, &commands).await?;
                *refusal = refused.map(|refused| read_refusal(&refused.error));
            }
        }
        Ok(refusals)
    }
}

/// How a change is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Remove,
    Write,
    /// What a replacement would change is removed and inserted.
    RemoveAndWrite,
}

impl Way {
    /// All of these changes in one command.
    fn command(self, namespace: &Namespace, changes: &[(usize, &Change)]) -> Result<RawDocumentBuf> {
        let mut statements = RawArrayBuf::new();
        for (_, change) in changes {
            statements.push(statement(change)?);
        }
        let name = namespace.collection.as_str();
        let (mut command, field) = match self {
            Self::Remove => (rawdoc! {"delete": name}, bson::cstr!("deletes")),
            Self::Write | Self::RemoveAndWrite => (rawdoc! {"update": name}, bson::cstr!("updates")),
        };
        command.append(field, statements);
        Ok(command)
    }
}

impl Change {
    fn way(&self) -> Way {
        match self {
            Self::Remove(_) => Way::Remove,
            Self::Replace(old, new) if !is_replaceable(new) || id_bytes(old) != id_bytes(new) => {
                Way::RemoveAndWrite
            }
            Self::Insert(_) | Self::Replace(..) => Way::Write,
        }
    }
}

fn anew(namespace: &Namespace, old: &RawDocument, new: &RawDocumentBuf) -> Result<[RawDocumentBuf; 2]> {
    let name = namespace.collection.as_str();
    let mut deletes = RawArrayBuf::new();
    deletes.push(rawdoc! {"q": only_if(old, old.as_bytes().len())?, "limit": 1});
    let mut removal = rawdoc! {"delete": name};
    removal.append(bson::cstr!("deletes"), deletes);
    Ok([removal, insertions(name, std::slice::from_ref(new))?])
}

fn inserts(name: &str, documents: &[RawDocumentBuf]) -> Result<RawDocumentBuf> {
    let mut array = RawArrayBuf::new();
    for document in documents {
        array.push(document.clone());
    }
    let mut command = rawdoc! {"insert": name};
    command.append(bson::cstr!("documents"), array);
    Ok(command)
}

fn insertions(name: &str, documents: &[RawDocumentBuf]) -> Result<RawDocumentBuf> {
    let mut updates = RawArrayBuf::new();
    for document in documents {
        updates.push(insertion(document)?);
    }
    let mut command = rawdoc! {"update": name};
    command.append(bson::cstr!("updates"), updates);
    Ok(command)
}

fn statement(change: &Change) -> Result<RawDocumentBuf> {
    Ok(match change {
        Change::Insert(document) => insertion(document)?,
        Change::Remove(old) => rawdoc! {"q": only_if(old, old.as_bytes().len())?, "limit": 1},
        Change::Replace(old, new) => {
            let bytes = old.as_bytes().len() + new.as_bytes().len();
            rawdoc! {"q": only_if(old, bytes)?, "u": new.clone(), "upsert": false}
        }
    })
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
    Ok(rawdoc! {"_id": exact::equal(&id), "$expr": same})
}

fn id_of(document: &RawDocument) -> Option<RawBson> {
    exact::id_of(document)
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

fn refusal(namespace: &Namespace, error: &Document) -> Error {
    let message = error.get_str("errmsg").unwrap_or("no reason given");
    Error::stopped(format!("a document can't be written to {namespace}: {message}"))
        .hint("mend the cause and start the same command again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::doc;

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
