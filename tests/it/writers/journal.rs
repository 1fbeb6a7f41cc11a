//! What the writers were told by the server, and therefore what it must hold.

use std::collections::{BTreeMap, VecDeque};

use bson::{Bson, Document, RawDocumentBuf, doc};
use tokio::time::Instant;

use super::operation::{Answer, Change};
use crate::cleansing::{Bytes, bytes};
use crate::harness::Bench;

/// Writes of one document that are remembered.
const HISTORY: usize = 12;
/// Documents that a failed comparison shows.
const SHOWN: usize = 5;

/// What decides whether a document is to be kept.
pub type Valid = fn(&Document) -> bool;

/// What may befall invalid documents of the live collection without their writer.
#[derive(Debug, Clone, Copy)]
pub enum Cutover {
    /// Nothing: the live collection remains what it is.
    None,
    /// A cutover takes them away.
    Once(Valid),
    /// A cutover takes them away, and a rollback may bring them back.
    AndRollback(Valid),
}

/// All documents as they must be by what was acknowledged.
#[derive(Debug)]
pub struct Journal {
    pub entries: BTreeMap<Vec<u8>, Entry>,
    /// Answers that no order of events explains.
    pub contradictions: Vec<String>,
    cutover: Cutover,
    begin: Instant,
}

/// One document.
#[derive(Debug)]
pub struct Entry {
    id: Bson,
    /// What the server may hold: one state, or two after a write of unknown outcome.
    states: Vec<State>,
    history: VecDeque<String>,
    /// When the last write of it that was acknowledged was sent.
    written: Instant,
}

#[derive(Debug, Clone, PartialEq)]
struct State {
    document: Option<Document>,
    /// What a cutover has taken away.
    hidden: Option<Document>,
}

impl Journal {
    pub fn new(cutover: Cutover) -> Self {
        Self { entries: BTreeMap::new(), contradictions: Vec::new(), cutover, begin: Instant::now() }
    }

    /// A write that the server answered.
    pub fn acknowledged(&mut self, id: &Bson, change: &Change, answer: Answer, sent: Instant) {
        let states = self.possible(id);
        let after: Vec<State> = states
            .iter()
            .filter_map(|state| {
                let (wanted, after) = state.after(id, change);
                (wanted == answer).then_some(after)
            })
            .collect();
        if after.is_empty() {
            self.contradict(id, &format!("{change:?} was answered by {answer:?}"));
            // Go on from what it did if it found what it says.
            let there = matches!(answer, Answer::Matched | Answer::Duplicate);
            let likely = states.iter().find(|state| state.document.is_some() == there);
            let likely = likely.map_or(State::of(None), |state| state.after(id, change).1);
            self.set(id, vec![likely], &format!("{change:?} -> {answer:?}: CONTRADICTION"), Some(sent));
        } else {
            self.set(id, after, &format!("{change:?} -> {answer:?}"), Some(sent));
        }
    }

    /// A write that was applied, to whatever it found.
    pub fn applied(&mut self, id: &Bson, change: &Change, sent: Instant) {
        let after = self.possible(id).iter().map(|state| state.after(id, change).1).collect();
        self.set(id, after, &format!("{change:?} -> applied"), Some(sent));
    }

    /// A write that the server refused.
    pub fn refused(&mut self, id: &Bson, change: &Change, reason: &str) {
        let states = self.entry(id).states.clone();
        self.set(id, states, &format!("{change:?} -> refused: {reason}"), None);
    }

    /// A write of which nobody knows whether it was applied.
    pub fn unknown(&mut self, id: &Bson, change: &Change, reason: &str) {
        let mut states = self.possible(id);
        states.extend(states.clone().iter().map(|state| state.after(id, change).1));
        self.set(id, states, &format!("{change:?} -> unknown: {reason}"), None);
    }

    /// What was read from the live collection, when no write was under way.
    pub fn read(&mut self, id: &Bson, found: Option<&Document>) {
        let possible = self.possible(id);
        let states: Vec<State> =
            possible.into_iter().filter(|state| state.document.as_ref() == found).collect();
        if states.is_empty() {
            self.contradict(id, &format!("found {found:?}"));
            self.set(id, vec![State::of(found.cloned())], "read: CONTRADICTION", None);
        } else if states != self.entry(id).states {
            self.set(
                id,
                states,
                &format!("read: {}", if found.is_some() { "there" } else { "not there" }),
                None,
            );
        }
    }

    /// Whether a change would be answered in one way only, and in which.
    pub fn predicted(&mut self, id: &Bson, change: &Change) -> Option<Answer> {
        let states = self.possible(id);
        let answers: Vec<Answer> = states.iter().map(|state| state.after(id, change).0).collect();
        answers.first().copied().filter(|first| answers.iter().all(|answer| answer == first))
    }

    /// The document, as far as is known.
    pub fn document(&self, id: &Bson) -> Option<&Document> {
        self.entries.get(&id_key(id))?.states.first()?.document.as_ref()
    }

    pub fn contradict(&mut self, id: &Bson, what: &str) {
        let entry = self.entry(id);
        let message = format!("{id}: {what}, but was {:?}", entry.states);
        self.contradictions.push(message);
    }

    /// Takes in the journal of a writer of other documents.
    pub fn merge(&mut self, other: Self) {
        self.entries.extend(other.entries);
        self.contradictions.extend(other.contradictions);
    }

    /// The valid documents, by the bytes of their `_id`s, each as its bytes.
    ///
    /// Fails where the server gave an answer that nothing explains.
    #[track_caller]
    pub fn expected(&self, valid: impl Fn(&Document) -> bool) -> Bytes {
        self.expect_explained();
        let documents = self.entries.iter().filter_map(|(key, entry)| Some((key, entry.settled()?)));
        documents
            .filter(|(_, document)| valid(document))
            .map(|(key, document)| (key.clone(), to_bytes(document)))
            .collect()
    }

    /// What the live collection holds after a cutover that had ended at that moment: the valid
    /// documents and what was written since; then, what may be there besides.
    #[track_caller]
    pub fn expected_after_cutover(
        &self,
        valid: impl Fn(&Document) -> bool,
        ended: Instant,
    ) -> (Bytes, Bytes) {
        self.expect_explained();
        let (mut wanted, mut allowed) = (Bytes::new(), Bytes::new());
        for (key, entry) in &self.entries {
            match entry.settled() {
                Some(document) if valid(document) || entry.written >= ended => {
                    wanted.insert(key.clone(), to_bytes(document));
                }
                Some(document) => drop(allowed.insert(key.clone(), to_bytes(document))),
                None => {
                    let hidden = entry.states.iter().find_map(|state| state.hidden.as_ref());
                    let comes_back = matches!(self.cutover, Cutover::AndRollback(_));
                    allowed.extend(
                        hidden.filter(|_| comes_back).map(|document| (key.clone(), to_bytes(document))),
                    );
                }
            }
        }
        (wanted, allowed)
    }

    /// What the live collection may hold of each document after a cutover that was taken back: all
    /// of them are there again, whatever the rule says of them. One of unknown outcome, or that was
    /// away when it was written to, may be either of several.
    #[track_caller]
    pub fn possible_after_rollback(&self) -> BTreeMap<Vec<u8>, Vec<Option<Vec<u8>>>> {
        self.expect_explained();
        let one = |state: &State| state.document.as_ref().or(state.hidden.as_ref()).map(to_bytes);
        let all = |entry: &Entry| {
            let mut possible: Vec<_> = entry.states.iter().map(one).collect();
            possible.sort();
            possible.dedup();
            possible
        };
        self.entries.iter().map(|(key, entry)| (key.clone(), all(entry))).collect()
    }

    /// Whether every answer of the server has an explanation.
    #[track_caller]
    pub fn expect_explained(&self) {
        let shown = self.contradictions.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("\n");
        assert!(self.contradictions.is_empty(), "{} contradictions:\n{shown}", self.contradictions.len());
    }

    /// What was done to the document of this `_id`, for people.
    pub fn history(&self, key: &[u8]) -> String {
        match self.entries.get(key) {
            Some(entry) => {
                let lines: Vec<&str> = entry.history.iter().map(String::as_str).collect();
                format!("{}\n    {}", entry.id, lines.join("\n    "))
            }
            None => "never written".into(),
        }
    }

    fn entry(&mut self, id: &Bson) -> &mut Entry {
        let begin = self.begin;
        self.entries.entry(id_key(id)).or_insert_with(|| Entry {
            id: id.clone(),
            states: vec![State::of(None)],
            history: VecDeque::new(),
            written: begin,
        })
    }

    /// What the server may hold now: a cutover tells no writer.
    fn possible(&mut self, id: &Bson) -> Vec<State> {
        let cutover = self.cutover;
        let mut states = self.entry(id).states.clone();
        for state in states.clone() {
            match (&state.document, &state.hidden, cutover) {
                (Some(document), _, Cutover::Once(valid) | Cutover::AndRollback(valid))
                    if !valid(document) =>
                {
                    states.push(State { document: None, hidden: Some(document.clone()) });
                }
                (None, Some(hidden), Cutover::AndRollback(_)) => states.push(State::of(Some(hidden.clone()))),
                _ => {}
            }
        }
        states
    }

    fn set(&mut self, id: &Bson, states: Vec<State>, what: &str, sent: Option<Instant>) {
        let line = format!("{:.3} s {what}", self.begin.elapsed().as_secs_f64());
        let entry = self.entry(id);
        entry.states.clear();
        for state in states {
            if !entry.states.contains(&state) {
                entry.states.push(state);
            }
        }
        entry.written = sent.unwrap_or(entry.written);
        if entry.history.len() == HISTORY {
            entry.history.pop_front();
        }
        entry.history.push_back(line);
    }
}

impl Entry {
    /// The document, where there is one; the outcome of every write must be known.
    #[track_caller]
    fn settled(&self) -> Option<&Document> {
        let one = self.states.first().expect("a state");
        let differs = self.states.iter().any(|state| state.document != one.document);
        assert!(!differs, "{} was never read after a write of unknown outcome", self.id);
        one.document.as_ref()
    }
}

impl State {
    fn of(document: Option<Document>) -> Self {
        Self { document, hidden: None }
    }

    fn after(&self, id: &Bson, change: &Change) -> (Answer, Self) {
        let (answer, document) = change.effect(id, self.document.as_ref());
        let hidden = if document.is_none() && answer == Answer::Nothing { self.hidden.clone() } else { None };
        (answer, Self { document, hidden })
    }
}

/// The documents of the collection are these; shows some that are not, and their journal.
#[track_caller]
pub fn expect_collection_equals<'a>(
    bench: &'a Bench,
    collection: &'a str,
    expected: &'a Bytes,
    journal: &'a Journal,
) -> impl Future<Output = ()> + 'a {
    let caller = std::panic::Location::caller();
    async move {
        let found = bytes(bench, collection).await;
        let report = difference(&found, expected, &Bytes::new(), journal);
        assert!(report.is_empty(), "{collection} differs from the journal ({caller}):\n{report}");
    }
}

/// The same for the live collection after a cutover that had ended at that moment.
#[track_caller]
pub fn expect_live_after_cutover<'a>(
    bench: &'a Bench,
    live: &'a str,
    journal: &'a Journal,
    valid: Valid,
    ended: Instant,
) -> impl Future<Output = ()> + 'a {
    let caller = std::panic::Location::caller();
    async move {
        let (wanted, allowed) = journal.expected_after_cutover(valid, ended);
        let report = difference(&bytes(bench, live).await, &wanted, &allowed, journal);
        assert!(report.is_empty(), "{live} differs from the journal ({caller}):\n{report}");
    }
}

/// The live collection after a cutover that was taken back; `stays_away` are documents of which the
/// rollback has told that they are not back.
#[track_caller]
pub fn expect_live_after_rollback<'a>(
    bench: &'a Bench,
    live: &'a str,
    journal: &'a Journal,
    stays_away: &'a [Bson],
) -> impl Future<Output = ()> + 'a {
    let caller = std::panic::Location::caller();
    async move {
        let found = bytes(bench, live).await;
        let away: Vec<Vec<u8>> = stays_away.iter().map(id_key).collect();
        let possible = journal.possible_after_rollback();
        // Where several are possible, the one that is there is the right one.
        let mut expected = Bytes::new();
        for (key, possible) in &possible {
            let there = found.get(key).cloned();
            let is_right = possible.contains(&there) || there.is_none() && away.contains(key);
            let wanted = if is_right { there } else { possible.iter().flatten().next().cloned() };
            expected.extend(wanted.map(|wanted| (key.clone(), wanted)));
        }
        let report = difference(&found, &expected, &Bytes::new(), journal);
        assert!(report.is_empty(), "{live} differs from the journal ({caller}):\n{report}");
    }
}

/// What is wrong, for people; empty where nothing is.
fn difference(found: &Bytes, expected: &Bytes, allowed: &Bytes, journal: &Journal) -> String {
    let missing = expected.keys().filter(|key| !found.contains_key(*key));
    let extra = found.iter().filter(|(key, bytes)| {
        !expected.contains_key(*key) && allowed.get(*key).is_none_or(|other| other != *bytes)
    });
    let different =
        expected.iter().filter(|(key, bytes)| found.get(*key).is_some_and(|other| other != *bytes));
    let lists: [(&str, Vec<&Vec<u8>>); 3] = [
        ("missing", missing.collect()),
        ("extra", extra.map(|(key, _)| key).collect()),
        ("different", different.map(|(key, _)| key).collect()),
    ];
    let mut report = String::new();
    for (name, keys) in lists.iter().filter(|(_, keys)| !keys.is_empty()) {
        report += &format!("{} {name} (of {})\n", keys.len(), expected.len());
        for key in keys.iter().take(SHOWN) {
            let show = |side: &Bytes| side.get(*key).map_or("nothing".into(), |bytes| readable(bytes));
            report += &format!(
                "  found {}\n  expected {}\n  journal of {}\n",
                show(found),
                show(expected),
                journal.history(key)
            );
        }
    }
    report
}

fn readable(bytes: &[u8]) -> String {
    bson::deserialize_from_slice::<Document>(bytes)
        .map_or_else(|error| error.to_string(), |document| document.to_string())
}

fn to_bytes(document: &Document) -> Vec<u8> {
    RawDocumentBuf::try_from(document).expect("valid BSON").into_bytes()
}

fn id_key(id: &Bson) -> Vec<u8> {
    to_bytes(&doc! {"": id})
}

/// After a rollback what was away is there again, and what was deleted is not.
#[test]
fn what_may_be_there_after_a_rollback_is_known() {
    let valid: Valid = |document| document.get_bool("valid").expect("true or false");
    let id = super::operation::identity(1);
    let document = |version| super::operation::document(&id, version, "s", false);
    let (mut journal, now) = (Journal::new(Cutover::AndRollback(valid)), Instant::now());
    let possible =
        |journal: &Journal| journal.possible_after_rollback().remove(&id_key(&id)).expect("an entry");
    journal.acknowledged(&id, &Change::Insert(document(5)), Answer::Inserted, now);
    assert_eq!(possible(&journal), [Some(to_bytes(&document(5)))]);
    journal.acknowledged(&id, &Change::Toggle, Answer::Nothing, now);
    assert_eq!(possible(&journal), [Some(to_bytes(&document(5)))], "it was away");
    journal.unknown(&id, &Change::Delete, "no answer");
    assert_eq!(possible(&journal), [None, Some(to_bytes(&document(5)))]);
    journal.acknowledged(&id, &Change::Insert(document(6)), Answer::Inserted, now);
    journal.acknowledged(&id, &Change::Delete, Answer::Matched, now);
    assert_eq!(possible(&journal), [None], "written anew and deleted");
}

/// An invalid document that is gone after a cutover is no lost write; that it is back is one thing
/// after a rollback and another one without.
#[test]
fn what_a_cutover_took_away_comes_back_by_a_rollback_only() {
    let valid: Valid = |document| document.get_bool("valid").expect("true or false");
    let id = super::operation::identity(1);
    let insert = |valid| Change::Insert(super::operation::document(&id, 5, "s", valid));
    let rounds =
        [(Cutover::None, [1, 2]), (Cutover::Once(valid), [0, 1]), (Cutover::AndRollback(valid), [0, 0])];
    for (cutover, contradictions) in rounds {
        let (mut journal, now) = (Journal::new(cutover), Instant::now());
        journal.acknowledged(&id, &insert(false), Answer::Inserted, now);
        assert_eq!(journal.predicted(&id, &Change::Toggle).is_some(), matches!(cutover, Cutover::None));
        journal.acknowledged(&id, &Change::Toggle, Answer::Nothing, now);
        assert_eq!(journal.contradictions.len(), contradictions[0], "{cutover:?}");
        journal.acknowledged(&id, &insert(true), Answer::Duplicate, now);
        assert_eq!(journal.contradictions.len(), contradictions[1], "{cutover:?}");
    }
    // A valid one never vanishes, and one of unknown outcome is either.
    let (mut journal, now) = (Journal::new(Cutover::AndRollback(valid)), Instant::now());
    journal.unknown(&id, &insert(true), "an election");
    assert_eq!(journal.predicted(&id, &Change::Delete), None);
    journal.read(&id, None);
    assert_eq!(journal.predicted(&id, &Change::Delete), Some(Answer::Nothing));
    journal.acknowledged(&id, &insert(true), Answer::Inserted, now);
    journal.read(&id, None);
    assert_eq!(journal.contradictions.len(), 1);
}
