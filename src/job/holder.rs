//! Who holds a lease, told precisely enough to see whether that process is
//! gone: host, boot, process namespace, process and its start.

use serde::{Deserialize, Serialize};

/// A process on a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Host name, for people.
    pub host: String,
    /// Identity of the running kernel; unknown outside Linux.
    pub boot_id: Option<String>,
    /// Identity of the process namespace; unknown outside Linux.
    pub pid_namespace: Option<String>,
    /// Process id within the namespace.
    pub pid: i64,
    /// When the process started, in clock ticks after boot.
    pub started: Option<i64>,
}

impl Holder {
    /// This very process.
    pub fn current() -> Self {
        let pid = i64::from(std::process::id());
        Self {
            host: read("/proc/sys/kernel/hostname").unwrap_or_else(|| "unknown host".into()),
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            pid_namespace: std::fs::read_link("/proc/self/ns/pid")
                .ok()
                .map(|link| link.display().to_string()),
            pid,
            started: process_start(pid),
        }
    }

    /// Whether this holder ran on the machine of `observer` and is gone for
    /// certain. False where it can't be told.
    pub fn is_gone(&self, observer: &Self) -> bool {
        self.is_neighbour_of(observer) && self.started.is_some() && process_start(self.pid) != self.started
    }

    /// Whether this holder runs on the machine of `observer` for certain.
    pub fn is_alive(&self, observer: &Self) -> bool {
        self.is_neighbour_of(observer) && self.started.is_some() && process_start(self.pid) == self.started
    }

    fn is_neighbour_of(&self, observer: &Self) -> bool {
        self.boot_id.is_some()
            && self.boot_id == observer.boot_id
            && self.pid_namespace.is_some()
            && self.pid_namespace == observer.pid_namespace
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "process {} on {}", self.pid, self.host)
    }
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// Start time of a living process. A killed one that its parent has not yet
/// collected counts as gone: it can't write any more.
fn process_start(pid: i64) -> Option<i64> {
    let stat = read(&format!("/proc/{pid}/stat"))?;
    // The second field is the command in parentheses and may hold anything.
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive() {
        let current = Holder::current();
        assert!(current.is_alive(&Holder::current()));
        assert!(!current.is_gone(&Holder::current()));
    }

    #[test]
    fn a_reused_process_id_is_another_process() {
        let current = Holder::current();
        let earlier = Holder { started: current.started.map(|ticks| ticks - 1), ..current.clone() };
        assert!(earlier.is_gone(&current));
    }

    #[test]
    fn a_process_elsewhere_can_only_expire() {
        let current = Holder::current();
        let elsewhere = Holder { boot_id: Some("another".into()), ..current.clone() };
        assert!(!elsewhere.is_gone(&current) && !elsewhere.is_alive(&current));
        let unknown = Holder { boot_id: None, pid_namespace: None, ..current.clone() };
        assert!(!unknown.is_gone(&unknown) && !unknown.is_alive(&unknown));
    }

    #[test]
    fn a_killed_child_is_gone_even_before_it_is_collected() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep exists");
        let pid = i64::from(child.id());
        let holder = Holder { pid, started: process_start(pid), ..Holder::current() };
        assert!(holder.is_alive(&Holder::current()));
        child.kill().expect("a living child");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !holder.is_gone(&Holder::current()) {
            assert!(std::time::Instant::now() < deadline, "the child is not seen as gone");
            std::thread::yield_now();
        }
        child.wait().expect("a child");
    }
}
