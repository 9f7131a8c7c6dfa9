//! The checksum of a file's end, taken while it is written.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use xxhash_rust::xxh3::Xxh3;

/// Keeps the checksum of what is written from some moment to the end, so that nobody has to read it back.
#[derive(Clone, Default)]
pub struct TailRecorder(Arc<Mutex<Option<(Xxh3, u64)>>>);

impl TailRecorder {
    fn tail(&self) -> MutexGuard<'_, Option<(Xxh3, u64)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What follows belongs to it.
    pub fn start(&self) {
        *self.tail() = Some((Xxh3::new(), 0));
    }

    /// Bytes that were written.
    pub fn push(&self, bytes: &[u8]) {
        if let Some((sum, total)) = self.tail().as_mut() {
            sum.update(bytes);
            *total += bytes.len() as u64;
        }
    }

    /// `xxh3_64` of the tail and its bytes, where there is one.
    pub fn checksum(&self) -> Option<(u64, u64)> {
        self.tail().as_ref().map(|(sum, bytes)| (sum.digest(), *bytes))
    }
}
