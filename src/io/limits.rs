//! What the system lets this process have.

/// Files that are open where the system does not say how many.
#[cfg(unix)]
const OPEN_FILES: usize = 24;

/// Files that this process may still open; `usize::MAX` where nothing limits them.
#[cfg(unix)]
pub fn files_left() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes the structure that it is given, and nothing else.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0;
    if !known || limit.rlim_cur == libc::RLIM_INFINITY {
        return usize::MAX;
    }
    let open = std::fs::read_dir("/dev/fd").map_or(OPEN_FILES, Iterator::count);
    usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX).saturating_sub(open)
}

#[cfg(not(unix))]
pub fn files_left() -> usize {
    usize::MAX
}

#[cfg(all(test, unix))]
mod tests {
    #[test]
    fn some_files_are_left() {
        assert!(super::files_left() > 0);
    }
}
