//! How two versions of a document differ. Pure.

use std::collections::HashMap;

use bson::{RawBsonRef, RawDocument};

/// How deep and how many differing paths are told; a hint, not a full diff.
const MOST_PATHS: usize = 20;

/// What sets two documents with the same `_id` apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// `order`, `numeric_type` or `value`: the gravest that was found.
    pub kind: Kind,
    /// Paths of the fields that differ.
    pub fields: Vec<String>,
}

/// Kinds of difference, from harmless to grave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The same fields in another order.
    Order,
    /// Numbers that compare as equal but have another type.
    NumericType,
    /// Something else.
    Value,
}

impl Kind {
    /// The word in results.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Order => "order",
            Self::NumericType => "numeric_type",
            Self::Value => "value",
        }
    }
}

/// Compares byte for byte; `None` where there is no difference.
pub fn compare(left: &RawDocument, right: &RawDocument) -> Option<Difference> {
    if left.as_bytes() == right.as_bytes() {
        return None;
    }
    let mut difference = Difference { kind: Kind::Order, fields: Vec::new() };
    compare_fields(left, right, "", &mut difference);
    Some(difference)
}

fn compare_fields(left: &RawDocument, right: &RawDocument, prefix: &str, difference: &mut Difference) {
    let (Some(left_fields), Some(right_fields)) = (fields(left), fields(right)) else {
        return note(difference, Kind::Value, prefix);
    };
    let by_name: HashMap<&str, RawBsonRef<'_>> = right_fields.iter().copied().collect();
    for (name, value) in &left_fields {
        let path = join(prefix, name);
        match by_name.get(name) {
            None => note(difference, Kind::Value, &path),
            Some(other) => compare_values(*value, *other, &path, difference),
        }
    }
    let known: HashMap<&str, ()> = left_fields.iter().map(|(name, _)| (*name, ())).collect();
    for (name, _) in right_fields.iter().filter(|(name, _)| !known.contains_key(name)) {
        note(difference, Kind::Value, &join(prefix, name));
    }
    let same_order = left_fields.iter().map(|(name, _)| name).eq(right_fields.iter().map(|(name, _)| name));
    if !same_order && left_fields.len() == right_fields.len() {
        note(difference, Kind::Order, if prefix.is_empty() { "(top level)" } else { prefix });
    }
}

fn compare_values(left: RawBsonRef<'_>, right: RawBsonRef<'_>, path: &str, difference: &mut Difference) {
    match (left, right) {
        (RawBsonRef::Document(left), RawBsonRef::Document(right)) => {
            if left.as_bytes() != right.as_bytes() {
                compare_fields(left, right, path, difference);
            }
        }
        (RawBsonRef::Array(left), RawBsonRef::Array(right)) => {
            if left.as_bytes() != right.as_bytes() {
                note(difference, Kind::Value, path);
            }
        }
        (left, right) => {
            if bytes(left) != bytes(right) {
                let kind = if equal_numbers(left, right) { Kind::NumericType } else { Kind::Value };
                note(difference, kind, path);
            }
        }
    }
}

fn equal_numbers(left: RawBsonRef<'_>, right: RawBsonRef<'_>) -> bool {
    let same_type = left.element_type() == right.element_type();
    match (number(left), number(right)) {
        #[expect(clippy::float_cmp, reason = "equal or not is the question")]
        (Some(left), Some(right)) => !same_type && left == right,
        _ => false,
    }
}

fn number(value: RawBsonRef<'_>) -> Option<f64> {
    match value {
        RawBsonRef::Int32(number) => Some(f64::from(number)),
        RawBsonRef::Int64(number) => Some(number as f64),
        RawBsonRef::Double(number) => Some(number),
        RawBsonRef::Decimal128(number) => number.to_string().parse().ok(),
        _ => None,
    }
}

fn bytes(value: RawBsonRef<'_>) -> Vec<u8> {
    crate::mongo::sink::value_bytes(value)
}

fn fields(document: &RawDocument) -> Option<Vec<(&str, RawBsonRef<'_>)>> {
    document.iter().map(|field| field.ok().map(|(name, value)| (name.as_str(), value))).collect()
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

fn note(difference: &mut Difference, kind: Kind, path: &str) {
    difference.kind = difference.kind.max(kind);
    if difference.fields.len() < MOST_PATHS {
        difference.fields.push(path.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::{RawDocumentBuf, rawdoc};

    fn difference(left: &RawDocumentBuf, right: &RawDocumentBuf) -> Option<(Kind, Vec<String>)> {
        compare(left, right).map(|difference| (difference.kind, difference.fields))
    }

    #[test]
    fn equal_bytes_do_not_differ() {
        let document = rawdoc! {"_id": 1, "a": {"b": [1, 2.5, "x"]}};
        assert_eq!(difference(&document, &document.clone()), None);
    }

    #[test]
    fn each_kind_is_told_apart() {
        let left = rawdoc! {"_id": 1, "a": 1, "b": {"c": "x"}};
        let cases = [
            (rawdoc! {"_id": 1, "a": 2, "b": {"c": "x"}}, Kind::Value, "a"),
            (rawdoc! {"_id": 1, "a": 1_i64, "b": {"c": "x"}}, Kind::NumericType, "a"),
            (rawdoc! {"_id": 1, "a": 1.0, "b": {"c": "x"}}, Kind::NumericType, "a"),
            (rawdoc! {"_id": 1, "b": {"c": "x"}, "a": 1}, Kind::Order, "(top level)"),
            (rawdoc! {"_id": 1, "a": 1, "b": {"c": "y"}}, Kind::Value, "b.c"),
            (rawdoc! {"_id": 1, "a": 1}, Kind::Value, "b"),
            (rawdoc! {"_id": 1, "a": 1, "b": {"c": "x"}, "d": 1}, Kind::Value, "d"),
            (rawdoc! {"_id": 1, "a": 1, "b": 5}, Kind::Value, "b"),
        ];
        for (right, kind, path) in cases {
            assert_eq!(difference(&left, &right), Some((kind, vec![path.to_owned()])), "{right:?}");
        }
    }

    #[test]
    fn zero_has_two_signs_and_that_is_a_value() {
        let (left, right) = (rawdoc! {"a": 0.0}, rawdoc! {"a": -0.0});
        assert_eq!(difference(&left, &right), Some((Kind::Value, vec!["a".into()])));
    }
}
