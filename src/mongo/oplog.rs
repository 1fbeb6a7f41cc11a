//! Whether a stretch of the oplog is about a collection at all.
//!
//! A change stream looks at every entry of the oplog with the whole of its filter,
//! also at the million entries that a copy makes itself; that costs the server
//! about half of what the copy costs. Asking the oplog for a name costs a seventh.
//! So while nothing happens to a collection the oplog is asked, and a stretch in
//! which there is nothing need not be read by the stream.
//!
//! What can't be told at a glance counts as being about it: every command, since a
//! transaction is one, and every entry of a collection that is watched.

use std::time::Duration;

use bson::{Document, Timestamp, doc};
use futures_util::TryStreamExt;
use mongodb::Collection;

use super::Mongo;
use super::feed::Position;
use super::index::whole_number;
use super::watched::Watched;
use crate::config::values::Namespace;

/// Changes that are counted at most: the server has other things to do.
pub const MOST_COUNTED: u32 = 10_000;
/// Counting takes no longer than this.
const COUNTING: Duration = Duration::from_millis(200);

impl Mongo {
    /// Whether nothing in the oplog after one moment and up to another, which a
    /// majority has, can be about what is watched. `None` where that can't be told:
    /// the oplog may not be read, or does not hold all of it.
    pub async fn is_quiet(&self, watched: &Watched, after: Timestamp, until: Timestamp) -> Option<bool> {
        if Position::Time(after).has_reached(until) {
            return Some(true);
        }
        let oplog = self.oplog_entries();
        let wanted = doc! {"_id": 0, "ts": 1, "ns": 1, "op": 1};
        let found = oplog.find_one(about(watched, after, until)).projection(wanted).await.ok()??;
        if !is_just_the_end(watched, &found, until) {
            return Some(false);
        }
        // Asked for afterwards: what is there now was there before.
        let first = oplog.find_one(doc! {}).sort(doc! {"$natural": 1}).await.ok()??;
        let reaches_back =
            first.get_timestamp("ts").is_ok_and(|first| Position::Time(after).has_reached(first));
        reaches_back.then_some(true)
    }

    /// How many changes of a collection the oplog holds after a moment, but for
    /// those of transactions; at most [`MOST_COUNTED`]. `None` where it may not be read, or
    /// not in time.
    pub async fn changes_after(&self, namespace: &Namespace, after: Timestamp) -> Option<u64> {
        let ours = doc! {"ts": {"$gt": after}, "ns": namespace.to_string()};
        let count = [doc! {"$match": ours}, doc! {"$limit": i64::from(MOST_COUNTED)}, doc! {"$count": "n"}];
        let counted = self.oplog_entries().aggregate(count).max_time(COUNTING).await.ok()?;
        let counted: Vec<Document> = counted.try_collect().await.ok()?;
        Some(counted.first().and_then(|counted| counted.get("n")).and_then(whole_number).unwrap_or(0))
    }

    /// The oplog, for whoever may read it.
    pub(super) fn oplog_entries(&self) -> Collection<Document> {
        self.database("local").collection("oplog.rs")
    }
}

/// The condition for entries that may be about what is watched, and for the last
/// one of the stretch: a server that has that one has all before it. Pure.
fn about(watched: &Watched, after: Timestamp, until: Timestamp) -> Document {
    doc! {
        "ts": {"$gt": after, "$lte": until},
        "$or": [{"ns": {"$in": watched.namespaces()}}, {"op": "c"}, {"ts": until}],
    }
}

/// Whether the first entry that was found is the end of the stretch and nothing
/// else. Pure.
fn is_just_the_end(watched: &Watched, entry: &Document, until: Timestamp) -> bool {
    let (Ok(ts), Ok(op), Ok(ns)) = (entry.get_timestamp("ts"), entry.get_str("op"), entry.get_str("ns"))
    else {
        return false;
    };
    ts == until && op != "c" && !watched.namespaces().iter().any(|name| name == ns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mongo::valid::Membership;

    const UNTIL: Timestamp = Timestamp { time: 3, increment: 4 };

    fn watched() -> Watched {
        let membership =
            Membership { collection: "members".into(), local: "l".into(), foreign: "_id".into() };
        Watched { source: "app.users".parse().expect("a namespace"), memberships: vec![membership] }
    }

    #[test]
    fn commands_and_all_watched_collections_are_asked_for() {
        let after = Timestamp { time: 1, increment: 2 };
        let expected = doc! {
            "ts": {"$gt": after, "$lte": UNTIL},
            "$or": [{"ns": {"$in": ["app.users", "app.members"]}}, {"op": "c"}, {"ts": UNTIL}],
        };
        assert_eq!(about(&watched(), after, UNTIL), expected);
    }

    #[test]
    fn only_a_foreign_entry_at_its_very_end_leaves_a_stretch_quiet() {
        let entry = |ts, ns: &str, op: &str| doc! {"ts": ts, "ns": ns, "op": op};
        let is_quiet = |entry: Document| is_just_the_end(&watched(), &entry, UNTIL);
        assert!(is_quiet(entry(UNTIL, "app.users_v2", "i")) && is_quiet(entry(UNTIL, "", "n")));
        assert!(!is_quiet(entry(Timestamp { time: 2, increment: 1 }, "app.users_v2", "i")));
        assert!(!is_quiet(entry(UNTIL, "app.users", "u")) && !is_quiet(entry(UNTIL, "app.members", "d")));
        assert!(!is_quiet(entry(UNTIL, "admin.$cmd", "c")) && !is_quiet(doc! {"ts": UNTIL}));
    }
}
