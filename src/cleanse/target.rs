//! What the target must look like, from what the source looks like. Pure.

use bson::{Bson, Document, doc};

use crate::mongo::catalog::Description;
use crate::mongo::index::whole_number;
use crate::mongo::valid::Valid;

/// Options that are set when the copy is complete: old documents may violate a
/// validator, and a TTL would delete what was just copied.
const LATE_OPTIONS: [&str; 4] = ["validator", "validationLevel", "validationAction", "expireAfterSeconds"];

/// Why a source can't be cleansed; `None` where it can.
pub fn refusal(source: &Description, is_sharded: bool) -> Option<&'static str> {
    if source.kind == "view" {
        Some("is a view: cleanse the collection behind it")
    } else if source.kind == "timeseries" {
        Some("is a time-series collection, whose documents can't be copied one by one")
    } else if source.options.get_bool("capped").unwrap_or(false) {
        Some("is a capped collection, whose order of insertion would be lost")
    } else if source.options.contains_key("encryptedFields") {
        Some("is an encrypted collection")
    } else if is_sharded {
        Some("is sharded")
    } else {
        None
    }
}

/// The options with which the target is created.
pub fn creation_options(source: &Description) -> Document {
    let mut options = source.options.clone();
    for late in LATE_OPTIONS.iter().chain(&["uuid", "autoIndexId"]) {
        options.remove(late);
    }
    options
}

/// The options that are set at the end, for `collMod`.
pub fn late_options(source: &Description) -> Document {
    LATE_OPTIONS
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), source.options.get(name)?.clone())))
        .collect()
}

/// The indexes to build, those that delete documents last.
pub fn indexes(source: &Description) -> Vec<Document> {
    let mut indexes: Vec<Document> = source
        .indexes
        .iter()
        .filter(|index| !is_id_index(index))
        .cloned()
        .map(|mut index| {
            index.remove("ns");
            if source.collation().is_some() && !index.contains_key("collation") && has_collations(&index) {
                // Listed without a collation means the simple one; built without, the collection's.
                index.insert("collation", doc! {"locale": "simple"});
            }
            index
        })
        .collect();
    indexes.sort_by_key(|index| index.contains_key("expireAfterSeconds"));
    indexes
}

/// Indexes of the first version know of no collation, and refuse one.
fn has_collations(index: &Document) -> bool {
    index.get("v").and_then(whole_number) != Some(1)
}

fn is_id_index(index: &Document) -> bool {
    index.get_bool("clustered").unwrap_or(false)
        || index.get_document("key").is_ok_and(|key| key.len() == 1 && key.contains_key("_id"))
            && index.get_str("name").is_ok_and(|name| name == "_id_")
}

/// Name of an index, for people.
pub fn index_name(index: &Document) -> String {
    index.get_str("name").unwrap_or("unnamed").to_owned()
}

/// Marks a document that could not be copied by the pipeline and is fetched
/// afterwards. Should a real document bear the mark, it is fetched too, which
/// does no harm.
pub const PENDING: &str = "__mongorekey_pending";
/// The index that finds marked documents.
pub const PENDING_INDEX: &str = "mongorekey_pending";

/// The stages that copy: valid documents as they are, except that one with a
/// `Timestamp(0, 0)` at its top level is replaced by a mark, because every
/// insert would turn that value into the time of day. One in which a field stands twice is
/// marked too: of the second one a pipeline does not see the value.
pub fn copy_stages(range: Document, valid: &Valid, into: &str) -> Vec<Document> {
    let zero = Bson::Timestamp(bson::Timestamp { time: 0, increment: 0 });
    let fields = doc! {"$objectToArray": "$$ROOT"};
    let values = doc! {"$map": {"input": &fields, "in": "$$this.v"}};
    let once = doc! {"$bsonSize": {"$arrayToObject": fields}};
    let mut stages = Vec::new();
    // `$merge` refuses an `_id` of null, so that document is fetched afterwards too.
    for condition in [range, doc! {"_id": {"$ne": Bson::Null}}] {
        if !condition.is_empty() {
            stages.push(doc! {"$match": condition});
        }
    }
    stages.extend(valid.stages());
    stages.push(doc! {"$replaceWith": {"$cond": [
        {"$or": [{"$in": [{"$literal": zero}, values]}, {"$ne": [{"$bsonSize": "$$ROOT"}, once]}]},
        {"_id": "$_id", PENDING: true},
        "$$ROOT",
    ]}});
    // Without `on`: naming `_id` would ask for an index that a clustered collection does not have.
    stages.push(doc! {"$merge": {"into": into, "whenMatched": "fail", "whenNotMatched": "insert"}});
    stages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(options: Document, indexes: Vec<Document>) -> Description {
        Description { kind: "collection".into(), options, uuid: None, indexes }
    }

    #[test]
    fn validators_and_ttl_wait_for_the_end() {
        let source = source(
            doc! {"collation": {"locale": "en"}, "validator": {"a": 1}, "validationLevel": "strict", "expireAfterSeconds": 60_i64},
            vec![],
        );
        assert_eq!(creation_options(&source), doc! {"collation": {"locale": "en"}});
        assert_eq!(late_options(&source).len(), 3);
    }

    #[test]
    fn indexes_that_delete_are_built_last() {
        let source = source(
            Document::new(),
            vec![
                doc! {"name": "_id_", "key": {"_id": 1}},
                doc! {"name": "ttl", "key": {"at": 1}, "expireAfterSeconds": 60},
                doc! {"name": "unique", "key": {"email": 1}, "unique": true, "ns": "app.users"},
            ],
        );
        let names: Vec<_> = indexes(&source).iter().map(index_name).collect();
        assert_eq!(names, ["unique", "ttl"]);
    }

    #[test]
    fn what_cannot_be_cleansed_is_refused() {
        assert!(refusal(&source(Document::new(), vec![]), false).is_none());
        assert!(refusal(&source(Document::new(), vec![]), true).is_some());
        assert!(refusal(&source(doc! {"capped": true}, vec![]), false).is_some());
        for kind in ["view", "timeseries"] {
            let description = Description { kind: kind.into(), ..source(Document::new(), vec![]) };
            assert!(refusal(&description, false).is_some());
        }
    }
}
