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
use crate::artifact::PartitionRows;
use crate::artifact::format::partition_schema;
use crate::error::{Error, Result};
use crate::lance::dataset::Dataset;
use crate::lance::segment::{CommittedSegment, RowIdRemapper, SegmentReader};
use crate::model::fixed_size_list;

/// Bytes of row ids that are counted at once.
const COUNTED_BYTES: u64 = 4 << 20;
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

    /// Count what is live.
    pub async fn count(&mut self) -> Result<()> {
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
        let counted = futures::stream::iter(windows).map(|window| self.count_window(window)).buffered(COUNTED_AT_ONCE);
        self.sizes = counted.try_concat().await?;
        Ok(())
    }

    async fn count_window(&self, window: Range<usize>) -> Result<Vec<u64>> {
        if window.len() == 1 {
            return Ok(vec![self.count_partition(window.start).await?]);
        }
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
    async fn count_partition(&self, partition: usize) -> Result<u64> {
        let (stored, step) = (self.reader.partition_rows(partition), COUNTED_BYTES / 8);
        let mut live = 0;
        for first in (0..stored).step_by(step as usize) {
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

    /// Once all was read: live rows of its fragments that it does not hold.
    pub fn rows_missing(&self) -> u64 {
        self.coverage.rows_left()
    }

    /// The live rows of consecutive partitions.
    pub async fn read(&self, window: Range<usize>) -> Result<PartitionRows> {
        let read = self.reader.partitions(window.clone()).await?;
        let batches = window.clone().zip(read).map(|(partition, (row_ids, codes))| {
            let batch = self.live(row_ids, codes)?;
            self.check(partition, batch.num_rows() as u64)?;
            Ok(batch)
        });
        Ok(PartitionRows::of_batches(window, batches.collect::<Result<_>>()?))
    }

    fn live(&self, mut row_ids: Vec<u64>, mut codes: Vec<u8>) -> Result<RecordBatch> {
        let width = self.reader.code_width();
        self.coverage.retain(&mut row_ids, &mut codes, width);
        let codes = fixed_size_list(Arc::new(UInt8Array::from(codes)), width)?;
        Ok(RecordBatch::try_new(partition_schema(width), vec![Arc::new(UInt64Array::from(row_ids)), Arc::new(codes)])?)
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
            let batch = self.segment.live(row_ids, codes)?;
            self.live += batch.num_rows() as u64;
            if self.row == stored {
                self.segment.check(self.partition, self.live)?;
            }
            if batch.num_rows() > 0 {
                return Ok(Some(PartitionRows::of_batches(self.partition..self.partition + 1, vec![batch])));
            }
        }
        Ok(None)
    }
}
