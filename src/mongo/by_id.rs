//! Single documents by their `_id`s, as a majority has them.

use std::borrow::Borrow;

use bson::{Document, RawArrayBuf, RawBson, RawDocument, RawDocumentBuf, Timestamp, rawdoc};

use super::Mongo;
use super::command::Attempts;
use super::identified::not_before;
use super::{element, exact};
use crate::config::values::Namespace;
use crate::error::{Context, Result};

/// The condition for the document with this `_id`. The server finds it without
/// any planning where the value stands by itself, which a pattern, an operator
/// and null must not.
pub(super) fn by_id(id: impl Borrow<RawBson>) -> RawDocumentBuf {
    let id = id.borrow();
    let stands_by_itself = match id {
        RawBson::RegularExpression(_) | RawBson::Null | RawBson::Undefined => false,
        RawBson::Document(document) => {
            element::elements(document).next().is_none_or(|first| !first.name.starts_with(b"$"))
        }
        _ => true,
    };
    if stands_by_itself {
        exact::single("_id", id.as_raw_bson_ref())
    } else {
        rawdoc! {"_id": exact::equal(id)}
    }
}

/// The command that deletes the documents with these `_id`s.
pub(super) fn deletion(collection: &str, ids: &[RawBson]) -> RawDocumentBuf {
    let mut deletes = RawArrayBuf::new();
    for id in ids {
        deletes.push(rawdoc! {"q": by_id(id), "limit": 1});
    }
    let mut command = rawdoc! {"delete": collection};
    command.append(bson::cstr!("deletes"), deletes);
    command
}

impl Mongo {
    /// What `take` makes of the documents with these `_id`s that meet a
    /// condition, as they stand now or later, at least as of `after`. Under a
    /// collation, or with another number type, documents with equal `_id`s come
    /// along.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn by_ids<T>(
        &self,
        namespace: &Namespace,
        ids: &[RawBson],
        condition: &Document,
        after: Option<Timestamp>,
        take: impl Fn(&RawDocument) -> T,
    ) -> Result<Vec<T>> {
        self.find_by_ids(namespace, ids, condition, None, after, take).await
    }

    /// What `take` makes of the documents with these `_id`s, which have nothing
    /// but their `_id`: no document is fetched.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn existing_ids<T>(
        &self,
        namespace: &Namespace,
        ids: &[RawBson],
        take: impl Fn(&RawDocument) -> T,
    ) -> Result<Vec<T>> {
        self.find_by_ids(namespace, ids, &Document::new(), Some(rawdoc! {"_id": 1}), None, take).await
    }

    async fn find_by_ids<T>(
        &self,
        namespace: &Namespace,
        ids: &[RawBson],
        condition: &Document,
        projection: Option<RawDocumentBuf>,
        after: Option<Timestamp>,
        take: impl Fn(&RawDocument) -> T,
    ) -> Result<Vec<T>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut filter = exact::with_ids(ids);
        if !condition.is_empty() {
            filter.append(bson::cstr!("$and"), RawArrayBuf::from_iter([exact::encoded(condition)?]));
        }
        let mut command = rawdoc! {"find": namespace.collection.as_str(), "filter": filter};
        if let Some(projection) = projection {
            command.append(bson::cstr!("projection"), projection);
        }
        command.append(bson::cstr!("readConcern"), exact::encoded(&not_before(after))?);
        let (operation, mut attempts) = (format!("reading documents of {namespace}"), Attempts::default());
        loop {
            match find(self, namespace, &command, &take).await {
                Err(error) if attempts.again(&operation, &error).await => {}
                result => return result.during(&operation),
            }
        }
    }
}

async fn find<T>(
    mongo: &Mongo,
    namespace: &Namespace,
    command: &RawDocumentBuf,
    take: &impl Fn(&RawDocument) -> T,
) -> mongodb::error::Result<Vec<T>> {
    let database = mongo.database(&namespace.database);
    let mut cursor = database.run_raw_cursor_command(command.clone()).await?.with_type::<RawDocumentBuf>();
    let mut taken = Vec::new();
    while cursor.advance().await? {
        taken.push(take(cursor.current()));
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_values_stand_by_themselves() {
        let regex = bson::Regex { pattern: "a".try_into().unwrap(), options: "".try_into().unwrap() };
        for id in [RawBson::Null, RawBson::RegularExpression(regex), rawdoc! {"$gt": 1}.into()] {
            assert_eq!(by_id(&id), rawdoc! {"_id": {"$eq": id}});
        }
        for id in [RawBson::Int32(1), "$gt".into(), rawdoc! {"a": {"$gt": 1}}.into(), rawdoc! {}.into()] {
            assert_eq!(by_id(&id), rawdoc! {"_id": id});
        }
    }
}
