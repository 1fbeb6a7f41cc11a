//! Differences as entries of the result.

use serde_json::{Value, json};

use super::compare::{self, FieldDifference};

/// How a document differs, as an entry of the result; `None` where it does not.
pub(super) fn different(id: Value, differences: &[FieldDifference]) -> Option<Value> {
    let paths: Vec<&str> = differences.iter().map(|field| field.path.as_str()).collect();
    let details: Vec<Value> = differences
        .iter()
        .map(|field| json!({"path": field.path, "kind": field.kind.as_str(), "detail": field.detail}))
        .collect();
    compare::gravest(differences).map(|gravest| {
        json!({
            "_id": id,
            "kind": "different",
            "difference": gravest.as_str(),
            "fields": paths,
            "details": details,
        })
    })
}
