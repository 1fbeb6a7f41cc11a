//! Visits every state that a model can come to, the nearest first, so that the first way to a wrong
//! state is a shortest one.

use std::collections::{HashMap, VecDeque};
use std::fmt::{Debug, Display, Formatter};
use std::hash::{Hash, Hasher};

/// More states than this are an oversight, not a model.
const MOST_STATES: usize = 60_000_000;
/// A protocol: what may happen, and what must never have happened.
pub trait Model {
    /// Everything that decides what may happen next.
    type State: Clone + Hash + Debug;
    /// What is told of a step, for people.
    type Step: Copy + Debug;

    /// Before anything has happened.
    fn initial(&self) -> Self::State;
    /// Everything that may happen next, whoever does it.
    fn steps(&self, state: &Self::State, next: &mut Vec<(Self::Step, Self::State)>);
    /// What must not be so, at any time.
    fn wrong(&self, state: &Self::State) -> Option<&'static str>;
    /// What must not be so once nothing more can happen.
    fn wrong_at_end(&self, state: &Self::State) -> Option<&'static str>;
}

/// What came of an exploration.
#[derive(Debug)]
pub struct Explored {
    /// Different states, all of which were looked at unless something was wrong.
    pub states: usize,
    /// Those of them in which nothing more can happen.
    pub ends: usize,
    /// The first wrong state.
    pub wrong: Option<Counterexample>,
}

/// A shortest way to a wrong state.
#[derive(Debug)]
pub struct Counterexample {
    /// What is wrong.
    pub what: &'static str,
    steps: Vec<String>,
    state: String,
}

impl Display for Counterexample {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        writeln!(formatter, "{}:", self.what)?;
        for (number, step) in self.steps.iter().enumerate() {
            writeln!(formatter, "{:>3}. {step}", number + 1)?;
        }
        writeln!(formatter, "{}", self.state)
    }
}

/// How a state was come to first: from which one, by which step; `None` for the initial one.
type Way<Step> = Option<(u64, Step)>;

/// Looks at every state, up to the first wrong one.
///
/// # Panics
/// Where there are so many states that the model can't be meant.
pub fn explore<M: Model>(model: &M) -> Explored {
    let initial = model.initial();
    let mut ways: HashMap<u64, Way<M::Step>> = HashMap::from([(fingerprint(&initial), None)]);
    let mut waiting = VecDeque::from([(fingerprint(&initial), initial)]);
    let (mut next, mut ends) = (Vec::new(), 0);
    while let Some((here, state)) = waiting.pop_front() {
        model.steps(&state, &mut next);
        let mut is_end = true;
        for (step, state) in next.drain(..) {
            let there = fingerprint(&state);
            is_end &= there == here;
            if let std::collections::hash_map::Entry::Vacant(new) = ways.entry(there) {
                new.insert(Some((here, step)));
                waiting.push_back((there, state));
            }
        }
        ends += usize::from(is_end);
        let wrong = model.wrong(&state).or_else(|| is_end.then(|| model.wrong_at_end(&state)).flatten());
        if let Some(what) = wrong {
            let wrong = Counterexample { what, steps: steps_to(here, &ways), state: format!("{state:?}") };
            return Explored { states: ways.len(), ends, wrong: Some(wrong) };
        }
        assert!(ways.len() <= MOST_STATES, "more than {MOST_STATES} states");
    }
    Explored { states: ways.len(), ends, wrong: None }
}

fn steps_to<Step: Copy + Debug>(mut state: u64, ways: &HashMap<u64, Way<Step>>) -> Vec<String> {
    let mut steps = Vec::new();
    while let Some(Some((before, step))) = ways.get(&state) {
        steps.push(format!("{step:?}"));
        state = *before;
    }
    steps.reverse();
    steps
}

/// Two states of a few millions have the same one with a probability below a millionth.
fn fingerprint(state: &impl Hash) -> u64 {
    let mut hasher = Mixer(0x9e37_79b9_7f4a_7c15);
    state.hash(&mut hasher);
    hasher.finish()
}

/// States are many small numbers, for which the standard hash takes most of the time.
struct Mixer(u64);

impl Mixer {
    fn mix(&mut self, value: u64) {
        let product = u128::from(self.0 ^ value) * 0xd6e8_feb8_6659_fd93_u128;
        let folded = (product >> 64) ^ product;
        self.0 = u64::try_from(folded & u128::from(u64::MAX)).unwrap_or_default().rotate_left(29)
            ^ 0x5851_f42d_4c95_7f2d;
    }
}

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        let mut last = Self(self.0);
        last.mix(self.0 >> 32);
        last.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(chunk) {
                *to = *from;
            }
            self.mix(u64::from_le_bytes(word));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two counters up to three, each by one at a time.
    struct Counters;

    impl Model for Counters {
        type State = (u8, u8);
        type Step = &'static str;

        fn initial(&self) -> (u8, u8) {
            (0, 0)
        }

        fn steps(&self, &(one, other): &(u8, u8), next: &mut Vec<(&'static str, (u8, u8))>) {
            if one < 3 {
                next.push(("one", (one + 1, other)));
            }
            if other < 3 {
                next.push(("other", (one, other + 1)));
            }
        }

        fn wrong(&self, state: &(u8, u8)) -> Option<&'static str> {
            (*state == (1, 2)).then_some("met")
        }

        fn wrong_at_end(&self, state: &(u8, u8)) -> Option<&'static str> {
            (*state != (3, 3)).then_some("too early")
        }
    }

    /// The same, in which nothing is wrong.
    struct Right;

    impl Model for Right {
        type State = (u8, u8);
        type Step = &'static str;

        fn initial(&self) -> (u8, u8) {
            Counters.initial()
        }

        fn steps(&self, state: &(u8, u8), next: &mut Vec<(&'static str, (u8, u8))>) {
            Counters.steps(state, next);
        }

        fn wrong(&self, _: &(u8, u8)) -> Option<&'static str> {
            None
        }

        fn wrong_at_end(&self, state: &(u8, u8)) -> Option<&'static str> {
            Counters.wrong_at_end(state)
        }
    }

    #[test]
    fn every_state_is_visited_once() {
        let explored = explore(&Right);
        assert_eq!((explored.states, explored.ends), (16, 1));
        assert!(explored.wrong.is_none());
    }

    #[test]
    fn the_way_to_a_wrong_state_is_a_shortest_one() {
        let wrong = explore(&Counters).wrong.expect("a wrong state");
        assert_eq!((wrong.what, wrong.steps.len()), ("met", 3));
        assert!(wrong.to_string().contains("  3. "), "{wrong}");
    }
}
