//! How two versions of a document differ. Pure.
//!
//! Whether they differ is decided by their bytes alone; this module only says
//! where and how, so that the reader knows what to look for.

use std::collections::{HashMap, HashSet};

use bson::RawDocument;

use super::value;
use crate::mongo::element::{self, Element, Nested};

/// So many differing fields are told; a hint, not a full diff.
const MOST_FIELDS: usize = 20;
/// The path of the document itself.
const TOP_LEVEL: &str = "(top level)";

/// One field in which two documents differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldDifference {
    /// Dotted path, elements of arrays by their index; `(top level)` for the
    /// document as a whole.
    pub path: String,
    /// How grave it is.
    pub kind: Kind,
    /// What was found instead of what, without the values themselves: they may
    /// be nobody's business.
    pub detail: String,
}

/// Kinds of difference, from harmless to grave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The same fields in another order.
    Order,
    /// Numbers that are equal but have another type.
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

/// The gravest kind among differences; `None` where there are none.
pub fn gravest(differences: &[FieldDifference]) -> Option<Kind> {
    differences.iter().map(|difference| difference.kind).max()
}

/// The fields in which `found` differs from `expected`, at most 20 and the
/// gravest kind always among them. Empty only where the bytes are equal.
pub fn difference(expected: &RawDocument, found: &RawDocument) -> Vec<FieldDifference> {
    let mut noted = Noted(Vec::new());
    if expected.as_bytes() != found.as_bytes() {
        compare_documents(expected, found, "", &mut noted);
    }
    noted.0
}

struct Noted(Vec<FieldDifference>);

impl Noted {
    fn add(&mut self, path: &str, kind: Kind, detail: impl Into<String>) {
        let path = if path.is_empty() { TOP_LEVEL } else { path }.to_owned();
        let difference = FieldDifference { path, kind, detail: detail.into() };
        if self.0.len() < MOST_FIELDS {
            self.0.push(difference);
        } else if gravest(&self.0).is_some_and(|gravest| gravest < kind) {
            self.0.pop();
            self.0.push(difference);
        }
    }
}

/// Wants documents whose bytes differ, and notes something in any case.
fn compare_documents(expected: &RawDocument, found: &RawDocument, path: &str, noted: &mut Noted) {
    let expected: Vec<Element<'_>> = element::elements(expected).collect();
    let found: Vec<Element<'_>> = element::elements(found).collect();
    let by_name: HashMap<&[u8], Element<'_>> = found.iter().map(|field| (field.name, *field)).collect();
    let known: HashSet<&[u8]> = expected.iter().map(|field| field.name).collect();
    if by_name.len() < found.len() || known.len() < expected.len() {
        // The same name twice: there is no telling which belongs to which.
        return noted.add(path, Kind::Value, "other bytes, with a field name that stands there twice");
    }
    for field in &expected {
        let path = join(path, &String::from_utf8_lossy(field.name));
        match by_name.get(field.name) {
            None => noted.add(&path, Kind::Value, "missing"),
            Some(other) => compare_values(*field, *other, &path, noted),
        }
    }
    for field in found.iter().filter(|field| !known.contains(field.name)) {
        noted.add(&join(path, &String::from_utf8_lossy(field.name)), Kind::Value, "not in the source");
    }
    let common = expected.iter().map(|field| field.name).filter(|name| by_name.contains_key(name));
    if !common.eq(found.iter().map(|field| field.name).filter(|name| known.contains(name))) {
        noted.add(path, Kind::Order, "the same fields in another order");
    }
}

fn compare_values(expected: Element<'_>, found: Element<'_>, path: &str, noted: &mut Noted) {
    if (expected.kind, expected.value) == (found.kind, found.value) {
        return;
    }
    match (expected.nested(), found.nested()) {
        (Some(Nested::Document(expected)), Some(Nested::Document(found))) => {
            compare_documents(expected, found, path, noted);
        }
        (Some(Nested::Array(expected)), Some(Nested::Array(found))) => {
            compare_arrays(expected, found, path, noted);
        }
        _ => {
            let (kind, detail) = value::difference(expected, found);
            noted.add(path, kind, detail);
        }
    }
}

fn compare_arrays(expected: &RawDocument, found: &RawDocument, path: &str, noted: &mut Noted) {
    let expected: Vec<Element<'_>> = element::elements(expected).collect();
    let found: Vec<Element<'_>> = element::elements(found).collect();
    if expected.len() != found.len() {
        let detail = format!("{} elements instead of {}", found.len(), expected.len());
        return noted.add(path, Kind::Value, detail);
    }
    if values(&expected) == values(&found) {
        return noted.add(path, Kind::Value, "the same elements under other names");
    }
    if sorted(&expected) == sorted(&found) {
        return noted.add(path, Kind::Value, "the same elements in another order");
    }
    for (index, (expected, found)) in expected.iter().zip(&found).enumerate() {
        compare_values(*expected, *found, &join(path, &index.to_string()), noted);
    }
}

fn values<'a>(elements: &[Element<'a>]) -> Vec<(u8, &'a [u8])> {
    elements.iter().map(|element| (element.kind, element.value)).collect()
}

fn sorted<'a>(elements: &[Element<'a>]) -> Vec<(u8, &'a [u8])> {
    let mut sorted = values(elements);
    sorted.sort_unstable();
    sorted
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mongo::element::with_elements;
    use bson::{DateTime, RawDocumentBuf, cstr, rawdoc};

    fn told(left: &RawDocumentBuf, right: &RawDocumentBuf) -> Vec<(String, Kind)> {
        difference(left, right).into_iter().map(|field| (field.path, field.kind)).collect()
    }

    #[test]
    fn equal_bytes_do_not_differ() {
        let document = rawdoc! {"_id": 1, "a": {"b": [1, 2.5, "x"]}, "n": f64::NAN};
        assert_eq!(difference(&document, &document.clone()), []);
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
            assert_eq!(told(&left, &right), [(path.to_owned(), kind)], "{right:?}");
        }
    }

    #[test]
    fn a_missing_field_does_not_hide_another_order_of_the_rest() {
        let found = told(&rawdoc! {"a": 1, "b": 2, "c": 3}, &rawdoc! {"c": 3, "b": 2});
        assert_eq!(found, [("a".into(), Kind::Value), (TOP_LEVEL.into(), Kind::Order)]);
        let renamed = told(&rawdoc! {"a": 1, "b": 2}, &rawdoc! {"a": 1, "c": 2});
        assert_eq!(renamed, [("b".into(), Kind::Value), ("c".into(), Kind::Value)]);
    }

    #[test]
    fn arrays_are_compared_by_their_elements() {
        let of = |array: bson::RawArrayBuf| rawdoc! {"a": {"b": array}};
        let left = of(bson::rawbson!([1, {"c": [true, "x"]}, 3]).as_array().expect("an array").to_owned());
        for (right, path, kind) in [
            (bson::rawbson!([1, {"c": [true, "y"]}, 3]), "a.b.1.c.1", Kind::Value),
            (bson::rawbson!([1, {"c": [true, "x"]}, 3_i64]), "a.b.2", Kind::NumericType),
            (bson::rawbson!([3, {"c": [true, "x"]}, 1]), "a.b", Kind::Value),
            (bson::rawbson!([1, {"c": [true, "x"]}]), "a.b", Kind::Value),
            (bson::rawbson!([1, {"c": ["x", true]}, 3]), "a.b.1.c", Kind::Value),
        ] {
            let right = of(right.as_array().expect("an array").to_owned());
            assert_eq!(told(&left, &right), [(path.to_owned(), kind)], "{right:?}");
        }
        let swapped = difference(&rawdoc! {"a": [1, 2]}, &rawdoc! {"a": [2, 1]});
        assert_eq!(swapped[0].detail, "the same elements in another order");
    }

    #[test]
    fn a_field_that_stands_there_twice_is_not_overlooked() {
        let mut left = rawdoc! {"a": 1};
        left.append(cstr!("a"), 2);
        let mut right = rawdoc! {"a": 3};
        right.append(cstr!("a"), 2);
        assert_eq!(told(&left, &right), [(TOP_LEVEL.into(), Kind::Value)]);
        assert_eq!(told(&rawdoc! {"n": left}, &rawdoc! {"n": right}), [("n".into(), Kind::Value)]);
    }

    #[test]
    fn what_is_not_utf_8_hides_no_other_difference() {
        let text = |bytes: &[u8]| {
            let mut value = i32::try_from(bytes.len() + 1).expect("small").to_le_bytes().to_vec();
            value.extend_from_slice(bytes);
            value.push(0);
            value
        };
        let with = |t: &[u8], n: &[u8], a: i32| {
            with_elements([
                (0x02, &b"t"[..], text(t).as_slice()),
                (0x02, n, text(b"\xe9").as_slice()),
                (0x10, &b"a"[..], &a.to_le_bytes()[..]),
            ])
        };
        let left = with(b"\xff", b"n\xfe", 1);
        assert_eq!(told(&left, &with(b"\xff", b"n\xfe", 2)), [("a".into(), Kind::Value)]);
        assert_eq!(told(&left, &with(b"x", b"n\xfe", 1)), [("t".into(), Kind::Value)]);
        let renamed = difference(&left, &with(b"\xff", b"n\xfd", 1));
        let told: Vec<_> = renamed.iter().map(|field| (&*field.path, &*field.detail)).collect();
        assert_eq!(told, [("n\u{fffd}", "missing"), ("n\u{fffd}", "not in the source")]);
    }

    #[test]
    fn an_array_whose_items_are_named_otherwise_differs() {
        let array = |name: &[u8]| {
            let items = with_elements([(0x08, name, &[1][..])]);
            with_elements([(0x04, "a", items.as_bytes())])
        };
        let found = difference(&array(b"0"), &array(b"7"));
        assert_eq!(found[0].detail, "the same elements under other names");
    }

    #[test]
    fn the_gravest_difference_is_told_however_many_there_are() {
        let (mut left, mut right) = (RawDocumentBuf::new(), RawDocumentBuf::new());
        for number in 0..50 {
            let name: bson::raw::CString = format!("f{number}").try_into().expect("a name");
            left.append(&name, number);
            right.append(&name, i64::from(number));
        }
        left.append(cstr!("last"), DateTime::from_millis(1));
        right.append(cstr!("last"), DateTime::from_millis(2));
        let found = difference(&left, &right);
        assert_eq!(found.len(), MOST_FIELDS);
        assert_eq!(gravest(&found), Some(Kind::Value));
        assert_eq!(found[MOST_FIELDS - 1].path, "last");
    }
}
