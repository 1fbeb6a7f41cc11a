//! The elements of a document, whatever its texts hold. Pure.
//!
//! The server stores names and texts that are not UTF-8; the driver's walk over a document
//! ends at the first such name, and can't read such a value. Here both are bytes.

use bson::spec::ElementType;
use bson::{RawArray, RawBsonRef, RawDocument, RawDocumentBuf};

/// One field of a document, or one item of an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Element<'a> {
    /// Its name: any bytes but zeros.
    pub name: &'a [u8],
    /// The number of its type.
    pub kind: u8,
    /// What the database holds after the name.
    pub value: &'a [u8],
}

impl<'a> Element<'a> {
    /// Its type; `None` where there is no such type.
    pub fn element_type(&self) -> Option<ElementType> {
        ElementType::from(self.kind)
    }

    /// Its value alone, in a document under an empty name. What is in it is to be read with care.
    pub fn alone(&self) -> RawDocumentBuf {
        with_elements([(self.kind, &b""[..], self.value)])
    }

    /// The document or array that it is.
    pub fn nested(&self) -> Option<Nested<'a>> {
        let document = RawDocument::from_bytes(self.value).ok();
        match self.element_type() {
            Some(ElementType::EmbeddedDocument) => document.map(Nested::Document),
            Some(ElementType::Array) => document.map(Nested::Array),
            _ => None,
        }
    }
}

/// What holds elements of its own. An array is a document whose fields are numbered.
#[derive(Debug, Clone, Copy)]
pub enum Nested<'a> {
    /// A document.
    Document(&'a RawDocument),
    /// An array.
    Array(&'a RawDocument),
}

/// The elements of a document in their order; ends early only where its bytes are no BSON.
pub fn elements(document: &RawDocument) -> impl Iterator<Item = Element<'_>> {
    let bytes = document.as_bytes();
    let end = bytes.len().saturating_sub(1);
    let mut rest = bytes.get(4..end).unwrap_or_default();
    std::iter::from_fn(move || {
        let (element, behind) = split(rest)?;
        rest = behind;
        Some(element)
    })
}

/// The items of an array.
pub fn items(array: &RawArray) -> impl Iterator<Item = Element<'_>> {
    RawDocument::from_bytes(array.as_bytes()).into_iter().flat_map(elements)
}

/// The first element of this name.
pub fn named<'a>(document: &'a RawDocument, name: &str) -> Option<Element<'a>> {
    elements(document).find(|element| element.name == name.as_bytes())
}

/// The value that [`Element::alone`] holds; `None` where it is not what its type promises.
pub fn readable(value: &RawDocument) -> Option<RawBsonRef<'_>> {
    value.get("").ok().flatten()
}

/// A document of elements as they are stored: the number of the type, the name, the value.
pub(crate) fn with_elements<'a, N: AsRef<[u8]>>(
    elements: impl IntoIterator<Item = (u8, N, &'a [u8])>,
) -> RawDocumentBuf {
    let mut document = Vec::from([0; 4]);
    for (kind, name, bytes) in elements {
        push_element(&mut document, kind, name.as_ref(), bytes);
    }
    finished(document)
}

/// Adds an element as it is stored to an unfinished document.
pub(super) fn push_element(document: &mut Vec<u8>, kind: u8, name: &[u8], value: &[u8]) {
    document.push(kind);
    document.extend_from_slice(name);
    document.push(0);
    document.extend_from_slice(value);
}

/// Writes the length, which stands in front, and the end.
pub(super) fn finished(mut document: Vec<u8>) -> RawDocumentBuf {
    document.push(0);
    let length = i32::try_from(document.len()).unwrap_or(i32::MAX).to_le_bytes();
    document.iter_mut().zip(length).for_each(|(byte, length)| *byte = length);
    RawDocumentBuf::from_bytes(document).unwrap_or_default()
}

/// The first element, and what stands behind it.
fn split(bytes: &[u8]) -> Option<(Element<'_>, &[u8])> {
    let (kind, rest) = bytes.split_first()?;
    let (name, rest) = rest.split_at_checked(rest.iter().position(|byte| *byte == 0)?)?;
    let rest = rest.get(1..)?;
    let (value, behind) = rest.split_at_checked(length(*kind, rest)?)?;
    Some((Element { name, kind: *kind, value }, behind))
}

/// How many bytes the value takes that stands in front of these.
fn length(kind: u8, bytes: &[u8]) -> Option<usize> {
    let prefix = || usize::try_from(i32::from_le_bytes(*bytes.first_chunk()?)).ok();
    let text_end = |from: usize| Some(from + bytes.get(from..)?.iter().position(|byte| *byte == 0)? + 1);
    Some(match ElementType::from(kind)? {
        ElementType::Undefined | ElementType::Null | ElementType::MinKey | ElementType::MaxKey => 0,
        ElementType::Boolean => 1,
        ElementType::Int32 => 4,
        ElementType::Double | ElementType::DateTime | ElementType::Timestamp | ElementType::Int64 => 8,
        ElementType::ObjectId => 12,
        ElementType::Decimal128 => 16,
        ElementType::String | ElementType::JavaScriptCode | ElementType::Symbol => prefix()? + 4,
        ElementType::EmbeddedDocument | ElementType::Array | ElementType::JavaScriptCodeWithScope => {
            prefix()?
        }
        ElementType::Binary => prefix()? + 5,
        ElementType::DbPointer => prefix()? + 4 + 12,
        ElementType::RegularExpression => text_end(text_end(0)?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::spec::BinarySubtype;
    use bson::{Binary, Bson, DateTime, Decimal128, Regex, Timestamp, doc, oid::ObjectId};

    #[test]
    fn every_type_has_its_length() {
        let regex =
            Regex { pattern: "a.b".try_into().expect("text"), options: "im".try_into().expect("text") };
        let code = bson::JavaScriptCodeWithScope { code: "f()".into(), scope: doc! {"a": 1} };
        let values: Vec<Bson> = vec![
            Bson::Double(1.5),
            "text".into(),
            doc! {"a": {"b": 1}}.into(),
            vec![Bson::from(1), doc! {"c": "d"}.into()].into(),
            Binary { subtype: BinarySubtype::Generic, bytes: vec![1, 2, 3] }.into(),
            Bson::Undefined,
            ObjectId::from_bytes([3; 12]).into(),
            true.into(),
            DateTime::from_millis(9).into(),
            Bson::Null,
            Bson::RegularExpression(regex),
            Bson::JavaScriptCode("g()".into()),
            Bson::Symbol("s".into()),
            Bson::JavaScriptCodeWithScope(code),
            5.into(),
            Timestamp { time: 1, increment: 2 }.into(),
            6_i64.into(),
            "1.5".parse::<Decimal128>().expect("a decimal").into(),
            Bson::MinKey,
            Bson::MaxKey,
        ];
        let mut document = doc! {};
        for (number, value) in values.iter().enumerate() {
            document.insert(format!("f{number}"), value.clone());
        }
        let document = RawDocumentBuf::try_from(&document).expect("BSON");
        let found: Vec<Element<'_>> = elements(&document).collect();
        assert_eq!(found.len(), values.len());
        for (number, (element, value)) in found.iter().zip(values).enumerate() {
            assert_eq!(element.name, format!("f{number}").as_bytes());
            let alone = element.alone();
            let read = readable(&alone).expect("a value");
            assert_eq!(Bson::try_from(read).expect("a value"), value);
        }
    }

    #[test]
    fn names_and_texts_that_are_not_utf_8_end_nothing() {
        let text = b"\x02\0\0\0\xff\0";
        let document =
            with_elements([(0x02, &b"a\xfe"[..], &text[..]), (0x10, &b"b"[..], &[7, 0, 0, 0][..])]);
        let found: Vec<Element<'_>> = elements(&document).collect();
        assert_eq!((found[0].name, found[0].value), (&b"a\xfe"[..], &text[..]));
        assert!(readable(&found[0].alone()).is_none());
        assert_eq!(named(&document, "b"), Some(found[1]));
    }

    #[test]
    fn what_is_no_bson_ends_early() {
        // A text that claims more bytes than there are, and a type that does not exist.
        for element in [&[0x02, b'a', 0, 99, 0, 0, 0, b'x', 0][..], &[0x55, b'a', 0, 1]] {
            let mut bytes = i32::try_from(element.len() + 5).expect("small").to_le_bytes().to_vec();
            bytes.extend_from_slice(element);
            bytes.push(0);
            let document = RawDocumentBuf::from_bytes(bytes).expect("a length and an end");
            assert_eq!(elements(&document).count(), 0);
        }
    }
}
