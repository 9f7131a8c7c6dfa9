//! What a target may take, and what counts as a find: memory beyond a cap, a panic of this project's code, an internal error.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The most that one request may ask for, and that all blocks may take: inputs are of some kilobytes.
const MOST_AT_ONCE: usize = 128 << 20;
const MOST: usize = 384 << 20;

/// The system's allocator, as on a machine with little memory: what is beyond the cap cannot be had. Whoever can do without goes on with
/// an error; whoever cannot aborts, which is a find.
pub struct Capped;

#[global_allocator]
static ALLOCATOR: Capped = Capped;

static HELD: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static TELLING: Cell<bool> = const { Cell::new(false) };
}

/// Whether so many more bytes may be had. Who asked for them is shown where `FUZZ_TRACE` is set.
fn may_take(bytes: usize) -> bool {
    let held = HELD.fetch_add(bytes, Ordering::Relaxed);
    if bytes <= MOST_AT_ONCE && held + bytes <= MOST {
        return true;
    }
    HELD.fetch_sub(bytes, Ordering::Relaxed);
    if !TELLING.replace(true) {
        eprintln!("fuzz: {bytes} bytes were asked for while {held} were held");
        if std::env::var_os("FUZZ_TRACE").is_some() {
            eprintln!("{}", Backtrace::force_capture());
        }
        TELLING.set(false);
    }
    false
}

// SAFETY: every block is the system's, with the layout that the caller gave.
unsafe impl GlobalAlloc for Capped {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !may_take(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: as the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !may_take(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: as the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller's.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if !may_take(new_size) {
            return std::ptr::null_mut();
        }
        // SAFETY: as the caller's.
        let moved = unsafe { System.realloc(block, layout, new_size) };
        let freed = if moved.is_null() { new_size } else { layout.size() };
        HELD.fetch_sub(freed, Ordering::Relaxed);
        moved
    }
}

/// Whether a panic is one of this project's own code, or of a target's check. Lance's decoders may panic on damaged bytes where that is
/// caught; ours may not, caught or not.
fn is_ours(panic: &PanicHookInfo<'_>) -> bool {
    // Cargo names the files of a workspace's members from its root, those of dependencies from the root of the disk.
    panic.location().is_none_or(|location| !location.file().starts_with('/'))
}

/// End the process, as a find, where anything of ours panics.
pub fn install() {
    std::panic::set_hook(Box::new(|panic| {
        if is_ours(panic) {
            eprintln!("fuzz: {panic}\n{}", Backtrace::capture());
            std::process::abort();
        }
        if std::env::var_os("FUZZ_TRACE").is_some() {
            eprintln!("fuzz: not ours: {panic}\n{}", Backtrace::force_capture());
        }
    }));
}
