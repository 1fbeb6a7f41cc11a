//! A job that is taken over while its holder writes: transactions behind a lane.
//!
//! Two holders, one after the other, bring one document of a source to a target, as its feed tells of its
//! changes. What they send arrives late, twice or not at all, and is then sent again.

pub mod server;
#[cfg(test)]
mod tests;

use crate::explore::Model;
use server::{Command, Reply, Server};

/// Transactions of one holder.
const MOST_TRANSACTIONS: u8 = 4;

/// What keeps a target right while a job changes hands, each to be switched off.
#[derive(Debug, Clone, Copy)]
pub struct Mechanisms {
    /// Who takes the job over raises its number.
    pub number: bool,
    /// And raises the lanes before anything is read.
    pub raising: bool,
    /// Lanes are never lowered.
    pub only_upwards: bool,
    /// The lane is compared in the transaction that writes.
    pub gate: bool,
    /// A lane is opened where the job still has the number of its holder.
    pub opening: bool,
    /// A position is stored where the job still has that number.
    pub saving: bool,
    /// A position is stored after what it stands for was committed.
    pub saving_last: bool,
    /// Who takes over ends what is open; the server does so after a minute anyway.
    pub ending: bool,
}

impl Mechanisms {
    /// As the program is today.
    pub const TODAY: Self = Self {
        number: true,
        raising: true,
        only_upwards: true,
        gate: true,
        opening: true,
        saving: true,
        saving_last: true,
        ending: true,
    };
}

/// What is explored.
#[derive(Debug, Clone, Copy)]
pub struct Takeover {
    /// What is switched on.
    pub mechanisms: Mechanisms,
    /// How many answers are lost, and commands late.
    pub faults: u8,
    /// How often the application writes.
    pub writes: u8,
    /// Whether the second holder begins anew.
    pub is_restarted: bool,
}

/// What a holder does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum At {
    /// Takes the job.
    Take,
    /// Raises the lanes.
    Raise,
    /// Opens its lane.
    Open,
    /// Begins anew: empties the target and forgets the position.
    Empty,
    /// Reads what has changed.
    Read,
    /// Looks at the lane, where the transaction does not.
    Ask,
    /// Begins a transaction.
    Begin,
    /// Writes.
    Write,
    /// Commits.
    Commit,
    /// Stores its position.
    Save,
    /// Nothing any more.
    Done,
}

/// A holder of the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Holder {
    at: At,
    epoch: u8,
    position: u8,
    read: u8,
    /// Of its latest transaction.
    number: u8,
}

/// Everything there is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    server: Server,
    late: Vec<Command>,
    holders: [Holder; 2],
    faults: u8,
}

/// What may happen.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// The application writes.
    Write,
    /// A command arrives that was on its way.
    Arrives(Command),
    /// The server gives an open transaction up.
    Expires(usize),
    /// A holder goes on from there.
    Goes(usize, At),
    /// The same, but the answer to its command is lost.
    Unanswered(usize, Command),
    /// The same, but its command stays on its way.
    Late(usize, Command),
    /// The same, and its command arrives once more later.
    Twice(usize, Command),
}

impl Model for Takeover {
    type State = State;
    type Step = Step;

    fn initial(&self) -> State {
        let holder = Holder { at: At::Take, epoch: 0, position: 0, read: 0, number: 0 };
        State { server: Server::with_a_job(), late: Vec::new(), holders: [holder; 2], faults: self.faults }
    }

    fn steps(&self, state: &State, next: &mut Vec<(Step, State)>) {
        if state.server.source < self.writes {
            let mut after = state.clone();
            after.server.source += 1;
            next.push((Step::Write, after));
        }
        for (index, command) in state.late.iter().enumerate() {
            let mut after = state.clone();
            after.late.remove(index);
            // What waits for a lock has not arrived.
            if after.server.apply(*command, &self.mechanisms) != Reply::Waits {
                next.push((Step::Arrives(*command), after));
            }
        }
        for index in 0..state.holders.len() {
            if state.server.is_open(index) {
                let mut after = state.clone();
                after.server.end(index);
                next.push((Step::Expires(index), after));
            }
            self.holder(state, index, next);
        }
    }

    /// Holders may be dead in any state, and what was on its way has arrived: then whoever comes next goes on
    /// from the stored position, and must come to what the source holds.
    fn wrong(&self, state: &State) -> Option<&'static str> {
        let server = &state.server;
        if server.wrong.is_some() || !state.late.is_empty() {
            return server.wrong;
        }
        let is_unseen = server.source == server.position && server.target != server.source;
        is_unseen.then_some("a change is missing that nobody will look at again")
    }

    fn wrong_at_end(&self, _: &State) -> Option<&'static str> {
        None
    }
}

/// What a step does.
type Does<'a> = &'a dyn Fn(&mut Server, &mut Holder);

impl Takeover {
    fn holder(&self, state: &State, index: usize, next: &mut Vec<(Step, State)>) {
        let Some(holder) = state.holders.get(index).copied() else { return };
        let Holder { epoch, position, read, number, .. } = holder;
        let go = |next: &mut Vec<(Step, State)>, does: Does<'_>| {
            let mut after = state.clone();
            if let Some(holder) = after.holders.get_mut(index) {
                does(&mut after.server, holder);
            }
            next.push((Step::Goes(index, holder.at), after));
        };
        let mechanisms = self.mechanisms;
        match holder.at {
            // The second one comes when the lease of the first has run out, which may be at any time.
            At::Take if index == 1 && state.server.number == 0 => {}
            At::Take => go(next, &|server: &mut Server, holder: &mut Holder| {
                server.number += u8::from(mechanisms.number || index == 0);
                holder.epoch = server.number;
                holder.position = server.position;
                holder.at = if mechanisms.raising { At::Raise } else { At::Open };
            }),
            At::Raise if mechanisms.ending && state.server.is_open(1 - index) => {
                go(next, &|server: &mut Server, _: &mut Holder| server.end(1 - index));
            }
            At::Raise => self.send(state, index, Command::Raise(epoch), next),
            At::Open => self.send(state, index, Command::Open(index, epoch), next),
            At::Empty => go(next, &|server: &mut Server, holder: &mut Holder| {
                holder.at = if server.number == epoch { At::Read } else { At::Done };
                if server.number == epoch {
                    (server.target, server.position, holder.position) = (0, 0, 0);
                }
            }),
            At::Read if state.server.source == position => {}
            At::Read => go(next, &|server: &mut Server, holder: &mut Holder| {
                holder.read = server.source;
                holder.number += 1;
                holder.at = match mechanisms {
                    Mechanisms { saving_last: false, .. } => At::Save,
                    Mechanisms { gate: false, .. } => At::Ask,
                    _ => At::Begin,
                };
            }),
            At::Ask => go(next, &|server: &mut Server, holder: &mut Holder| {
                holder.at = if server.lanes.get(index) == Some(&Some(epoch)) { At::Begin } else { At::Done };
            }),
            // One that is ended again and again stands still at last.
            At::Begin if number > MOST_TRANSACTIONS => {}
            At::Begin => self.send(state, index, Command::Begin(index, number, epoch), next),
            At::Write => self.send(state, index, Command::Write(index, number, read), next),
            At::Commit => self.send(state, index, Command::Commit(index, number), next),
            At::Save => self.send(state, index, Command::Save(epoch, read), next),
            At::Done => {}
        }
    }

    fn send(&self, state: &State, index: usize, command: Command, next: &mut Vec<(Step, State)>) {
        let mut after = state.clone();
        let reply = after.server.apply(command, &self.mechanisms);
        if reply == Reply::Waits {
            return;
        }
        let unanswered = |after: &mut State| {
            after.faults -= 1;
            if let Some(holder) = after.holders.get_mut(index) {
                holder.is_unanswered();
            }
        };
        if state.faults > 0 {
            let mut lost = after.clone();
            unanswered(&mut lost);
            next.push((Step::Unanswered(index, command), lost));
            let mut late = state.clone();
            late.late.push(command);
            late.late.sort_unstable();
            unanswered(&mut late);
            next.push((Step::Late(index, command), late));
        }
        let at = state.holders.get(index).map_or(At::Done, |holder| holder.at);
        if let Some(holder) = after.holders.get_mut(index) {
            holder.is_answered(reply, &self.mechanisms);
            if self.is_restarted && index == 1 && at == At::Open && holder.at == At::Read {
                holder.at = At::Empty;
            }
        }
        if state.faults > 0 {
            let mut twice = after.clone();
            twice.faults -= 1;
            twice.late.push(command);
            twice.late.sort_unstable();
            next.push((Step::Twice(index, command), twice));
        }
        next.push((Step::Goes(index, at), after));
    }
}

impl Holder {
    fn is_answered(&mut self, reply: Reply, mechanisms: &Mechanisms) {
        self.at = match (self.at, reply) {
            (_, Reply::Overtaken) => At::Done,
            (At::Begin | At::Write | At::Commit, Reply::GivenUp | Reply::Waits) => {
                self.number += 1;
                if mechanisms.gate { At::Begin } else { At::Ask }
            }
            (At::Raise, _) => At::Open,
            (At::Open, _) => At::Read,
            (At::Begin, _) => At::Write,
            (At::Write, _) => At::Commit,
            (At::Commit, _) if mechanisms.saving_last => At::Save,
            (At::Save, _) if !mechanisms.saving_last => {
                if mechanisms.gate {
                    At::Begin
                } else {
                    At::Ask
                }
            }
            (At::Commit | At::Save, _) => {
                self.position = self.read;
                At::Read
            }
            (at, _) => at,
        };
    }

    /// It begins the transaction anew, but for a commit, which is sent again under its number.
    fn is_unanswered(&mut self) {
        if let At::Begin | At::Write = self.at {
            self.number += 1;
            self.at = At::Begin;
        }
    }
}
