//! `PartitionArtifactBuilder`: encoded batches in, a partition artifact out, in bounded memory and one pass.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use arrow_array::RecordBatch;
use bytes::Bytes;
use tokio::runtime::Handle;

use super::batch::EncodedColumns;
use super::buckets::Buckets;
use super::options::{BuilderOptions, Encoding};
use super::partitions_file::write_partitions;
use super::plan::{Kept, MemoryPlan, Wanted, default_limit};
use super::stage::Stage;
use super::target::{Abandoned, Target};
use crate::artifact::format::{
    Assignment, CHECKSUM_KIND, LISTED, Manifest, ModelSummary, PartitionTable, RowCounts, TABLED, WriterInfo, metadata_path,
    partitions_path, write_model,
};
use crate::budget::settle;
use crate::error::{Error, Result};
use crate::io::files_left;
use crate::lance::LanceStore;
use crate::sync::{Background, block_on, locked};

/// Encoded ranges that a manifest lists: some 200,000, in some 10 MB of JSON.
const MOST_LISTED_BYTES: usize = 600 << 10;

/// Streams encoded batches into a partition artifact.
///
/// Every method may be called from any thread. Nothing can be read as an artifact before [`finish`](Self::finish) returns;
/// [`abort`](Self::abort) or a drop before that removes what was written.
pub struct PartitionArtifactBuilder {
    store: LanceStore,
    encoding: Encoding,
    options: BuilderOptions,
    num_partitions: usize,
    code_width: usize,
    rows: AtomicU64,
    /// The sum of the rows' distances to their centroids, where the encoder told it.
    total_loss: Mutex<Option<f64>>,
    assignment: Mutex<Option<Assignment>>,
    buckets: Arc<Buckets>,
    inner: Mutex<Inner>,
    target: Target,
    /// A forked child must not touch what its parent writes.
    process: u32,
    /// Somebody else aborts it before it is dropped.
    is_left: AtomicBool,
    runtime: Handle,
}

struct Inner {
    state: State,
    stage: Stage,
    /// Rows at which it is full.
    stage_rows: usize,
    /// Rows of the stages before.
    staged_rows: u64,
    /// The stage being written; it comes back empty.
    flushing: Option<Background<Stage>>,
    /// A failed write; every later call answers with it.
    failed: Option<Error>,
    closed_files: Vec<String>,
}

enum State {
    Open,
    /// All files are complete; what is left is to publish the manifest.
    Closed(Arc<Closed>),
    Finished,
    /// Stopped, but not all that was written could be removed.
    Aborting,
    Aborted,
}

/// What there is to publish.
struct Closed {
    manifest: Manifest,
    json: Bytes,
}

impl PartitionArtifactBuilder {
    /// Check the options, then the target, where only a claim is put. Call within a Tokio runtime, which the builder uses for IO.
    pub async fn try_new(uri: &str, encoding: impl Into<Encoding>, options: BuilderOptions) -> Result<Self> {
        let encoding = encoding.into();
        encoding.check()?;
        if let Some(version) = options.format_version
            && ![LISTED, TABLED].contains(&version)
        {
            return Err(Error::invalid(format!("format_version: got {version}, expected {LISTED} or {TABLED}")));
        }
        let store = LanceStore::open(uri, options.storage_options.as_ref()).await?;
        Self::at(store, encoding, options).await
    }

    /// The same at a place that is open.
    pub(super) async fn at(store: LanceStore, encoding: Encoding, options: BuilderOptions) -> Result<Self> {
        let (num_partitions, code_width) = encoding.shape();
        let limit = options.memory_limit.unwrap_or_else(default_limit);
        let threads = std::thread::available_parallelism().map_or(1, usize::from).clamp(1, 16);
        let plan = MemoryPlan::choose(&Wanted {
            limit,
            held: options.held,
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
        let target = Target::claim(&store, options.overwrite, options.sync).await?;
        let runtime = Handle::current();
        let (store, tag) = (target.store().clone(), target.file_tag());
        let buckets = Buckets::new(store.clone(), runtime.clone(), plan, code_width, num_partitions, options.sync, tag);
        Ok(Self {
            store,
            encoding,
            options,
            num_partitions,
            code_width,
            rows: AtomicU64::new(0),
            total_loss: Mutex::new(None),
            assignment: Mutex::new(None),
            buckets: Arc::new(buckets),
            inner: Mutex::new(Inner {
                state: State::Open,
                stage,
                stage_rows: plan.stage_after(0, Kept::default())?,
                staged_rows: 0,
                flushing: None,
                failed: None,
                closed_files: Vec::new(),
            }),
            target,
            process: std::process::id(),
            is_left: AtomicBool::new(false),
            runtime,
        })
    }

    pub fn store(&self) -> &LanceStore {
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

    /// How rows were given their partitions.
    pub fn set_assignment(&self, assignment: Assignment) {
        *locked(&self.assignment) = Some(assignment);
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
            if inner.stage.len() >= inner.stage_rows {
                self.flush(&mut inner, false).inspect_err(|e| inner.failed = Some(e.clone()))?;
            }
            let take = (inner.stage_rows - inner.stage.len()).min(row_ids.len() - at);
            let to = at + take;
            self.reserve(&mut inner, take).inspect_err(|e| inner.failed = Some(e.clone()))?;
            inner.stage.extend(&row_ids[at..to], &part_ids[at..to], &codes[at * self.code_width..to * self.code_width]);
            at = to;
        }
        self.rows.fetch_add(row_ids.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Room for rows that nobody expected.
    fn reserve(&self, inner: &mut Inner, rows: usize) -> Result<()> {
        inner
            .stage
            .try_reserve(rows, inner.stage_rows, self.code_width)
            .map_err(|e| Error::Storage(format!("append_batch: no memory for {rows} more rows: {e}; lower memory_limit")))
    }

    fn open(&self, call: &str) -> Result<MutexGuard<'_, Inner>> {
        let inner = self.unfinished(call)?;
        if matches!(inner.state, State::Closed(_)) {
            return Err(Error::invalid(format!(
                "{call}: the files of {} are complete and could not be published; call finish() again to publish them, or abort()",
                self.store.uri()
            )));
        }
        Ok(inner)
    }

    /// The builder, if there is anything left to do with it.
    fn unfinished(&self, call: &str) -> Result<MutexGuard<'_, Inner>> {
        let inner = locked(&self.inner);
        if matches!(inner.state, State::Finished) {
            return Err(Error::invalid(format!("{call}: the artifact {} is finished; it cannot change any more", self.store.uri())));
        }
        if self.buckets.is_cancelled() || matches!(inner.state, State::Aborting | State::Aborted) {
            return Err(Error::invalid(format!("{call}: the builder of {} is aborted; make a new one", self.store.uri())));
        }
        match &inner.failed {
            Some(error) => Err(error.clone().context(format!("{call}: an earlier write failed; abort and build again"))),
            None => Ok(inner),
        }
    }

    /// Whether the artifact is published.
    pub fn is_finished(&self) -> bool {
        matches!(locked(&self.inner).state, State::Finished)
    }

    /// Whether all files are complete and the manifest could not be published: [`finish`](Self::finish) may be called again.
    pub fn can_publish_again(&self) -> bool {
        let inner = locked(&self.inner);
        matches!(inner.state, State::Closed(_)) && inner.failed.is_none() && !self.buckets.is_cancelled()
    }

    /// Wait for the stage being written, then start on the one that is full, or on the `last` one.
    fn flush(&self, inner: &mut Inner, last: bool) -> Result<()> {
        let written = self.wait(inner)?;
        if inner.stage.is_empty() {
            return Ok(());
        }
        inner.staged_rows += inner.stage.len() as u64;
        if !last {
            inner.stage_rows = self.buckets.plan.stage_after(inner.staged_rows, self.buckets.kept())?;
        }
        // Only a build that needs a second stage pays for it.
        let next = match written {
            Some(stage) if stage.capacity() >= inner.stage_rows || last => stage,
            None if last => Stage::default(),
            smaller => {
                drop(smaller);
                settle(self.buckets.plan.limit);
                Stage::try_with_capacity(inner.stage_rows, self.code_width)
                    .map_err(|e| Error::Storage(format!("no memory for a second stage: {e}; lower memory_limit")))?
            }
        };
        let stage = std::mem::replace(&mut inner.stage, next);
        let buckets = self.buckets.clone();
        inner.flushing = Some(Background::start(move || buckets.flush(stage)));
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
    ///
    /// Where only publishing failed with [`Error::Storage`], the files stay, and this may be called again: it publishes them.
    pub fn finish(&self, counts: Option<RowCounts>) -> Result<Manifest> {
        let mut inner = self.unfinished("finish")?;
        if let Some(counts) = &counts
            && counts.written != self.num_rows()
        {
            return Err(Error::invalid(format!(
                "finish: {} rows are said to be written, {} were appended",
                counts.written,
                self.num_rows()
            )));
        }
        let closed = match &inner.state {
            State::Closed(closed) => {
                if counts.is_some_and(|counts| Some(&counts) != closed.manifest.rows.as_ref()) {
                    return Err(Error::invalid(
                        "finish: the rows were counted by the first call and cannot change any more; pass the same, or none",
                    ));
                }
                closed.clone()
            }
            _ => {
                let wanted = self.block_on(self.target.check(|| self.buckets.is_cancelled()));
                // A store that cannot be reached now is no reason to throw anything away.
                wanted.inspect_err(|e| inner.failed = (!matches!(e, Error::Storage(_))).then(|| e.clone()))?;
                let counts =
                    counts.unwrap_or_else(|| RowCounts { seen: self.num_rows(), written: self.num_rows(), dropped: BTreeMap::new() });
                let closed = self.close(&mut inner, counts).inspect_err(|e| inner.failed = Some(e.clone()))?;
                let closed = Arc::new(closed);
                inner.state = State::Closed(closed.clone());
                closed
            }
        };
        let nothing = BTreeMap::new();
        let files = closed.manifest.files.as_ref().unwrap_or(&nothing);
        let published = self.block_on(self.target.publish(&closed.json, files, self.options.sync, || self.buckets.is_cancelled()));
        if let Err(error) = published {
            if !matches!(error, Error::Storage(_)) {
                inner.failed = Some(error.clone());
            }
            return Err(error);
        }
        inner.state = State::Finished;
        self.clean_up(&closed);
        Ok(closed.manifest.clone())
    }

    /// Write what is staged and close all files.
    fn close(&self, inner: &mut Inner, counts: RowCounts) -> Result<Closed> {
        self.flush(inner, true)?;
        self.wait(inner)?;
        inner.stage = Stage::default();
        let mut files = self.buckets.close(&mut inner.closed_files)?;
        let metadata_file = match &self.encoding {
            Encoding::Model(model) => {
                let name = metadata_path(self.target.file_tag());
                inner.closed_files.push(name.clone());
                files.insert(name.clone(), self.block_on(write_model(&self.store, &name, model, self.options.sync))?);
                Some(name)
            }
            Encoding::Shape { .. } => None,
        };
        let written = self.buckets.take_partitions();
        let version = self.options.format_version.unwrap_or(if written.num_bytes() > MOST_LISTED_BYTES { TABLED } else { LISTED });
        let (mut partitions, mut partitions_file, mut bucket_files) = (PartitionTable::default(), None, Vec::new());
        if version == LISTED {
            partitions = written.table()?;
        } else {
            let name = partitions_path(self.target.file_tag());
            inner.closed_files.push(name.clone());
            files.insert(name.clone(), self.block_on(write_partitions(&self.store, &name, &written, self.options.sync))?);
            (partitions_file, bucket_files) = (Some(name), written.paths.clone());
        }
        drop(written);
        if self.options.sync {
            self.target.sync()?;
        }
        let manifest = Manifest {
            version,
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
            assignment: locked(&self.assignment).clone(),
            rows: Some(counts),
            source: self.options.source.clone(),
            writer: Some(WriterInfo { name: env!("CARGO_PKG_NAME").into(), version: env!("CARGO_PKG_VERSION").into() }),
            files: Some(files),
            partitions_file,
            bucket_files,
            partitions,
        };
        let json = serde_json::to_vec(&manifest).map_err(|e| Error::internal(format!("manifest: {e}")))?;
        Ok(Closed { manifest, json: json.into() })
    }

    /// The new artifact stands; what is left of others is only waste, so a failure to delete it is no error.
    fn clean_up(&self, closed: &Closed) {
        let names = closed.manifest.names();
        let _ = self.block_on(async {
            self.target.clean_up(&closed.json, &names).await;
            Ok(())
        });
    }

    /// Make work in progress end soon with an error, from any thread; the artifact is published anyhow if that has begun.
    pub fn cancel(&self) {
        self.buckets.cancel();
    }

    /// Stop and remove what was written. After `finish` it does nothing; after an error it may be called again.
    pub fn abort(&self) -> Result<()> {
        if self.process != std::process::id() {
            // A forked child: the files and the threads that write them are the parent's.
            self.buckets.forget();
            return Ok(());
        }
        self.cancel();
        let mut inner = locked(&self.inner);
        let closed = match &inner.state {
            State::Finished | State::Aborted => return Ok(()),
            State::Open | State::Aborting => None,
            State::Closed(closed) => Some(closed.clone()),
        };
        let _ = self.wait(&mut inner);
        inner.stage = Stage::default();
        self.buckets.discard();
        match (self.block_on(self.target.abandon(&inner.closed_files, closed.as_ref().map(|closed| &closed.json))), closed) {
            (Ok(Abandoned::Published), Some(closed)) => {
                inner.state = State::Finished;
                self.clean_up(&closed);
                Ok(())
            }
            // Whether the artifact is there is not known: its files stay, and this may be called again.
            (Ok(Abandoned::Unknown(error)), _) => Err(error),
            (Ok(_), _) => {
                inner.state = State::Aborted;
                Ok(())
            }
            (Err(error), _) => {
                inner.state = State::Aborting;
                Err(error.context("not all that the aborted build wrote could be removed; abort() again to try once more"))
            }
        }
    }

    /// Let a drop do nothing: whoever says so aborts it, where waiting for a store holds nobody up.
    pub fn leave(&self) {
        self.is_left.store(true, Ordering::Relaxed);
    }

    /// Run IO to its end from any thread, a runtime's own included.
    fn block_on<T: Send>(&self, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
        block_on(&self.runtime, work)
    }
}

impl Drop for PartitionArtifactBuilder {
    fn drop(&mut self) {
        if !self.is_left.load(Ordering::Relaxed) {
            let _ = self.abort();
        }
    }
}
