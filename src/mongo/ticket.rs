//! Tickets: a command that the server carries out once at most, and not at all once somebody has
//! taken its ticket.
//!
//! `applyOps` compares no UUIDs: arriving late it would rename whatever bears the names. So its
//! entries begin with the insert of a ticket under a unique index, which fails where the ticket was
//! taken, and nothing after it is done; and they end with the same ticket spent, so that the command
//! fails where it arrives twice.

use bson::{Document, doc};
use mongodb::error::{Error as DriverError, ErrorKind, WriteFailure};
use mongodb::options::IndexOptions;
use mongodb::{Collection, IndexModel};

use super::Mongo;
use super::command::retrying;
use crate::error::Result;

/// In the state database: `{_id, ticket}`, unique by both.
const COLLECTION: &str = "tickets";
/// The server's code for a duplicate key.
const DUPLICATE_KEY: i32 = 11000;

/// A ticket for one command.
#[derive(Debug)]
pub struct Ticket {
    /// The database and the collection of tickets.
    namespace: String,
    name: String,
}

impl Mongo {
    /// The ticket of that name; makes sure that it can be taken by one only.
    ///
    /// # Errors
    /// A stop where the state database can't be written.
    pub async fn ticket(&self, name: &str) -> Result<Ticket> {
        let tickets = self.tickets();
        let options = IndexOptions::builder().unique(true).build();
        let index = IndexModel::builder().keys(doc! {"ticket": 1}).options(options).build();
        retrying("making the index of the tickets", || {
            let create = tickets.create_index(index.clone());
            async move { create.await }
        })
        .await?;
        Ok(Ticket { namespace: tickets.namespace().to_string(), name: name.into() })
    }

    /// Takes the ticket of that name: a command that needs it is refused from now on, or was carried
    /// out before.
    ///
    /// # Errors
    /// A stop where the state database can't be written.
    pub async fn take_ticket(&self, name: &str) -> Result<()> {
        // Without the index of a database that was dropped meanwhile it could be taken twice.
        let ticket = self.ticket(name).await?;
        let (tickets, used, taken) = (self.tickets(), ticket.document("used"), ticket.document("taken"));
        // A command that was cut short after its first entry would find its own ticket again.
        let unused = doc! {"_id": used.get("_id").cloned()};
        retrying("taking a ticket", || {
            let delete = tickets.delete_one(unused.clone());
            async move { delete.await }
        })
        .await?;
        retrying("taking a ticket", || {
            let insert = tickets.insert_one(taken.clone());
            async move {
                match insert.await {
                    Err(error) if !is_taken(&error) => Err(error),
                    _ => Ok(()),
                }
            }
        })
        .await
    }

    fn tickets(&self) -> Collection<Document> {
        self.state(COLLECTION)
    }
}

impl Ticket {
    /// These entries of an `applyOps`, between the use and the spending of the ticket.
    pub(super) fn around(&self, entries: Vec<Document>) -> Vec<Document> {
        let (used, spent) = (self.document("used"), self.document("spent"));
        let insert = |document: Document| doc! {"op": "i", "ns": &self.namespace, "o": document};
        let id = used.get("_id").cloned();
        let delete = doc! {"op": "d", "ns": &self.namespace, "o": {"_id": id}};
        let mut all = vec![insert(used)];
        all.extend(entries);
        all.extend([delete, insert(spent)]);
        all
    }

    /// An insert is by `_id` and would replace a document with the same one: only the ticket, which is
    /// unique too, is refused.
    fn document(&self, what: &str) -> Document {
        doc! {"_id": format!("{}.{what}", self.name), "ticket": &self.name}
    }
}

fn is_taken(error: &DriverError) -> bool {
    matches!(error.kind.as_ref(), ErrorKind::Write(WriteFailure::WriteError(error)) if error.code == DUPLICATE_KEY)
}
