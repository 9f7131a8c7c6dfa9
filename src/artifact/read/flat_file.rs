//! A bucket file whose values are read as they lie, without a decoder: just the bytes of the rows that are asked for.

use std::fs::{File, Metadata};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use arrow_array::{ArrayRef, FixedSizeListArray, RecordBatch, UInt8Array, UInt32Array, UInt64Array};
use arrow_buffer::{Buffer, MutableBuffer, ScalarBuffer};
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

/// Larger reads than this are tried before they are made.
const PROBED_BYTES: usize = 64 << 20;

/// Bytes of one piece of one column, and where they go among those of its rows.
struct Request {
    bytes: Range<u64>,
    column: usize,
    place: usize,
}

impl FlatFile {
    /// `None` where a column is encoded.
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

    /// What to read, in the order of the file, and the bytes of each column.
    fn requests(&self, ranges: &[Range<u64>], part_ids: bool) -> (Vec<Request>, Vec<usize>) {
        let columns = &self.columns[..if part_ids { self.columns.len() } else { 2 }];
        let mut requests = Vec::with_capacity(ranges.len() * columns.len());
        let mut sizes = vec![0; columns.len()];
        for ((column, of_column), size) in columns.iter().enumerate().zip(&mut sizes) {
            let pieces = ranges.iter().flat_map(|rows| of_column.pieces(rows.clone())).filter(|bytes| !bytes.is_empty());
            for bytes in pieces {
                let place = *size;
                *size += (bytes.end - bytes.start) as usize;
                requests.push(Request { bytes, column, place });
            }
        }
        requests.sort_unstable_by_key(|request| request.bytes.start);
        (requests, sizes)
    }

    /// Rows of `ranges` from an object store, one after the other.
    pub async fn read(&self, file: &ByteReader, ranges: &[Range<u64>], part_ids: bool) -> Result<RecordBatch> {
        let (requests, sizes) = self.requests(ranges, part_ids);
        let read = file.read(requests.iter().map(|request| request.bytes.clone()).collect()).await?;
        let mut values = allocate(&sizes)?;
        for (request, bytes) in requests.into_iter().zip(read) {
            values[request.column][request.place..request.place + bytes.len()].copy_from_slice(&bytes);
        }
        self.batch(values)
    }

    /// The same from a local file, on the calling thread; also the bytes that were read.
    pub fn read_local(&self, path: &PathBuf, ranges: &[Range<u64>], part_ids: bool) -> std::io::Result<(RecordBatch, u64)> {
        let (requests, sizes) = self.requests(ranges, part_ids);
        let file = File::open(path)?;
        let now = Stamp::of(&file.metadata()?);
        if self.stamp.is_some_and(|then| then != now) {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "the file was replaced or changed since it was opened first"));
        }
        let mut values = allocate(&sizes)?;
        for Request { bytes, column, place } in requests {
            let len = (bytes.end - bytes.start) as usize;
            read_exact_at(&file, &mut values[column][place..place + len], bytes.start)?;
        }
        let bytes = sizes.iter().sum::<usize>() as u64;
        Ok((self.batch(values).map_err(std::io::Error::other)?, bytes))
    }

    fn batch(&self, values: Vec<MutableBuffer>) -> Result<RecordBatch> {
        let mut values = values.into_iter().map(Buffer::from);
        let mut next = || values.next().unwrap_or_default();
        let (row_ids, codes) = (next(), next());
        let num_rows = row_ids.len() / size_of::<u64>();
        let codes = UInt8Array::new(ScalarBuffer::new(codes.clone(), 0, codes.len()), None);
        let codes = FixedSizeListArray::try_new(item_field(DataType::UInt8), self.code_width as i32, Arc::new(codes), None)?;
        let mut columns: Vec<ArrayRef> = vec![Arc::new(UInt64Array::new(ScalarBuffer::new(row_ids, 0, num_rows), None)), Arc::new(codes)];
        let mut schema = partition_schema(self.code_width);
        if let Some(part_ids) = values.next() {
            columns.push(Arc::new(UInt32Array::new(ScalarBuffer::new(part_ids, 0, num_rows), None)));
            let fields = schema.fields().iter().cloned().chain([Arc::new(Field::new(PART_ID_COLUMN, DataType::UInt32, false))]);
            schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        }
        Ok(RecordBatch::try_new(schema, columns)?)
    }
}

/// A damaged file may claim more rows than there is memory for.
fn allocate(sizes: &[usize]) -> std::io::Result<Vec<MutableBuffer>> {
    let all = sizes.iter().sum();
    if all > PROBED_BYTES {
        let mut probe: Vec<u8> = Vec::new();
        probe.try_reserve_exact(all).map_err(|e| std::io::Error::new(std::io::ErrorKind::OutOfMemory, e))?;
    }
    let allocate = |size: &usize| {
        let mut values = MutableBuffer::new(*size);
        values.resize(*size, 0);
        values
    };
    Ok(sizes.iter().map(allocate).collect())
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
