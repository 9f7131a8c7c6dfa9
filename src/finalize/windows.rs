//! Partitions on their way into a segment. Windows of partitions are read, checked, transposed and encoded side by side, and written
//! in order: Lance's own builder does it one partition after the other, with one core busy for most of the time.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use arrow_array::{RecordBatch, UInt8Array, UInt64Array};
use futures::StreamExt;
use tokio::task::{JoinError, JoinHandle};

use super::partitions::Partitions;
use super::transpose::transpose_into;
use crate::artifact::row_ids_and_codes;
use crate::error::{Error, Result};
use crate::lance::builds::MERGE_STAGE;
use crate::lance::segment::{EncodedRows, PageEncoder, SegmentWriter};
use crate::model::fixed_size_list;
use crate::progress::Progress;

/// How the work is cut: rows of a window in bytes, and windows in preparation for each core and at all. A window in preparation
/// takes about three times as much memory: as read, transposed, and encoded.
struct Cut {
    bytes: usize,
    per_core: usize,
    most: usize,
}

/// While one window is read another is encoded; one writer cannot keep up with more cores.
const LOCAL: Cut = Cut { bytes: 4 << 20, per_core: 2, most: 32 };

/// A window has rows of every bucket, and each read of one is a request: longer ones, fewer at a time.
const REMOTE: Cut = Cut { bytes: 32 << 20, per_core: 1, most: 4 };

/// Encoded rows of some partitions, and how many each has.
struct Window {
    lengths: Vec<u32>,
    rows: EncodedRows,
}

/// A task that ends where nobody waits for it any more.
struct Task<T>(JoinHandle<T>);

impl<T> Future for Task<T> {
    type Output = std::result::Result<T, JoinError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx)
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Write every partition, then what search needs to know; the names and bytes of the files.
pub async fn write_segment(mut segment: SegmentWriter, partitions: Arc<Partitions>, progress: &dyn Progress) -> Result<Vec<(String, u64)>> {
    progress.start(MERGE_STAGE, Some(partitions.len() as u64), "partitions");
    let cut = if partitions.is_remote() { REMOTE } else { LOCAL };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let at_once = (cut.per_core * cores).min(cut.most);
    let encoder = segment.encoder();
    let tasks = partitions.windows(cut.bytes).into_iter().map(|(window, first_row)| {
        let (encoder, partitions) = (encoder.clone(), partitions.clone());
        Task(tokio::spawn(async move { encode(&partitions, window, first_row, &encoder).await }))
    });
    let mut lengths = Vec::with_capacity(partitions.len());
    // Reading, checking, transposing and encoding keep all cores busy while finished pages are written in their order.
    let mut windows = futures::stream::iter(tasks).buffered(at_once);
    while let Some(window) = windows.next().await {
        let window = window??;
        segment.append(window.rows).await?;
        lengths.extend(window.lengths);
        progress.advance(MERGE_STAGE, lengths.len() as u64);
    }
    let files = segment.finish(&lengths, partitions.total_loss().unwrap_or_default()).await?;
    progress.complete(MERGE_STAGE);
    Ok(files)
}

/// Put the rows of each partition together, then make pages of the window.
async fn encode(partitions: &Partitions, window: Range<usize>, first_row: u64, encoder: &PageEncoder) -> Result<Window> {
    let read = partitions.read(window).await?;
    let code_width = partitions.code_width();
    let lengths = read.iter().map(|batches| batches.iter().map(RecordBatch::num_rows).sum()).collect::<Vec<usize>>();
    let rows: usize = lengths.iter().sum();
    let mut row_ids: Vec<u64> = Vec::with_capacity(rows);
    let mut codes = vec![0u8; rows * code_width];
    for (batches, num_rows) in read.iter().zip(&lengths) {
        let start = row_ids.len();
        let partition = &mut codes[start * code_width..(start + num_rows) * code_width];
        for batch in batches {
            let (ids, rows) = row_ids_and_codes(batch);
            transpose_into(rows, code_width, partition, *num_rows, row_ids.len() - start);
            row_ids.extend_from_slice(ids);
        }
    }
    drop(read);
    let too_many = |rows: &usize| Error::invalid(format!("a partition of {rows} rows: an index holds at most {} in one", u32::MAX));
    let lengths = lengths.iter().map(|rows| u32::try_from(*rows).map_err(|_| too_many(rows))).collect::<Result<_>>()?;
    let codes = fixed_size_list(Arc::new(UInt8Array::from(codes)), code_width)?;
    let rows = encoder.encode(first_row, UInt64Array::from(row_ids), codes).await?;
    Ok(Window { lengths, rows })
}
