//! The partitions of one or many artifacts of the same model, read window by window, only the recorded ranges.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_schema::SchemaRef;
use futures::future::try_join_all;

use super::coverage::Coverage;
use crate::artifact::format::partition_schema;
use crate::artifact::{Artifact, PartitionReader, PartitionRows};
use crate::error::{Error, Result};

/// What the artifacts of an index hold, partition by partition.
pub struct Partitions {
    artifacts: Vec<Arc<Artifact>>,
    /// Rows of each partition over all artifacts.
    sizes: Vec<u64>,
    code_width: usize,
    coverage: Arc<Coverage>,
    rows_read: AtomicU64,
}

impl Partitions {
    /// The artifacts must have been checked to be of one shape.
    pub fn try_new(artifacts: Vec<Arc<Artifact>>, code_width: usize, coverage: Arc<Coverage>) -> Result<Self> {
        let first = artifacts.first().ok_or_else(|| Error::invalid("no artifact to read"))?;
        let sizes = (0..first.num_partitions()).map(|p| artifacts.iter().map(|a| a.partition_rows(p)).sum()).collect();
        Ok(Self { artifacts, sizes, code_width, coverage, rows_read: AtomicU64::default() })
    }

    pub fn num_rows(&self) -> u64 {
        self.sizes.iter().sum()
    }

    /// Rows that were read so far.
    pub fn rows_read(&self) -> u64 {
        self.rows_read.load(Ordering::Relaxed)
    }

    pub fn len(&self) -> usize {
        self.sizes.len()
    }

    /// Rows of a partition, or `None` where there is no such partition.
    pub fn rows(&self, partition: usize) -> Option<u64> {
        self.sizes.get(partition).copied()
    }

    pub fn code_width(&self) -> usize {
        self.code_width
    }

    /// Bytes of a row as it is read.
    pub fn row_bytes(&self) -> usize {
        8 + self.code_width
    }

    pub fn schema(&self) -> SchemaRef {
        partition_schema(self.code_width)
    }

    pub fn is_remote(&self) -> bool {
        self.artifacts.iter().any(|artifact| artifact.files().is_remote())
    }

    /// All partitions in windows of at most `max_bytes` of rows, or one partition; each with its first row in the index.
    pub fn windows(&self, max_bytes: usize) -> Vec<(Range<usize>, u64)> {
        let budget = (max_bytes / self.row_bytes()) as u64;
        let mut windows: Vec<(Range<usize>, u64)> = Vec::new();
        let (mut first, mut rows) = (0u64, 0u64);
        for (partition, size) in self.sizes.iter().enumerate() {
            match windows.last_mut() {
                Some((window, _)) if rows + size <= budget => window.end = partition + 1,
                _ => {
                    first += rows;
                    rows = 0;
                    windows.push((partition..partition + 1, first));
                }
            }
            rows += size;
        }
        windows
    }

    /// Rows of a window.
    pub fn rows_of(&self, window: Range<usize>) -> u64 {
        self.sizes.get(window).map_or(0, |sizes| sizes.iter().sum())
    }

    /// One partition, some bytes of rows at a time, checked.
    pub fn slices(&self, partition: usize, slice_bytes: u64) -> Slices<'_> {
        let readers = self.artifacts.iter().map(|artifact| PartitionReader::of(artifact.clone(), partition, slice_bytes)).collect();
        Slices { partitions: self, readers }
    }

    /// The window of at most `max_bytes` of rows, or one partition, that begins with a partition; and its rows.
    pub fn window_from(&self, start: usize, max_bytes: usize) -> (Range<usize>, u64) {
        let budget = (max_bytes / self.row_bytes()) as u64;
        let (mut end, mut rows) = (start, 0u64);
        while let Some(size) = self.sizes.get(end) {
            if end > start && rows + size > budget {
                break;
            }
            rows += size;
            end += 1;
        }
        (start..end, rows)
    }

    /// The rows of a window, checked, artifact by artifact.
    pub async fn read(&self, window: Range<usize>) -> Result<Vec<PartitionRows>> {
        let read = try_join_all(self.artifacts.iter().map(|artifact| artifact.read_partitions(window.clone()))).await?;
        for rows in &read {
            self.check(rows).await?;
        }
        Ok(read)
    }

    async fn check(&self, rows: &PartitionRows) -> Result<()> {
        for row_ids in rows.row_ids() {
            self.coverage.check(row_ids).await?;
            self.rows_read.fetch_add(row_ids.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Informational in an index; other writers may not record it.
    pub fn total_loss(&self) -> Option<f64> {
        self.artifacts.iter().map(|a| a.manifest().total_loss).sum()
    }
}

/// Reads one partition of all artifacts, one after the other.
pub struct Slices<'a> {
    partitions: &'a Partitions,
    readers: VecDeque<PartitionReader>,
}

impl Slices<'_> {
    /// The next rows; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<PartitionRows>> {
        while let Some(reader) = self.readers.front_mut() {
            match reader.next().await? {
                Some(rows) => {
                    self.partitions.check(&rows).await?;
                    return Ok(Some(rows));
                }
                None => drop(self.readers.pop_front()),
            }
        }
        Ok(None)
    }
}
