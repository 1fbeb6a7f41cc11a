//! What there is to do: candidates, distinct keys, and what is no key.

use std::collections::{BTreeMap, HashSet};

use bson::{Bson, Document, RawDocumentBuf, doc};

use crate::Context;
use crate::config::values::Namespace;
use crate::config::{Target, template};
use crate::error::{Context as _, Error, Result};
use crate::event::{Events, Progress};
use crate::key_map::KeyMap;
use crate::legacy_key;
use crate::mongo::catalog::Description;
use crate::mongo::index::{self, IndexState, whole_number};
use crate::mongo::source::{candidate_filter, legacy_projection};

/// Keys that are looked up in the key map at once.
const KEYS_PER_LOOKUP: usize = 1000;
/// Distinct keys are counted in memory up to this many bytes of text; beyond
/// it the calls of several targets are summed up without finding shared keys.
const MOST_KEY_BYTES: usize = 512 * 1024 * 1024;

/// What one target needs.
#[derive(Debug, Default)]
pub(super) struct Need {
    pub(super) candidates: u64,
    pub(super) distinct_keys: u64,
    pub(super) unusable: BTreeMap<String, u64>,
    /// Documents whose key can't be sent: they will be counted as failed.
    pub(super) unsendable: u64,
}

/// Counts the distinct keys over all targets that the key map does not know.
pub(super) struct Calls<'a> {
    key_map: Option<KeyMap>,
    events: &'a Events,
    seen: HashSet<String>,
    seen_bytes: usize,
    pending: Vec<String>,
    /// Keys to ask for.
    pub(super) needed: u64,
    /// Keys that the key map knows.
    pub(super) known: u64,
}

impl<'a> Calls<'a> {
    pub(super) fn new(context: &'a Context) -> Self {
        let settings = &context.settings;
        let key_map = settings
            .key_api
            .as_ref()
            .filter(|_| settings.backfill.key_map)
            .map(|api| KeyMap::open(&context.mongo, api, "plan"));
        Self {
            key_map,
            events: &context.events,
            seen: HashSet::new(),
            seen_bytes: 0,
            pending: Vec::new(),
            needed: 0,
            known: 0,
        }
    }

    /// Counts a key unless another target had it before.
    async fn add(&mut self, key: String, several_targets: bool) -> Result<()> {
        if several_targets && self.seen_bytes < MOST_KEY_BYTES {
            self.seen_bytes += key.len() + 32;
            if !self.seen.insert(key.clone()) {
                return Ok(());
            }
        }
        self.pending.push(key);
        if self.pending.len() >= KEYS_PER_LOOKUP { self.look_up_rest().await } else { Ok(()) }
    }

    pub(super) async fn look_up_rest(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let known = match &self.key_map {
            Some(key_map) => {
                let keys: Vec<&str> = pending.iter().map(String::as_str).collect();
                key_map.look_up(&keys).await?.len()
            }
            None => 0,
        };
        self.known += u64::try_from(known).unwrap_or(0);
        self.needed += u64::try_from(pending.len() - known).unwrap_or(0);
        Ok(())
    }
}

/// Groups the candidates by legacy value on the server and streams the groups.
pub(super) async fn count_target(context: &Context, target: &Target, calls: &mut Calls<'_>) -> Result<Need> {
    let namespace = &target.namespace;
    let description = context.mongo.describe_target(target).await?;
    let several = context.settings.targets.len() > 1;
    let collection = context.mongo.collection(namespace);
    let mut aggregate = collection
        .aggregate(group_pipeline(target))
        .allow_disk_use(true)
        // Not the collection's own: two keys that differ in case are two keys.
        .collation(mongodb::options::Collation::builder().locale("simple").build());
    if index::compare(target, &description) == IndexState::Ready && !has_collation(&description) {
        aggregate = aggregate.hint(mongodb::options::Hint::Name(index::name(target)));
    }
    let operation = format!("grouping the candidates of {namespace}");
    let mut cursor = aggregate.await.during(&operation)?.with_type::<RawDocumentBuf>();
    let mut need = Need::default();
    let mut last_text: HashSet<String> = HashSet::new();
    while cursor.advance().await.during(&operation)? {
        let group = cursor.current();
        let count =
            group.get("n").ok().flatten().map(bson::RawBson::from).and_then(|n| Bson::try_from(n).ok());
        let count = count.as_ref().and_then(whole_number).unwrap_or(0);
        need.candidates += count;
        show(calls.events, namespace, need.candidates);
        let id = group.get_document("_id").during_bson(&operation)?;
        let type_name = id.get_str("t").unwrap_or("missing").to_owned();
        let value = id.get("v").ok().flatten();
        let text =
            value.and_then(legacy_key::text_of).filter(|text| legacy_key::is_text_of(&type_name, text));
        match text {
            None => *need.unusable.entry(unusable_name(&type_name)).or_default() += count,
            Some(text) if !context.can_send(&text) => need.unsendable += count,
            Some(text) => {
                // One key may be stored in several types and then has several groups.
                if type_name == "string" && !looks_numeric(&text) || last_text.insert(text.clone()) {
                    need.distinct_keys += 1;
                    calls.add(text, several).await?;
                }
            }
        }
    }
    Ok(need)
}

/// Only texts of this kind can also be the text of another type.
fn looks_numeric(text: &str) -> bool {
    text.len() <= 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || b"-.+E".contains(&byte))
}

fn unusable_name(type_name: &str) -> String {
    if type_name == "string" { "empty string".into() } else { type_name.into() }
}

fn has_collation(description: &Description) -> bool {
    description.collation().is_some()
}

fn group_pipeline(target: &Target) -> Vec<Document> {
    vec![
        doc! {"$match": candidate_filter(target)},
        doc! {"$group": {"_id": distinct_values(target), "n": {"$sum": 1}}},
    ]
}

/// Like the projection of a backfill, but decimals as text: 42 and 42.0 compare
/// as equal and are two keys.
fn distinct_values(target: &Target) -> Document {
    let mut projection = legacy_projection(&target.legacy_field);
    let field = format!("${}", target.legacy_field);
    let is_decimal = doc! {"$eq": [{"$type": &field}, "decimal"]};
    let value = projection.remove("v").unwrap_or(Bson::Null);
    projection.insert("v", doc! {"$cond": [is_decimal, {"$toString": &field}, value]});
    projection
}

impl Context {
    fn can_send(&self, legacy_key: &str) -> bool {
        let api = self.settings.key_api.as_ref();
        api.is_none_or(|api| template::is_sendable(&api.url, legacy_key))
    }
}

fn show(events: &Events, namespace: &Namespace, done: u64) {
    events.progress(Progress {
        phase: format!("plan {namespace}"),
        unit: "documents",
        done,
        total: None,
        limited_by: Some("database".into()),
        detail: String::new(),
    });
}

/// Names the operation for a reply that is not what it should be.
trait DuringBson<T> {
    fn during_bson(self, operation: &str) -> Result<T>;
}

impl<T> DuringBson<T> for bson::error::Result<T> {
    fn during_bson(self, operation: &str) -> Result<T> {
        self.map_err(|error| Error::stopped(format!("{operation}: the reply can't be read: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_texts_of_other_types_are_remembered() {
        for text in
            ["42", "-7", "5.0", "1E+3", "507f1f77bcf86cd799439011", "00112233-4455-6677-8899-aabbccddeeff"]
        {
            assert!(looks_numeric(text), "{text}");
        }
        assert!(!looks_numeric("K-123x") && !looks_numeric("홍길동"));
    }
}
