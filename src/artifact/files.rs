//! Open files of an artifact: each is opened once, checked, and read by ranges of rows.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, FixedSizeListArray, RecordBatch, UInt8Array, UInt32Array, UInt64Array};
use arrow_buffer::{Buffer, ScalarBuffer};
use arrow_schema::{DataType, Field, Schema};
use futures::TryStreamExt;
use lance_core::cache::LanceCache;
use lance_encoding::decoder::{DecoderPlugins, FilterExpression};
use lance_file::reader::{FileReader, FileReaderOptions};
use lance_io::ReadBatchParams;
use lance_io::scheduler::{FileScheduler, ScanScheduler, SchedulerConfig};
use lance_io::utils::CachedFileSize;
use tokio::sync::OnceCell;
use xxhash_rust::xxh3::xxh3_64;

use super::checksum::to_hex;
use super::flat::{FlatColumn, FlatType};
use super::layout::{PART_ID_COLUMN, PQ_CODE_COLUMN, ROW_ID_COLUMN, partition_schema};
use super::manifest::FileEntry;
use super::store::ArtifactStore;
use crate::error::{Error, Result};
use crate::model::item_field;

/// An open bucket file.
#[derive(Debug)]
pub struct BucketFile {
    reader: FileReader,
    pub code_width: usize,
    pub has_part_ids: bool,
    flat: Option<FlatFile>,
}

impl BucketFile {
    pub fn num_rows(&self) -> u64 {
        self.reader.num_rows()
    }
}

/// A bucket file whose values can be read as they lie: row ids, codes, and partition ids where there are any.
#[derive(Debug)]
struct FlatFile {
    file: FileScheduler,
    columns: Vec<FlatColumn>,
}

impl FlatFile {
    /// `None` where a column is encoded, or the columns have not the same pages.
    fn of(opened: &Opened, code_width: usize, has_part_ids: bool) -> Option<Self> {
        let mut wanted = vec![(ROW_ID_COLUMN, FlatType::Integer(64)), (PQ_CODE_COLUMN, FlatType::Bytes(code_width))];
        wanted.extend(has_part_ids.then_some((PART_ID_COLUMN, FlatType::Integer(32))));
        let infos = &opened.reader.metadata().column_infos;
        // One column of the file for each field, as long as none has columns of its own.
        if infos.len() != opened.schema.fields().len() {
            return None;
        }
        let column = |(name, kind)| FlatColumn::of(infos.get(opened.schema.index_of(name).ok()?)?, kind, opened.size);
        let columns = wanted.into_iter().map(column).collect::<Option<Vec<_>>>()?;
        let same = columns.iter().all(|c| c.num_rows() == opened.reader.num_rows() && c.same_pages(&columns[0]));
        same.then(|| Self { file: opened.file.clone(), columns })
    }

    /// Rows of `ranges`, a batch for each range and page; nothing else is read.
    async fn read(&self, ranges: &[Range<u64>], code_width: usize, part_ids: bool) -> lance_core::Result<Vec<RecordBatch>> {
        let columns = &self.columns[..if part_ids { self.columns.len() } else { 2 }];
        // Per piece and column: bytes, and the place of the values in the answer.
        let mut requests: Vec<(Range<u64>, usize)> = Vec::new();
        for (index, column) in columns.iter().enumerate() {
            let pieces = ranges.iter().flat_map(|rows| column.pieces(rows.clone())).enumerate();
            requests.extend(pieces.map(|(piece, bytes)| (bytes, piece * columns.len() + index)));
        }
        requests.sort_unstable_by_key(|(bytes, _)| bytes.start);
        let read = self.file.submit_request(requests.iter().map(|(bytes, _)| bytes.clone()).collect(), 0).await?;
        let mut values = vec![Buffer::default(); requests.len()];
        for ((_, place), bytes) in requests.into_iter().zip(read) {
            values[place] = Buffer::from(bytes);
        }
        values.chunks_exact(columns.len()).map(|values| flat_batch(values, code_width)).collect()
    }
}

fn flat_batch(values: &[Buffer], code_width: usize) -> lance_core::Result<RecordBatch> {
    let num_rows = values[0].len() / size_of::<u64>();
    let codes = UInt8Array::new(ScalarBuffer::new(values[1].clone(), 0, values[1].len()), None);
    let codes = FixedSizeListArray::try_new(item_field(DataType::UInt8), code_width as i32, Arc::new(codes), None)?;
    let row_ids = UInt64Array::new(ScalarBuffer::new(aligned(&values[0]), 0, num_rows), None);
    let mut columns: Vec<ArrayRef> = vec![Arc::new(row_ids), Arc::new(codes)];
    let mut schema = partition_schema(code_width);
    if let Some(part_ids) = values.get(2) {
        columns.push(Arc::new(UInt32Array::new(ScalarBuffer::new(aligned(part_ids), 0, num_rows), None)));
        let fields = schema.fields().iter().cloned().chain([Arc::new(Field::new(PART_ID_COLUMN, DataType::UInt32, false))]);
        schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    }
    Ok(RecordBatch::try_new(schema, columns)?)
}

/// Values that start at any byte of what was read, as Arrow wants them.
fn aligned(values: &Buffer) -> Buffer {
    if values.as_ptr().align_offset(align_of::<u64>()) == 0 { values.clone() } else { Buffer::from_slice_ref(values.as_slice()) }
}

/// A Lance file, its Arrow schema and its bytes.
struct Opened {
    file: FileScheduler,
    reader: FileReader,
    schema: Schema,
    size: u64,
}

type Slot = Arc<OnceCell<Arc<BucketFile>>>;

/// The files of one artifact.
#[derive(Debug)]
pub struct BucketFiles {
    store: ArtifactStore,
    scheduler: Arc<ScanScheduler>,
    /// What the manifest says of each file.
    said: BTreeMap<String, FileEntry>,
    open: Mutex<HashMap<String, Slot>>,
}

/// Turn a failed read into the error that fits: what the store could not give is `Storage`, everything else is a file that
/// is not what its manifest says.
fn read_error(error: lance_core::Error, file: &str, store: &ArtifactStore) -> Error {
    let what = format!("reading {file} of {}", store.uri());
    // Lance says IO of undecodable metadata too: only what the store itself said is a storage error.
    let from_store = match &error {
        lance_core::Error::IO { source, .. } => {
            match (source.downcast_ref::<std::io::Error>(), source.downcast_ref::<object_store::Error>()) {
                (Some(io), _) => {
                    !matches!(io.kind(), std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::NotFound | std::io::ErrorKind::InvalidData)
                }
                (_, Some(object)) => !matches!(object, object_store::Error::NotFound { .. }),
                _ => false,
            }
        }
        lance_core::Error::Timeout { .. } => true,
        _ => false,
    };
    match Error::from(error) {
        Error::Interrupted(m) => Error::Interrupted(m),
        other if from_store => Error::Storage(format!("{what}: {other}")),
        other => Error::corrupt(format!("{what}: the file is missing, cut or damaged: {other}")),
    }
}

/// Bytes of the footer that ends every Lance file: three positions, two counts, two version numbers, the magic.
const FOOTER_BYTES: usize = 40;

/// Look at the end of a file before it is decoded: a damaged count would ask for more memory than there is, which no caller
/// can catch. Where the manifest has a checksum of the file's metadata, nothing damaged gets past.
async fn check_tail(file: &FileScheduler, said: Option<&FileEntry>) -> lance_core::Result<u64> {
    let corrupt = |what: String| lance_core::Error::from(Error::corrupt(what));
    let reader = file.reader();
    let size = reader.size().await?;
    if let Some(said) = said
        && said.size_bytes != size as u64
    {
        return Err(corrupt(format!("the file has {size} bytes, the manifest says {}", said.size_bytes)));
    }
    if size < FOOTER_BYTES {
        return Err(corrupt(format!("the file has {size} bytes, fewer than the footer of a Lance file")));
    }
    let checked = said.and_then(|said| Some((usize::try_from(said.tail_bytes?).ok()?, said.tail_checksum.as_deref()?)));
    let tail_bytes = checked.map_or(FOOTER_BYTES, |(bytes, _)| bytes.clamp(FOOTER_BYTES, size));
    let tail = reader.get_range(size - tail_bytes..size).await?;
    if let Some((_, checksum)) = checked
        && to_hex(xxh3_64(&tail)) != checksum
    {
        return Err(corrupt("the file's metadata does not have the checksum that the manifest says".into()));
    }
    let footer = &tail[tail.len() - FOOTER_BYTES..];
    let number = |at: usize, bytes: usize| footer[at..at + bytes].iter().rev().fold(0u64, |sum, byte| (sum << 8) | u64::from(*byte));
    let (positions, counts) = ([number(0, 8), number(8, 8), number(16, 8)], number(24, 4) + number(28, 4));
    if &footer[36..] != b"LANC" || positions.iter().any(|p| *p > size as u64) || counts * 16 > size as u64 {
        return Err(corrupt("the footer is not that of a Lance file, or is damaged".into()));
    }
    Ok(size as u64)
}

/// Run a read in a task of its own: Lance's decoders may panic on damaged bytes, and that must end as an error.
async fn guarded<T: Send + 'static>(
    file: &str,
    store: &ArtifactStore,
    work: impl Future<Output = lance_core::Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(|e| read_error(e, file, store)),
        Err(e) if e.is_panic() => {
            let panic = e.into_panic();
            let message =
                panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
            Err(Error::corrupt(format!("reading {file} of {}: the file cannot be decoded ({message})", store.uri())))
        }
        Err(_) => Err(Error::Interrupted(format!("reading {file} of {} was cancelled", store.uri()))),
    }
}

impl BucketFiles {
    /// Call within a Tokio runtime.
    pub fn new(store: ArtifactStore, said: BTreeMap<String, FileEntry>) -> Self {
        let objects = store.object_store().clone();
        let config = SchedulerConfig::max_bandwidth(&objects);
        Self { store, scheduler: ScanScheduler::new(objects, config), said, open: Mutex::default() }
    }

    pub fn store(&self) -> &ArtifactStore {
        &self.store
    }

    /// Bytes and requests asked of the store so far.
    pub fn io_stats(&self) -> (u64, u64) {
        let stats = self.scheduler.stats();
        (stats.bytes_read, stats.iops)
    }

    /// The reader and its Arrow schema, whose conversion panics on damaged type names and so belongs under the guard.
    async fn open_reader(&self, file: &str) -> Result<Opened> {
        let path = self.store.path(file)?;
        let scheduler = self.scheduler.clone();
        let said = self.said.get(file).cloned();
        guarded(file, &self.store, async move {
            let file = scheduler.open_file(&path, &CachedFileSize::unknown()).await?;
            let size = check_tail(&file, said.as_ref()).await?;
            let plugins = Arc::<DecoderPlugins>::default();
            let reader = FileReader::try_open(file.clone(), None, plugins, &LanceCache::no_cache(), FileReaderOptions::default()).await?;
            let schema = Schema::from(reader.schema().as_ref());
            Ok(Opened { file, reader, schema, size })
        })
        .await
    }

    /// The only batch of a small file, with its schema metadata.
    pub async fn read_whole(&self, file: &str) -> Result<(HashMap<String, String>, RecordBatch)> {
        let Opened { reader, .. } = self.open_reader(file).await?;
        let metadata = reader.schema().metadata.clone();
        if reader.num_rows() != 1 {
            return Err(Error::corrupt(format!("{file} of {}: {} rows, expected one", self.store.uri(), reader.num_rows())));
        }
        let batch = guarded(file, &self.store, async move {
            let rows = u32::try_from(reader.num_rows()).unwrap_or(u32::MAX).max(1);
            let stream = reader.read_stream(ReadBatchParams::RangeFull, rows, 1, FilterExpression::no_filter()).await?;
            let schema = stream.schema();
            let batches: Vec<RecordBatch> = stream.try_collect().await?;
            Ok(arrow_select::concat::concat_batches(&schema, &batches)?)
        })
        .await?;
        Ok((metadata, batch))
    }

    /// Open a bucket file, or answer with the one that is open.
    pub async fn bucket(&self, file: &str) -> Result<Arc<BucketFile>> {
        let slot = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.entry(file.to_string()).or_default().clone()
        };
        slot.get_or_try_init(|| async {
            let opened = self.open_reader(file).await?;
            let corrupt = |what: String| Error::corrupt(format!("{file} of {}: {what}", self.store.uri()));
            let column = |name: &str| opened.schema.column_with_name(name).map(|(_, field)| field);
            let wrong = |name: &str, field: Option<&Field>, expected: &str| {
                corrupt(format!(
                    "column {name:?} is {}, expected {expected}",
                    field.map_or("missing".to_string(), |f| f.data_type().to_string())
                ))
            };
            match column(ROW_ID_COLUMN) {
                Some(field) if field.data_type() == &DataType::UInt64 => {}
                other => return Err(wrong(ROW_ID_COLUMN, other, "uint64")),
            }
            let has_part_ids = match column(PART_ID_COLUMN) {
                None => false,
                Some(field) if field.data_type() == &DataType::UInt32 => true,
                other => return Err(wrong(PART_ID_COLUMN, other, "uint32")),
            };
            let code_width = match column(PQ_CODE_COLUMN).map(Field::data_type) {
                Some(DataType::FixedSizeList(item, width)) if item.data_type() == &DataType::UInt8 && *width > 0 => *width as usize,
                _ => return Err(wrong(PQ_CODE_COLUMN, column(PQ_CODE_COLUMN), "fixed_size_list<uint8>")),
            };
            let flat = FlatFile::of(&opened, code_width, has_part_ids);
            Ok(Arc::new(BucketFile { reader: opened.reader, code_width, has_part_ids, flat }))
        })
        .await
        .cloned()
    }

    /// Read ranges of rows, which must be sorted and apart, in as few batches as the file gives: `_rowid`, `__pq_code`, and
    /// `__ivf_part_id` where asked for.
    pub async fn read_ranges(&self, file: &str, ranges: Vec<Range<u64>>, part_ids: bool) -> Result<Vec<RecordBatch>> {
        let bucket = self.bucket(file).await?;
        let rows: u64 = ranges.iter().map(|r| r.end - r.start).sum();
        if let Some(last) = ranges.last()
            && last.end > bucket.num_rows()
        {
            return Err(Error::corrupt(format!(
                "{file} of {} has {} rows, the manifest claims rows up to {}",
                self.store.uri(),
                bucket.num_rows(),
                last.end
            )));
        }
        if bucket.flat.is_some() {
            let (width, part_ids) = (bucket.code_width, part_ids && bucket.has_part_ids);
            let read = guarded(file, &self.store, async move {
                match &bucket.flat {
                    Some(flat) => flat.read(&ranges, width, part_ids).await,
                    None => Ok(Vec::new()),
                }
            });
            return read.await;
        }
        let reader = bucket.reader.clone();
        let mut columns = vec![ROW_ID_COLUMN, PQ_CODE_COLUMN];
        if part_ids && bucket.has_part_ids {
            columns.push(PART_ID_COLUMN);
        }
        let batches = guarded(file, &self.store, async move {
            let version = reader.metadata().version();
            let projection = lance_file::versions::reader_projection_from_column_names(version, reader.schema(), &columns)?;
            let stream = reader
                .read_stream_projected(
                    ReadBatchParams::Ranges(ranges.into()),
                    u32::try_from(rows).unwrap_or(u32::MAX).max(1),
                    2,
                    projection,
                    FilterExpression::no_filter(),
                )
                .await?;
            stream.try_collect::<Vec<RecordBatch>>().await
        })
        .await?;
        let got: usize = batches.iter().map(RecordBatch::num_rows).sum();
        if got as u64 != rows {
            return Err(Error::corrupt(format!("{file} of {}: {got} rows were read, {rows} were asked for", self.store.uri())));
        }
        batches.into_iter().map(|batch| canonical(&batch).map_err(|e| e.context(format!("{file} of {}", self.store.uri())))).collect()
    }
}

/// Lance's index builder is strict about the inner field of the codes; other writers of this format are not.
fn canonical(batch: &RecordBatch) -> Result<RecordBatch> {
    let schema = batch.schema();
    let mut fields = Vec::with_capacity(batch.num_columns());
    let mut columns = Vec::with_capacity(batch.num_columns());
    for (field, column) in schema.fields().iter().zip(batch.columns()) {
        let column = match column.data_type() {
            DataType::FixedSizeList(_, width) => {
                let codes = column.as_fixed_size_list();
                if codes.values().null_count() > 0 {
                    return Err(Error::corrupt(format!("column {:?} holds nulls", field.name())));
                }
                let values = crate::model::flat_values(codes);
                let nulls = codes.nulls().cloned();
                Arc::new(FixedSizeListArray::try_new(item_field(DataType::UInt8), *width, values, nulls)?) as _
            }
            _ => column.clone(),
        };
        if column.null_count() > 0 {
            return Err(Error::corrupt(format!("column {:?} holds {} nulls", field.name(), column.null_count())));
        }
        fields.push(Field::new(field.name(), column.data_type().clone(), false));
        columns.push(column);
    }
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
}
