//! What the server has, and what it does when a command arrives.

use super::{Mechanisms, Method};

/// The number of an attempt at an exchange; 0 is none.
pub type Attempt = u8;

/// Where the collection is that takes the live name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Incoming {
    /// It has the name that the operator knows.
    Own,
    /// It has the name of this attempt.
    Working(Attempt),
    /// It is live.
    Live,
}

/// Where the collection is that had the live name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Former {
    /// It is live.
    Live,
    /// It was dropped.
    Dropped,
}

/// What the job says of the exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Record {
    /// Whose it is.
    pub attempt: Attempt,
    /// Whether it says that there may be a fence.
    pub is_open: bool,
    /// The highest claim; 0 is none.
    pub claim: u8,
    /// Whether it tells since when writes are refused, which is stored when all before that is brought along.
    pub has_moment: bool,
    /// Whether the exchange is finished.
    pub is_finished: bool,
}

/// A command on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Command {
    /// The record of an attempt, by the holder of the job of that fence.
    SaveRecord(Attempt, u8),
    /// Nothing but the question whether the attempt is still its beginner's.
    AskRight(Attempt, u8),
    /// Everything up to that position is brought along.
    SaveRenaming(Attempt, u8, u8),
    /// The recovery of an attempt.
    Claim(Attempt),
    /// The end of an exchange, by who has that claim; whether names were exchanged.
    Close(Attempt, u8, bool),
    /// The name of an attempt for the collection that has its own name.
    TakeName(Attempt),
    /// Its own name for the collection that has that of an attempt.
    TakeAway(Attempt),
    /// A fence around the incoming collection, under that name.
    FenceIncoming(Attempt),
    /// A fence around the live collection.
    FenceLive(Attempt),
    /// The exchange of names.
    Exchange(Attempt),
    /// What the incoming collection refused before, under that name.
    LiftIncoming(Attempt, Incoming),
    /// What the former collection refused before.
    LiftFormer(Attempt),
    /// The guard without which the fence can't be raised goes.
    DropFenceGuard(Attempt),
    /// The guard without which the fence can't be lifted goes.
    DropLiftGuard(Attempt),
    /// Both guards.
    MakeGuards(Attempt),
    /// A state of the document for the incoming collection under the name of that attempt.
    Follow(u8, Attempt),
    /// The delete of the last moment, as of the moment of the exchange.
    DeleteOfMoment,
}

/// What the server has. There is one document, whose states are numbered in the order in which the
/// application writes them; 0 is a document that is not there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Server {
    /// Of the job.
    pub number: u8,
    /// Up to where changes are brought along.
    pub position: u8,
    /// Of the latest exchange.
    pub record: Option<Record>,
    /// Where the incoming collection is.
    pub incoming: Incoming,
    /// Where the former one is.
    pub former: Former,
    /// Whose fence each of them has.
    pub incoming_fence: Attempt,
    /// See `incoming_fence`.
    pub former_fence: Attempt,
    /// Attempts whose guard for the fence is there, one bit each.
    pub fence_guards: u8,
    /// The same for lifting.
    pub lift_guards: u8,
    /// The document in each of them.
    pub old: u8,
    /// See `old`.
    pub new: u8,
    /// Whether the application has written to the incoming collection.
    pub is_newer: bool,
    /// The document as the application knows it.
    pub truth: u8,
    /// The changes of the former collection: one bit each, set where it is no delete.
    pub changes: u8,
    /// How many there are.
    pub change_count: u8,
    /// What must not have happened.
    pub wrong: Option<&'static str>,
}

impl Server {
    /// A verified copy.
    pub fn with_a_copy() -> Self {
        Self {
            number: 0,
            position: 0,
            record: None,
            incoming: Incoming::Own,
            former: Former::Live,
            incoming_fence: 0,
            former_fence: 0,
            fence_guards: 0,
            lift_guards: 0,
            old: 1,
            new: 1,
            is_newer: false,
            truth: 1,
            changes: 0,
            change_count: 0,
            wrong: None,
        }
    }

    /// Whether the application may write.
    pub fn is_open(&self) -> bool {
        match self.incoming {
            Incoming::Live => self.incoming_fence == 0,
            _ => self.former_fence == 0,
        }
    }

    /// A write of the application: 0 is a delete, which no validator refuses.
    pub fn write(&mut self, version: u8) {
        if version != 0 && !self.is_open() {
            return;
        }
        if self.incoming == Incoming::Live && self.is_open() && self.new != self.truth {
            self.wrong = Some("the application met a document that it had deleted");
        }
        self.truth = version;
        if self.incoming == Incoming::Live {
            self.new = version;
            self.is_newer = true;
        } else {
            self.old = version;
            self.changes |= u8::from(version != 0) << self.change_count;
            self.change_count += 1;
        }
    }

    /// Carries out a command; returns whether it was accepted.
    pub fn apply(&mut self, command: Command, mechanisms: &Mechanisms, method: Method) -> bool {
        match command {
            Command::TakeName(attempt) => self.rename(Incoming::Own, Incoming::Working(attempt)),
            Command::TakeAway(attempt) => self.rename(Incoming::Working(attempt), Incoming::Own),
            Command::Exchange(attempt) => self.exchange(attempt, mechanisms, method),
            Command::Follow(state, attempt) => {
                let is_there = self.incoming == working(mechanisms, attempt);
                self.new = if is_there { state } else { self.new };
                is_there
            }
            Command::DeleteOfMoment => {
                if !self.is_newer || !mechanisms.giving_way {
                    self.new = 0;
                }
                true
            }
            Command::SaveRecord(..)
            | Command::AskRight(..)
            | Command::SaveRenaming(..)
            | Command::Claim(_)
            | Command::Close(..) => self.store(command, mechanisms),
            _ => self.fence(command, mechanisms),
        }
    }

    /// What is stored about the job.
    fn store(&mut self, command: Command, mechanisms: &Mechanisms) -> bool {
        match command {
            Command::SaveRecord(attempt, fence) => {
                let is_known = self.record.is_some_and(|record| record.attempt >= attempt);
                if self.number != fence || (mechanisms.records_stored_once && is_known) {
                    return false;
                }
                let record =
                    Record { attempt, is_open: true, claim: 0, has_moment: false, is_finished: false };
                self.record = Some(record);
                true
            }
            Command::AskRight(attempt, fence) => self.is_beginners(attempt, fence, mechanisms),
            Command::SaveRenaming(attempt, fence, position) => {
                let may = self.is_beginners(attempt, fence, mechanisms);
                if let Some(record) = self.record.as_mut().filter(|_| may) {
                    record.has_moment = true;
                    record.is_finished = false;
                    self.position = position;
                }
                may
            }
            Command::Claim(attempt) => match &mut self.record {
                Some(record) if record.attempt == attempt && record.is_open => {
                    record.claim += 1;
                    true
                }
                _ => false,
            },
            Command::Close(attempt, claim, is_finished) => match &mut self.record {
                Some(record)
                    if record.attempt == attempt && (record.claim == claim || !mechanisms.claim_in_close) =>
                {
                    record.is_open = false;
                    record.is_finished = is_finished;
                    true
                }
                _ => false,
            },
            _ => false,
        }
    }

    /// What changes validators and guards.
    fn fence(&mut self, command: Command, mechanisms: &Mechanisms) -> bool {
        match command {
            Command::FenceIncoming(attempt) => {
                let is_there = self.incoming == working(mechanisms, attempt)
                    && (!mechanisms.guards || has(self.fence_guards, attempt));
                if is_there {
                    self.incoming_fence = attempt;
                }
                is_there
            }
            Command::FenceLive(attempt) => {
                let may =
                    self.former == Former::Live && (!mechanisms.guards || has(self.fence_guards, attempt));
                if may {
                    self.former_fence = attempt;
                }
                may
            }
            Command::LiftIncoming(attempt, name) => {
                let may = self.incoming == name && (!mechanisms.guards || has(self.lift_guards, attempt));
                self.incoming_fence = if may { 0 } else { self.incoming_fence };
                may
            }
            Command::LiftFormer(attempt) => {
                let may = !mechanisms.guards || has(self.lift_guards, attempt);
                self.former_fence = if may { 0 } else { self.former_fence };
                may
            }
            Command::DropFenceGuard(attempt) => {
                self.fence_guards &= !bit(attempt);
                true
            }
            Command::DropLiftGuard(attempt) => {
                self.lift_guards &= !bit(attempt);
                true
            }
            Command::MakeGuards(attempt) => {
                self.fence_guards |= bit(attempt);
                self.lift_guards |= bit(attempt);
                true
            }
            _ => false,
        }
    }

    fn is_beginners(&self, attempt: Attempt, fence: u8, mechanisms: &Mechanisms) -> bool {
        self.number == fence
            && self.record.is_some_and(|record| {
                record.attempt == attempt
                    && (record.claim == 0 || !mechanisms.claim_in_saves)
                    && (record.is_open || !mechanisms.open_in_saves)
            })
    }

    fn rename(&mut self, from: Incoming, to: Incoming) -> bool {
        let is_there = self.incoming == from;
        self.incoming = if is_there { to } else { self.incoming };
        is_there
    }

    fn exchange(&mut self, attempt: Attempt, mechanisms: &Mechanisms, method: Method) -> bool {
        let Method::Swap = method;
        if self.incoming != working(mechanisms, attempt) || self.former != Former::Live {
            return false;
        }
        if self.former_fence != attempt && mechanisms.fence {
            self.wrong = Some("names were exchanged while the live collection took writes");
        }
        self.incoming = Incoming::Live;
        self.former = Former::Dropped;
        self.former_fence = 0;
        true
    }
}

/// The name of the incoming collection during an attempt.
pub fn working(mechanisms: &Mechanisms, attempt: Attempt) -> Incoming {
    if mechanisms.working_name { Incoming::Working(attempt) } else { Incoming::Own }
}

fn bit(attempt: Attempt) -> u8 {
    1 << attempt
}

/// Whether a guard of that attempt is there.
pub fn has(guards: u8, attempt: Attempt) -> bool {
    guards & bit(attempt) != 0
}
