//! The rows of a committed segment, partition by partition: whoever built it, in whichever format.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{UInt8Type, UInt64Type};
use arrow_array::{Array, FixedSizeListArray, RecordBatch, UInt8Array, UInt64Array};
use arrow_schema::DataType;
use arrow_select::concat::concat_batches;
use futures::{StreamExt, TryStreamExt};
use lance::index::{DatasetIndexExt, DatasetIndexInternalExt};
use lance_core::ROW_ID;
use lance_index::INDEX_AUXILIARY_FILE_NAME;
use lance_index::frag_reuse::{CompactFragReuseIndex, FRAG_REUSE_INDEX_NAME};
use lance_index::metrics::NoOpMetricsCollector;
use lance_index::pb;
use lance_index::vector::PQ_CODE_COLUMN;
use lance_index::vector::ivf::storage::IVF_METADATA_KEY;
use lance_index::vector::pq::storage::ProductQuantizationMetadata;
use lance_index::vector::storage::STORAGE_METADATA_KEY;
use prost::Message;

use super::committed::CommittedSegment;
use super::folder::SegmentFolder;
use crate::error::{Error, Result};
use crate::lance::dataset::Dataset;
use crate::lance::file::{Expected, LanceFile, LanceFiles};
use crate::model::fixed_size_list;

/// Rows decoded at once.
const BATCH_ROWS: u32 = 1 << 16;

/// Reads of a slice of transposed codes that are under way at a time: enough to hide a store's delay.
const READS_AT_ONCE: usize = 64;

/// The most rows for a byte of a file.
const ROWS_PER_BYTE: u64 = 8;

/// Where rows of a deferred compaction are now.
#[derive(Clone)]
pub struct RowIdRemapper(Arc<CompactFragReuseIndex>);

impl RowIdRemapper {
    /// Of a dataset, where one of its compactions has left the indexes as they were.
    pub async fn of(dataset: &Dataset) -> Result<Option<Self>> {
        let indices = dataset.0.load_indices().await?;
        let Some(index) = indices.iter().find(|index| index.name == FRAG_REUSE_INDEX_NAME) else { return Ok(None) };
        if index.index_version != 0 {
            return Err(Error::invalid(format!(
                "{}: its deferred compactions are recorded in version {} of that format, which cannot be read here; compact the table without \
                 defer_index_remap, or let Lance bring its indexes up to date first",
                dataset.shown_uri(),
                index.index_version
            )));
        }
        Ok(dataset.0.open_frag_reuse_index(&NoOpMetricsCollector).await?.map(Self))
    }

    /// Row ids as they are now; `u64::MAX`, which no row has, for rows that were deleted.
    pub fn remap(&self, row_ids: &mut [u64]) {
        row_ids.iter_mut().for_each(|row_id| *row_id = self.0.remap_row_id(*row_id).unwrap_or(u64::MAX));
    }
}

/// A committed segment, open.
pub struct SegmentReader {
    uuid: String,
    file: LanceFile,
    is_remote: bool,
    /// The first row of each partition, and the end.
    starts: Vec<u64>,
    code_width: usize,
    transposed: bool,
    remapper: Option<RowIdRemapper>,
}

impl SegmentReader {
    pub async fn open(dataset: &Dataset, segment: &CommittedSegment, remapper: Option<RowIdRemapper>) -> Result<Self> {
        let uuid = segment.uuid.clone();
        let name = |what: &str| format!("index segment {uuid}: {what}");
        let folder = SegmentFolder::committed(dataset, segment).await?;
        if folder.size(INDEX_AUXILIARY_FILE_NAME).await?.is_none() {
            return Err(Error::invalid(name(&format!(
                "it has no {INDEX_AUXILIARY_FILE_NAME}: an index of an older format; build it anew"
            ))));
        }
        let store = folder.as_store();
        let file = LanceFiles::new(&store).open(INDEX_AUXILIARY_FILE_NAME, Expected::default()).await?;
        let metadata = file.metadata();
        let missing = |key: &str| Error::corrupt(name(&format!("{INDEX_AUXILIARY_FILE_NAME} has no {key}")));
        let position = metadata.get(IVF_METADATA_KEY).and_then(|position| position.parse().ok());
        let ivf = file.global_buffer(position.ok_or_else(|| missing(IVF_METADATA_KEY))?).await?;
        let ivf = pb::Ivf::decode(ivf).map_err(|e| Error::corrupt(name(&format!("its partitions cannot be read ({e})"))))?;
        let quantization = metadata.get(STORAGE_METADATA_KEY).ok_or_else(|| missing(STORAGE_METADATA_KEY))?;
        let quantization: ProductQuantizationMetadata = serde_json::from_str::<Vec<String>>(quantization)
            .and_then(|parts| serde_json::from_str(parts.first().map_or("", String::as_str)))
            .map_err(|e| Error::corrupt(name(&format!("its quantization cannot be read ({e})"))))?;
        let mut starts = vec![0u64];
        let mut end = 0;
        for length in &ivf.lengths {
            end += u64::from(*length);
            starts.push(end);
        }
        if end != file.num_rows() {
            return Err(Error::corrupt(name(&format!("its partitions have {end} rows, its file {}", file.num_rows()))));
        }
        // Row ids differ, and none is told from the next in less than a bit: more rows than that ask for memory that nobody has.
        if end > file.size().saturating_mul(ROWS_PER_BYTE) {
            return Err(Error::corrupt(name(&format!("it claims {end} rows in {} bytes", file.size()))));
        }
        let bits = quantization.num_sub_vectors.checked_mul(quantization.nbits as usize);
        let code_width = bits.map(|bits| bits / 8).filter(|width| (1..=i32::MAX as usize).contains(width)).ok_or_else(|| {
            Error::corrupt(name(&format!("codes of {} sub-vectors of {} bits", quantization.num_sub_vectors, quantization.nbits)))
        })?;
        // What the quantization says is the size of many things; the file says it too.
        let stored = file.schema().field_with_name(PQ_CODE_COLUMN).ok().map(|codes| codes.data_type());
        if !stored.is_some_and(|stored| is_codes(stored, code_width)) {
            let stored = stored.map_or("none".to_string(), ToString::to_string);
            return Err(Error::corrupt(name(&format!("codes of {code_width} bytes are expected, its file has {stored}"))));
        }
        Ok(Self { uuid, file, is_remote: folder.local().is_none(), starts, code_width, transposed: quantization.transposed, remapper })
    }

    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    pub fn num_partitions(&self) -> usize {
        self.starts.len() - 1
    }

    pub fn num_rows(&self) -> u64 {
        self.file.num_rows()
    }

    pub fn code_width(&self) -> usize {
        self.code_width
    }

    pub fn is_remote(&self) -> bool {
        self.is_remote
    }

    /// Bytes of memory.
    pub fn held_bytes(&self) -> u64 {
        (self.starts.len() * size_of::<u64>()) as u64
    }

    /// Bytes read so far.
    pub fn bytes_read(&self) -> u64 {
        self.file.bytes_read()
    }

    /// The rows of a partition as they are stored, the last one behind the end.
    fn rows_of(&self, partition: usize) -> Range<u64> {
        self.starts[partition]..self.starts[partition + 1]
    }

    /// Rows of a partition as stored: some may be deleted since.
    pub fn partition_rows(&self, partition: usize) -> u64 {
        let rows = self.rows_of(partition);
        rows.end - rows.start
    }

    /// Row ids of consecutive partitions, one after the other.
    pub async fn row_ids(&self, partitions: Range<usize>) -> Result<Vec<u64>> {
        self.read_row_ids(self.starts[partitions.start]..self.starts[partitions.end]).await
    }

    /// Row ids of `rows` rows of a partition from its row `first` on.
    pub async fn row_ids_of(&self, partition: usize, first: u64, rows: u64) -> Result<Vec<u64>> {
        let first = self.starts[partition] + first;
        self.read_row_ids(first..first + rows).await
    }

    async fn read_row_ids(&self, rows: Range<u64>) -> Result<Vec<u64>> {
        let mut row_ids = Vec::with_capacity((rows.end - rows.start) as usize);
        for batch in self.read(vec![rows], vec![ROW_ID]).await? {
            row_ids.extend_from_slice(batch_row_ids(&batch)?.values());
        }
        self.remapped(&mut row_ids);
        Ok(row_ids)
    }

    fn remapped(&self, row_ids: &mut [u64]) {
        if let Some(remapper) = &self.remapper {
            remapper.remap(row_ids);
        }
    }

    /// Whether the codes of a partition lie byte by byte: the first of all its rows, then the second.
    pub fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// Row ids and codes of consecutive partitions, as they are stored.
    pub async fn partitions(&self, partitions: Range<usize>) -> Result<(UInt64Array, FixedSizeListArray)> {
        let rows = self.starts[partitions.start]..self.starts[partitions.end];
        if rows.is_empty() {
            return Ok((
                UInt64Array::from(Vec::<u64>::new()),
                fixed_size_list(Arc::new(UInt8Array::from(Vec::<u8>::new())), self.code_width)?,
            ));
        }
        // One batch mostly, and no copy.
        let batches = self.file.decode(vec![rows].into(), vec![ROW_ID, PQ_CODE_COLUMN], u32::MAX, Ok).await?;
        let batch = match &batches[..] {
            [batch] => batch.clone(),
            batches => {
                let schema = batches.first().ok_or_else(|| Error::corrupt("an index whose rows cannot be read"))?.schema();
                concat_batches(&schema, batches)?
            }
        };
        let mut row_ids = batch_row_ids(&batch)?.clone();
        if let Some(remapper) = &self.remapper {
            let mut now = row_ids.values().to_vec();
            remapper.remap(&mut now);
            row_ids = UInt64Array::from(now);
        }
        let codes = batch_codes(&batch, self.code_width)?;
        let start = codes.value_offset(0) as usize;
        let values = codes.values().slice(start, codes.len() * self.code_width);
        Ok((row_ids, fixed_size_list(values, self.code_width)?))
    }

    /// `rows` rows of a partition from its row `first` on: row ids, and codes row by row.
    pub async fn slice(&self, partition: usize, first: u64, rows: u64) -> Result<(Vec<u64>, Vec<u8>)> {
        let partition = self.rows_of(partition);
        let (start, width, num_rows) = (partition.start, self.code_width as u64, partition.end - partition.start);
        let wanted = start + first..start + first + rows;
        let row_ids = self.read_row_ids(wanted.clone()).await?;
        let mut codes: Vec<u8> = Vec::with_capacity((rows * width) as usize);
        if !self.transposed {
            for batch in self.read(vec![wanted], vec![PQ_CODE_COLUMN]).await? {
                codes.extend_from_slice(code_bytes(batch_codes(&batch, self.code_width)?));
            }
            return Ok((row_ids, codes));
        }
        // A byte of these rows lies side by side, in rows of the file of its own.
        let columns = (0..width).map(|byte| async move {
            let from = byte * num_rows + first;
            let lines = start + from / width..start + (from + rows).div_ceil(width);
            let mut column: Vec<u8> = Vec::with_capacity((rows + 2 * width) as usize);
            for batch in self.read(vec![lines], vec![PQ_CODE_COLUMN]).await? {
                column.extend_from_slice(code_bytes(batch_codes(&batch, self.code_width)?));
            }
            column.drain(..(from % width) as usize);
            column.truncate(rows as usize);
            Ok::<_, Error>(column)
        });
        // Each read takes some memory beside its bytes, whatever those are.
        let columns: Vec<_> = futures::stream::iter(columns).buffered(READS_AT_ONCE).try_collect().await?;
        codes.resize((rows * width) as usize, 0);
        for (byte, column) in columns.iter().enumerate() {
            for (row, value) in column.iter().enumerate() {
                codes[row * self.code_width + byte] = *value;
            }
        }
        Ok((row_ids, codes))
    }

    async fn read(&self, ranges: Vec<Range<u64>>, columns: Vec<&'static str>) -> Result<Vec<RecordBatch>> {
        if ranges.iter().all(Range::is_empty) {
            return Ok(Vec::new());
        }
        self.file.decode(ranges.into(), columns, BATCH_ROWS, Ok).await
    }
}

/// Rows of each partition over all segments of the index of a name, as they are stored.
pub async fn sizes_of_index(dataset: &Dataset, name: &str) -> Result<Vec<u64>> {
    let mut sizes: Vec<u64> = Vec::new();
    for segment in CommittedSegment::of_index(dataset, name).await? {
        let reader = SegmentReader::open(dataset, &segment, None).await?;
        sizes.resize(sizes.len().max(reader.num_partitions()), 0);
        sizes.iter_mut().zip(0..reader.num_partitions()).for_each(|(size, partition)| *size += reader.partition_rows(partition));
    }
    Ok(sizes)
}

fn batch_row_ids(batch: &RecordBatch) -> Result<&UInt64Array> {
    let row_ids = batch.column_by_name(ROW_ID).and_then(|ids| ids.as_primitive_opt::<UInt64Type>());
    row_ids.ok_or_else(|| Error::corrupt("an index without row ids"))
}

fn batch_codes(batch: &RecordBatch, width: usize) -> Result<&FixedSizeListArray> {
    let codes = batch.column_by_name(PQ_CODE_COLUMN).and_then(|codes| codes.as_fixed_size_list_opt());
    codes
        .filter(|codes| is_codes(codes.data_type(), width))
        .ok_or_else(|| Error::corrupt(format!("an index without codes of {width} bytes")))
}

fn is_codes(stored: &DataType, width: usize) -> bool {
    matches!(stored, DataType::FixedSizeList(item, stored) if *stored as usize == width && *item.data_type() == DataType::UInt8)
}

fn code_bytes(codes: &FixedSizeListArray) -> &[u8] {
    let (start, width) = (codes.value_offset(0) as usize, codes.value_length() as usize);
    &codes.values().as_primitive::<UInt8Type>().values()[start..start + codes.len() * width]
}
