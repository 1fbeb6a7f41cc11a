//! An exchange of names: two commands that begin one (the first makes two attempts), whoever recovers,
//! and an application that writes.

pub mod process;
pub mod server;
#[cfg(test)]
mod swap;
mod turn;

use std::cell::RefCell;
use std::collections::HashMap;

use crate::explore::Model;
use process::{Process, Step};
use server::{Command, Incoming, Server};

/// Two commands, and one that only recovers.
const PROCESSES: usize = 3;

/// How names are exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// One rename, which drops the former collection.
    Swap,
}

/// What keeps an exchange from losing anything, each to be switched off.
#[derive(Debug, Clone, Copy)]
pub struct Mechanisms {
    /// The live collection refuses writes while the last ones are brought along and names are exchanged.
    pub fence: bool,
    /// The incoming collection refuses writes until the last deletes are brought along.
    pub fence_incoming: bool,
    /// What was written before the fence is brought along before names are exchanged.
    pub reaching: bool,
    /// The incoming collection has a name of the attempt.
    pub working_name: bool,
    /// It is asked for that name once, not until it has it.
    pub name_sent_once: bool,
    /// What a beginner stores asks whether somebody has claimed the exchange.
    pub claim_in_saves: bool,
    /// It asks whether the exchange is still open, too.
    pub open_in_saves: bool,
    /// A record is stored once, however often it arrives.
    pub records_stored_once: bool,
    /// Who closes an exchange must have the latest claim.
    pub claim_in_close: bool,
    /// The exchange is made impossible before writes are let through.
    pub forbidding_first: bool,
    /// A fence is lifted only where it is that of the attempt.
    pub tag: bool,
    /// Deletes of the last moment give way to anything newer.
    pub giving_way: bool,
    /// Up to where everything is brought along is stored before names are exchanged.
    pub position: bool,
    /// Without guards, which the beginner makes, no fence can be raised or lifted.
    pub guards: bool,
    /// The guard for the fence goes before writes are let through.
    pub guard_before_lift: bool,
    /// Who recovers makes a guard that is missing.
    pub recoverer_makes_guards: bool,
}

impl Mechanisms {
    /// As the program is today.
    pub const TODAY: Self = Self {
        fence: true,
        fence_incoming: true,
        reaching: true,
        working_name: true,
        name_sent_once: true,
        claim_in_saves: true,
        open_in_saves: true,
        records_stored_once: true,
        claim_in_close: true,
        forbidding_first: true,
        tag: true,
        giving_way: true,
        position: true,
        guards: false,
        guard_before_lift: true,
        recoverer_makes_guards: false,
    };
}

/// Which commands may be on their way for long. Those that may not are carried out, together with the
/// look that comes before them, or are lost.
#[derive(Debug, Clone, Copy)]
pub struct Late {
    /// Those that raise and lift a fence.
    pub fences: bool,
    /// Those that store something about the job.
    pub saves: bool,
}

/// What is explored.
#[derive(Debug, Clone, Copy)]
pub struct Exchange {
    /// How names are exchanged.
    pub method: Method,
    /// What is switched on.
    pub mechanisms: Mechanisms,
    /// What may be late.
    pub late: Late,
    /// Attempts of the first and of the second command; 0 is a command that is not started.
    pub attempts: [u8; 2],
    /// How many answers are lost, and commands late.
    pub faults: u8,
    /// How often the application writes.
    pub writes: u8,
    /// Whether a fence that stays is an outage and no more: then losses are looked for behind it.
    pub tolerates_fences: bool,
}

/// Everything there is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    /// The server.
    pub server: Server,
    /// What is on its way, in no order.
    pub late: Vec<Command>,
    /// The commands that begin an exchange, and who recovers.
    pub processes: [Process; PROCESSES],
    /// Faults that are left.
    pub faults: u8,
    /// Writes that were made.
    pub written: u8,
}

/// What is explored, and what became of states that were judged before.
#[derive(Debug)]
pub struct Exploration {
    exchange: Exchange,
    judged: RefCell<HashMap<Server, Option<&'static str>>>,
}

impl Exploration {
    /// Nothing was explored yet.
    pub fn of(exchange: Exchange) -> Self {
        Self { exchange, judged: RefCell::default() }
    }
}

impl Model for Exploration {
    type State = State;
    type Step = Step;

    fn initial(&self) -> State {
        let exchange = self.exchange;
        let [first, second] = exchange.attempts;
        State {
            server: Server::with_a_copy(),
            late: Vec::new(),
            processes: [
                Process::command(1, first),
                Process::command(1 + first, second),
                Process::recoverer(),
            ],
            faults: exchange.faults,
            written: 0,
        }
    }

    fn steps(&self, state: &State, next: &mut Vec<(Step, State)>) {
        if state.written < self.exchange.writes {
            for version in [state.written + 2, 0] {
                let mut after = state.clone();
                after.written += 1;
                after.server.write(version);
                next.push((Step::Write(version), after));
            }
        }
        for (index, command) in state.late.iter().enumerate() {
            let mut after = state.clone();
            after.late.remove(index);
            after.server.apply(*command, &self.exchange.mechanisms, self.exchange.method);
            next.push((Step::Arrives(*command), after));
        }
        for index in 0..state.processes.len() {
            self.exchange.process(state, index, next);
        }
    }

    /// A process that dies is one that takes no further step. So all of them may be dead in any state,
    /// and what was on its way has arrived: then all must be right after a recovery.
    fn wrong(&self, state: &State) -> Option<&'static str> {
        if state.server.wrong.is_some() || !state.late.is_empty() {
            return state.server.wrong;
        }
        let mut judged = self.judged.borrow_mut();
        *judged
            .entry(state.server.clone())
            .or_insert_with(|| self.exchange.judge(&self.exchange.recovered(state)))
    }

    fn wrong_at_end(&self, _: &State) -> Option<&'static str> {
        None
    }
}

impl Exchange {
    /// What must not be so once everything is over.
    fn judge(&self, server: &Server) -> Option<&'static str> {
        let live = if server.incoming == Incoming::Live { server.new } else { server.old };
        let is_fenced = server.incoming_fence != 0 || server.former_fence != 0;
        let is_fenced = is_fenced && !self.tolerates_fences;
        let is_open = server.record.is_some_and(|record| record.is_open);
        let says_finished = server.record.is_some_and(|record| record.is_finished);
        let wrong = [
            (live != server.truth, "a write that was acknowledged is not live"),
            (is_fenced, "a fence stays"),
            (is_open, "the record of an exchange stays open"),
            (matches!(server.incoming, Incoming::Working(_)), "the copy keeps the name of an attempt"),
            (says_finished != (server.incoming == Incoming::Live), "the record does not say what happened"),
        ];
        wrong.into_iter().find_map(|(is_wrong, what)| is_wrong.then_some(what))
    }

    /// As the next command leaves it that nothing disturbs, once all others are gone and everything has
    /// arrived.
    fn recovered(&self, state: &State) -> Server {
        let calm = Self { faults: 0, ..*self };
        let mut state = State {
            faults: 0,
            processes: [Process::recoverer(), Process::command(0, 0), Process::command(0, 0)],
            ..state.clone()
        };
        let mut next = Vec::new();
        loop {
            calm.process(&state, 0, &mut next);
            // The first way is the one on which nothing goes wrong.
            let Some((_, after)) = next.drain(..).next() else { break };
            if after == state {
                break;
            }
            state = after;
        }
        if state.server.record.is_none_or(|record| !record.is_finished)
            && let Incoming::Working(_) = state.server.incoming
        {
            state.server.incoming = Incoming::Own;
        }
        state.server
    }
}
