//! A partition that is too large to be held as a whole, encoded in one pass.
//!
//! A segment holds the codes of a partition transposed: byte 0 of all its rows, then byte 1 of all, and so on, read as if they were
//! rows of codes. So a slice of rows belongs to as many places as a code has bytes. Pages of a column may be written in any order, so
//! each slice becomes a page for each byte. A page is of whole rows of codes, and the bytes of a slice do not begin and end with one:
//! the last rows of a slice are kept for the next one, and the first rows of the partition for the end, where they follow the last
//! rows of the byte before.

use std::sync::Arc;

use arrow_array::{UInt8Array, UInt64Array};
use arrow_buffer::{Buffer, ScalarBuffer};
use tokio::sync::mpsc;

use super::partitions::Partitions;
use super::transpose::transpose_into;
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::lance::segment::{EncodedColumn, PageEncoder};
use crate::model::fixed_size_list;

/// Which partition, and where it is in the segment.
pub struct LargePartition {
    pub partition: usize,
    pub first_row: u64,
    pub num_rows: u64,
    /// Of row ids and codes that are read at once.
    pub slice_bytes: u64,
    /// Whether codes lie byte by byte of the partition.
    pub transposed: bool,
}

/// Encode a partition slice by slice, until all are sent or nobody takes them any more.
pub async fn encode_large(
    partitions: Arc<Partitions>,
    large: LargePartition,
    encoder: Arc<PageEncoder>,
    budget: Budget,
    sender: mpsc::Sender<Result<Vec<EncodedColumn>>>,
) {
    if let Err(error) = send_slices(&partitions, &large, &encoder, &budget, &sender).await {
        let _ = sender.send(Err(error)).await;
    }
}

async fn send_slices(
    partitions: &Partitions,
    large: &LargePartition,
    encoder: &PageEncoder,
    budget: &Budget,
    sender: &mpsc::Sender<Result<Vec<EncodedColumn>>>,
) -> Result<()> {
    let mut slices = partitions.slices(large.partition, large.slice_bytes);
    let mut layout = Layout::new(large.num_rows, partitions.code_width());
    while let Some(rows) = slices.next().await? {
        let first_row = large.first_row + layout.rows_seen;
        let row_ids: Vec<u64> = rows.row_ids().flatten().copied().collect();
        let pages = if large.transposed {
            layout.add(rows.runs(0).map(|(_, codes)| codes), rows.num_rows(0))
        } else {
            layout.add_row_by_row(rows.runs(0).map(|(_, codes)| codes), rows.num_rows(0))
        };
        drop(rows);
        let mut encoded = vec![encoder.row_ids(first_row, UInt64Array::from(row_ids)).await?];
        for page in pages {
            let codes = UInt8Array::new(ScalarBuffer::new(page.codes.clone(), 0, page.codes.len()), None);
            let codes = fixed_size_list(Arc::new(codes), partitions.code_width())?;
            encoded.push(encoder.codes(large.first_row + page.row, codes).await?);
        }
        budget.relieve();
        if sender.send(Ok(encoded)).await.is_err() {
            return Ok(());
        }
    }
    if layout.rows_seen != large.num_rows {
        return Err(Error::internal(format!("partition {} has {} rows, {} were read", large.partition, large.num_rows, layout.rows_seen)));
    }
    Ok(())
}

/// Consecutive rows of codes as they lie in the segment.
#[derive(Debug)]
struct Page {
    /// The first one, counted from the start of the partition.
    row: u64,
    codes: Buffer,
}

/// Cuts slices of rows into pages of the transposed partition, which has at least as many rows as a code has bytes.
struct Layout {
    num_rows: u64,
    code_width: usize,
    rows_seen: u64,
    /// Rows at the end of what was seen that the pages of their slice did not reach, as they were read.
    kept: Vec<u8>,
    /// The first rows of the partition, as they were read.
    head: Vec<u8>,
}

impl Layout {
    fn new(num_rows: u64, code_width: usize) -> Self {
        Self { num_rows, code_width, rows_seen: 0, kept: Vec::new(), head: Vec::new() }
    }

    /// The first byte of a whole row of codes, from that of a byte of a row of the partition on.
    fn whole_row(&self, byte: usize, row: u64) -> u64 {
        (byte as u64 * self.num_rows + row).next_multiple_of(self.code_width as u64)
    }

    /// The next rows as they are.
    fn add_row_by_row<'a>(&mut self, runs: impl Iterator<Item = &'a [u8]>, new_rows: usize) -> Vec<Page> {
        let codes: Vec<u8> = runs.flatten().copied().collect();
        let page = Page { row: self.rows_seen, codes: Buffer::from_vec(codes) };
        self.rows_seen += new_rows as u64;
        vec![page]
    }

    /// The pages that the next rows, and those that were kept, make complete.
    fn add<'a>(&mut self, runs: impl Iterator<Item = &'a [u8]>, new_rows: usize) -> Vec<Page> {
        let width = self.code_width;
        let held = self.kept.len() / width + new_rows;
        // The rows of the partition that are held now.
        let first = self.rows_seen - (self.kept.len() / width) as u64;
        let end = self.rows_seen + new_rows as u64;
        let mut transposed = vec![0u8; held * width];
        transpose_into(&self.kept, width, &mut transposed, held, 0);
        let mut at = self.kept.len() / width;
        let mut last = std::mem::take(&mut self.kept);
        for codes in runs {
            transpose_into(codes, width, &mut transposed, held, at);
            at += codes.len() / width;
            let wanted = (width * width).saturating_sub(self.head.len());
            self.head.extend_from_slice(&codes[..wanted.min(codes.len())]);
            // Only the last rows are needed again.
            last.extend_from_slice(&codes[codes.len().saturating_sub(width * width)..]);
            last.drain(..last.len().saturating_sub(width * width));
        }
        self.rows_seen = end;
        let is_last = end == self.num_rows;
        // Of a slice in the middle, the rows that a page of its bytes may reach into must be there.
        let to = if is_last { end } else { end.saturating_sub(width as u64).max(first) };
        if !is_last {
            self.kept = last.split_off(last.len() - (end - to) as usize * width);
        }
        let transposed = Buffer::from_vec(transposed);
        let mut pages = Vec::with_capacity(width + 1);
        for byte in 0..width {
            let column = byte as u64 * self.num_rows;
            // Everything before the first row of this byte that begins a row of codes is the page of the byte before.
            let from = self.whole_row(byte, first);
            let until = self.whole_row(byte, to);
            let start = byte * held + (from - column - first) as usize;
            if !is_last {
                if until > from {
                    let bytes = transposed.slice_with_length(start, (until - from) as usize);
                    pages.push(Page { row: from / width as u64, codes: bytes });
                }
                continue;
            }
            let column_end = column + self.num_rows;
            let whole = column_end / width as u64 * width as u64;
            if whole > from {
                pages.push(Page { row: from / width as u64, codes: transposed.slice_with_length(start, (whole - from) as usize) });
            }
            // The row of codes that begins with the last rows of this byte and ends with the first rows of the next one.
            let rest = (column_end - whole) as usize;
            if rest > 0 {
                let end = (byte + 1) * held;
                let mut row = transposed.as_slice()[end - rest..end].to_vec();
                row.extend(self.head.iter().skip(byte + 1).step_by(width).take(width - rest));
                pages.push(Page { row: whole / width as u64, codes: Buffer::from_vec(row) });
            }
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_the_transposed_partition() {
        for width in [1usize, 2, 3, 8, 16, 33] {
            for num_rows in [width.max(2), 3 * width + 1, 200, 333, 1000] {
                let codes: Vec<u8> = (0..num_rows * width).map(|i| (i * 31 + i / 253) as u8).collect();
                let mut expected = vec![0u8; codes.len()];
                transpose_into(&codes, width, &mut expected, num_rows, 0);
                for slice in [1, 7, width, 2 * width + 1, 100, 5000] {
                    let mut layout = Layout::new(num_rows as u64, width);
                    let mut found = vec![None; codes.len()];
                    for start in (0..num_rows).step_by(slice) {
                        let end = (start + slice).min(num_rows);
                        let middle = start + (end - start) / 2;
                        let runs = [&codes[start * width..middle * width], &codes[middle * width..end * width]];
                        for page in layout.add(runs.into_iter(), end - start) {
                            assert!(page.codes.len().is_multiple_of(width));
                            for (i, value) in page.codes.iter().enumerate() {
                                let place = &mut found[page.row as usize * width + i];
                                assert!(place.replace(*value).is_none(), "twice: width {width}, {num_rows} rows, slices of {slice}");
                            }
                        }
                    }
                    let found: Vec<u8> = found.into_iter().map(|value| value.expect("a byte in no page")).collect();
                    assert!(found == expected, "width {width}, {num_rows} rows, slices of {slice}");
                }
            }
        }
    }
}
