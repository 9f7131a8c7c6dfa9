//! A bucket file whose values are read as they lie, without a decoder: just the bytes of the rows that are asked for.

use std::fs::{File, Metadata};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use arrow_array::{ArrayRef, FixedSizeListArray, RecordBatch, UInt8Array, UInt32Array, UInt64Array};
use arrow_buffer::{Buffer, ScalarBuffer};
use arrow_schema::{DataType, Field, Schema};

use crate::artifact::format::{PART_ID_COLUMN, PQ_CODE_COLUMN, ROW_ID_COLUMN, partition_schema};
use crate::error::Result;
use crate::lance::file::{ByteReader, FlatColumn, FlatType, LanceFile};
use crate::model::item_field;

/// Where a file's bytes come from.
#[derive(Debug)]
pub enum Place {
    /// Opened for each read: an index of many artifacts would otherwise keep hundreds of files open for each of them.
    Local(PathBuf),
    Store(Box<ByteReader>),
}

/// Row ids, codes, and partition ids where there are any.
#[derive(Debug)]
pub struct FlatFile {
    pub place: Place,
    /// Of a local file, when its metadata was read.
    stamp: Option<Stamp>,
    code_width: usize,
    columns: Vec<FlatColumn>,
}

/// Tells a file from one that took its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self { bytes: metadata.len(), modified: metadata.modified().ok() }
    }
}

/// Bytes of one piece of one column, and its place among the values.
type Request = (Range<u64>, usize);

impl FlatFile {
    /// `None` where a column is encoded, or the columns have not the same pages.
    pub fn of(place: Place, file: &LanceFile, code_width: usize, has_part_ids: bool) -> Option<Self> {
        let mut wanted = vec![(ROW_ID_COLUMN, FlatType::Integer(64)), (PQ_CODE_COLUMN, FlatType::Bytes(code_width))];
        wanted.extend(has_part_ids.then_some((PART_ID_COLUMN, FlatType::Integer(32))));
        let columns = file.flat_columns(&wanted)?;
        let stamp = match &place {
            Place::Local(path) => std::fs::metadata(path).ok().map(|metadata| Stamp::of(&metadata)),
            Place::Store(_) => None,
        };
        Some(Self { place, stamp, code_width, columns })
    }

    fn columns(&self, part_ids: bool) -> &[FlatColumn] {
        &self.columns[..if part_ids { self.columns.len() } else { 2 }]
    }

    fn requests(&self, ranges: &[Range<u64>], columns: &[FlatColumn]) -> Vec<Request> {
        let mut requests = Vec::with_capacity(ranges.len() * columns.len());
        for (index, column) in columns.iter().enumerate() {
            let pieces = ranges.iter().flat_map(|rows| column.pieces(rows.clone())).filter(|bytes| !bytes.is_empty());
            requests.extend(pieces.enumerate().map(|(piece, bytes)| (bytes, piece * columns.len() + index)));
        }
        requests.sort_unstable_by_key(|(bytes, _)| bytes.start);
        requests
    }

    /// Rows of `ranges` from an object store: a batch for each range and page.
    pub async fn read(&self, file: &ByteReader, ranges: &[Range<u64>], part_ids: bool) -> Result<Vec<RecordBatch>> {
        let columns = self.columns(part_ids);
        let requests = self.requests(ranges, columns);
        let read = file.read(requests.iter().map(|(bytes, _)| bytes.clone()).collect()).await?;
        let mut values = vec![Buffer::default(); requests.len()];
        for ((_, place), bytes) in requests.into_iter().zip(read) {
            values[place] = Buffer::from(bytes);
        }
        values.chunks_exact(columns.len()).map(|values| self.batch(values)).collect()
    }

    /// The same from a local file, on the calling thread; also the bytes that were read.
    pub fn read_local(&self, path: &PathBuf, ranges: &[Range<u64>], part_ids: bool) -> std::io::Result<(Vec<RecordBatch>, u64)> {
        let columns = self.columns(part_ids);
        let requests = self.requests(ranges, columns);
        let file = File::open(path)?;
        let now = Stamp::of(&file.metadata()?);
        if self.stamp.is_some_and(|then| then != now) {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "the file was replaced or changed since it was opened first"));
        }
        let bytes = requests.iter().map(|(bytes, _)| bytes.end - bytes.start).sum::<u64>();
        // A damaged file may claim more rows than there is memory for.
        let mut read = Vec::new();
        read.try_reserve_exact(bytes as usize).map_err(|e| std::io::Error::new(std::io::ErrorKind::OutOfMemory, e))?;
        read.resize(bytes as usize, 0u8);
        let mut rest = &mut read[..];
        for (bytes, _) in &requests {
            let (now, later) = rest.split_at_mut((bytes.end - bytes.start) as usize);
            read_exact_at(&file, now, bytes.start)?;
            rest = later;
        }
        let read = Buffer::from_vec(read);
        let mut values = vec![Buffer::default(); requests.len()];
        let mut at = 0;
        for (bytes, place) in requests {
            let len = (bytes.end - bytes.start) as usize;
            values[place] = read.slice_with_length(at, len);
            at += len;
        }
        let batches = values.chunks_exact(columns.len()).map(|values| self.batch(values)).collect::<Result<_>>();
        Ok((batches.map_err(std::io::Error::other)?, bytes))
    }

    fn batch(&self, values: &[Buffer]) -> Result<RecordBatch> {
        let num_rows = values[0].len() / size_of::<u64>();
        let codes = UInt8Array::new(ScalarBuffer::new(values[1].clone(), 0, values[1].len()), None);
        let codes = FixedSizeListArray::try_new(item_field(DataType::UInt8), self.code_width as i32, Arc::new(codes), None)?;
        let row_ids = UInt64Array::new(ScalarBuffer::new(aligned(&values[0]), 0, num_rows), None);
        let mut columns: Vec<ArrayRef> = vec![Arc::new(row_ids), Arc::new(codes)];
        let mut schema = partition_schema(self.code_width);
        if let Some(part_ids) = values.get(2) {
            columns.push(Arc::new(UInt32Array::new(ScalarBuffer::new(aligned(part_ids), 0, num_rows), None)));
            let fields = schema.fields().iter().cloned().chain([Arc::new(Field::new(PART_ID_COLUMN, DataType::UInt32, false))]);
            schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        }
        Ok(RecordBatch::try_new(schema, columns)?)
    }
}

/// Values that start at any byte of what was read, as Arrow wants them.
fn aligned(values: &Buffer) -> Buffer {
    if values.as_ptr().align_offset(align_of::<u64>()) == 0 { values.clone() } else { Buffer::from_slice_ref(values.as_slice()) }
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(not(unix))]
fn read_exact_at(mut file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(buffer)
}
