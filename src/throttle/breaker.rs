//! The circuit breaker: an outage of the key API must cost no documents.
//!
//! After a run of failures calls stop and one probe at a time looks whether the
//! API is back; what fails meanwhile counts against no key.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// So many failures in a row open the breaker: more than one key's attempts,
/// so that a single bad key can't.
const FAILURES_TO_OPEN: u32 = 20;
/// The first probe leaves after this long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Pauses double up to this: one call in two seconds burdens no API, and one
/// that is back is noticed soon.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Leave to make a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// A call like any other.
    Normal,
    /// The one call that looks whether the API is back.
    Probe,
}

/// Whether a call may be made, or when to ask again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It may leave.
    Granted(Pass),
    /// The next probe is due then.
    NotBefore(Instant),
    /// A probe is under way.
    Wait,
}

/// What a call's result did to the breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// Calls stop now.
    Opened,
    /// Calls go on now.
    Closed,
}

/// The state. Pure: it is told the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Circuit {
    Closed { failures: u32 },
    Open { until: Instant, pause: Duration, probes: u32 },
    Probing { pause: Duration, probes: u32 },
}

impl Circuit {
    fn admit(&mut self, now: Instant) -> Admission {
        match *self {
            Self::Closed { .. } => Admission::Granted(Pass::Normal),
            Self::Open { until, pause, probes } if until <= now => {
                *self = Self::Probing { pause, probes };
                Admission::Granted(Pass::Probe)
            }
            Self::Open { until, .. } => Admission::NotBefore(until),
            Self::Probing { .. } => Admission::Wait,
        }
    }

    fn record(&mut self, pass: Pass, failed: bool, now: Instant) -> Change {
        match (*self, failed) {
            (Self::Closed { failures }, true) => {
                let failures = failures + 1;
                if failures < FAILURES_TO_OPEN {
                    *self = Self::Closed { failures };
                    return Change::None;
                }
                *self = Self::Open { until: now + FIRST_PAUSE, pause: FIRST_PAUSE, probes: 0 };
                Change::Opened
            }
            (Self::Closed { .. }, false) => {
                *self = Self::Closed { failures: 0 };
                Change::None
            }
            // An answer is an answer, whoever asked for it.
            (Self::Open { .. } | Self::Probing { .. }, false) => {
                *self = Self::Closed { failures: 0 };
                Change::Closed
            }
            (Self::Probing { pause, probes }, true) if pass == Pass::Probe => {
                let pause = (pause * 2).min(LONGEST_PAUSE);
                *self = Self::Open { until: now + pause, pause, probes: probes + 1 };
                Change::None
            }
            (Self::Open { .. } | Self::Probing { .. }, true) => Change::None,
        }
    }

    /// A probe that was granted and not made: another one may follow at once.
    fn abandon(&mut self, now: Instant) {
        if let Self::Probing { pause, probes } = *self {
            *self = Self::Open { until: now, pause, probes };
        }
    }
}

/// The breaker that all calls of a process share.
#[derive(Debug)]
pub struct Breaker(Mutex<Circuit>);

impl Default for Breaker {
    fn default() -> Self {
        Self(Mutex::new(Circuit::Closed { failures: 0 }))
    }
}

impl Breaker {
    /// Asks for leave to make a call. A probe that is granted must be recorded
    /// or given back by [`Breaker::abandon`].
    pub fn admit(&self) -> Admission {
        self.circuit().admit(Instant::now())
    }

    /// Whether a pass that was granted a while ago still holds.
    pub fn honours(&self, pass: Pass) -> bool {
        pass == Pass::Probe || !self.is_open()
    }

    /// Whether calls are stopped.
    pub fn is_open(&self) -> bool {
        !matches!(*self.circuit(), Circuit::Closed { .. })
    }

    /// When the next probe may leave; `None` where calls are not stopped or a
    /// probe is under way.
    pub fn next_probe(&self) -> Option<Instant> {
        match *self.circuit() {
            Circuit::Open { until, .. } => Some(until),
            Circuit::Closed { .. } | Circuit::Probing { .. } => None,
        }
    }

    /// Probes that failed since calls were stopped.
    pub fn failed_probes(&self) -> u32 {
        match *self.circuit() {
            Circuit::Closed { .. } => 0,
            Circuit::Open { probes, .. } | Circuit::Probing { probes, .. } => probes,
        }
    }

    /// Takes note of a call's result.
    pub fn record(&self, pass: Pass, failed: bool) -> Change {
        self.circuit().record(pass, failed, Instant::now())
    }

    /// Gives a pass back with which no call was made.
    pub fn abandon(&self, pass: Pass) {
        if pass == Pass::Probe {
            self.circuit().abandon(Instant::now());
        }
    }

    fn circuit(&self) -> MutexGuard<'_, Circuit> {
        // The state is a plain value: a panic elsewhere can't leave it half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(now: Instant) -> Circuit {
        let mut circuit = Circuit::Closed { failures: 0 };
        for _ in 1..FAILURES_TO_OPEN {
            assert_eq!(circuit.record(Pass::Normal, true, now), Change::None);
        }
        assert_eq!(circuit.record(Pass::Normal, true, now), Change::Opened);
        circuit
    }

    #[test]
    fn only_a_run_of_failures_opens() {
        let now = Instant::now();
        let mut circuit = Circuit::Closed { failures: 0 };
        for _ in 0..10 {
            for _ in 1..FAILURES_TO_OPEN {
                circuit.record(Pass::Normal, true, now);
            }
            circuit.record(Pass::Normal, false, now);
        }
        assert_eq!(circuit, Circuit::Closed { failures: 0 });
        assert!(matches!(opened(now), Circuit::Open { .. }));
    }

    #[test]
    fn one_probe_at_a_time_and_ever_rarer() {
        let now = Instant::now();
        let mut circuit = opened(now);
        assert_eq!(circuit.admit(now), Admission::NotBefore(now + FIRST_PAUSE));
        let mut at = now + FIRST_PAUSE;
        let mut pause = FIRST_PAUSE;
        for _ in 0..8 {
            assert_eq!(circuit.admit(at), Admission::Granted(Pass::Probe));
            assert_eq!(circuit.admit(at), Admission::Wait);
            circuit.record(Pass::Normal, true, at);
            assert_eq!(circuit.admit(at), Admission::Wait, "another's failure does not end the probe");
            circuit.record(Pass::Probe, true, at);
            pause = (pause * 2).min(LONGEST_PAUSE);
            assert_eq!(circuit.admit(at), Admission::NotBefore(at + pause));
            at += pause;
        }
        assert_eq!(circuit.admit(at), Admission::Granted(Pass::Probe));
        assert_eq!(circuit.record(Pass::Probe, false, at), Change::Closed);
        assert_eq!(circuit.admit(at), Admission::Granted(Pass::Normal));
    }

    #[test]
    fn a_late_answer_of_an_ordinary_call_closes_too() {
        let now = Instant::now();
        let mut circuit = opened(now);
        assert_eq!(circuit.record(Pass::Normal, false, now), Change::Closed);
    }

    #[test]
    fn an_abandoned_probe_lets_another_one_follow_and_counts_for_nothing() {
        let breaker = Breaker::default();
        for _ in 0..FAILURES_TO_OPEN {
            breaker.record(Pass::Normal, true);
        }
        let later = Instant::now() + FIRST_PAUSE;
        assert_eq!(breaker.circuit().admit(later), Admission::Granted(Pass::Probe));
        breaker.abandon(Pass::Probe);
        assert_eq!(breaker.failed_probes(), 0);
        assert_eq!(breaker.admit(), Admission::Granted(Pass::Probe));
        assert!(breaker.honours(Pass::Probe) && !breaker.honours(Pass::Normal));
    }
}
