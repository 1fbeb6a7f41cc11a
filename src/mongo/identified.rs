//! Commands that fail where a name is borne by another collection than before.
//!
//! What is re-read by its name alone is not there when the collection was dropped
//! meanwhile, and what is not there would be removed from the target: of an
//! accidental drop the copy would not survive either.

use bson::{Bson, Document, RawBson, RawDocumentBuf, Timestamp, doc};
use mongodb::error::Error as DriverError;

use super::Mongo;
use crate::config::values::Namespace;
use crate::error::Result;

/// The `maxWireVersion` of MongoDB 6.0, the first that compares identities.
const WIRE_VERSION: i32 = 17;

/// The identities that two collections must have; `None` where that is not known,
/// or the server can't compare them.
#[derive(Debug, Clone, Default)]
pub struct Identities {
    /// Of the collection that is read.
    pub source: Option<Bson>,
    /// Of the collection that is written to.
    pub target: Option<Bson>,
}

impl Mongo {
    /// The identities of two collections as they are now.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn identities(&self, source: &Namespace, target: &Namespace) -> Result<Identities> {
        if self.hello().await?.get_i32("maxWireVersion").unwrap_or(0) < WIRE_VERSION {
            return Ok(Identities::default());
        }
        Ok(Identities { source: self.bearer(source).await?, target: self.bearer(target).await? })
    }

    /// All documents that a `find` or an `aggregate` returns, of the collection with
    /// that identity only.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide.
    pub(super) async fn documents_of(
        &self,
        namespace: &Namespace,
        command: RawDocumentBuf,
        concern: Document,
        identity: Option<&Bson>,
    ) -> mongodb::error::Result<Vec<RawDocumentBuf>> {
        let read = self.documents_within(usize::MAX, namespace, command, concern, identity).await?;
        Ok(read.documents)
    }

    /// The same, but no more documents once there are so many bytes of them.
    ///
    /// # Errors
    /// The driver's error, for the caller to decide.
    pub(super) async fn documents_within(
        &self,
        bytes: usize,
        namespace: &Namespace,
        mut command: RawDocumentBuf,
        concern: Document,
        identity: Option<&Bson>,
    ) -> mongodb::error::Result<Read> {
        let encoded = |value: Bson| RawBson::try_from(value).map_err(DriverError::custom);
        command.append(bson::cstr!("readConcern"), encoded(concern.into())?);
        if let Some(identity) = identity {
            command.append(bson::cstr!("collectionUUID"), encoded(identity.clone())?);
        }
        let cursor = self.database(&namespace.database).run_raw_cursor_command(command).await?;
        let mut cursor = cursor.with_type::<RawDocumentBuf>();
        let (mut documents, mut size) = (Vec::new(), 0_usize);
        while cursor.advance().await? {
            if size >= bytes {
                return Ok(Read { documents, is_all: false });
            }
            let document = cursor.current().to_owned();
            size += document.as_bytes().len();
            documents.push(document);
        }
        Ok(Read { documents, is_all: true })
    }
}

/// Documents that were read.
#[derive(Debug, Default)]
pub struct Read {
    /// At least one, where there are any.
    pub documents: Vec<RawDocumentBuf>,
    /// Whether there are no others.
    pub is_all: bool,
}

/// Read as a majority has it, not before a moment.
pub(super) fn not_before(moment: Option<Timestamp>) -> Document {
    match moment {
        Some(moment) => doc! {"level": "majority", "afterClusterTime": moment},
        None => doc! {"level": "majority"},
    }
}
