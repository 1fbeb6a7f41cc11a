//! What a process does next, and what may become of the command that it sends.

use super::process::{At, Goal, Process, Step, after, first};
use super::server::{Attempt, Command, Incoming, Server, has};
use super::{Exchange, State};

/// One process in one state, about to take a step.
struct Turn<'a> {
    model: &'a Exchange,
    state: &'a State,
    index: usize,
    next: &'a mut Vec<(Step, State)>,
}

impl Exchange {
    /// Everything that a process may do next.
    pub(super) fn process(&self, state: &State, index: usize, next: &mut Vec<(Step, State)>) {
        let Some(process) = state.processes.get(index) else { return };
        if process.at == At::Done {
            return;
        }
        Turn { model: self, state, index, next }.take(process);
    }
}

impl Turn<'_> {
    fn take(&mut self, process: &Process) {
        let mechanisms = self.model.mechanisms;
        let Process { attempt, epoch, position, read, .. } = *process;
        match process.at {
            At::Idle => self.idle(process),
            At::Earlier => self.earlier(),
            At::Guards => self.once(Command::MakeGuards(attempt), At::Record, At::Done, At::Done),
            At::Record => self.again(Command::SaveRecord(attempt, epoch), At::Right, At::Done),
            At::Right => self.again(Command::AskRight(attempt, epoch), At::Name, At::Claim),
            At::Name => self.name(process),
            At::NameSeen => self.go(|server, process| {
                let has_it = server.incoming == Incoming::Working(attempt);
                process.at = if has_it { At::Incoming } else { first(&mechanisms) };
            }),
            At::Incoming if !mechanisms.fence_incoming => self.go(|_, process| process.at = At::RightAgain),
            At::Incoming => self.fence(Command::FenceIncoming(attempt), process, At::RightAgain),
            At::RightAgain if !mechanisms.fence => {
                self.again(Command::AskRight(attempt, epoch), At::Read, At::Claim);
            }
            At::RightAgain if self.model.late.fences => {
                self.again(Command::AskRight(attempt, epoch), At::Fence, At::Claim);
            }
            At::RightAgain | At::Fence => self.fence(Command::FenceLive(attempt), process, At::Read),
            At::Read => self.go(|server, process| {
                process.read = server.old;
                let is_touched = server.change_count > process.position;
                process.position = server.change_count;
                process.at = if is_touched && mechanisms.reaching { At::Write } else { At::Renaming };
            }),
            At::Write => self.write(read, process),
            At::Renaming if !mechanisms.position => self.go(|_, process| process.at = At::Exchange),
            At::Renaming => {
                self.again(Command::SaveRenaming(attempt, epoch, position), At::Exchange, At::Claim);
            }
            At::Exchange => {
                self.once(Command::Exchange(attempt), At::Outcome, At::Outcome, At::Outcome);
            }
            At::Outcome => self.go(|server, process| {
                process.is_exchanged = server.incoming == Incoming::Live;
                let is_brought = process.is_exchanged && mechanisms.forbidding_first;
                process.at = if is_brought { At::Bring } else { first(&mechanisms) };
            }),
            At::Claim => self.claim(process),
            At::Forbid => self.forbid(),
            At::Look => self.go(move |server, process| {
                process.is_exchanged = server.incoming == Incoming::Live;
                process.at = after(At::Look, &mechanisms);
                if process.goal == Goal::Withdraw && process.is_exchanged {
                    process.at = At::Done;
                }
            }),
            At::Bring => self.bring(process),
            At::FenceGuard => self.drop_guard(Command::DropFenceGuard(attempt)),
            At::LiftIncoming => self.lift(process, true),
            At::SendLiftIncoming => self.send_lift(process, true),
            At::LiftFormer => self.lift(process, false),
            At::SendLiftFormer => self.send_lift(process, false),
            At::LiftGuard => self.drop_guard(Command::DropLiftGuard(attempt)),
            At::Close => self.close(process),
            At::Done => {}
        }
        if let At::Read | At::Exchange = process.at {
            self.give_up(process.at);
        }
    }

    fn give_up(&mut self, at: At) {
        let mechanisms = self.model.mechanisms;
        let mut state = self.state.clone();
        if let Some(process) = state.processes.get_mut(self.index) {
            process.at = first(&mechanisms);
        }
        self.next.push((Step::GivesUp(self.index, at), state));
    }

    /// Something that is not a command with an answer, or none that can be late.
    fn go(&mut self, does: impl FnOnce(&mut Server, &mut Process)) {
        let mut state = self.state.clone();
        let Some(process) = state.processes.get_mut(self.index) else { return };
        let at = process.at;
        does(&mut state.server, process);
        if process.at == At::Done {
            *process = Process::gone();
        }
        self.next.push((Step::Goes(self.index, at), state));
    }

    /// A command that is sent until it is answered.
    fn again(&mut self, command: Command, accepted: At, refused: At) {
        let at = self.state.processes.get(self.index).map_or(At::Done, |process| process.at);
        self.once(command, accepted, refused, at);
    }

    /// A command that is sent once.
    fn once(&mut self, command: Command, accepted: At, refused: At, unanswered: At) {
        self.send(
            command,
            |process, is_accepted| process.at = if is_accepted { accepted } else { refused },
            |process| {
                process.at = unanswered;
            },
        );
    }

    fn send(
        &mut self,
        command: Command,
        answered: impl FnOnce(&mut Process, bool),
        unanswered: impl Fn(&mut Process),
    ) {
        let model = self.model;
        self.go(|server, process| {
            let is_accepted = server.apply(command, &model.mechanisms, model.method);
            answered(process, is_accepted);
        });
        let Some(process) = self.state.processes.get(self.index) else { return };
        if self.state.faults == 0 || is_question(command) {
            return;
        }
        for is_late in [false, true] {
            if is_late && !self.may_be_late(command) {
                continue;
            }
            let mut state = self.state.clone();
            state.faults -= 1;
            if is_late {
                state.late.push(command);
                state.late.sort_unstable();
            } else {
                state.server.apply(command, &model.mechanisms, model.method);
            }
            if let Some(process) = state.processes.get_mut(self.index) {
                unanswered(process);
                if process.at == At::Done {
                    *process = Process::gone();
                }
            }
            let (index, at) = (self.index, process.at);
            let step =
                if is_late { Step::Late(index, at, command) } else { Step::Unanswered(index, at, command) };
            self.next.push((step, state));
        }
    }

    fn may_be_late(&self, command: Command) -> bool {
        match command {
            Command::FenceLive(_) | Command::LiftIncoming(..) | Command::LiftFormer(_) => {
                self.model.late.fences
            }
            Command::SaveRecord(..) | Command::SaveRenaming(..) | Command::Claim(_) | Command::Close(..) => {
                self.model.late.saves
            }
            _ => true,
        }
    }

    /// A command takes the job over; a recoverer begins where there is something to recover.
    fn idle(&mut self, process: &Process) {
        let is_open = self.state.server.record.is_some_and(|record| record.is_open);
        if process.is_command {
            self.go(|server, process| {
                server.number += 1;
                process.epoch = server.number;
                process.at = At::Earlier;
            });
        } else if is_open {
            self.go(|server, process| {
                process.attempt = server.record.map_or(0, |record| record.attempt);
                process.at = At::Claim;
            });
        }
    }

    fn earlier(&mut self) {
        let mechanisms = self.model.mechanisms;
        self.go(|server, process| match server.record {
            Some(record) if record.is_open => {
                process.attempt = record.attempt;
                process.is_earlier = true;
                process.at = At::Claim;
            }
            _ if server.incoming == Incoming::Live => process.at = At::Done,
            // Guards without a record are of one that never came so far.
            _ if mechanisms.guards && (server.fence_guards | server.lift_guards) != 0 => {
                process.at = At::Done
            }
            _ => {
                process.position = server.position;
                if let Incoming::Working(_) = server.incoming {
                    server.incoming = Incoming::Own;
                }
                process.begin(&mechanisms);
            }
        });
    }

    fn name(&mut self, process: &Process) {
        let attempt = process.attempt;
        let is_sent_once = self.model.mechanisms.name_sent_once;
        let server = &self.state.server;
        if server.incoming == Incoming::Working(attempt) || !self.model.mechanisms.working_name {
            return self.go(|_, process| process.at = At::Incoming);
        }
        if server.incoming == Incoming::Live {
            return self.go(|_, process| process.at = At::Claim);
        }
        if let Incoming::Working(_) = server.incoming {
            // Of another try, or of an attempt before: by its UUID it is found under any name.
            return self.go(move |server, process| {
                server.incoming = Incoming::Working(attempt);
                process.at = At::Incoming;
            });
        }
        // Sent again it could arrive twice, the second time when the copy has its own name again.
        let unanswered = if is_sent_once { At::NameSeen } else { At::Name };
        self.once(Command::TakeName(attempt), At::Incoming, At::Name, unanswered);
    }

    /// Where fences are in time, nothing happens between the question whose right it is and the fence.
    fn fence(&mut self, command: Command, process: &Process, next: At) {
        let model = self.model;
        if model.late.fences {
            return self.once(command, next, At::Claim, At::Claim);
        }
        let question = Command::AskRight(process.attempt, process.epoch);
        self.go(|server, process| {
            let is_up = server.apply(question, &model.mechanisms, model.method)
                && server.apply(command, &model.mechanisms, model.method);
            process.at = if is_up { next } else { At::Claim };
        });
    }

    fn write(&mut self, read: u8, process: &Process) {
        let (attempt, epoch) = (process.attempt, process.epoch);
        let model = self.model;
        self.go(|server, process| {
            // The lane is closed where somebody has taken the job over.
            let is_done = server.number == epoch
                && server.apply(Command::Follow(read, attempt), &model.mechanisms, model.method);
            process.at = if is_done { At::Renaming } else { At::Claim };
        });
    }

    fn claim(&mut self, process: &Process) {
        let attempt = process.attempt;
        let mechanisms = self.model.mechanisms;
        let model = self.model;
        let is_own = !process.is_earlier;
        self.go(|server, process| {
            if server.apply(Command::Claim(attempt), &model.mechanisms, model.method) {
                process.claim = server.record.map_or(0, |record| record.claim);
                process.goal = Goal::Recover;
                process.at = first(&mechanisms);
            } else if is_own {
                process.goal = Goal::Withdraw;
                process.at = first(&mechanisms);
            } else {
                process.at = if process.is_command { At::Earlier } else { At::Done };
            }
        });
        if self.state.faults > 0 && self.model.late.saves {
            let mut state = self.state.clone();
            state.faults -= 1;
            state.late.push(Command::Claim(attempt));
            state.late.sort_unstable();
            self.next.push((Step::Late(self.index, At::Claim, Command::Claim(attempt)), state));
        }
    }

    fn forbid(&mut self) {
        let mechanisms = self.model.mechanisms;
        match self.state.server.incoming {
            Incoming::Working(attempt) => {
                self.again(Command::TakeAway(attempt), after(At::Forbid, &mechanisms), At::Forbid);
            }
            _ => self.go(|_, process| process.at = after(At::Forbid, &mechanisms)),
        }
    }

    /// Deletes since the position are brought along. Other writes would be reported, but nobody here writes past
    /// a validator.
    fn bring(&mut self, process: &Process) {
        let mechanisms = self.model.mechanisms;
        let server = &self.state.server;
        let position = match process.goal {
            Goal::Own => Some(process.position),
            _ => server.record.filter(|record| record.has_moment).map(|_| server.position),
        };
        let next = after(At::Bring, &mechanisms);
        if !process.is_exchanged {
            return self.go(|_, process| process.at = next);
        }
        let Some(position) = position else {
            return self.go(|_, process| {
                process.is_at_a_loss = true;
                process.at = next;
            });
        };
        let is_touched = server.change_count > position;
        if is_touched && server.changes >> position == 0 {
            self.again(Command::DeleteOfMoment, next, next);
        } else {
            self.go(|_, process| process.at = next);
        }
    }

    fn drop_guard(&mut self, command: Command) {
        let at = self.state.processes.get(self.index).map_or(At::Done, |process| process.at);
        let next = after(at, &self.model.mechanisms);
        self.again(command, next, next);
    }

    fn lift(&mut self, process: &Process, is_incoming: bool) {
        let model = self.model;
        let (attempt, at) = (process.attempt, process.at);
        self.go(|server, process| {
            let tag = if is_incoming { server.incoming_fence } else { server.former_fence };
            let is_ours = tag == attempt || (!model.mechanisms.tag && tag != 0);
            process.at = if !is_ours {
                after(at, &model.mechanisms)
            } else if model.late.fences {
                if is_incoming { At::SendLiftIncoming } else { At::SendLiftFormer }
            } else {
                server.apply(lifting(attempt, is_incoming, server.incoming), &model.mechanisms, model.method);
                after(at, &model.mechanisms)
            };
        });
    }

    /// Looked at again afterwards: it may have been refused for want of the guard.
    fn send_lift(&mut self, process: &Process, is_incoming: bool) {
        let mechanisms = self.model.mechanisms;
        let attempt = process.attempt;
        if mechanisms.guards
            && mechanisms.recoverer_makes_guards
            && !has(self.state.server.lift_guards, attempt)
        {
            let model = self.model;
            return self.go(|server, _| {
                server.apply(Command::MakeGuards(attempt), &model.mechanisms, model.method);
            });
        }
        let look = if is_incoming { At::LiftIncoming } else { At::LiftFormer };
        let next = after(look, &mechanisms);
        self.send(
            lifting(attempt, is_incoming, self.state.server.incoming),
            |process, is_accepted| process.at = if is_accepted { next } else { At::Done },
            |process| process.at = look,
        );
    }

    fn close(&mut self, process: &Process) {
        let Process { attempt, claim, is_exchanged, goal, is_earlier, .. } = *process;
        let mechanisms = self.model.mechanisms;
        if goal == Goal::Withdraw || process.is_at_a_loss {
            return self.go(|_, process| process.at = At::Done);
        }
        let answered = move |process: &mut Process, is_accepted: bool| {
            if is_earlier && process.is_command {
                process.at = At::Earlier;
            } else if goal == Goal::Own && is_accepted && !is_exchanged && process.attempts > 0 {
                process.begin(&mechanisms);
            } else {
                process.at = At::Done;
            }
        };
        self.send(Command::Close(attempt, claim, is_exchanged), answered, |_| {});
    }
}

fn lifting(attempt: Attempt, is_incoming: bool, name: Incoming) -> Command {
    if is_incoming { Command::LiftIncoming(attempt, name) } else { Command::LiftFormer(attempt) }
}

/// A question changes nothing, however late it arrives.
fn is_question(command: Command) -> bool {
    matches!(command, Command::AskRight(..))
}
