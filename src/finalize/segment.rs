//! From artifacts to the files of one index segment, through Lance's own index builder.

use std::collections::HashMap;
use std::sync::Arc;

use futures::{FutureExt, StreamExt, TryStreamExt};
use tokio::runtime::Handle;

use super::agree::{agree_on_fragments, agree_on_model, agree_on_rows, model_fits_column};
use super::coverage::Coverage;
use super::partitions::Partitions;
use super::seam::build_hnsw;
use super::windows::{least_bytes, write_segment};
use crate::artifact::{Artifact, CONCURRENT_ARTIFACTS};
use crate::budget::{Budget, Reservation, default_limit};
use crate::error::{Error, Result};
use crate::io::{MAX_PARTS, MIN_PART_BYTES, Uploads};
use crate::lance::dataset::{Dataset, VectorColumn};
use crate::lance::segment::{IndexType, SegmentFolder, SegmentWriter, index_details};
use crate::model::{IvfPqModel, Metric, Training};
use crate::progress::Progress;
use crate::sync::spawn;

/// What Lance's builder takes for its windows (`PARTITION_BUILD_BUDGET_BYTES`).
const BUILDER_BYTES: u64 = 512 << 20;

/// Parts of a file that are on their way at once.
const MAX_IN_FLIGHT: u64 = 8;

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
    (held + window_bytes(shape.code_width)).next_multiple_of(1 << 20)
}

/// What windows and the parts of an upload need.
fn window_bytes(code_width: usize) -> u64 {
    least_bytes(code_width) + MIN_PART_BYTES as u64 * 2
}

/// Check everything, then build. A failure leaves no files behind.
pub async fn build_segment(request: SegmentRequest, progress: Arc<dyn Progress>) -> Result<Segment> {
    let column = VectorColumn::resolve(&request.dataset, &request.column)?;
    if request.artifacts.is_empty() {
        return Err(Error::invalid("artifacts: got none, expected at least one"));
    }
    if let IndexType::IvfHnswPq { m, ef_construction } = request.index_type
        && !((4..=1024).contains(&m) && (m..=65_536).contains(&ef_construction))
    {
        return Err(Error::invalid(format!(
            "m and ef_construction: got {m} and {ef_construction}, expected m from 4 to 1024 and ef_construction from m to 65536"
        )));
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
    let least = window_bytes(model.code_width());
    let model_bytes = model.num_bytes() as u64;
    let _held =
        budget.hold(held + model_bytes + coverage.held_bytes(), "the model, the ranges of the artifacts and a bit for each row", least)?;
    let partitions = Arc::new(Partitions::try_new(request.artifacts.clone(), model.code_width(), coverage.clone())?);
    let num_rows = partitions.num_rows();
    SegmentFolder::remove_leftovers(&request.dataset).await;
    let folder = SegmentFolder::of(&request.dataset, &request.uuid).await?;
    let result = async {
        folder.mark().await?;
        let files = build_files(&request, &column, &folder, &model, partitions, &budget, progress).await?;
        coverage.check_missing(&column, model.metric(), &request.artifacts).await?;
        if let Some(folder) = folder.local().filter(|_| request.sync) {
            sync_files(folder, &files).await?;
        }
        Ok::<_, Error>(files)
    };
    let files = match result.await {
        Ok(files) => files,
        Err(error) => {
            if let Err(left) = folder.remove().await {
                return Err(error.context(format!("(and the unfinished segment {} could not be removed: {left})", request.uuid)));
            }
            return Err(error);
        }
    };
    let training = request.training.or_else(|| request.artifacts.iter().find_map(|a| a.manifest().training));
    let (details_type_url, details) = index_details(&model, training, request.index_type, request.hints)?;
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

async fn build_files(
    request: &SegmentRequest,
    column: &VectorColumn,
    folder: &SegmentFolder,
    model: &Arc<IvfPqModel>,
    partitions: Arc<Partitions>,
    budget: &Budget,
    progress: Arc<dyn Progress>,
) -> Result<Vec<(String, u64)>> {
    let files = match request.index_type {
        IndexType::IvfPq => {
            let (uploads, _held) = uploads(folder, &partitions, budget).await?;
            let segment = SegmentWriter::create(&request.dataset, folder.clone(), model.clone(), uploads)?;
            write_segment(segment, partitions.clone(), budget, progress.as_ref()).await?
        }
        IndexType::IvfHnswPq { m, ef_construction } => {
            if let Some(limit) = request.memory_limit {
                check_graphs(limit, budget, &partitions, m)?;
            }
            build_hnsw(&request.dataset, &column.path, folder, model, partitions.clone(), (m, ef_construction), progress).await?
        }
    };
    let (read, num_rows) = (partitions.rows_read(), partitions.num_rows());
    if read != num_rows {
        return Err(Error::internal(format!("the index builder read {read} rows of {num_rows}")));
    }
    // The builder checks nothing: count the rows that reached the file.
    let stored = folder.stored_rows().await?;
    if stored != num_rows {
        return Err(Error::internal(format!("the index segment holds {stored} rows, the artifacts {num_rows}")));
    }
    Ok(files)
}

/// Lance's builder holds its windows, and the graphs that it makes, whatever the limit is: refuse one that it would not keep.
fn check_graphs(limit: u64, budget: &Budget, partitions: &Partitions, m: usize) -> Result<()> {
    let largest = (0..partitions.len()).filter_map(|p| partitions.rows(p)).max().unwrap_or(0);
    // A node has up to twice `m` neighbours, each with its distance, and its codes are read, put together and written.
    let of_row = 3 * partitions.row_bytes() as u64 + 16 * m as u64;
    let needed = (budget.held() + BUILDER_BYTES + largest * of_row).next_multiple_of(1 << 20);
    if needed > limit {
        return Err(Error::invalid(format!(
            "memory_limit: got {limit} bytes, expected at least {needed}: an IVF_HNSW_PQ index is made by Lance's builder, which takes \
             {BUILDER_BYTES} and its largest partition of {largest} rows with its graph; raise it, or make an IVF_PQ index"
        )));
    }
    Ok(())
}

/// How the files of a segment go to an object store, and the bytes that the parts hold.
async fn uploads(folder: &SegmentFolder, partitions: &Partitions, budget: &Budget) -> Result<(Uploads, Option<Reservation>)> {
    if folder.local().is_some() {
        return Ok((Uploads::new(MIN_PART_BYTES, 1, Handle::current()), None));
    }
    // Room for metadata, and for encodings that take more than the rows.
    let expected = partitions.num_rows() * partitions.row_bytes() as u64 / 8 * 10;
    let part_bytes = (expected / MAX_PARTS as u64).max(MIN_PART_BYTES as u64);
    let in_flight = (budget.free() / 4 / part_bytes).clamp(2, MAX_IN_FLIGHT + 1) - 1;
    let held = budget.reserve((in_flight + 1) * part_bytes).await?;
    Ok((Uploads::new(part_bytes as usize, in_flight as usize, Handle::current()), Some(held)))
}

/// Make the files of a segment durable, and the names of them and of the folder above.
async fn sync_files(folder: std::path::PathBuf, files: &[(String, u64)]) -> Result<()> {
    let paths: Vec<_> = files.iter().map(|(name, _)| folder.join(name)).collect();
    spawn(move || {
        for path in paths.iter().chain([&folder]) {
            std::fs::File::open(path)?.sync_all()?;
        }
        for above in folder.ancestors().skip(1).take(2) {
            std::fs::File::open(above)?.sync_all()?;
        }
        Ok(())
    })
    .await
}
