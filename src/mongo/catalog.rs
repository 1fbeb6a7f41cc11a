//! What a collection is: its kind, options, indexes and identity.

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;

use super::Mongo;
use super::command::retrying;
use crate::config::Target;
use crate::config::values::Namespace;
use crate::error::{Error, Result};

/// A collection as `listCollections` and `listIndexes` describe it.
#[derive(Debug, Clone)]
pub struct Description {
    /// `collection`, `view` or `timeseries`.
    pub kind: String,
    /// Creation options.
    pub options: Document,
    /// The identity, which a rename keeps and a drop ends.
    pub uuid: Option<Bson>,
    /// All indexes, as stored.
    pub indexes: Vec<Document>,
}

impl Description {
    /// The default collation, where it is not the simple one.
    pub fn collation(&self) -> Option<&Document> {
        self.options
            .get_document("collation")
            .ok()
            .filter(|collation| collation.get_str("locale").is_ok_and(|locale| locale != "simple"))
    }

    /// Whether documents are stored in the order of `_id`, without an `_id` index.
    pub fn is_clustered(&self) -> bool {
        self.options.contains_key("clusteredIndex")
    }

    /// Whether documents of it can be filled.
    ///
    /// # Errors
    /// A refusal for a view and other kinds.
    pub fn check_fillable(&self, namespace: &Namespace) -> Result<()> {
        if self.kind == "collection" {
            return Ok(());
        }
        Err(Error::refused(format!("{namespace} is a {}, which can't be filled", self.kind)))
    }

    /// The stored index of that name.
    pub fn index(&self, name: &str) -> Option<&Document> {
        self.indexes.iter().find(|index| index.get_str("name").ok() == Some(name))
    }
}

impl Mongo {
    /// Describes a collection; `None` where there is none of that name.
    ///
    /// # Errors
    /// A stop where the server can't be asked.
    pub async fn describe(&self, namespace: &Namespace) -> Result<Option<Description>> {
        let database = self.database(&namespace.database);
        let list = doc! {"listCollections": 1, "filter": {"name": &namespace.collection}};
        let found: Vec<Document> = retrying(format!("describing {namespace}"), || {
            let cursor = database.run_cursor_command(list.clone());
            async move { cursor.await?.try_collect().await }
        })
        .await?;
        let Some(mut entry) = found.into_iter().next() else { return Ok(None) };
        let kind = entry.get_str("type").unwrap_or("collection").to_owned();
        let indexes = if kind == "view" { Vec::new() } else { self.indexes(namespace).await? };
        let options = match entry.remove("options") {
            Some(Bson::Document(options)) => options,
            _ => Document::new(),
        };
        let uuid = entry.get_document("info").ok().and_then(|info| info.get("uuid").cloned());
        Ok(Some(Description { kind, options, uuid, indexes }))
    }

    /// Describes the collection of a target.
    ///
    /// # Errors
    /// A refusal where there is none of that name.
    pub async fn describe_target(&self, target: &Target) -> Result<Description> {
        self.describe(&target.namespace).await?.ok_or_else(|| {
            Error::refused(format!("there is no collection {}", target.namespace))
                .hint("check `collection` of the target; names are case-sensitive")
        })
    }

    async fn indexes(&self, namespace: &Namespace) -> Result<Vec<Document>> {
        let database = self.database(&namespace.database);
        let list = doc! {"listIndexes": &namespace.collection};
        retrying(format!("listing the indexes of {namespace}"), || {
            let cursor = database.run_cursor_command(list.clone());
            async move { cursor.await?.try_collect().await }
        })
        .await
    }
}
