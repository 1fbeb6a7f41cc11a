//! Single documents by their `_id`s, as a majority has them.

use bson::{Bson, Document, RawArrayBuf, RawBson, RawDocument, RawDocumentBuf, Timestamp, doc, rawdoc};
use mongodb::options::ReadConcern;
use mongodb::{ClientSession, Collection};

use super::Mongo;
use super::command::Attempts;
use super::source::to_bson;
use crate::config::values::Namespace;
use crate::error::{Context, Result};

/// The condition for the document with this `_id`. The server finds it without
/// any planning where the value stands by itself, which a pattern, an operator
/// and null must not.
pub(super) fn by_id(id: RawBson) -> RawDocumentBuf {
    let stands_by_itself = match &id {
        RawBson::RegularExpression(_) | RawBson::Null | RawBson::Undefined => false,
        RawBson::Document(document) => {
            let first = document.iter().next().and_then(Result::ok);
            first.is_none_or(|(name, _)| !name.as_str().starts_with('$'))
        }
        _ => true,
    };
    if stands_by_itself {
        rawdoc! {"_id": id}
    } else {
        rawdoc! {"_id": {"$eq": id}}
    }
}

/// The command that deletes the documents with these `_id`s.
pub(super) fn deletion(collection: &str, ids: &[RawBson]) -> RawDocumentBuf {
    let mut deletes = RawArrayBuf::new();
    for id in ids {
        deletes.push(rawdoc! {"q": by_id(id.clone()), "limit": 1});
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
        self.find_by_ids(namespace, ids, &Document::new(), Some(doc! {"_id": 1}), None, take).await
    }

    async fn find_by_ids<T>(
        &self,
        namespace: &Namespace,
        ids: &[RawBson],
        condition: &Document,
        projection: Option<Document>,
        after: Option<Timestamp>,
        take: impl Fn(&RawDocument) -> T,
    ) -> Result<Vec<T>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let ids = ids.iter().map(to_bson).collect::<Result<Vec<Bson>>>()?;
        let mut filter = doc! {"_id": {"$in": ids}};
        if !condition.is_empty() {
            filter.insert("$and", vec![condition.clone()]);
        }
        let mut session = self.client().start_session().await.during("starting a session")?;
        if let Some(after) = after {
            session.advance_operation_time(after);
        }
        let collection = self.collection(namespace);
        let (operation, mut attempts) = (format!("reading documents of {namespace}"), Attempts::default());
        loop {
            match find(&collection, &filter, projection.as_ref(), &mut session, &take).await {
                Err(error) if attempts.again(&operation, &error).await => {}
                result => return result.during(&operation),
            }
        }
    }
}

async fn find<T>(
    collection: &Collection<RawDocumentBuf>,
    filter: &Document,
    projection: Option<&Document>,
    session: &mut ClientSession,
    take: &impl Fn(&RawDocument) -> T,
) -> mongodb::error::Result<Vec<T>> {
    let mut find = collection.find(filter.clone()).read_concern(ReadConcern::majority());
    if let Some(projection) = projection {
        find = find.projection(projection.clone());
    }
    let mut cursor = find.session(&mut *session).await?;
    let mut taken = Vec::new();
    while cursor.advance(&mut *session).await? {
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
            assert_eq!(by_id(id.clone()), rawdoc! {"_id": {"$eq": id}});
        }
        for id in [RawBson::Int32(1), "$gt".into(), rawdoc! {"a": {"$gt": 1}}.into(), rawdoc! {}.into()] {
            assert_eq!(by_id(id.clone()), rawdoc! {"_id": id});
        }
    }
}
