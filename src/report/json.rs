//! BSON as extended JSON, for results and messages.

use bson::{Bson, RawBson, RawBsonRef};
use serde_json::Value;

/// A value as canonical extended JSON, which keeps its type.
pub fn extended(value: RawBsonRef<'_>) -> Value {
    let raw: RawBson = value.into();
    Bson::try_from(raw).map_or_else(|_| Value::from("(invalid BSON)"), Bson::into_canonical_extjson)
}
