//! Which documents are valid under `exists_in` and `dedupe`, found out without the database: by
//! reading everything and applying the rules as the README states them.

use std::cmp::Ordering;
use std::collections::HashMap;

use bson::{Bson, Document, RawDocumentBuf};

use crate::cleansing::{Bytes, SOURCE, TARGET, assert_same, bytes};
use crate::harness::{Bench, id_bytes};

/// The rules of a test: documents have `valid`, `member`, `team` and `at`.
#[derive(Default, Clone, Copy)]
pub struct Judge {
    /// Documents without `valid: true` are left behind.
    pub keep: bool,
    /// `member` must be the value of this field of this collection.
    pub exists_in: Option<(&'static str, &'static str)>,
    /// One document per `team`, the latest by `at`.
    pub dedupe: bool,
}

impl Judge {
    /// The valid ones of the source.
    pub async fn valid(self, bench: &Bench) -> Vec<Document> {
        let members = match self.exists_in {
            Some((collection, field)) => values(&bench.documents(collection).await, field),
            None => Vec::new(),
        };
        let passes = |document: &Document| {
            (!self.keep || document.get("valid") == Some(&Bson::Boolean(true)))
                && (self.exists_in.is_none() || asks_for(document, &members))
        };
        let passed: Vec<Document> = bench.documents(SOURCE).await.into_iter().filter(passes).collect();
        if self.dedupe { winners(passed) } else { passed }
    }

    pub async fn expected(self, bench: &Bench) -> Bytes {
        let raw = |document: &Document| RawDocumentBuf::try_from(document).expect("valid BSON").into_bytes();
        self.valid(bench).await.iter().map(|document| (id_bytes(document), raw(document))).collect()
    }

    /// The target is what the rules make of the source.
    pub async fn expect_target(self, bench: &Bench) {
        let expected = self.expected(bench).await;
        assert!(!expected.is_empty());
        assert_same(&bytes(bench, TARGET).await, &expected);
    }

    pub async fn is_in_step(self, bench: &Bench) -> bool {
        bytes(bench, TARGET).await == self.expected(bench).await
    }
}

/// What is at a field, with the elements of arrays.
fn values(documents: &[Document], field: &str) -> Vec<Bson> {
    let mut values = Vec::new();
    for value in documents.iter().filter_map(|document| document.get(field)) {
        values.push(value.clone());
        values.extend(value.as_array().into_iter().flatten().cloned());
    }
    values
}

fn asks_for(document: &Document, members: &[Bson]) -> bool {
    let is_member = |value: &Bson| members.iter().any(|member| is_equal(member, value));
    match document.get("member") {
        None | Some(Bson::Null) => false,
        Some(Bson::Array(items)) => !items.contains(&Bson::Null) && items.iter().any(is_member),
        Some(value) => is_member(value),
    }
}

fn is_equal(left: &Bson, right: &Bson) -> bool {
    matches!(order(left, right), Some(Ordering::Equal))
}

/// One document per team; what has none, or a list of them, stays.
fn winners(documents: Vec<Document>) -> Vec<Document> {
    let mut latest: HashMap<String, Document> = HashMap::new();
    let mut valid = Vec::new();
    for document in documents {
        let team = match document.get("team") {
            None | Some(Bson::Null | Bson::Array(_)) => {
                valid.push(document);
                continue;
            }
            Some(number) if as_number(number).is_some() => format!("{:?}", as_number(number)),
            Some(other) => other.to_string(),
        };
        match latest.get(&team) {
            Some(best) if rank(best, &document) == Ordering::Greater => {}
            _ => drop(latest.insert(team, document)),
        }
    }
    valid.extend(latest.into_values());
    valid
}

fn rank(left: &Document, right: &Document) -> Ordering {
    let at = |document: &Document| document.get("at").cloned().unwrap_or(Bson::Null);
    let id = |document: &Document| document.get("_id").cloned().expect("an _id");
    let compared = |left: &Bson, right: &Bson| order(left, right).expect("types that tests use");
    compared(&at(left), &at(right)).then_with(|| compared(&id(left), &id(right)))
}

/// The order of the types that tests use.
fn order(left: &Bson, right: &Bson) -> Option<Ordering> {
    let kind = |value: &Bson| match value {
        Bson::Null => Some(1),
        Bson::String(_) => Some(3),
        Bson::Document(_) => Some(4),
        Bson::Array(_) => Some(5),
        Bson::DateTime(_) => Some(9),
        number => as_number(number).map(|_| 2),
    };
    match kind(left)?.cmp(&kind(right)?) {
        Ordering::Equal => match (left, right) {
            (Bson::String(left), Bson::String(right)) => Some(left.cmp(right)),
            (Bson::DateTime(left), Bson::DateTime(right)) => Some(left.cmp(right)),
            (Bson::Null, Bson::Null) => Some(Ordering::Equal),
            (Bson::Document(_) | Bson::Array(_), _) => (left == right).then_some(Ordering::Equal),
            _ => as_number(left)?.partial_cmp(&as_number(right)?),
        },
        different => Some(different),
    }
}

fn as_number(value: &Bson) -> Option<f64> {
    match value {
        Bson::Int32(number) => Some(f64::from(*number)),
        Bson::Int64(number) => i32::try_from(*number).ok().map(f64::from),
        Bson::Double(number) => Some(*number),
        _ => None,
    }
}
