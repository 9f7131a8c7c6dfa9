//! One bucket file being written: the runs of a sorted stage, gathered, hashed and appended.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use arrow_buffer::ToByteSlice;
use tokio::runtime::Handle;

use super::plan::Kept;
use super::stage::{BucketOrder, SortedRows, Stage};
use crate::artifact::format::{EncodedRanges, FileEntry, RowRange, bucket_path, bucket_schema, checksum};
use crate::error::{Error, Result};
use crate::io::{Store, Uploads};
use crate::lance::file::{FlatFileWriter, FlatType};
use crate::numbers::SmallNumbers;
use crate::sync::block_on;

/// How soon a write that waits for a store ends once the builder is cancelled.
const POLL: Duration = Duration::from_millis(100);

fn aborted() -> Error {
    Error::Interrupted("the builder was aborted".into())
}

/// Wait for a store no longer than the builder lives.
async fn unless_cancelled<T>(cancelled: &AtomicBool, work: impl Future<Output = Result<T>>) -> Result<T> {
    let stopped = async {
        while !cancelled.load(Ordering::Relaxed) {
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::select! {
        biased;
        result = work => result,
        () = stopped => Err(aborted()),
    }
}

/// What is known of a partition while it is written.
#[derive(Debug, Default, Clone, Copy)]
pub struct PartitionState {
    pub num_rows: u64,
    pub checksum: u64,
}

/// The file of one bucket. It is created with the first row.
pub struct BucketWriter {
    path: String,
    code_width: usize,
    file: Option<FlatFileWriter>,
    rows: u64,
    /// By rank within the bucket.
    partitions: Vec<PartitionState>,
    /// Stage after stage the rows of each partition, by rank: from these follow the ranges, which would take ten times as much.
    runs: SmallNumbers,
}

impl BucketWriter {
    pub fn new(bucket: usize, num_partitions: usize, code_width: usize, tag: Option<&str>) -> Self {
        let partitions = vec![PartitionState::default(); num_partitions];
        Self { path: bucket_path(bucket, tag), code_width, file: None, rows: 0, partitions, runs: SmallNumbers::default() }
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn open_path(&self) -> Option<String> {
        self.file.as_ref().map(|_| self.path.clone())
    }

    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Bytes that its runs and the list of its pages take, and closing it.
    pub fn kept(&self) -> Kept {
        let of_file = |bytes: fn(&FlatFileWriter) -> usize| self.file.as_ref().map_or(0, bytes);
        Kept { runs: self.runs.bytes(), pages: of_file(FlatFileWriter::page_bytes), closing: of_file(FlatFileWriter::closing_bytes) }
    }

    /// By rank within the bucket.
    pub fn partitions(&self) -> &[PartitionState] {
        &self.partitions
    }

    /// The ranges of each partition, by rank, and what was written of it; once.
    pub fn take_partitions(&mut self) -> Vec<(PartitionState, Vec<u8>)> {
        let partitions = std::mem::take(&mut self.partitions);
        let mut ranges = vec![EncodedRanges::default(); partitions.len()];
        let mut offset = 0;
        let ranks = 0..partitions.len();
        for (num_rows, rank) in std::mem::take(&mut self.runs).iter().zip(ranks.cycle()) {
            if num_rows > 0 {
                ranges[rank].push(RowRange { offset, num_rows });
                offset += num_rows;
            }
        }
        partitions.into_iter().zip(ranges.into_iter().map(EncodedRanges::finish)).collect()
    }

    /// Drop the open file; it never appears under its name.
    pub fn discard(&mut self) {
        self.file = None;
    }

    pub fn close(&mut self, runtime: &Handle, store: &Store, cancelled: &AtomicBool) -> Result<Option<(String, FileEntry)>> {
        // Before the file, so that it is dropped after it: an upload that fails is aborted on the runtime.
        let _runtime = runtime.enter();
        let Some(file) = self.file.take() else {
            if self.rows > 0 {
                return Err(Error::internal(format!("{}: {} rows were written, and the file is gone", self.path, self.rows)));
            }
            return Ok(None);
        };
        let closing = |e: Error| e.context(format!("closing {} of {}", self.path, store.uri()));
        let schema = bucket_schema(self.code_width);
        let written = block_on(runtime, unless_cancelled(cancelled, file.finish(&schema))).map_err(closing)?;
        if written.num_rows != self.rows {
            return Err(Error::internal(format!("{}: {} rows in the file, {} were written", self.path, written.num_rows, self.rows)));
        }
        Ok(Some((self.path.clone(), FileEntry::of(written))))
    }

    /// Leave the open file to another process: after a fork it is the parent's.
    pub fn forget(&mut self) {
        std::mem::forget(self.file.take());
    }
}

/// A sorted stage on its way to the bucket files.
pub struct FlushJob<'a> {
    pub store: &'a Store,
    pub uploads: &'a Uploads,
    pub runtime: &'a Handle,
    pub stage: &'a Stage,
    pub sorted: &'a SortedRows,
    pub order: &'a BucketOrder,
    pub chunk_rows: usize,
    pub code_width: usize,
    /// Make the file durable when it is closed.
    pub sync: bool,
    pub cancelled: &'a AtomicBool,
}

/// Rows gathered for one call of the file writer. A thread uses one for all it writes, which stays in its cache.
#[derive(Default)]
pub struct Chunk {
    row_ids: Vec<u64>,
    part_ids: Vec<u32>,
    codes: Vec<u8>,
}

impl Chunk {
    fn clear(&mut self) {
        self.row_ids.clear();
        self.part_ids.clear();
        self.codes.clear();
    }
}

impl FlushJob<'_> {
    /// Append this stage's rows of `bucket`.
    pub fn write(&self, writer: &mut BucketWriter, bucket: usize, chunk: &mut Chunk) -> Result<()> {
        let ranks = self.order.bucket_ranks(bucket);
        let start = |rank: usize| self.sorted.starts[rank] as usize;
        let mut left = start(ranks.end) - start(ranks.start);
        if left == 0 {
            return Ok(());
        }
        let first = ranks.start;
        chunk.clear();
        for rank in ranks {
            let mut rows = &self.sorted.rows[start(rank)..start(rank + 1)];
            writer.runs.push(rows.len() as u64);
            while !rows.is_empty() {
                let (now, later) = rows.split_at(rows.len().min(self.chunk_rows - chunk.row_ids.len()));
                let at = chunk.row_ids.len();
                self.gather(now, self.order.partition(rank), chunk);
                let state = &mut writer.partitions[rank - first];
                let sum = checksum(&chunk.row_ids[at..], &chunk.codes[at * self.code_width..], self.code_width);
                state.checksum = state.checksum.wrapping_add(sum);
                state.num_rows += now.len() as u64;
                rows = later;
                left -= now.len();
                if chunk.row_ids.len() == self.chunk_rows || left == 0 {
                    self.append(writer, chunk)?;
                    chunk.clear();
                }
            }
        }
        Ok(())
    }

    fn gather(&self, rows: &[AtomicU32], partition: u32, chunk: &mut Chunk) {
        let width = self.code_width;
        let row = |place: &AtomicU32| place.load(Ordering::Relaxed) as usize;
        chunk.row_ids.extend(rows.iter().map(|place| self.stage.row_ids[row(place)]));
        chunk.part_ids.extend(std::iter::repeat_n(partition, rows.len()));
        chunk.codes.reserve(rows.len() * width);
        for place in rows {
            let at = row(place) * width;
            chunk.codes.extend_from_slice(&self.stage.codes[at..at + width]);
        }
    }

    fn append(&self, writer: &mut BucketWriter, chunk: &Chunk) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(aborted());
        }
        let rows = chunk.row_ids.len() as u64;
        let buffers = [chunk.row_ids.to_byte_slice(), chunk.part_ids.to_byte_slice(), &chunk.codes];
        // Lance's writer may spawn tasks.
        let _runtime = self.runtime.enter();
        let write = async {
            if writer.file.is_none() {
                let kinds = [FlatType::Integer(64), FlatType::Integer(32), FlatType::Bytes(self.code_width)];
                writer.file = Some(FlatFileWriter::create(self.store, self.uploads, &writer.path, &kinds, self.sync)?);
            }
            let file = writer.file.as_mut().ok_or_else(|| Error::internal("a bucket file was not opened"))?;
            file.append(rows, &buffers).await
        };
        let written = block_on(self.runtime, unless_cancelled(self.cancelled, write));
        written.map_err(|e: Error| e.context(format!("writing {} of {}", writer.path, self.store.uri())))?;
        writer.rows += rows;
        Ok(())
    }
}
