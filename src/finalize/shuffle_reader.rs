//! `PartitionArtifactShuffleReader`: artifacts as the shuffled input of Lance's index builder.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use async_trait::async_trait;
use futures::future::try_join_all;
use lance_core::utils::tokio::get_num_compute_intensive_cpus;
use lance_index::vector::v3::shuffler::{ShufflePartition, ShufflePartitionWindow, ShufflePartitionWindowPlan, ShuffleReader, Shuffler};
use lance_io::stream::{RecordBatchStream, RecordBatchStreamAdapter};

use super::coverage::Coverage;
use crate::artifact::{Artifact, row_ids_and_codes};
use crate::error::{Error, Result};

/// What Lance's builder admits at once, in bytes (`PARTITION_BUILD_BUDGET_BYTES`).
const BUILD_BUDGET_BYTES: usize = 512 << 20;
const MIN_WINDOW_BYTES: usize = 4 << 20;

/// Reads one or many artifacts of the same model, partition window by partition window, only the recorded ranges.
pub struct PartitionArtifactShuffleReader {
    artifacts: Vec<Arc<Artifact>>,
    /// Rows of each partition over all artifacts.
    sizes: Vec<u64>,
    row_bytes: usize,
    window_bytes: usize,
    schema: SchemaRef,
    coverage: Arc<Coverage>,
    rows_read: Arc<AtomicU64>,
}

impl PartitionArtifactShuffleReader {
    /// The artifacts must have been checked to be of one shape.
    pub fn try_new(artifacts: Vec<Arc<Artifact>>, code_width: usize, coverage: Arc<Coverage>) -> Result<Self> {
        let first = artifacts.first().ok_or_else(|| Error::invalid("no artifact to read"))?;
        let sizes: Vec<u64> = (0..first.num_partitions()).map(|p| artifacts.iter().map(|a| a.partition_rows(p)).sum()).collect();
        let row_bytes = 8 + code_width;
        let total: usize = sizes.iter().map(|rows| *rows as usize * row_bytes).sum();
        let cpus = get_num_compute_intensive_cpus().max(1);
        // Large enough to read in long ranges, small enough that all cores have partitions to build and that the budget
        // admits a window for each.
        let window_bytes = (total / (4 * cpus)).clamp(MIN_WINDOW_BYTES, MIN_WINDOW_BYTES.max(BUILD_BUDGET_BYTES * 4 / 5 / cpus));
        let schema = crate::artifact::layout::partition_schema(code_width);
        Ok(Self { artifacts, sizes, row_bytes, window_bytes, schema, coverage, rows_read: Arc::default() })
    }

    pub fn num_rows(&self) -> u64 {
        self.sizes.iter().sum()
    }

    /// Rows handed to the builder so far.
    pub fn rows_read(&self) -> Arc<AtomicU64> {
        self.rows_read.clone()
    }

    pub fn num_partitions(&self) -> usize {
        self.sizes.len()
    }

    pub fn is_remote(&self) -> bool {
        self.artifacts.iter().any(|artifact| artifact.files().is_remote())
    }

    /// All partitions in windows of at most `max_bytes` of rows, or one partition; each with its first row in the index.
    pub fn windows(&self, max_bytes: usize) -> Vec<(Range<usize>, u64)> {
        let budget = (max_bytes / self.row_bytes) as u64;
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

    fn window(&self, start: usize, max_bytes: usize) -> lance_core::Result<(Range<usize>, u64)> {
        if start >= self.sizes.len() || max_bytes == 0 {
            return Err(Error::internal(format!("partition window from {start} of {} with {max_bytes} bytes", self.sizes.len())).into());
        }
        let budget = max_bytes.min(self.window_bytes) as u64 / self.row_bytes as u64;
        let (mut end, mut rows) = (start, 0u64);
        while let Some(size) = self.sizes.get(end) {
            if end > start && rows + size > budget {
                break;
            }
            rows += size;
            end += 1;
        }
        Ok((start..end, rows))
    }

    /// The rows of each partition of a window, checked.
    pub async fn read(&self, window: Range<usize>) -> lance_core::Result<Vec<Vec<RecordBatch>>> {
        let mut reads = Vec::with_capacity(self.artifacts.len());
        for artifact in &self.artifacts {
            reads.push(artifact.read_partitions(window.clone()));
        }
        let read = try_join_all(reads).await?;
        let mut partitions: Vec<Vec<RecordBatch>> = vec![Vec::new(); window.len()];
        for artifact in read {
            for (all, batches) in partitions.iter_mut().zip(artifact) {
                all.extend(batches);
            }
        }
        for batch in partitions.iter().flatten() {
            self.coverage.check(row_ids_and_codes(batch).0).await?;
            self.rows_read.fetch_add(batch.num_rows() as u64, Ordering::Relaxed);
        }
        Ok(partitions)
    }

    fn stream(&self, batches: Vec<RecordBatch>) -> Option<Box<dyn RecordBatchStream + Unpin + 'static>> {
        if batches.is_empty() {
            return None;
        }
        let stream = futures::stream::iter(batches.into_iter().map(Ok));
        Some(Box::new(RecordBatchStreamAdapter::new(self.schema.clone(), stream)))
    }
}

#[async_trait]
impl ShuffleReader for PartitionArtifactShuffleReader {
    async fn read_partition(&self, partition_id: usize) -> lance_core::Result<Option<Box<dyn RecordBatchStream + Unpin + 'static>>> {
        let mut partitions = self.read(partition_id..partition_id + 1).await?;
        Ok(self.stream(partitions.pop().unwrap_or_default()))
    }

    fn plan_partition_window(&self, start: usize, max_decoded_bytes: usize) -> lance_core::Result<ShufflePartitionWindowPlan> {
        let (partition_range, rows) = self.window(start, max_decoded_bytes)?;
        let bytes = rows as usize * self.row_bytes;
        let estimated_decoded_bytes = if rows == 0 { 0 } else { bytes + bytes / 4 + (1 << 20) };
        Ok(ShufflePartitionWindowPlan { partition_range, estimated_decoded_bytes })
    }

    async fn read_partition_window(&self, start: usize, max_decoded_bytes: usize) -> lance_core::Result<ShufflePartitionWindow> {
        let (partition_range, rows) = self.window(start, max_decoded_bytes)?;
        let read = self.read(partition_range.clone()).await?;
        let partitions = partition_range
            .clone()
            .zip(read)
            .map(|(partition_id, batches)| ShufflePartition { partition_id, data: self.stream(batches) })
            .collect();
        Ok(ShufflePartitionWindow { partition_range, partitions, materialized_decoded_bytes: Some(rows as usize * self.row_bytes) })
    }

    fn partition_size(&self, partition_id: usize) -> lance_core::Result<usize> {
        let size = self.sizes.get(partition_id).copied();
        Ok(size.ok_or_else(|| Error::internal(format!("partition {partition_id} of {}", self.sizes.len())))? as usize)
    }

    fn total_loss(&self) -> Option<f64> {
        // Informational in an index; other writers may record it.
        self.artifacts.iter().map(|a| a.manifest().total_loss).sum()
    }
}

/// Hands the reader to the index builder at the point where it would shuffle.
pub struct ArtifactShuffler {
    reader: Mutex<Option<PartitionArtifactShuffleReader>>,
}

impl ArtifactShuffler {
    pub fn new(reader: PartitionArtifactShuffleReader) -> Self {
        Self { reader: Mutex::new(Some(reader)) }
    }
}

#[async_trait]
impl Shuffler for ArtifactShuffler {
    async fn shuffle(&self, _: Box<dyn RecordBatchStream + Unpin + 'static>) -> lance_core::Result<Box<dyn ShuffleReader>> {
        match self.reader.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(reader) => Ok(Box::new(reader)),
            None => Err(Error::internal("the index builder asked for its input twice").into()),
        }
    }
}
