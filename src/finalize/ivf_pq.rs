//! The two files of an IVF_PQ segment, as Lance's index builder writes them, without it.
//!
//! Lance's builder puts one partition after the other together, encodes it and writes it, with one core busy for most of the
//! time. Here windows of partitions are read, checked, transposed and encoded side by side, by Lance's own encoders, and their
//! finished pages are appended in order. `tests/test_oracle.py` compares the result with stock's.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use arrow_array::{Array, ArrayRef, RecordBatch, UInt8Array, UInt64Array};
use futures::StreamExt;
use lance_core::datatypes::Schema;
use lance_encoding::compression_config::CompressionParams;
use lance_encoding::decoder::{ColumnInfo, PageInfo};
use lance_encoding::encoder::{BatchEncoder, EncodedPage, EncodingOptions, FieldEncodingStrategy, OutOfLineBuffers};
use lance_encoding::format::pb::ColumnEncoding;
use lance_encoding::repdef::RepDefBuilder;
use lance_file::version::ConcreteFileVersion;
use lance_file::versions;
use lance_file::writer::{FileWriter, FileWriterOptions};
use lance_index::pb;
use lance_index::progress::IndexBuildProgress;
use lance_index::vector::DISTANCE_TYPE_KEY;
use lance_index::vector::flat::index::FlatIndex;
use lance_index::vector::ivf::storage::{IVF_METADATA_KEY, IvfModel};
use lance_index::vector::pq::ProductQuantizer;
use lance_index::vector::quantizer::{Quantization, QuantizationMetadata, QuantizerMetadata};
use lance_index::vector::shared::{SupportedIvfIndexType, write_unified_ivf_and_index_metadata};
use lance_index::vector::storage::STORAGE_METADATA_KEY;
use lance_index::vector::v3::shuffler::ShuffleReader;
use lance_index::vector::v3::subindex::IvfSubIndex;
use lance_index::{INDEX_AUXILIARY_FILE_NAME, INDEX_FILE_NAME};
use lance_io::object_store::ObjectStore;
use lance_io::traits::Writer;
use lance_linalg::distance::DistanceType;
use object_store::path::Path;
use prost::Message;
use tokio::task::{JoinError, JoinHandle};

use super::shuffle_reader::PartitionArtifactShuffleReader;
use super::transpose::transpose_into;
use crate::artifact::{local_writer, row_ids_and_codes};
use crate::error::Error;
use crate::model::{IvfPqModel, fixed_size_list};

/// How the work is cut: rows of a window in bytes, and windows in preparation for each core and at all. A window in preparation
/// takes about three times as much memory: as read, transposed, and encoded.
struct Windows {
    bytes: usize,
    per_core: usize,
    most: usize,
}

/// While one window is read another is encoded; one writer cannot keep up with more cores.
const LOCAL: Windows = Windows { bytes: 4 << 20, per_core: 2, most: 32 };

/// A window has rows of every bucket, and each read of one is a request: longer ones, fewer at a time.
const REMOTE: Windows = Windows { bytes: 32 << 20, per_core: 1, most: 4 };

/// Where a segment goes, and what it is written with.
pub struct SegmentFiles<'a> {
    pub store: &'a ObjectStore,
    pub folder: Path,
    /// Of the dataset: its indexes have files of the same version.
    pub version: ConcreteFileVersion,
    pub model: &'a IvfPqModel,
}

/// Encoded pages of some partitions.
struct Window {
    /// Rows of each partition.
    lengths: Vec<u32>,
    pages: Vec<EncodedPage>,
    columns: Vec<ColumnEncoding>,
}

/// Encodes windows: a schema and how its columns are encoded.
struct Encoder {
    schema: Schema,
    strategy: Arc<dyn FieldEncodingStrategy>,
    code_width: usize,
}

impl SegmentFiles<'_> {
    /// Write every partition of `reader`, then what search needs to know; the names and bytes of the files.
    pub async fn write(
        &self,
        reader: PartitionArtifactShuffleReader,
        progress: &dyn IndexBuildProgress,
    ) -> lance_core::Result<Vec<(String, u64)>> {
        let model = self.model;
        progress.stage_start("merge_partitions", Some(reader.num_partitions() as u64), "partitions").await?;
        let loss = reader.total_loss().unwrap_or_default();
        let quantizer =
            ProductQuantizer::new(model.num_sub_vectors(), model.num_bits(), model.dimension(), model.codebook().clone(), DistanceType::L2);
        let encoder = Encoder::try_new(quantizer.field(), self.version, model.code_width())?;
        let mut codes =
            versions::create_lazy_writer(self.version, self.create(INDEX_AUXILIARY_FILE_NAME).await?, FileWriterOptions::default())?;
        let lengths = write_windows(&mut codes, encoder, Arc::new(reader), progress).await?;

        let mut stored = IvfModel::empty();
        lengths.iter().for_each(|rows| stored.add_partition(*rows));
        codes.add_schema_metadata(DISTANCE_TYPE_KEY, model.metric().distance_type().to_string());
        let position = codes.add_global_buffer(pb::Ivf::try_from(&stored)?.encode_to_vec().into()).await?;
        codes.add_schema_metadata(IVF_METADATA_KEY, position.to_string());
        let mut metadata = quantizer.metadata(Some(QuantizationMetadata { codebook_position: Some(0), codebook: None, transposed: true }));
        if let Some(codebook) = metadata.extra_metadata()? {
            metadata.set_buffer_index(codes.add_global_buffer(codebook).await?);
        }
        codes.add_schema_metadata(STORAGE_METADATA_KEY, serde_json::to_string(&[serde_json::to_string(&metadata)?])?);
        let codes = codes.finish().await?;
        let index_bytes = self.write_index(&lengths, loss).await?;
        progress.stage_complete("merge_partitions").await?;
        Ok(vec![(INDEX_AUXILIARY_FILE_NAME.into(), codes.size_bytes), (INDEX_FILE_NAME.into(), index_bytes)])
    }

    /// The centroids. A flat index of codes keeps nothing else beside them.
    async fn write_index(&self, lengths: &[u32], loss: f64) -> lance_core::Result<u64> {
        let schema = Schema::try_from(FlatIndex::schema().as_ref())?;
        let mut file = versions::create_writer(self.version, self.create(INDEX_FILE_NAME).await?, schema, FileWriterOptions::default())?;
        let mut ivf = IvfModel::new(self.model.centroids().clone(), Some(loss));
        lengths.iter().for_each(|_| ivf.add_partition(0));
        let metric = self.model.metric().distance_type();
        write_unified_ivf_and_index_metadata(&mut file, &ivf, metric, SupportedIvfIndexType::IvfPq).await?;
        file.add_schema_metadata(FlatIndex::metadata_key(), serde_json::to_string(&vec![""; lengths.len()])?);
        Ok(file.finish().await?.size_bytes)
    }

    async fn create(&self, name: &str) -> lance_core::Result<Box<dyn Writer>> {
        let path = self.folder.clone().join(name);
        if self.store.has_direct_local_paths() {
            return Ok(local_writer(lance_io::local::to_local_path(&path).into())?);
        }
        self.store.create(&path).await
    }
}

/// A task that ends where nobody waits for it any more.
struct Task<T>(JoinHandle<T>);

impl<T> Future for Task<T> {
    type Output = std::result::Result<T, JoinError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx)
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Write the pages of all partitions, and answer with the rows of each.
async fn write_windows(
    file: &mut FileWriter,
    encoder: Encoder,
    reader: Arc<PartitionArtifactShuffleReader>,
    progress: &dyn IndexBuildProgress,
) -> lance_core::Result<Vec<u32>> {
    let schema = encoder.schema.clone();
    let encoder = Arc::new(encoder);
    let mut columns: Vec<(Vec<PageInfo>, ColumnEncoding)> = Vec::new();
    let mut lengths = Vec::with_capacity(reader.num_partitions());
    let mut rows = 0u64;
    let windows = if reader.is_remote() { REMOTE } else { LOCAL };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let at_once = (windows.per_core * cores).min(windows.most);
    let tasks = reader.windows(windows.bytes).into_iter().map(|(partitions, first_row)| {
        let (encoder, reader) = (encoder.clone(), reader.clone());
        Task(tokio::spawn(async move {
            let read = reader.read(partitions).await?;
            encoder.encode(first_row, read).await
        }))
    });
    // Reading, checking, transposing and encoding keep all cores busy while finished pages are written in their order.
    let mut windows = futures::stream::iter(tasks).buffered(at_once);
    while let Some(window) = windows.next().await {
        let window = window.map_err(|e| lance_core::Error::from(Error::from(e)))??;
        columns.resize_with(window.columns.len(), Default::default);
        for (column, encoding) in columns.iter_mut().zip(window.columns) {
            column.1 = encoding;
        }
        for page in window.pages {
            let mut buffers = Vec::with_capacity(page.data.len());
            for buffer in &page.data {
                buffers.push(file.write_external_buffer(buffer).await?);
            }
            let (pages, _) = columns
                .get_mut(page.column_idx as usize)
                .ok_or_else(|| Error::internal(format!("a page of column {} of an index file", page.column_idx)))?;
            pages.push(PageInfo {
                num_rows: page.num_rows,
                priority: page.row_number,
                encoding: page.description,
                buffer_offsets_and_sizes: buffers.into(),
            });
        }
        rows += window.lengths.iter().map(|rows| u64::from(*rows)).sum::<u64>();
        lengths.extend(window.lengths);
        progress.stage_progress("merge_partitions", lengths.len() as u64).await?;
    }
    // Global buffers follow, which the format wants aligned from 2.1 on: an empty buffer brings the padding there.
    file.write_external_buffer(&[]).await?;
    let column = |(index, (pages, encoding)): (u32, (Vec<PageInfo>, ColumnEncoding))| {
        Arc::new(ColumnInfo::new(index, pages.into(), Vec::new(), encoding))
    };
    let columns: Vec<_> = (0..).zip(columns).map(column).collect();
    file.initialize_with_external_columns(schema, &columns, rows)?;
    Ok(lengths)
}

impl Encoder {
    fn try_new(field: arrow_schema::Field, version: ConcreteFileVersion, code_width: usize) -> lance_core::Result<Self> {
        let strategy = match version {
            ConcreteFileVersion::V1 | ConcreteFileVersion::V2_0 => versions::v2_0::encoding_strategy(),
            ConcreteFileVersion::V2_1 => versions::v2_1::encoding_strategy(CompressionParams::default()),
            ConcreteFileVersion::V2_2 => versions::v2_2::encoding_strategy(CompressionParams::default()),
            ConcreteFileVersion::V2_3 => versions::v2_3::encoding_strategy(CompressionParams::default()),
        };
        let schema = Schema::try_from(&arrow_schema::Schema::new(vec![lance_core::ROW_ID_FIELD.clone(), field]))?;
        Ok(Self { schema, strategy, code_width })
    }

    /// Put the rows of each partition together, then make pages of the window.
    async fn encode(&self, first_row: u64, partitions: Vec<Vec<RecordBatch>>) -> lance_core::Result<Window> {
        let lengths = partitions.iter().map(|batches| batches.iter().map(RecordBatch::num_rows).sum()).collect::<Vec<usize>>();
        let rows: usize = lengths.iter().sum();
        let mut row_ids: Vec<u64> = Vec::with_capacity(rows);
        let mut codes = vec![0u8; rows * self.code_width];
        for (batches, num_rows) in partitions.iter().zip(&lengths) {
            let start = row_ids.len();
            let partition = &mut codes[start * self.code_width..(start + num_rows) * self.code_width];
            for batch in batches {
                let (ids, rows) = row_ids_and_codes(batch);
                transpose_into(rows, self.code_width, partition, *num_rows, row_ids.len() - start);
                row_ids.extend_from_slice(ids);
            }
        }
        drop(partitions);
        let mut lengths_u32 = Vec::with_capacity(lengths.len());
        for rows in lengths {
            lengths_u32.push(u32::try_from(rows).map_err(|_| {
                lance_core::Error::from(Error::invalid(format!("a partition of {rows} rows: an index holds at most {} in one", u32::MAX)))
            })?);
        }
        let codes = fixed_size_list(Arc::new(UInt8Array::from(codes)), self.code_width)?;
        let (pages, columns) = self.pages(first_row, vec![Arc::new(UInt64Array::from(row_ids)), Arc::new(codes)]).await?;
        Ok(Window { lengths: lengths_u32, pages, columns })
    }

    /// Each column as one page, or several where it is long.
    async fn pages(&self, first_row: u64, arrays: Vec<ArrayRef>) -> lance_core::Result<(Vec<EncodedPage>, Vec<ColumnEncoding>)> {
        let options = EncodingOptions { keep_original_array: true, ..Default::default() };
        let encoders = BatchEncoder::try_new(&self.schema, self.strategy.as_ref(), &options)?.field_encoders;
        let (mut pages, mut columns) = (Vec::new(), Vec::new());
        for (mut encoder, array) in encoders.into_iter().zip(arrays) {
            let num_rows = array.len() as u64;
            let mut apart = OutOfLineBuffers::new(0, options.buffer_alignment);
            let array = encoder.prepare_array(array)?;
            let mut tasks = encoder.maybe_encode(array, &mut apart, RepDefBuilder::default(), first_row, num_rows)?;
            tasks.extend(encoder.flush(&mut apart)?);
            for task in tasks {
                pages.push(task.await?);
            }
            for column in encoder.finish(&mut apart).await? {
                if !column.column_buffers.is_empty() || !column.final_pages.is_empty() {
                    return Err(Error::internal("an index column with buffers of its own").into());
                }
                columns.push(column.encoding);
            }
            if !apart.take_buffers().is_empty() {
                return Err(Error::internal("an index column with values out of line").into());
            }
        }
        Ok((pages, columns))
    }
}
