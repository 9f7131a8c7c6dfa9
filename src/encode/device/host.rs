//! Host memory as a device: copies happen at once, so its queues and events have nothing to do.

use std::cell::UnsafeCell;

use super::api::Device;
use super::tensor::DeviceMemory;
use crate::error::{Error, Result};

/// A device of ordinary memory, of at most `capacity` bytes for one allocation.
pub struct HostDevice {
    pub capacity: usize,
}

/// Memory that several owners write to, each at its own time.
pub struct SharedBytes {
    // Words, so that numbers in it are aligned.
    words: Box<[UnsafeCell<u64>]>,
    bytes: usize,
}

// SAFETY: who writes and who reads is ordered by the slots: a slot has one owner at any time.
unsafe impl Sync for SharedBytes {}

impl DeviceMemory for SharedBytes {
    fn address(&self) -> usize {
        self.words.as_ptr() as usize
    }
}

impl SharedBytes {
    fn new(bytes: usize) -> Self {
        Self { words: (0..bytes.div_ceil(8)).map(|_| UnsafeCell::new(0)).collect(), bytes }
    }

    fn pointer(&self) -> *mut u8 {
        UnsafeCell::raw_get(self.words.as_ptr()).cast()
    }
}

impl HostDevice {
    fn checked(&self, bytes: usize) -> Result<usize> {
        if bytes > self.capacity {
            return Err(Error::DeviceMemory(format!("host memory: {bytes} bytes asked for, {} there", self.capacity)));
        }
        Ok(bytes)
    }
}

impl Device for HostDevice {
    type Pinned = SharedBytes;
    type Memory = SharedBytes;
    type Stream = ();
    type Event = ();

    fn name(&self) -> String {
        "host memory".into()
    }

    fn make_current(&self) -> Result<()> {
        Ok(())
    }

    fn free_bytes(&self) -> Result<usize> {
        Ok(self.capacity)
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<SharedBytes> {
        Ok(SharedBytes::new(bytes))
    }

    fn pinned<'a>(&self, memory: &'a SharedBytes) -> &'a [u8] {
        // SAFETY: the bytes are initialised, and copies into them are over when the slot is read.
        unsafe { std::slice::from_raw_parts(memory.pointer(), memory.bytes) }
    }

    fn pinned_mut<'a>(&self, memory: &'a mut SharedBytes) -> &'a mut [u8] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(memory.pointer(), memory.bytes) }
    }

    fn allocate(&self, bytes: usize) -> Result<SharedBytes> {
        self.checked(bytes).map(SharedBytes::new)
    }

    fn stream(&self) -> Result<()> {
        Ok(())
    }

    fn event(&self) -> Result<()> {
        Ok(())
    }

    unsafe fn copy_in(&self, _: &(), source: &SharedBytes, from: usize, target: &SharedBytes, to: usize, bytes: usize) -> Result<()> {
        if from + bytes > source.bytes || to + bytes > target.bytes {
            return Err(Error::internal("a copy beyond the end of a slot"));
        }
        // SAFETY: in bounds, and the caller keeps others away from both ranges.
        unsafe { std::ptr::copy_nonoverlapping(source.pointer().add(from), target.pointer().add(to), bytes) };
        Ok(())
    }

    unsafe fn copy_out(&self, stream: &(), source: &SharedBytes, target: &SharedBytes, bytes: usize) -> Result<()> {
        // SAFETY: the same promises.
        unsafe { self.copy_in(stream, source, 0, target, 0, bytes) }
    }

    fn record(&self, _: &(), _: &()) -> Result<()> {
        Ok(())
    }

    fn wait(&self, _: &(), _: &()) -> Result<()> {
        Ok(())
    }

    fn finish(&self, _: &()) -> Result<()> {
        Ok(())
    }

    fn seconds_between(&self, _: &(), _: &()) -> Option<f64> {
        None
    }
}
