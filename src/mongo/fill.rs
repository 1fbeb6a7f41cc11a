//! What filling from the key map leaves in a database, and how it goes.

use super::Mongo;
use super::command::retrying;
use crate::config::values::Namespace;
use crate::error::Result;

impl Mongo {
    /// Drops a collection, where it exists.
    ///
    /// # Errors
    /// A stop where it can't be dropped.
    pub async fn drop_collection(&self, namespace: &Namespace) -> Result<()> {
        let collection = self.collection(namespace);
        retrying(format!("dropping {namespace}"), || {
            let drop = collection.drop();
            async move { drop.await }
        })
        .await
    }
}
