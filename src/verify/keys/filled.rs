//! Filled documents of all targets, drawn at random.

use std::collections::{HashMap, VecDeque};

use bson::{Bson, RawBson, RawDocumentBuf, doc};
use futures_util::TryStreamExt;

use crate::config::Target;
use crate::error::{Error, Result};
use crate::legacy_key;
use crate::mongo::Mongo;
use crate::mongo::command::retrying;
use crate::mongo::draw::{Draw, Drawn};
use crate::mongo::sink::value_bytes;
use crate::mongo::source::{legacy_projection, to_bson};

/// Documents that are looked up at once.
const BATCH: usize = 200;

/// A document that has a key.
#[derive(Debug, Clone)]
pub struct Filled {
    /// Which of the targets it is of.
    pub target: usize,
    /// Its `_id`.
    pub id: RawBson,
    /// The text of its legacy key, where it has a usable one.
    pub legacy: Option<String>,
    /// Its new key, where that is a text.
    pub key: Option<String>,
}

/// Draws filled documents of several targets in one order: those of all targets
/// are as likely.
#[derive(Debug)]
pub struct FilledDraw {
    mongo: Mongo,
    targets: Vec<OfTarget>,
}

/// A target, what is drawn of it, and what was looked up with its place.
type OfTarget = (Target, Draw, VecDeque<(i64, Filled)>);

impl FilledDraw {
    /// Draws about `wanted` documents.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn new(mongo: &Mongo, targets: &[Target], wanted: u64, seed: u64) -> Result<Self> {
        let mut counts = Vec::new();
        for target in targets {
            counts.push(mongo.collection(&target.namespace).estimated_document_count().await.unwrap_or(0));
        }
        let all: u64 = counts.iter().sum();
        let mut draws = Vec::new();
        for target in targets {
            let description = mongo.describe(&target.namespace).await?;
            let by_id = description.is_some_and(|description| description.index("_id_").is_some());
            let draw = Draw::new(mongo, &target.namespace, by_id, seed, (wanted, all));
            draws.push((target.clone(), draw, VecDeque::new()));
        }
        Ok(Self { mongo: mongo.clone(), targets: draws })
    }

    /// The next document; `None` where all were drawn.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn next(&mut self) -> Result<Option<Filled>> {
        for (number, (target, draw, waiting)) in self.targets.iter_mut().enumerate() {
            while waiting.is_empty() {
                let drawn = next_batch(draw).await?;
                if drawn.is_empty() {
                    break;
                }
                let ids: Vec<RawBson> = drawn.iter().map(|drawn| drawn.id.clone()).collect();
                let mut found = look_up(&self.mongo, target, number, &ids).await?;
                let known = drawn.into_iter().filter_map(|Drawn { place, id }| {
                    Some((place, found.remove(&value_bytes(id.as_raw_bson_ref()))?))
                });
                waiting.extend(known);
            }
        }
        let place = |waiting: &VecDeque<(i64, Filled)>| waiting.front().map(|(place, _)| *place);
        let first = self
            .targets
            .iter_mut()
            .filter_map(|(.., waiting)| Some((place(waiting)?, waiting)))
            .min_by_key(|(place, _)| *place);
        Ok(first.and_then(|(_, waiting)| waiting.pop_front()).map(|(_, filled)| filled))
    }
}

async fn next_batch(draw: &mut Draw) -> Result<Vec<Drawn>> {
    let mut drawn = Vec::new();
    while drawn.len() < BATCH {
        let Some(next) = draw.next().await? else { break };
        drawn.push(next);
    }
    Ok(drawn)
}

/// Those of these documents that have a key, by the bytes of their `_id`s.
///
/// # Errors
/// A stop where the server can't be read.
pub async fn look_up(
    mongo: &Mongo,
    target: &Target,
    number: usize,
    ids: &[RawBson],
) -> Result<HashMap<Vec<u8>, Filled>> {
    let values = ids.iter().map(to_bson).collect::<Result<Vec<Bson>>>()?;
    let mut projection = legacy_projection(&target.legacy_field);
    projection.insert("key", format!("${}", target.key_field));
    let pipeline = [
        doc! {"$match": {"_id": {"$in": values}, target.key_field.as_str(): {"$ne": Bson::Null}}},
        doc! {"$project": projection},
    ];
    let collection = mongo.collection(&target.namespace);
    let found: Vec<RawDocumentBuf> = retrying(format!("reading documents of {}", target.namespace), || {
        let cursor = collection.aggregate(pipeline.clone());
        async move { cursor.await?.with_type::<RawDocumentBuf>().try_collect().await }
    })
    .await?;
    let mut filled = HashMap::new();
    for document in &found {
        let id = document.get("_id").ok().flatten();
        let id: RawBson = id.ok_or_else(|| Error::stopped("a document has no `_id`"))?.into();
        let legacy = document.get("v").ok().flatten().and_then(legacy_key::text_of);
        let key = document.get_str("key").ok().map(str::to_owned);
        let bytes = value_bytes(id.as_raw_bson_ref());
        filled.insert(bytes, Filled { target: number, id, legacy, key });
    }
    Ok(filled)
}
