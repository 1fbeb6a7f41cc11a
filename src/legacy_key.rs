//! The identity of a legacy key: the text that is sent to the API.
//!
//! The same text means the same key, whatever BSON type a document stores it
//! in, so that a key is asked for once although one collection holds it as a
//! string and another as a number.

use bson::oid::ObjectId;
use bson::spec::{BinarySubtype, ElementType};
use bson::{Bson, Decimal128, RawBsonRef, Uuid};

/// Doubles from here on no longer tell whole numbers apart.
const FIRST_INEXACT_DOUBLE: f64 = 9_007_199_254_740_992.0;

/// The BSON types, by their `$type` names, whose values may be usable keys.
/// Others are not even read: a document's value may be megabytes long.
pub const READABLE_TYPES: [&str; 7] = ["string", "int", "long", "double", "decimal", "objectId", "binData"];

/// The text of a usable legacy key; `None` for null, the empty string and
/// every type or value that has no identity.
pub fn text_of(value: RawBsonRef<'_>) -> Option<String> {
    match value {
        RawBsonRef::String(text) => (!text.is_empty()).then(|| text.to_owned()),
        RawBsonRef::Int32(number) => Some(number.to_string()),
        RawBsonRef::Int64(number) => Some(number.to_string()),
        RawBsonRef::Double(number) => whole(number),
        RawBsonRef::Decimal128(number) => finite(&number.to_string()),
        RawBsonRef::ObjectId(id) => Some(id.to_hex()),
        RawBsonRef::Binary(binary) if binary.subtype == BinarySubtype::Uuid => {
            let bytes: [u8; 16] = binary.bytes.try_into().ok()?;
            Some(bson::Uuid::from_bytes(bytes).to_string())
        }
        _ => None,
    }
}

/// The values that may have this text, to find them in a collection: one per
/// type that MongoDB tells apart when it compares. What it finds by them may have
/// another text all the same, as 42.0 has.
pub fn values_of(text: &str) -> Vec<Bson> {
    let mut values = vec![Bson::from(text)];
    if let Ok(number) = text.parse::<i64>() {
        values.push(number.into());
    } else if let Ok(decimal) = text.parse::<Decimal128>() {
        values.push(decimal.into());
    }
    if let Ok(id) = ObjectId::parse_str(text) {
        values.push(id.into());
    }
    if let Ok(uuid) = Uuid::parse_str(text) {
        values.push(uuid.into());
    }
    values
}

/// Whether a text that stands for a value of that type is a usable key: a
/// decimal may be no number.
pub fn is_text_of(type_name: &str, text: &str) -> bool {
    type_name != "decimal" || finite(text).is_some()
}

fn whole(number: f64) -> Option<String> {
    if number.fract() != 0.0 || number.abs() >= FIRST_INEXACT_DOUBLE {
        return None;
    }
    #[expect(clippy::cast_possible_truncation, reason = "whole and below 2^53, which also turns -0.0 into 0")]
    let number = number as i64;
    Some(number.to_string())
}

fn finite(text: &str) -> Option<String> {
    let special = text.contains("NaN") || text.contains("Inf");
    (!special).then(|| text.to_owned())
}

/// The `$type` name of an element type, for counts and guards.
pub fn type_name(element: ElementType) -> &'static str {
    match element {
        ElementType::Double => "double",
        ElementType::String => "string",
        ElementType::EmbeddedDocument => "object",
        ElementType::Array => "array",
        ElementType::Binary => "binData",
        ElementType::Undefined => "undefined",
        ElementType::ObjectId => "objectId",
        ElementType::Boolean => "bool",
        ElementType::DateTime => "date",
        ElementType::Null => "null",
        ElementType::RegularExpression => "regex",
        ElementType::DbPointer => "dbPointer",
        ElementType::JavaScriptCode => "javascript",
        ElementType::Symbol => "symbol",
        ElementType::JavaScriptCodeWithScope => "javascriptWithScope",
        ElementType::Int32 => "int",
        ElementType::Timestamp => "timestamp",
        ElementType::Int64 => "long",
        ElementType::Decimal128 => "decimal",
        ElementType::MinKey => "minKey",
        ElementType::MaxKey => "maxKey",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::{RawBson, rawdoc};

    fn text(value: impl Into<Bson>) -> Option<String> {
        let raw = RawBson::try_from(value.into()).expect("a BSON value");
        text_of(raw.as_raw_bson_ref())
    }

    #[test]
    fn equal_numbers_are_one_key_whatever_their_type() {
        for value in [Bson::Int32(42), Bson::Int64(42), Bson::Double(42.0), Bson::String("42".into())] {
            assert_eq!(text(value), Some("42".into()));
        }
        assert_eq!(text(-0.0), Some("0".into()));
        assert_eq!(text(i64::MAX), Some("9223372036854775807".into()));
    }

    #[test]
    fn decimals_keep_their_form_and_ids_their_canonical_text() {
        let decimal: bson::Decimal128 = "5.0".parse().expect("a decimal");
        assert_eq!(text(decimal), Some("5.0".into()));
        let id = bson::oid::ObjectId::parse_str("507f1f77bcf86cd799439011").expect("an id");
        assert_eq!(text(id), Some("507f1f77bcf86cd799439011".into()));
        let uuid = bson::Uuid::parse_str("00112233-4455-6677-8899-aabbccddeeff").expect("a uuid");
        assert_eq!(text(Bson::from(uuid)), Some("00112233-4455-6677-8899-aabbccddeeff".into()));
    }

    #[test]
    fn every_value_is_found_by_one_of_its_text() {
        let id = ObjectId::parse_str("507f1f77bcf86cd799439011").expect("an id");
        let uuid = Uuid::parse_str("00112233-4455-6677-8899-aabbccddeeff").expect("a uuid");
        let decimal: Decimal128 = "1E+3".parse().expect("a decimal");
        for value in [Bson::from("K1"), Bson::Int64(42), id.into(), uuid.into(), decimal.into()] {
            let text = text(value.clone()).expect("a key");
            assert!(values_of(&text).contains(&value), "{text}");
        }
        assert_eq!(values_of("K1"), [Bson::from("K1")]);
    }

    #[test]
    fn what_has_no_identity_is_unusable() {
        let nan: bson::Decimal128 = "NaN".parse().expect("a decimal");
        for value in [
            Bson::Null,
            Bson::String(String::new()),
            Bson::Boolean(true),
            Bson::Double(1.5),
            Bson::Double(f64::NAN),
            Bson::Double(f64::INFINITY),
            Bson::Double(FIRST_INEXACT_DOUBLE),
            Bson::Decimal128(nan),
            Bson::Array(vec!["K1".into()]),
            Bson::Document(bson::doc! {"a": 1}),
            Bson::DateTime(bson::DateTime::from_millis(0)),
        ] {
            assert_eq!(text(value.clone()), None, "{value}");
        }
        let legacy_uuid = rawdoc! {"u": bson::Binary { subtype: BinarySubtype::UuidOld, bytes: vec![0; 16] }};
        assert_eq!(text_of(legacy_uuid.get("u").expect("valid").expect("present")), None);
    }
}
