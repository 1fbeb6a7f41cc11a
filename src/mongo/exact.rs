//! Values as the database holds them, byte for byte, such as `_id`s.
//!
//! The server stores texts that are not UTF-8, and finds documents by them; the driver has no
//! type for such a text. It is *carried*: as a document whose one element has a type that
//! does not exist. So no stored value is ever taken for a carried one, and where code that does
//! not know of it sends or decodes it, that is refused, and nothing else is written in its
//! place. Whatever asks for values takes its conditions from here.

use bson::{
    Bson, Document, RawArray, RawArrayBuf, RawBson, RawBsonRef, RawDocument, RawDocumentBuf, Utf8Lossy,
    rawdoc,
};
use mongodb::error::ErrorKind;

use super::element::{self, Element, finished, push_element, with_elements};
use crate::error::{Error, Result};

/// The type of the element that carries a value.
const CARRIER: u8 = 0x7e;
/// Where the name of the first element of a document begins, its length and a type before it.
const FIRST_NAME: usize = 5;
/// The same for the value, where the name is empty.
const FIRST_VALUE: usize = FIRST_NAME + 1;

/// The `_id` of a document; `None` where it has none.
pub fn id_of(document: &RawDocument) -> Option<RawBson> {
    field(document, "_id")
}

/// The first field of that name.
pub fn field(document: &RawDocument, name: &str) -> Option<RawBson> {
    element::named(document, name).map(value_of)
}

/// The elements of an array.
pub fn elements(array: &RawArray) -> Vec<RawBson> {
    element::items(array).map(value_of).collect()
}

/// A value with its type, as a document with one field without a name: equal only if identical.
pub fn bytes_of(value: RawBsonRef<'_>) -> Vec<u8> {
    single("", value).into_bytes()
}

/// The same for the `_id` of a document.
pub fn id_bytes(document: &RawDocument) -> Option<Vec<u8>> {
    Some(element::named(document, "_id")?.alone().into_bytes())
}

/// A value that [`bytes_of`] made bytes of.
pub fn from_bytes(bytes: &[u8]) -> Option<RawBson> {
    field(RawDocument::from_bytes(bytes).ok()?, "")
}

/// A document with one field.
pub fn single(name: &str, value: RawBsonRef<'_>) -> RawDocumentBuf {
    let mut document = Vec::from([0; 4]);
    push(&mut document, name, value);
    finished(document)
}

/// The condition for one of these values.
pub fn one_of<'a>(values: impl IntoIterator<Item = &'a RawBson>) -> RawDocumentBuf {
    let mut array = Vec::from([0; 4]);
    for (index, value) in values.into_iter().enumerate() {
        push(&mut array, &index.to_string(), value.as_raw_bson_ref());
    }
    with_elements([(0x04, "$in", finished(array).as_bytes())])
}

/// The condition for documents with one of these `_id`s.
pub fn with_ids(ids: &[RawBson]) -> RawDocumentBuf {
    rawdoc! {"_id": one_of(ids)}
}

/// The condition for one value.
pub fn equal(value: &RawBson) -> RawDocumentBuf {
    single("$eq", value.as_raw_bson_ref())
}

/// What we have made ourselves, as bytes.
///
/// # Errors
/// A stop where it can't be encoded.
pub fn encoded(document: &Document) -> Result<RawDocumentBuf> {
    RawDocumentBuf::try_from(document)
        .map_err(|error| Error::stopped(format!("a command could not be encoded: {error}")))
}

/// A pipeline of a condition, where there is one, and further stages.
///
/// # Errors
/// A stop where a stage can't be encoded.
pub fn pipeline(condition: RawDocumentBuf, stages: &[Document]) -> Result<RawArrayBuf> {
    let mut pipeline = RawArrayBuf::new();
    if !condition.is_empty() {
        pipeline.push(rawdoc! {"$match": condition});
    }
    for stage in stages {
        pipeline.push(encoded(stage)?);
    }
    Ok(pipeline)
}

/// A value to be shown: what is not UTF-8 is replaced in it.
pub fn shown(value: &RawBson) -> Bson {
    let alone = Utf8Lossy::<Document>::try_from(single("", value.as_raw_bson_ref()));
    alone.ok().and_then(|mut alone| alone.0.remove("")).unwrap_or_else(|| "(invalid BSON)".into())
}

/// Adds a field to a document.
pub fn append(document: &mut RawDocumentBuf, name: &str, value: RawBsonRef<'_>) {
    let mut bytes = std::mem::take(document).into_bytes();
    bytes.pop();
    push(&mut bytes, name, value);
    *document = finished(bytes);
}

/// The answer to a command, which names `_id`s that it has written and values that stood in its
/// way: the driver can't decode one with a text that is not UTF-8, although all was done.
///
/// # Errors
/// The driver's error for anything else.
pub fn answered(answer: mongodb::error::Result<Document>) -> mongodb::error::Result<Document> {
    answer.or_else(|error| match error.server_response().filter(|_| is_undecoded(&error)) {
        Some(response) => match Utf8Lossy::<Document>::try_from(response) {
            Ok(Utf8Lossy(answer)) if answer.get("ok").and_then(Bson::as_f64) == Some(1.0) => Ok(answer),
            _ => Err(error),
        },
        None => Err(error),
    })
}

fn is_undecoded(error: &mongodb::error::Error) -> bool {
    !matches!(error.kind.as_ref(), ErrorKind::Command(_) | ErrorKind::Write(_))
}

/// Whether a value is carried, so that no query or document of the driver can hold it.
pub fn is_carried(value: RawBsonRef<'_>) -> bool {
    matches!(value, RawBsonRef::Document(document) if document.as_bytes().get(4) == Some(&CARRIER))
}

fn value_of(element: Element<'_>) -> RawBson {
    match element.alone().get("") {
        Ok(Some(value)) => value.into(),
        _ => {
            let carried = [&[element.kind], element.value].concat();
            RawBson::Document(with_elements([(CARRIER, "", carried.as_slice())]))
        }
    }
}

/// Adds an element to an unfinished document.
fn push(document: &mut Vec<u8>, name: &str, value: RawBsonRef<'_>) {
    if let (RawBsonRef::Document(carrier), true) = (value, is_carried(value)) {
        let bytes = carrier.as_bytes();
        let kind = bytes.get(FIRST_VALUE).copied().unwrap_or(CARRIER);
        let value = bytes.get(FIRST_VALUE + 1..bytes.len().saturating_sub(1)).unwrap_or_default();
        return push_element(document, kind, name.as_bytes(), value);
    }
    let mut alone = RawDocumentBuf::new();
    alone.append(bson::cstr!(""), value);
    let bytes = alone.as_bytes();
    let kind = bytes.get(FIRST_NAME - 1).copied().unwrap_or(CARRIER);
    push_element(
        document,
        kind,
        name.as_bytes(),
        bytes.get(FIRST_VALUE..bytes.len() - 1).unwrap_or_default(),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A document with this text as its `_id`, and another field.
    fn with_text(text: &[u8]) -> RawDocumentBuf {
        let mut value = i32::try_from(text.len() + 1).expect("small").to_le_bytes().to_vec();
        value.extend_from_slice(text);
        value.push(0);
        with_elements([(0x02, "_id", value.as_slice()), (0x08, "b", &[1])])
    }

    #[test]
    fn a_text_that_is_not_utf_8_is_told_apart_and_written_as_it_was() {
        let documents = [with_text(b"a\xff"), with_text(b"a\xfe"), with_text("a\u{fffd}".as_bytes())];
        let ids: Vec<RawBson> = documents.iter().filter_map(|document| id_of(document)).collect();
        assert_eq!(
            ids.iter().map(|id| is_carried(id.as_raw_bson_ref())).collect::<Vec<_>>(),
            [true, true, false]
        );
        for (document, id) in documents.iter().zip(&ids) {
            let mut again = single("_id", id.as_raw_bson_ref());
            append(&mut again, "b", RawBsonRef::Boolean(true));
            assert_eq!(again, *document);
            let bytes = bytes_of(id.as_raw_bson_ref());
            assert_eq!(id_bytes(document).as_ref(), Some(&bytes));
            assert_eq!(from_bytes(&bytes).as_ref(), Some(id));
        }
        assert_ne!(ids[0], ids[1]);
        assert_eq!(shown(&ids[0]), Bson::from("a\u{fffd}"));
        assert!(Bson::try_from(ids[0].clone()).is_err(), "whoever decodes it is told");
    }

    #[test]
    fn any_other_value_is_what_the_driver_makes_of_it() {
        let values: Vec<RawBson> = vec![
            1.into(),
            "x".into(),
            rawdoc! {}.into(),
            rawdoc! {"": 1, "a": {"b": [1]}}.into(),
            RawBson::Null,
            bson::oid::ObjectId::from_bytes([7; 12]).into(),
        ];
        assert_eq!(one_of(&values), rawdoc! {"$in": RawArrayBuf::from_iter(values.clone())});
        for value in values {
            let mut document = rawdoc! {"a": 1};
            document.append(bson::cstr!("_id"), value.clone());
            assert_eq!(id_of(&document), Some(value.clone()));
            assert_eq!(single("_id", value.as_raw_bson_ref()), rawdoc! {"_id": value.clone()});
            let mut appended = rawdoc! {"a": 1};
            append(&mut appended, "_id", value.as_raw_bson_ref());
            assert_eq!(appended, document);
        }
        assert_eq!(id_of(&rawdoc! {"a": 1}), None);
        assert!(!is_carried(rawdoc! {"a": 1}.as_ref().into()));
    }
}
