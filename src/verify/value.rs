//! How two values differ that are no documents and no arrays. Pure.

use bson::RawBsonRef;

use unicode_normalization::UnicodeNormalization;

use super::compare::Kind;
use crate::legacy_key;
use crate::mongo::element::{Element, readable};

/// How `found` differs from `expected`, of which the bytes are not equal.
pub(super) fn difference(expected: Element<'_>, found: Element<'_>) -> (Kind, String) {
    let values = (expected.alone(), found.alone());
    let (Some(left), Some(right)) = (readable(&values.0), readable(&values.1)) else {
        // One of them is no UTF-8, or not what its type promises.
        return (Kind::Value, of_type(expected, found));
    };
    if expected.kind == found.kind {
        return (Kind::Value, within_type(left, right));
    }
    let kind = if are_equal_numbers(left, right) { Kind::NumericType } else { Kind::Value };
    (kind, of_type(expected, found))
}

fn of_type(expected: Element<'_>, found: Element<'_>) -> String {
    let name = |element: Element<'_>| element.element_type().map_or("unknown type", legacy_key::type_name);
    if expected.kind == found.kind {
        format!("another {}", name(expected))
    } else {
        format!("{} instead of {}", name(found), name(expected))
    }
}

fn within_type(expected: RawBsonRef<'_>, found: RawBsonRef<'_>) -> String {
    match (expected, found) {
        (RawBsonRef::Double(expected), RawBsonRef::Double(found)) => doubles(expected, found).into(),
        (RawBsonRef::Decimal128(_), RawBsonRef::Decimal128(_)) if are_equal_numbers(expected, found) => {
            "the same number with another precision".into()
        }
        (RawBsonRef::DateTime(expected), RawBsonRef::DateTime(found)) => {
            let (expected, found) = (expected.timestamp_millis(), found.timestamp_millis());
            let direction = if found > expected { "later" } else { "earlier" };
            format!("{} ms {direction}", found.abs_diff(expected))
        }
        (RawBsonRef::String(expected), RawBsonRef::String(found)) if expected.nfc().eq(found.nfc()) => {
            "the same text in another Unicode normalization".into()
        }
        (RawBsonRef::Binary(expected), RawBsonRef::Binary(found)) if expected.bytes == found.bytes => {
            let [expected, found] = [expected.subtype, found.subtype].map(u8::from);
            format!("the same bytes with binary subtype {found} instead of {expected}")
        }
        _ => format!("another {}", legacy_key::type_name(expected.element_type())),
    }
}

fn doubles(expected: f64, found: f64) -> &'static str {
    if expected.is_nan() && found.is_nan() {
        "another NaN"
    } else if expected == 0.0 && found == 0.0 {
        if found.is_sign_negative() { "-0.0 instead of 0.0" } else { "0.0 instead of -0.0" }
    } else {
        "another double"
    }
}

fn are_equal_numbers(left: RawBsonRef<'_>, right: RawBsonRef<'_>) -> bool {
    number(left).is_some_and(|left| Some(left) == number(right))
}

/// A number by its sign, its digits without zeros around them, and the power of
/// ten of the last one. Not as a double, to which large neighbours are equal.
#[derive(Debug, PartialEq, Eq)]
struct Number {
    is_negative: bool,
    digits: String,
    exponent: i64,
}

fn number(value: RawBsonRef<'_>) -> Option<Number> {
    let text = match value {
        RawBsonRef::Int32(number) => number.to_string(),
        RawBsonRef::Int64(number) => number.to_string(),
        RawBsonRef::Double(number) => format!("{number:e}"),
        RawBsonRef::Decimal128(number) => number.to_string(),
        _ => return None,
    };
    parse(&text)
}

/// `None` for what is no finite number.
fn parse(text: &str) -> Option<Number> {
    let (is_negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all = format!("{whole}{fraction}");
    if all.is_empty() || !all.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let trimmed = all.trim_end_matches('0');
    let dropped = i64::try_from(all.len() - trimmed.len()).ok()?;
    let digits = trimmed.trim_start_matches('0').to_owned();
    let exponent = exponent.parse::<i64>().ok()? - i64::try_from(fraction.len()).ok()? + dropped;
    let exponent = if digits.is_empty() { 0 } else { exponent };
    Some(Number { is_negative, digits, exponent })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mongo::element::named;
    use bson::spec::BinarySubtype;
    use bson::{Binary, Bson, DateTime, Decimal128, RawDocumentBuf, doc};

    fn told(expected: impl Into<Bson>, found: impl Into<Bson>) -> Option<(Kind, String)> {
        let raw = |value: Bson| RawDocumentBuf::try_from(&doc! {"v": value}).expect("valid BSON");
        let (expected, found) = (raw(expected.into()), raw(found.into()));
        let [expected, found] = [&expected, &found].map(|document| named(document, "v").expect("a value"));
        (expected != found).then(|| difference(expected, found))
    }

    #[track_caller]
    fn expect(expected: impl Into<Bson>, found: impl Into<Bson>, kind: Kind, detail: &str) {
        assert_eq!(told(expected, found), Some((kind, detail.to_owned())));
    }

    fn decimal(text: &str) -> Decimal128 {
        text.parse().expect("a decimal")
    }

    #[test]
    fn only_the_type_of_a_number() {
        expect(5_i64, 5, Kind::NumericType, "int instead of long");
        expect(5, 5.0, Kind::NumericType, "double instead of int");
        expect(0.1, decimal("0.10"), Kind::NumericType, "decimal instead of double");
        expect(decimal("1E+3"), 1000, Kind::NumericType, "int instead of decimal");
        expect(-300, -300.0, Kind::NumericType, "double instead of int");
    }

    #[test]
    fn numbers_that_only_look_alike_are_values() {
        // Equal as doubles.
        expect((1_i64 << 53) + 1, 9_007_199_254_740_992.0, Kind::Value, "double instead of long");
        expect(0, -0.0, Kind::Value, "double instead of int");
        expect(f64::NAN, decimal("NaN"), Kind::Value, "decimal instead of double");
        expect(f64::INFINITY, decimal("Infinity"), Kind::Value, "decimal instead of double");
        expect("5", 5, Kind::Value, "int instead of string");
        expect(1.0, true, Kind::Value, "bool instead of double");
    }

    #[test]
    fn what_comparison_takes_for_equal_is_told() {
        expect(0.0, -0.0, Kind::Value, "-0.0 instead of 0.0");
        expect(-0.0, 0.0, Kind::Value, "0.0 instead of -0.0");
        expect(f64::NAN, f64::from_bits(f64::NAN.to_bits() | 1), Kind::Value, "another NaN");
        expect(decimal("1.10"), decimal("1.1"), Kind::Value, "the same number with another precision");
        expect(decimal("0"), decimal("0.00"), Kind::Value, "the same number with another precision");
        expect(decimal("1.1"), decimal("1.2"), Kind::Value, "another decimal");
        expect(1.5, 2.5, Kind::Value, "another double");
    }

    #[test]
    fn dates_tell_how_far_they_are_off() {
        let at = DateTime::from_millis;
        expect(at(1_000), at(1_001), Kind::Value, "1 ms later");
        expect(at(i64::MAX), at(i64::MIN), Kind::Value, "18446744073709551615 ms earlier");
    }

    #[test]
    fn texts_and_bytes_tell_whether_they_look_the_same() {
        // The same syllable, composed and decomposed.
        let detail = "the same text in another Unicode normalization";
        expect("\u{d64d}", "\u{1112}\u{1169}\u{11bc}", Kind::Value, detail);
        expect("홍", "길", Kind::Value, "another string");
        let binary = |subtype, bytes: &[u8]| Binary { subtype, bytes: bytes.to_vec() };
        expect(
            binary(BinarySubtype::Generic, b"ab"),
            binary(BinarySubtype::UserDefined(0x80), b"ab"),
            Kind::Value,
            "the same bytes with binary subtype 128 instead of 0",
        );
        expect(
            binary(BinarySubtype::Generic, b"ab"),
            binary(BinarySubtype::Generic, b"ac"),
            Kind::Value,
            "another binData",
        );
        expect(Bson::Symbol("a".into()), "a", Kind::Value, "string instead of symbol");
    }

    #[test]
    fn equal_values_do_not_differ() {
        assert_eq!(told(f64::NAN, f64::NAN), None);
        assert_eq!(told(Bson::MinKey, Bson::MinKey), None);
    }
}
