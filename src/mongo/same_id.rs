//! Which values are one `_id` to the server, whatever their types: it compares numbers
//! by what they are worth, at any depth.

use std::collections::HashMap;

use bson::{RawBson, RawBsonRef, RawDocument, RawDocumentBuf};

use super::sink::value_bytes;

/// A double has no more digits than that.
const DIGITS: usize = 767;

/// The same for two values where the server takes them for one, in a collection
/// without a collation; different where it does not. Pure.
pub fn key(value: RawBsonRef<'_>) -> Vec<u8> {
    let mut key = Vec::new();
    write(value, &mut key);
    key
}

/// Documents by the [`key`] of their `_id`.
pub fn by_key(documents: Vec<RawDocumentBuf>) -> HashMap<Vec<u8>, RawDocumentBuf> {
    let keyed = |document: RawDocumentBuf| Some((key_of(&document)?, document));
    documents.into_iter().filter_map(keyed).collect()
}

/// The [`key`] of a document's `_id`.
pub fn key_of(document: &RawDocument) -> Option<Vec<u8>> {
    document.get("_id").ok().flatten().map(key)
}

/// The [`key`] of an `_id`.
pub fn key_of_id(id: &RawBson) -> Vec<u8> {
    key(id.as_raw_bson_ref())
}

fn write(value: RawBsonRef<'_>, key: &mut Vec<u8>) {
    if let Some(worth) = worth(value) {
        return write_text('n', &worth, key);
    }
    match value {
        RawBsonRef::String(text) | RawBsonRef::Symbol(text) => write_text('s', text, key),
        RawBsonRef::Document(document) => write_document('d', document, key),
        RawBsonRef::Array(array) => {
            key.push(b'a');
            for value in array.into_iter().flatten() {
                write(value, key);
            }
            key.push(b'.');
        }
        RawBsonRef::JavaScriptCodeWithScope(code) => {
            write_text('c', code.code, key);
            write_document('d', code.scope, key);
        }
        other => {
            key.push(b'o');
            // They tell their length.
            key.extend(value_bytes(other));
        }
    }
}

fn write_document(kind: char, document: &RawDocument, key: &mut Vec<u8>) {
    key.push(kind as u8);
    for (name, value) in document.iter().flatten() {
        write_text('f', name.as_str(), key);
        write(value, key);
    }
    key.push(b'.');
}

fn write_text(kind: char, text: &str, key: &mut Vec<u8>) {
    key.push(kind as u8);
    key.extend((text.len() as u64).to_le_bytes());
    key.extend(text.as_bytes());
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
