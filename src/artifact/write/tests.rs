//! Builders whose batches come from several threads, over a store that takes its time and fails, finished, cancelled, aborted or dropped at
//! any moment, as a seed has it: an artifact holds every row once, and without one nothing stays.

use std::fmt::{Debug, Display, Formatter};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arrow_array::{RecordBatch, UInt8Array, UInt32Array, UInt64Array};
use async_trait::async_trait;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, Result as StoreResult,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::plan::{MemoryPlan, Wanted};
use super::{BuilderOptions, Encoding, PartitionArtifactBuilder};
use crate::artifact::format::{CLAIM_FILE, bucket_schema};
use crate::artifact::{Artifact, row_ids_and_codes};
use crate::error::Error;
use crate::lance::LanceStore;
use crate::model::fixed_size_list;
use crate::sync::locked;

const PARTITIONS: usize = 7;
const WIDTH: usize = 2;
/// The manifest and at most three buckets.
const FILES: usize = 4;
/// Longer than any run takes, on a busy machine too.
const HANGS: Duration = Duration::from_secs(120);

/// A store that takes its time, and a few of whose requests fail, before or after they happen.
struct Moody {
    inner: Arc<dyn ObjectStore>,
    die: Mutex<SmallRng>,
    waits: f64,
    fails: f64,
    failures: AtomicUsize,
    failed: AtomicUsize,
}

impl Debug for Moody {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("Moody")
    }
}

impl Display for Moody {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("Moody")
    }
}

impl Moody {
    async fn ask<T>(&self, request: impl Future<Output = StoreResult<T>>) -> StoreResult<T> {
        let (wait, fails, before) = {
            let mut die = locked(&self.die);
            let wait = die.random_bool(self.waits).then(|| Duration::from_micros(die.random_range(0..2000)));
            (wait, die.random_bool(self.fails), die.random_bool(0.5))
        };
        if let Some(wait) = wait {
            tokio::time::sleep(wait).await;
        }
        if !fails || self.failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err() {
            return request.await;
        }
        self.failed.fetch_add(1, Ordering::Relaxed);
        if !before {
            request.await?;
        }
        Err(object_store::Error::Generic { store: "moody", source: "injected".into() })
    }
}

#[async_trait]
impl ObjectStore for Moody {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> StoreResult<PutResult> {
        self.ask(self.inner.put_opts(location, payload, opts)).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> StoreResult<Box<dyn MultipartUpload>> {
        self.ask(self.inner.put_multipart_opts(location, opts)).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> StoreResult<GetResult> {
        self.ask(self.inner.get_opts(location, options)).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, StoreResult<Path>>) -> BoxStream<'static, StoreResult<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> StoreResult<ListResult> {
        self.ask(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> StoreResult<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// Rows `first..first + rows`.
fn batch(first: u64, rows: u64) -> RecordBatch {
    let ids = first..first + rows;
    let codes: Vec<u8> = ids.clone().flat_map(|id| [id as u8, (id >> 8) as u8]).collect();
    let codes = fixed_size_list(Arc::new(UInt8Array::from(codes)), WIDTH).unwrap();
    let part_ids = UInt32Array::from_iter_values(ids.clone().map(partition_of));
    RecordBatch::try_new(bucket_schema(WIDTH), vec![Arc::new(UInt64Array::from_iter_values(ids)), Arc::new(part_ids), Arc::new(codes)])
        .unwrap()
}

fn partition_of(id: u64) -> u32 {
    (id * id % PARTITIONS as u64) as u32
}

/// The least memory that such a builder can do with, so that a few batches fill a stage.
fn least_memory() -> u64 {
    let fits = |limit: u64| {
        let wanted = Wanted {
            limit,
            held: 0,
            code_width: WIDTH,
            num_partitions: PARTITIONS,
            num_buckets: Some(3),
            expected_rows: None,
            uploads: true,
            threads: std::thread::available_parallelism().map_or(1, usize::from).clamp(1, 16),
            files_left: 1000,
        };
        MemoryPlan::choose(&wanted).is_ok()
    };
    (1..).map(|steps| steps << 18).find(|limit| fits(*limit)).unwrap()
}

/// How a build ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Finish,
    Cancel,
    Abort,
    Drop,
}

async fn names(store: &dyn ObjectStore, root: &Path) -> Vec<String> {
    store.list(Some(root)).map_ok(|meta| meta.location.to_string()).try_collect().await.unwrap()
}

/// Whether there is an artifact in the end; what is wrong.
async fn of_seed(seed: u64, memory_limit: u64) -> Result<bool, String> {
    let mut die = SmallRng::seed_from_u64(seed);
    let uri = format!("memory://moody-{seed}");
    let below = LanceStore::open(&uri, None).await.unwrap();
    let root = below.path("x").unwrap().to_string().trim_end_matches("/x").to_string();
    let moody = Arc::new(Moody {
        inner: below.object_store().clone(),
        waits: [0.0, 0.3, 0.9][die.random_range(0..3)],
        fails: [0.0, 0.0, 0.05, 0.3][die.random_range(0..4)],
        failures: AtomicUsize::new(die.random_range(0..3)),
        failed: AtomicUsize::new(0),
        die: Mutex::new(SmallRng::seed_from_u64(seed + 1)),
    });
    let (end, after) = ([End::Finish, End::Finish, End::Cancel, End::Abort, End::Drop][die.random_range(0..5)], die.random_range(0..30));
    let threads: Vec<Vec<(u64, u64)>> = {
        let mut next = 0;
        let mut batches = |count| {
            let drawn = (0..count).map(|_| {
                let (first, rows) = (next, die.random_range(0..3000));
                next += rows;
                (first, rows)
            });
            drawn.collect()
        };
        (0..3).map(|thread| batches(2 + thread * 2)).collect()
    };
    let rows: u64 = threads.iter().flatten().map(|(_, rows)| rows).sum();
    let encoding = Encoding::Shape { num_partitions: PARTITIONS, pq_code_width: WIDTH };
    let options = BuilderOptions { memory_limit: Some(memory_limit), num_buckets: Some(3), ..Default::default() };
    let store = LanceStore::standing_in(moody.clone(), &root);
    let failed = |moody: &Moody| moody.failed.load(Ordering::Relaxed) > 0;
    let builder = match PartitionArtifactBuilder::at(store, encoding, options).await {
        Ok(builder) => Arc::new(builder),
        Err(_) if failed(&moody) => return built_again(&below, &root, memory_limit).await.map(|()| false),
        Err(error) => return Err(format!("no builder: {error}")),
    };
    let work = {
        let builder = builder.clone();
        move || -> Result<(), Error> {
            let appended = std::thread::scope(|scope| {
                let append =
                    |batches: &[(u64, u64)]| batches.iter().try_for_each(|(first, rows)| builder.append_batch(&batch(*first, *rows)));
                let running: Vec<_> = threads.iter().map(|batches| scope.spawn(move || append(batches))).collect();
                running.into_iter().try_for_each(|thread| thread.join().unwrap())
            });
            appended?;
            builder.finish(None).map(drop)
        }
    };
    let work = crate::sync::spawn(work);
    if end != End::Finish {
        tokio::time::sleep(Duration::from_millis(after)).await;
    }
    let ending = builder.clone();
    let ended = crate::sync::spawn(move || match end {
        End::Finish => Ok(()),
        End::Cancel => {
            ending.cancel();
            Ok(())
        }
        // A drop is this, without an answer.
        End::Abort | End::Drop => ending.abort(),
    });
    let ended = ended.await;
    let finished = work.await;
    if end != End::Abort {
        let last = Arc::into_inner(builder).ok_or("somebody keeps the builder")?;
        crate::sync::spawn(move || {
            drop(last);
            Ok(())
        })
        .await
        .map_err(|error| error.to_string())?;
    } else {
        drop(builder);
    }
    let left = names(below.object_store().as_ref(), &Path::from(root.as_str())).await;
    if !left.iter().any(|name| name.ends_with("manifest.json")) {
        if finished.is_ok() {
            return Err("finish said that it published, and there is no manifest".into());
        }
        if end == End::Finish && !failed(&moody) {
            return Err(format!("finish failed for no reason: {finished:?}"));
        }
        if failed(&moody) {
            built_again(&below, &root, memory_limit).await?;
        } else if !left.is_empty() {
            return Err(format!("left behind: {left:?}; {ended:?}"));
        }
        return Ok(false);
    }
    let artifact = Artifact::open(&uri, None).await.map_err(|error| error.to_string())?;
    let report = artifact.verify(|_| {}).await.map_err(|error| error.to_string())?;
    if !report.ok() || report.num_rows != rows {
        return Err(format!("{} of {rows} rows, {:?}", report.num_rows, report.problems));
    }
    let mut seen = vec![false; rows as usize];
    for partition in 0..PARTITIONS {
        for batch in artifact.read_partitions(partition..partition + 1).await.map_err(|error| error.to_string())?.batches(0) {
            let (ids, codes) = row_ids_and_codes(&batch);
            for (id, code) in ids.iter().zip(codes.chunks(WIDTH)) {
                if partition_of(*id) as usize != partition
                    || code != [*id as u8, (*id >> 8) as u8]
                    || std::mem::replace(&mut seen[*id as usize], true)
                {
                    return Err(format!("row {id} came twice, or is not itself, in partition {partition}"));
                }
            }
        }
    }
    if failed(&moody) {
        built_again(&below, &root, memory_limit).await?;
    } else if left.len() > FILES {
        return Err(format!("left behind: {left:?}"));
    }
    Ok(true)
}

/// What a store's failures kept a build from removing goes with the next one.
async fn built_again(below: &LanceStore, root: &str, memory_limit: u64) -> Result<(), String> {
    let encoding = Encoding::Shape { num_partitions: PARTITIONS, pq_code_width: WIDTH };
    let options = BuilderOptions { memory_limit: Some(memory_limit), num_buckets: Some(3), overwrite: true, ..Default::default() };
    let store = LanceStore::standing_in(below.object_store().clone(), root);
    let builder = PartitionArtifactBuilder::at(store, encoding, options).await.map_err(|error| format!("built again: {error}"))?;
    let work = crate::sync::spawn(move || {
        builder.append_batch(&batch(0, 1000))?;
        builder.finish(None).map(drop)
    });
    work.await.map_err(|error| format!("built again: {error}"))?;
    let left = names(below.object_store().as_ref(), &Path::from(root)).await;
    // A claim that could not be given up is this process's for as long as it lives, and so are the files of the names that it is for.
    let is_claimed = left.iter().any(|name| name.ends_with(CLAIM_FILE));
    if is_claimed || left.len() <= FILES { Ok(()) } else { Err(format!("built again, it has {left:?}")) }
}

/// A number of the environment, for the long form: see `docs/reliability.md`.
fn wanted(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: got {text:?}, expected a number")))
}

#[test]
fn builds_of_many_threads_end_whole_or_leave_nothing() {
    let (seed, count) = (wanted("LANCE_ARTIFACT_SEED"), wanted("LANCE_ARTIFACT_BUILDS"));
    let (first, count) = (seed.unwrap_or(0), count.unwrap_or(if seed.is_some() { 1 } else { 40 }));
    let memory_limit = least_memory();
    let (next, whole, start) = (AtomicU64::new(first), AtomicUsize::new(0), Instant::now());
    crate::sync::fan_out(4, "builds", || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                return;
            }
            let run = async { tokio::time::timeout(HANGS, of_seed(seed, memory_limit)).await };
            match runtime.block_on(run) {
                Ok(Ok(is_whole)) => whole.fetch_add(usize::from(is_whole), Ordering::Relaxed),
                Ok(Err(wrong)) => panic!("LANCE_ARTIFACT_SEED={seed}: {wrong}"),
                Err(_) => panic!("LANCE_ARTIFACT_SEED={seed}: it hangs"),
            };
        }
    });
    println!("{count} builds, {whole:?} of them published, in {:.0} s", start.elapsed().as_secs_f64());
}
