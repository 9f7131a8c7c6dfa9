//! `PartitionReader`: one partition, some MiB at a time, however large it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::artifact::Artifact;
use super::rows::{PartitionRows, WantedRange};
use crate::error::Result;

/// Bytes of row ids and codes that are read at once where nobody says.
pub const SLICE_BYTES: u64 = 4 << 20;

/// Reads one partition in slices, in the order of its ranges. Checksums are sums: the last slice tells whether all is well.
pub struct PartitionReader<A = Arc<Artifact>> {
    artifact: A,
    partition: usize,
    part_ids: bool,
    slice_rows: u64,
    /// The next range, and the rows of it that were read.
    range: usize,
    row: u64,
    sum: u64,
    done: bool,
}

impl<A: std::borrow::Borrow<Artifact>> PartitionReader<A> {
    /// Reads `slice_bytes` of row ids and codes at a time, and checks partition ids if `part_ids`.
    pub(super) fn new(artifact: A, partition: usize, slice_bytes: u64, part_ids: bool) -> Self {
        let slice_rows = (slice_bytes / (8 + artifact.borrow().pq_code_width() as u64)).max(1);
        Self { artifact, partition, part_ids, slice_rows, range: 0, row: 0, sum: 0, done: false }
    }

    /// The next rows; `None` at the end. Nothing can be read after an error.
    pub async fn next(&mut self) -> Result<Option<PartitionRows>> {
        let artifact = self.artifact.borrow();
        let Some(partition) = artifact.manifest().partitions.get(self.partition).filter(|_| !self.done) else {
            return Ok(None);
        };
        let mut wanted = Vec::new();
        let mut room = self.slice_rows;
        let mut ranges = partition.ranges().skip(self.range).peekable();
        while room > 0
            && let Some(range) = ranges.peek()
        {
            let rows = room.min(range.num_rows - self.row);
            let start = range.offset + self.row;
            wanted.push(WantedRange { start, end: start + rows, partition: 0, index: wanted.len() as u32 });
            (room, self.row) = (room - rows, self.row + rows);
            if self.row == range.num_rows {
                (self.range, self.row) = (self.range + 1, 0);
                ranges.next();
            }
        }
        let last = ranges.peek().is_none();
        let Some(path) = partition.path().filter(|_| !wanted.is_empty()) else {
            self.done = true;
            // Of no rows too: one that has lost its ranges is not empty.
            artifact.check_checksum(self.partition, self.sum)?;
            return Ok(None);
        };
        // What is cancelled or fails here must not be taken for the end.
        self.done = true;
        let window = self.partition..self.partition + 1;
        let rows = artifact.read_wanted(BTreeMap::from([(path, wanted)]), window, self.part_ids).await?;
        self.sum = self.sum.wrapping_add(rows.checksum(0, artifact.pq_code_width()));
        if last {
            artifact.check_checksum(self.partition, self.sum)?;
        }
        self.done = last;
        Ok(Some(rows))
    }
}

impl PartitionReader {
    /// Of a partition of an artifact; checksums are checked where there are any, and partition ids where there are none.
    pub fn of(artifact: Arc<Artifact>, partition: usize, slice_bytes: u64) -> Self {
        let part_ids = !artifact.has_checksums();
        Self::new(artifact, partition, slice_bytes, part_ids)
    }
}
