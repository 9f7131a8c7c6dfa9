//! A committed segment as a source of rows: those that are still live, and no others.
//!
//! What a segment holds is what was live when it was built. Since then rows were deleted, or updated: those that are in another fragment
//! now are another segment's. So each segment has its own bit for each live row of the fragments that it covers. How many of a
//! partition's rows are left is counted before, of row ids alone, because an index's layout must be known before it is written.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use arrow_array::{RecordBatch, UInt8Array, UInt64Array};
use futures::{StreamExt, TryStreamExt};

use super::coverage::Coverage;
use crate::artifact::format::partition_schema;
use crate::artifact::{PartitionRows, row_ids_and_codes};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::lance::dataset::Dataset;
use crate::lance::segment::{CommittedSegment, RowIdRemapper, SegmentReader};
use crate::model::fixed_size_list;

/// Bytes of row ids that are counted at once.
const COUNTED_BYTES: u64 = 1 << 20;
/// And how often side by side.
const COUNTED_AT_ONCE: usize = 4;

/// The least memory that counting takes.
pub const COUNT_BYTES: u64 = 3 * COUNTED_BYTES * COUNTED_AT_ONCE as u64;

/// The rows of a segment that are still live.
pub struct LiveSegment {
    reader: SegmentReader,
    coverage: Coverage,
    /// Live rows of each partition.
    sizes: Vec<u64>,
}

impl LiveSegment {
    /// A segment of `dataset`, at the version of which its rows are wanted.
    pub async fn open(dataset: &Dataset, segment: &CommittedSegment, remapper: Option<RowIdRemapper>) -> Result<Self> {
        let reader = SegmentReader::open(dataset, segment, remapper).await?;
        let there: HashSet<u32> = dataset.fragment_ids().into_iter().collect();
        let covered: Vec<u32> = segment.fragment_ids.iter().copied().filter(|id| there.contains(id)).collect();
        let coverage = Coverage::try_new(dataset, &covered).await?;
        Ok(Self { reader, coverage, sizes: Vec::new() })
    }

    /// Whether it has as many rows as its fragments have live ones: then each is one of those, unless rows without a usable vector were as
    /// many as rows that are gone.
    pub fn seems_live(&self) -> bool {
        self.reader.num_rows() == self.coverage.live_rows()
    }

    /// Take all of its rows for live. That is noticed where it is wrong, when they are read.
    pub fn take_for_live(&mut self) {
        self.sizes = (0..self.reader.num_partitions()).map(|partition| self.reader.partition_rows(partition)).collect();
    }

    /// Count what is live.
    pub async fn count(&mut self, budget: &Budget) -> Result<()> {
        let mut windows: Vec<Range<usize>> = Vec::new();
        let mut rows = 0;
        for partition in 0..self.reader.num_partitions() {
            let more = self.reader.partition_rows(partition);
            match windows.last_mut() {
                Some(window) if (rows + more) * 8 <= COUNTED_BYTES => window.end = partition + 1,
                _ => {
                    rows = 0;
                    windows.push(partition..partition + 1);
                }
            }
            rows += more;
        }
        let counted = futures::stream::iter(windows).map(|window| self.count_window(window, budget)).buffered(COUNTED_AT_ONCE);
        self.sizes = counted.try_concat().await?;
        Ok(())
    }

    async fn count_window(&self, window: Range<usize>, budget: &Budget) -> Result<Vec<u64>> {
        if window.len() == 1 {
            return Ok(vec![self.count_partition(window.start, budget).await?]);
        }
        budget.relieve();
        let row_ids = self.reader.row_ids(window.clone()).await?;
        let mut at = 0;
        let sizes = window.map(|partition| {
            let rows = self.reader.partition_rows(partition) as usize;
            at += rows;
            self.coverage.count(&row_ids[at - rows..at])
        });
        Ok(sizes.collect())
    }

    /// A partition alone, which may be a large one.
    async fn count_partition(&self, partition: usize, budget: &Budget) -> Result<u64> {
        let (stored, step) = (self.reader.partition_rows(partition), COUNTED_BYTES / 8);
        let mut live = 0;
        for first in (0..stored).step_by(step as usize) {
            budget.relieve();
            live += self.coverage.count(&self.reader.row_ids_of(partition, first, step.min(stored - first)).await?);
        }
        Ok(live)
    }

    pub fn reader(&self) -> &SegmentReader {
        &self.reader
    }

    /// The fragments it covers that are still there.
    pub fn fragment_ids(&self) -> &[u32] {
        self.coverage.fragment_ids()
    }

    /// Bytes of memory.
    pub fn held_bytes(&self) -> u64 {
        self.reader.held_bytes() * 2 + self.coverage.held_bytes()
    }

    /// Live rows of a partition.
    pub fn partition_rows(&self, partition: usize) -> u64 {
        self.sizes.get(partition).copied().unwrap_or_default()
    }

    /// Rows of a partition that are not live any more.
    pub fn dead_rows(&self, partition: usize) -> u64 {
        self.reader.partition_rows(partition).saturating_sub(self.partition_rows(partition))
    }

    /// Once all was read: live rows of its fragments that it does not hold.
    pub fn rows_missing(&self) -> u64 {
        self.coverage.rows_left()
    }

    /// The live rows of consecutive partitions; `row_by_row`, or as the segment has them. Of those that are not live any more,
    /// `dead_bytes` are held at once.
    pub async fn read(&self, window: Range<usize>, row_by_row: bool, dead_bytes: u64) -> Result<PartitionRows> {
        let width = self.reader.code_width();
        let dead = window.clone().map(|partition| self.dead_rows(partition)).sum::<u64>();
        if dead * (8 + width as u64) > dead_bytes {
            return self.read_in_parts(window, dead_bytes).await;
        }
        let (row_ids, codes) = self.reader.partitions(window.clone()).await?;
        let batch = RecordBatch::try_new(partition_schema(width), vec![Arc::new(row_ids), Arc::new(codes)])?;
        let transposed = self.reader.is_transposed();
        let (row_ids, bytes) = row_ids_and_codes(&batch);
        let taken = self.coverage.take(row_ids);
        if taken.iter().all(|kept| *kept) && !(transposed && row_by_row) {
            let sizes = self.stored(window.clone());
            return self.checked(window, batch, &sizes, transposed);
        }
        let mut kept = Kept::new(width, row_ids.len());
        kept.add_partitions(&self.stored(window.clone()), row_ids, bytes, &taken, transposed, row_by_row);
        self.checked(window, batch_of(kept.row_ids, kept.codes, width)?, &kept.sizes, transposed && !row_by_row)
    }

    /// The same where most rows are not live any more: row by row, some of those that are stored at a time.
    async fn read_in_parts(&self, window: Range<usize>, bytes: u64) -> Result<PartitionRows> {
        let width = self.reader.code_width();
        let most = (bytes / (8 + width as u64)).max(1);
        let live = window.clone().map(|partition| self.partition_rows(partition)).sum::<u64>();
        let mut kept = Kept::new(width, live as usize);
        let mut next = window.start;
        while next < window.end {
            let mut rows = self.reader.partition_rows(next);
            // Its rows were looked up when they were counted.
            if self.partition_rows(next) == 0 {
                kept.sizes.push(0);
                next += 1;
            } else if rows > most {
                let before = kept.row_ids.len();
                for first in (0..rows).step_by(most as usize) {
                    let (row_ids, codes) = self.reader.slice(next, first, most.min(rows - first)).await?;
                    kept.add(&row_ids, &codes, &self.coverage.take(&row_ids), false, true);
                }
                kept.sizes.push(kept.row_ids.len() - before);
                next += 1;
            } else {
                let first = next;
                next += 1;
                while next < window.end && self.partition_rows(next) > 0 && rows + self.reader.partition_rows(next) <= most {
                    rows += self.reader.partition_rows(next);
                    next += 1;
                }
                let (row_ids, codes) = self.reader.partitions(first..next).await?;
                let batch = RecordBatch::try_new(partition_schema(width), vec![Arc::new(row_ids), Arc::new(codes)])?;
                let (row_ids, bytes) = row_ids_and_codes(&batch);
                let taken = self.coverage.take(row_ids);
                kept.add_partitions(&self.stored(first..next), row_ids, bytes, &taken, self.reader.is_transposed(), true);
            }
        }
        self.checked(window, batch_of(kept.row_ids, kept.codes, width)?, &kept.sizes, false)
    }

    /// Rows of each partition as they are stored.
    fn stored(&self, window: Range<usize>) -> Vec<usize> {
        window.map(|partition| self.reader.partition_rows(partition) as usize).collect()
    }

    fn checked(&self, window: Range<usize>, batch: RecordBatch, sizes: &[usize], transposed: bool) -> Result<PartitionRows> {
        for (partition, rows) in window.clone().zip(sizes) {
            self.check(partition, *rows as u64)?;
        }
        Ok(PartitionRows::of_batch(window, batch, sizes, transposed))
    }

    fn check(&self, partition: usize, rows: u64) -> Result<()> {
        let counted = self.partition_rows(partition);
        if rows == counted {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "index segment {}: partition {partition} has {counted} live rows, of which {rows} are different ones: a row is in it twice, or its \
             file has changed; build the index anew",
            self.reader.uuid()
        )))
    }
}

/// Rows of some partitions that are kept.
struct Kept {
    width: usize,
    row_ids: Vec<u64>,
    codes: Vec<u8>,
    sizes: Vec<usize>,
}

impl Kept {
    fn new(width: usize, rows: usize) -> Self {
        Self { width, row_ids: Vec::with_capacity(rows), codes: Vec::with_capacity(rows * width), sizes: Vec::new() }
    }

    /// Partitions of these sizes, one after the other.
    fn add_partitions(&mut self, sizes: &[usize], row_ids: &[u64], codes: &[u8], kept: &[bool], transposed: bool, row_by_row: bool) {
        let mut first = 0;
        for size in sizes {
            let (rows, before) = (first..first + size, self.row_ids.len());
            let codes = &codes[rows.start * self.width..rows.end * self.width];
            self.add(&row_ids[rows.clone()], codes, &kept[rows], transposed, row_by_row);
            self.sizes.push(self.row_ids.len() - before);
            first += size;
        }
    }

    /// Rows of one partition.
    fn add(&mut self, row_ids: &[u64], codes: &[u8], kept: &[bool], transposed: bool, row_by_row: bool) {
        self.row_ids.extend(row_ids.iter().zip(kept).filter(|(_, kept)| **kept).map(|(id, _)| *id));
        keep_codes(codes, kept, self.width, transposed, row_by_row, &mut self.codes);
    }
}

fn batch_of(row_ids: Vec<u64>, codes: Vec<u8>, width: usize) -> Result<RecordBatch> {
    let codes = fixed_size_list(Arc::new(UInt8Array::from(codes)), width)?;
    Ok(RecordBatch::try_new(partition_schema(width), vec![Arc::new(UInt64Array::from(row_ids)), Arc::new(codes)])?)
}

/// The codes of a partition that are kept, added to `codes`: byte by byte, or `row_by_row`.
fn keep_codes(block: &[u8], kept: &[bool], width: usize, transposed: bool, row_by_row: bool, codes: &mut Vec<u8>) {
    let rows = kept.len();
    let live = || kept.iter().enumerate().filter(|(_, kept)| **kept).map(|(row, _)| row);
    if !transposed {
        live().for_each(|row| codes.extend_from_slice(&block[row * width..(row + 1) * width]));
    } else if row_by_row {
        let start = codes.len();
        codes.resize(start + live().count() * width, 0);
        for (byte, column) in block.chunks_exact(rows.max(1)).enumerate() {
            live().enumerate().for_each(|(to, row)| codes[start + to * width + byte] = column[row]);
        }
    } else {
        block.chunks_exact(rows.max(1)).for_each(|column| codes.extend(live().map(|row| column[row])));
    }
}

/// Reads the live rows of one partition, some at a time.
pub struct LiveSlices {
    segment: Arc<LiveSegment>,
    partition: usize,
    slice_rows: u64,
    /// Rows as stored that were read, and live ones among them.
    row: u64,
    live: u64,
}

impl LiveSlices {
    pub fn new(segment: Arc<LiveSegment>, partition: usize, slice_bytes: u64) -> Self {
        let slice_rows = (slice_bytes / (8 + segment.reader.code_width() as u64)).max(1);
        Self { segment, partition, slice_rows, row: 0, live: 0 }
    }

    /// The next rows; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<PartitionRows>> {
        let stored = self.segment.reader.partition_rows(self.partition);
        while self.row < stored {
            let rows = self.slice_rows.min(stored - self.row);
            let (row_ids, codes) = self.segment.reader.slice(self.partition, self.row, rows).await?;
            self.row += rows;
            let kept = self.segment.coverage.take(&row_ids);
            let width = self.segment.reader.code_width();
            let mut live_codes = Vec::with_capacity(codes.len());
            keep_codes(&codes, &kept, width, false, true, &mut live_codes);
            let live_ids = row_ids.iter().zip(&kept).filter(|(_, kept)| **kept).map(|(id, _)| *id).collect();
            let batch = batch_of(live_ids, live_codes, width)?;
            self.live += batch.num_rows() as u64;
            if self.row == stored {
                self.segment.check(self.partition, self.live)?;
            }
            if batch.num_rows() > 0 {
                let rows = [batch.num_rows()];
                return Ok(Some(PartitionRows::of_batch(self.partition..self.partition + 1, batch, &rows, false)));
            }
        }
        Ok(None)
    }
}
