//! Single writes of an application, each with what it does to a document: the model that the
//! journal keeps.

use bson::{Bson, Document, doc};

/// A write of one document.
#[derive(Debug, Clone)]
pub enum Change {
    /// An insert.
    Insert(Document),
    /// An update by operators.
    Operators(i64),
    /// The same that inserts where there is nothing; the value is for the unique index.
    OperatorsOrInsert(i64, String),
    /// An update by a pipeline.
    Pipeline(i64),
    /// Valid becomes invalid and the other way round.
    Toggle,
    /// Another value under the unique index.
    Slot(String),
    /// A replacement; with `true` it inserts where there is nothing.
    Replace(Document, bool),
    /// A delete.
    Delete,
}

/// What the server says of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// A document was found, and changed or deleted.
    Matched,
    /// No document was found.
    Nothing,
    /// The document is new.
    Inserted,
    /// There is a document of that `_id` already.
    Duplicate,
}

/// The kinds of commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Insert,
    Update,
    Delete,
}

impl Kind {
    /// The command with these statements, still without what every command gets.
    pub fn command(self, collection: &str, statements: Vec<Document>) -> Document {
        let (name, list) = match self {
            Self::Insert => ("insert", "documents"),
            Self::Update => ("update", "updates"),
            Self::Delete => ("delete", "deletes"),
        };
        doc! {name: collection, list: statements, "ordered": false}
    }
}

impl Change {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Insert(_) => Kind::Insert,
            Self::Delete => Kind::Delete,
            _ => Kind::Update,
        }
    }

    /// Its part of a command.
    pub fn statement(&self, id: &Bson) -> Document {
        let query = doc! {"_id": {"$eq": id}};
        match self {
            Self::Insert(document) => document.clone(),
            Self::Delete => doc! {"q": query, "limit": 1},
            Self::Operators(version) => doc! {"q": query, "u": operators(*version)},
            Self::OperatorsOrInsert(version, slot) => {
                let mut update = operators(*version);
                update.insert("$setOnInsert", doc! {"slot": slot, "valid": version % 3 != 0});
                doc! {"q": query, "u": update, "upsert": true}
            }
            Self::Pipeline(version) => doc! {"q": query, "u": [
                {"$set": {"version": version, "sum": {"$add": ["$writes", version]}}},
                {"$unset": "note"},
            ]},
            Self::Toggle => doc! {"q": query, "u": [{"$set": {"valid": {"$not": ["$valid"]}}}]},
            Self::Slot(slot) => doc! {"q": query, "u": {"$set": {"slot": slot}}},
            Self::Replace(document, upsert) => doc! {"q": query, "u": document, "upsert": upsert},
        }
    }

    /// What it makes of a document, and what the server says then.
    pub fn effect(&self, id: &Bson, before: Option<&Document>) -> (Answer, Option<Document>) {
        let changed = |change: &dyn Fn(&mut Document)| match before.cloned() {
            Some(mut document) => {
                change(&mut document);
                (Answer::Matched, Some(document))
            }
            None => (Answer::Nothing, None),
        };
        match (self, before) {
            (Self::Insert(_), Some(there)) => (Answer::Duplicate, Some(there.clone())),
            (Self::Insert(document), None) | (Self::Replace(document, true), None) => {
                (Answer::Inserted, Some(document.clone()))
            }
            (Self::Replace(document, _), Some(_)) => (Answer::Matched, Some(document.clone())),
            (Self::Replace(..), None) | (Self::Delete, None) => (Answer::Nothing, None),
            (Self::Delete, Some(_)) => (Answer::Matched, None),
            (Self::OperatorsOrInsert(version, slot), None) => {
                (Answer::Inserted, Some(inserted_by_operators(id, *version, slot)))
            }
            (Self::Operators(version) | Self::OperatorsOrInsert(version, _), _) => {
                changed(&|document| apply_operators(document, *version))
            }
            (Self::Pipeline(version), _) => changed(&|document| {
                let writes = document.get_i32("writes").expect("a number");
                document.insert("version", *version);
                document.insert("sum", i64::from(writes) + *version);
                document.remove("note");
            }),
            (Self::Toggle, _) => changed(&|document| {
                let valid = document.get_bool("valid").expect("true or false");
                document.insert("valid", !valid);
            }),
            (Self::Slot(slot), _) => changed(&|document| drop(document.insert("slot", slot.as_str()))),
        }
    }
}

/// A document as writers insert it.
pub fn document(id: &Bson, version: i64, slot: &str, valid: bool) -> Document {
    doc! {
        "_id": id,
        "version": version,
        "valid": valid,
        "writes": 0,
        "slot": slot,
        "log": [version],
        "x.y": {"$a": version},
        "text": "x".repeat(60),
    }
}

/// The `_id` of that number: of several types.
pub fn identity(number: i32) -> Bson {
    match number % 8 {
        3 => format!("id-{number}").into(),
        4 => doc! {"part": number % 5, "number": number}.into(),
        5 => bson::Uuid::from_bytes(u128::try_from(number).expect("positive").to_le_bytes()).into(),
        _ => number.into(),
    }
}

fn operators(version: i64) -> Document {
    doc! {
        "$set": {"version": version, "note": format!("n{version}")},
        "$inc": {"writes": 1},
        "$push": {"log": {"$each": [version], "$slice": -3}},
    }
}

fn apply_operators(document: &mut Document, version: i64) {
    let writes = document.get_i32("writes").expect("a number");
    document.insert("version", version);
    document.insert("note", format!("n{version}"));
    document.insert("writes", writes + 1);
    let log = document.get_array_mut("log").expect("an array");
    log.push(version.into());
    log.drain(..log.len().saturating_sub(3));
}

/// The server takes the fields in the order of their names.
fn inserted_by_operators(id: &Bson, version: i64, slot: &str) -> Document {
    doc! {
        "_id": id,
        "log": [version],
        "note": format!("n{version}"),
        "slot": slot,
        "valid": version % 3 != 0,
        "version": version,
        "writes": 1,
    }
}
