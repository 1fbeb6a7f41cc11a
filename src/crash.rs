//! Points at which a test can kill or stop the process, so that "at any moment" is
//! tried at the moments that matter. Debug builds only: a release build has no such
//! points.

/// Kills this process where `MONGOREKEY_CRASH_AT` names this point, as in
/// `after_call:3` for the third time it is reached; stops it until it is told to go
/// on (SIGCONT) where `MONGOREKEY_STOP_AT` does.
#[cfg(debug_assertions)]
pub(crate) fn point(name: &str) {
    use rustix::process::Signal;

    if CRASH.is_reached(name) {
        signal_oneself(Signal::KILL);
        // Nothing of this task may go on until the signal is here.
        loop {
            std::thread::park();
        }
    }
    if STOP.is_reached(name) {
        // Returns when somebody lets it go on.
        signal_oneself(Signal::STOP);
    }
}

#[cfg(debug_assertions)]
static CRASH: Point = Point::named_by("MONGOREKEY_CRASH_AT");
#[cfg(debug_assertions)]
static STOP: Point = Point::named_by("MONGOREKEY_STOP_AT");

/// A point that a variable of the environment names.
#[cfg(debug_assertions)]
struct Point {
    variable: &'static str,
    wanted: std::sync::OnceLock<Option<(String, u64)>>,
    reached: std::sync::atomic::AtomicU64,
}

#[cfg(debug_assertions)]
impl Point {
    const fn named_by(variable: &'static str) -> Self {
        Self { variable, wanted: std::sync::OnceLock::new(), reached: std::sync::atomic::AtomicU64::new(0) }
    }

    fn is_reached(&self, name: &str) -> bool {
        let wanted = self.wanted.get_or_init(|| {
            let text = std::env::var(self.variable).ok()?;
            let (name, time) = text.split_once(':')?;
            Some((name.to_owned(), time.parse().ok()?))
        });
        let Some((wanted, time)) = wanted else { return false };
        wanted == name && self.reached.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1 == *time
    }
}

#[cfg(debug_assertions)]
fn signal_oneself(signal: rustix::process::Signal) {
    let _sent = rustix::process::kill_process(rustix::process::getpid(), signal);
}

/// Does nothing.
#[cfg(not(debug_assertions))]
pub(crate) fn point(_name: &str) {}
