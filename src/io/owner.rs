//! Who is writing something: marks by which a later process tells whether that writer is still there.
//!
//! What a killed process leaves (claims, unfinished segments, temporary folders) may only be removed by others where it is
//! certain that the process is gone. That is known for processes of the same machine, boot and process namespace: by their
//! number and the moment they were started, because numbers are used again. Of any other process nothing is known.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Marks of one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Host name, boot and process namespace.
    host: String,
    pid: u32,
    /// When the process was started, as the system counts it.
    started: String,
    /// Seconds since 1970 when the marks were made, for people.
    #[serde(default)]
    at: u64,
}

impl Owner {
    /// The marks of this process.
    pub fn this() -> Self {
        let pid = std::process::id();
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Self { host: host(), pid, started: started(pid).unwrap_or_default(), at }
    }

    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// `None` where these are no marks.
    pub fn parse(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    /// Whether these are the marks of this very process.
    pub fn is_this(&self) -> bool {
        let this = Self::this();
        (&self.host, self.pid, &self.started) == (&this.host, this.pid, &this.started)
    }

    /// Whether the process is certainly there, and be it stopped. False where that cannot be known from here.
    pub fn is_alive(&self) -> bool {
        let here = !self.host.is_empty() && self.host == host();
        self.is_this() || (here && started(self.pid).is_some_and(|now| now == self.started))
    }

    /// Whether the process is certainly gone. False where that cannot be known from here.
    pub fn is_gone(&self) -> bool {
        if self.host.is_empty() || self.started.is_empty() || self.host != host() {
            return false;
        }
        match started(self.pid) {
            Some(now) => now != self.started,
            // What cannot be read may be hidden from this user: ask the system itself.
            None => !exists(self.pid),
        }
    }
}

#[cfg(target_os = "linux")]
fn host() -> String {
    let read = |path: &str| std::fs::read_to_string(path).map(|text| text.trim().to_string()).ok();
    let namespace = std::fs::read_link("/proc/self/ns/pid").ok();
    match (read("/proc/sys/kernel/hostname"), read("/proc/sys/kernel/random/boot_id"), namespace) {
        (Some(name), Some(boot), Some(namespace)) => format!("{name} {boot} {}", namespace.display()),
        _ => String::new(),
    }
}

/// The 22nd field of `/proc/PID/stat`; the second one is in parentheses and may hold anything.
#[cfg(target_os = "linux")]
fn started(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    // A zombie does nothing any more.
    (!matches!(state, "Z" | "X")).then(|| fields.nth(18).map(str::to_string))?
}

/// Whether there is a process of that number, a zombie apart; true also where that cannot be known.
#[cfg(target_os = "linux")]
fn exists(pid: u32) -> bool {
    let Ok(pid) = libc::pid_t::try_from(pid) else { return true };
    // SAFETY: signal 0 is not sent; only whether it could be is asked.
    let free = unsafe { libc::kill(pid, 0) } == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH);
    let zombie = std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next().map(|state| matches!(state, "Z" | "X"))).unwrap_or(false)
    });
    !free && !zombie
}

/// Elsewhere nobody is known to be gone, and what is left behind is removed by its age only.
#[cfg(not(target_os = "linux"))]
fn host() -> String {
    String::new()
}

#[cfg(not(target_os = "linux"))]
fn exists(_: u32) -> bool {
    true
}

#[cfg(not(target_os = "linux"))]
fn started(_: u32) -> Option<String> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn tells_the_living_from_the_gone() {
        let this = Owner::this();
        assert!(this.is_this() && !this.is_gone());
        let again = Owner::parse(this.to_json().as_bytes()).unwrap();
        assert_eq!(again, this);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let other = Owner { pid: child.id(), started: started(child.id()).unwrap(), ..this.clone() };
        assert!(other.is_alive() && !other.is_gone() && !other.is_this());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(other.is_gone() && !other.is_alive());
        // Another process with the number of one that is gone.
        assert!(Owner { started: "1".into(), ..this.clone() }.is_gone());
        assert!(!Owner { host: "elsewhere".into(), ..other }.is_gone());
        assert!(Owner::parse(b"").is_none());
    }
}
