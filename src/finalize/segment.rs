//! From artifacts to the files of one index segment, through Lance's own index builder.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrow_array::RecordBatch;
use lance::Dataset;
use lance::index::vector::builder::IvfIndexBuilder;
use lance_file::version::ConcreteFileVersion;
use lance_index::progress::IndexBuildProgress;
use lance_index::vector::hnsw::HNSW;
use lance_index::vector::hnsw::builder::HnswBuildParams;
use lance_index::vector::ivf::storage::IvfModel;
use lance_index::vector::pq::ProductQuantizer;
use lance_index::vector::v3::subindex::IvfSubIndex;
use lance_linalg::distance::DistanceType;

use super::checks::{agree_on_fragments, agree_on_model, agree_on_rows, model_fits_column};
use super::coverage::Coverage;
use super::details::index_details;
use super::ivf_pq::SegmentFiles;
use super::leftovers::{mark, remove_leftovers};
use super::shuffle_reader::{ArtifactShuffler, PartitionArtifactShuffleReader};
use crate::artifact::layout::bucket_schema;
use crate::artifact::{Artifact, StorageOptions};
use crate::encode::VectorColumn;
use crate::error::{Error, Result};
use crate::model::{IvfPqModel, Metric, Training, fixed_size_list};
use crate::threads::spawn;

/// The index types that one artifact can become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexType {
    IvfPq,
    /// With an HNSW graph over each partition's codes: edges per node, and candidates kept while building.
    IvfHnswPq {
        m: usize,
        ef_construction: usize,
    },
}

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

/// Check everything, then build. A failure leaves no files behind.
pub async fn build_segment(request: SegmentRequest, progress: Arc<dyn IndexBuildProgress>) -> Result<Segment> {
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
    for artifact in &request.artifacts {
        artifact.check_files().await?;
    }
    let coverage = Arc::new(Coverage::try_new(&request.dataset, &fragment_ids).await?);
    agree_on_rows(&request.artifacts, &coverage)?;
    let reader = PartitionArtifactShuffleReader::try_new(request.artifacts.clone(), model.code_width(), coverage.clone())?;
    let num_rows = reader.num_rows();
    remove_leftovers(&request.dataset).await;
    let result = async {
        let store = request.dataset.object_store(None).await?;
        let folder = request.dataset.indices_dir().join(request.uuid.as_str());
        mark(&store, &folder).await?;
        let files = build_files(&request, &column, &model, reader, progress).await?;
        coverage.check_missing(&column, model.metric(), &request.artifacts).await?;
        if request.sync && store.has_direct_local_paths() {
            sync_files(lance_io::local::to_local_path(&folder).into(), &files).await?;
        }
        Ok::<_, Error>(files)
    };
    let files = match result.await {
        Ok(files) => files,
        Err(error) => {
            if let Err(left) = discard_segment(&request.dataset, &request.uuid).await {
                return Err(error.context(format!("(and the unfinished segment {} could not be removed: {left})", request.uuid)));
            }
            return Err(error);
        }
    };
    let training = request.training.or_else(|| request.artifacts.iter().find_map(|a| a.manifest().training));
    let details = index_details(&model, training, request.index_type, request.hints)?;
    Ok(Segment {
        uuid: request.uuid,
        metric: model.metric(),
        field_id: column.field_id,
        dataset_version: request.dataset.version().version,
        fragment_ids,
        index_version: match request.index_type {
            IndexType::IvfPq => lance_index::IndexType::IvfPq.version(),
            IndexType::IvfHnswPq { .. } => lance_index::IndexType::IvfHnswPq.version(),
        },
        details_type_url: details.type_url,
        details: details.value,
        files,
        num_rows,
        bytes_read: request.artifacts.iter().map(|a| a.files().bytes_read()).sum(),
    })
}

/// Delete the files of a segment that was not committed.
pub async fn discard_segment(dataset: &Dataset, uuid: &str) -> Result<()> {
    let store = dataset.object_store(None).await?;
    match store.remove_dir_all(dataset.indices_dir().join(uuid)).await {
        Ok(()) => Ok(()),
        Err(lance_core::Error::NotFound { .. }) => Ok(()),
        Err(e) => Err(Error::from(e).context(format!("removing the unfinished index segment {uuid}"))),
    }
}

async fn build_files(
    request: &SegmentRequest,
    column: &VectorColumn,
    model: &IvfPqModel,
    reader: PartitionArtifactShuffleReader,
    progress: Arc<dyn IndexBuildProgress>,
) -> Result<Vec<(String, u64)>> {
    let (num_rows, rows_read) = (reader.num_rows(), reader.rows_read());
    let files = match request.index_type {
        IndexType::IvfPq => {
            let store = request.dataset.object_store(None).await?;
            let folder = request.dataset.indices_dir().join(request.uuid.as_str());
            // As Lance does: indexes of datasets in the first format have files of the second.
            let version = match request.dataset.manifest().data_storage_format.lance_file_format() {
                ConcreteFileVersion::V1 => ConcreteFileVersion::V2_0,
                version => version,
            };
            SegmentFiles { store: &store, folder, version, model }.write(reader, progress.as_ref()).await?
        }
        IndexType::IvfHnswPq { m, ef_construction } => {
            let params = HnswBuildParams::default().num_edges(m).ef_construction(ef_construction);
            build::<HNSW>(request, column, model, reader, params, progress).await?
        }
    };
    if rows_read.load(Ordering::Relaxed) != num_rows {
        return Err(Error::internal(format!("the index builder read {} rows of {num_rows}", rows_read.load(Ordering::Relaxed))));
    }
    // The builder checks nothing: count the rows that reached the file.
    let stored = stored_rows(request).await?;
    if stored != num_rows {
        return Err(Error::internal(format!("the index segment holds {stored} rows, the artifacts {num_rows}")));
    }
    Ok(files)
}

async fn build<S: IvfSubIndex + 'static>(
    request: &SegmentRequest,
    column: &VectorColumn,
    model: &IvfPqModel,
    reader: PartitionArtifactShuffleReader,
    params: S::BuildParams,
    progress: Arc<dyn IndexBuildProgress>,
) -> Result<Vec<(String, u64)>> {
    let quantizer =
        ProductQuantizer::new(model.num_sub_vectors(), model.num_bits(), model.dimension(), model.codebook().clone(), DistanceType::L2);
    let mut builder = IvfIndexBuilder::<S, ProductQuantizer>::new(
        request.dataset.clone(),
        column.path.clone(),
        request.dataset.indices_dir().join(request.uuid.as_str()),
        model.metric().distance_type(),
        Box::new(ArtifactShuffler::new(reader)),
        None,
        None,
        params,
        None,
    )?;
    // Lance makes a graph over the centroids of a large model before it calls the shuffler, and never uses it here: let it
    // see one centroid until the reader is in place. A stream without any batch would give an empty index: one of no rows.
    let stand_in = fixed_size_list(model.centroids().values().slice(0, model.dimension()), model.dimension())?;
    builder.with_ivf(IvfModel::new(stand_in, None)).with_quantizer(quantizer).with_progress(progress);
    let empty = RecordBatch::new_empty(bucket_schema(model.code_width()));
    builder.shuffle_data(Some(futures::stream::iter([Ok(empty)]))).await?;
    builder.with_ivf(IvfModel::new(model.centroids().clone(), None));
    let summary = Box::pin(builder.build()).await?;
    Ok(summary.files.into_iter().map(|file| (file.path, file.size_bytes)).collect())
}

async fn stored_rows(request: &SegmentRequest) -> Result<u64> {
    use lance_encoding::decoder::DecoderPlugins;
    use lance_file::reader::{FileReader, FileReaderOptions};
    use lance_io::scheduler::{ScanScheduler, SchedulerConfig};

    let store = request.dataset.object_store(None).await?;
    let path = request.dataset.indices_dir().join(request.uuid.as_str()).join(lance_index::INDEX_AUXILIARY_FILE_NAME);
    let scheduler = ScanScheduler::new(store.clone(), SchedulerConfig::max_bandwidth(&store));
    let file = scheduler.open_file(&path, &lance_io::utils::CachedFileSize::unknown()).await?;
    let cache = lance_core::cache::LanceCache::no_cache();
    let reader = FileReader::try_open(file, None, Arc::<DecoderPlugins>::default(), &cache, FileReaderOptions::default()).await?;
    Ok(reader.num_rows())
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

/// Open artifacts for a request.
pub async fn open_artifacts(uris: &[String], storage_options: Option<&StorageOptions>) -> Result<Vec<Arc<Artifact>>> {
    let mut artifacts: Vec<Arc<Artifact>> = Vec::with_capacity(uris.len());
    for uri in uris {
        let artifact = Artifact::open(uri, storage_options).await?;
        if artifacts.iter().any(|other| other.uri() == artifact.uri()) {
            return Err(Error::invalid(format!("artifacts: {} is given twice", artifact.uri())));
        }
        artifacts.push(Arc::new(artifact));
    }
    Ok(artifacts)
}
