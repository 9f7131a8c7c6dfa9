//! The partitions of artifacts, or of segments, of the same model, read window by window, only the recorded ranges.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_schema::SchemaRef;
use futures::future::try_join_all;

use super::coverage::Coverage;
use super::live::{LiveSegment, LiveSlices};
use crate::artifact::format::partition_schema;
use crate::artifact::{Artifact, PartitionReader, PartitionRows};
use crate::error::Result;

/// Of all sources together, and of each at least: bytes of rows that are not live any more, held beside the live ones of a window. As many
/// as of live ones are held anyway: each read of fewer is a request more.
const DEAD_BYTES: u64 = 1 << 20;
pub const LEAST_DEAD_BYTES: u64 = 64 << 10;

/// Where rows of an index come from.
#[derive(Clone)]
pub enum RowSource {
    /// Each row of an artifact must be one that is to be covered, and come once.
    Artifact(Arc<Artifact>, Arc<Coverage>),
    /// Of a segment those rows that are still live.
    Segment(Arc<LiveSegment>),
}

impl RowSource {
    fn partition_rows(&self, partition: usize) -> u64 {
        match self {
            Self::Artifact(artifact, _) => artifact.partition_rows(partition),
            Self::Segment(segment) => segment.partition_rows(partition),
        }
    }

    /// Rows of a partition that are stored, and not live any more.
    fn dead_rows(&self, partition: usize) -> u64 {
        match self {
            Self::Artifact(..) => 0,
            Self::Segment(segment) => segment.dead_rows(partition),
        }
    }

    fn is_remote(&self) -> bool {
        match self {
            Self::Artifact(artifact, _) => artifact.files().is_remote(),
            Self::Segment(segment) => segment.reader().is_remote(),
        }
    }

    async fn read(&self, window: Range<usize>, row_by_row: bool, dead_bytes: u64) -> Result<PartitionRows> {
        match self {
            Self::Artifact(artifact, coverage) => {
                let rows = artifact.read_partitions(window).await?;
                check(&rows, coverage).await?;
                Ok(rows)
            }
            Self::Segment(segment) => segment.read(window, row_by_row, dead_bytes).await,
        }
    }

    fn slices(&self, partition: usize, slice_bytes: u64) -> SourceSlices {
        match self {
            Self::Artifact(artifact, coverage) => {
                SourceSlices::Artifact(PartitionReader::of(artifact.clone(), partition, slice_bytes), coverage.clone())
            }
            Self::Segment(segment) => SourceSlices::Segment(LiveSlices::new(segment.clone(), partition, slice_bytes)),
        }
    }
}

async fn check(rows: &PartitionRows, coverage: &Coverage) -> Result<()> {
    for row_ids in rows.row_ids() {
        coverage.check(row_ids).await?;
    }
    Ok(())
}

/// What the sources of an index hold, partition by partition.
pub struct Partitions {
    sources: Vec<RowSource>,
    /// Rows of each partition over all sources.
    sizes: Vec<u64>,
    code_width: usize,
    rows_read: AtomicU64,
    total_loss: Option<f64>,
}

impl Partitions {
    /// The sources must have been checked to be of one shape.
    pub fn new(sources: Vec<RowSource>, num_partitions: usize, code_width: usize) -> Self {
        let sizes = (0..num_partitions).map(|p| sources.iter().map(|source| source.partition_rows(p)).sum()).collect();
        Self { sources, sizes, code_width, rows_read: AtomicU64::default(), total_loss: None }
    }

    /// Informational in an index; other writers may not record it.
    pub fn with_loss(self, total_loss: Option<f64>) -> Self {
        Self { total_loss, ..self }
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
        self.sources.iter().any(RowSource::is_remote)
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

    /// Bytes of rows of a window that [`Self::read`] holds at once although they are not live any more.
    pub fn dead_bytes(&self, window: Range<usize>) -> u64 {
        let dead = |source: &RowSource| window.clone().map(|partition| source.dead_rows(partition)).sum::<u64>();
        let held = |source: &RowSource| (dead(source) * self.row_bytes() as u64).min(self.most_dead_bytes(source, window.clone()));
        self.sources.iter().map(held).sum()
    }

    /// Of one source.
    fn most_dead_bytes(&self, source: &RowSource, window: Range<usize>) -> u64 {
        let live = window.map(|partition| source.partition_rows(partition)).sum::<u64>() * self.row_bytes() as u64;
        live.max(DEAD_BYTES / self.sources.len().max(1) as u64).max(LEAST_DEAD_BYTES)
    }

    /// One partition, some bytes of rows at a time, checked.
    pub fn slices(&self, partition: usize, slice_bytes: u64) -> Slices<'_> {
        Slices { partitions: self, sources: self.sources.iter().map(|source| source.slices(partition, slice_bytes)).collect() }
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

    /// The rows of a window, checked, source by source: codes `row_by_row`, or as each source has them.
    pub async fn read(&self, window: Range<usize>, row_by_row: bool) -> Result<Vec<PartitionRows>> {
        let read = self.sources.iter().map(|source| source.read(window.clone(), row_by_row, self.most_dead_bytes(source, window.clone())));
        let read = try_join_all(read).await?;
        read.iter().for_each(|rows| self.count(rows));
        Ok(read)
    }

    fn count(&self, rows: &PartitionRows) {
        let rows: usize = rows.row_ids().map(<[u64]>::len).sum();
        self.rows_read.fetch_add(rows as u64, Ordering::Relaxed);
    }

    pub fn total_loss(&self) -> Option<f64> {
        self.total_loss
    }
}

enum SourceSlices {
    Artifact(PartitionReader, Arc<Coverage>),
    Segment(LiveSlices),
}

impl SourceSlices {
    async fn next(&mut self) -> Result<Option<PartitionRows>> {
        match self {
            Self::Artifact(reader, coverage) => {
                let rows = reader.next().await?;
                if let Some(rows) = &rows {
                    check(rows, coverage).await?;
                }
                Ok(rows)
            }
            Self::Segment(slices) => slices.next().await,
        }
    }
}

/// Reads one partition of all sources, one after the other.
pub struct Slices<'a> {
    partitions: &'a Partitions,
    sources: VecDeque<SourceSlices>,
}

impl Slices<'_> {
    /// The next rows; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<PartitionRows>> {
        while let Some(source) = self.sources.front_mut() {
            match source.next().await? {
                Some(rows) => {
                    self.partitions.count(&rows);
                    return Ok(Some(rows));
                }
                None => drop(self.sources.pop_front()),
            }
        }
        Ok(None)
    }
}
