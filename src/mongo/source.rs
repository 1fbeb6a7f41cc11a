//! Reading candidates: chunk after chunk by `_id`, whatever its types, without
//! holding a cursor in between.

use bson::raw::CString;
use bson::{Bson, Document, RawBson, RawDocument, RawDocumentBuf, doc};
use mongodb::Collection;
use mongodb::options::{ReadPreference, SelectionCriteria};

use super::Mongo;
use super::command::retrying;
use super::index::{self, IndexState, whole_number};
use super::sink::value_bytes;
use crate::config::{Target, values};
use crate::error::{Error, Result};
use crate::legacy_key;

/// Documents that are looked up by their keys at once.
pub const MOST_BY_KEY: i64 = 10_000;
/// Documents in a row that may have an `_id` from which reading can't go on.
const MOST_UNREADABLE: usize = 200_000;

/// A document that lacks key and flag, reduced to what the backfill needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The `_id`, any type.
    pub id: RawBson,
    /// The legacy value as it was read.
    pub legacy: LegacyValue,
    /// Why it can't receive anything, where that is so.
    pub obstacle: Option<Obstacle>,
}

/// Why a candidate can't receive a key or a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// A parent of the key or flag field is no document, one of the fields on
    /// the way stands twice, or it is an array that holds a null.
    UnwritablePath,
    /// The `_id` can't be asked for: it holds a field twice, or text that is not
    /// UTF-8. The one at hand is for people only.
    UnreadableId,
    /// The legacy key is text that is not UTF-8.
    UnreadableKey,
}

impl Obstacle {
    /// The reason as counted.
    pub fn reason(self) -> &'static str {
        match self {
            Self::UnwritablePath => "unwritable_path",
            Self::UnreadableId => "unreadable_id",
            Self::UnreadableKey => "unreadable_key",
        }
    }

    /// The same for people.
    pub fn description(self) -> &'static str {
        match self {
            Self::UnwritablePath => {
                "the key or flag field can't be set: a parent is no document, a field on the way stands twice, or it is an array"
            }
            Self::UnreadableId => {
                "the `_id` holds text that is not UTF-8, or a field twice: it can't be asked for"
            }
            Self::UnreadableKey => "the legacy key is text that is not UTF-8",
        }
    }
}

/// What stands in the legacy field.
#[derive(Debug, Clone, PartialEq)]
pub struct LegacyValue {
    /// The `$type` name, or `missing`.
    pub type_name: String,
    /// The value, where its type may be a usable key.
    pub value: Option<RawBson>,
}

impl LegacyValue {
    /// The text that identifies the key, where it is usable.
    pub fn text(&self) -> Option<String> {
        self.value.as_ref().and_then(|value| legacy_key::text_of(value.as_raw_bson_ref()))
    }
}

/// A collection whose candidates are read and written.
#[derive(Debug, Clone)]
pub struct TargetCollection {
    /// The target as configured.
    pub target: Target,
    /// Whether the collection's default collation lets different strings be equal.
    pub has_collation: bool,
    /// Whether the partial index is there and right.
    indexed: bool,
    /// Name of an index that finds documents by their legacy key.
    legacy_index: Option<String>,
    key_name: CString,
    flag_name: CString,
    primary: Collection<RawDocumentBuf>,
    reader: Collection<RawDocumentBuf>,
    /// Whether chunks may come from a member that lags behind.
    reads_may_be_stale: bool,
}

/// An explained candidate query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explained {
    /// Name of the index that the winning plan scans, if any.
    pub index: Option<String>,
    /// Index keys examined.
    pub keys_examined: u64,
    /// Documents returned.
    pub returned: u64,
    /// Whether the server had to sort.
    pub sorted: bool,
}

impl TargetCollection {
    /// Looks at the collection and its index.
    ///
    /// # Errors
    /// A refusal where there is no such collection, it is no plain one, or its
    /// index is missing or different and `allow_scan` is not set.
    pub async fn open(
        mongo: &Mongo,
        target: &Target,
        preference: values::ReadPreference,
        allow_scan: bool,
    ) -> Result<Self> {
        let namespace = &target.namespace;
        let description = mongo.describe_target(target).await?;
        description.check_fillable(namespace)?;
        let state = index::compare(target, &description);
        if state != IndexState::Ready && !(allow_scan && state == IndexState::Missing) {
            return Err(index::refusal(target, &state));
        }
        let primary = mongo.collection(namespace);
        let secondaries = mongo.hello().await?.get_array("hosts").is_ok_and(|hosts| hosts.len() > 1);
        let stale = secondaries && preference != values::ReadPreference::Primary;
        let reader = if stale {
            let options = mongodb::options::CollectionOptions::builder()
                .selection_criteria(SelectionCriteria::ReadPreference(driver_preference(preference)))
                .build();
            mongo.database(&namespace.database).collection_with_options(&namespace.collection, options)
        } else {
            primary.clone()
        };
        Ok(Self {
            key_name: field_name(&target.key_field)?,
            flag_name: field_name(&target.flag_field)?,
            target: target.clone(),
            has_collation: description.collation().is_some(),
            indexed: state == IndexState::Ready,
            legacy_index: index::finds_by(&target.legacy_field, &description),
            primary,
            reader,
            reads_may_be_stale: stale,
        })
    }

    /// Path of the key field, as it goes into commands.
    pub(super) fn key_name(&self) -> &bson::raw::CStr {
        &self.key_name
    }

    /// Path of the flag field, as it goes into commands.
    pub(super) fn flag_name(&self) -> &bson::raw::CStr {
        &self.flag_name
    }

    /// The collection, always read and written on the primary.
    pub(super) fn primary(&self) -> &Collection<RawDocumentBuf> {
        &self.primary
    }

    /// The next `limit` candidates after `last`, up to and including `bound`,
    /// in the order of `_id`, each confirmed on the primary. Read elsewhere, what
    /// is new may be missing: only `on_primary` they are all there.
    ///
    /// The second value is the `_id` to go on from; `None` where nothing more
    /// was found, in which case the first is empty.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn chunk(
        &self,
        last: Option<&RawBson>,
        bound: &RawBson,
        limit: usize,
        on_primary: bool,
    ) -> Result<(Vec<Candidate>, Option<RawBson>)> {
        let filter = self.range_filter(last, Some(bound))?;
        let reader = if on_primary { &self.primary } else { &self.reader };
        let (found, next) = self.find_to_position(reader, filter, bound, limit).await?;
        let is_stale = self.reads_may_be_stale && !on_primary;
        let confirmed = if is_stale { self.still_candidates(found).await? } else { found };
        Ok((confirmed, next))
    }

    /// Reads so many candidates, and the `_id` to go on from. Where the last one
    /// can't be asked for, reads on to one that can.
    async fn find_to_position(
        &self,
        reader: &Collection<RawDocumentBuf>,
        filter: Document,
        bound: &RawBson,
        limit: usize,
    ) -> Result<(Vec<Candidate>, Option<RawBson>)> {
        let mut wanted = limit.max(1);
        loop {
            let mut found = self.find(reader, filter.clone(), wanted).await?;
            let is_position = |candidate: &Candidate| candidate.obstacle != Some(Obstacle::UnreadableId);
            let from = limit.max(1) - 1;
            let end = found.iter().skip(from).position(is_position).map(|after| from + after);
            if let Some(end) = end {
                found.truncate(end + 1);
                let next = found.last().map(|candidate| candidate.id.clone());
                return Ok((found, next));
            }
            if found.len() < wanted {
                // The range is at its end.
                let next = (!found.is_empty()).then(|| bound.clone());
                return Ok((found, next));
            }
            if wanted > MOST_UNREADABLE {
                return Err(Error::stopped(format!(
                    "{MOST_UNREADABLE} documents of {} in a row have an `_id` that can't be asked for",
                    self.target.namespace
                ))
                .hint("give them an `_id` whose text is UTF-8 and in which no field stands twice"));
            }
            wanted *= 2;
        }
    }

    /// Those of the given documents that still are candidates, as the primary
    /// sees them now.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn still_candidates(&self, candidates: Vec<Candidate>) -> Result<Vec<Candidate>> {
        if candidates.is_empty() {
            return Ok(candidates);
        }
        let is_askable = |candidate: &Candidate| candidate.obstacle != Some(Obstacle::UnreadableId);
        let (candidates, mut unreadable): (Vec<_>, Vec<_>) = candidates.into_iter().partition(is_askable);
        let ids = to_bson_array(candidates.iter().map(|candidate| &candidate.id))?;
        let mut filter = candidate_filter(&self.target);
        filter.insert("_id", doc! {"$in": ids});
        let namespace = &self.target.namespace;
        retrying(format!("checking candidates of {namespace} on the primary"), || {
            collect(self.primary.find(filter.clone()).projection(self.projection()))
        })
        .await
        .map(|documents| {
            unreadable.extend(documents.iter().map(|document| read_candidate(document)));
            unreadable
        })
    }

    /// Whether an index finds documents by their legacy key.
    pub fn finds_by_key(&self) -> bool {
        self.legacy_index.is_some()
    }

    /// Candidates with one of these keys, on the primary, as far as an index
    /// finds them: at most [`MOST_BY_KEY`], for a key may stand in any number.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn candidates_of(&self, keys: &[&str]) -> Result<Vec<Candidate>> {
        let Some(index) = self.legacy_index.as_ref().filter(|_| !keys.is_empty()) else {
            return Ok(Vec::new());
        };
        let values: Vec<Bson> = keys.iter().flat_map(|key| legacy_key::values_of(key)).collect();
        let mut filter = candidate_filter(&self.target);
        filter.insert(self.target.legacy_field.as_str(), doc! {"$in": values});
        let hint = mongodb::options::Hint::Name(index.clone());
        let documents = retrying(format!("finding candidates of {} by key", self.target.namespace), || {
            let find = self.primary.find(filter.clone()).limit(MOST_BY_KEY).hint(hint.clone());
            collect(find.projection(self.projection()))
        })
        .await?;
        // Numbers of other types are equal to the server that are other keys to the API.
        let is_asked_for = |candidate: &Candidate| {
            candidate.obstacle.is_none()
                && candidate.legacy.text().is_some_and(|text| keys.contains(&text.as_str()))
        };
        Ok(documents.iter().map(|document| read_candidate(document)).filter(is_asked_for).collect())
    }

    /// The highest `_id` among the candidates, the end of a pass; `None` where
    /// there is no candidate. Decided on the primary.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn highest(&self) -> Result<Option<RawBson>> {
        let namespace = &self.target.namespace;
        let documents = retrying(format!("finding the last candidate of {namespace}"), || {
            let mut find = self
                .primary
                .find(candidate_filter(&self.target))
                .sort(doc! {"_id": -1})
                .limit(1)
                .projection(doc! {"_id": 1});
            if let Some(hint) = self.hint() {
                find = find.hint(hint);
            }
            collect(find)
        })
        .await?;
        // Everything is below that, also an `_id` that can't be asked for.
        Ok(documents.first().map(|document| readable_id(document).unwrap_or(RawBson::MaxKey)))
    }

    /// How many candidates there are on the primary.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn count(&self) -> Result<u64> {
        let namespace = &self.target.namespace;
        let mut command = doc! {"count": &namespace.collection, "query": candidate_filter(&self.target)};
        if self.indexed {
            command.insert("hint", index::name(&self.target));
            if self.target.filter.0.is_empty() {
                // The index holds exactly the candidates: counting its keys
                // reads no document, which is six times as fast.
                command.insert("query", Document::new());
            }
        }
        let database = self.primary.client().database(&namespace.database);
        let reply = retrying(format!("counting the candidates of {namespace}"), || {
            let reply = database.run_command(command.clone());
            async move { reply.await }
        })
        .await?;
        Ok(reply.get("n").and_then(whole_number).unwrap_or(0))
    }

    /// Explains the query for a chunk after `last`, with execution figures.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn explain(&self, last: Option<&RawBson>, limit: usize) -> Result<Explained> {
        let namespace = &self.target.namespace;
        let mut find = doc! {
            "find": &namespace.collection,
            "filter": self.range_filter(last, None)?,
            "sort": {"_id": 1},
            "limit": i64::try_from(limit).unwrap_or(i64::MAX),
            "projection": self.projection(),
        };
        if let Some(hint) = self.hint() {
            find.insert("hint", hint_document(hint));
        }
        let database = self.primary.client().database(&namespace.database);
        let command = doc! {"explain": find, "verbosity": "executionStats"};
        let plan = retrying(format!("explaining the candidate query of {namespace}"), || {
            let reply = database.run_command(command.clone());
            async move { reply.await }
        })
        .await?;
        Ok(read_explain(&plan))
    }

    async fn find(
        &self,
        collection: &Collection<RawDocumentBuf>,
        filter: Document,
        limit: usize,
    ) -> Result<Vec<Candidate>> {
        let namespace = &self.target.namespace;
        let batch = u32::try_from(limit).unwrap_or(u32::MAX);
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let documents = retrying(format!("reading candidates of {namespace}"), || {
            let mut find = collection
                .find(filter.clone())
                .sort(doc! {"_id": 1})
                .limit(limit)
                // Otherwise the first hundred come first, and the rest by another round trip.
                .batch_size(batch)
                .projection(self.projection());
            if let Some(hint) = self.hint() {
                find = find.hint(hint);
            }
            collect(find)
        })
        .await?;
        Ok(documents.iter().map(|document| read_candidate(document)).collect())
    }

    pub(super) fn hint(&self) -> Option<mongodb::options::Hint> {
        self.indexed.then(|| mongodb::options::Hint::Name(index::name(&self.target)))
    }

    /// `$expr` compares across types, where `{_id: {$gt}}` sees one type only.
    pub(super) fn range_filter(&self, last: Option<&RawBson>, bound: Option<&RawBson>) -> Result<Document> {
        let mut filter = candidate_filter(&self.target);
        let mut conditions = Vec::new();
        for (operator, id) in [("$gt", last), ("$lte", bound)] {
            if let Some(id) = id {
                conditions.push(doc! {operator: ["$_id", {"$literal": to_bson(id)?}]});
            }
        }
        if !conditions.is_empty() {
            filter.insert("$expr", doc! {"$and": conditions});
        }
        Ok(filter)
    }

    fn projection(&self) -> Document {
        let mut projection = legacy_projection(&self.target.legacy_field);
        projection.insert("_id", 1);
        projection.insert("w", doc! {"$and": self.writable_conditions()});
        projection
    }

    /// What `$set` needs to change key or flag and nothing else: each parent is
    /// missing or a document, no field on the way stands twice, since members of
    /// the set would change different ones, and neither holds an array, which
    /// counts as null where it holds one.
    pub(super) fn writable_conditions(&self) -> Vec<Document> {
        let mut conditions = Vec::new();
        for path in [&self.target.key_field, &self.target.flag_field] {
            let mut parent = "$ROOT".to_owned();
            for part in path.as_str().split('.') {
                conditions.push(stands_once(&parent, part));
                parent = if parent == "$ROOT" { part.to_owned() } else { format!("{parent}.{part}") };
            }
            let absent = vec!["missing", "null", "undefined"];
            conditions.push(doc! {"$in": [{"$type": format!("${path}")}, absent]});
            let parents = path.parents();
            conditions.extend(
                parents.map(|parent| doc! {"$in": [{"$type": format!("${parent}")}, ["missing", "object"]]}),
            );
        }
        conditions
    }
}

/// That a document holds a field of this name at most once. By bytes: under a
/// collation, other names are equal.
fn stands_once(parent: &str, name: &str) -> Document {
    let parent = format!("${parent}");
    let length = i64::try_from(name.len()).unwrap_or(i64::MAX);
    let is_it = doc! {"$and": [
        {"$eq": [{"$strLenBytes": "$$this.k"}, length]},
        {"$eq": [{"$indexOfBytes": ["$$this.k", {"$literal": name}]}, 0]},
    ]};
    let fields = doc! {"$cond": [{"$eq": [{"$type": &parent}, "object"]}, {"$objectToArray": &parent}, []]};
    doc! {"$lte": [{"$size": {"$filter": {"input": fields, "cond": is_it}}}, 1]}
}

/// The condition for candidates. Never `$exists: false`: only equality to null
/// implies the partial index.
pub fn candidate_filter(target: &Target) -> Document {
    let mut filter = doc! {target.key_field.as_str(): Bson::Null, target.flag_field.as_str(): Bson::Null};
    if !target.filter.0.is_empty() {
        filter.insert("$and", vec![target.filter.0.clone()]);
    }
    filter
}

/// The legacy field as type `t` and value `v`, which is absent where it can't
/// be a usable key: it may be megabytes long.
pub fn legacy_projection(field: &values::FieldPath) -> Document {
    let field = format!("${field}");
    let readable = doc! {"$cond": [
        {"$eq": [{"$type": &field}, "binData"]},
        // Only a UUID is usable, and a UUID has sixteen bytes.
        {"$eq": [{"$binarySize": &field}, 16]},
        {"$in": [{"$type": &field}, legacy_key::READABLE_TYPES.to_vec()]},
    ]};
    doc! {"t": {"$type": &field}, "v": {"$cond": [readable, &field, "$$REMOVE"]}}
}

fn field_name(path: &values::FieldPath) -> Result<CString> {
    CString::try_from(path.as_str()).map_err(|_| Error::usage(format!("`{path}` holds a zero byte")))
}

fn hint_document(hint: mongodb::options::Hint) -> Bson {
    match hint {
        mongodb::options::Hint::Name(name) => name.into(),
        mongodb::options::Hint::Keys(keys) => keys.into(),
        _ => Bson::Null,
    }
}

fn driver_preference(preference: values::ReadPreference) -> ReadPreference {
    let options = None;
    match preference {
        values::ReadPreference::Primary => ReadPreference::Primary,
        values::ReadPreference::PrimaryPreferred => ReadPreference::PrimaryPreferred { options },
        values::ReadPreference::Secondary => ReadPreference::Secondary { options },
        values::ReadPreference::SecondaryPreferred => ReadPreference::SecondaryPreferred { options },
        values::ReadPreference::Nearest => ReadPreference::Nearest { options },
    }
}

/// Runs a find to its end, so that no cursor outlives the call.
pub(crate) async fn collect(
    find: mongodb::action::Find<'_, RawDocumentBuf>,
) -> mongodb::error::Result<Vec<RawDocumentBuf>> {
    let mut cursor = find.await?;
    let mut documents = Vec::new();
    while cursor.advance().await? {
        documents.push(cursor.current().to_owned());
    }
    Ok(documents)
}

/// What cannot be read is no less a candidate: it is one with an obstacle.
fn read_candidate(document: &RawDocument) -> Candidate {
    let readable = readable_id(document);
    let type_name = document.get_str("t").unwrap_or("missing").to_owned();
    let (value, has_readable_key) = match document.get("v") {
        Ok(value) => (value.map(Into::into), true),
        Err(_) => (None, false),
    };
    let obstacle = if readable.is_none() {
        Some(Obstacle::UnreadableId)
    } else if !document.get_bool("w").unwrap_or(false) {
        Some(Obstacle::UnwritablePath)
    } else if !has_readable_key {
        Some(Obstacle::UnreadableKey)
    } else {
        None
    };
    let id = readable.unwrap_or_else(|| shown_id(document));
    Candidate { id, legacy: LegacyValue { type_name, value }, obstacle }
}

/// The `_id`, where it can be asked for.
fn readable_id(document: &RawDocument) -> Option<RawBson> {
    let id: RawBson = document.get("_id").ok().flatten()?.into();
    exact(&id).is_some().then_some(id)
}

/// An `_id` for people, with a mark in place of what is not UTF-8.
fn shown_id(document: &RawDocument) -> RawBson {
    let is_id = |element: &bson::raw::RawElement<'_>| element.key().as_str() == "_id";
    let id = document.iter_elements().flatten().find(is_id);
    id.and_then(|id| id.value_utf8_lossy().ok()).map_or(RawBson::Undefined, |id| {
        let shown = Bson::try_from(id.as_raw_bson_ref()).ok().and_then(|id| RawBson::try_from(id).ok());
        shown.unwrap_or_else(|| "(no text)".into())
    })
}

/// A raw value as an owned one, for queries.
pub(crate) fn to_bson(value: &RawBson) -> Result<Bson> {
    Bson::try_from(value.clone())
        .map_err(|error| Error::stopped(format!("an `_id` in the database is no valid BSON: {error}")))
}

/// A raw value for a query; `None` where a query can't hold it: of two fields of one
/// name only the last would be asked for.
pub(crate) fn exact(value: &RawBson) -> Option<Bson> {
    let owned = Bson::try_from(value.clone()).ok()?;
    let again = RawBson::try_from(owned.clone()).ok()?;
    (value_bytes(again.as_raw_bson_ref()) == value_bytes(value.as_raw_bson_ref())).then_some(owned)
}

pub(super) fn to_bson_array<'a>(values: impl Iterator<Item = &'a RawBson>) -> Result<Vec<Bson>> {
    values.map(to_bson).collect()
}

fn read_explain(plan: &Document) -> Explained {
    let stats = plan.get_document("executionStats").ok();
    let figure = |name: &str| stats.and_then(|stats| stats.get(name)).and_then(whole_number).unwrap_or(0);
    let stages = stats.and_then(|stats| stats.get_document("executionStages").ok());
    Explained {
        index: stages
            .and_then(|stage| find_in_plan(stage, &|stage| stage.get_str("indexName").ok().map(Into::into))),
        keys_examined: figure("totalKeysExamined"),
        returned: figure("nReturned"),
        sorted: stages
            .and_then(|stage| {
                find_in_plan(stage, &|stage| {
                    stage.get_str("stage").is_ok_and(|name| name == "SORT").then(String::new)
                })
            })
            .is_some(),
    }
}

fn find_in_plan(stage: &Document, test: &dyn Fn(&Document) -> Option<String>) -> Option<String> {
    test(stage).or_else(|| {
        stage.values().find_map(|value| match value {
            Bson::Document(inner) => find_in_plan(inner, test),
            Bson::Array(items) => {
                items.iter().filter_map(Bson::as_document).find_map(|inner| find_in_plan(inner, test))
            }
            _ => None,
        })
    })
}
