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
use crate::lance::dataset::Dataset;
use crate::lance::kernels::{distance_type, product_quantizer};
use crate::model::IvfPqModel;

/// Encoded pages of some rows.
pub struct EncodedRows {
    num_rows: u64,
    pages: Vec<EncodedPage>,
    columns: Vec<ColumnEncoding>,
}

/// Encodes rows: a schema, and how its columns are encoded.
pub struct PageEncoder {
    schema: Schema,
    strategy: Arc<dyn FieldEncodingStrategy>,
}

/// Writes the files of a segment.
pub struct SegmentWriter {
    folder: SegmentFolder,
    version: ConcreteFileVersion,
    model: Arc<IvfPqModel>,
    quantizer: ProductQuantizer,
    codes: FileWriter,
    encoder: Arc<PageEncoder>,
    columns: Vec<(Vec<PageInfo>, ColumnEncoding)>,
    num_rows: u64,
}

impl SegmentWriter {
    /// `folder` must be there where it is local.
    pub async fn create(dataset: &Dataset, folder: SegmentFolder, model: Arc<IvfPqModel>) -> Result<Self> {
        // As Lance does: indexes of datasets in the first format have files of the second.
        let version = match dataset.0.manifest().data_storage_format.lance_file_format() {
            ConcreteFileVersion::V1 => ConcreteFileVersion::V2_0,
            version => version,
        };
        let quantizer = product_quantizer(&model);
        let encoder = Arc::new(PageEncoder::try_new(quantizer.field(), version)?);
        let file = folder.create(INDEX_AUXILIARY_FILE_NAME).await?;
        let codes = versions::create_lazy_writer(version, file, FileWriterOptions::default())?;
        Ok(Self { folder, version, model, quantizer, codes, encoder, columns: Vec::new(), num_rows: 0 })
    }

    /// For the tasks that encode.
    pub fn encoder(&self) -> Arc<PageEncoder> {
        self.encoder.clone()
    }

    /// Write encoded rows. Each column's rows must come in order.
    pub async fn append(&mut self, rows: EncodedRows) -> Result<()> {
        self.columns.resize_with(rows.columns.len(), Default::default);
        for (column, encoding) in self.columns.iter_mut().zip(rows.columns) {
            column.1 = encoding;
        }
        for page in rows.pages {
            let mut buffers = Vec::with_capacity(page.data.len());
            for buffer in &page.data {
                buffers.push(self.codes.write_external_buffer(buffer).await?);
            }
            let (pages, _) = self
                .columns
                .get_mut(page.column_idx as usize)
                .ok_or_else(|| Error::internal(format!("a page of column {} of an index file", page.column_idx)))?;
            pages.push(PageInfo {
                num_rows: page.num_rows,
                priority: page.row_number,
                encoding: page.description,
                buffer_offsets_and_sizes: buffers.into(),
            });
        }
        self.num_rows += rows.num_rows;
        Ok(())
    }

    /// Write what a search needs to know of partitions of these `lengths`; the names and bytes of the files.
    pub async fn finish(self, lengths: &[u32], loss: f64) -> Result<Vec<(String, u64)>> {
        let Self { folder, version, model, quantizer, mut codes, encoder, columns, num_rows } = self;
        // Global buffers follow, which the format wants aligned from 2.1 on: an empty buffer brings the padding there.
        codes.write_external_buffer(&[]).await?;
        let column = |(index, (pages, encoding)): (u32, (Vec<PageInfo>, ColumnEncoding))| {
            Arc::new(ColumnInfo::new(index, pages.into(), Vec::new(), encoding))
        };
        let columns: Vec<_> = (0..).zip(columns).map(column).collect();
        codes.initialize_with_external_columns(encoder.schema.clone(), &columns, num_rows)?;

        let mut stored = IvfModel::empty();
        lengths.iter().for_each(|rows| stored.add_partition(*rows));
        codes.add_schema_metadata(DISTANCE_TYPE_KEY, distance_type(model.metric()).to_string());
        let position = codes.add_global_buffer(pb::Ivf::try_from(&stored)?.encode_to_vec().into()).await?;
        codes.add_schema_metadata(IVF_METADATA_KEY, position.to_string());
        let options = QuantizationMetadata { codebook_position: Some(0), codebook: None, transposed: true };
        let mut metadata = quantizer.metadata(Some(options));
        if let Some(codebook) = metadata.extra_metadata()? {
            metadata.set_buffer_index(codes.add_global_buffer(codebook).await?);
        }
        let json = |e: serde_json::Error| Error::internal(format!("index metadata: {e}"));
        let metadata = serde_json::to_string(&metadata).and_then(|metadata| serde_json::to_string(&[metadata])).map_err(json)?;
        codes.add_schema_metadata(STORAGE_METADATA_KEY, metadata);
        let codes = codes.finish().await?;
        let index_bytes = write_centroids(&folder, version, &model, lengths, loss).await?;
        Ok(vec![(INDEX_AUXILIARY_FILE_NAME.into(), codes.size_bytes), (INDEX_FILE_NAME.into(), index_bytes)])
    }
}

/// The file of the centroids. A flat index of codes keeps nothing else beside them.
async fn write_centroids(
    folder: &SegmentFolder,
    version: ConcreteFileVersion,
    model: &IvfPqModel,
    lengths: &[u32],
    loss: f64,
) -> Result<u64> {
    let schema = Schema::try_from(FlatIndex::schema().as_ref())?;
    let file = folder.create(INDEX_FILE_NAME).await?;
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

    /// Make pages of rows from `first_row` on: each column as one page, or several where it is long.
    pub async fn encode(&self, first_row: u64, row_ids: UInt64Array, codes: FixedSizeListArray) -> Result<EncodedRows> {
        let num_rows = row_ids.len() as u64;
        let arrays: [ArrayRef; 2] = [Arc::new(row_ids), Arc::new(codes)];
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
                    return Err(Error::internal("an index column with buffers of its own"));
                }
                columns.push(column.encoding);
            }
            if !apart.take_buffers().is_empty() {
                return Err(Error::internal("an index column with values out of line"));
            }
        }
        Ok(EncodedRows { num_rows, pages, columns })
    }
}
