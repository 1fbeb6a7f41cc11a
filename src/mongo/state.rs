//! How a document is written so that afterwards it is exactly that, byte for byte,
//! whatever its fields and values are and whatever stood there before.
//!
//! A pipeline that replaces would be exact too, but the server computes the difference
//! between both versions and ends itself where one of them has a field twice. A plain
//! replacement is logged as a whole. Two kinds of documents it can't express or would
//! change: one whose first field begins with a dollar is taken for operators, and a
//! `Timestamp(0, 0)` at the top level becomes the time of day. Those are removed and
//! inserted, which is one act within a transaction.

use bson::spec::ElementType;
use bson::{RawArrayBuf, RawBson, RawDocument, RawDocumentBuf, rawdoc};

use super::by_id::{by_id, deletion};
use super::{element, exact};
use crate::error::{Error, Result};

/// The commands after which a collection holds these documents, to be sent in this order within one
/// transaction. The last one has one statement for each of them, in their order; without
/// documents there is none. `is_written_anew` tells of which the present one is removed first.
pub(super) fn write_states(
    collection: &str,
    documents: &[RawDocumentBuf],
    is_written_anew: impl Fn(usize) -> bool,
) -> Result<Vec<RawDocumentBuf>> {
    let (mut removed, mut updates) = (Vec::new(), RawArrayBuf::new());
    for (index, document) in documents.iter().enumerate() {
        let id = id_of(document)?;
        if is_written_anew(index) || !is_replaceable(document) {
            updates.push(insertion(document)?);
            removed.push(id);
        } else {
            updates.push(rawdoc! {"q": by_id(&id), "u": document.clone(), "upsert": true});
        }
    }
    let mut commands = Vec::new();
    if !removed.is_empty() {
        commands.push(deletion(collection, &removed));
    }
    if !documents.is_empty() {
        let mut command = rawdoc! {"update": collection};
        command.append(bson::cstr!("updates"), updates);
        commands.push(command);
    }
    Ok(commands)
}

/// The statement that inserts a document whatever its fields and values are. The condition matches
/// nothing, so that one with the same `_id` is a duplicate and never replaced.
pub(super) fn insertion(document: &RawDocument) -> Result<RawDocumentBuf> {
    let mut pipeline = RawArrayBuf::new();
    pipeline.push(rawdoc! {"$replaceWith": {"$literal": document.to_owned()}});
    Ok(rawdoc! {
        "q": {"_id": exact::equal(&id_of(document)?), "$nor": [{}]},
        "u": pipeline,
        "upsert": true,
    })
}

/// Whether an insert would change it: a `Timestamp(0, 0)` at the top level
/// becomes the time of day.
pub(super) fn is_changed_by_inserts(document: &RawDocument) -> bool {
    element::elements(document).any(|element| {
        element.element_type() == Some(ElementType::Timestamp) && element.value.iter().all(|byte| *byte == 0)
    })
}

/// Whether a plain replacement leaves exactly this document.
pub(super) fn is_replaceable(document: &RawDocument) -> bool {
    !is_changed_by_inserts(document)
        && element::elements(document).all(|element| !element.name.starts_with(b"$"))
}

fn id_of(document: &RawDocument) -> Result<RawBson> {
    exact::id_of(document).ok_or_else(|| Error::stopped("a document has no `_id`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::{Document, Timestamp, doc};

    fn commands(documents: &[RawDocumentBuf], anew: bool) -> Vec<Document> {
        let commands = write_states("c", documents, |_| anew).expect("commands");
        commands.into_iter().map(|command| Document::try_from(command).expect("valid")).collect()
    }

    #[test]
    fn plain_documents_are_replaced_and_others_inserted_anew() {
        let zero = Timestamp { time: 0, increment: 0 };
        let plain = rawdoc! {"_id": 1, "a.b": {"$c": zero}};
        let delicate = [rawdoc! {"_id": 2, "t": zero}, rawdoc! {"_id": 3, "a": 1, "$b": 2}];
        let [plain_first, second, third] = [plain, delicate[0].clone(), delicate[1].clone()];
        let sent = commands(&[plain_first.clone(), second, third], false);
        assert_eq!(sent.len(), 2);
        let removed = sent[0].get_array("deletes").expect("deletes");
        assert_eq!(removed.len(), 2);
        let written = sent[1].get_array("updates").expect("updates");
        assert_eq!(written.len(), 3);
        let first = written[0].as_document().expect("a statement");
        assert_eq!(first.get_document("u").expect("a replacement").get_i32("_id").ok(), Some(1));
        assert_eq!(
            written[1].as_document().expect("a statement").get_document("q").expect("q"),
            &doc! {"_id": {"$eq": 2}, "$nor": [{}]}
        );
        let one = [plain_first];
        assert_eq!((commands(&one, false).len(), commands(&one, true).len()), (1, 2));
        assert!(commands(&[], false).is_empty());
    }

    #[test]
    fn what_an_insert_would_change_is_seen() {
        let zero = Timestamp { time: 0, increment: 0 };
        assert!(is_changed_by_inserts(&rawdoc! {"_id": 1, "a": 1, "t": zero}));
        assert!(is_changed_by_inserts(&rawdoc! {"_id": zero}));
        assert!(!is_changed_by_inserts(&rawdoc! {"_id": 1, "n": {"t": zero}, "l": [zero]}));
        assert!(!is_changed_by_inserts(&rawdoc! {"_id": 1, "t": Timestamp { time: 0, increment: 1 }}));
    }
}
