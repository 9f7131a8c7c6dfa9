//! The pipeline over host memory: order, gaps, several lanes, back-pressure, running out of memory, errors, interruption.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, UInt8Type, UInt32Type, UInt64Type};
use arrow_array::{FixedSizeListArray, RecordBatch, UInt64Array};
use futures::{Stream, StreamExt, stream};
use tokio::sync::watch;

use super::pipeline::run;
use super::*;
use crate::encode::prepare::Dropped;
use crate::error::{Error, Result};
use crate::lance::dataset::ScannedRows;
use crate::model::Metric;

const DIMENSION: usize = 4;
const WIDTH: usize = 2;

/// Rows `first..first + rows`, whose elements are their ids; every seventh is null.
fn scanned(first: u64, rows: u64) -> ScannedRows {
    let vectors = (first..first + rows).map(|i| (i % 7 != 3).then(|| vec![Some(i as f32); DIMENSION]));
    ScannedRows {
        row_ids: UInt64Array::from_iter_values(first..first + rows),
        vectors: FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(vectors, DIMENSION as i32),
    }
}

fn scan(batches: u64, rows: u64) -> impl Stream<Item = Result<ScannedRows>> + Send + 'static {
    stream::iter((0..batches).map(move |b| Ok(scanned(b * rows, rows))))
}

/// Partition = the vector's first element, code = its last two bytes.
#[derive(Default)]
struct Echo {
    /// More rows than this are too many for its memory.
    most: Option<usize>,
    fail_at: Option<usize>,
    calls: usize,
    largest: Arc<AtomicUsize>,
}

impl DeviceEncoder<HostDevice> for Echo {
    fn open(&mut self, _: &HostDevice, _: &()) -> Result<()> {
        Ok(())
    }

    fn encode(
        &mut self,
        vectors: Tensor<host::SharedBytes>,
        part_ids: Tensor<host::SharedBytes>,
        codes: Tensor<host::SharedBytes>,
    ) -> Result<()> {
        self.calls += 1;
        if self.most.is_some_and(|most| vectors.rows > most) {
            return Err(Error::DeviceMemory(format!("{} rows", vectors.rows)));
        }
        if self.fail_at == Some(self.calls) {
            return Err(Error::Device("the device is lost".into()));
        }
        self.largest.fetch_max(vectors.rows, Ordering::Relaxed);
        assert_eq!((vectors.columns, part_ids.columns, codes.columns), (Some(DIMENSION), None, Some(WIDTH)));
        for row in 0..vectors.rows {
            // SAFETY: the tensors have this many rows of these types, and are this encoder's for the call.
            unsafe {
                let value = *(vectors.address() as *const f32).add(row * DIMENSION);
                *(part_ids.address() as *mut u32).add(row) = value as u32;
                let code = (codes.address() as *mut u8).add(row * WIDTH);
                *code = value as u32 as u8;
                *code.add(1) = (value as u32 >> 8) as u8;
            }
        }
        Ok(())
    }

    fn close(&mut self) {}
}

fn plan(batch_rows: usize) -> DeviceEncoding {
    DeviceEncoding {
        metric: Metric::L2,
        dimension: DIMENSION,
        element: TensorElement::Float32,
        code_width: WIDTH,
        batch_rows: Some(batch_rows),
        memory: usize::MAX,
    }
}

type Lane = (HostDevice, Box<dyn DeviceEncoder<HostDevice>>);

fn lane(encoder: Echo) -> Lane {
    (HostDevice { capacity: 1 << 30 }, Box::new(encoder))
}

/// Run, and collect the row ids in the order in which they come out; each must have its own partition and code.
fn encode(
    scan: impl Stream<Item = Result<ScannedRows>> + Send + 'static,
    batch_rows: usize,
    lanes: Vec<Lane>,
) -> Result<(Vec<u64>, Dropped, Vec<DeviceReport>)> {
    let out = Arc::new(Mutex::new(Vec::new()));
    let collected = out.clone();
    let sink = move |batch: &RecordBatch| {
        let ids = batch.column(0).as_primitive::<UInt64Type>().values().to_vec();
        let part_ids = batch.column(1).as_primitive::<UInt32Type>().values().to_vec();
        let codes = batch.column(2).as_fixed_size_list().values().as_primitive::<UInt8Type>().values().to_vec();
        for (row, id) in ids.iter().enumerate() {
            assert_eq!(u64::from(part_ids[row]), *id);
            assert_eq!(codes[row * WIDTH..(row + 1) * WIDTH], [*id as u8, (*id >> 8) as u8]);
        }
        collected.lock().unwrap().extend(ids);
        Ok(())
    };
    let (_interrupt, interrupted) = watch::channel(false);
    let (dropped, reports) =
        tokio::runtime::Runtime::new()?.block_on(run(scan, plan(batch_rows), lanes, Box::new(sink), interrupted, Box::new(|_| {})))?;
    let out = out.lock().unwrap().clone();
    Ok((out, dropped, reports))
}

fn kept(rows: u64) -> Vec<u64> {
    (0..rows).filter(|i| i % 7 != 3).collect()
}

#[test]
fn every_row_once_and_in_order() {
    for (batches, rows, batch_rows) in [(1, 1, 256), (5, 1000, 300), (40, 333, 4096), (3, 10_000, 1024), (4, 7, 1)] {
        let (ids, dropped, reports) = encode(scan(batches, rows), batch_rows, vec![lane(Echo::default())]).unwrap();
        assert_eq!(ids, kept(batches * rows));
        assert_eq!(dropped, Dropped { null: batches * rows - ids.len() as u64, ..Dropped::default() });
        assert_eq!(reports[0].rows, ids.len() as u64);
        assert_eq!(reports[0].batch_rows, batch_rows);
        assert!(reports[0].batches <= (batches * rows).div_ceil(batch_rows as u64));
    }
}

#[test]
fn a_scan_of_nothing_and_of_nothing_usable() {
    assert_eq!(encode(scan(0, 0), 256, vec![lane(Echo::default())]).unwrap().0, Vec::<u64>::new());
    let unusable = stream::iter((0..9).map(|_| Ok(scanned(3, 1))));
    let (ids, dropped, _) = encode(unusable, 2, vec![lane(Echo::default())]).unwrap();
    assert_eq!((ids.len(), dropped.null), (0, 9));
}

#[test]
fn several_devices_share_the_rows() {
    let lanes = (0..3).map(|_| lane(Echo::default())).collect();
    let (mut ids, _, reports) = encode(scan(60, 500), 256, lanes).unwrap();
    ids.sort_unstable();
    assert_eq!(ids, kept(30_000));
    assert_eq!(reports.iter().map(|r| r.rows).sum::<u64>(), ids.len() as u64);
}

#[test]
fn an_encoder_out_of_memory_gets_fewer_rows() {
    let encoder = Echo { most: Some(100), ..Echo::default() };
    let largest = encoder.largest.clone();
    let (ids, _, reports) = encode(scan(10, 1000), 1000, vec![lane(encoder)]).unwrap();
    assert_eq!(ids, kept(10_000));
    assert!((50..=100).contains(&largest.load(Ordering::Relaxed)), "{largest:?}");
    assert!(reports[0].notes.iter().any(|n| n.contains("ran out of device memory")), "{:?}", reports[0].notes);
    let error = encode(scan(10, 1000), 1000, vec![lane(Echo { most: Some(0), ..Echo::default() })]).unwrap_err();
    assert!(matches!(error, Error::DeviceMemory(_)), "{error:?}");
}

#[test]
fn slots_shrink_to_the_memory_that_is_there() {
    let row = DIMENSION * 4 + 4 + WIDTH;
    // 4 slots in a quarter of the memory.
    let device = HostDevice { capacity: 16 * row * 700 };
    let (ids, _, reports) = encode(scan(10, 1000), 4096, vec![(device, Box::new(Echo::default()))]).unwrap();
    assert_eq!((ids, reports[0].batch_rows), (kept(10_000), 700));
    let device = HostDevice { capacity: 1000 };
    let error = encode(scan(10, 1000), 4096, vec![(device, Box::new(Echo::default()))]).unwrap_err();
    assert!(matches!(error, Error::DeviceMemory(_)), "{error:?}");
}

#[test]
fn an_error_of_any_stage_ends_it() {
    let lost = encode(scan(100, 1000), 256, vec![lane(Echo { fail_at: Some(5), ..Echo::default() }), lane(Echo::default())]).unwrap_err();
    assert!(matches!(lost, Error::Device(_)), "{lost:?}");
    let broken = scan(20, 1000).chain(stream::iter([Err(Error::Storage("the disk is gone".into()))]));
    assert!(matches!(encode(broken, 256, vec![lane(Echo::default())]).unwrap_err(), Error::Storage(_)));
    let (_interrupt, interrupted) = watch::channel(false);
    let sink = |_: &RecordBatch| Err(Error::Storage("the disk is full".into()));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let work = run(scan(100, 1000), plan(256), vec![lane(Echo::default())], Box::new(sink), interrupted, Box::new(|_| {}));
    assert!(matches!(runtime.block_on(work).unwrap_err(), Error::Storage(_)));
}

#[test]
fn a_slow_writer_holds_the_scan_back_and_an_interrupt_ends_it() {
    let scanned_rows = Arc::new(AtomicUsize::new(0));
    let count = scanned_rows.clone();
    let endless = scan(u64::MAX / 1000, 100).inspect(move |batch| {
        count.fetch_add(batch.as_ref().unwrap().len(), Ordering::Relaxed);
    });
    let written = Arc::new(AtomicUsize::new(0));
    let (interrupt, interrupted) = watch::channel(false);
    let (rows, scanned) = (written.clone(), scanned_rows.clone());
    let sink = move |batch: &RecordBatch| {
        std::thread::sleep(Duration::from_millis(2));
        let rows = rows.fetch_add(batch.num_rows(), Ordering::Relaxed);
        // Four slots, batches that came back (one in hand, one waiting), what one slot's rows are collected from, the batches scanned
        // ahead and one more in hand.
        let most = 4 * 256 + 2 * 256 + 256 + (4 + 2) * 100;
        let ahead = scanned.load(Ordering::Relaxed).saturating_sub(rows * 7 / 6);
        assert!(ahead <= most + 256, "{ahead} rows were scanned ahead");
        if rows > 20_000 {
            interrupt.send_replace(true);
        }
        Ok(())
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let work = run(endless, plan(256), vec![lane(Echo::default())], Box::new(sink), interrupted, Box::new(|_| {}));
    assert!(matches!(runtime.block_on(work).unwrap_err(), Error::Interrupted(_)));
    assert!(written.load(Ordering::Relaxed) < 25_000);
}

#[test]
fn cosine_is_normalised_on_the_way_and_float64_narrowed() {
    let vectors = FixedSizeListArray::from_iter_primitive::<arrow_array::types::Float64Type, _, _>(
        [Some(vec![Some(3.0), Some(0.0), Some(4.0), Some(0.0)]), Some(vec![Some(0.0); 4]), Some(vec![Some(0.0), Some(2.0), None, None])],
        DIMENSION as i32,
    );
    let batch = ScannedRows { row_ids: UInt64Array::from_iter_values(0..3), vectors };
    let sizing = Sizing { rows: 3, dimension: DIMENSION, element: TensorElement::Float32, code_width: WIDTH };
    let device = Arc::new(HostDevice { capacity: 1 << 20 });
    let mut slot = slot::Slot::allocate(&device, sizing).unwrap();
    let dropped = slot.fill(&[batch], Metric::Cosine).unwrap();
    assert_eq!(dropped, Dropped { null: 1, non_finite: 0, zero_norm: 1 });
    slot.copy_in(&()).unwrap();
    let [vectors, ..] = slot.tensors(0, 1);
    // SAFETY: one row of four numbers.
    let row = unsafe { std::slice::from_raw_parts(vectors.address() as *const f32, DIMENSION) };
    assert_eq!(row, [0.6, 0.0, 0.8, 0.0]);
    let huge = FixedSizeListArray::from_iter_primitive::<arrow_array::types::Float64Type, _, _>([Some(vec![Some(1e300); 4])], 4);
    let batch = ScannedRows { row_ids: UInt64Array::from(vec![0]), vectors: huge };
    assert!(matches!(slot.fill(&[batch], Metric::L2).unwrap_err(), Error::InvalidInput(_)));
}
