//! How the bytes of a call are shared while vectors are sampled, trained on and encoded. The shares are counted before anything is
//! read; `benches/limits.py` measures that they hold.

use crate::budget::default_limit;
use crate::error::{Error, Result};
use crate::lance::dataset::ScanOptions;

/// Vector bytes of one scanned batch, where there is memory for it: what keeps every core busy for a moment, and no more.
const CORE_BYTES: u64 = 2 << 20;
const MOST_BATCH_BYTES: u64 = 16 << 20;
const LEAST_BATCH_BYTES: u64 = 256 << 10;
/// Beside the batches read ahead: two that are encoded, and one on its way.
const OTHER_BATCHES: usize = 3;
/// The neighbours of a centroid while it is trained, and what is known of it when it is rounded.
const OF_NEIGHBOURS: u64 = 512;
/// A batch is there as it was read, and as it was decoded or prepared.
const COPIES: u64 = 2;

/// Rows and bytes of vectors that a call deals with.
#[derive(Debug, Clone, Copy)]
pub struct Vectors {
    pub dimension: usize,
    /// Of an element in the column.
    pub byte_width: usize,
}

impl Vectors {
    fn row_bytes(self) -> u64 {
        (self.dimension * self.byte_width) as u64
    }

    /// Centroids in float32, and as they are searched.
    fn tables(self, num_partitions: usize) -> u64 {
        super::cpu::table_bytes(num_partitions, self.dimension) as u64
    }

    /// Codewords likewise.
    fn codewords(self, num_bits: u32) -> u64 {
        2 * ((self.dimension * size_of::<f32>()) << num_bits.min(16)) as u64
    }
}

fn ahead() -> usize {
    std::thread::available_parallelism().map_or(4, usize::from).clamp(4, 16)
}

fn full_batch() -> u64 {
    let cores = std::thread::available_parallelism().map_or(4, usize::from) as u64;
    (cores * CORE_BYTES).clamp(2 * CORE_BYTES, MOST_BATCH_BYTES)
}

/// How a scan keeps within `bytes`; `None`: as is best for its speed.
pub fn scan_options(vectors: Vectors, bytes: Option<u64>) -> ScanOptions {
    let mut ahead = ahead();
    let mut batch_bytes = full_batch();
    if let Some(bytes) = bytes {
        let of = |ahead: usize| bytes / (COPIES * (ahead + OTHER_BATCHES) as u64);
        if of(ahead) < (1 << 20) {
            ahead = 2;
        }
        batch_bytes = of(ahead).clamp(LEAST_BATCH_BYTES, full_batch());
    }
    let most = if bytes.is_some() { 1 } else { 256 };
    ScanOptions { batch_rows: (batch_bytes / vectors.row_bytes().max(1)).clamp(most, 65_536) as u32, ahead }
}

/// What a scan that is not held back takes.
fn whole_scan() -> u64 {
    COPIES * full_batch() * (ahead() + OTHER_BATCHES) as u64
}

/// The shares of a call that encodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeShares {
    /// Of the whole call.
    pub limit: u64,
    /// Batches of vectors on their way.
    pub scan: u64,
    /// The writer's `memory_limit`.
    pub writer: u64,
}

impl EncodeShares {
    /// Of `limit` bytes, by default [`default_limit`], of which the writer then takes no more than it does by itself.
    pub fn of(limit: Option<u64>, vectors: Vectors, num_partitions: usize, num_bits: u32) -> Result<Self> {
        let all = limit.unwrap_or_else(default_limit);
        let tables = vectors.tables(num_partitions) + vectors.codewords(num_bits);
        let left = all.saturating_sub(tables);
        let scan = whole_scan().min(left / 3);
        let least = COPIES * LEAST_BATCH_BYTES.max(vectors.row_bytes()) * (2 + OTHER_BATCHES) as u64;
        if scan < least {
            let needed = (tables + 3 * least).next_multiple_of(1 << 20);
            return Err(Error::invalid(format!(
                "memory_limit: got {all} bytes, expected at least {needed}: the tables of {num_partitions} centroids of dimension {} take {tables}",
                vectors.dimension
            )));
        }
        let writer = if limit.is_some() { left - scan } else { (left - scan).min(crate::artifact::default_limit()) };
        Ok(Self { limit: all, scan, writer })
    }
}

/// What is to be trained, as far as memory goes.
#[derive(Debug, Clone, Copy)]
pub struct TrainingShape {
    pub num_partitions: usize,
    pub num_sub_vectors: usize,
    pub num_bits: u32,
    /// Vectors for each codeword.
    pub sample_rate: usize,
    /// Centroids are trained, not given.
    pub trains_centroids: bool,
}

/// The shares of a call that trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainShares {
    pub limit: u64,
    pub scan: u64,
    /// Vectors that the sample may have.
    pub rows: u64,
}

impl TrainShares {
    pub fn of(limit: Option<u64>, vectors: Vectors, shape: TrainingShape) -> Self {
        let all = limit.unwrap_or_else(default_limit);
        // The rest is the allocator's, which does not give back at once what is freed.
        let usable = all / 8 * 7;
        let scan = whole_scan().min(usable / 4);
        let float32 = (vectors.dimension * size_of::<f32>()) as u64;
        let copy = if vectors.byte_width == size_of::<f32>() { 0 } else { float32 };
        // While it is drawn: the vectors, and the order in which they are.
        let drawn = usable.saturating_sub(scan) / (vectors.row_bytes() + 16);
        // While it is trained on: labels old and new and members of the clusters; centroids, and in the order of the kernel and of
        // groups, and the neighbours of each. Where it comes in parts, sums in float64 instead of the order of the kernel.
        let tables = shape.num_partitions as u64 * (4 * float32 + OF_NEIGHBOURS);
        let row = vectors.row_bytes() + copy + 12;
        let for_centroids = if shape.trains_centroids { usable.saturating_sub(tables) / row } else { u64::MAX };
        // Then the nearest centroid of each, and one sub-vector of the residuals on every thread, with what its k-means holds.
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(shape.num_sub_vectors.max(1)) as u64;
        let of_thread = float32 / (shape.num_sub_vectors.max(1) as u64) + 12;
        let for_codewords = (1u64 << shape.num_bits.min(16)).saturating_mul(shape.sample_rate as u64);
        let quantizer = threads * of_thread * for_codewords;
        let left = usable.saturating_sub(tables + vectors.codewords(shape.num_bits));
        let for_quantizer =
            if left / row > for_codewords { left.saturating_sub(quantizer) / row } else { left / (row + threads * of_thread) };
        Self { limit: all, scan, rows: drawn.min(for_centroids).min(for_quantizer) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VECTORS: Vectors = Vectors { dimension: 128, byte_width: 4 };

    #[test]
    fn shares_of_a_build_are_within_its_limit() {
        for limit in [64u64 << 20, 256 << 20, 1 << 30, 16 << 30] {
            for num_partitions in [16, 4096, 16_384] {
                let shares = EncodeShares::of(Some(limit), VECTORS, num_partitions, 8).unwrap();
                assert!(shares.scan + shares.writer + VECTORS.tables(num_partitions) <= limit, "{shares:?}");
                assert!(shares.writer >= limit / 3, "{shares:?}");
                let options = scan_options(VECTORS, Some(shares.scan));
                let held = COPIES * u64::from(options.batch_rows) * 512 * (options.ahead + OTHER_BATCHES) as u64;
                assert!(held <= shares.scan, "{options:?} {shares:?}");
            }
        }
        let error = EncodeShares::of(Some(64 << 20), VECTORS, 65_536, 8).unwrap_err().to_string();
        let needed = error.split("at least ").nth(1).and_then(|rest| rest.split(':').next()).unwrap().parse().unwrap();
        assert!(EncodeShares::of(Some(needed), VECTORS, 65_536, 8).is_ok(), "{error}");
        assert_eq!(u64::from(scan_options(VECTORS, None).batch_rows), full_batch() / 512);
    }

    #[test]
    fn a_sample_grows_with_the_limit() {
        let shape = TrainingShape { num_partitions: 16_384, num_sub_vectors: 16, num_bits: 8, sample_rate: 256, trains_centroids: true };
        let rows = |limit: u64| TrainShares::of(Some(limit), VECTORS, shape).rows;
        assert!(rows(256 << 20) > 200_000 && rows(256 << 20) < 400_000, "{}", rows(256 << 20));
        assert!(rows(1 << 30) > 1_000_000);
        assert!(rows(4 << 30) > 5_000_000);
        assert_eq!(rows(1 << 20), 0);
        let half = Vectors { byte_width: 2, ..VECTORS };
        assert!(TrainShares::of(Some(1 << 30), half, shape).rows < rows(1 << 30));
    }
}
