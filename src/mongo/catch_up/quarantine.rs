//! Keeping a quarantine in step too: a touched document ends in the target, in
//! the quarantine, or, where it is gone, in neither.
//!
//! What leaves one side is removed before the other is written. A crash in
//! between may leave a document in neither, until whoever comes next applies it
//! again: the position is stored later.

use std::collections::HashMap;

use bson::{Document, RawBson, RawDocumentBuf};

use super::CatchUp;
use crate::config::values::Namespace;
use crate::error::{Error, Result};
use crate::mongo::command::retrying;
use crate::mongo::exact;
use crate::mongo::lane::Refused;
use crate::mongo::quarantine::{MOST_PARTS, Stored, part_id, parts_of, wrap};
use crate::mongo::sink::id_bytes;
use crate::mongo::state::write_states;
use crate::mongo::valid::Valid;

/// Bytes of documents per command.
const MOST_BYTES: usize = super::MOST_BYTES;

/// Where rejected documents go.
#[derive(Debug, Clone, PartialEq)]
pub struct Quarantine {
    /// The collection.
    pub namespace: Namespace,
    /// The rules in their order, each with the condition for documents that it is
    /// the first to hit.
    pub hits: Vec<(String, Document)>,
}

/// A quarantine that is kept in step.
#[derive(Debug)]
pub(super) struct Kept {
    quarantine: Quarantine,
    /// Whether any document may be kept in parts, which is seldom: otherwise
    /// there is nothing to remove.
    may_have_parts: bool,
}

/// What is to be done to the quarantine for some touched documents.
#[derive(Debug, Default)]
pub(super) struct Sorted {
    rejected: Vec<(RawBson, Stored)>,
    /// `_id`s that are valid or gone.
    pub(super) leaving: Vec<RawBson>,
}

impl CatchUp {
    /// Keeps this quarantine in step as well.
    ///
    /// # Errors
    /// A stop where the server can't be read.
    pub async fn with_quarantine(mut self, quarantine: Quarantine) -> Result<Self> {
        let parts = self.mongo.collection(&parts_of(&quarantine.namespace));
        let any = retrying(format!("looking for parts of {}", quarantine.namespace), || {
            let find = parts.find_one(Document::new());
            async move { find.await }
        })
        .await?;
        self.quarantine = Some(Kept { quarantine, may_have_parts: any.is_some() });
        Ok(self)
    }

    /// Tells the rejected ones from those that are `gone`, which are all that are
    /// not valid. One that is neither was changed between two looks: it is taken
    /// out of `gone` and left as it is, for that change is still to come.
    pub(super) async fn sort(
        &mut self,
        valid: &[RawDocumentBuf],
        gone: &mut HashMap<Vec<u8>, RawBson>,
    ) -> Result<Sorted> {
        let Some(kept) = &self.quarantine else { return Ok(Sorted::default()) };
        let hits = kept.quarantine.hits.clone();
        let mut sorted = Sorted::default();
        let mut open = gone.clone();
        for (rule, condition) in hits {
            for document in self.find(&open, &condition).await? {
                let Some((id, bytes)) = exact::id_of(&document).zip(id_bytes(&document)) else { continue };
                open.remove(&bytes);
                sorted.rejected.push((id, wrap(&rule, &document)?));
            }
        }
        for moving in self.find(&open, &Document::new()).await? {
            if let Some(bytes) = id_bytes(&moving) {
                open.remove(&bytes);
                gone.remove(&bytes);
            }
        }
        sorted.leaving =
            valid.iter().filter_map(|document| exact::id_of(document)).chain(open.into_values()).collect();
        Ok(sorted)
    }

    async fn find(
        &mut self,
        ids: &HashMap<Vec<u8>, RawBson>,
        condition: &Document,
    ) -> Result<Vec<RawDocumentBuf>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<RawBson> = ids.values().cloned().collect();
        // The session has seen what the first look has seen: this one sees no less.
        self.read_where(&ids, &Valid::condition(condition.clone()), None).await
    }

    /// The quarantine, where something leaves it.
    pub(super) fn left(&self, sorted: &Sorted) -> Option<&Namespace> {
        let kept = self.quarantine.as_ref().filter(|_| !sorted.leaving.is_empty());
        kept.map(|kept| &kept.quarantine.namespace)
    }

    /// Removes the parts of what has left the quarantine.
    pub(super) async fn leave_parts(&mut self, sorted: &Sorted) -> Result<()> {
        let Some(kept) = self.quarantine.as_ref().filter(|kept| kept.may_have_parts) else { return Ok(()) };
        let namespace = kept.quarantine.namespace.clone();
        for id in &sorted.leaving {
            self.remove_parts(&namespace, id, 0).await?;
        }
        Ok(())
    }

    /// Writes the rejected ones into the quarantine. The parts of one come before
    /// what refers to them, and go after it.
    pub(super) async fn write_rejected(&mut self, sorted: Sorted) -> Result<()> {
        let Some(kept) = &self.quarantine else { return Ok(()) };
        let namespace = kept.quarantine.namespace.clone();
        let (mut batch, mut bytes) = (Vec::new(), 0);
        for (id, stored) in sorted.rejected {
            let (document, parts) = match stored {
                Stored::Whole(document) => (document, 0),
                Stored::InParts { head, parts } => {
                    self.write_parts(&namespace, &parts).await?;
                    (head, i32::try_from(parts.len()).unwrap_or(MOST_PARTS))
                }
            };
            let size = document.as_bytes().len();
            if !batch.is_empty() && bytes + size > MOST_BYTES {
                self.write_batch(&namespace, std::mem::take(&mut batch)).await?;
                bytes = 0;
            }
            bytes += size;
            batch.push((id, document, parts));
        }
        self.write_batch(&namespace, batch).await
    }

    async fn write_batch(
        &mut self,
        namespace: &Namespace,
        batch: Vec<(RawBson, RawDocumentBuf, i32)>,
    ) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let documents: Vec<RawDocumentBuf> = batch.iter().map(|(_, document, _)| document.clone()).collect();
        self.replace(namespace, &documents).await?;
        if self.quarantine.as_ref().is_some_and(|kept| kept.may_have_parts) {
            for (id, _, parts) in batch {
                self.remove_parts(namespace, &id, parts).await?;
            }
        }
        Ok(())
    }

    async fn write_parts(&mut self, namespace: &Namespace, parts: &[RawDocumentBuf]) -> Result<()> {
        if let Some(kept) = &mut self.quarantine {
            kept.may_have_parts = true;
        }
        let namespace = parts_of(namespace);
        for part in parts {
            self.replace(&namespace, std::slice::from_ref(part)).await?;
        }
        Ok(())
    }

    /// Removes the parts of a document from that number on.
    async fn remove_parts(&mut self, namespace: &Namespace, id: &RawBson, from: i32) -> Result<()> {
        let ids: Vec<RawBson> = (from..MOST_PARTS).map(|part| part_id(id, part).into()).collect();
        self.remove_from(&parts_of(namespace), &ids).await
    }

    /// Writes documents as they are.
    async fn replace(&mut self, namespace: &Namespace, documents: &[RawDocumentBuf]) -> Result<()> {
        let commands = write_states(&namespace.collection, documents, |_| false)?;
        match self.send(namespace, &commands).await? {
            // An equal `_id` of another type or spelling was rejected before.
            Some(refusal) if refusal.code() == super::OTHER_ID => {
                let commands = write_states(&namespace.collection, documents, |_| true)?;
                let again = self.send(namespace, &commands).await?;
                again.map_or(Ok(()), |refusal| Err(refused(namespace, &refusal)))
            }
            Some(refusal) => Err(refused(namespace, &refusal)),
            None => Ok(()),
        }
    }
}

fn refused(namespace: &Namespace, refusal: &Refused) -> Error {
    let message = refusal.message();
    Error::stopped(format!("a rejected document can't be written to {namespace}: {message}"))
        .hint("mend the cause and start the same command again")
}
