//! The writer's memory, planned before the first row: how the limit is shared between staging, sorting and writing.

use crate::error::{Error, Result};

const DEFAULT_LIMIT: u64 = 1 << 30;
/// What the process needs per open bucket file beside its buffer: the Lance writer and its page list.
const FILE_OVERHEAD: usize = 16 * 1024;
/// What is kept per partition until the manifest is written: its ranges and checksum.
const PARTITION_OVERHEAD: usize = 96;
/// Fewer staged rows than this make runs too short to be worth reading.
const MIN_STAGE_ROWS: usize = 4096;

/// Larger runs are written in several pages.
const MAX_CHUNK_BYTES: usize = 2 << 20;

/// Shares of a memory limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    pub limit: u64,
    /// Rows of one stage. Two stages exist: one fills while the other is grouped and written.
    pub stage_rows: usize,
    /// Rows handed to a file at once.
    pub chunk_rows: usize,
    /// Threads that gather, hash and write.
    pub threads: usize,
}

/// 1 GiB or a quarter of the machine's memory, whichever is less.
pub fn default_limit() -> u64 {
    total_memory().map_or(DEFAULT_LIMIT, |total| DEFAULT_LIMIT.min(total / 4))
}

#[cfg(target_os = "linux")]
fn total_memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let line = read("/proc/meminfo")?.lines().find(|l| l.starts_with("MemTotal:"))?.to_string();
    let total = line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024;
    // A container may have less than the machine.
    let cgroup = read("/sys/fs/cgroup/memory.max").and_then(|max| max.trim().parse::<u64>().ok());
    Some(cgroup.map_or(total, |max| max.min(total)))
}

#[cfg(not(target_os = "linux"))]
fn total_memory() -> Option<u64> {
    None
}

impl MemoryPlan {
    /// Share `limit` bytes between two stages, the sort and `threads` writers with `num_buckets` open files of
    /// `open_file_bytes` each.
    pub fn try_new(
        limit: u64,
        code_width: usize,
        num_partitions: usize,
        num_buckets: usize,
        open_file_bytes: usize,
        threads: usize,
    ) -> Result<Self> {
        let row_bytes = 8 + 4 + code_width;
        let fixed = num_buckets * (open_file_bytes + FILE_OVERHEAD) + num_partitions * (PARTITION_OVERHEAD + 4 * (threads + 2));
        let usable = usize::try_from(limit).unwrap_or(usize::MAX);
        // A gathered chunk per thread, which is to stay in its cache, and as much again for what its growth leaves behind.
        let chunk_bytes = (usable / (16 * threads)).clamp(64 * 1024, MAX_CHUNK_BYTES);
        let writing = threads * 2 * chunk_bytes;
        let per_row = 2 * row_bytes + 4;
        let stage_rows = usable.saturating_sub(fixed + writing) / per_row;
        if stage_rows < MIN_STAGE_ROWS {
            // Writing takes an eighth, or the smallest chunks where an eighth is less.
            let staged = fixed + MIN_STAGE_ROWS * per_row;
            let needed = (staged / 7 * 8 + 64).max(staged + threads * 2 * 64 * 1024);
            return Err(Error::invalid(format!(
                "memory_limit: got {limit} bytes, expected at least {} for {num_partitions} partitions in {num_buckets} buckets with codes of {code_width} bytes; raise memory_limit or lower num_buckets",
                needed.next_multiple_of(1 << 20)
            )));
        }
        Ok(Self {
            limit,
            // Rows of a stage are counted in 32 bits.
            stage_rows: stage_rows.min(u32::MAX as usize / 2),
            chunk_rows: (chunk_bytes / row_bytes).max(1),
            threads,
        })
    }

    /// The most buckets whose open files take at most a quarter of the limit.
    pub fn max_buckets(limit: u64, open_file_bytes: usize) -> usize {
        (usize::try_from(limit / 4).unwrap_or(usize::MAX) / (open_file_bytes + FILE_OVERHEAD)).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_stay_below_the_limit() {
        for limit in [32u64 << 20, 256 << 20, 1 << 30, 8 << 30] {
            for (width, partitions, buckets, threads) in [(64, 1024, 256, 4), (8, 65536, 256, 16), (96, 16, 16, 1)] {
                let Ok(plan) = MemoryPlan::try_new(limit, width, partitions, buckets, 32 * 1024, threads) else {
                    assert!(limit < 64 << 20, "{limit} {width} {partitions}");
                    continue;
                };
                let row = 12 + width;
                let used = plan.stage_rows * (2 * row + 4) + threads * 2 * plan.chunk_rows * row + buckets * (32 * 1024 + FILE_OVERHEAD);
                assert!(used as u64 <= limit, "{plan:?} uses {used}");
            }
        }
    }

    #[test]
    fn a_limit_too_small_is_refused_with_the_one_that_works() {
        let error = MemoryPlan::try_new(1 << 20, 64, 1024, 256, 32 * 1024, 4).unwrap_err().to_string();
        let needed: u64 = error.split("at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(MemoryPlan::try_new(needed, 64, 1024, 256, 32 * 1024, 4).is_ok(), "{error}");
    }
}
