//! What rules that look at other documents need of the database, so that they are
//! neither silently wrong nor take days: looked at before anything is touched.

use bson::{Bson, Document};

use super::build::is_sharded;
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::mongo::Mongo;
use crate::mongo::catalog::Description;
use crate::mongo::valid::{Membership, Valid};

/// Up to so many documents a collection is scanned where an index is missing.
const FEW_DOCUMENTS: u64 = 100_000;
/// Up to so many comparisons a join may take without an index.
const FEW_COMPARISONS: u64 = 10_000_000;
/// Of servers from 5.0 on, which join by field and pipeline at once and read as of
/// one moment.
const WIRE_VERSION: i32 = 13;

/// Makes sure that the rules can be asked.
///
/// # Errors
/// A refusal where they can't, or not in reasonable time.
pub async fn check_reading(mongo: &Mongo, source: &Namespace, valid: &Valid) -> Result<()> {
    if valid.is_condition() {
        return Ok(());
    }
    if mongo.hello().await?.get_i32("maxWireVersion").unwrap_or(0) < WIRE_VERSION {
        return Err(Error::refused("`exists_in` and `dedupe` need MongoDB 5.0 or newer"));
    }
    for membership in &valid.memberships {
        check_membership(mongo, source, membership).await?;
    }
    Ok(())
}

/// Makes sure that changes which decide about other documents can be followed.
///
/// # Errors
/// A refusal where they can't.
pub async fn check_following(
    mongo: &Mongo,
    source: &Namespace,
    description: &Description,
    valid: &Valid,
) -> Result<()> {
    for membership in valid.memberships.iter().filter(|membership| membership.needs_images()) {
        let namespace = namespace_of(source, membership);
        let images = mongo.describe(&namespace).await?.is_some_and(|members| keeps_images(&members.options));
        if !images {
            return Err(Error::refused(format!(
                "a change of {namespace} does not tell the `{}` that it had before, so documents of {source} \
                 could stay valid unnoticed",
                membership.foreign
            ))
            .hint(format!(
                "let it keep pre-images (MongoDB 6.0): db.runCommand({{collMod: {:?}, \
                 changeStreamPreAndPostImages: {{enabled: true}}}})",
                namespace.collection
            )));
        }
    }
    if valid.is_condition() || size(mongo, source).await <= FEW_DOCUMENTS {
        return Ok(());
    }
    for membership in &valid.memberships {
        let fields = [membership.local.as_str()];
        if !has_index(description, description.collation(), &fields, Use::Source) {
            return Err(missing_index(source, &fields, "a change of a member would scan the collection"));
        }
    }
    if let Some(grouping) = &valid.grouping {
        let fields: Vec<&str> = grouping.by.iter().map(String::as_str).collect();
        if !has_index(description, description.collation(), &fields, Use::SourceAndTarget) {
            return Err(missing_index(source, &fields, "every change would scan the collection"));
        }
    }
    Ok(())
}

async fn check_membership(mongo: &Mongo, source: &Namespace, membership: &Membership) -> Result<()> {
    let namespace = namespace_of(source, membership);
    let refused = |what: &str| Err(Error::refused(format!("{namespace} of `exists_in` {what}")));
    let Some(members) = mongo.describe(&namespace).await? else {
        return Err(Error::refused(format!("there is no collection {namespace}, which `exists_in` asks"))
            .hint("names are case-sensitive; without members no document would be valid"));
    };
    if members.kind != "collection" {
        return refused(&format!("is a {}, which can't be followed", members.kind));
    }
    if members.options.get_bool("capped").unwrap_or(false) {
        return refused("is capped: what drops out of it is not told");
    }
    if is_sharded(mongo, &namespace).await? {
        return refused("is sharded");
    }
    let Some(description) = mongo.describe(source).await? else { return Ok(()) };
    let fields = [membership.foreign.as_str()];
    let comparisons = size(mongo, source).await.saturating_mul(size(mongo, &namespace).await);
    // A join compares by the collation of the collection that asks.
    if comparisons > FEW_COMPARISONS && !has_index(&members, description.collation(), &fields, Use::Source) {
        let why = "every document of the source would scan the collection";
        return Err(missing_index(&namespace, &fields, why));
    }
    Ok(())
}

fn namespace_of(source: &Namespace, membership: &Membership) -> Namespace {
    Namespace { database: source.database.clone(), collection: membership.collection.clone() }
}

async fn size(mongo: &Mongo, namespace: &Namespace) -> u64 {
    mongo.collection(namespace).estimated_document_count().await.unwrap_or(u64::MAX)
}

fn missing_index(namespace: &Namespace, fields: &[&str], why: &str) -> Error {
    let keys: Vec<String> = fields.iter().map(|field| format!("{field:?}: 1")).collect();
    Error::refused(format!("{namespace} has no index on {}: {why}", fields.join(", "))).hint(format!(
        "build one on all documents: db.getCollection({:?}).createIndex({{{}}})",
        namespace.collection,
        keys.join(", ")
    ))
}

fn keeps_images(options: &Document) -> bool {
    let images = options.get_document("changeStreamPreAndPostImages");
    images.is_ok_and(|images| images.get_bool("enabled").unwrap_or(false))
}

/// Where an index is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Source,
    /// In the target too, from the end of the copy on: unique ones and those that
    /// delete documents are built later.
    SourceAndTarget,
}

/// Whether an index finds every document by these fields. Pure.
fn has_index(description: &Description, collation: Option<&Document>, fields: &[&str], place: Use) -> bool {
    let leads = |index: &Document| {
        let Ok(keys) = index.get_document("key") else { return false };
        let leading: Vec<(&String, &Bson)> = keys.iter().take(fields.len()).collect();
        leading.len() == fields.len()
            && fields.iter().all(|field| leading.iter().any(|(name, _)| name == field))
            && leading
                .iter()
                .all(|(_, order)| matches!(order, Bson::Int32(_) | Bson::Int64(_) | Bson::Double(_)))
    };
    let is_in_time = |index: &Document| {
        place == Use::Source
            || !index.get_bool("unique").unwrap_or(false) && !index.contains_key("expireAfterSeconds")
    };
    description.indexes.iter().any(|index| {
        leads(index)
            && !index.contains_key("partialFilterExpression")
            && !index.get_bool("sparse").unwrap_or(false)
            && !index.get_bool("hidden").unwrap_or(false)
            && index.get_document("collation").ok() == collation
            && is_in_time(index)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::doc;

    fn has(index: Document, fields: &[&str], place: Use) -> bool {
        let description = Description {
            kind: "collection".into(),
            options: Document::new(),
            uuid: None,
            indexes: vec![index],
        };
        has_index(&description, None, fields, place)
    }

    #[test]
    fn an_index_is_usable_if_it_begins_with_the_fields_and_holds_every_document() {
        let of = |keys: Document| doc! {"name": "i", "key": keys};
        assert!(has(of(doc! {"a": 1}), &["a"], Use::Source));
        assert!(has(of(doc! {"b": -1, "a": 1, "c": 1}), &["a", "b"], Use::SourceAndTarget));
        assert!(!has(of(doc! {"c": 1, "a": 1}), &["a"], Use::Source));
        assert!(!has(of(doc! {"a": "hashed"}), &["a"], Use::Source));
        for (option, value) in [
            ("sparse", Bson::from(true)),
            ("hidden", true.into()),
            ("partialFilterExpression", doc! {"x": 1}.into()),
            ("collation", doc! {"locale": "en"}.into()),
        ] {
            let mut index = of(doc! {"a": 1});
            index.insert(option, value);
            assert!(!has(index, &["a"], Use::Source), "{option}");
        }
    }

    #[test]
    fn the_target_needs_one_that_is_built_right_after_the_copy() {
        let unique = doc! {"name": "i", "key": {"a": 1, "b": 1}, "unique": true};
        assert!(has(unique.clone(), &["a"], Use::Source));
        assert!(!has(unique, &["a"], Use::SourceAndTarget));
    }
}
