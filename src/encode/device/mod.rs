//! Encoding on a device: vectors are filtered into pinned host slots, copied to the device, encoded there by the backend, and
//! their codes copied back, with several slots in flight. The pipeline knows a device by a trait; CUDA is one, host memory
//! another, so that its logic runs, and is tested, where there is no GPU.

mod api;
mod cuda;
mod host;
mod numa;
mod pipeline;
mod slot;
#[cfg(test)]
mod stress;
mod tensor;
#[cfg(test)]
mod tests;

pub use api::{Device, DeviceEncoder};
pub use cuda::{Cuda, CudaDevice, CurrentContext, cuda_devices, measure_copy, synchronize};
pub use host::HostDevice;
pub use pipeline::{DeviceEncoding, DeviceReport, encode_on_devices};
pub use slot::Sizing;
pub use tensor::{DeviceMemory, Tensor, TensorElement};
