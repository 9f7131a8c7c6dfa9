//! Encoding on a device: vectors are filtered into pinned host slots, copied to the device, encoded there by the backend, and
//! their codes copied back, with several slots in flight. The pipeline knows a device by a trait; CUDA is one, host memory
//! another, so that its logic runs, and is tested, where there is no GPU.

mod cuda;
mod host;
mod pipeline;
mod slot;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::model::ElementType;

pub use cuda::{Cuda, CudaDevice, CurrentContext, cuda_devices, measure_copy, synchronize};
pub use host::HostDevice;
pub use pipeline::{DeviceEncoding, DeviceReport, encode_on_devices};
pub use slot::Sizing;

/// Memory and queues of a device. Every call that can fail says so; what a call returns releases itself when dropped.
pub trait Device: Send + Sync + 'static {
    /// Host memory that the device can copy from and to while the host goes on.
    type Pinned: Send + Sync + 'static;
    /// Memory on the device.
    type Memory: DeviceMemory;
    /// A queue of work: what is put on it runs in order, and beside other queues.
    type Stream: Send + Sync + 'static;
    /// A point in a queue that others can wait for.
    type Event: Send + Sync + 'static;

    /// For messages and reports.
    fn name(&self) -> String;

    /// Make the device the calling thread's own. Every thread calls it before anything else.
    fn make_current(&self) -> Result<()>;

    /// Bytes that can be allocated now.
    fn free_bytes(&self) -> Result<usize>;

    fn allocate_pinned(&self, bytes: usize) -> Result<Self::Pinned>;
    fn pinned<'a>(&self, memory: &'a Self::Pinned) -> &'a [u8];
    fn pinned_mut<'a>(&self, memory: &'a mut Self::Pinned) -> &'a mut [u8];

    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;
    fn stream(&self) -> Result<Self::Stream>;
    fn event(&self) -> Result<Self::Event>;

    /// Put a copy of `bytes` bytes at `from` of pinned memory to `to` of device memory on a stream.
    ///
    /// # Safety
    /// Until the copy is done (an event recorded after it is finished) both memories live and nobody writes to the source or
    /// uses the target. The ranges lie within the memories.
    unsafe fn copy_in(
        &self,
        stream: &Self::Stream,
        source: &Self::Pinned,
        from: usize,
        target: &Self::Memory,
        to: usize,
        bytes: usize,
    ) -> Result<()>;

    /// Put a copy of the first `bytes` bytes of device memory to pinned memory on a stream.
    ///
    /// # Safety
    /// As for [`Device::copy_in`].
    unsafe fn copy_out(&self, stream: &Self::Stream, source: &Self::Memory, target: &Self::Pinned, bytes: usize) -> Result<()>;

    fn record(&self, event: &Self::Event, stream: &Self::Stream) -> Result<()>;

    /// What is put on `stream` from now on runs after `event`.
    fn wait(&self, stream: &Self::Stream, event: &Self::Event) -> Result<()>;

    /// Block until `event`.
    fn finish(&self, event: &Self::Event) -> Result<()>;

    /// Seconds on the device between two finished events; `None` where they are not timed.
    fn seconds_between(&self, start: &Self::Event, end: &Self::Event) -> Option<f64>;
}

/// Memory on a device, as an address for those who compute there.
pub trait DeviceMemory: Send + Sync + 'static {
    fn address(&self) -> usize;
}

/// The element type of a tensor on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorElement {
    Float16,
    Float32,
    UInt8,
    UInt32,
}

impl TensorElement {
    pub fn byte_width(self) -> usize {
        match self {
            Self::Float16 => 2,
            Self::Float32 | Self::UInt32 => 4,
            Self::UInt8 => 1,
        }
    }

    /// What vectors are computed in: their own type or, for float64 columns, float32.
    pub fn of_vectors(name: &str, column: ElementType) -> Result<Self> {
        match (name, column) {
            ("float16", ElementType::Float16) => Ok(Self::Float16),
            ("float32", _) => Ok(Self::Float32),
            _ => Err(Error::invalid(format!(
                "the encoder takes {name}, the column is {column}; expected float32, or float16 for a float16 column"
            ))),
        }
    }
}

/// Contiguous rows in device memory, which stays allocated as long as the tensor is there.
#[derive(Debug)]
pub struct Tensor<M> {
    pub memory: Arc<M>,
    /// Bytes into the memory.
    pub offset: usize,
    pub rows: usize,
    /// `None`: a vector of `rows`.
    pub columns: Option<usize>,
    pub element: TensorElement,
}

impl<M> Clone for Tensor<M> {
    fn clone(&self) -> Self {
        Self { memory: self.memory.clone(), ..*self }
    }
}

impl<M: DeviceMemory> Tensor<M> {
    pub fn address(&self) -> usize {
        self.memory.address() + self.offset
    }

    /// `rows` rows from `first` on.
    fn slice(&self, first: usize, rows: usize) -> Self {
        let row_bytes = self.columns.unwrap_or(1) * self.element.byte_width();
        Self { offset: self.offset + first * row_bytes, rows, ..self.clone() }
    }
}

/// A backend's encoder for one device. All calls come from one thread, with the device current.
pub trait DeviceEncoder<D: Device>: Send {
    /// Get ready to compute on `stream`.
    fn open(&mut self, device: &D, stream: &D::Stream) -> Result<()>;

    /// Put on the stream, or finish: `vectors (n, dimension)` to `part_ids (n,)` and `codes (n, code_width)`. The vectors are
    /// there already.
    fn encode(&mut self, vectors: Tensor<D::Memory>, part_ids: Tensor<D::Memory>, codes: Tensor<D::Memory>) -> Result<()>;

    /// Release what `open` made. Called also after errors.
    fn close(&mut self);
}
