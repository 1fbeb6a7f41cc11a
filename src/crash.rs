//! Points at which a test can kill the process, so that "kill at any moment" is
//! tried at the moments that matter. Debug builds only: a release build has no
//! such points.

/// Kills this process where `MONGOREKEY_CRASH_AT` names this point, as in
/// `after_call:3` for the third time it is reached.
#[cfg(debug_assertions)]
pub(crate) fn point(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static REACHED: AtomicU64 = AtomicU64::new(0);
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("MONGOREKEY_CRASH_AT").ok()?;
        let (name, time) = text.split_once(':')?;
        Some((name.to_owned(), time.parse().ok()?))
    });
    let Some((wanted, time)) = wanted else { return };
    if wanted == name && REACHED.fetch_add(1, Ordering::SeqCst) + 1 == *time {
        let pid = std::process::id().to_string();
        let _sent = std::process::Command::new("kill").args(["-9", &pid]).status();
        // Nothing of this task may go on until the signal is here.
        loop {
            std::thread::park();
        }
    }
}

/// Does nothing.
#[cfg(not(debug_assertions))]
pub(crate) fn point(_name: &str) {}
