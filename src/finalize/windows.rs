//! Partitions on their way into a segment. Windows of partitions are read, checked, transposed and encoded side by side, and written
//! in order: Lance's own builder does it one partition after the other, with one core busy for most of the time.
//!
//! Each window holds its bytes of the call's budget from before it is read until it is written. They are asked for in the order of the
//! windows, so that the one that is to be written next never waits for those behind it. A partition that is too large for a window goes
//! slice by slice (see [`large`](super::large)).

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use arrow_array::{UInt8Array, UInt64Array};
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};

use super::large::{LargePartition, encode_large};
use super::partitions::Partitions;
use super::transpose::transpose_into;
use crate::budget::{Budget, Reservation};
use crate::error::{Error, Result};
use crate::lance::builds::MERGE_STAGE;
use crate::lance::segment::{EncodedColumn, PageEncoder, SegmentWriter};
use crate::model::fixed_size_list;
use crate::progress::Progress;

/// How the work is cut: rows of a window in bytes, and windows in preparation for each core and at all.
struct Cut {
    bytes: usize,
    per_core: usize,
    most: usize,
}

/// While one window is read another is encoded; one writer cannot keep up with more cores.
const LOCAL: Cut = Cut { bytes: 4 << 20, per_core: 2, most: 32 };

/// A window has rows of every bucket, and each read of one is a request: longer ones, fewer at a time.
const REMOTE: Cut = Cut { bytes: 32 << 20, per_core: 1, most: 4 };

/// A window in preparation takes so many times the memory of its rows: as read, transposed, and encoded.
const COPIES: usize = 3;
/// Windows below which the cores would wait for each other; they are made smaller first.
const LEAST_WINDOWS: usize = 4;
const LEAST_WINDOW_BYTES: usize = 256 << 10;

/// Encoded rows of some partitions, and how many each has.
struct Window {
    lengths: Vec<u32>,
    rows: Vec<EncodedColumn>,
}

/// What comes next in a segment.
enum Next {
    Window(Window, Reservation),
    /// Its rows come one slice after the other.
    Large(u32, mpsc::Receiver<Result<Vec<EncodedColumn>>>, Reservation),
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

/// What the windows of a segment need at least.
pub fn least_bytes(code_width: usize) -> u64 {
    // The rows that a slice of a large partition has in common with the next one.
    let overlap = code_width * (8 + code_width);
    (LEAST_WINDOWS * COPIES * LEAST_WINDOW_BYTES + 8 * overlap) as u64
}

/// Write every partition within what `budget` has free now, then what search needs to know; the names and bytes of the files.
pub async fn write_segment(
    mut segment: SegmentWriter,
    partitions: Arc<Partitions>,
    budget: &Budget,
    progress: &dyn Progress,
) -> Result<Vec<(String, u64)>> {
    progress.start(MERGE_STAGE, Some(partitions.len() as u64), "partitions");
    let cut = if partitions.is_remote() { REMOTE } else { LOCAL };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let at_once = (cut.per_core * cores).min(cut.most);
    // A quarter is left to the allocator, which does not give back at once what is freed.
    let share = usize::try_from(budget.free() / 4 * 3).unwrap_or(usize::MAX) / COPIES;
    let window_bytes = (share / at_once.max(LEAST_WINDOWS)).clamp(LEAST_WINDOW_BYTES, cut.bytes);
    // Two of them fit.
    let large_bytes = share / 2;
    let row_bytes = partitions.row_bytes();
    let (encoder, transposed) = (segment.encoder(), segment.is_transposed());
    let mut windows = futures::stream::iter(partitions.windows(window_bytes))
        .then(|(window, first_row)| {
            let rows = partitions.rows_of(window.clone());
            let bytes = rows as usize * row_bytes;
            let large = window.len() == 1 && bytes > large_bytes && rows >= partitions.code_width() as u64;
            let slice_bytes = (large_bytes / 8).clamp(LEAST_WINDOW_BYTES, cut.bytes.max(16 << 20));
            let held = if large { 2 * (COPIES + 1) * slice_bytes } else { COPIES * bytes } as u64;
            let held = held + if large { 0 } else { partitions.dead_bytes(window.clone()) };
            let (encoder, partitions, budget) = (encoder.clone(), partitions.clone(), budget.clone());
            async move {
                let reservation = budget.reserve(held).await?;
                Ok::<_, Error>(Task(tokio::spawn(async move {
                    if large {
                        let length = partition_length(rows)?;
                        let (sender, receiver) = mpsc::channel(1);
                        let slice_bytes = slice_bytes as u64;
                        let large = LargePartition { partition: window.start, first_row, num_rows: rows, slice_bytes, transposed };
                        // It ends where its receiver is gone.
                        tokio::spawn(encode_large(partitions, large, encoder, budget, sender));
                        return Ok::<_, Error>(Next::Large(length, receiver, reservation));
                    }
                    Ok(Next::Window(encode(&partitions, window, first_row, &encoder, transposed).await?, reservation))
                })))
            }
        })
        .map(|task| async { task?.await? })
        .buffered(at_once)
        .boxed();
    let mut lengths = Vec::with_capacity(partitions.len());
    // Reading, checking, transposing and encoding keep all cores busy while finished pages are written in their order.
    while let Some(next) = windows.next().await {
        match next? {
            Next::Window(window, _held) => {
                for rows in window.rows {
                    segment.append(rows).await?;
                }
                lengths.extend(window.lengths);
            }
            Next::Large(length, mut slices, _held) => {
                while let Some(rows) = slices.recv().await {
                    for rows in rows? {
                        segment.append(rows).await?;
                    }
                    budget.relieve();
                }
                lengths.push(length);
            }
        }
        budget.relieve();
        progress.advance(MERGE_STAGE, lengths.len() as u64);
    }
    drop(windows);
    let files = segment.finish(&lengths, partitions.total_loss().unwrap_or_default()).await?;
    progress.complete(MERGE_STAGE);
    Ok(files)
}

fn partition_length(rows: u64) -> Result<u32> {
    u32::try_from(rows).map_err(|_| Error::invalid(format!("a partition of {rows} rows: an index holds at most {} in one", u32::MAX)))
}

/// Put the rows of each partition together, then make pages of the window.
#[allow(
    clippy::slow_vector_initialization,
    reason = "measured: fresh zeroed pages from the system take longer than used ones that are filled"
)]
async fn encode(partitions: &Partitions, window: Range<usize>, first_row: u64, encoder: &PageEncoder, transposed: bool) -> Result<Window> {
    let size = window.len();
    let read = partitions.read(window, !transposed).await?;
    let code_width = partitions.code_width();
    let lengths = (0..size).map(|place| read.iter().map(|rows| rows.num_rows(place)).sum()).collect::<Vec<usize>>();
    let rows: usize = lengths.iter().sum();
    let mut row_ids: Vec<u64> = Vec::with_capacity(rows);
    let mut codes: Vec<u8> = Vec::with_capacity(rows * code_width);
    codes.resize(rows * code_width, 0);
    for (place, num_rows) in lengths.iter().enumerate() {
        let start = row_ids.len();
        let partition = &mut codes[start * code_width..(start + num_rows) * code_width];
        let runs = read.iter().flat_map(|rows| rows.runs(place).map(|(ids, codes)| (ids, codes, rows.is_transposed())));
        for (ids, rows, is_transposed) in runs {
            let first = row_ids.len() - start;
            if is_transposed {
                for (byte, column) in rows.chunks_exact(ids.len().max(1)).enumerate() {
                    partition[byte * num_rows + first..][..ids.len()].copy_from_slice(column);
                }
            } else if transposed {
                transpose_into(rows, code_width, partition, *num_rows, first);
            } else {
                partition[first * code_width..][..rows.len()].copy_from_slice(rows);
            }
            row_ids.extend_from_slice(ids);
        }
    }
    drop(read);
    let lengths = lengths.iter().map(|rows| partition_length(*rows as u64)).collect::<Result<_>>()?;
    let codes = fixed_size_list(Arc::new(UInt8Array::from(codes)), code_width)?;
    let rows = vec![encoder.row_ids(first_row, UInt64Array::from(row_ids)).await?, encoder.codes(first_row, codes).await?];
    Ok(Window { lengths, rows })
}
