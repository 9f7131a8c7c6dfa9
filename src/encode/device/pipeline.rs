//! The stages of a device and how slots go round: fill (scan, filter, copy into pinned memory, copy to the device), encode,
//! give back (copy the codes back), append (hand them to the writer, in order). Each stage works at the same time as the others; a stage that
//! is ahead waits, for a free slot or a place, which bounds memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use arrow_array::RecordBatch;
use futures::{Stream, StreamExt};
use tokio::sync::{Mutex, mpsc, oneshot, watch};

use super::api::{Device, DeviceEncoder};
use super::slot::{Sizing, Slot};
use super::tensor::TensorElement;
use crate::artifact::{PartitionArtifactBuilder, RowCounts};
use crate::encode::prepare::Dropped;
use crate::encode::source::VectorSource;
use crate::error::{Error, Result};
use crate::lance::dataset::ScannedRows;
use crate::model::Metric;
use crate::sync::spawn;

/// Slots of a device: one in each stage, and one waiting so that none starves.
const SLOTS: usize = 4;
/// Batches that came back waiting for the writer.
const RETURNED_AHEAD: usize = 1;
/// Scanned batches waiting to be filled into slots.
const SCANNED_AHEAD: usize = 4;

/// What is to be encoded, and how.
#[derive(Debug, Clone)]
pub struct DeviceEncoding {
    pub metric: Metric,
    pub dimension: usize,
    /// What the encoder computes in.
    pub element: TensorElement,
    pub code_width: usize,
    /// Rows of a slot; `None`: chosen from the free device memory.
    pub batch_rows: Option<usize>,
    /// Bytes of a device that may be taken, of which slots are a share.
    pub memory: usize,
}

/// What one device did, and what each stage took.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct DeviceReport {
    pub device: String,
    pub batch_rows: usize,
    pub batches: u64,
    pub rows: u64,
    /// Waiting for scanned rows.
    pub scan_wait_seconds: f64,
    /// Filtering, normalising and copying into pinned memory.
    pub fill_seconds: f64,
    /// On the device's copy queue.
    pub copy_seconds: f64,
    /// In the encoder.
    pub encode_seconds: f64,
    /// Waiting for the writer.
    pub write_seconds: f64,
    /// What did not go as planned, such as smaller batches.
    pub notes: Vec<String>,
}

/// Where encoded batches go.
type Sink = dyn Fn(&RecordBatch) -> Result<()> + Send + Sync;

/// What the lanes of several devices share.
struct Shared {
    plan: DeviceEncoding,
    scanned: Mutex<mpsc::Receiver<Result<ScannedRows>>>,
    /// Set by the caller.
    interrupted: watch::Receiver<bool>,
    /// Set by a lane that failed, for the others.
    failed: watch::Sender<bool>,
    sink: Box<Sink>,
    dropped: std::sync::Mutex<Dropped>,
    rows_done: AtomicU64,
    progress: Box<dyn Fn(u64) + Send + Sync>,
}

impl Shared {
    fn interrupted(&self) -> bool {
        *self.interrupted.borrow()
    }

    fn stopped(&self) -> bool {
        self.interrupted() || *self.failed.borrow()
    }

    /// The next scanned rows; `None` at the end, or where the lanes are to stop.
    async fn next(&self) -> Result<Option<ScannedRows>> {
        let (mut interrupted, mut failed) = (self.interrupted.clone(), self.failed.subscribe());
        let next = async { self.scanned.lock().await.recv().await.transpose() };
        tokio::select! {
            biased;
            _ = interrupted.wait_for(|set| *set) => Err(Error::Interrupted("interrupted".into())),
            _ = failed.wait_for(|set| *set) => Ok(None),
            next = next => next,
        }
    }

    fn done(&self, rows: u64) {
        (self.progress)(self.rows_done.fetch_add(rows, Ordering::Relaxed) + rows);
    }
}

/// Encode every row of `source` into `builder` on one or more devices, which share the scan. The caller finishes or aborts
/// the builder. Ends soon after `interrupted` is set, with nothing left running.
pub async fn encode_on_devices<D: Device>(
    source: &VectorSource,
    plan: DeviceEncoding,
    devices: Vec<(D, Box<dyn DeviceEncoder<D>>)>,
    builder: Arc<PartitionArtifactBuilder>,
    interrupted: watch::Receiver<bool>,
    progress: impl Fn(u64) + Send + Sync + 'static,
) -> Result<(RowCounts, Vec<DeviceReport>)> {
    let expected = source.count_rows().await?;
    let scan = source.scan_unfiltered().await?;
    let written = builder.clone();
    let (dropped, reports) =
        run(scan, plan, devices, Box::new(move |batch| builder.append_batch(batch)), interrupted, Box::new(progress)).await?;
    let written = written.num_rows();
    let seen = written + dropped.total();
    if seen != expected {
        return Err(Error::internal(format!("the scan gave {seen} rows, the dataset has {expected} in these fragments")));
    }
    Ok((RowCounts { seen, written, dropped: dropped.by_reason() }, reports))
}

pub(super) async fn run<D: Device>(
    scan: impl Stream<Item = Result<ScannedRows>> + Send + 'static,
    plan: DeviceEncoding,
    devices: Vec<(D, Box<dyn DeviceEncoder<D>>)>,
    sink: Box<Sink>,
    interrupted: watch::Receiver<bool>,
    progress: Box<dyn Fn(u64) + Send + Sync>,
) -> Result<(Dropped, Vec<DeviceReport>)> {
    let (sender, receiver) = mpsc::channel(SCANNED_AHEAD);
    // Its own task, so that the scan goes on while slots are filled.
    let reader = tokio::spawn(async move {
        let mut scan = std::pin::pin!(scan);
        while let Some(next) = scan.next().await {
            let failed = next.is_err();
            if sender.send(next).await.is_err() || failed {
                return;
            }
        }
    });
    let shared = Arc::new(Shared {
        plan,
        scanned: Mutex::new(receiver),
        interrupted,
        failed: watch::Sender::new(false),
        sink,
        dropped: std::sync::Mutex::default(),
        rows_done: AtomicU64::new(0),
        progress,
    });
    let lanes = devices.into_iter().map(|(device, encoder)| {
        let shared = shared.clone();
        async move {
            let result = lane(Arc::new(device), encoder, &shared).await;
            if result.is_err() {
                shared.failed.send_replace(true);
            }
            result
        }
    });
    let results = futures::future::join_all(lanes).await;
    reader.abort();
    // A panic of the scan would otherwise look like its end.
    if let Err(error) = reader.await
        && error.is_panic()
    {
        return Err(error.into());
    }
    let reports = results.into_iter().collect::<Result<Vec<_>>>()?;
    let dropped = *shared.dropped.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok((dropped, reports))
}

/// One device: its three stages, side by side.
async fn lane<D: Device>(device: Arc<D>, encoder: Box<dyn DeviceEncoder<D>>, shared: &Arc<Shared>) -> Result<DeviceReport> {
    let (free, free_slots) = mpsc::channel(SLOTS);
    let (filled, filled_slots) = mpsc::channel(SLOTS);
    let (encoded, encoded_slots) = mpsc::channel(SLOTS);
    let (ready, opened) = oneshot::channel();
    let encode = {
        let (device, shared) = (device.clone(), shared.clone());
        spawn(move || encode_stage(&device, encoder, &shared, ready, filled_slots, encoded))
    };
    if opened.await.is_err() {
        // It ended before it was ready: with the reason.
        return Err(encode.await.err().unwrap_or_else(|| Error::internal("an encoder ended before it began")));
    }
    // After the encoder has taken what it needs of the device's memory.
    let prepared = {
        let (device, plan) = (device.clone(), shared.plan.clone());
        spawn(move || allocate_slots(&device, &plan)).await
    };
    let (slots, stream, mut report) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            drop(filled);
            let _ = encode.await;
            return Err(error);
        }
    };
    for slot in slots {
        let _ = free.try_send(slot);
    }
    let (returned, returned_batches) = mpsc::channel(RETURNED_AHEAD);
    let give_back = {
        let (device, shared) = (device.clone(), shared.clone());
        spawn(move || give_back_stage(&device, &shared, encoded_slots, free, returned))
    };
    let append = {
        let shared = shared.clone();
        spawn(move || append_stage(&shared, returned_batches))
    };
    let fill = fill_stage(&device, stream, shared, free_slots, filled).await;
    // Both end: their senders are gone. The reason for an early end is with whichever stage has an error.
    let encode = encode.await;
    let given_back = give_back.await;
    let appended = append.await;
    let (encode_seconds, notes) = encode?;
    let copy_seconds = given_back?;
    let (batches, rows, write_seconds) = appended?;
    let (scan_wait_seconds, fill_seconds) = fill?;
    if shared.interrupted() {
        return Err(Error::Interrupted("interrupted".into()));
    }
    report.notes.extend(notes);
    Ok(DeviceReport { batches, rows, scan_wait_seconds, fill_seconds, copy_seconds, encode_seconds, write_seconds, ..report })
}

type Prepared<D> = (Vec<Slot<D>>, <D as Device>::Stream, DeviceReport);

/// Slots as large as memory allows; smaller ones where an allocation fails all the same.
fn allocate_slots<D: Device>(device: &Arc<D>, plan: &DeviceEncoding) -> Result<Prepared<D>> {
    device.make_current()?;
    let free = device.free_bytes()?.min(plan.memory);
    let mut sizing = Sizing::choose(plan.dimension, plan.element, plan.code_width, SLOTS, free, plan.batch_rows)?;
    let mut notes = Vec::new();
    loop {
        match (0..SLOTS).map(|_| Slot::allocate(device, sizing)).collect::<Result<Vec<_>>>() {
            Ok(slots) => {
                let report = DeviceReport { device: device.name(), batch_rows: sizing.rows, notes, ..DeviceReport::default() };
                return Ok((slots, device.stream()?, report));
            }
            Err(Error::DeviceMemory(message)) => {
                let Some(smaller) = sizing.halved() else { return Err(Error::DeviceMemory(message)) };
                notes.push(format!("batches of {} rows instead of {}: {message}", smaller.rows, sizing.rows));
                sizing = smaller;
            }
            Err(other) => return Err(other),
        }
    }
}

async fn fill_stage<D: Device>(
    device: &Arc<D>,
    stream: D::Stream,
    shared: &Arc<Shared>,
    mut free: mpsc::Receiver<Slot<D>>,
    filled: mpsc::Sender<Slot<D>>,
) -> Result<(f64, f64)> {
    let stream = Arc::new(stream);
    let (mut waited, mut filling) = (0.0, 0.0);
    let mut left: Option<ScannedRows> = None;
    let mut ended = false;
    while !ended {
        // `None`: a later stage ended, and has the reason.
        let Some(mut slot) = free.recv().await else { break };
        let mut batches = Vec::new();
        let mut room = slot.capacity();
        while room > 0 {
            let start = Instant::now();
            let next = match left.take() {
                Some(rest) => Some(rest),
                None => shared.next().await?,
            };
            waited += start.elapsed().as_secs_f64();
            let Some(next) = next else {
                ended = true;
                break;
            };
            let rows = next.len().min(room);
            if rows < next.len() {
                left = Some(next.slice(rows, next.len() - rows));
            }
            batches.push(next.slice(0, rows));
            room -= rows;
        }
        let start = Instant::now();
        let (device, stream, metric) = (device.clone(), stream.clone(), shared.plan.metric);
        let (slot, dropped) = tokio::task::spawn_blocking(move || {
            let dropped = slot.fill(&batches, metric)?;
            if slot.rows() > 0 {
                device.make_current()?;
                slot.copy_in(&stream)?;
            }
            Ok::<_, Error>((slot, dropped))
        })
        .await??;
        filling += start.elapsed().as_secs_f64();
        shared.dropped.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(dropped);
        shared.done(dropped.total());
        // An empty slot goes on too, so that it comes round.
        if filled.send(slot).await.is_err() {
            break;
        }
    }
    Ok((waited, filling))
}

/// On one thread, which the encoder can count on. Returns the seconds in the encoder, and notes.
fn encode_stage<D: Device>(
    device: &Arc<D>,
    mut encoder: Box<dyn DeviceEncoder<D>>,
    shared: &Shared,
    ready: oneshot::Sender<()>,
    mut filled: mpsc::Receiver<Slot<D>>,
    encoded: mpsc::Sender<Slot<D>>,
) -> Result<(f64, Vec<String>)> {
    device.make_current()?;
    let (stream, drained) = (device.stream()?, device.event()?);
    let work = || -> Result<(f64, Vec<String>)> {
        encoder.open(device, &stream)?;
        let _ = ready.send(());
        let mut splitting = Splitting { most: usize::MAX, notes: Vec::new() };
        let mut seconds = 0.0;
        while let Some(slot) = filled.blocking_recv() {
            if shared.stopped() {
                break;
            }
            // On this thread, not on the stream: an encoder may hold what others need (Python's lock) while it waits.
            slot.finish_input()?;
            let start = Instant::now();
            let result = splitting.encode(encoder.as_mut(), &slot);
            // Also after an error, because part of the batch may be on its way.
            device.record(&slot.encoded, &stream)?;
            seconds += start.elapsed().as_secs_f64();
            result?;
            if encoded.blocking_send(slot).is_err() {
                break;
            }
        }
        Ok((seconds, splitting.notes))
    };
    let result = work();
    encoder.close();
    // Nothing is under way when the stream, and what the encoder made, goes.
    let drain = device.record(&drained, &stream).and_then(|()| device.finish(&drained));
    let result = result?;
    drain?;
    Ok(result)
}

/// How many rows the encoder gets at once: fewer after it ran out of device memory.
struct Splitting {
    most: usize,
    notes: Vec<String>,
}

impl Splitting {
    fn encode<D: Device>(&mut self, encoder: &mut dyn DeviceEncoder<D>, slot: &Slot<D>) -> Result<()> {
        let rows = slot.rows();
        let mut first = 0;
        while first < rows {
            let now = self.most.min(rows - first);
            let [vectors, part_ids, codes] = slot.tensors(first, now);
            match encoder.encode(vectors, part_ids, codes) {
                Ok(()) => first += now,
                Err(Error::DeviceMemory(message)) if now > 1 => {
                    self.most = now.div_ceil(2);
                    self.notes.push(format!("the encoder ran out of device memory with {now} rows, goes on with {}: {message}", self.most));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Returns the seconds of copies to the device.
fn give_back_stage<D: Device>(
    device: &Arc<D>,
    shared: &Shared,
    mut encoded: mpsc::Receiver<Slot<D>>,
    free: mpsc::Sender<Slot<D>>,
    returned: mpsc::Sender<RecordBatch>,
) -> Result<f64> {
    device.make_current()?;
    let stream = device.stream()?;
    let mut copying = 0.0;
    while let Some(mut slot) = encoded.blocking_recv() {
        if shared.stopped() {
            break;
        }
        if slot.rows() == 0 {
            let _ = free.blocking_send(slot);
            continue;
        }
        let (batch, copied) = slot.take_results(&stream)?;
        // The slot goes round while the batch is written; nobody takes it any more where the scan is over.
        let _ = free.blocking_send(slot);
        copying += copied;
        // The writer ended: it has the reason.
        if returned.blocking_send(batch).is_err() {
            break;
        }
    }
    Ok(copying)
}

/// Returns batches, rows and seconds of waiting for the writer.
fn append_stage(shared: &Shared, mut returned: mpsc::Receiver<RecordBatch>) -> Result<(u64, u64, f64)> {
    let (mut batches, mut rows, mut writing) = (0, 0, 0.0);
    while let Some(batch) = returned.blocking_recv() {
        if shared.stopped() {
            break;
        }
        batches += 1;
        rows += batch.num_rows() as u64;
        let start = Instant::now();
        (shared.sink)(&batch)?;
        writing += start.elapsed().as_secs_f64();
        shared.done(batch.num_rows() as u64);
    }
    Ok((batches, rows, writing))
}
