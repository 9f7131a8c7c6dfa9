//! What a device is to the pipeline, and a backend's encoder on one.

use super::tensor::{DeviceMemory, Tensor};
use crate::error::Result;

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

    /// Make the device the calling thread's own. Every thread calls it before anything else. Where this fails the device is lost.
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

    /// Where this fails the device is lost, and nobody waits for its work any more.
    fn record(&self, event: &Self::Event, stream: &Self::Stream) -> Result<()>;

    /// What is put on `stream` from now on runs after `event`.
    fn wait(&self, stream: &Self::Stream, event: &Self::Event) -> Result<()>;

    /// Block until `event`. Where this fails the device is lost.
    fn finish(&self, event: &Self::Event) -> Result<()>;

    /// Seconds on the device between two finished events; `None` where they are not timed.
    fn seconds_between(&self, start: &Self::Event, end: &Self::Event) -> Option<f64>;
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
