//! Who is writing something: marks by which a later process tells whether that writer is still there.
//!
//! What a killed process leaves (claims, unfinished segments, temporary folders) may only be removed by others where it is
//! certain that the process is gone. That is known for processes of the same machine, boot and process namespace: by their
//! number and the moment they were started, because numbers are used again. Of any other process nothing is known.

use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use super::outside::{exists, host, now, process, started};

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
        let pid = process();
        let at = now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
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
