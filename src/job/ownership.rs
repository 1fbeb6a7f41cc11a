//! Which keys belong to which worker of a shared job.
//!
//! Keys fall into buckets by a hash of their text, and a bucket belongs to one
//! worker at a time: that makes one call per key true over all workers without
//! a word between them for each key. A bucket changes hands only when its owner
//! has nothing of it in flight any more, or is dead.

use std::sync::{Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

/// How many shares there are to be had. More would be more to write down, fewer
/// would split unevenly.
pub const BUCKETS: usize = 64;

/// A set of buckets.
type Set = [bool; BUCKETS];

/// The bucket of a legacy key, or of whatever else identifies a document.
pub fn bucket_of(text: &[u8]) -> usize {
    usize::from(Sha256::digest(text)[0]) % BUCKETS
}

/// The buckets of this worker; shared between the task that trades them and the
/// engine that works on them.
#[derive(Debug)]
pub struct Ownership(Mutex<State>);

#[derive(Debug)]
struct State {
    owned: Set,
    /// To be given away once nothing of them is in flight.
    releasing: Set,
    /// Nothing of `releasing` is in flight any more.
    is_released: bool,
    /// Buckets came that the current pass may have read past.
    gained: bool,
    had_a_share: bool,
}

impl Ownership {
    /// Owns all buckets, as a runner does, or none, as who has just joined.
    pub fn new(everything: bool) -> Self {
        Self(Mutex::new(State {
            owned: [everything; BUCKETS],
            releasing: [false; BUCKETS],
            is_released: false,
            gained: false,
            had_a_share: everything,
        }))
    }

    /// Whether keys of that bucket may be asked for.
    pub fn owns(&self, bucket: usize) -> bool {
        let state = self.state();
        state.owned[bucket] && !state.releasing[bucket]
    }

    /// The buckets owned, those that are being given away included.
    pub fn owned(&self) -> Vec<usize> {
        members(&self.state().owned)
    }

    /// Takes note that these buckets are ours now.
    pub fn gain(&self, buckets: &[usize]) {
        let mut state = self.state();
        buckets.iter().for_each(|bucket| state.owned[*bucket] = true);
        state.gained |= !buckets.is_empty();
        state.had_a_share = true;
    }

    /// Whether there ever was a bucket of ours.
    pub fn had_a_share(&self) -> bool {
        self.state().had_a_share
    }

    /// Whether buckets came since this was last asked.
    pub fn take_gained(&self) -> bool {
        std::mem::take(&mut self.state().gained)
    }

    /// Whether buckets came that nobody has asked about yet.
    pub fn has_gained(&self) -> bool {
        self.state().gained
    }

    /// Begins to give buckets away.
    pub fn begin_release(&self, buckets: &[usize]) {
        let mut state = self.state();
        buckets.iter().for_each(|bucket| state.releasing[*bucket] = true);
        state.is_released = false;
    }

    /// Whether something is to be given away that may still be in flight.
    pub fn is_releasing(&self) -> bool {
        let state = self.state();
        !state.is_released && state.releasing.contains(&true)
    }

    /// Whether something is about to be handed over.
    pub fn is_giving(&self) -> bool {
        self.state().releasing.contains(&true)
    }

    /// The engine has nothing of what is given away in flight any more.
    pub fn confirm_release(&self) {
        self.state().is_released = true;
    }

    /// The buckets that can be handed over now.
    pub fn released(&self) -> Vec<usize> {
        let state = self.state();
        if state.is_released { members(&state.releasing) } else { Vec::new() }
    }

    /// Takes note that these buckets are ours no longer.
    pub fn lose(&self, buckets: &[usize]) {
        let mut state = self.state();
        for bucket in buckets {
            state.owned[*bucket] = false;
            state.releasing[*bucket] = false;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Plain values: a panic elsewhere can't leave them half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn members(set: &Set) -> Vec<usize> {
    (0..BUCKETS).filter(|bucket| set[*bucket]).collect()
}

/// Who has a bucket, as the job document tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// Nobody, or somebody who is dead; the word that stands there.
    Free(String),
    /// This worker.
    Us,
    /// Another living worker.
    Other,
    /// All its keys are done.
    Done,
}

/// What to do about the shares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Keep,
    /// Take these, which nobody has.
    Claim(Vec<usize>),
    /// Give these away.
    Release(Vec<usize>),
}

/// Decides what to do, given the owner of each bucket and how many living
/// workers share those that are not done. Pure.
pub fn next_step(owners: &[Owner], workers: usize) -> Step {
    let indices = |wanted: &dyn Fn(&Owner) -> bool| -> Vec<usize> {
        owners.iter().enumerate().filter(|(_, owner)| wanted(owner)).map(|(index, _)| index).collect()
    };
    let ours = indices(&|owner| *owner == Owner::Us);
    let free = indices(&|owner| matches!(owner, Owner::Free(_)));
    let open = owners.iter().filter(|owner| **owner != Owner::Done).count();
    let fair = open.div_ceil(workers.max(1));
    if ours.len() < fair && !free.is_empty() {
        return Step::Claim(free.into_iter().take(fair - ours.len()).collect());
    }
    if ours.len() > fair {
        return Step::Release(ours.into_iter().skip(fair).collect());
    }
    Step::Keep
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners(us: usize, other: usize, done: usize) -> Vec<Owner> {
        let mut owners = vec![Owner::Us; us];
        owners.extend(vec![Owner::Other; other]);
        owners.extend(vec![Owner::Done; done]);
        owners.resize(BUCKETS, Owner::Free(String::new()));
        owners
    }

    fn size(step: &Step) -> (usize, usize) {
        match step {
            Step::Keep => (0, 0),
            Step::Claim(buckets) => (buckets.len(), 0),
            Step::Release(buckets) => (0, buckets.len()),
        }
    }

    #[test]
    fn shares_become_even_whoever_comes_and_goes() {
        assert_eq!(size(&next_step(&owners(64, 0, 0), 1)), (0, 0));
        assert_eq!(size(&next_step(&owners(64, 0, 0), 3)), (0, 42));
        assert_eq!(size(&next_step(&owners(0, 22, 0), 3)), (22, 0));
        assert_eq!(size(&next_step(&owners(0, 44, 0), 3)), (20, 0));
        assert_eq!(size(&next_step(&owners(22, 20, 0), 2)), (10, 0), "a dead worker's share is taken");
        assert_eq!(size(&next_step(&owners(0, 0, 64), 2)), (0, 0));
        assert_eq!(size(&next_step(&owners(20, 0, 44), 1)), (0, 0));
        assert_eq!(size(&next_step(&owners(4, 0, 44), 1)), (16, 0));
    }

    #[test]
    fn a_share_is_worked_on_until_it_is_handed_over() {
        let ownership = Ownership::new(true);
        ownership.begin_release(&[3, 4]);
        assert!(!ownership.owns(3) && ownership.owns(5) && ownership.is_releasing());
        assert!(ownership.released().is_empty(), "something may be in flight");
        ownership.confirm_release();
        assert!(!ownership.is_releasing());
        assert_eq!(ownership.released(), [3, 4]);
        ownership.lose(&[3, 4]);
        assert!(ownership.released().is_empty() && ownership.owned().len() == BUCKETS - 2);
        assert!(!ownership.take_gained());
        ownership.gain(&[3]);
        assert!(ownership.owns(3) && ownership.take_gained() && !ownership.take_gained());
    }

    #[test]
    fn keys_spread_evenly_over_the_buckets() {
        let mut counts = [0; BUCKETS];
        (0..6400).for_each(|number| counts[bucket_of(format!("K{number}").as_bytes())] += 1);
        assert!(counts.iter().all(|count| (50..160).contains(count)), "{counts:?}");
    }
}
