//! The checksum over decoded content: a wrapping sum over rows of `xxh3_64(code, seed = row id)`.
//!
//! A sum over rows depends on neither batching, nor ranges, nor the order of reading, so the writer takes it while the rows
//! are hot and the finalizer checks it while it reads, with no state between ranges.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The checksum of some rows; add the values of several with `wrapping_add`.
pub fn checksum(row_ids: &[u64], codes: &[u8], code_width: usize) -> u64 {
    row_ids
        .iter()
        .zip(codes.chunks_exact(code_width))
        .fold(0, |sum: u64, (row_id, code)| sum.wrapping_add(xxh3_64_with_seed(code, *row_id)))
}

/// `checksum` as the manifest spells it.
pub fn to_hex(checksum: u64) -> String {
    format!("{checksum:016x}")
}

/// What [`to_hex`] made.
pub fn from_hex(text: &str) -> Option<u64> {
    (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok()).flatten()
}
