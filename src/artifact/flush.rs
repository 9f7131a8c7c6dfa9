//! The bucket files of one artifact: stages are written into them, all threads at once, until they are closed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::runtime::Handle;

use super::bucket::{BucketWriter, Chunk, FlushJob};
use super::checksum;
use super::manifest::{FileEntry, PartitionEntry};
use super::memory::MemoryPlan;
use super::stage::{BucketOrder, Stage, sort};
use super::store::ArtifactStore;
use crate::error::{Error, Result};

/// Files closed at once. Closing waits for a disk, which commits many files together, or for the last part of an upload.
const CLOSING_THREADS: usize = 64;

pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while the lock was held is caught where it happened and fails the build.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the threads that write share.
pub struct Buckets {
    pub store: ArtifactStore,
    pub runtime: Handle,
    pub plan: MemoryPlan,
    pub code_width: usize,
    /// Make files durable when they are closed.
    pub sync: bool,
    order: BucketOrder,
    files: Vec<Mutex<BucketWriter>>,
    cancelled: AtomicBool,
}

impl Buckets {
    /// Files `tag`ged where plain names are another writer's; none is created before it has rows.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        store: ArtifactStore,
        runtime: Handle,
        plan: MemoryPlan,
        code_width: usize,
        num_partitions: usize,
        num_buckets: usize,
        sync: bool,
        tag: Option<&str>,
    ) -> Self {
        let order = BucketOrder::new(num_partitions, num_buckets);
        let file = |bucket| Mutex::new(BucketWriter::new(bucket, order.bucket_ranks(bucket).len(), code_width, tag));
        let files = (0..num_buckets).map(file).collect();
        Self { store, runtime, plan, code_width, sync, order, files, cancelled: AtomicBool::new(false) }
    }

    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Make work in progress end soon with an error.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Group a stage and append its runs to the bucket files, all threads at once.
    pub fn flush(&self, mut stage: Stage) -> Result<Stage> {
        // Threads of its own: a caller may hold all of those that programs share, and wait for this flush.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.plan.threads).build();
        let pool = pool.map_err(|e| Error::Storage(format!("no threads could be started to sort with: {e}")))?;
        let sorted = pool.install(|| sort(&stage, &self.order, self.plan.threads));
        let job = FlushJob {
            store: &self.store,
            runtime: &self.runtime,
            stage: &stage,
            sorted: &sorted,
            order: &self.order,
            chunk_rows: self.plan.chunk_rows,
            code_width: self.code_width,
            sync: self.sync,
            cancelled: &self.cancelled,
        };
        self.for_each(self.plan.threads, |bucket, chunk| job.write(&mut locked(&self.files[bucket]), bucket, chunk))?;
        drop(sorted);
        stage.clear();
        Ok(stage)
    }

    /// Close the files; `closed` gets their names first, so that an abort knows every file that may be there.
    pub fn close(&self, closed: &mut Vec<String>) -> Result<BTreeMap<String, FileEntry>> {
        closed.extend(self.files.iter().filter_map(|file| locked(file).open_path()));
        let files = Mutex::new(BTreeMap::new());
        self.for_each(CLOSING_THREADS, |bucket, _| {
            if let Some((path, entry)) = locked(&self.files[bucket]).close(&self.runtime, &self.store)? {
                locked(&files).insert(path, entry);
            }
            Ok(())
        })?;
        Ok(files.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Drop open files; they never appear under their names.
    pub fn discard(&self) {
        let _runtime = self.runtime.enter();
        for file in &self.files {
            locked(file).discard();
        }
    }

    /// Leave open files to another process: after a fork they are the parent's.
    pub fn forget(&self) {
        for file in &self.files {
            if let Ok(mut file) = file.try_lock() {
                file.forget();
            }
        }
    }

    fn for_each(&self, threads: usize, work: impl Fn(usize, &mut Chunk) -> Result<()> + Sync) -> Result<()> {
        let next = AtomicUsize::new(0);
        let failed = Mutex::new(None);
        let run = || {
            let mut chunk = Chunk::default();
            loop {
                let bucket = next.fetch_add(1, Ordering::Relaxed);
                if bucket >= self.files.len() || self.is_cancelled() || locked(&failed).is_some() {
                    return;
                }
                if let Err(error) = work(bucket, &mut chunk) {
                    locked(&failed).get_or_insert(error);
                }
            }
        };
        // Threads of our own: the caller's may be a runtime's, which must not block on IO. One that cannot be had is one that
        // does not help, unless it was the only one.
        let spawned = std::thread::scope(|scope| {
            let spawn = |_| std::thread::Builder::new().name("lance-artifact-write".into()).spawn_scoped(scope, run);
            (0..threads.min(self.files.len())).map(spawn).filter(std::io::Result::is_ok).count()
        });
        if spawned == 0 {
            return Err(Error::Storage("no thread could be started to write with".into()));
        }
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None if self.is_cancelled() => Err(Error::Interrupted("the builder was aborted".into())),
            None => Ok(()),
        }
    }

    /// What the manifest is to say of each partition; once.
    pub fn partitions(&self, num_partitions: usize) -> Vec<PartitionEntry> {
        let mut partitions = vec![PartitionEntry::default(); num_partitions];
        for (index, bucket) in self.files.iter().enumerate() {
            let mut bucket = locked(bucket);
            let path = bucket.path().to_string();
            for (rank, state) in self.order.bucket_ranks(index).zip(bucket.take_partitions()) {
                if !state.ranges.is_empty() {
                    partitions[self.order.partition(rank) as usize] = PartitionEntry {
                        path: Some(path.clone()),
                        num_rows: state.ranges.iter().map(|r| r.num_rows).sum(),
                        ranges: state.ranges,
                        checksum: Some(checksum::to_hex(state.checksum)),
                    };
                }
            }
        }
        partitions
    }
}
