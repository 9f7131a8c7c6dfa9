//! Flat pages: how the columns of a bucket file, and the vectors of a table, lie in the bytes of their files.
//!
//! Lance's 2.0 format stores a column without nulls as its plain values, page after page; later ones do so where values are wide. So a
//! range of rows is a range of bytes: the writer of buckets appends what it has gathered as it is, and readers ask the store for just the
//! bytes they need, with no encoder or decoder between. Any Lance reader reads these files; files of other encodings are read through
//! Lance's decoder.

use std::ops::Range;
use std::sync::Arc;

use lance_encoding::decoder::{ColumnInfo, PageEncoding, PageInfo};
use lance_encoding::format::ProtobufUtils;
use lance_encoding::format::metadata::PageLayout;
use lance_encoding::format::metadata::compressive_encoding::Compression;
use lance_encoding::format::metadata::full_zip_layout::Details;
use lance_encoding::format::metadata::page_layout::Layout;
use lance_encoding::format::pb::{ArrayEncoding, ColumnEncoding, column_encoding};

use crate::numbers::SmallNumbers;

/// Values of one row of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlatType {
    /// Bits of an integer.
    Integer(u64),
    /// Bytes of a fixed-size list.
    Bytes(usize),
    /// A fixed-size list of numbers.
    Vector { bits: u64, dimension: u64 },
}

impl FlatType {
    pub fn row_bytes(self) -> u64 {
        match self {
            Self::Integer(bits) => bits / 8,
            Self::Bytes(bytes) => bytes as u64,
            Self::Vector { bits, dimension } => bits / 8 * dimension,
        }
    }

    fn encoding(self) -> ArrayEncoding {
        let flat = |bits| ProtobufUtils::basic_no_null_encoding(ProtobufUtils::flat_encoding(bits, 0, None));
        let list = |items, bits| ProtobufUtils::basic_no_null_encoding(ProtobufUtils::fsl_encoding(items, flat(bits), false));
        match self {
            Self::Integer(bits) => flat(bits),
            Self::Bytes(bytes) => list(bytes as u64, 8),
            Self::Vector { bits, dimension } => list(dimension, bits),
        }
    }

    /// Whether a page holds values of this type as they are, and nothing else.
    fn is_of(self, page: &PageInfo) -> bool {
        match &page.encoding {
            PageEncoding::Legacy(encoding) => *encoding == self.encoding(),
            // Of the formats from 2.1 on wide values, of which none is null: no levels between them.
            PageEncoding::Structural(PageLayout { layout: Some(Layout::FullZipLayout(zipped)) }) => {
                let Self::Vector { bits, dimension } = self else { return false };
                let numbers = match zipped.value_compression.as_ref().and_then(|values| values.compression.as_ref()) {
                    Some(Compression::FixedSizeList(list)) if list.items_per_value == dimension && !list.has_validity => &list.values,
                    _ => return false,
                };
                let plain = match numbers.as_ref().and_then(|values| values.compression.as_ref()) {
                    Some(Compression::Flat(flat)) => flat.bits_per_value == bits && flat.data.is_none(),
                    _ => false,
                };
                let width = matches!(zipped.details, Some(Details::BitsPerValue(width)) if u64::from(width) == bits * dimension);
                let all = [zipped.num_items, zipped.num_visible_items].map(u64::from) == [page.num_rows; 2];
                plain && width && all && zipped.bits_rep == 0 && zipped.bits_def == 0
            }
            _ => false,
        }
    }
}

/// Bytes of a page's description while a file is closed, for each column: as Lance's writer takes it, and as it is written.
pub const CLOSING_PAGE_BYTES: usize = 400;

/// The pages of all columns that were written so far. A file of a long build has many, so that each is kept in a few bytes.
#[derive(Debug, Default)]
pub struct FlatPages {
    count: usize,
    /// For each page its rows, and for each column what lies between the values before and its own.
    numbers: SmallNumbers,
    /// Of what was written.
    end: u64,
}

impl FlatPages {
    /// A page of `num_rows` rows begins.
    pub fn begin(&mut self, num_rows: u64) {
        self.count += 1;
        self.numbers.push(num_rows);
    }

    /// The values of the next column lie at `position`, `None` where that is before others.
    pub fn push(&mut self, position: u64, num_bytes: u64) -> Option<()> {
        self.numbers.push(position.checked_sub(self.end)?);
        self.end = position + num_bytes;
        Some(())
    }

    /// Bytes that this takes.
    pub fn bytes(&self) -> usize {
        self.numbers.bytes()
    }

    /// Bytes that it takes to close a file with as many pages.
    pub fn closing_bytes(&self, columns: usize) -> usize {
        self.count * columns * CLOSING_PAGE_BYTES
    }

    /// What the file's metadata is to say of the columns.
    pub fn finish(self, kinds: &[FlatType]) -> Vec<Arc<ColumnInfo>> {
        let mut pages: Vec<Vec<PageInfo>> = kinds.iter().map(|_| Vec::with_capacity(self.count)).collect();
        let encodings: Vec<_> = kinds.iter().map(|kind| PageEncoding::Legacy(kind.encoding())).collect();
        let (mut numbers, mut end) = (self.numbers.iter(), 0);
        while let Some(num_rows) = numbers.next() {
            for ((kind, encoding), pages) in kinds.iter().zip(&encodings).zip(&mut pages) {
                let (position, size) = (end + numbers.next().unwrap_or_default(), num_rows * kind.row_bytes());
                let buffer_offsets_and_sizes = Arc::from([(position, size)]);
                pages.push(PageInfo { num_rows, priority: 0, encoding: encoding.clone(), buffer_offsets_and_sizes });
                end = position + size;
            }
        }
        let values = ColumnEncoding { column_encoding: Some(column_encoding::ColumnEncoding::Values(())) };
        let column = |(index, pages): (u32, Vec<PageInfo>)| Arc::new(ColumnInfo::new(index, pages.into(), Vec::new(), values.clone()));
        (0..).zip(pages).map(column).collect()
    }
}

/// Where the rows of a flat column lie in a file.
#[derive(Debug)]
pub struct FlatColumn {
    row_bytes: u64,
    /// First row and position of each page; a last entry ends the last page.
    pages: Vec<(u64, u64)>,
}

impl FlatColumn {
    /// `None` where any page is not plain values of `kind` that lie within the first `data_bytes` of the file.
    pub fn of(column: &ColumnInfo, kind: FlatType, data_bytes: u64) -> Option<Self> {
        let mut pages = Vec::with_capacity(column.page_infos.len() + 1);
        let mut row = 0u64;
        for page in column.page_infos.iter() {
            let [(position, size)] = page.buffer_offsets_and_sizes.as_ref() else {
                return None;
            };
            let fits = page.num_rows.checked_mul(kind.row_bytes()) == Some(*size) && position.checked_add(*size)? <= data_bytes;
            if !kind.is_of(page) || !fits {
                return None;
            }
            pages.push((row, *position));
            row = row.checked_add(page.num_rows)?;
        }
        pages.push((row, 0));
        Some(Self { row_bytes: kind.row_bytes(), pages })
    }

    pub fn num_rows(&self) -> u64 {
        self.pages.last().map_or(0, |(row, _)| *row)
    }

    /// The bytes of `rows`, which must be rows of this file, page after page.
    pub fn pieces(&self, rows: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.pages.partition_point(|(row, _)| *row <= rows.start).saturating_sub(1);
        self.pages[first..].windows(2).map_while(move |pair| {
            let ((start, position), (end, _)) = (pair[0], pair[1]);
            let (from, to) = (rows.start.max(start), rows.end.min(end));
            (start < rows.end).then(|| {
                let at = position + from.saturating_sub(start) * self.row_bytes;
                at..at + to.saturating_sub(from) * self.row_bytes
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_rows_is_ranges_of_bytes() {
        let mut pages = FlatPages::default();
        for (rows, position) in [(10, 64), (5, 1024), (7, 4096)] {
            pages.begin(rows);
            pages.push(position, rows * 8).unwrap();
        }
        assert!(pages.push(4096, 8).is_none(), "over another");
        let [info] = pages.finish(&[FlatType::Integer(64)]).try_into().unwrap();
        assert!(FlatColumn::of(&info, FlatType::Integer(32), 10_000).is_none());
        assert!(FlatColumn::of(&info, FlatType::Bytes(8), 10_000).is_none());
        assert!(FlatColumn::of(&info, FlatType::Integer(64), 4096 + 55).is_none(), "cut");
        let column = FlatColumn::of(&info, FlatType::Integer(64), 4096 + 56).unwrap();
        assert_eq!(column.num_rows(), 22);
        let pieces = |rows| column.pieces(rows).map(|bytes| (bytes.start, bytes.end)).collect::<Vec<_>>();
        assert_eq!(pieces(2..4), [(80, 96)]);
        assert_eq!(pieces(8..17), [(128, 144), (1024, 1064), (4096, 4112)]);
        assert_eq!(pieces(15..22), [(4096, 4152)]);
        assert_eq!(pieces(10..15), [(1024, 1064)]);
    }

    #[test]
    fn the_pages_of_a_long_build_take_little_memory() {
        let (mut pages, mut end) = (FlatPages::default(), 0u64);
        let kinds = [FlatType::Integer(64), FlatType::Integer(32), FlatType::Bytes(96)];
        let count = 1u64 << 17;
        for page in 0..count {
            let rows = 1500 + page % 1000;
            pages.begin(rows);
            for kind in kinds {
                let position = end.next_multiple_of(64);
                pages.push(position, rows * kind.row_bytes()).unwrap();
                end = position + rows * kind.row_bytes();
            }
        }
        assert!(pages.bytes() <= 8 * count as usize, "{}", pages.bytes());
        let columns = pages.finish(&kinds);
        let last = &columns[2].page_infos[count as usize - 1];
        let [(position, size)] = last.buffer_offsets_and_sizes.as_ref() else { panic!("{last:?}") };
        assert_eq!((position + size, columns[0].page_infos.len() as u64), (end, count));
    }
}
