//! An IVF_HNSW_PQ segment, by Lance's own builder.

use std::sync::Arc;

use arrow_array::RecordBatch;
use lance::index::vector::builder::IvfIndexBuilder;
use lance_index::vector::hnsw::HNSW;
use lance_index::vector::ivf::storage::IvfModel;
use lance_index::vector::pq::ProductQuantizer;

use super::shuffle_reader::{ArtifactShuffler, PartitionArtifactShuffleReader};
use crate::artifact::format::bucket_schema;
use crate::error::Result;
use crate::finalize::partitions::Partitions;
use crate::finalize::target::SegmentTarget;
use crate::lance::builds::BuildProgress;
use crate::lance::kernels::{distance_type, product_quantizer};
use crate::lance::segment::{Graphs, SegmentFolder};
use crate::model::{IvfPqModel, fixed_size_list};
use crate::progress::Progress;

/// Build the files of a segment with graphs; their names and bytes.
pub async fn build_hnsw(
    target: &SegmentTarget<'_>,
    folder: &SegmentFolder,
    model: &IvfPqModel,
    partitions: Arc<Partitions>,
    graphs: Graphs,
    progress: Arc<dyn Progress>,
) -> Result<Vec<(String, u64)>> {
    let reader = PartitionArtifactShuffleReader::new(partitions);
    let mut builder = IvfIndexBuilder::<HNSW, ProductQuantizer>::new(
        target.dataset.as_lance().clone(),
        target.column.path.clone(),
        folder.as_lance(),
        distance_type(model.metric()),
        Box::new(ArtifactShuffler::new(reader)),
        None,
        None,
        graphs.params(),
        None,
    )?;
    // Lance makes a graph over the centroids of a large model before it calls the shuffler, and never uses it here: let it
    // see one centroid until the reader is in place. A stream without any batch would give an empty index: one of no rows.
    let stand_in = fixed_size_list(model.centroids().values().slice(0, model.dimension()), model.dimension())?;
    let progress = Arc::new(BuildProgress(progress));
    builder.with_ivf(IvfModel::new(stand_in, None)).with_quantizer(product_quantizer(model)).with_progress(progress);
    let empty = RecordBatch::new_empty(bucket_schema(model.code_width()));
    builder.shuffle_data(Some(futures::stream::iter([Ok(empty)]))).await?;
    builder.with_ivf(IvfModel::new(model.centroids().clone(), None)).with_transpose(target.transposed);
    let summary = Box::pin(builder.build()).await?;
    Ok(summary.files.into_iter().map(|file| (file.path, file.size_bytes)).collect())
}
