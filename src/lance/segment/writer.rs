//! The two files of an IVF_PQ segment, as Lance's index builder writes them, without it: rows are encoded by Lance's own encoders,
//! many at once, and their finished pages are appended in order. `tests/test_oracle.py` compares the result with stock's.

use std::sync::Arc;

use arrow_array::{Array, ArrayRef, FixedSizeListArray, UInt64Array};
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
use lance_index::vector::DISTANCE_TYPE_KEY;
use lance_index::vector::flat::index::FlatIndex;
use lance_index::vector::ivf::storage::{IVF_METADATA_KEY, IvfModel};
use lance_index::vector::pq::ProductQuantizer;
use lance_index::vector::quantizer::{Quantization, QuantizationMetadata, QuantizerMetadata};
use lance_index::vector::shared::{SupportedIvfIndexType, write_unified_ivf_and_index_metadata};
use lance_index::vector::storage::STORAGE_METADATA_KEY;
use lance_index::vector::v3::subindex::IvfSubIndex;
use lance_index::{INDEX_AUXILIARY_FILE_NAME, INDEX_FILE_NAME};
use prost::Message;

use super::folder::SegmentFolder;
use crate::error::{Error, Result};
use crate::io::Uploads;
use crate::lance::dataset::Dataset;
use crate::lance::kernels::{distance_type, product_quantizer};
use crate::model::IvfPqModel;

/// Encoded pages of some rows of one column.
pub struct EncodedColumn {
    column: usize,
    first_row: u64,
    num_rows: u64,
    pages: Vec<EncodedPage>,
    encoding: ColumnEncoding,
}

/// Encodes rows: a schema, and how its columns are encoded.
pub struct PageEncoder {
    schema: Schema,
    strategy: Arc<dyn FieldEncodingStrategy>,
}

/// What was written of a column.
#[derive(Default)]
struct WrittenColumn {
    num_rows: u64,
    /// Each with its first row.
    pages: Vec<(u64, PageInfo)>,
    encoding: ColumnEncoding,
}

/// Writes the files of a segment.
pub struct SegmentWriter {
    folder: SegmentFolder,
    uploads: Uploads,
    version: ConcreteFileVersion,
    model: Arc<IvfPqModel>,
    quantizer: ProductQuantizer,
    codes: FileWriter,
    encoder: Arc<PageEncoder>,
    columns: [WrittenColumn; 2],
    transposed: bool,
}

impl SegmentWriter {
    /// `folder` must be there where it is local. `transposed`: codes come byte by byte of a partition, else row by row.
    pub fn create(dataset: &Dataset, folder: SegmentFolder, model: Arc<IvfPqModel>, uploads: Uploads, transposed: bool) -> Result<Self> {
        // As Lance does: indexes of datasets in the first format have files of the second.
        let version = match dataset.0.manifest().data_storage_format.lance_file_format() {
            ConcreteFileVersion::V1 => ConcreteFileVersion::V2_0,
            version => version,
        };
        let quantizer = product_quantizer(&model);
        let encoder = Arc::new(PageEncoder::try_new(quantizer.field(), version)?);
        let file = folder.create(INDEX_AUXILIARY_FILE_NAME, &uploads)?;
        let codes = versions::create_lazy_writer(version, file, FileWriterOptions::default())?;
        Ok(Self { folder, uploads, version, model, quantizer, codes, encoder, columns: Default::default(), transposed })
    }

    pub fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// For the tasks that encode.
    pub fn encoder(&self) -> Arc<PageEncoder> {
        self.encoder.clone()
    }

    /// Write encoded rows of a column, in any order.
    pub async fn append(&mut self, rows: EncodedColumn) -> Result<()> {
        let column = &mut self.columns[rows.column];
        let mut first_row = rows.first_row;
        for page in rows.pages {
            let mut buffers = Vec::with_capacity(page.data.len());
            for buffer in &page.data {
                buffers.push(self.codes.write_external_buffer(buffer).await?);
            }
            let info = PageInfo {
                num_rows: page.num_rows,
                priority: page.row_number,
                encoding: page.description,
                buffer_offsets_and_sizes: buffers.into(),
            };
            // Encoders of the first format do not tell the row of a page.
            column.pages.push((first_row, info));
            first_row += page.num_rows;
        }
        column.encoding = rows.encoding;
        column.num_rows += rows.num_rows;
        Ok(())
    }

    /// Write what a search needs to know of partitions of these `lengths`; the names and bytes of the files.
    pub async fn finish(self, lengths: &[u32], loss: f64) -> Result<Vec<(String, u64)>> {
        let Self { folder, uploads, version, model, quantizer, mut codes, encoder, columns, transposed } = self;
        // Global buffers follow, which the format wants aligned from 2.1 on: an empty buffer brings the padding there.
        codes.write_external_buffer(&[]).await?;
        let num_rows = lengths.iter().map(|rows| u64::from(*rows)).sum();
        if let Some(column) = columns.iter().find(|column| column.num_rows != num_rows) {
            return Err(Error::internal(format!("a column of an index has {} rows, its partitions {num_rows}", column.num_rows)));
        }
        let column = |(index, mut column): (u32, WrittenColumn)| {
            column.pages.sort_by_key(|(first_row, _)| *first_row);
            let pages = column.pages.into_iter().map(|(_, page)| page).collect();
            Arc::new(ColumnInfo::new(index, pages, Vec::new(), column.encoding))
        };
        let columns: Vec<_> = (0..).zip(columns).map(column).collect();
        codes.initialize_with_external_columns(encoder.schema.clone(), &columns, num_rows)?;

        let mut stored = IvfModel::empty();
        lengths.iter().for_each(|rows| stored.add_partition(*rows));
        codes.add_schema_metadata(DISTANCE_TYPE_KEY, distance_type(model.metric()).to_string());
        let position = codes.add_global_buffer(pb::Ivf::try_from(&stored)?.encode_to_vec().into()).await?;
        codes.add_schema_metadata(IVF_METADATA_KEY, position.to_string());
        let options = QuantizationMetadata { codebook_position: Some(0), codebook: None, transposed };
        let mut metadata = quantizer.metadata(Some(options));
        if let Some(codebook) = metadata.extra_metadata()? {
            metadata.set_buffer_index(codes.add_global_buffer(codebook).await?);
        }
        let json = |e: serde_json::Error| Error::internal(format!("index metadata: {e}"));
        let metadata = serde_json::to_string(&metadata).and_then(|metadata| serde_json::to_string(&[metadata])).map_err(json)?;
        codes.add_schema_metadata(STORAGE_METADATA_KEY, metadata);
        let codes = codes.finish().await?;
        let index_bytes = write_centroids(&folder, &uploads, version, &model, lengths, loss).await?;
        Ok(vec![(INDEX_AUXILIARY_FILE_NAME.into(), codes.size_bytes), (INDEX_FILE_NAME.into(), index_bytes)])
    }
}

/// The file of the centroids. A flat index of codes keeps nothing else beside them.
async fn write_centroids(
    folder: &SegmentFolder,
    uploads: &Uploads,
    version: ConcreteFileVersion,
    model: &IvfPqModel,
    lengths: &[u32],
    loss: f64,
) -> Result<u64> {
    let schema = Schema::try_from(FlatIndex::schema().as_ref())?;
    let file = folder.create(INDEX_FILE_NAME, uploads)?;
    let mut file = versions::create_writer(version, file, schema, FileWriterOptions::default())?;
    let mut ivf = IvfModel::new(model.centroids().clone(), Some(loss));
    lengths.iter().for_each(|_| ivf.add_partition(0));
    write_unified_ivf_and_index_metadata(&mut file, &ivf, distance_type(model.metric()), SupportedIvfIndexType::IvfPq).await?;
    let nothing = serde_json::to_string(&vec![""; lengths.len()]).map_err(|e| Error::internal(format!("index metadata: {e}")))?;
    file.add_schema_metadata(FlatIndex::metadata_key(), nothing);
    Ok(file.finish().await?.size_bytes)
}

impl PageEncoder {
    fn try_new(field: arrow_schema::Field, version: ConcreteFileVersion) -> Result<Self> {
        let strategy = match version {
            ConcreteFileVersion::V1 | ConcreteFileVersion::V2_0 => versions::v2_0::encoding_strategy(),
            ConcreteFileVersion::V2_1 => versions::v2_1::encoding_strategy(CompressionParams::default()),
            ConcreteFileVersion::V2_2 => versions::v2_2::encoding_strategy(CompressionParams::default()),
            ConcreteFileVersion::V2_3 => versions::v2_3::encoding_strategy(CompressionParams::default()),
        };
        let schema = Schema::try_from(&arrow_schema::Schema::new(vec![lance_core::ROW_ID_FIELD.clone(), field]))?;
        Ok(Self { schema, strategy })
    }

    /// Make pages of row ids, the rows from `first_row` on.
    pub async fn row_ids(&self, first_row: u64, row_ids: UInt64Array) -> Result<EncodedColumn> {
        self.column(0, first_row, Arc::new(row_ids)).await
    }

    /// Make pages of codes as they lie in the file.
    pub async fn codes(&self, first_row: u64, codes: FixedSizeListArray) -> Result<EncodedColumn> {
        self.column(1, first_row, Arc::new(codes)).await
    }

    /// One page, or several where it is long.
    async fn column(&self, column: usize, first_row: u64, array: ArrayRef) -> Result<EncodedColumn> {
        let options = EncodingOptions { keep_original_array: true, ..Default::default() };
        let mut encoders = BatchEncoder::try_new(&self.schema, self.strategy.as_ref(), &options)?.field_encoders;
        if encoders.len() <= column {
            return Err(Error::internal(format!("an index of {} columns", encoders.len())));
        }
        let mut encoder = encoders.swap_remove(column);
        let num_rows = array.len() as u64;
        let mut apart = OutOfLineBuffers::new(0, options.buffer_alignment);
        let array = encoder.prepare_array(array)?;
        let mut tasks = encoder.maybe_encode(array, &mut apart, RepDefBuilder::default(), first_row, num_rows)?;
        tasks.extend(encoder.flush(&mut apart)?);
        let mut pages = Vec::with_capacity(tasks.len());
        for task in tasks {
            pages.push(task.await?);
        }
        let mut encodings = encoder.finish(&mut apart).await?;
        let Some(encoded) = encodings.pop().filter(|_| encodings.is_empty()) else {
            return Err(Error::internal("a field of an index that is not one column"));
        };
        if !encoded.column_buffers.is_empty() || !encoded.final_pages.is_empty() {
            return Err(Error::internal("an index column with buffers of its own"));
        }
        if !apart.take_buffers().is_empty() {
            return Err(Error::internal("an index column with values out of line"));
        }
        Ok(EncodedColumn { column, first_row, num_rows, pages, encoding: encoded.encoding })
    }
}
