//! The bucket files of one artifact: stages are written into them, all threads at once, until they are closed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::runtime::Handle;

use super::bucket::{BucketWriter, Chunk, FlushJob, PartitionState};
use super::plan::{Kept, MemoryPlan};
use super::stage::{BucketOrder, SortedRows, Stage, sort};
use crate::artifact::format::{FileEntry, PartitionTable};
use crate::error::{Error, Result};
use crate::io::Uploads;
use crate::lance::LanceStore;
use crate::sync::{block_on, fan_out, locked};

/// Files closed at once. Closing waits for a disk, which commits many files together, or for the last part of an upload.
const CLOSING_THREADS: usize = 64;

/// Rows that a partition of an index can have: they are counted in 32 bits.
pub const MAX_PARTITION_ROWS: u64 = u32::MAX as u64;

/// What the threads that write share.
pub struct Buckets {
    pub store: LanceStore,
    pub runtime: Handle,
    pub plan: MemoryPlan,
    pub code_width: usize,
    /// Make files durable when they are closed.
    pub sync: bool,
    uploads: Uploads,
    partition_rows: u64,
    order: BucketOrder,
    files: Vec<Mutex<BucketWriter>>,
    cancelled: AtomicBool,
}

impl Buckets {
    /// Files `tag`ged where plain names are another writer's; none is created before it has rows.
    pub fn new(
        store: LanceStore,
        runtime: Handle,
        plan: MemoryPlan,
        code_width: usize,
        num_partitions: usize,
        sync: bool,
        tag: Option<&str>,
    ) -> Self {
        let order = BucketOrder::new(num_partitions, plan.num_buckets);
        let file = |bucket| Mutex::new(BucketWriter::new(bucket, order.bucket_ranks(bucket).len(), code_width, tag));
        let files = (0..plan.num_buckets).map(file).collect();
        let uploads = Uploads::new(plan.part_bytes, 1, runtime.clone());
        let (partition_rows, cancelled) = (MAX_PARTITION_ROWS, AtomicBool::new(false));
        Self { store, runtime, plan, code_width, sync, uploads, partition_rows, order, files, cancelled }
    }

    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Bytes that all files keep until the end.
    pub fn kept(&self) -> Kept {
        self.files.iter().map(|file| locked(file).kept()).fold(Kept::default(), |all, file| Kept {
            runs: all.runs + file.runs,
            pages: all.pages + file.pages,
            closing: all.closing.max(file.closing),
        })
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
        // Threads of its own: a caller may hold all of those that programs share, and wait for this flush. Where they cannot be
        // had, this one sorts.
        let sorted = match rayon::ThreadPoolBuilder::new().num_threads(self.plan.threads).build() {
            Ok(pool) => pool.install(|| sort(&stage, &self.order, self.plan.threads)),
            Err(_) => sort(&stage, &self.order, 1),
        };
        self.check_room(&sorted)?;
        let job = FlushJob {
            store: &self.store,
            uploads: &self.uploads,
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

    /// Refuse rows for which a partition or a bucket file has no room, before any of them is written.
    fn check_room(&self, sorted: &SortedRows) -> Result<()> {
        for (bucket, file) in self.files.iter().enumerate() {
            let (file, ranks) = (locked(file), self.order.bucket_ranks(bucket));
            let rows = |from: usize, to: usize| u64::from(sorted.starts[to] - sorted.starts[from]);
            for (rank, state) in ranks.clone().zip(file.partitions()) {
                let total = state.num_rows + rows(rank, rank + 1);
                if total > self.partition_rows {
                    return Err(Error::invalid(format!(
                        "append_batch: partition {} would have {total} rows, expected at most {}, which is what a partition of an index can \
                         have; train with more partitions, or on a sample that is like the rows",
                        self.order.partition(rank),
                        self.partition_rows
                    )));
                }
            }
            let total = file.rows() + rows(ranks.start, ranks.end);
            if total > self.plan.file_rows {
                return Err(Error::invalid(format!(
                    "append_batch: {} would have {total} rows, expected at most {}, which is what an upload in parts of {} bytes can have; \
                     build again with expected_rows, or with a higher memory_limit or num_buckets",
                    file.path(),
                    self.plan.file_rows,
                    self.plan.part_bytes
                )));
            }
        }
        Ok(())
    }

    /// Close the files; `closed` gets their names first, so that an abort knows every file that may be there.
    pub fn close(&self, closed: &mut Vec<String>) -> Result<BTreeMap<String, FileEntry>> {
        closed.extend(self.files.iter().filter_map(|file| locked(file).open_path()));
        let files = Mutex::new(BTreeMap::new());
        // Stages have given their memory back, and runs have yet to become ranges.
        let kept = self.kept();
        let left = (self.plan.limit as usize / 2).saturating_sub(kept.runs + kept.pages);
        let fit = left / kept.closing.max(1);
        self.for_each(fit.clamp(1, CLOSING_THREADS), |bucket, _| {
            if let Some((path, entry)) = locked(&self.files[bucket]).close(&self.runtime, &self.store, &self.cancelled)? {
                locked(&files).insert(path, entry);
            }
            Ok(())
        })?;
        Ok(files.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Drop open files; they never appear under their names. Waits until uploads are aborted, for half a minute at most.
    pub fn discard(&self) {
        {
            let _runtime = self.runtime.enter();
            for file in &self.files {
                locked(file).discard();
            }
        }
        if self.store.local_root().is_none() {
            let _ = block_on(&self.runtime, async { Ok(self.uploads.aborted().await) });
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
        fan_out(threads.min(self.files.len()), "lance-artifact-write", run);
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None if self.is_cancelled() => Err(Error::Interrupted("the builder was aborted".into())),
            None => Ok(()),
        }
    }

    /// What the manifest is to say of each partition; once.
    pub fn take_partitions(&self) -> WrittenPartitions {
        let mut paths = Vec::with_capacity(self.files.len());
        let mut buckets = Vec::with_capacity(self.files.len());
        for file in &self.files {
            let mut file = locked(file);
            paths.push(file.path().to_string());
            buckets.push(file.take_partitions());
        }
        WrittenPartitions { paths, buckets }
    }
}

/// The partitions of an artifact that is about to be published.
pub struct WrittenPartitions {
    /// Of the bucket files.
    pub paths: Vec<String>,
    /// By bucket, and by rank in it.
    buckets: Vec<Vec<(PartitionState, Vec<u8>)>>,
}

/// One of them.
pub struct WrittenPartition<'a> {
    /// The number of its bucket file; none without rows.
    pub file: Option<u32>,
    pub num_rows: u32,
    pub checksum: u64,
    pub ranges: &'a [u8],
}

impl WrittenPartitions {
    /// Bytes of all ranges.
    pub fn num_bytes(&self) -> usize {
        self.buckets.iter().flatten().map(|(_, ranges)| ranges.len()).sum()
    }

    /// In the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = Result<WrittenPartition<'_>>> {
        // Partition `id` is in bucket `id % buckets`: see `BucketOrder`.
        let ranks = self.buckets.first().map_or(0, Vec::len);
        (0..ranks).flat_map(|rank| (0u32..).zip(&self.buckets).filter_map(move |(file, bucket)| Some((file, bucket.get(rank)?)))).map(
            |(file, (state, ranges))| {
                let num_rows = u32::try_from(state.num_rows).map_err(|_| Error::internal("a partition of more than 32 bits of rows"))?;
                let (file, checksum) = if num_rows > 0 { (Some(file), state.checksum) } else { (None, 0) };
                Ok(WrittenPartition { file, num_rows, checksum, ranges })
            },
        )
    }

    /// As the manifest of version 1 lists them.
    pub fn table(&self) -> Result<PartitionTable> {
        let mut table = PartitionTable::in_files(self.paths.clone());
        for partition in self.iter() {
            let WrittenPartition { file, num_rows, checksum, ranges } = partition?;
            table.push_encoded(file, num_rows, checksum, ranges)?;
        }
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::write::plan::Wanted;

    fn buckets(uri: &str, partition_rows: u64, file_rows: u64) -> Result<Buckets> {
        let runtime = Handle::current();
        let store = tokio::task::block_in_place(|| runtime.block_on(LanceStore::open(uri, None)))?;
        let wanted = Wanted {
            limit: 64 << 20,
            held: 0,
            code_width: 1,
            num_partitions: 4,
            num_buckets: Some(2),
            expected_rows: None,
            uploads: false,
            threads: 2,
            files_left: 1000,
        };
        let plan = MemoryPlan { file_rows, ..MemoryPlan::choose(&wanted)? };
        Ok(Buckets { partition_rows, ..Buckets::new(store, runtime, plan, 1, 4, false, None) })
    }

    fn stage(part_ids: &[u32]) -> Stage {
        let mut stage = Stage::try_with_capacity(part_ids.len(), 1).unwrap();
        let rows: Vec<u64> = (0..part_ids.len() as u64).collect();
        stage.extend(&rows, part_ids, &vec![0; part_ids.len()]);
        stage
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn rows_without_room_are_refused_where_they_would_be_written() {
        let folder = tempfile::tempdir().unwrap();
        let uri = folder.path().to_str().unwrap();
        let full = buckets(uri, 3, u64::MAX).unwrap();
        full.flush(stage(&[0, 1, 0, 2, 3, 0])).unwrap();
        full.flush(stage(&[1, 1])).unwrap();
        let error = full.flush(stage(&[2, 0])).unwrap_err().to_string();
        assert!(error.contains("partition 0 would have 4 rows, expected at most 3"), "{error}");
        full.discard();
        let full = buckets(uri, 100, 5).unwrap();
        full.flush(stage(&[0, 2, 0, 2, 3])).unwrap();
        let error = full.flush(stage(&[2, 2, 1])).unwrap_err().to_string();
        assert!(error.contains("bucket-00000.lance would have 6 rows, expected at most 5"), "{error}");
        full.discard();
        assert_eq!(std::fs::read_dir(folder.path().join("partitions")).unwrap().count(), 0);
    }
}
