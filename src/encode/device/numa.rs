//! Host memory near a device: copies from the memory of another processor's node share the link between the two.

/// Runs `work` while memory that this thread touches first is taken from `node`, as far as that has some. Where the system does not let a
/// process choose (some containers), it is as if nothing had been asked for.
#[cfg(target_os = "linux")]
pub fn near<T>(node: Option<u32>, work: impl FnOnce() -> T) -> T {
    let before = Policy::get();
    let changed = match (node, &before) {
        (Some(node), Some(_)) => Policy::preferring(node).is_some_and(|policy| policy.set()),
        _ => false,
    };
    // Put back also where the work panics.
    let _back = changed.then_some(Back(before));
    work()
}

#[cfg(not(target_os = "linux"))]
pub fn near<T>(_: Option<u32>, work: impl FnOnce() -> T) -> T {
    work()
}

/// Where the pages of a thread come from (`set_mempolicy(2)`).
#[cfg(target_os = "linux")]
#[derive(Debug, Clone, PartialEq, Eq)]
struct Policy {
    mode: libc::c_int,
    nodes: [u64; Policy::WORDS],
}

#[cfg(target_os = "linux")]
impl Policy {
    /// As many nodes as a kernel has at most.
    const WORDS: usize = 1024 / 64;
    const PREFERRED: libc::c_int = 1;

    fn get() -> Option<Self> {
        let mut policy = Self { mode: 0, nodes: [0; Self::WORDS] };
        // SAFETY: writes one integer and a mask of the length that is said.
        let done = unsafe {
            libc::syscall(libc::SYS_get_mempolicy, &raw mut policy.mode, policy.nodes.as_mut_ptr(), Self::WORDS * 64, 0usize, 0usize)
        };
        (done == 0).then_some(policy)
    }

    fn preferring(node: u32) -> Option<Self> {
        let mut nodes = [0; Self::WORDS];
        *nodes.get_mut(node as usize / 64)? |= 1 << (node % 64);
        Some(Self { mode: Self::PREFERRED, nodes })
    }

    fn set(&self) -> bool {
        let none = self.nodes.iter().all(|word| *word == 0);
        let nodes = if none { std::ptr::null() } else { self.nodes.as_ptr() };
        // The kernel looks at one bit less than it is told.
        let bits = if none { 0 } else { Self::WORDS * 64 + 1 };
        // SAFETY: reads a mask of the length that is said; changes only where this thread's new pages come from.
        unsafe { libc::syscall(libc::SYS_set_mempolicy, self.mode, nodes, bits) == 0 }
    }
}

#[cfg(target_os = "linux")]
struct Back(Option<Policy>);

#[cfg(target_os = "linux")]
impl Drop for Back {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            before.set();
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_policy_of_the_thread_is_what_it_was() {
        let Some(before) = Policy::get() else { return };
        let within = near(Some(0), Policy::get).unwrap();
        // Where a container forbids it, nothing changes.
        assert!(within == before || Some(&within) == Policy::preferring(0).as_ref(), "{within:?}");
        assert_eq!(Policy::get().unwrap(), before);
        let panicked = std::panic::catch_unwind(|| near(Some(0), || panic!("work")));
        assert!(panicked.is_err());
        assert_eq!(Policy::get().unwrap(), before);
        // A node that there is not, and none.
        assert_eq!(near(Some(100_000), || 7), 7);
        assert_eq!(near(None, Policy::get).unwrap(), before);
    }
}
