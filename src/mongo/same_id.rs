//! Which values are one `_id` to the server, whatever their types: it compares numbers
//! by what they are worth, at any depth.

use std::collections::HashMap;

use bson::spec::ElementType;
use bson::{RawBson, RawBsonRef, RawDocument, RawDocumentBuf};

use super::element::{self, Element, Nested};
use super::exact;

/// A double has no more digits than that.
const DIGITS: usize = 767;

/// The same for two values where the server takes them for one, in a collection
/// without a collation; different where it does not. Pure.
pub fn key(value: RawBsonRef<'_>) -> Vec<u8> {
    let alone = exact::single("", value);
    element::elements(&alone).next().map(key_of_element).unwrap_or_default()
}

/// Documents by the [`key`] of their `_id`.
pub fn by_key(documents: Vec<RawDocumentBuf>) -> HashMap<Vec<u8>, RawDocumentBuf> {
    let keyed = |document: RawDocumentBuf| Some((key_of(&document)?, document));
    documents.into_iter().filter_map(keyed).collect()
}

/// The [`key`] of a document's `_id`.
pub fn key_of(document: &RawDocument) -> Option<Vec<u8>> {
    element::named(document, "_id").map(key_of_element)
}

/// The [`key`] of an `_id`.
pub fn key_of_id(id: &RawBson) -> Vec<u8> {
    key(id.as_raw_bson_ref())
}

fn key_of_element(element: Element<'_>) -> Vec<u8> {
    let mut key = Vec::new();
    write(element, &mut key);
    key
}

fn write(element: Element<'_>, key: &mut Vec<u8>) {
    match (element.element_type(), element.nested()) {
        (Some(ElementType::String | ElementType::Symbol), _) => write_text(b's', text(element.value), key),
        (_, Some(Nested::Document(document))) => write_elements(b'd', document, key),
        (_, Some(Nested::Array(items))) => write_elements(b'a', items, key),
        (Some(ElementType::JavaScriptCodeWithScope), _) => write_code(element.value, key),
        _ => write_alone(&element.alone(), key),
    }
}

fn write_alone(alone: &RawDocument, key: &mut Vec<u8>) {
    match element::readable(alone).and_then(worth) {
        Some(worth) => write_text(b'n', worth.as_bytes(), key),
        None => {
            key.push(b'o');
            // They tell their length.
            key.extend(alone.as_bytes());
        }
    }
}

/// A script, and the document of its variables; both tell their length.
fn write_code(code: &[u8], key: &mut Vec<u8>) {
    let text_at = |bytes: &[u8]| usize::try_from(i32::from_le_bytes(*bytes.first_chunk()?)).ok();
    let parts = code.get(4..).and_then(|rest| rest.split_at_checked(4 + text_at(rest)?));
    let (script, scope) = parts.unwrap_or((code, &[]));
    write_text(b'c', script, key);
    match RawDocument::from_bytes(scope) {
        Ok(scope) => write_elements(b'd', scope, key),
        Err(_) => write_text(b'o', scope, key),
    }
}

/// Names of the items of an array are their numbers, whatever stands there.
fn write_elements(kind: u8, document: &RawDocument, key: &mut Vec<u8>) {
    key.push(kind);
    for element in element::elements(document) {
        if kind == b'd' {
            write_text(b'f', element.name, key);
        }
        write(element, key);
    }
    key.push(b'.');
}

fn write_text(kind: u8, text: &[u8], key: &mut Vec<u8>) {
    key.push(kind);
    key.extend((text.len() as u64).to_le_bytes());
    key.extend(text);
}

/// Without its length, which stands in front, and the zero at its end.
fn text(value: &[u8]) -> &[u8] {
    value.get(4..value.len().saturating_sub(1)).unwrap_or_default()
}

/// What a number is worth, to its last digit.
fn worth(value: RawBsonRef<'_>) -> Option<String> {
    match value {
        RawBsonRef::Int32(number) => Some(normal(&number.to_string())),
        RawBsonRef::Int64(number) => Some(normal(&number.to_string())),
        RawBsonRef::Double(number) => Some(normal(&format!("{number:.*e}", DIGITS - 1))),
        RawBsonRef::Decimal128(number) => Some(normal(&number.to_string())),
        _ => None,
    }
}

/// One form for all texts of one number: its digits without zeros around them, and
/// the power of ten that they are multiplied by.
fn normal(text: &str) -> String {
    let text = text.to_ascii_lowercase();
    let (sign, text) = text.strip_prefix('-').map_or(("", text.as_str()), |text| ("-", text));
    if text.starts_with("nan") {
        return "nan".into();
    }
    if text.starts_with("inf") {
        return format!("{sign}inf");
    }
    let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let shortened = digits.trim_end_matches('0');
    let significant = shortened.trim_start_matches('0');
    if significant.is_empty() {
        return "0".into();
    }
    let length = |text: &str| i64::try_from(text.len()).unwrap_or(0);
    let exponent: i64 = exponent.parse().unwrap_or(0);
    let exponent = exponent - length(fraction) + length(&digits) - length(shortened);
    format!("{sign}{significant}e{exponent}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::{Bson, doc};

    fn key_to(value: impl Into<Bson>) -> Vec<u8> {
        key(RawBson::try_from(value.into()).unwrap().as_raw_bson_ref())
    }

    fn decimal(text: &str) -> Bson {
        Bson::Decimal128(text.parse().unwrap())
    }

    #[test]
    fn what_the_server_takes_for_one_has_one_key() {
        let sevens =
            [Bson::Int32(70), Bson::Int64(70), Bson::Double(70.0), decimal("70.00"), decimal("7E+1")];
        for same in sevens {
            assert_eq!(key_to(same.clone()), key_to(70), "{same}");
            assert_eq!(key_to(doc! {"a": [{"b": same.clone()}]}), key_to(doc! {"a": [{"b": 70}]}), "{same}");
        }
        for zero in [Bson::Double(-0.0), decimal("0E+7"), decimal("-0"), Bson::Int64(0)] {
            assert_eq!(key_to(zero), key_to(0));
        }
        assert_eq!(key_to(f64::NAN), key_to(decimal("NaN")));
        assert_eq!(key_to(f64::NEG_INFINITY), key_to(decimal("-Infinity")));
        assert_eq!(key_to(0.5), key_to(decimal("0.50")));
        assert_eq!(key_to(2_f64.powi(100)), key_to(decimal("1267650600228229401496703205376")));
        assert_eq!(key_to(i64::MAX), key_to(decimal("9223372036854775807")));
        assert_eq!(key_to(Bson::Symbol("a".into())), key_to("a"));
    }

    #[test]
    fn what_is_not_one_has_another_key() {
        let different: Vec<Bson> = vec![
            1.into(),
            (-1).into(),
            10.into(),
            1.5.into(),
            0.1.into(),
            decimal("0.1"),
            decimal("0.1000000000000000055511151231257827"),
            5e-324.into(),
            1e-323.into(),
            f64::MAX.into(),
            i64::MAX.into(),
            9_223_372_036_854_775_808.0.into(),
            "1".into(),
            f64::INFINITY.into(),
            Bson::Null,
            true.into(),
            doc! {}.into(),
            doc! {"a": 1}.into(),
            doc! {"a": 2}.into(),
            doc! {"a": 1, "b": 1}.into(),
            doc! {"b": 1, "a": 1}.into(),
            doc! {"a": {"a": 1}}.into(),
            doc! {"a": [1]}.into(),
            doc! {"a": [1, 1]}.into(),
            doc! {"a": [[1], 1]}.into(),
            doc! {"a": [[1, 1]]}.into(),
        ];
        for (at, one) in different.iter().enumerate() {
            for other in different.iter().skip(at + 1) {
                assert_ne!(key_to(one.clone()), key_to(other.clone()), "{one} and {other}");
            }
        }
    }
}
