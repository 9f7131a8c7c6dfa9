//! `PartitionArtifactBuilder`: encoded batches in, a partition artifact out, in bounded memory and one pass.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use arrow_array::RecordBatch;
use tokio::runtime::Handle;

use super::batch::EncodedColumns;
use super::flush::{Buckets, locked};
use super::layout::{CLAIM_FILE, FORMAT_VERSION, MANIFEST_FILE, PARTITIONS_DIR, is_ours, metadata_path};
use super::manifest::{CHECKSUM_KIND, Manifest, ModelSummary, RowCounts, Source, WriterInfo};
use super::memory::{MemoryPlan, Wanted, default_limit, files_left};
use super::metadata;
use super::stage::Stage;
use super::store::{ArtifactStore, StorageOptions};
use crate::error::{Error, Result};
use crate::model::IvfPqModel;
use crate::threads::{Background, block_on};

/// What is encoded: a model, or just the shape that the codes have.
#[derive(Debug, Clone)]
pub enum Encoding {
    Model(Arc<IvfPqModel>),
    Shape { num_partitions: usize, pq_code_width: usize },
}

impl From<IvfPqModel> for Encoding {
    fn from(model: IvfPqModel) -> Self {
        Self::Model(Arc::new(model))
    }
}

/// Options of a [`PartitionArtifactBuilder`]; the default is what users get.
#[derive(Debug, Clone)]
pub struct BuilderOptions {
    /// Files of the artifact; `min(num_partitions, 256)`, fewer where an object store's upload buffers would not fit the limit on
    /// memory, or open files the process's limit.
    pub num_buckets: Option<usize>,
    /// Bytes; 1 GiB or a quarter of the machine's memory, whichever is less.
    pub memory_limit: Option<u64>,
    /// Rows that will be appended, about: for the parts of uploads, which there may be 10,000 of in a file, and for what is
    /// reserved at the start. More may come as long as they fit; without it parts are as large as a share of the limit allows.
    pub expected_rows: Option<u64>,
    /// Replace an artifact that is there already. It stays whole until the new one is published.
    pub overwrite: bool,
    pub storage_options: Option<StorageOptions>,
    /// Where the rows come from, for the finalizer's checks.
    pub source: Option<Source>,
    /// Let `finish` wait until the files are on the local disk, so that a crash of the machine cannot lose them. Not needed for
    /// an artifact that does not outlive its build.
    pub sync: bool,
}

impl Default for BuilderOptions {
    fn default() -> Self {
        Self {
            num_buckets: None,
            memory_limit: None,
            expected_rows: None,
            overwrite: false,
            storage_options: None,
            source: None,
            sync: true,
        }
    }
}

/// Streams encoded batches into a partition artifact.
///
/// Every method may be called from any thread. Nothing can be read as an artifact before [`finish`](Self::finish) returns;
/// [`abort`](Self::abort) or a drop before that removes what was written.
pub struct PartitionArtifactBuilder {
    store: ArtifactStore,
    encoding: Encoding,
    options: BuilderOptions,
    num_partitions: usize,
    code_width: usize,
    rows: AtomicU64,
    /// The sum of the rows' distances to their centroids, where the encoder told it.
    total_loss: Mutex<Option<f64>>,
    buckets: Arc<Buckets>,
    inner: Mutex<Inner>,
    target: Target,
    /// A forked child must not touch what its parent writes.
    process: u32,
    runtime: Handle,
}

/// What was at the target when the build began.
struct Target {
    /// Set where plain file names are another writer's, or those of an artifact being replaced.
    tag: Option<String>,
    /// Files of an earlier artifact or of a killed build, deleted once the new one is published.
    stale: Vec<String>,
    replaces: bool,
    /// Local folders that were there before stay.
    had_root: bool,
}

struct Inner {
    state: State,
    stage: Stage,
    /// The stage being written; it comes back empty.
    flushing: Option<Background<Stage>>,
    /// A failed flush; every later call answers with it.
    failed: Option<Error>,
    closed_files: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Finished,
    Aborted,
}

impl PartitionArtifactBuilder {
    /// Check the options, then the target, where only a claim is put. Call within a Tokio runtime, which the builder uses for IO.
    pub async fn try_new(uri: &str, encoding: impl Into<Encoding>, options: BuilderOptions) -> Result<Self> {
        let encoding = encoding.into();
        let (num_partitions, code_width) = match &encoding {
            Encoding::Model(model) => (model.num_partitions(), model.code_width()),
            Encoding::Shape { num_partitions, pq_code_width } => (*num_partitions, *pq_code_width),
        };
        if num_partitions == 0 || u32::try_from(num_partitions).is_err() {
            return Err(Error::invalid(format!("num_partitions: got {num_partitions}, expected 1 to {}", u32::MAX)));
        }
        if code_width == 0 || code_width > i32::MAX as usize {
            return Err(Error::invalid(format!("pq_code_width: got {code_width}, expected the bytes of one code, at least 1")));
        }
        let store = ArtifactStore::open(uri, options.storage_options.as_ref()).await?;
        let limit = options.memory_limit.unwrap_or_else(default_limit);
        let threads = std::thread::available_parallelism().map_or(1, usize::from).clamp(1, 16);
        let plan = MemoryPlan::choose(&Wanted {
            limit,
            code_width,
            num_partitions,
            num_buckets: options.num_buckets,
            expected_rows: options.expected_rows,
            uploads: store.local_root().is_none(),
            threads,
            files_left: files_left(),
        })?;
        let stage = Stage::try_with_capacity(plan.first_rows, code_width)
            .map_err(|e| Error::invalid(format!("memory_limit: {limit} bytes cannot be had on this machine ({e}); lower it")))?;
        let target = prepare_target(&store, options.overwrite).await?;
        let runtime = Handle::current();
        let tag = target.tag.as_deref();
        let buckets = Buckets::new(store.clone(), runtime.clone(), plan, code_width, num_partitions, options.sync, tag);
        Ok(Self {
            store,
            encoding,
            options,
            num_partitions,
            code_width,
            rows: AtomicU64::new(0),
            total_loss: Mutex::new(None),
            buckets: Arc::new(buckets),
            inner: Mutex::new(Inner { state: State::Open, stage, flushing: None, failed: None, closed_files: Vec::new() }),
            target,
            process: std::process::id(),
            runtime,
        })
    }

    pub fn store(&self) -> &ArtifactStore {
        &self.store
    }

    pub fn num_partitions(&self) -> usize {
        self.num_partitions
    }

    pub fn pq_code_width(&self) -> usize {
        self.code_width
    }

    pub fn num_buckets(&self) -> usize {
        self.buckets.len()
    }

    pub fn memory_plan(&self) -> MemoryPlan {
        self.buckets.plan
    }

    /// The sum of the distances of all rows to their centroids, for the statistics of an index.
    pub fn set_total_loss(&self, total_loss: f64) {
        *locked(&self.total_loss) = Some(total_loss);
    }

    /// Rows accepted so far.
    pub fn num_rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Take the rows of an encoded batch. It is checked first: a refused batch changes nothing and the builder stays usable.
    ///
    /// Blocks while both stages are full; from asynchronous code call it on a blocking thread.
    pub fn append_batch(&self, batch: &RecordBatch) -> Result<()> {
        let columns = EncodedColumns::try_new(batch, self.num_partitions, self.code_width)?;
        self.append_rows(columns.row_ids(), columns.part_ids(), columns.codes())
    }

    fn append_rows(&self, row_ids: &[u64], part_ids: &[u32], codes: &[u8]) -> Result<()> {
        let mut inner = self.open("append_batch")?;
        let mut at = 0;
        while at < row_ids.len() {
            if inner.stage.len() == self.buckets.plan.stage_rows {
                self.flush(&mut inner, false).inspect_err(|e| inner.failed = Some(e.clone()))?;
            }
            let take = (self.buckets.plan.stage_rows - inner.stage.len()).min(row_ids.len() - at);
            let to = at + take;
            self.reserve(&mut inner.stage, take).inspect_err(|e| inner.failed = Some(e.clone()))?;
            inner.stage.extend(&row_ids[at..to], &part_ids[at..to], &codes[at * self.code_width..to * self.code_width]);
            at = to;
        }
        self.rows.fetch_add(row_ids.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Room for rows that nobody expected.
    fn reserve(&self, stage: &mut Stage, rows: usize) -> Result<()> {
        stage
            .try_reserve(rows, self.buckets.plan.stage_rows, self.code_width)
            .map_err(|e| Error::Storage(format!("append_batch: no memory for {rows} more rows: {e}; lower memory_limit")))
    }

    fn open(&self, call: &str) -> Result<MutexGuard<'_, Inner>> {
        let inner = locked(&self.inner);
        if self.buckets.is_cancelled() || inner.state == State::Aborted {
            return Err(Error::invalid(format!("{call}: the builder of {} is aborted; make a new one", self.store.uri())));
        }
        if inner.state == State::Finished {
            return Err(Error::invalid(format!("{call}: the artifact {} is finished; it cannot change any more", self.store.uri())));
        }
        match &inner.failed {
            Some(error) => Err(error.clone().context(format!("{call}: an earlier write failed; abort and build again"))),
            None => Ok(inner),
        }
    }

    /// Wait for the stage being written, then start on the one that is full, or on the `last` one.
    fn flush(&self, inner: &mut Inner, last: bool) -> Result<()> {
        let written = self.wait(inner)?;
        if inner.stage.is_empty() {
            return Ok(());
        }
        // Only a build that needs a second stage pays for it.
        let next = match written {
            Some(stage) => stage,
            None if last => Stage::default(),
            None => Stage::try_with_capacity(self.buckets.plan.stage_rows, self.code_width)
                .map_err(|e| Error::Storage(format!("no memory for a second stage: {e}; lower memory_limit")))?,
        };
        let stage = std::mem::replace(&mut inner.stage, next);
        let buckets = self.buckets.clone();
        inner.flushing = Some(Background::start("lance-artifact-flush", move || buckets.flush(stage)));
        Ok(())
    }

    /// Wait for the stage being written, if there is one; it comes back empty.
    fn wait(&self, inner: &mut Inner) -> Result<Option<Stage>> {
        let Some(thread) = inner.flushing.take() else {
            return Ok(None);
        };
        thread.wait().map(Some).inspect_err(|e| inner.failed = Some(e.clone()))
    }

    /// Write what is staged, close and sync the files, then publish the manifest: from then on, and not before, the artifact
    /// exists. `counts` tells what became of the rows that were seen; by default all of them were written.
    pub fn finish(&self, counts: Option<RowCounts>) -> Result<Manifest> {
        let mut inner = self.open("finish")?;
        let counts = match counts {
            Some(counts) if counts.written != self.num_rows() => {
                return Err(Error::invalid(format!(
                    "finish: {} rows are said to be written, {} were appended",
                    counts.written,
                    self.num_rows()
                )));
            }
            Some(counts) => counts,
            None => RowCounts { seen: self.num_rows(), written: self.num_rows(), dropped: BTreeMap::new() },
        };
        let result = self.finish_open(&mut inner, counts);
        match &result {
            Ok(_) => inner.state = State::Finished,
            Err(error) => inner.failed = Some(error.clone()),
        }
        result
    }

    fn finish_open(&self, inner: &mut Inner, counts: RowCounts) -> Result<Manifest> {
        self.flush(inner, true)?;
        self.wait(inner)?;
        inner.stage = Stage::default();
        if !self.target.replaces && self.block_on(self.store.exists(MANIFEST_FILE))? {
            return Err(already_exists(&self.store, "appeared while this one was being written"));
        }
        let mut files = self.buckets.close(&mut inner.closed_files)?;
        let metadata_file = match &self.encoding {
            Encoding::Model(model) => {
                let name = metadata_path(self.target.tag.as_deref());
                inner.closed_files.push(name.clone());
                files.insert(name.clone(), self.block_on(metadata::write(&self.store, &name, model, self.options.sync))?);
                Some(name)
            }
            Encoding::Shape { .. } => None,
        };
        if self.options.sync {
            self.store.sync_dirs(&["", PARTITIONS_DIR])?;
        }
        let manifest = Manifest {
            version: FORMAT_VERSION,
            num_partitions: self.num_partitions,
            num_buckets: Some(self.num_buckets()),
            metadata_file,
            total_loss: *locked(&self.total_loss),
            pq_code_width: Some(self.code_width),
            checksum_kind: Some(CHECKSUM_KIND.to_string()),
            model: match &self.encoding {
                Encoding::Model(model) => Some(ModelSummary::from(model.as_ref())),
                Encoding::Shape { .. } => None,
            },
            training: match &self.encoding {
                Encoding::Model(model) => model.training(),
                Encoding::Shape { .. } => None,
            },
            rows: Some(counts),
            source: self.options.source.clone(),
            writer: Some(WriterInfo { name: env!("CARGO_PKG_NAME").into(), version: env!("CARGO_PKG_VERSION").into() }),
            files: Some(files),
            partitions: self.buckets.partitions(self.num_partitions),
        };
        let json = serde_json::to_vec(&manifest).map_err(|e| Error::internal(format!("manifest: {e}")))?;
        self.publish(inner, json)?;
        // The new artifact stands; what is left of an old one is only waste, so a failure to delete it is no error.
        let stale: Vec<String> = self.target.stale.iter().filter(|f| !inner.closed_files.contains(f)).cloned().collect();
        let _ = self.block_on(self.store.delete(&stale));
        self.release_claim();
        Ok(manifest)
    }

    /// Publish the manifest. An answer may be lost on its way: what is there afterwards decides.
    fn publish(&self, inner: &mut Inner, json: Vec<u8>) -> Result<()> {
        if self.buckets.is_cancelled() {
            return Err(Error::Interrupted("the builder was aborted".into()));
        }
        let answer = self.block_on(self.store.publish(MANIFEST_FILE, json.clone(), self.target.replaces, self.options.sync));
        if matches!(answer, Ok(true)) {
            return Ok(());
        }
        match (self.block_on(self.store.read(MANIFEST_FILE)), answer) {
            (Ok(Some(there)), _) if there == json => Ok(()),
            (Ok(_), Err(error)) => Err(error),
            (Ok(_), Ok(_)) => Err(already_exists(&self.store, "was published by another writer meanwhile")),
            (Err(error), _) => {
                // It may be an artifact: its files must stay.
                inner.closed_files.clear();
                Err(error.context(format!("it is not known whether the artifact {} was published; its files are kept", self.store.uri())))
            }
        }
    }

    fn release_claim(&self) {
        if self.target.tag.is_none() {
            let _ = self.block_on(self.store.delete(&[CLAIM_FILE.to_string()]));
        }
    }

    /// Make work in progress end soon with an error, from any thread; the artifact is published anyhow if that has begun.
    pub fn cancel(&self) {
        self.buckets.cancel();
    }

    /// Stop and remove what was written. After `finish` it does nothing.
    pub fn abort(&self) -> Result<()> {
        if self.process != std::process::id() {
            // A forked child: the files and the threads that write them are the parent's.
            self.buckets.forget();
            return Ok(());
        }
        self.cancel();
        let mut inner = locked(&self.inner);
        if inner.state != State::Open {
            return Ok(());
        }
        inner.state = State::Aborted;
        let _ = self.wait(&mut inner);
        inner.stage = Stage::default();
        self.buckets.discard();
        let files = std::mem::take(&mut inner.closed_files);
        let deleted = self.block_on(self.store.delete(&files));
        self.release_claim();
        self.store.remove_empty_dirs(if self.target.had_root { &[PARTITIONS_DIR] } else { &[PARTITIONS_DIR, ""] });
        deleted
    }

    /// Run IO to its end from any thread, a runtime's own included.
    fn block_on<T: Send>(&self, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
        block_on(&self.runtime, work)
    }
}

impl Drop for PartitionArtifactBuilder {
    fn drop(&mut self) {
        let _ = self.abort();
    }
}

fn already_exists(store: &ArtifactStore, how: &str) -> Error {
    Error::ArtifactExists(format!(
        "{} already holds an artifact, which {how}; choose another artifact_uri or pass overwrite=True",
        store.uri()
    ))
}

/// Refuse a target that holds an artifact, or arrange to replace it. Nothing there is changed yet.
async fn prepare_target(store: &ArtifactStore, overwrite: bool) -> Result<Target> {
    let had_root = store.local_root().is_some_and(std::path::Path::exists);
    let replaces = store.exists(MANIFEST_FILE).await?;
    if replaces && !overwrite {
        return Err(already_exists(store, "would be lost"));
    }
    let mut stale = if had_root || store.local_root().is_none() { store.list().await? } else { Vec::new() };
    stale.retain(|file| is_ours(file));
    // Plain names are for the writer that holds the claim: two writers of one target cannot spoil each other's files.
    let claimed = !replaces && store.publish(CLAIM_FILE, Vec::new(), false, false).await?;
    let tag = (!claimed).then(|| uuid::Uuid::new_v4().simple().to_string()[..8].to_string());
    Ok(Target { tag, stale, replaces, had_root })
}
