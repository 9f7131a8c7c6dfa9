//! Staging: encoded rows copied into flat columns, and the order in which they go to the bucket files.

use std::collections::TryReserveError;
use std::mem::MaybeUninit;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use rayon::prelude::*;

use crate::sync::{fan_out, locked};

/// Rows waiting to be grouped. Columns are flat so that what they hold is what they cost.
#[derive(Debug, Default)]
pub struct Stage {
    pub row_ids: Vec<u64>,
    pub part_ids: Vec<u32>,
    pub codes: Vec<u8>,
}

impl Stage {
    /// Room for `rows` rows; memory is taken as they come.
    pub fn try_with_capacity(rows: usize, code_width: usize) -> Result<Self, TryReserveError> {
        let mut stage = Self::default();
        stage.row_ids.try_reserve_exact(rows)?;
        stage.part_ids.try_reserve_exact(rows)?;
        stage.codes.try_reserve_exact(rows.saturating_mul(code_width))?;
        Ok(stage)
    }

    pub fn len(&self) -> usize {
        self.row_ids.len()
    }

    /// Rows that there is room for.
    pub fn capacity(&self) -> usize {
        self.row_ids.capacity()
    }

    pub fn is_empty(&self) -> bool {
        self.row_ids.is_empty()
    }

    /// Make room for `rows` more, of `most` in all, where there is none: half as much again as there was, so that rows are moved
    /// a few times at most.
    pub fn try_reserve(&mut self, rows: usize, most: usize, code_width: usize) -> Result<(), TryReserveError> {
        let needed = self.len() + rows;
        if needed <= self.row_ids.capacity() {
            return Ok(());
        }
        let room = (self.row_ids.capacity() / 2 * 3).clamp(needed, most.max(needed)) - self.len();
        self.row_ids.try_reserve_exact(room)?;
        self.part_ids.try_reserve_exact(room)?;
        self.codes.try_reserve_exact(room.saturating_mul(code_width))
    }

    /// Copy rows in, with the help of other threads where there are many; the caller keeps within the capacity.
    pub fn extend(&mut self, row_ids: &[u64], part_ids: &[u32], codes: &[u8]) {
        if codes.len() < 4 * COPY_BYTES {
            self.row_ids.extend_from_slice(row_ids);
            self.part_ids.extend_from_slice(part_ids);
            self.codes.extend_from_slice(codes);
            return;
        }
        copy_all(self, row_ids, part_ids, codes);
        let (rows, bytes) = (self.row_ids.len() + row_ids.len(), self.codes.len() + codes.len());
        // SAFETY: `copy_all` has made room for the new values, and copied all pieces of all three, each to its place.
        unsafe {
            self.row_ids.set_len(rows);
            self.part_ids.set_len(rows);
            self.codes.set_len(bytes);
        }
    }

    pub fn clear(&mut self) {
        self.row_ids.clear();
        self.part_ids.clear();
        self.codes.clear();
    }
}

/// Bytes that one thread copies at a time.
const COPY_BYTES: usize = 256 * 1024;

/// Most of the time of a copy goes into getting the pages of fresh memory from the system, which one thread does at a fifth of
/// the speed of the memory.
const MAX_COPY_THREADS: usize = 8;

/// Values, and the place they go to.
enum Piece<'a> {
    RowIds(&'a mut [MaybeUninit<u64>], &'a [u64]),
    PartIds(&'a mut [MaybeUninit<u32>], &'a [u32]),
    Codes(&'a mut [MaybeUninit<u8>], &'a [u8]),
}

impl Piece<'_> {
    fn copy(self) {
        match self {
            Self::RowIds(to, from) => {
                to.write_copy_of_slice(from);
            }
            Self::PartIds(to, from) => {
                to.write_copy_of_slice(from);
            }
            Self::Codes(to, from) => {
                to.write_copy_of_slice(from);
            }
        }
    }
}

/// Copy rows to where they belong behind the stage's, which does not count them yet.
fn copy_all(stage: &mut Stage, row_ids: &[u64], part_ids: &[u32], codes: &[u8]) {
    let copies = Mutex::new(Vec::new());
    let mut pieces = locked(&copies);
    plan(&mut stage.row_ids, row_ids, &mut pieces, Piece::RowIds);
    plan(&mut stage.part_ids, part_ids, &mut pieces, Piece::PartIds);
    plan(&mut stage.codes, codes, &mut pieces, Piece::Codes);
    drop(pieces);
    let copy = || {
        loop {
            let piece = locked(&copies).pop();
            match piece {
                Some(piece) => piece.copy(),
                None => return,
            }
        }
    };
    // Threads of its own, not those that programs share: this one holds the builder's lock.
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_COPY_THREADS);
    fan_out(threads, "lance-artifact-copy", copy);
}

/// Make room for `from` behind the values of `to`, and cut the copy into pieces.
fn plan<'a, T: Copy>(
    to: &'a mut Vec<T>,
    from: &'a [T],
    pieces: &mut Vec<Piece<'a>>,
    piece: impl Fn(&'a mut [MaybeUninit<T>], &'a [T]) -> Piece<'a>,
) {
    to.reserve(from.len());
    let values = (COPY_BYTES / size_of::<T>()).max(1);
    let room = &mut to.spare_capacity_mut()[..from.len()];
    pieces.extend(room.chunks_mut(values).zip(from.chunks(values)).map(|(to, from)| piece(to, from)));
}

/// Partitions in the order of the files: bucket after bucket, and by id within a bucket.
#[derive(Debug)]
pub struct BucketOrder {
    /// Rank of each partition.
    rank: Vec<u32>,
    /// Partition of each rank.
    partition: Vec<u32>,
    /// Ranks of each bucket: `bucket_start[b]..bucket_start[b + 1]`.
    bucket_start: Vec<u32>,
}

impl BucketOrder {
    pub fn new(num_partitions: usize, num_buckets: usize) -> Self {
        let mut rank = vec![0; num_partitions];
        let mut partition = Vec::with_capacity(num_partitions);
        let mut bucket_start = Vec::with_capacity(num_buckets + 1);
        for bucket in 0..num_buckets {
            bucket_start.push(partition.len() as u32);
            for id in (bucket..num_partitions).step_by(num_buckets) {
                rank[id] = partition.len() as u32;
                partition.push(id as u32);
            }
        }
        bucket_start.push(partition.len() as u32);
        Self { rank, partition, bucket_start }
    }

    pub fn bucket_ranks(&self, bucket: usize) -> std::ops::Range<usize> {
        self.bucket_start[bucket] as usize..self.bucket_start[bucket + 1] as usize
    }

    pub fn partition(&self, rank: usize) -> u32 {
        self.partition[rank]
    }
}

/// Which staged row goes where: `rows[starts[rank]..starts[rank + 1]]` are the rows of the partition of that rank, in the
/// order of their arrival.
#[derive(Debug)]
pub struct SortedRows {
    /// Every place is written once, by one thread: relaxed atomics cost what plain numbers do and need no unsafe code.
    pub rows: Vec<AtomicU32>,
    pub starts: Vec<u32>,
}

/// A stable counting sort of the staged rows by rank, in parallel: each thread counts its slice, a prefix sum over
/// (rank, slice) gives each its places, and each writes only those. One slice is sorted without Rayon's threads.
pub fn sort(stage: &Stage, order: &BucketOrder, threads: usize) -> SortedRows {
    let partitions = order.partition.len();
    let rows = stage.len();
    let slice = rows.div_ceil(threads.max(1)).max(1);
    let alone = slice >= rows;
    let count = |part_ids: &[u32]| {
        let mut counts = vec![0u32; partitions];
        for part_id in part_ids {
            counts[order.rank[*part_id as usize] as usize] += 1;
        }
        counts
    };
    let mut counts: Vec<Vec<u32>> =
        if alone { vec![count(&stage.part_ids)] } else { stage.part_ids.par_chunks(slice).map(count).collect() };
    let mut starts = Vec::with_capacity(partitions + 1);
    let mut next = 0u32;
    for rank in 0..partitions {
        starts.push(next);
        for counts in &mut counts {
            next += std::mem::replace(&mut counts[rank], next);
        }
    }
    starts.push(next);
    let place = |places: &[AtomicU32], first: u32, part_ids: &[u32], next: &mut [u32]| {
        for (row, part_id) in (first..).zip(part_ids) {
            let place = &mut next[order.rank[*part_id as usize] as usize];
            places[*place as usize].store(row, Ordering::Relaxed);
            *place += 1;
        }
    };
    let places: Vec<AtomicU32> = if alone {
        let places: Vec<_> = (0..rows).map(|_| AtomicU32::new(0)).collect();
        place(&places, 0, &stage.part_ids, &mut counts[0]);
        places
    } else {
        let places: Vec<_> = (0..rows).into_par_iter().map(|_| AtomicU32::new(0)).collect();
        let slices = stage.part_ids.par_chunks(slice).zip(counts.par_iter_mut()).enumerate();
        slices.for_each(|(index, (part_ids, next))| place(&places, (index * slice) as u32, part_ids, next));
        places
    };
    SortedRows { rows: places, starts }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorts_by_bucket_then_partition_and_keeps_arrival_order() {
        let order = BucketOrder::new(5, 2);
        let mut stage = Stage::try_with_capacity(8, 1).unwrap();
        let part_ids = [4, 1, 0, 3, 2, 0, 1, 4];
        for (row, part_id) in part_ids.iter().enumerate() {
            stage.extend(&[row as u64], &[*part_id], &[0]);
        }
        for threads in [1, 2, 3, 16] {
            let sorted = sort(&stage, &order, threads);
            let rows: Vec<u32> = sorted.rows.into_iter().map(AtomicU32::into_inner).collect();
            let partitions: Vec<u32> = rows.iter().map(|row| part_ids[*row as usize]).collect();
            assert_eq!(partitions, [0, 0, 2, 4, 4, 1, 1, 3]);
            assert_eq!(rows, [2, 5, 4, 0, 7, 1, 6, 3]);
            assert_eq!(sorted.starts, [0, 2, 3, 5, 7, 8]);
        }
        assert_eq!(order.bucket_ranks(0), 0..3);
        assert_eq!(order.bucket_ranks(1), 3..5);
        assert_eq!(order.partition(3), 1);
    }
}
