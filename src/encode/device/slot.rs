//! A slot: one batch's pinned input, its place on the device, and its results, travelling through the pipeline as one thing.
//! Whoever holds it owns all of it, so that stages need no locks.

use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, UInt8Array, UInt32Array, UInt64Array};
use half::f16;
use rayon::prelude::*;

use super::api::Device;
use super::tensor::{Tensor, TensorElement};
use crate::artifact::format::bucket_schema;
use crate::encode::prepare::{Dropped, VectorsMut, prepare_into};
use crate::error::{Error, Result};
use crate::lance::dataset::ScannedRows;
use crate::model::{Metric, fixed_size_list};

/// Vector bytes of a slot where memory allows: enough to hide what a batch costs besides its bytes.
const SLOT_BYTES: usize = 64 << 20;
/// cuVS encodes this many rows at once; larger batches gain nothing.
const MOST_ROWS: usize = 65_536;
/// Fewer rows than this leave a device idle.
const FEWEST_ROWS: usize = 256;
/// Share of the free device memory that slots may take; the encoder needs the rest.
const MEMORY_SHARE: usize = 4;
/// Rows that one thread prepares at a time.
const PIECE_ROWS: usize = 2048;

/// The shape of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizing {
    pub rows: usize,
    pub dimension: usize,
    pub element: TensorElement,
    pub code_width: usize,
}

impl Sizing {
    /// Rows for `slots` slots in `free` bytes of device memory, at most `wanted`.
    pub fn choose(
        dimension: usize,
        element: TensorElement,
        code_width: usize,
        slots: usize,
        free: usize,
        wanted: Option<usize>,
    ) -> Result<Self> {
        let one = Self { rows: 1, dimension, element, code_width };
        let fits = free / MEMORY_SHARE / slots.max(1) / one.device_bytes();
        let most = wanted.unwrap_or_else(|| (SLOT_BYTES / one.vector_bytes()).clamp(FEWEST_ROWS, MOST_ROWS));
        if fits < FEWEST_ROWS.min(most) {
            return Err(Error::DeviceMemory(format!(
                "{free} bytes are free on the device, and {slots} slots of {FEWEST_ROWS} vectors of dimension {dimension} need {}; \
                 stop what else uses the device",
                FEWEST_ROWS * one.device_bytes() * slots * MEMORY_SHARE
            )));
        }
        Ok(Self { rows: most.min(fits), ..one })
    }

    /// Half the rows, where that is still worth a try.
    pub fn halved(self) -> Option<Self> {
        (self.rows >= 2 * FEWEST_ROWS).then_some(Self { rows: self.rows / 2, ..self })
    }

    fn vector_bytes(self) -> usize {
        self.rows * self.dimension * self.element.byte_width()
    }

    /// Of one slot.
    pub fn device_bytes(self) -> usize {
        self.vector_bytes() + self.rows * (4 + self.code_width)
    }
}

pub struct Slot<D: Device> {
    device: Arc<D>,
    sizing: Sizing,
    input: D::Pinned,
    vectors: Arc<D::Memory>,
    part_ids: Arc<D::Memory>,
    codes: Arc<D::Memory>,
    part_ids_out: D::Pinned,
    codes_out: D::Pinned,
    copy_started: D::Event,
    copied: D::Event,
    pub encoded: D::Event,
    returned: D::Event,
    /// Work was put on a stream and not yet waited for.
    in_flight: bool,
    /// Kept rows of each piece: where it starts in the input, and its row ids.
    pieces: Vec<(usize, Vec<u64>)>,
}

impl<D: Device> Slot<D> {
    pub fn allocate(device: &Arc<D>, sizing: Sizing) -> Result<Self> {
        let rows = sizing.rows;
        Ok(Self {
            device: device.clone(),
            sizing,
            input: device.allocate_pinned(sizing.vector_bytes())?,
            vectors: Arc::new(device.allocate(sizing.vector_bytes())?),
            part_ids: Arc::new(device.allocate(rows * 4)?),
            codes: Arc::new(device.allocate(rows * sizing.code_width)?),
            part_ids_out: device.allocate_pinned(rows * 4)?,
            codes_out: device.allocate_pinned(rows * sizing.code_width)?,
            copy_started: device.event()?,
            copied: device.event()?,
            encoded: device.event()?,
            returned: device.event()?,
            in_flight: false,
            pieces: Vec::new(),
        })
    }

    pub fn capacity(&self) -> usize {
        self.sizing.rows
    }

    /// Rows kept.
    pub fn rows(&self) -> usize {
        self.pieces.iter().map(|(_, ids)| ids.len()).sum()
    }

    /// Filter, normalise and copy scanned rows into the pinned input, on all cores, each row read once. `scanned` has at
    /// most [`Self::capacity`] rows.
    pub fn fill(&mut self, scanned: &[ScannedRows], metric: Metric) -> Result<Dropped> {
        let Sizing { dimension, element, .. } = self.sizing;
        let row_bytes = dimension * element.byte_width();
        // Every piece has room for all its rows; what it drops is a gap, which the copy to the device closes.
        let mut rest = self.device.pinned_mut(&mut self.input);
        let mut work = Vec::new();
        let mut first = 0;
        for batch in scanned {
            for start in (0..batch.len()).step_by(PIECE_ROWS) {
                let piece = batch.slice(start, PIECE_ROWS.min(batch.len() - start));
                let rows = piece.len();
                let (place, after) = rest.split_at_mut_checked(rows * row_bytes).ok_or_else(|| Error::internal("a slot overflowed"))?;
                rest = after;
                work.push((first, piece, place));
                first += rows;
            }
        }
        let prepared = work
            .into_par_iter()
            .map(|(first, piece, place)| {
                let out = match element {
                    TensorElement::Float16 => VectorsMut::Float16(typed::<f16>(place)?),
                    _ => VectorsMut::Float32(typed::<f32>(place)?),
                };
                let (ids, dropped) = prepare_into(&piece.row_ids, &piece.vectors, metric, out)?;
                Ok(((first, ids), dropped))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut dropped = Dropped::default();
        self.pieces.clear();
        for (piece, of_piece) in prepared {
            dropped.add(of_piece);
            self.pieces.push(piece);
        }
        Ok(dropped)
    }

    /// Put the copies to the device on a stream: one for each run of rows without a gap.
    pub fn copy_in(&mut self, stream: &D::Stream) -> Result<()> {
        let row_bytes = self.sizing.dimension * self.sizing.element.byte_width();
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (first, ids) in self.pieces.iter().filter(|(_, ids)| !ids.is_empty()) {
            match runs.last_mut() {
                Some((start, rows)) if *start + *rows == *first => *rows += ids.len(),
                _ => runs.push((*first, ids.len())),
            }
        }
        self.in_flight = true;
        self.device.record(&self.copy_started, stream)?;
        let mut to = 0;
        let copied = runs.into_iter().try_for_each(|(first, rows)| {
            let at = to * row_bytes;
            to += rows;
            // SAFETY: the slot owns both memories and waits for the copies before it is reused or freed.
            unsafe { self.device.copy_in(stream, &self.input, first * row_bytes, &self.vectors, at, rows * row_bytes) }
        });
        // Also after an error, because other copies may be under way.
        self.device.record(&self.copied, stream)?;
        copied
    }

    /// Block until the input is there.
    pub fn finish_input(&self) -> Result<()> {
        self.device.finish(&self.copied)
    }

    /// Vectors, partition ids and codes of `rows` rows from `first` on.
    pub fn tensors(&self, first: usize, rows: usize) -> [Tensor<D::Memory>; 3] {
        let tensor = |memory: &Arc<D::Memory>, columns, element| {
            let all = self.sizing.rows;
            Tensor { memory: memory.clone(), offset: 0, rows: all, room: all, columns, element }.slice(first, rows)
        };
        [
            tensor(&self.vectors, Some(self.sizing.dimension), self.sizing.element),
            tensor(&self.part_ids, None, TensorElement::UInt32),
            tensor(&self.codes, Some(self.sizing.code_width), TensorElement::UInt8),
        ]
    }

    /// Copy the results back and wait for them. Returns the batch, and the seconds that the input's copy took.
    pub fn take_results(&mut self, stream: &D::Stream) -> Result<(RecordBatch, f64)> {
        let (rows, width) = (self.rows(), self.sizing.code_width);
        self.device.wait(stream, &self.encoded)?;
        // SAFETY: the slot owns all four memories and waits for the copies just below, or when it is dropped.
        let copied = unsafe {
            self.device
                .copy_out(stream, &self.part_ids, &self.part_ids_out, rows * 4)
                .and_then(|()| self.device.copy_out(stream, &self.codes, &self.codes_out, rows * width))
        };
        // Also after an error, because one copy may be under way.
        self.device.record(&self.returned, stream)?;
        copied?;
        self.device.finish(&self.returned)?;
        self.in_flight = false;
        let seconds = self.device.seconds_between(&self.copy_started, &self.copied).unwrap_or(0.0);
        let part_ids = self.device.pinned(&self.part_ids_out)[..rows * 4].chunks_exact(4);
        let part_ids: Vec<u32> = part_ids.map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect();
        let codes = self.device.pinned(&self.codes_out)[..rows * width].to_vec();
        let mut row_ids = Vec::with_capacity(rows);
        for (_, ids) in self.pieces.drain(..) {
            row_ids.extend(ids);
        }
        let codes = fixed_size_list(Arc::new(UInt8Array::from(codes)), width)?;
        let columns: Vec<ArrayRef> = vec![Arc::new(UInt64Array::from(row_ids)), Arc::new(UInt32Array::from(part_ids)), Arc::new(codes)];
        Ok((RecordBatch::try_new(bucket_schema(width), columns)?, seconds))
    }
}

impl<D: Device> Drop for Slot<D> {
    /// Copies and kernels that are still under way end before their memory is freed. Each event that was never recorded is
    /// finished at once; of a lost device all are.
    fn drop(&mut self) {
        if self.in_flight && self.device.make_current().is_ok() {
            for event in [&self.copied, &self.encoded, &self.returned] {
                let _ = self.device.finish(event);
            }
        }
    }
}

/// Bytes as numbers; page-locked and vector memory is aligned to more than any of them.
fn typed<T: Number>(bytes: &mut [u8]) -> Result<&mut [T]> {
    // SAFETY: every bit pattern is a number, and the bytes are borrowed exclusively.
    let (before, numbers, after) = unsafe { bytes.align_to_mut::<T>() };
    if before.is_empty() && after.is_empty() { Ok(numbers) } else { Err(Error::internal("a slot is not aligned")) }
}

/// Types for which every bit pattern is a value.
trait Number: Copy {}
impl Number for f16 {}
impl Number for f32 {}
