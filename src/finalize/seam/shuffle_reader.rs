//! `PartitionArtifactShuffleReader`: artifacts as the shuffled input of Lance's index builder.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use arrow_array::RecordBatch;
use async_trait::async_trait;
use lance_index::vector::v3::shuffler::{ShufflePartition, ShufflePartitionWindow, ShufflePartitionWindowPlan, ShuffleReader, Shuffler};
use lance_io::stream::{RecordBatchStream, RecordBatchStreamAdapter};

use crate::error::Error;
use crate::finalize::partitions::Partitions;
use crate::lance::builds::compute_threads;
use crate::sync::locked;

/// What Lance's builder admits at once, in bytes (`PARTITION_BUILD_BUDGET_BYTES`).
const BUILD_BUDGET_BYTES: usize = 512 << 20;
const MIN_WINDOW_BYTES: usize = 4 << 20;

/// A window of partitions, and its rows.
type Window = (Range<usize>, u64);

pub struct PartitionArtifactShuffleReader {
    partitions: Arc<Partitions>,
    window_bytes: usize,
}

impl PartitionArtifactShuffleReader {
    pub fn new(partitions: Arc<Partitions>) -> Self {
        let total = partitions.num_rows() as usize * partitions.row_bytes();
        let cpus = compute_threads();
        // Large enough to read in long ranges, small enough that all cores have partitions to build and that the budget
        // admits a window for each.
        let window_bytes = (total / (4 * cpus)).clamp(MIN_WINDOW_BYTES, MIN_WINDOW_BYTES.max(BUILD_BUDGET_BYTES * 4 / 5 / cpus));
        Self { partitions, window_bytes }
    }

    fn window(&self, start: usize, max_bytes: usize) -> lance_core::Result<Window> {
        if start >= self.partitions.len() || max_bytes == 0 {
            return Err(
                Error::internal(format!("partition window from {start} of {} with {max_bytes} bytes", self.partitions.len())).into()
            );
        }
        Ok(self.partitions.window_from(start, max_bytes.min(self.window_bytes)))
    }

    fn stream(&self, batches: Vec<RecordBatch>) -> Option<Box<dyn RecordBatchStream + Unpin + 'static>> {
        if batches.is_empty() {
            return None;
        }
        let stream = futures::stream::iter(batches.into_iter().map(Ok));
        Some(Box::new(RecordBatchStreamAdapter::new(self.partitions.schema(), stream)))
    }
}

#[async_trait]
impl ShuffleReader for PartitionArtifactShuffleReader {
    async fn read_partition(&self, partition_id: usize) -> lance_core::Result<Option<Box<dyn RecordBatchStream + Unpin + 'static>>> {
        let read = self.partitions.read(partition_id..partition_id + 1, true).await?;
        Ok(self.stream(read.iter().flat_map(|rows| rows.batches(0)).collect()))
    }

    fn plan_partition_window(&self, start: usize, max_decoded_bytes: usize) -> lance_core::Result<ShufflePartitionWindowPlan> {
        let (partition_range, rows) = self.window(start, max_decoded_bytes)?;
        let bytes = rows as usize * self.partitions.row_bytes();
        let estimated_decoded_bytes = if rows == 0 { 0 } else { bytes + bytes / 4 + (1 << 20) };
        Ok(ShufflePartitionWindowPlan { partition_range, estimated_decoded_bytes })
    }

    async fn read_partition_window(&self, start: usize, max_decoded_bytes: usize) -> lance_core::Result<ShufflePartitionWindow> {
        let (partition_range, rows) = self.window(start, max_decoded_bytes)?;
        let read = self.partitions.read(partition_range.clone(), true).await?;
        let partitions = partition_range
            .clone()
            .enumerate()
            .map(|(place, partition_id)| {
                let batches = read.iter().flat_map(|rows| rows.batches(place)).collect();
                ShufflePartition { partition_id, data: self.stream(batches) }
            })
            .collect();
        let bytes = rows as usize * self.partitions.row_bytes();
        Ok(ShufflePartitionWindow { partition_range, partitions, materialized_decoded_bytes: Some(bytes) })
    }

    fn partition_size(&self, partition_id: usize) -> lance_core::Result<usize> {
        let size = self.partitions.rows(partition_id);
        Ok(size.ok_or_else(|| Error::internal(format!("partition {partition_id} of {}", self.partitions.len())))? as usize)
    }

    fn total_loss(&self) -> Option<f64> {
        self.partitions.total_loss()
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
        match locked(&self.reader).take() {
            Some(reader) => Ok(Box::new(reader)),
            None => Err(Error::internal("the index builder asked for its input twice").into()),
        }
    }
}
