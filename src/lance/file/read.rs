//! Files as they are read: each opened once, its end looked at before it is decoded, and decoded where nothing it does can do harm.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::RecordBatch;
use arrow_schema::Schema;
use bytes::Bytes;
use futures::TryStreamExt;
use lance_core::cache::LanceCache;
use lance_encoding::decoder::{ColumnInfo, DecoderPlugins, FilterExpression};
use lance_file::reader::{CachedFileMetadata, FileReader, FileReaderOptions};
use lance_io::ReadBatchParams;
use lance_io::scheduler::{FileScheduler, ScanScheduler};
use lance_io::utils::CachedFileSize;
use object_store::path::Path;
use xxhash_rust::xxh3::xxh3_64;

use super::bounded::Bounded;
use super::flat::{FlatColumn, FlatType};
use super::widths::check_widths;
use crate::error::{Error, Result};
use crate::io::Store;
use crate::lance::LanceStore;
use crate::lance::error::innermost;

/// Bytes of the footer that ends every Lance file: three positions, two counts, two version numbers, the magic.
const FOOTER_BYTES: usize = 40;

/// What somebody else says of a file.
#[derive(Debug, Clone, Default)]
pub struct Expected {
    pub size_bytes: Option<u64>,
    /// Bytes at the end, and their `xxh3_64`.
    pub tail: Option<(u64, u64)>,
}

/// The Lance files of a place.
#[derive(Debug)]
pub struct LanceFiles {
    store: Store,
    scheduler: Arc<ScanScheduler>,
    bytes_read: Arc<AtomicU64>,
}

/// A Lance file that is open.
#[derive(Debug)]
pub struct LanceFile {
    store: Store,
    name: String,
    file: FileScheduler,
    reader: FileReader,
    schema: Schema,
    size: u64,
    bytes_read: Arc<AtomicU64>,
}

/// Reads bytes of a file of a store.
#[derive(Debug, Clone)]
pub struct ByteReader {
    store: Store,
    name: String,
    file: FileScheduler,
    bytes_read: Arc<AtomicU64>,
}

impl LanceFiles {
    /// Call within a Tokio runtime.
    pub fn new(store: &LanceStore) -> Self {
        Self { store: store.files.clone(), scheduler: store.scheduler(), bytes_read: Arc::default() }
    }

    /// Bytes read so far: of files that were opened their ends, of flat ones what was asked for, and of others the pages that hold it.
    /// Of local files without those that were read around it.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    pub async fn open(&self, name: &str, expected: Expected) -> Result<LanceFile> {
        let path = self.store.path(name)?;
        let scheduler = self.scheduler.clone();
        // Where a checksum of its end will tell, the size that is expected saves a request.
        let assumed = expected.size_bytes.filter(|size| *size > 0 && expected.tail.is_some() && self.store.local_root().is_none());
        let (file, reader, schema, size) = panics_caught(name, &self.store, async move {
            let mut opened = None;
            if let Some(size) = assumed {
                let file = scheduler.open_file(&path, &CachedFileSize::new(size)).await?;
                opened = check_tail(&file, &expected).await.ok().map(|size| (file, size));
            }
            let (file, size) = match opened {
                Some(opened) => opened,
                None => {
                    let file = scheduler.open_file(&path, &CachedFileSize::unknown()).await?;
                    let size = check_tail(&file, &expected).await?;
                    (file, size)
                }
            };
            let metadata = Arc::new(FileReader::read_all_metadata(&file).await?);
            check_pages(&metadata, size)?;
            let reader = reader_of(&file, path, metadata, size).await?;
            // Its conversion panics on damaged type names.
            let schema = Schema::from(reader.schema().as_ref());
            Ok((file, reader, schema, size))
        })
        .await?;
        self.bytes_read.fetch_add(size.saturating_sub(reader.metadata().num_data_bytes), Ordering::Relaxed);
        let (store, name, bytes_read) = (self.store.clone(), name.to_string(), self.bytes_read.clone());
        Ok(LanceFile { store, name, file, reader, schema, size, bytes_read })
    }
}

/// A reader of what `metadata` says of a file, which reads nothing behind its end.
async fn reader_of(file: &FileScheduler, path: Path, metadata: Arc<CachedFileMetadata>, size: u64) -> lance_core::Result<FileReader> {
    check_widths(&metadata)?;
    let (io, plugins, cache) = (Bounded::new(file.clone(), size), Arc::<DecoderPlugins>::default(), LanceCache::no_cache());
    FileReader::try_open_with_file_metadata(io, path, None, plugins, metadata, &cache, FileReaderOptions::default()).await
}

impl LanceFile {
    pub fn num_rows(&self) -> u64 {
        self.reader.num_rows()
    }

    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// For messages.
    pub fn place(&self) -> String {
        format!("{} of {}", self.name, self.store.uri())
    }

    /// What Lance knows of the file.
    pub fn file_metadata(&self) -> &Arc<CachedFileMetadata> {
        self.reader.metadata()
    }

    /// The same bytes as another table: of these columns, which lie in the file, with so many rows.
    pub async fn seen_as(&self, schema: Schema, columns: Vec<Arc<ColumnInfo>>, num_rows: u64) -> Result<Self> {
        let (file, metadata, path) = (self.file.clone(), self.reader.metadata().clone(), self.store.path(&self.name)?);
        let size = self.size;
        let (reader, schema) = panics_caught(&self.name, &self.store, async move {
            let seen = CachedFileMetadata {
                file_schema: Arc::new(lance_core::datatypes::Schema::try_from(&schema)?),
                column_metadatas: Vec::new(),
                column_infos: columns,
                num_rows,
                file_buffers: Vec::new(),
                num_data_bytes: metadata.num_data_bytes,
                num_column_metadata_bytes: metadata.num_column_metadata_bytes,
                num_global_buffer_bytes: metadata.num_global_buffer_bytes,
                num_footer_bytes: metadata.num_footer_bytes,
                major_version: metadata.major_version,
                minor_version: metadata.minor_version,
                version: metadata.version,
                file_size_bytes: metadata.file_size_bytes,
                retained_global_buffers: BTreeMap::new(),
            };
            Ok((reader_of(&file, path, Arc::new(seen), size).await?, schema))
        })
        .await?;
        let (store, name, bytes_read) = (self.store.clone(), self.name.clone(), self.bytes_read.clone());
        Ok(Self { store, name, file: self.file.clone(), reader, schema, size: self.size, bytes_read })
    }

    pub fn byte_reader(&self) -> ByteReader {
        let (store, name) = (self.store.clone(), self.name.clone());
        ByteReader { store, name, file: self.file.clone(), bytes_read: self.bytes_read.clone() }
    }

    /// Where the values of some columns lie, or `None` where one is encoded.
    pub fn flat_columns(&self, columns: &[(&str, FlatType)]) -> Option<Vec<FlatColumn>> {
        let infos = &self.reader.metadata().column_infos;
        // One column of the file for each field, as long as none has columns of its own.
        if infos.len() != self.schema.fields().len() {
            return None;
        }
        let column = |(name, kind): &(&str, FlatType)| FlatColumn::of(infos.get(self.schema.index_of(name).ok()?)?, *kind, self.size);
        let columns = columns.iter().map(column).collect::<Option<Vec<_>>>()?;
        columns.iter().all(|c| c.num_rows() == self.num_rows()).then_some(columns)
    }

    /// The metadata of its schema.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.reader.schema().metadata
    }

    /// Bytes of all files of its place read so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Bytes that lie beside the columns.
    pub async fn global_buffer(&self, position: u32) -> Result<Bytes> {
        let reader = self.reader.clone();
        let bytes = panics_caught(&self.name, &self.store, async move { reader.read_global_buffer(position).await }).await?;
        self.bytes_read.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    /// The only row of a small file, with its schema metadata.
    pub async fn read_row(self) -> Result<(HashMap<String, String>, RecordBatch)> {
        let Self { store, name, reader, bytes_read, .. } = self;
        if reader.num_rows() != 1 {
            return Err(Error::corrupt(format!("{name} of {}: {} rows, expected one", store.uri(), reader.num_rows())));
        }
        let metadata = reader.schema().metadata.clone();
        bytes_read.fetch_add(reader.metadata().num_data_bytes, Ordering::Relaxed);
        let batch = panics_caught(&name, &store, async move {
            let stream = reader.read_stream(ReadBatchParams::RangeFull, 1, 1, FilterExpression::no_filter()).await?;
            let schema = stream.schema();
            let batches: Vec<RecordBatch> = stream.try_collect().await?;
            Ok(arrow_select::concat::concat_batches(&schema, &batches)?)
        })
        .await?;
        Ok((metadata, batch))
    }

    /// Bytes of the pages that hold some rows, which are in order.
    fn page_bytes(&self, ranges: &[Range<u64>]) -> u64 {
        let mut bytes = 0u64;
        for column in &self.reader.metadata().column_infos {
            let mut row = 0u64;
            for page in column.page_infos.iter() {
                let end = row.saturating_add(page.num_rows);
                let next = ranges.partition_point(|range| range.end <= row);
                if ranges.get(next).is_some_and(|range| range.start < end) {
                    bytes += page.buffer_offsets_and_sizes.iter().map(|(_, size)| *size).fold(0, u64::saturating_add);
                }
                row = end;
            }
        }
        bytes
    }

    /// Decode ranges of rows, at most `rows_at_once`; each batch is handed to `each` before there is a next one.
    pub async fn decode(
        &self,
        ranges: Arc<[Range<u64>]>,
        columns: Vec<&'static str>,
        rows_at_once: u32,
        each: impl Fn(RecordBatch) -> Result<RecordBatch> + Send + 'static,
    ) -> Result<Vec<RecordBatch>> {
        let reader = self.reader.clone();
        self.bytes_read.fetch_add(self.page_bytes(&ranges), Ordering::Relaxed);
        panics_caught(&self.name, &self.store, async move {
            let version = reader.metadata().version();
            let projection = lance_file::versions::reader_projection_from_column_names(version, reader.schema(), &columns)?;
            let ranges = ReadBatchParams::Ranges(ranges);
            let mut stream = reader.read_stream_projected(ranges, rows_at_once, 2, projection, FilterExpression::no_filter()).await?;
            let mut batches = Vec::new();
            while let Some(batch) = stream.try_next().await? {
                batches.push(each(batch)?);
            }
            Ok(batches)
        })
        .await
    }
}

impl ByteReader {
    pub async fn read(&self, ranges: Vec<Range<u64>>) -> Result<Vec<Bytes>> {
        let file = self.file.clone();
        self.bytes_read.fetch_add(ranges.iter().map(|range| range.end - range.start).sum(), Ordering::Relaxed);
        panics_caught(&self.name, &self.store, async move { file.submit_request(ranges, 0).await }).await
    }
}

/// Turn a failed read into the error that fits: what the store could not give is `Storage`, everything else is a file that
/// is not what its manifest says.
fn read_error(error: lance_core::Error, file: &str, store: &Store) -> Error {
    let what = format!("reading {file} of {}", store.uri());
    // Lance says IO of undecodable metadata too: only what the store itself said is a storage error.
    let from_store = match innermost(&error) {
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

/// The error of a local file that was read around Lance.
pub fn local_read_error(error: std::io::Error, file: &str, store: &Store) -> Error {
    read_error(lance_core::Error::from(error), file, store)
}

/// Look at the end of a file before it is decoded: a damaged count would ask for more memory than there is, which no caller
/// can catch. Where there is a checksum of the file's metadata, nothing damaged gets past.
async fn check_tail(file: &FileScheduler, expected: &Expected) -> lance_core::Result<u64> {
    let corrupt = |what: String| lance_core::Error::from(Error::corrupt(what));
    let reader = file.reader();
    let size = reader.size().await?;
    if let Some(expected) = expected.size_bytes
        && expected != size as u64
    {
        return Err(corrupt(format!("the file has {size} bytes, the manifest says {expected}")));
    }
    if size < FOOTER_BYTES {
        return Err(corrupt(format!("the file has {size} bytes, fewer than the footer of a Lance file")));
    }
    let checked = expected.tail.and_then(|(bytes, checksum)| Some((usize::try_from(bytes).ok()?, checksum)));
    let tail_bytes = checked.map_or(FOOTER_BYTES, |(bytes, _)| bytes.clamp(FOOTER_BYTES, size));
    let tail = reader.get_range(size - tail_bytes..size).await?;
    if checked.is_some_and(|(_, checksum)| xxh3_64(&tail) != checksum) {
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

/// What pages and columns say that they have must lie in the file: as much is asked of the allocator before it is read.
fn check_pages(metadata: &CachedFileMetadata, size: u64) -> lance_core::Result<()> {
    for (index, column) in metadata.column_infos.iter().enumerate() {
        let of_pages = column.page_infos.iter().flat_map(|page| page.buffer_offsets_and_sizes.iter());
        let mut buffers = of_pages.chain(column.buffer_offsets_and_sizes.iter());
        if let Some((position, bytes)) = buffers.find(|(position, bytes)| position.checked_add(*bytes).is_none_or(|end| end > size)) {
            let what = format!("column {index} has {bytes} bytes at {position}, the file has {size}");
            return Err(lance_core::Error::from(Error::corrupt(what)));
        }
    }
    Ok(())
}

/// Run a read in a task of its own: Lance's decoders may panic on damaged bytes, and that must end as an error.
async fn panics_caught<T: Send + 'static>(
    file: &str,
    store: &Store,
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
