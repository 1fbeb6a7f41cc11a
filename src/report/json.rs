//! BSON as extended JSON, for results and messages.

use bson::{Bson, RawBson, RawBsonRef};
use serde_json::Value;

use crate::mongo::exact;

/// A value as canonical extended JSON, which keeps its type.
pub fn extended(value: RawBsonRef<'_>) -> Value {
    let raw: RawBson = value.into();
    Bson::try_from(raw.clone()).unwrap_or_else(|_| exact::shown(&raw)).into_canonical_extjson()
}
