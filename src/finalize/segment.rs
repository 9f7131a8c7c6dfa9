//! From artifacts to one index segment: everything that must agree, then its files.

use std::collections::HashMap;
use std::sync::Arc;

use super::agree::{agree_on_fragments, agree_on_model, agree_on_rows, model_fits_column};
use super::build::{window_bytes, write_files};
use super::coverage::Coverage;
use super::partitions::{Partitions, RowSource};
use super::target::SegmentTarget;
use crate::artifact::{Artifact, CONCURRENT_ARTIFACTS};
use crate::budget::{Budget, default_limit};
use crate::error::{Error, Result};
use crate::lance::dataset::{Dataset, VectorColumn};
use crate::lance::segment::{IndexType, index_details};
use crate::model::{IvfPqModel, Metric, Training};
use crate::progress::Progress;
use futures::{FutureExt, StreamExt, TryStreamExt};

/// What to make of which artifacts.
pub struct SegmentRequest {
    /// Opened at the version the rows were encoded from.
    pub dataset: Dataset,
    pub column: String,
    pub artifacts: Vec<Arc<Artifact>>,
    /// Needed where the artifacts hold none; checked otherwise.
    pub model: Option<Arc<IvfPqModel>>,
    pub metric: Option<Metric>,
    pub index_type: IndexType,
    pub fragment_ids: Option<Vec<u32>>,
    /// Names the folder of the segment.
    pub uuid: String,
    /// How the model was trained, where its artifacts do not say it.
    pub training: Option<Training>,
    /// Provenance that goes into the index details.
    pub hints: HashMap<String, String>,
    /// Codes of a partition byte by byte, as searches want them; else row by row, as Lance's merger of segments wants them.
    pub transposed: bool,
    /// Wait until the files are on the local disk. Lance itself leaves that to the system.
    pub sync: bool,
    /// Bytes that all of this may hold; by default [`default_limit`].
    pub memory_limit: Option<u64>,
}

/// A finished segment, not yet committed.
#[derive(Debug, Clone)]
pub struct Segment {
    pub uuid: String,
    pub metric: Metric,
    pub field_id: i32,
    pub dataset_version: u64,
    pub fragment_ids: Vec<u32>,
    pub index_version: i32,
    pub details_type_url: String,
    pub details: Vec<u8>,
    /// Name and bytes of each file.
    pub files: Vec<(String, u64)>,
    pub num_rows: u64,
    /// Read from the artifacts, headers included.
    pub bytes_read: u64,
}

/// What is known of an index before its rows are encoded.
#[derive(Debug, Clone, Copy)]
pub struct IndexShape {
    pub rows: u64,
    pub num_partitions: usize,
    pub code_width: usize,
    /// Of centroids and codebook.
    pub model_bytes: u64,
    /// Stages in which the rows are written.
    pub stages: u64,
}

/// The least `memory_limit` that an index of one artifact needs here, about: for those who would rather know before they train.
pub fn least_memory(shape: IndexShape) -> u64 {
    let partitions = shape.num_partitions as u64;
    let ranges = partitions.saturating_mul(4 * shape.stages.max(1));
    // Blocks of bits are whole ones, and so are the descriptions of 256 files.
    let held = shape.model_bytes + 24 * partitions + ranges + shape.rows / 7 + (256 << 10);
    (held + window_bytes(shape.rows, shape.code_width)).next_multiple_of(1 << 20)
}

/// Check everything, then build. A failure leaves no files behind.
pub async fn build_segment(request: SegmentRequest, progress: Arc<dyn Progress>) -> Result<Segment> {
    let column = VectorColumn::resolve(&request.dataset, &request.column)?;
    if request.artifacts.is_empty() {
        return Err(Error::invalid("artifacts: got none, expected at least one"));
    }
    if let IndexType::IvfHnswPq(graphs) = request.index_type {
        graphs.check()?;
    }
    let model = agree_on_model(&request.artifacts, request.model.as_ref())?;
    model_fits_column(&model, &column, request.metric)?;
    let fragment_ids = agree_on_fragments(&request.dataset, &column, &request.artifacts, request.fragment_ids.as_deref()).await?;
    let checks: Vec<_> = request.artifacts.iter().map(|artifact| artifact.check_files().boxed()).collect();
    futures::stream::iter(checks).buffer_unordered(CONCURRENT_ARTIFACTS).try_collect::<Vec<()>>().await?;
    let coverage = Arc::new(Coverage::try_new(&request.dataset, &fragment_ids).await?);
    agree_on_rows(&request.artifacts, &coverage)?;
    let budget = Budget::new(request.memory_limit.unwrap_or_else(default_limit));
    let held: u64 = request.artifacts.iter().map(|artifact| artifact.held_bytes()).sum();
    let rows: u64 = request.artifacts.iter().map(|artifact| artifact.num_rows()).sum();
    let least = window_bytes(rows, model.code_width());
    let model_bytes = model.num_bytes() as u64;
    let _held =
        budget.hold(held + model_bytes + coverage.held_bytes(), "the model, the ranges of the artifacts and a bit for each row", least)?;
    let sources = request.artifacts.iter().map(|artifact| RowSource::Artifact(artifact.clone(), coverage.clone())).collect();
    let loss = request.artifacts.iter().map(|artifact| artifact.manifest().total_loss).sum();
    let partitions = Arc::new(Partitions::new(sources, model.num_partitions(), model.code_width()).with_loss(loss));
    let num_rows = partitions.num_rows();
    let target = SegmentTarget {
        dataset: &request.dataset,
        column: &column,
        uuid: &request.uuid,
        index_type: request.index_type,
        transposed: request.transposed,
        sync: request.sync,
        memory_limit: request.memory_limit,
    };
    let checks = coverage.check_missing(&column, model.metric(), &request.artifacts);
    let files = write_files(target, &model, partitions, &budget, progress, checks).await?;
    let training = request.training.or_else(|| request.artifacts.iter().find_map(|a| a.manifest().training));
    let (details_type_url, details) = index_details(&model, training, request.index_type, request.transposed, request.hints)?;
    Ok(Segment {
        uuid: request.uuid,
        metric: model.metric(),
        field_id: column.field_id,
        dataset_version: request.dataset.version(),
        fragment_ids,
        index_version: request.index_type.version(),
        details_type_url,
        details,
        files,
        num_rows,
        bytes_read: request.artifacts.iter().map(|a| a.files().bytes_read()).sum(),
    })
}
