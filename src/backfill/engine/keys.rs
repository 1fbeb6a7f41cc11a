//! The keys that a run is concerned with now: one call for each, whatever the
//! number of documents that wait for it.

use std::collections::HashMap;

use crate::key_api::retry::Attempts;
use crate::key_map::Answer;
use crate::mongo::source::Candidate;

/// Why a key has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// The outcome's name, as counted.
    pub(super) reason: &'static str,
    /// The same for people.
    pub(super) description: String,
}

/// A key without an answer yet.
#[derive(Debug, Default)]
pub(super) struct Asking {
    /// Documents that wait for the answer.
    pub(super) waiting: Vec<Candidate>,
    /// Attempts made so far.
    pub(super) attempts: Attempts,
    /// How the last attempt ended; `None` where none was made.
    pub(super) failure: Option<Failure>,
}

/// A key that was asked for, until its answer is durable.
#[derive(Debug)]
enum State {
    /// It waits for its call, or the call is under way.
    Asking(Asking),
    /// The answer is known, but may not be in the key map yet.
    Answered(Answer),
}

/// All keys of the moment.
#[derive(Debug, Default)]
pub(super) struct Keys {
    states: HashMap<String, State>,
    waiting: usize,
}

impl Keys {
    /// Documents that wait for an answer.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Lets documents share what is known of their key; gives them back where
    /// nothing is.
    pub(super) fn join(&mut self, key: &str, candidates: Vec<Candidate>) -> Joined {
        match self.states.get_mut(key) {
            Some(State::Asking(asking)) => {
                self.waiting += candidates.len();
                asking.waiting.extend(candidates);
                Joined::Waiting
            }
            Some(State::Answered(answer)) => Joined::Answered(answer.clone(), candidates),
            None => Joined::Unknown(candidates),
        }
    }

    /// Begins to ask for a key.
    pub(super) fn begin(&mut self, key: &str, waiting: Vec<Candidate>, attempts: Attempts) {
        self.waiting += waiting.len();
        let asking = Asking { waiting, attempts, failure: None };
        self.states.insert(key.into(), State::Asking(asking));
    }

    /// A key without an answer yet.
    pub(super) fn asking(&mut self, key: &str) -> Option<&mut Asking> {
        match self.states.get_mut(key) {
            Some(State::Asking(asking)) => Some(asking),
            _ => None,
        }
    }

    /// Whether a key was tried before.
    pub(super) fn was_tried(&self, key: &str) -> bool {
        matches!(self.states.get(key), Some(State::Asking(Asking { failure: Some(_), .. })))
    }

    /// Takes the waiting documents away for a moment; [`Keys::put_back`] ends it.
    pub(super) fn borrow_waiting(&mut self, key: &str) -> Vec<Candidate> {
        let waiting = self.asking(key).map(|asking| std::mem::take(&mut asking.waiting)).unwrap_or_default();
        self.waiting -= waiting.len();
        waiting
    }

    /// Gives documents back to their key; without any the key is dropped.
    /// Whether it still is asked for.
    pub(super) fn put_back(&mut self, key: &str, waiting: Vec<Candidate>) -> bool {
        if waiting.is_empty() {
            self.give_up(key);
            return false;
        }
        match self.states.get_mut(key) {
            Some(State::Asking(asking)) => {
                self.waiting += waiting.len();
                asking.waiting.extend(waiting);
                true
            }
            _ => false,
        }
    }

    /// Stops asking for a key.
    pub(super) fn give_up(&mut self, key: &str) -> Option<Asking> {
        match self.states.remove(key) {
            Some(State::Asking(asking)) => {
                self.waiting -= asking.waiting.len();
                Some(asking)
            }
            _ => None,
        }
    }

    /// The answer came; returns the documents that waited for it.
    pub(super) fn answered(&mut self, key: &str, answer: Answer) -> Vec<Candidate> {
        let waiting = self.give_up(key).map(|asking| asking.waiting).unwrap_or_default();
        self.states.insert(key.into(), State::Answered(answer));
        waiting
    }

    /// The answer of a key that is on its way to the key map.
    pub(super) fn answer(&self, key: &str) -> Option<Answer> {
        match self.states.get(key) {
            Some(State::Answered(answer)) => Some(answer.clone()),
            _ => None,
        }
    }

    /// Whether something holds for every key of the moment.
    pub(super) fn all(&self, holds: impl Fn(&str) -> bool) -> bool {
        self.states.keys().all(|key| holds(key))
    }

    /// The answer is durable: the key map knows it from here on.
    pub(super) fn forget(&mut self, key: &str) {
        self.give_up(key);
    }
}

/// What became of documents that met a key of the moment.
#[derive(Debug)]
pub(super) enum Joined {
    /// They wait with the others.
    Waiting,
    /// Here is the answer.
    Answered(Answer, Vec<Candidate>),
    /// The key is none of the moment.
    Unknown(Vec<Candidate>),
}
