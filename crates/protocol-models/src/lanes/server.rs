//! What the server has, and what it does when a command arrives.

use super::Mechanisms;

/// A command on its way. Holders are numbered, and so are the transactions of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Command {
    /// Raises the lanes to that epoch.
    Raise(u8),
    /// Opens the lane of a holder, in one transaction with a look at the job.
    Open(usize, u8),
    /// Begins a transaction of a holder by the comparison of the lane with that epoch.
    Begin(usize, u8, u8),
    /// Writes that state of the document.
    Write(usize, u8, u8),
    /// Commits.
    Commit(usize, u8),
    /// Stores a position, by the holder of that epoch.
    Save(u8, u8),
}

/// What is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// Done.
    Done,
    /// There is no such transaction any more, or another one is in the way.
    GivenUp,
    /// Somebody else has the right.
    Overtaken,
    /// It waits for a lock.
    Waits,
}

/// The transactions of one holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Session {
    /// The latest number that was seen.
    latest: u8,
    /// Whether it is open.
    is_open: bool,
    /// Whether it was committed.
    is_committed: bool,
    epoch: u8,
    write: Option<u8>,
}

/// What the server has.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Server {
    /// The number of the job.
    pub number: u8,
    /// Up to where the job says that changes are brought along.
    pub position: u8,
    /// The epoch of the lane of each holder, once there is one.
    pub lanes: [Option<u8>; 2],
    /// How often the document was changed in the source, and which of these states the target has.
    pub source: u8,
    /// See `source`.
    pub target: u8,
    /// What must not have happened.
    pub wrong: Option<&'static str>,
    /// The epoch for which raising was answered.
    raised: u8,
    sessions: [Session; 2],
}

impl Server {
    /// A job that nobody holds.
    pub fn with_a_job() -> Self {
        Self {
            number: 0,
            position: 0,
            lanes: [None; 2],
            source: 0,
            target: 0,
            wrong: None,
            raised: 0,
            sessions: [Session::default(); 2],
        }
    }

    /// Whether a holder has an open transaction.
    pub fn is_open(&self, holder: usize) -> bool {
        self.sessions.get(holder).is_some_and(|session| session.is_open)
    }

    /// Ends the open transaction of a holder.
    pub fn end(&mut self, holder: usize) {
        if let Some(session) = self.sessions.get_mut(holder) {
            session.is_open = false;
            session.write = None;
        }
    }

    /// Carries out a command.
    pub fn apply(&mut self, command: Command, mechanisms: &Mechanisms) -> Reply {
        match command {
            Command::Raise(epoch) => self.raise(epoch, mechanisms),
            Command::Open(holder, epoch) => self.open(holder, epoch, mechanisms),
            Command::Begin(holder, number, epoch) => self.begin(holder, number, epoch, mechanisms),
            Command::Write(holder, number, state) => self.write(holder, number, state),
            Command::Commit(holder, number) => self.commit(holder, number),
            Command::Save(epoch, position) => {
                if mechanisms.saving && self.number != epoch {
                    return Reply::Overtaken;
                }
                self.position = position;
                Reply::Done
            }
        }
    }

    fn is_locked(&self, mechanisms: &Mechanisms) -> bool {
        mechanisms.gate && self.sessions.iter().any(|session| session.is_open)
    }

    fn raise(&mut self, epoch: u8, mechanisms: &Mechanisms) -> Reply {
        if self.is_locked(mechanisms) {
            return Reply::Waits;
        }
        for lane in self.lanes.iter_mut().flatten() {
            *lane = if mechanisms.only_upwards { epoch.max(*lane) } else { epoch };
        }
        self.raised = self.raised.max(epoch);
        Reply::Done
    }

    fn open(&mut self, holder: usize, epoch: u8, mechanisms: &Mechanisms) -> Reply {
        let Some(lane) = self.lanes.get_mut(holder) else { return Reply::Overtaken };
        if (mechanisms.opening && self.number != epoch) || lane.is_some_and(|lane| lane > epoch) {
            return Reply::Overtaken;
        }
        *lane = Some(epoch);
        Reply::Done
    }

    fn begin(&mut self, holder: usize, number: u8, epoch: u8, mechanisms: &Mechanisms) -> Reply {
        let is_right = !mechanisms.gate || self.lanes.get(holder) == Some(&Some(epoch));
        let Some(session) = self.sessions.get_mut(holder).filter(|session| session.latest < number) else {
            return Reply::GivenUp;
        };
        // A transaction ends the one before it, whatever becomes of it.
        *session = Session { latest: number, is_open: is_right, is_committed: false, epoch, write: None };
        if is_right { Reply::Done } else { Reply::Overtaken }
    }

    fn write(&mut self, holder: usize, number: u8, state: u8) -> Reply {
        let is_in_the_way = self.sessions.get(1 - holder).is_some_and(|other| other.write.is_some());
        match self.sessions.get_mut(holder) {
            Some(session) if session.latest == number && session.is_open && !is_in_the_way => {
                session.write = Some(state);
                Reply::Done
            }
            Some(session) if session.latest == number => {
                session.is_open = false;
                Reply::GivenUp
            }
            _ => Reply::GivenUp,
        }
    }

    fn commit(&mut self, holder: usize, number: u8) -> Reply {
        let Some(session) = self.sessions.get_mut(holder).filter(|session| session.latest == number) else {
            return Reply::GivenUp;
        };
        if !session.is_open {
            return if session.is_committed { Reply::Done } else { Reply::GivenUp };
        }
        let Session { epoch, write, .. } = *session;
        *session = Session { is_open: false, is_committed: true, write: None, ..*session };
        if let Some(state) = write.filter(|state| *state != self.target) {
            self.target = state;
            if epoch < self.raised {
                self.wrong = Some("a former holder has changed the target");
            }
        }
        Reply::Done
    }
}
