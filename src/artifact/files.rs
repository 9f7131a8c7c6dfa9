//! Open files of an artifact: each is opened once, checked, and read by ranges of rows.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use arrow_array::cast::AsArray;
use arrow_array::{Array, FixedSizeListArray, RecordBatch};
use arrow_schema::{DataType, Field, Schema};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt};
use lance_core::cache::LanceCache;
use lance_encoding::decoder::{DecoderPlugins, FilterExpression};
use lance_file::reader::{FileReader, FileReaderOptions};
use lance_io::ReadBatchParams;
use lance_io::scheduler::{FileScheduler, ScanScheduler, SchedulerConfig};
use lance_io::utils::CachedFileSize;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};
use xxhash_rust::xxh3::xxh3_64;

use super::checksum::to_hex;
use super::flat_file::{FlatFile, Place};
use super::layout::{PART_ID_COLUMN, PQ_CODE_COLUMN, ROW_ID_COLUMN};
use super::manifest::FileEntry;
use super::memory::files_left;
use super::store::ArtifactStore;
use crate::error::{Error, Result};
use crate::model::item_field;

/// An open bucket file.
#[derive(Debug)]
pub struct BucketFile {
    num_rows: u64,
    pub code_width: usize,
    pub has_part_ids: bool,
    access: Access,
}

#[derive(Debug)]
enum Access {
    Flat(FlatFile),
    /// Another writer's, which Lance decodes.
    Encoded(FileReader),
}

impl BucketFile {
    pub fn num_rows(&self) -> u64 {
        self.num_rows
    }
}

/// A Lance file, its Arrow schema and its bytes.
struct Opened {
    file: FileScheduler,
    reader: FileReader,
    schema: Schema,
    size: u64,
}

/// Ranges to read of one file.
struct FileRead {
    file: String,
    bucket: Arc<BucketFile>,
    ranges: Vec<Range<u64>>,
}

/// What was read of a file, and the file's place among those asked for.
type Placed = (usize, Vec<RecordBatch>);

/// Files opened, or read from an object store, at once for one window.
const CONCURRENT_FILES: usize = 16;

/// Shares in which the local files of one window are read.
const LOCAL_READS: usize = 8;

/// Local files that this process has open for reading at any moment, however many artifacts it reads, each by one thread: fewer
/// where it may not open many.
static LOCAL_FILES: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new((files_left() / 3).clamp(1, 32))));

/// Bytes of row ids and codes that are decoded at once.
const DECODED_BYTES: usize = 4 << 20;

/// The most rows for a byte of a file. Rows differ in their row ids, and no encoding tells one from the next in less than a bit.
const ROWS_PER_BYTE: u64 = 8;

async fn local_permit() -> Result<OwnedSemaphorePermit> {
    LOCAL_FILES.clone().acquire_owned().await.map_err(|_| Error::internal("the semaphore of local files is closed"))
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
    /// Bytes of rows read without the scheduler.
    local_bytes: Arc<AtomicU64>,
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
        Self { store, scheduler: ScanScheduler::new(objects, config), said, open: Mutex::default(), local_bytes: Arc::default() }
    }

    pub fn store(&self) -> &ArtifactStore {
        &self.store
    }

    /// Bytes read so far, of rows and of headers.
    pub fn bytes_read(&self) -> u64 {
        self.scheduler.stats().bytes_read + self.local_bytes.load(Ordering::Relaxed)
    }

    /// Whether reads are requests to a server.
    pub fn is_remote(&self) -> bool {
        self.store.local_root().is_none()
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
            let _permit = if self.store.local_root().is_some() { Some(local_permit().await?) } else { None };
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
            let Opened { file: opened_file, reader, schema, size } = opened;
            let num_rows = reader.num_rows();
            if num_rows > size.saturating_mul(ROWS_PER_BYTE) {
                return Err(corrupt(format!("it claims {num_rows} rows in {size} bytes, which cannot hold as many row ids")));
            }
            let place = match self.store.local_root() {
                Some(root) => Place::Local(root.join(file)),
                None => Place::Store(opened_file),
            };
            let access = match FlatFile::of(place, &schema, &reader.metadata().column_infos, num_rows, size, code_width, has_part_ids) {
                Some(flat) => Access::Flat(flat),
                None => Access::Encoded(reader),
            };
            Ok(Arc::new(BucketFile { num_rows, code_width, has_part_ids, access }))
        })
        .await
        .cloned()
    }

    /// Read ranges of rows of several files, all at once. The ranges of a file must be sorted and apart; they come in as few
    /// batches as the file gives: `_rowid`, `__pq_code`, and `__ivf_part_id` where asked for.
    pub async fn read_ranges(&self, requests: Vec<(&str, Vec<Range<u64>>)>, part_ids: bool) -> Result<Vec<Vec<RecordBatch>>> {
        let mut opening: Vec<BoxFuture<'_, Result<FileRead>>> = Vec::with_capacity(requests.len());
        for (file, ranges) in requests {
            opening.push(self.open_ranges(file, ranges).boxed());
        }
        let reads: Vec<FileRead> = futures::stream::iter(opening).buffered(CONCURRENT_FILES).try_collect().await?;
        let mut read = vec![Vec::new(); reads.len()];
        let mut local = Vec::new();
        let mut reading: Vec<BoxFuture<'_, Result<Vec<Placed>>>> = Vec::new();
        for (place, file) in reads.into_iter().enumerate() {
            match &file.bucket.access {
                Access::Flat(FlatFile { place: Place::Local(_), .. }) => local.push((place, file)),
                _ => reading.push(async move { Ok(vec![(place, self.read_file(file, part_ids).await?)]) }.boxed()),
            }
        }
        // A few threads read many files each: a task for every one of them costs more than its read.
        let each = local.len().div_ceil(LOCAL_READS).max(1);
        while !local.is_empty() {
            let files = local.split_off(local.len().saturating_sub(each));
            reading.push(self.read_local(files, part_ids).boxed());
        }
        let mut reading = futures::stream::iter(reading).buffer_unordered(CONCURRENT_FILES);
        while let Some(files) = reading.try_next().await? {
            for (place, batches) in files {
                read[place] = batches;
            }
        }
        Ok(read)
    }

    async fn open_ranges(&self, file: &str, ranges: Vec<Range<u64>>) -> Result<FileRead> {
        let bucket = self.bucket(file).await?;
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
        Ok(FileRead { file: file.to_string(), bucket, ranges })
    }

    async fn read_local(&self, files: Vec<(usize, FileRead)>, part_ids: bool) -> Result<Vec<Placed>> {
        let (store, bytes_read) = (self.store.clone(), self.local_bytes.clone());
        let permit = local_permit().await?;
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let mut read = Vec::with_capacity(files.len());
            for (place, FileRead { file, bucket, ranges }) in files {
                if let Access::Flat(flat) = &bucket.access
                    && let Place::Local(path) = &flat.place
                {
                    let (batches, bytes) = flat
                        .read_local(path, &ranges, part_ids && bucket.has_part_ids)
                        .map_err(|e| read_error(lance_core::Error::from(e), &file, &store))?;
                    bytes_read.fetch_add(bytes, Ordering::Relaxed);
                    read.push((place, batches));
                }
            }
            Ok(read)
        })
        .await?
    }

    async fn read_file(&self, read: FileRead, part_ids: bool) -> Result<Vec<RecordBatch>> {
        let FileRead { file, bucket, ranges } = read;
        let part_ids = part_ids && bucket.has_part_ids;
        let rows: u64 = ranges.iter().map(|r| r.end - r.start).sum();
        let batches = guarded(&file, &self.store, async move {
            match &bucket.access {
                Access::Flat(flat) => match &flat.place {
                    Place::Store(store) => flat.read(store, &ranges, part_ids).await,
                    Place::Local(path) => Ok(flat.read_local(path, &ranges, part_ids)?.0),
                },
                Access::Encoded(reader) => {
                    let mut columns = vec![ROW_ID_COLUMN, PQ_CODE_COLUMN];
                    columns.extend(part_ids.then_some(PART_ID_COLUMN));
                    let version = reader.metadata().version();
                    let projection = lance_file::versions::reader_projection_from_column_names(version, reader.schema(), &columns)?;
                    // A page of a few bytes may stand for any number of rows: they are not decoded all at once.
                    let most = u32::try_from(DECODED_BYTES / (12 + bucket.code_width)).unwrap_or(u32::MAX).max(1);
                    let ranges = ReadBatchParams::Ranges(ranges.into());
                    let mut stream = reader.read_stream_projected(ranges, most, 2, projection, FilterExpression::no_filter()).await?;
                    let mut batches = Vec::new();
                    // Each is checked before there is a next one: what is no code or no row id is not collected.
                    while let Some(batch) = stream.try_next().await? {
                        batches.push(canonical(&batch)?);
                    }
                    Ok(batches)
                }
            }
        })
        .await?;
        let got: usize = batches.iter().map(RecordBatch::num_rows).sum();
        if got as u64 != rows {
            return Err(Error::corrupt(format!("{file} of {}: {got} rows were read, {rows} were asked for", self.store.uri())));
        }
        Ok(batches)
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
