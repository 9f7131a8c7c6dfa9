//! The extension's allocator. Batches are tens of megabytes, allocated and freed at the speed of memory; the C library gives
//! such blocks back to the system each time and gets them again page by page, which takes more time than filling them. Here
//! they are kept and used again while work goes on, and given back when it ends.

use std::alloc::{GlobalAlloc, Layout};
use std::ffi::{CStr, c_char};

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Reusing = Reusing;

/// Zeroed blocks up to this size are zeroed where they are. Of larger ones it may be that most is never touched.
const ZEROED_IN_PLACE: usize = 2 << 20;

/// jemalloc, but a zeroed block is a used one that is overwritten. Its own way is to give the pages back to the system and to get
/// zeroed ones at each first touch: for half a megabyte of scratch, which every task takes, a hundred faults.
struct Reusing;

// SAFETY: every block is jemalloc's, with the layout that the caller gave.
unsafe impl GlobalAlloc for Reusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller's.
        unsafe { Jemalloc.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() > ZEROED_IN_PLACE {
            // SAFETY: as the caller's.
            return unsafe { Jemalloc.alloc_zeroed(layout) };
        }
        // SAFETY: as the caller's.
        let block = unsafe { Jemalloc.alloc(layout) };
        if !block.is_null() {
            // SAFETY: the block is as large as the layout says.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as the caller's.
        unsafe { Jemalloc.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: as the caller's.
        unsafe { Jemalloc.realloc(block, layout, new_size) }
    }
}

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
