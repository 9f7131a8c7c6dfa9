//! Open files of an artifact: each is opened once, checked, and read by ranges of rows.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use arrow_array::cast::AsArray;
use arrow_array::types::UInt32Type;
use arrow_array::{Array, FixedSizeListArray, RecordBatch};
use arrow_schema::{DataType, Field, Schema};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};

use super::flat_file::{FlatFile, Place};
use crate::artifact::format::{
    FileEntry, PART_ID_COLUMN, PARTITION_COLUMNS, PQ_CODE_COLUMN, PartitionTable, ROW_ID_COLUMN, add_partitions, from_hex, told_partitions,
};
use crate::error::{Error, Result};
use crate::io::{Store, files_left};
use crate::lance::LanceStore;
use crate::lance::file::{Expected, LanceFile, LanceFiles, local_read_error};
use crate::model::item_field;
use crate::sync::locked;

/// Rows of partition ids that are decoded at once.
const ENDS_AT_ONCE: u32 = 1 << 16;

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
    Encoded(Box<LanceFile>),
}

impl BucketFile {
    pub fn num_rows(&self) -> u64 {
        self.num_rows
    }
}

/// A file whose rows count as some of another's.
#[derive(Debug)]
pub struct Part {
    /// Of the other's rows those that are its own.
    pub first: u64,
    pub end: u64,
    pub file: String,
    pub bucket: Arc<BucketFile>,
}

/// Files that count as one.
#[derive(Debug)]
struct Joined {
    name: String,
    parts: Vec<Part>,
}

/// Ranges to read of one file.
struct FileRead {
    file: String,
    bucket: Arc<BucketFile>,
    ranges: Vec<Range<u64>>,
}

/// What was read of one of the files asked for.
struct FileRows {
    /// Of the file among those asked for.
    index: usize,
    batches: Vec<RecordBatch>,
}

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

/// Rows of a file of partitions that are decoded at once.
const PARTITIONS_AT_ONCE: u32 = 4096;

type Slot = Arc<OnceCell<Arc<BucketFile>>>;

/// The files of one artifact.
#[derive(Debug)]
pub struct BucketFiles {
    store: Store,
    files: LanceFiles,
    /// What the manifest says of each file.
    entries: BTreeMap<String, FileEntry>,
    open: Mutex<HashMap<String, Slot>>,
    joined: Option<Joined>,
    /// Bytes of rows read without the scheduler.
    local_bytes: Arc<AtomicU64>,
}

impl BucketFiles {
    /// Call within a Tokio runtime.
    pub fn new(store: &LanceStore, entries: BTreeMap<String, FileEntry>) -> Self {
        let (files, open, local_bytes) = (LanceFiles::new(store), Mutex::default(), Arc::default());
        Self { store: store.files.clone(), files, entries, open, joined: None, local_bytes }
    }

    /// The same, with files that count as one of a name of its own.
    pub fn joined(self, name: &str, parts: Vec<Part>) -> Self {
        let slot = |part: &Part| (part.file.clone(), Arc::new(OnceCell::new_with(Some(part.bucket.clone()))));
        let open = Mutex::new(parts.iter().map(slot).collect());
        Self { open, joined: Some(Joined { name: name.to_string(), parts }), ..self }
    }

    /// The names of the files that `file` is.
    pub fn files_of<'a>(&'a self, file: &'a str) -> Vec<&'a str> {
        match &self.joined {
            Some(joined) if joined.name == file => joined.parts.iter().map(|part| part.file.as_str()).collect(),
            _ => vec![file],
        }
    }

    /// Ranges of rows of a file, sorted and apart, as ranges of the files that it is.
    fn ranges_of(&self, file: &str, ranges: Vec<Range<u64>>) -> Vec<(String, Vec<Range<u64>>)> {
        let Some(joined) = self.joined.as_ref().filter(|joined| joined.name == file) else {
            return vec![(file.to_string(), ranges)];
        };
        let within = |part: &Part| {
            let from = ranges.partition_point(|range| range.end <= part.first);
            let reached = ranges[from..].iter().take_while(|range| range.start < part.end);
            let own = reached.map(|range| range.start.max(part.first) - part.first..range.end.min(part.end) - part.first);
            (part.file.clone(), own.collect::<Vec<_>>())
        };
        joined.parts.iter().map(within).filter(|(_, ranges)| !ranges.is_empty()).collect()
    }

    /// The partition and the number of rows of each list of a file of lists, in order, and the file of those rows.
    pub async fn open_lists(&self, file: &str) -> Result<(Vec<(u32, u64)>, Arc<BucketFile>)> {
        let _permit = if self.store.local_root().is_some() { Some(local_permit().await?) } else { None };
        let (lengths, rows) = self.open(file).await?.into_rows().await?;
        let corrupt = |what: String| Error::corrupt(format!("{file} of {}: {what}", self.store.uri()));
        // Which partition a list is of only its rows say: of those without rows there is none. The first and the last row of each.
        let (mut ends, mut row) = (Vec::<Range<u64>>::new(), 0);
        let lengths: Vec<u64> = lengths.into_iter().filter(|length| *length > 0).collect();
        for length in &lengths {
            for wanted in [row, row + length - 1] {
                match ends.last_mut() {
                    Some(last) if last.end >= wanted => last.end = wanted + 1,
                    _ => ends.push(wanted..wanted + 1),
                }
            }
            row += length;
        }
        let read = if ends.is_empty() { Vec::new() } else { rows.decode(ends.into(), vec![PART_ID_COLUMN], ENDS_AT_ONCE, Ok).await? };
        let mut part_ids = Vec::with_capacity(2 * lengths.len());
        for batch in &read {
            let column = batch.column(0).as_primitive_opt::<UInt32Type>();
            part_ids.extend_from_slice(column.ok_or_else(|| corrupt(format!("column {PART_ID_COLUMN:?} is not uint32")))?.values());
        }
        let mut part_ids = part_ids.into_iter();
        let mut lists = Vec::<(u32, u64)>::with_capacity(lengths.len());
        for length in lengths {
            let first = part_ids.next();
            let last = if length > 1 { part_ids.next() } else { first };
            let (Some(part_id), true) = (first, first == last) else {
                return Err(corrupt(format!("the list after that of partition {:?} has rows of {first:?} and {last:?}", lists.last())));
            };
            if lists.last().is_some_and(|(before, _)| *before >= part_id) {
                return Err(corrupt(format!("the list of partition {part_id} comes after that of {:?}", lists.last())));
            }
            lists.push((part_id, length));
        }
        Ok((lists, Arc::new(self.described(file, rows)?)))
    }

    /// Of a model's file how many partitions it says that there are.
    pub async fn told_partitions(&self, file: &str) -> Result<usize> {
        let _permit = if self.store.local_root().is_some() { Some(local_permit().await?) } else { None };
        let opened = self.open(file).await?;
        let told = told_partitions(opened.metadata()).map_err(|e| e.context(format!("{file} of {}", self.store.uri())))?;
        // Each has a centroid there, of a byte at least. Memory is made for all of them before the model is read.
        if told as u64 > opened.size() {
            return Err(Error::corrupt(format!("{file} of {}: it claims {told} partitions in {} bytes", self.store.uri(), opened.size())));
        }
        Ok(told)
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Bytes read so far, of rows and of headers.
    pub fn bytes_read(&self) -> u64 {
        self.files.bytes_read() + self.local_bytes.load(Ordering::Relaxed)
    }

    /// Whether reads are requests to a server.
    pub fn is_remote(&self) -> bool {
        self.store.local_root().is_none()
    }

    async fn open(&self, file: &str) -> Result<LanceFile> {
        let mut expected = Expected::default();
        if let Some(entry) = self.entries.get(file) {
            expected.size_bytes = Some(entry.size_bytes);
            if let (Some(bytes), Some(checksum)) = (entry.tail_bytes, &entry.tail_checksum) {
                let checksum = from_hex(checksum).ok_or_else(|| {
                    Error::corrupt(format!(
                        "{file} of {}: the manifest has the checksum {checksum:?} for it, which is none",
                        self.store.uri()
                    ))
                })?;
                expected.tail = Some((bytes, checksum));
            }
        }
        self.files.open(file, expected).await
    }

    /// The only row of a small file, with its schema metadata.
    pub async fn read_row(&self, file: &str) -> Result<(HashMap<String, String>, RecordBatch)> {
        self.open(file).await?.read_row().await
    }

    /// The partitions of an artifact of version 2, whose bucket files are known.
    pub async fn read_partitions(&self, file: &str, bucket_files: Vec<String>) -> Result<PartitionTable> {
        let opened = self.open(file).await?;
        let (rows, size) = (opened.num_rows(), opened.size());
        if rows > size.saturating_mul(ROWS_PER_BYTE) || rows > u64::from(u32::MAX) {
            return Err(Error::corrupt(format!("{file} of {}: it claims {rows} partitions in {size} bytes", self.store.uri())));
        }
        let table = Arc::new(Mutex::new(PartitionTable::in_files(bucket_files)));
        let whole: Arc<[Range<u64>]> = std::iter::once(0..rows).filter(|rows| !rows.is_empty()).collect();
        let filled = table.clone();
        let each = move |batch: RecordBatch| {
            add_partitions(&mut locked(&filled), &batch)?;
            // What was taken over need not be kept.
            Ok(batch.slice(0, 0))
        };
        opened.decode(whole, PARTITION_COLUMNS.to_vec(), PARTITIONS_AT_ONCE, each).await?;
        let mut table = std::mem::take(&mut *locked(&table));
        table.shrink();
        Ok(table)
    }

    /// Open a bucket file, or answer with the one that is open.
    pub async fn bucket(&self, file: &str) -> Result<Arc<BucketFile>> {
        let slot = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.entry(file.to_string()).or_default().clone()
        };
        slot.get_or_try_init(|| async {
            let _permit = if self.store.local_root().is_some() { Some(local_permit().await?) } else { None };
            Ok(Arc::new(self.described(file, self.open(file).await?)?))
        })
        .await
        .cloned()
    }

    /// What a bucket file is, by its schema and where its values lie.
    fn described(&self, file: &str, opened: LanceFile) -> Result<BucketFile> {
        let corrupt = |what: String| Error::corrupt(format!("{file} of {}: {what}", self.store.uri()));
        let column = |name: &str| opened.schema().column_with_name(name).map(|(_, field)| field);
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
        let (num_rows, size) = (opened.num_rows(), opened.size());
        if num_rows > size.saturating_mul(ROWS_PER_BYTE) {
            return Err(corrupt(format!("it claims {num_rows} rows in {size} bytes, which cannot hold as many row ids")));
        }
        let place = match self.store.local_root() {
            Some(root) => Place::Local(root.join(file)),
            None => Place::Store(Box::new(opened.byte_reader())),
        };
        let access = match FlatFile::of(place, &opened, code_width, has_part_ids) {
            Some(flat) => Access::Flat(flat),
            None => Access::Encoded(Box::new(opened)),
        };
        Ok(BucketFile { num_rows, code_width, has_part_ids, access })
    }

    /// Read ranges of rows of several files, all at once. The ranges of a file must be sorted and apart; they come in as few
    /// batches as the file gives: `_rowid`, `__pq_code`, and `__ivf_part_id` where asked for.
    pub async fn read_ranges(&self, requests: Vec<(&str, Vec<Range<u64>>)>, part_ids: bool) -> Result<Vec<Vec<RecordBatch>>> {
        let mut opening: Vec<BoxFuture<'_, Result<FileRead>>> = Vec::with_capacity(requests.len());
        let mut asked_for = Vec::with_capacity(requests.len());
        let num_requests = requests.len();
        for (n, (file, ranges)) in requests.into_iter().enumerate() {
            for (file, ranges) in self.ranges_of(file, ranges) {
                opening.push(self.open_ranges(file, ranges).boxed());
                asked_for.push(n);
            }
        }
        let reads: Vec<FileRead> = futures::stream::iter(opening).buffered(CONCURRENT_FILES).try_collect().await?;
        let mut read = vec![Vec::new(); reads.len()];
        let mut local = Vec::new();
        let mut reading: Vec<BoxFuture<'_, Result<Vec<FileRows>>>> = Vec::new();
        for (index, file) in reads.into_iter().enumerate() {
            match &file.bucket.access {
                Access::Flat(FlatFile { place: Place::Local(_), .. }) => local.push((index, file)),
                _ => reading.push(async move { Ok(vec![FileRows { index, batches: self.read_file(file, part_ids).await? }]) }.boxed()),
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
            for FileRows { index, batches } in files {
                read[index] = batches;
            }
        }
        let mut answers = vec![Vec::new(); num_requests];
        for (n, batches) in asked_for.into_iter().zip(read) {
            answers[n].extend(batches);
        }
        Ok(answers)
    }

    async fn open_ranges(&self, file: String, ranges: Vec<Range<u64>>) -> Result<FileRead> {
        let bucket = self.bucket(&file).await?;
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
        Ok(FileRead { file, bucket, ranges })
    }

    async fn read_local(&self, files: Vec<(usize, FileRead)>, part_ids: bool) -> Result<Vec<FileRows>> {
        let (store, bytes_read) = (self.store.clone(), self.local_bytes.clone());
        let permit = local_permit().await?;
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let mut read = Vec::with_capacity(files.len());
            for (index, FileRead { file, bucket, ranges }) in files {
                if let Access::Flat(flat) = &bucket.access
                    && let Place::Local(path) = &flat.place
                {
                    let (batch, bytes) =
                        flat.read_local(path, &ranges, part_ids && bucket.has_part_ids).map_err(|e| local_read_error(e, &file, &store))?;
                    bytes_read.fetch_add(bytes, Ordering::Relaxed);
                    read.push(FileRows { index, batches: vec![batch] });
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
        let batches = match &bucket.access {
            Access::Flat(flat) => match &flat.place {
                Place::Store(store) => vec![flat.read(store, &ranges, part_ids).await?],
                Place::Local(path) => {
                    vec![flat.read_local(path, &ranges, part_ids).map_err(|e| local_read_error(e, &file, &self.store))?.0]
                }
            },
            Access::Encoded(encoded) => {
                let mut columns = vec![ROW_ID_COLUMN, PQ_CODE_COLUMN];
                columns.extend(part_ids.then_some(PART_ID_COLUMN));
                // A page of a few bytes may stand for any number of rows: they are not decoded all at once, and what is no code or
                // no row id is not collected.
                let most = u32::try_from(DECODED_BYTES / (12 + bucket.code_width)).unwrap_or(u32::MAX).max(1);
                encoded.decode(ranges.into(), columns, most, |batch| canonical(&batch)).await?
            }
        };
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
