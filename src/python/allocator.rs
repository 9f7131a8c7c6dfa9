//! The extension's allocator. Batches are tens of megabytes, allocated and freed at the speed of memory; the C library gives
//! such blocks back to the system each time and gets them again page by page, which takes more time than filling them. Here
//! they are kept and used again while work goes on, and given back when it ends.

use std::ffi::{CStr, c_char};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Freed pages are kept for ten seconds, or until [`give_back`]; large blocks live with the others, so that they are too.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static OPTIONS: Option<&'static c_char> = {
    const TEXT: &CStr = c"dirty_decay_ms:10000,oversize_threshold:0,narenas:8";
    // SAFETY: a constant C string lives for ever.
    Some(unsafe { &*TEXT.as_ptr() })
};

/// Give all memory that is free back to the system.
pub fn give_back() {
    // 4096 stands for all arenas (MALLCTL_ARENAS_ALL).
    const PURGE: &CStr = c"arena.4096.purge";
    // SAFETY: the control takes and returns nothing.
    unsafe {
        tikv_jemalloc_sys::mallctl(PURGE.as_ptr(), std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut(), 0);
    }
}
