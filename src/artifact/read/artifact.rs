//! `Artifact`: a finished partition artifact, read by partition.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_array::cast::AsArray;
use arrow_array::types::{UInt8Type, UInt32Type, UInt64Type};
use arrow_schema::SchemaRef;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt};

use super::files::BucketFiles;
use crate::artifact::format::{
    CHECKSUM_KIND, MANIFEST_FILE, METADATA_FILE, Manifest, PART_ID_COLUMN, checksum, parse_model, partition_schema, to_hex,
};
use crate::error::{Error, Result};
use crate::lance::{LanceStore, StorageOptions};
use crate::model::IvfPqModel;

/// A range of rows of a file that is asked for. In the order of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct WantedRange {
    start: u64,
    end: u64,
    /// Of its partition in the window.
    partition: usize,
    /// Of the range in its partition.
    index: usize,
}

/// The rows of one range.
struct RangeRows {
    partition: usize,
    index: usize,
    batches: Vec<RecordBatch>,
}

/// Files read at once for one window.
const CONCURRENT_FILES: usize = 16;

/// Bytes of row ids and codes that a [`PartitionReader`] reads at once.
const SLICE_BYTES: u64 = 4 << 20;

/// A finished artifact. Opening reads the manifest and the model, nothing else.
#[derive(Debug)]
pub struct Artifact {
    files: BucketFiles,
    manifest: Manifest,
    model: Option<Arc<IvfPqModel>>,
    code_width: usize,
}

/// Row ids and codes of a batch with the columns of [`partition_schema`].
pub fn row_ids_and_codes(batch: &RecordBatch) -> (&[u64], &[u8]) {
    let codes = batch.column(1).as_fixed_size_list();
    let width = codes.value_length() as usize;
    let start = codes.value_offset(0) as usize;
    let codes = &codes.values().as_primitive::<UInt8Type>().values()[start..start + batch.num_rows() * width];
    (batch.column(0).as_primitive::<UInt64Type>().values(), codes)
}

/// The bytes of the manifest.
pub async fn read_manifest(store: &LanceStore) -> Result<Bytes> {
    if let Some(bytes) = store.read(MANIFEST_FILE).await? {
        return Ok(bytes);
    }
    let legacy = if store.exists(METADATA_FILE).await? {
        format!(
            ". {METADATA_FILE} is there: this is a build that has not finished, or an artifact of pylance-cuvs 0.1.0b1 or \
             0.1.0b2, which say nowhere which rows belong to which partition; pylance-cuvs must be newer than 0.1.0b2"
        )
    } else {
        String::new()
    };
    Err(Error::ArtifactNotFound(format!(
        "{}: no partition artifact here: {MANIFEST_FILE} does not exist; it appears when a build finishes{legacy}",
        store.uri()
    )))
}

/// The model, or `None` where the artifact has no such file.
async fn read_model(files: &BucketFiles, file: &str) -> Result<Option<IvfPqModel>> {
    if !files.store().exists(file).await? {
        return Ok(None);
    }
    let (metadata, batch) = files.read_row(file).await?;
    parse_model(&metadata, &batch).map(Some).map_err(|e| match e {
        // What is wrong here is the file, whatever the check that found it.
        Error::InvalidInput(m) | Error::CorruptArtifact(m) => Error::corrupt(format!("{file} of {}: {m}", files.store().uri())),
        other => other,
    })
}

impl Artifact {
    /// Open the artifact at `uri` and check its manifest and model.
    pub async fn open(uri: &str, storage_options: Option<&StorageOptions>) -> Result<Self> {
        Self::open_in(LanceStore::open(uri, storage_options).await?).await
    }

    /// The same, of a place that is known already.
    pub async fn open_in(store: LanceStore) -> Result<Self> {
        let bytes = read_manifest(&store).await?;
        let manifest = Manifest::parse(&bytes).map_err(|e| e.context(store.uri()))?;
        let files = BucketFiles::new(&store, manifest.files.clone().unwrap_or_default());
        let metadata_file = manifest.metadata_file();
        let model = match metadata_file {
            Some(file) => read_model(&files, file).await?,
            // A file of the usual name that lies here is another artifact's.
            None => None,
        };
        let model = model.map(|model| Arc::new(model.with_training(manifest.training)));
        let metadata_file = metadata_file.unwrap_or_default();
        let uri = files.store().uri();
        if let Some(model) = &model {
            if model.num_partitions() != manifest.num_partitions {
                return Err(Error::corrupt(format!(
                    "{uri}: the model has {} partitions, the manifest {}",
                    model.num_partitions(),
                    manifest.num_partitions
                )));
            }
            if let Some(summary) = &manifest.model
                && summary.fingerprint != model.fingerprint()
            {
                return Err(Error::corrupt(format!(
                    "{uri}: the model in {metadata_file} has fingerprint {}, the manifest says {}",
                    model.fingerprint(),
                    summary.fingerprint
                )));
            }
        } else if manifest.model.is_some() {
            return Err(Error::corrupt(format!("{uri}: {metadata_file} is missing; the manifest describes a model")));
        }
        let code_width = match (manifest.pq_code_width, &model) {
            (Some(width), Some(model)) if width != model.code_width() => {
                return Err(Error::corrupt(format!(
                    "{uri}: pq_code_width is {width}, the model's codes take {} bytes",
                    model.code_width()
                )));
            }
            (Some(width), _) => width,
            (None, Some(model)) => model.code_width(),
            // An artifact of another writer without a model: the first file tells.
            (None, None) => match manifest.partitions.iter().find_map(|p| p.path.as_ref()) {
                Some(path) => files.bucket(path).await?.code_width,
                None => 0,
            },
        };
        Ok(Self { files, manifest, model, code_width })
    }

    /// The URI as it may be shown: without passwords, signatures and tokens.
    pub fn uri(&self) -> &str {
        self.files.store().uri()
    }

    /// The URI that opens the artifact again, from any working directory.
    pub fn true_uri(&self) -> &str {
        self.files.store().true_uri()
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn files(&self) -> &BucketFiles {
        &self.files
    }

    pub fn model(&self) -> Option<&Arc<IvfPqModel>> {
        self.model.as_ref()
    }

    pub fn num_rows(&self) -> u64 {
        self.manifest.num_rows()
    }

    pub fn num_partitions(&self) -> usize {
        self.manifest.num_partitions
    }

    /// Bytes of one code.
    pub fn pq_code_width(&self) -> usize {
        self.code_width
    }

    pub fn partition_rows(&self, partition: usize) -> u64 {
        self.manifest.partitions.get(partition).map_or(0, |p| p.num_rows)
    }

    /// `_rowid`, `__pq_code`.
    pub fn partition_schema(&self) -> SchemaRef {
        partition_schema(self.code_width)
    }

    /// Whether the rows read are checked against checksums of the manifest.
    pub fn has_checksums(&self) -> bool {
        self.manifest.checksum_kind.as_deref() == Some(CHECKSUM_KIND)
    }

    /// Every file that the manifest names exists and has the size it says. Reads no row.
    pub async fn check_files(&self) -> Result<()> {
        let paths: std::collections::BTreeSet<&str> =
            self.manifest.partitions.iter().filter(|p| p.num_rows > 0).filter_map(|p| p.path.as_deref()).collect();
        let mut checks: Vec<BoxFuture<'_, Result<()>>> = Vec::with_capacity(paths.len());
        for path in paths {
            checks.push(self.check_file(path).boxed());
        }
        futures::stream::iter(checks).buffer_unordered(CONCURRENT_FILES).try_collect::<Vec<()>>().await?;
        Ok(())
    }

    async fn check_file(&self, path: &str) -> Result<()> {
        let described = self.manifest.files.as_ref().and_then(|files| files.get(path)).map(|f| f.size_bytes);
        match (self.files().store().size(path).await?, described) {
            (None, _) => Err(Error::corrupt(format!("{}: {path} is missing", self.uri()))),
            (Some(size), Some(described)) if size != described => {
                Err(Error::corrupt(format!("{}: {path} has {size} bytes, the manifest says {described}", self.uri())))
            }
            _ => Ok(()),
        }
    }

    /// The rows of consecutive partitions, each as batches of [`Self::partition_schema`] in the order of its ranges. Ranges
    /// are coalesced file by file and files are read at once; checksums are checked where there are any, and partition ids
    /// where there are none.
    pub async fn read_partitions(&self, partitions: Range<usize>) -> Result<Vec<Vec<RecordBatch>>> {
        self.read_checked(partitions, !self.has_checksums()).await
    }

    /// The same, with the partition ids of every row checked if `part_ids`.
    pub(super) async fn read_checked(&self, partitions: Range<usize>, part_ids: bool) -> Result<Vec<Vec<RecordBatch>>> {
        let entries = self
            .manifest
            .partitions
            .get(partitions.clone())
            .ok_or_else(|| Error::invalid(format!("partitions {partitions:?}: expected within 0..{}", self.num_partitions())))?;
        let mut by_file: BTreeMap<&str, Vec<WantedRange>> = BTreeMap::new();
        for (place, entry) in entries.iter().enumerate() {
            if let Some(path) = &entry.path {
                let ranges = by_file.entry(path).or_default();
                let wanted = entry.ranges.iter().enumerate();
                ranges.extend(wanted.map(|(index, r)| WantedRange {
                    start: r.offset,
                    end: r.offset + r.num_rows,
                    partition: place,
                    index,
                }));
            }
        }
        let mut read = self.read_wanted(by_file, partitions.start, part_ids).await?;
        // A partition keeps the order of its ranges, whatever their place in the file.
        read.sort_unstable_by_key(|range| (range.partition, range.index));
        let mut result: Vec<Vec<RecordBatch>> = vec![Vec::new(); entries.len()];
        for range in read {
            result[range.partition].extend(range.batches);
        }
        for (place, batches) in result.iter().enumerate() {
            let sum = batches.iter().fold(0, |sum: u64, batch| sum.wrapping_add(self.checksum(batch)));
            self.check_checksum(partitions.start + place, sum)?;
        }
        Ok(result)
    }

    /// The rows of ranges of files, coalesced; `first` is the window's first partition.
    async fn read_wanted(&self, mut by_file: BTreeMap<&str, Vec<WantedRange>>, first: usize, part_ids: bool) -> Result<Vec<RangeRows>> {
        by_file.values_mut().for_each(|ranges| ranges.sort_unstable());
        let requests = by_file.iter().map(|(path, ranges)| (*path, merge_adjacent(ranges))).collect();
        let read = self.files.read_ranges(requests, part_ids).await?;
        let mut cut = Vec::new();
        for ((path, ranges), batches) in by_file.iter().zip(&read) {
            cut.extend(self.cut(path, ranges, batches, first)?);
        }
        Ok(cut)
    }

    /// Reads a partition some MiB at a time, however large it is.
    pub fn partition_reader(self: Arc<Self>, partition: usize) -> PartitionReader {
        let part_ids = !self.has_checksums();
        PartitionReader::new(self, partition, part_ids)
    }

    fn checksum(&self, batch: &RecordBatch) -> u64 {
        let (row_ids, codes) = row_ids_and_codes(batch);
        checksum(row_ids, codes, self.code_width)
    }

    /// What was read of one file, range by range.
    fn cut(&self, path: &str, ranges: &[WantedRange], batches: &[RecordBatch], first: usize) -> Result<Vec<RangeRows>> {
        if let Some(width) = batches.first().map(|b| b.column(1).as_fixed_size_list().value_length() as usize)
            && width != self.code_width
        {
            return Err(Error::corrupt(format!("{}: {path} has codes of {width} bytes, expected {}", self.uri(), self.code_width)));
        }
        let mut cursor = Cursor { batches, batch: 0, row: 0 };
        ranges
            .iter()
            .map(|WantedRange { start, end, partition, index }| {
                let rows = cursor.take((end - start) as usize);
                let batches = rows.iter().map(|batch| self.without_part_ids(batch, first + partition, path)).collect::<Result<_>>()?;
                Ok(RangeRows { partition: *partition, index: *index, batches })
            })
            .collect()
    }

    fn without_part_ids(&self, batch: &RecordBatch, partition: usize, path: &str) -> Result<RecordBatch> {
        let Some(part_ids) = batch.column_by_name(PART_ID_COLUMN) else {
            return Ok(batch.clone());
        };
        if let Some(other) = part_ids.as_primitive::<UInt32Type>().values().iter().find(|id| **id as usize != partition) {
            return Err(Error::corrupt(format!(
                "{}: a row of partition {other} lies in a range of partition {partition} in {path}",
                self.uri()
            )));
        }
        Ok(batch.project(&[0, 1])?)
    }

    fn check_checksum(&self, partition: usize, sum: u64) -> Result<()> {
        let Some(expected) = self.manifest.partitions[partition].checksum.as_ref().filter(|_| self.has_checksums()) else {
            return Ok(());
        };
        if to_hex(sum) != *expected {
            return Err(Error::corrupt(format!(
                "{}: partition {partition} has checksum {}, the manifest says {expected}: its rows or codes were changed after they were written",
                self.uri(),
                to_hex(sum)
            )));
        }
        Ok(())
    }
}

/// Reads one partition in slices, in the order of its ranges. Checksums are sums: the last slice tells whether all is well.
pub struct PartitionReader<A = Arc<Artifact>> {
    artifact: A,
    partition: usize,
    part_ids: bool,
    slice_rows: u64,
    /// The next range, and the rows of it that were read.
    range: usize,
    row: u64,
    sum: u64,
    done: bool,
}

impl<A: std::borrow::Borrow<Artifact>> PartitionReader<A> {
    pub(super) fn new(artifact: A, partition: usize, part_ids: bool) -> Self {
        let slice_rows = (SLICE_BYTES / (8 + artifact.borrow().code_width as u64)).max(1);
        Self { artifact, partition, part_ids, slice_rows, range: 0, row: 0, sum: 0, done: false }
    }

    /// The next rows; `None` at the end. Nothing can be read after an error.
    pub async fn next(&mut self) -> Result<Option<Vec<RecordBatch>>> {
        let artifact = self.artifact.borrow();
        let Some(entry) = artifact.manifest.partitions.get(self.partition).filter(|_| !self.done) else {
            return Ok(None);
        };
        let mut wanted = Vec::new();
        let mut room = self.slice_rows;
        while room > 0
            && let Some(range) = entry.ranges.get(self.range)
        {
            let rows = room.min(range.num_rows - self.row);
            let start = range.offset + self.row;
            wanted.push(WantedRange { start, end: start + rows, partition: 0, index: wanted.len() });
            (room, self.row) = (room - rows, self.row + rows);
            if self.row == range.num_rows {
                (self.range, self.row) = (self.range + 1, 0);
            }
        }
        let last = self.range == entry.ranges.len();
        let Some(path) = entry.path.as_deref().filter(|_| !wanted.is_empty()) else {
            self.done = true;
            return Ok(None);
        };
        // What is cancelled or fails here must not be taken for the end.
        self.done = true;
        let mut read = artifact.read_wanted(BTreeMap::from([(path, wanted)]), self.partition, self.part_ids).await?;
        read.sort_unstable_by_key(|range| range.index);
        let batches: Vec<RecordBatch> = read.into_iter().flat_map(|range| range.batches).collect();
        self.sum = batches.iter().fold(self.sum, |sum, batch| sum.wrapping_add(artifact.checksum(batch)));
        if last {
            artifact.check_checksum(self.partition, self.sum)?;
        }
        self.done = last;
        Ok(Some(batches))
    }
}

fn merge_adjacent(ranges: &[WantedRange]) -> Vec<Range<u64>> {
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for WantedRange { start, end, .. } in ranges {
        match merged.last_mut() {
            Some(last) if last.end == *start => last.end = *end,
            _ => merged.push(*start..*end),
        }
    }
    merged
}

/// Cuts the batches that were read into the ranges that were asked for.
struct Cursor<'a> {
    batches: &'a [RecordBatch],
    batch: usize,
    row: usize,
}

impl Cursor<'_> {
    fn take(&mut self, mut rows: usize) -> Vec<RecordBatch> {
        let mut slices = Vec::with_capacity(1);
        while rows > 0 && self.batch < self.batches.len() {
            let batch = &self.batches[self.batch];
            let now = rows.min(batch.num_rows() - self.row);
            if now > 0 {
                slices.push(batch.slice(self.row, now));
            }
            rows -= now;
            self.row += now;
            if self.row == batch.num_rows() {
                self.batch += 1;
                self.row = 0;
            }
        }
        slices
    }
}
