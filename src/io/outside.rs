//! What comes from outside: the time, chance, and what the system says of processes.
//!
//! What attempts do at one place depends on this and on the store, and on nothing else. A test stands in for it where many of them
//! run on a clock, a die and machines of the test's own.

use std::time::{Duration, SystemTime};

/// What a test says instead, where one stands in.
macro_rules! stand_in {
    ($outside:ident => $answer:expr) => {
        #[cfg(test)]
        if let Some($outside) = stand_in::get() {
            return $answer;
        }
    };
}

pub fn now() -> SystemTime {
    stand_in!(outside => outside.now());
    SystemTime::now()
}

pub async fn sleep(time: Duration) {
    #[cfg(test)]
    if let Some(sleep) = stand_in::get().map(|outside| outside.sleep(time)) {
        return sleep.await;
    }
    tokio::time::sleep(time).await;
}

/// Hexadecimal digits that nobody else has.
pub fn unique() -> String {
    stand_in!(outside => outside.unique());
    uuid::Uuid::new_v4().simple().to_string()
}

/// This machine, its boot and its process namespace; empty where that is not known.
pub fn host() -> String {
    stand_in!(outside => outside.host());
    system::host()
}

/// The number of this process.
pub fn process() -> u32 {
    stand_in!(outside => outside.process());
    std::process::id()
}

/// When a process was started, as the system counts it; `None` where there is no such process, or it cannot be known.
pub fn started(pid: u32) -> Option<String> {
    stand_in!(outside => outside.started(pid));
    system::started(pid)
}

/// Whether there is a process of that number, a zombie apart; true also where that cannot be known.
pub fn exists(pid: u32) -> bool {
    stand_in!(outside => outside.started(pid).is_some());
    system::exists(pid)
}

#[cfg(target_os = "linux")]
mod system {
    pub fn host() -> String {
        let read = |path: &str| std::fs::read_to_string(path).map(|text| text.trim().to_string()).ok();
        let namespace = std::fs::read_link("/proc/self/ns/pid").ok();
        match (read("/proc/sys/kernel/hostname"), read("/proc/sys/kernel/random/boot_id"), namespace) {
            (Some(name), Some(boot), Some(namespace)) => format!("{name} {boot} {}", namespace.display()),
            _ => String::new(),
        }
    }

    /// The 22nd field of `/proc/PID/stat`; the second one is in parentheses and may hold anything.
    pub fn started(pid: u32) -> Option<String> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?;
        // A zombie does nothing any more.
        (!matches!(state, "Z" | "X")).then(|| fields.nth(18).map(str::to_string))?
    }

    pub fn exists(pid: u32) -> bool {
        let Ok(pid) = libc::pid_t::try_from(pid) else { return true };
        // SAFETY: signal 0 is not sent; only whether it could be is asked.
        let free = unsafe { libc::kill(pid, 0) } == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH);
        let zombie = std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
            stat.rsplit_once(')')
                .and_then(|(_, rest)| rest.split_whitespace().next().map(|state| matches!(state, "Z" | "X")))
                .unwrap_or(false)
        });
        !free && !zombie
    }
}

/// Elsewhere nobody is known to be gone, and what is left behind is removed by its age only.
#[cfg(not(target_os = "linux"))]
mod system {
    pub fn host() -> String {
        String::new()
    }

    pub fn started(_: u32) -> Option<String> {
        None
    }

    pub fn exists(_: u32) -> bool {
        true
    }
}

/// A test's own outside, for what runs on its thread.
#[cfg(test)]
pub mod stand_in {
    use std::cell::RefCell;
    use std::sync::Arc;
    use std::time::{Duration, SystemTime};

    use futures::future::BoxFuture;

    pub trait Outside: Send + Sync {
        fn now(&self) -> SystemTime;
        fn sleep(&self, time: Duration) -> BoxFuture<'static, ()>;
        fn unique(&self) -> String;
        fn host(&self) -> String;
        fn process(&self) -> u32;
        fn started(&self, pid: u32) -> Option<String>;
    }

    thread_local! {
        static OUTSIDE: RefCell<Option<Arc<dyn Outside>>> = const { RefCell::new(None) };
    }

    pub fn get() -> Option<Arc<dyn Outside>> {
        OUTSIDE.with_borrow(Clone::clone)
    }

    pub fn set(outside: Option<Arc<dyn Outside>>) {
        OUTSIDE.set(outside);
    }
}
