//! What the processes do.

use super::Mechanisms;
use super::server::{Attempt, Command};

/// What may happen.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// The application writes that state of the document; 0 is a delete.
    Write(u8),
    /// A command arrives that was on its way.
    Arrives(Command),
    /// A process goes on from there.
    Goes(usize, At),
    /// It gives its attempt up: the pause was too long.
    GivesUp(usize, At),
    /// The same, but the answer to its command is lost.
    Unanswered(usize, At, Command),
    /// The same, but its command stays on its way.
    Late(usize, At, Command),
}

/// What a process does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum At {
    /// Nothing yet.
    Idle,
    /// Ends what an earlier process has left.
    Earlier,
    /// Makes the guards of its attempt.
    Guards,
    /// Stores its record.
    Record,
    /// Asks whether the attempt is still its own, before it takes the name of the attempt.
    Right,
    /// Takes the name of the attempt.
    Name,
    /// Looks whether it has it.
    NameSeen,
    /// Fences the incoming collection.
    Incoming,
    /// Asks whether the attempt is still its own, before it fences.
    RightAgain,
    /// Fences the live collection.
    Fence,
    /// Reads what is to be brought along.
    Read,
    /// Writes it.
    Write,
    /// Stores that everything is brought along.
    Renaming,
    /// Exchanges names.
    Exchange,
    /// Looks what became of that.
    Outcome,
    /// Claims the recovery.
    Claim,
    /// Makes the exchange impossible.
    Forbid,
    /// Looks what happened.
    Look,
    /// Brings along what came at the last moment.
    Bring,
    /// Drops the guard for the fence.
    FenceGuard,
    /// Lifts the fence of the incoming collection.
    LiftIncoming,
    /// Sends that.
    SendLiftIncoming,
    /// Lifts the fence of the former collection.
    LiftFormer,
    /// Sends that.
    SendLiftFormer,
    /// Drops the guard for lifting.
    LiftGuard,
    /// Stores what became of the exchange.
    Close,
    /// Nothing any more.
    Done,
}

/// Why a process ends an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Goal {
    /// It is its own.
    Own,
    /// It has claimed it.
    Recover,
    /// It was its own, and somebody else has claimed it.
    Withdraw,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Process {
    /// What it does next.
    pub at: At,
    /// Attempts that it may still begin.
    pub(super) attempts: u8,
    /// The first of them.
    pub(super) coming: Attempt,
    /// Whether it begins exchanges of its own.
    pub(super) is_command: bool,
    /// Whether what it recovers is not its own.
    pub(super) is_earlier: bool,
    /// The fence number that it has.
    pub(super) epoch: u8,
    /// The attempt that it is about.
    pub(super) attempt: Attempt,
    /// Its claim; 0 is none.
    pub(super) claim: u8,
    pub(super) goal: Goal,
    /// Up to where it has brought changes along.
    pub(super) position: u8,
    /// What it has read.
    pub(super) read: u8,
    /// Whether it has seen that names were exchanged.
    pub(super) is_exchanged: bool,
    /// Whether it can't tell what came at the last moment.
    pub(super) is_at_a_loss: bool,
}

impl Process {
    /// One that begins so many attempts, of which the first has that number.
    pub fn command(coming: Attempt, attempts: u8) -> Self {
        let at = if attempts == 0 { At::Done } else { At::Idle };
        Self {
            at,
            attempts,
            coming,
            is_command: true,
            is_earlier: false,
            epoch: 0,
            attempt: 0,
            claim: 0,
            goal: Goal::Own,
            position: 0,
            read: 0,
            is_exchanged: false,
            is_at_a_loss: false,
        }
    }

    /// One that only recovers.
    pub fn recoverer() -> Self {
        Self { at: At::Idle, is_command: false, is_earlier: true, ..Self::gone() }
    }

    pub(super) fn gone() -> Self {
        Self::command(0, 0)
    }

    pub(super) fn begin(&mut self, mechanisms: &Mechanisms) {
        self.attempt = self.coming;
        self.coming += 1;
        self.attempts -= 1;
        self.goal = Goal::Own;
        self.is_earlier = false;
        self.claim = 0;
        self.is_exchanged = false;
        self.at = if mechanisms.guards { At::Guards } else { At::Record };
    }
}

/// The order in which an exchange is ended.
fn order(mechanisms: &Mechanisms) -> [At; 8] {
    use At::{Bring, Close, FenceGuard, Forbid, LiftFormer, LiftGuard, LiftIncoming, Look};
    if !mechanisms.forbidding_first {
        [LiftIncoming, LiftFormer, Forbid, Look, Bring, FenceGuard, LiftGuard, Close]
    } else if !mechanisms.guard_before_lift {
        [Forbid, Look, Bring, LiftIncoming, LiftFormer, FenceGuard, LiftGuard, Close]
    } else {
        [Forbid, Look, Bring, FenceGuard, LiftIncoming, LiftFormer, LiftGuard, Close]
    }
}

pub(super) fn first(mechanisms: &Mechanisms) -> At {
    order(mechanisms).first().copied().unwrap_or(At::Close)
}

/// What comes after a step of the end.
pub(super) fn after(at: At, mechanisms: &Mechanisms) -> At {
    let mut later = order(mechanisms).into_iter().skip_while(|step| *step != at).skip(1);
    later
        .find(|step| mechanisms.guards || !matches!(step, At::FenceGuard | At::LiftGuard))
        .unwrap_or(At::Close)
}
