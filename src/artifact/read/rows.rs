//! Rows that were read, and which of them are whose, without a copy: a few bytes for each range, however many there are.

use std::ops::Range;

use arrow_array::RecordBatch;
use arrow_array::cast::AsArray;
use arrow_array::types::{UInt8Type, UInt32Type, UInt64Type};

use crate::artifact::format::{PART_ID_COLUMN, checksum};
use crate::error::{Error, Result};

/// A range of rows of a file that is asked for. In the order of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WantedRange {
    pub start: u64,
    pub end: u64,
    /// Of its partition in the window.
    pub partition: u32,
    /// Of the range in its partition.
    pub index: u32,
}

/// The fewest ranges that hold what is wanted.
pub fn merge_adjacent(ranges: &[WantedRange]) -> Vec<Range<u64>> {
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for WantedRange { start, end, .. } in ranges {
        match merged.last_mut() {
            Some(last) if last.end == *start => last.end = *end,
            _ => merged.push(*start..*end),
        }
    }
    merged
}

/// Row ids and codes of a batch with the columns of [`partition_schema`].
pub fn row_ids_and_codes(batch: &RecordBatch) -> (&[u64], &[u8]) {
    let codes = batch.column(1).as_fixed_size_list();
    let width = codes.value_length() as usize;
    let start = codes.value_offset(0) as usize;
    let codes = &codes.values().as_primitive::<UInt8Type>().values()[start..start + batch.num_rows() * width];
    (batch.column(0).as_primitive::<UInt64Type>().values(), codes)
}

/// Consecutive rows of one partition in a batch.
#[derive(Debug, Clone, Copy)]
struct Slice {
    partition: u32,
    /// Of its range in the partition.
    index: u32,
    batch: u32,
    first: u32,
    rows: u32,
}

/// The rows of consecutive partitions.
#[derive(Debug)]
pub struct PartitionRows {
    window: Range<usize>,
    batches: Vec<RecordBatch>,
    /// By partition, and each in the order of its ranges.
    slices: Vec<Slice>,
    /// Where the slices of each partition begin.
    starts: Vec<u32>,
    transposed: bool,
}

impl PartitionRows {
    pub(super) fn new(window: Range<usize>) -> Self {
        Self { window, batches: Vec::new(), slices: Vec::new(), starts: Vec::new(), transposed: false }
    }

    /// Rows from elsewhere: partitions of these `sizes` one after the other in a batch of row ids and codes. `transposed`: the codes of
    /// each lie byte by byte.
    pub fn of_batch(window: Range<usize>, batch: RecordBatch, sizes: &[usize], transposed: bool) -> Self {
        let mut first = 0;
        let slices = sizes.iter().zip(0u32..).map(|(rows, partition)| {
            let slice = Slice { partition, index: 0, batch: 0, first, rows: *rows as u32 };
            first += slice.rows;
            slice
        });
        let mut rows = Self { slices: slices.collect(), batches: vec![batch], transposed, ..Self::new(window) };
        rows.sort();
        rows
    }

    /// What was read of one file, for the ranges that were asked for.
    pub(super) fn add(&mut self, ranges: &[WantedRange], batches: Vec<RecordBatch>, code_width: usize) -> Result<()> {
        let mut left = ranges.iter().copied();
        let mut range = left.next();
        for batch in batches {
            let width = batch.column(1).as_fixed_size_list().value_length() as usize;
            if width != code_width {
                return Err(Error::corrupt(format!("codes of {width} bytes, expected {code_width}")));
            }
            let part_ids = batch.column_by_name(PART_ID_COLUMN).map(|ids| ids.as_primitive::<UInt32Type>().values());
            let mut row = 0;
            while row < batch.num_rows()
                && let Some(now) = &mut range
            {
                let rows = ((now.end - now.start) as usize).min(batch.num_rows() - row);
                let partition = self.window.start + now.partition as usize;
                if let Some(other) = part_ids.and_then(|ids| ids[row..row + rows].iter().find(|id| **id as usize != partition)) {
                    return Err(Error::corrupt(format!("a row of partition {other} lies in a range of partition {partition}")));
                }
                self.slices.push(Slice {
                    partition: now.partition,
                    index: now.index,
                    batch: self.batches.len() as u32,
                    first: row as u32,
                    rows: rows as u32,
                });
                row += rows;
                now.start += rows as u64;
                if now.start == now.end {
                    range = left.next();
                }
            }
            self.batches.push(batch);
        }
        Ok(())
    }

    /// A partition keeps the order of its ranges, whatever their place in the file.
    pub(super) fn sort(&mut self) {
        self.slices.sort_by_key(|slice| (slice.partition, slice.index));
        let partitions = 0..=self.window.len() as u32;
        self.starts = partitions.map(|p| self.slices.partition_point(|slice| slice.partition < p) as u32).collect();
    }

    /// Whether the codes of each run lie byte by byte: the first of all its rows, then the second.
    pub fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// Partitions.
    pub fn len(&self) -> usize {
        self.window.len()
    }

    pub fn is_empty(&self) -> bool {
        self.window.is_empty()
    }

    fn of(&self, place: usize) -> &[Slice] {
        &self.slices[self.starts[place] as usize..self.starts[place + 1] as usize]
    }

    /// Rows of the partition at a place of the window.
    pub fn num_rows(&self, place: usize) -> usize {
        self.of(place).iter().map(|slice| slice.rows as usize).sum()
    }

    /// Row ids and codes of the partition at a place of the window, run by run.
    pub fn runs(&self, place: usize) -> impl Iterator<Item = (&[u64], &[u8])> {
        self.of(place).iter().map(|slice| {
            let (row_ids, codes) = row_ids_and_codes(&self.batches[slice.batch as usize]);
            let width = codes.len() / row_ids.len().max(1);
            let rows = slice.first as usize..slice.first as usize + slice.rows as usize;
            (&row_ids[rows.clone()], &codes[rows.start * width..rows.end * width])
        })
    }

    /// Row ids of all partitions, run by run.
    pub fn row_ids(&self) -> impl Iterator<Item = &[u64]> {
        (0..self.len()).flat_map(|place| self.runs(place).map(|(row_ids, _)| row_ids))
    }

    /// The partition at a place of the window as batches of row ids and codes.
    pub fn batches(&self, place: usize) -> Vec<RecordBatch> {
        let columns = |batch: &RecordBatch| if batch.num_columns() > 2 { batch.project(&[0, 1]).ok() } else { Some(batch.clone()) };
        let slice =
            |slice: &Slice| columns(&self.batches[slice.batch as usize]).map(|b| b.slice(slice.first as usize, slice.rows as usize));
        self.of(place).iter().filter_map(slice).collect()
    }

    pub(super) fn checksum(&self, place: usize, code_width: usize) -> u64 {
        self.runs(place).fold(0, |sum: u64, (row_ids, codes)| sum.wrapping_add(checksum(row_ids, codes, code_width)))
    }
}
