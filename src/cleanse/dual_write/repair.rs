//! Brings documents of the target to the state of the source, if neither has
//! changed since it was seen to differ.

use std::collections::HashMap;

use bson::{Document, RawBson, RawDocument, RawDocumentBuf, doc};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::compare::Comparison;
use super::suspect::Suspect;
use crate::error::{Context as _, Result};
use crate::mongo::exact;
use crate::mongo::keeping::{Change, Refusal};
use crate::report::json::extended;
use crate::verify::compare::difference;
use crate::verify::full::matching::Id;
use crate::verify::pairs::{Seen, Version};

/// Bytes of documents that are held in memory and sent at once, if it is more
/// than one.
const MOST_BYTES: usize = 4 << 20;
/// Documents that are repaired at once.
const MOST_AT_ONCE: usize = 200;
/// Differences that are told one by one.
const MOST_DIFFERENCES: usize = 100;

type Documents = HashMap<Id, RawDocumentBuf>;

impl Comparison<'_> {
    /// Tries to repair these documents; all are looked at again.
    pub(super) async fn repair(&mut self, suspects: Vec<Suspect>) -> Result<()> {
        let (mut part, mut bytes) = (Vec::new(), 0);
        for suspect in suspects {
            let size = size_of(&suspect.seen);
            if !part.is_empty() && (bytes + size > MOST_BYTES || part.len() >= MOST_AT_ONCE) {
                self.repair_part(std::mem::take(&mut part)).await?;
                bytes = 0;
            }
            bytes += size;
            part.push(suspect);
        }
        self.repair_part(part).await
    }

    async fn repair_part(&mut self, suspects: Vec<Suspect>) -> Result<()> {
        let ids: Vec<RawBson> = suspects.iter().filter_map(|suspect| suspect.id.value()).collect();
        let owned = |document: &RawDocument| Some((Id::of(document)?, document.to_owned()));
        let pairs = &self.pairs;
        let source = pairs.mongo.by_ids(pairs.source, &ids, &pairs.valid, self.after, owned).await?;
        let target = pairs.mongo.by_ids(pairs.target, &ids, &Document::new(), None, owned).await?;
        let source: Documents = source.into_iter().flatten().collect();
        let target: Documents = target.into_iter().flatten().collect();
        let (mut changed, mut changes) = (Vec::new(), Vec::new());
        for mut suspect in suspects {
            let (source, target) = (source.get(&suspect.id), target.get(&suspect.id));
            let version = |document: Option<&RawDocumentBuf>| document.map(|document| Version::of(document));
            let seen = Seen { source: version(source), target: version(target) };
            match change(source, target) {
                Some(change) if seen == suspect.seen => {
                    self.note(&mut suspect, source, target);
                    changed.push(suspect);
                    changes.push(change);
                }
                // Somebody writes it: the next look tells.
                _ => self.suspects.push(suspect),
            }
        }
        if changes.is_empty() {
            return Ok(());
        }
        let refusals = self.lane.change(self.pairs.target, &changes).await?;
        crate::crash::point("after_repair");
        for ((mut suspect, change), refusal) in changed.into_iter().zip(changes).zip(refusals) {
            suspect.attempted(Instant::now());
            if let Some(refusal) = refusal {
                self.refused(&mut suspect, change, &refusal).await?;
            }
            self.suspects.push(suspect);
        }
        Ok(())
    }

    /// One that another document stands in the way of. Where that one was touched
    /// too and is still to be repaired, this one makes room, or two that swap
    /// their values would wait for each other. One that nobody has touched stays.
    async fn refused(&mut self, suspect: &mut Suspect, change: Change, refusal: &Refusal) -> Result<()> {
        let entry = suspect.entry.and_then(|entry| self.figures.differences.get_mut(entry));
        if let Some(entry) = entry {
            entry["reason"] = Value::from(refusal.reason.as_str());
        }
        let Some(values) = &refusal.values else { return Ok(()) };
        let parties = self.parties(values, &suspect.id).await?;
        if !parties.is_empty() && !self.marks.has_any(&parties).await? {
            suspect.hopeless();
            return Ok(());
        }
        if let Change::Replace(old, _) = change {
            let removed = self.lane.change(self.pairs.target, &[Change::Remove(old)]).await?;
            if removed.iter().all(Option::is_none) {
                suspect.seen.target = None;
            }
        }
        Ok(())
    }

    /// The documents of the target that hold these values, but for one.
    async fn parties(&self, values: &Document, but: &Id) -> Result<Vec<RawBson>> {
        let filter: Document =
            values.iter().map(|(field, value)| (field.clone(), doc! {"$eq": value.clone()}.into())).collect();
        let target = self.pairs.target;
        let operation = format!("finding what stands in the way in {target}");
        let collection = self.pairs.mongo.collection(target);
        let mut cursor = collection.find(filter).projection(doc! {"_id": 1}).await.during(&operation)?;
        let mut parties = Vec::new();
        while cursor.advance().await.during(&operation)? {
            let id = exact::id_of(cursor.current());
            parties.extend(id.filter(|id| Id::from_value(id) != *but));
        }
        Ok(parties)
    }

    /// Reports a difference, the first time that it is to be repaired.
    fn note(
        &mut self,
        suspect: &mut Suspect,
        source: Option<&RawDocumentBuf>,
        target: Option<&RawDocumentBuf>,
    ) {
        let differences = &mut self.figures.differences;
        if suspect.entry.is_some() || differences.len() >= MOST_DIFFERENCES {
            return;
        }
        let (Some(id), Some(kind)) = (suspect.id.value(), suspect.seen.kind()) else { return };
        let fields: Vec<String> = match (source, target) {
            (Some(source), Some(target)) => {
                difference(source, target).into_iter().map(|field| field.path).collect()
            }
            _ => Vec::new(),
        };
        let shown = extended(id.as_raw_bson_ref());
        // Told at once: should this run be killed, the next one finds it repaired.
        let target = self.pairs.target;
        self.context.events.warn(format!("{} in {target}, to be repaired: {shown}", kind.as_str()));
        suspect.entry = Some(differences.len());
        differences.push(json!({
            "_id": shown,
            "kind": kind.as_str(),
            "fields": fields,
            "outcome": "not repaired",
        }));
    }
}

fn change(source: Option<&RawDocumentBuf>, target: Option<&RawDocumentBuf>) -> Option<Change> {
    match (source.cloned(), target.cloned()) {
        (Some(source), None) => Some(Change::Insert(source)),
        (None, Some(target)) => Some(Change::Remove(target)),
        (Some(source), Some(target)) => Some(Change::Replace(target, source)),
        (None, None) => None,
    }
}

fn size_of(seen: &Seen) -> usize {
    let bytes = |version: Option<Version>| version.map_or(0, |version| version.bytes);
    bytes(seen.source) + bytes(seen.target)
}
