//! Rows in are rows out, in order; or there is one error, for a reason. Nothing hangs, is used while it is another's, or stays.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, UInt8Type, UInt32Type, UInt64Type};
use arrow_array::{FixedSizeListArray, RecordBatch, UInt64Array};
use futures::stream;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::sync::watch;

use super::restless::{Fate, Restless, RestlessEncoder};
use crate::encode::device::pipeline::{DeviceEncoding, run};
use crate::encode::device::{DeviceEncoder, TensorElement};
use crate::error::Error;
use crate::lance::dataset::ScannedRows;
use crate::model::Metric;
use crate::sync::locked;

const DIMENSION: usize = 3;
const WIDTH: usize = 2;
/// Longer than any run takes, on a busy machine too.
const HANGS: Duration = Duration::from_secs(60);

type Lane = (Restless, Box<dyn DeviceEncoder<Restless>>);

/// What a seed draws.
struct Drawn {
    /// Rows of each scanned batch.
    batches: Vec<u64>,
    batch_rows: usize,
    lanes: usize,
    /// Of each row, whether it is null.
    nulls: f64,
    fails_after: Option<usize>,
    panics: bool,
    calls: usize,
}

impl Drawn {
    fn of_seed(seed: u64) -> Self {
        let mut die = SmallRng::seed_from_u64(seed ^ 0xde71ce);
        let batches: Vec<u64> = (0..die.random_range(0..16)).map(|_| die.random_range(1..40)).collect();
        let batch_rows = die.random_range(1..60);
        let rows: u64 = batches.iter().sum();
        let fails_after = die.random_bool(0.1).then(|| die.random_range(0..=batches.len()));
        Self {
            batch_rows,
            lanes: [1, 1, 2, 3][die.random_range(0..4)],
            nulls: [0.0, 0.15, 0.9][die.random_range(0..3)],
            fails_after,
            panics: die.random_bool(0.3),
            // Of a run without failures, about: some forty to begin with, and a dozen for each batch.
            calls: 60 + 16 * rows.div_ceil(batch_rows as u64) as usize,
            batches,
        }
    }

    fn is_null(&self, row: u64) -> bool {
        (row.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) as f64 / 2f64.powi(53) < self.nulls
    }

    fn scanned(&self) -> Vec<ScannedRows> {
        let mut first = 0;
        let batch = |rows: u64| {
            let ids = first..first + rows;
            first += rows;
            let vectors = ids.clone().map(|row| (!self.is_null(row)).then(|| vec![Some(row as f32); DIMENSION]));
            ScannedRows {
                row_ids: UInt64Array::from_iter_values(ids.clone()),
                vectors: FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(vectors, DIMENSION as i32),
            }
        };
        self.batches.iter().copied().map(batch).collect()
    }
}

fn of_seed(seed: u64) -> std::result::Result<bool, String> {
    let drawn = Arc::new(Drawn::of_seed(seed));
    let (interrupt, interrupted) = watch::channel(false);
    let fate = Fate::of_seed(seed, drawn.calls, interrupt);
    let lanes: Vec<Lane> = (0..drawn.lanes)
        .map(|_| {
            let encoder: Box<dyn DeviceEncoder<Restless>> = Box::new(RestlessEncoder::new(&fate, DIMENSION, WIDTH));
            (Restless::new(&fate), encoder)
        })
        .collect();
    let plan = DeviceEncoding {
        metric: Metric::L2,
        dimension: DIMENSION,
        element: TensorElement::Float32,
        code_width: WIDTH,
        batch_rows: Some(drawn.batch_rows),
        memory: usize::MAX,
    };
    let (its, fails_after, panics) = (fate.clone(), drawn.fails_after, drawn.panics);
    let scanned = drawn.scanned().into_iter().map(Ok).enumerate();
    let end = fails_after.map(|after| (after, Err(Error::Storage("injected: the scan".into()))));
    let upto = fails_after.unwrap_or(usize::MAX);
    let scan = stream::iter(scanned.take(upto).chain(end).map(move |(_, batch)| {
        its.dawdle();
        assert!(batch.is_ok() || !panics, "injected: the scan panics");
        batch
    }));
    let out = Arc::new(Mutex::new(Vec::new()));
    let (its, collected) = (fate.clone(), out.clone());
    let sink = move |batch: &RecordBatch| {
        its.call("the writer")?;
        let ids = batch.column(0).as_primitive::<UInt64Type>().values();
        let part_ids = batch.column(1).as_primitive::<UInt32Type>().values();
        let codes = batch.column(2).as_fixed_size_list().values().as_primitive::<UInt8Type>().values();
        for (row, id) in ids.iter().enumerate() {
            if u64::from(part_ids[row]) != *id || codes[row * WIDTH..(row + 1) * WIDTH] != [*id as u8, (*id >> 8) as u8] {
                locked(&its.wrong).push(format!(
                    "row {id} has partition {} and code {:?}",
                    part_ids[row],
                    &codes[row * WIDTH..(row + 1) * WIDTH]
                ));
            }
        }
        locked(&collected).extend_from_slice(ids);
        Ok(())
    };
    let done = Arc::new(AtomicU64::new(0));
    let told = done.clone();
    let progress = move |rows| {
        told.fetch_max(rows, Ordering::Relaxed);
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    let work = run(scan, plan, lanes, Box::new(sink), interrupted, Box::new(progress));
    let result = runtime.block_on(async { tokio::time::timeout(HANGS, work).await }).map_err(|_| "it hangs".to_string())?;
    drop(runtime);
    // What a stream has left to do goes on after its owner is gone.
    let waits = Instant::now();
    while fate.alive.load(Ordering::Relaxed) > 0 {
        if waits.elapsed() > HANGS {
            return Err(format!("{} memories, streams, events, devices and encoders stay", fate.alive.load(Ordering::Relaxed)));
        }
        std::thread::yield_now();
    }
    if let Some(wrong) = locked(&fate.wrong).first() {
        return Err(wrong.clone());
    }
    let rows: u64 = drawn.batches.iter().sum();
    let kept: Vec<u64> = (0..rows).filter(|row| !drawn.is_null(*row)).collect();
    let mut ids = std::mem::take(&mut *locked(&out));
    let in_order = ids.is_sorted();
    ids.sort_unstable();
    if drawn.lanes == 1 && !(in_order && kept.starts_with(&ids)) {
        return Err(format!("rows {ids:?} are not the first of {kept:?}, or not in their order"));
    }
    let mut once = ids.clone();
    once.dedup();
    if once.len() != ids.len() || !ids.iter().all(|id| kept.binary_search(id).is_ok()) {
        return Err("rows came twice, or from nowhere".into());
    }
    match result {
        Ok((dropped, reports)) => {
            let reported = reports.iter().map(|report| report.rows).sum::<u64>();
            if ids != kept || dropped.null != rows - kept.len() as u64 || reported != kept.len() as u64 {
                return Err(format!("{} of {} rows came, {reported} are reported, {dropped:?}", ids.len(), kept.len()));
            }
            if done.load(Ordering::Relaxed) != rows {
                return Err(format!("the last progress was {done:?} of {rows} rows"));
            }
            if fails_after.is_some() {
                return Err("the scan failed, and nobody was told".into());
            }
            Ok(true)
        }
        Err(Error::Interrupted(_)) if fate.was_interrupted() => Ok(false),
        Err(error) if error.to_string().contains("injected") => Ok(false),
        Err(error) => Err(format!("it failed for no reason: {error}")),
    }
}

/// The number of a run in the environment, for the long form: see `docs/reliability.md`.
fn wanted(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: got {text:?}, expected a number")))
}

#[test]
fn rows_in_are_rows_out_or_there_is_a_reason() {
    let (seed, count) = (wanted("LANCE_ARTIFACT_SEED"), wanted("LANCE_ARTIFACT_PIPELINES"));
    let (first, count) = (seed.unwrap_or(0), count.unwrap_or(if seed.is_some() { 1 } else { 300 }));
    let (next, whole, start) = (AtomicU64::new(first), AtomicUsize::new(0), Instant::now());
    crate::sync::fan_out(4, "pipelines", || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                return;
            }
            match of_seed(seed) {
                Ok(is_whole) => whole.fetch_add(usize::from(is_whole), Ordering::Relaxed),
                Err(wrong) => panic!("LANCE_ARTIFACT_SEED={seed}: {wrong}"),
            };
        }
    });
    println!("{count} runs of the pipeline, {whole:?} of them to the end, in {:.0} s", start.elapsed().as_secs_f64());
}
