//! Memory, counted in bytes: what one call may hold, shared by whatever holds memory for it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Result};

/// Permits are of so many bytes: their number fits 32 bits up to 16 TiB.
const UNIT: u64 = 4096;

/// Bytes that a call may hold. Cheap to clone; clones share them.
#[derive(Debug, Clone)]
pub struct Budget {
    free: Arc<Semaphore>,
    limit: u64,
    /// Units that are held to the end.
    kept: Arc<AtomicU32>,
    /// Resident bytes of the process above which the allocator is asked for what it keeps.
    high: u64,
}

/// Bytes that are held until this is dropped.
#[derive(Debug)]
pub struct Reservation {
    permit: OwnedSemaphorePermit,
    /// Where they are held to the end: how many units are.
    kept: Option<Arc<AtomicU32>>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(kept) = &self.kept {
            kept.fetch_sub(self.permit.num_permits() as u32, Ordering::Relaxed);
        }
    }
}

/// Of an allocator that keeps freed memory.
static GIVE_BACK: OnceLock<fn()> = OnceLock::new();

/// Say how the allocator gives back what it keeps.
pub fn set_give_back(give_back: fn()) {
    let _ = GIVE_BACK.set(give_back);
}

/// Have the allocator give back what it keeps. Where there is plenty, memory is better used again.
pub fn settle(limit: u64) {
    if let Some(give_back) = GIVE_BACK.get().filter(|_| limit < PLENTY) {
        give_back();
    }
}

/// A limit that few calls come near.
const PLENTY: u64 = 2 << 30;

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

impl Budget {
    pub fn new(limit: u64) -> Self {
        // What earlier calls freed is none of this one's.
        settle(limit);
        let high = resident().map_or(u64::MAX, |now| now.saturating_add(limit - limit / 4));
        Self { free: Arc::new(Semaphore::new(Self::permits(limit) as usize)), limit, kept: Arc::default(), high }
    }

    /// Whole units: what is left over is nobody's.
    fn permits(limit: u64) -> u32 {
        u32::try_from(limit / UNIT).unwrap_or(u32::MAX)
    }

    /// All there is.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// What nobody holds now.
    pub fn free(&self) -> u64 {
        self.free.available_permits() as u64 * UNIT
    }

    /// What is held now.
    pub fn held(&self) -> u64 {
        u64::from(Self::permits(self.limit)) * UNIT - self.free()
    }

    /// Wait for bytes, in the order of those who ask. More than can ever be free are all that can: what cannot be made smaller goes on
    /// alone. Not to be held while more is waited for: see [`Self::hold`].
    pub async fn reserve(&self, bytes: u64) -> Result<Reservation> {
        let most = Self::permits(self.limit).saturating_sub(self.kept.load(Ordering::Relaxed));
        let permit = self.free.clone().acquire_many_owned(units(bytes).min(most)).await;
        permit.map(|permit| Reservation { permit, kept: None }).map_err(|_| Error::internal("a budget is closed"))
    }

    /// Have the allocator give back what it keeps, for those who come next.
    pub fn settle(&self) {
        settle(self.limit);
    }

    /// Have the allocator give back what it keeps of freed memory, where this process comes near the limit. To be called where memory
    /// was freed, or is about to be taken.
    pub fn relieve(&self) {
        if let Some(give_back) = GIVE_BACK.get()
            && resident().is_some_and(|now| now > self.high)
        {
            give_back();
        }
    }

    /// Bytes that are held to the end; an error that says how many would do where there are too few. `least` must be free
    /// afterwards.
    pub fn hold(&self, bytes: u64, what: &str, least: u64) -> Result<Reservation> {
        // What is taken are whole units.
        let (free, units) = (self.free(), units(bytes));
        let taken = u64::from(units).saturating_mul(UNIT).max(bytes);
        let held = if free >= taken.saturating_add(least) { self.free.clone().try_acquire_many_owned(units).ok() } else { None };
        let kept = |permit: OwnedSemaphorePermit| {
            self.kept.fetch_add(permit.num_permits() as u32, Ordering::Relaxed);
            Reservation { permit, kept: Some(self.kept.clone()) }
        };
        held.map(kept).ok_or_else(|| {
            let needed = self.held().saturating_add(taken).saturating_add(least).next_multiple_of(1 << 20);
            Error::invalid(format!("memory_limit: got {} bytes, expected at least {needed}: {what} take {bytes}", self.limit))
        })
    }
}

/// What a call may hold where nobody says: half of the memory that this machine, or the container that this process is in, has free.
pub fn default_limit() -> u64 {
    free_memory().map_or(FALLBACK, |free| free / 2).max(LEAST)
}

const FALLBACK: u64 = 2 << 30;
const LEAST: u64 = 64 << 20;

/// Bytes that can be had without swapping, as far as it is known.
pub fn free_memory() -> Option<u64> {
    let machine = meminfo("MemAvailable:");
    let container = cgroup_free();
    match (machine, container) {
        (Some(machine), Some(container)) => Some(machine.min(container)),
        (one, other) => one.or(other),
    }
}

/// Bytes of memory that this process takes.
#[cfg(target_os = "linux")]
fn resident() -> Option<u64> {
    let pages: u64 = std::fs::read_to_string("/proc/self/statm").ok()?.split_whitespace().nth(1)?.parse().ok()?;
    // SAFETY: the call takes and returns a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    Some(pages * u64::try_from(page).ok()?)
}

#[cfg(not(target_os = "linux"))]
fn resident() -> Option<u64> {
    None
}

fn meminfo(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// The least that any control group above this process has left; what it holds of files can be given back.
fn cgroup_free() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut least: Option<u64> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let (root, files) = if controllers.is_empty() {
            ("/sys/fs/cgroup", ["memory.max", "memory.current", "inactive_file"])
        } else if controllers.split(',').any(|controller| controller == "memory") {
            ("/sys/fs/cgroup/memory", ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"])
        } else {
            continue;
        };
        // In a container the path may be the host's, which is not there: the root is the container's own group.
        for group in std::path::Path::new(path.trim_start_matches('/')).ancestors() {
            if let Some(free) = group_free(&std::path::Path::new(root).join(group), files) {
                least = Some(least.map_or(free, |least| least.min(free)));
            }
        }
    }
    least
}

fn group_free(group: &std::path::Path, [max, current, reclaimable]: [&str; 3]) -> Option<u64> {
    let number = |file: &str| std::fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
    let (max, current) = (number(max)?, number(current)?);
    let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let line = stat.lines().find_map(|line| line.strip_prefix(reclaimable)?.strip_prefix(' ')?.trim().parse::<u64>().ok());
    Some(max.saturating_sub(current.saturating_sub(line.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_are_shared_and_given_back_in_order() {
        let budget = Budget::new(1 << 20);
        let first = budget.reserve(700 << 10).await.unwrap();
        assert_eq!(budget.free(), 324 << 10);
        let (clone, order) = (budget.clone(), Arc::new(std::sync::Mutex::new(Vec::new())));
        let told = order.clone();
        let large = tokio::spawn(async move {
            let held = clone.reserve(10 << 20).await.unwrap();
            told.lock().unwrap().push("large");
            drop(held);
        });
        tokio::task::yield_now().await;
        let (clone, told) = (budget.clone(), order.clone());
        let small = tokio::spawn(async move {
            let _held = clone.reserve(4096).await.unwrap();
            told.lock().unwrap().push("small");
        });
        tokio::task::yield_now().await;
        drop(first);
        large.await.unwrap();
        small.await.unwrap();
        assert_eq!(*order.lock().unwrap(), ["large", "small"]);
        assert_eq!(budget.free(), 1 << 20);
    }

    #[tokio::test]
    async fn more_than_can_be_free_is_all_that_can() {
        let budget = Budget::new(1 << 20);
        let held = budget.hold(700 << 10, "the bits of the rows", 0).unwrap();
        let soon = |bytes| tokio::time::timeout(std::time::Duration::from_secs(5), budget.reserve(bytes));
        drop(soon(800 << 10).await.expect("waits for what is held to the end").unwrap());
        assert_eq!(budget.free(), 324 << 10);
        drop(held);
        let _all = soon(10 << 20).await.unwrap().unwrap();
        assert_eq!(budget.free(), 0);
    }

    #[test]
    fn what_does_not_fit_says_what_would() {
        let budget = Budget::new(64 << 20);
        let _held = budget.hold(20 << 20, "the bits of the rows", 1 << 20).unwrap();
        let error = budget.hold(60 << 20, "the ranges of the artifacts", 4 << 20).unwrap_err().to_string();
        assert!(error.contains(&format!("expected at least {}", 84 << 20)) && error.contains("the ranges"), "{error}");
        let larger = Budget::new(84 << 20);
        let _held = larger.hold(20 << 20, "", 1 << 20).unwrap();
        assert!(larger.hold(60 << 20, "", 4 << 20).is_ok());
    }

    #[test]
    fn limits_of_no_whole_unit_say_what_would_do_too() {
        for limit in [1, 4095, 4097, u64::MAX] {
            let budget = Budget::new(limit);
            assert_eq!(budget.held(), 0);
            if limit < 1 << 20 {
                let error = budget.hold(10_000, "rows", 0).unwrap_err().to_string();
                assert!(error.contains(&format!("got {limit} bytes, expected at least {}:", 1 << 20)), "{error}");
            }
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_is_looked_up() {
        assert!(free_memory().is_some_and(|free| free > 1 << 20));
        let group = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| std::fs::write(group.path().join(file), text).unwrap();
        let v2 = ["memory.max", "memory.current", "inactive_file"];
        assert_eq!(group_free(group.path(), v2), None);
        write("memory.max", "max\n");
        write("memory.current", "500\n");
        assert_eq!(group_free(group.path(), v2), None, "no limit");
        write("memory.max", "1000\n");
        assert_eq!(group_free(group.path(), v2), Some(500));
        write("memory.stat", "anon 100\ninactive_file 300\nactive_file 5\n");
        assert_eq!(group_free(group.path(), v2), Some(800));
    }
}
