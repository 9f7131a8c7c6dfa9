//! The embedded CPU backend.

mod encoder;
mod kmeans;
mod nearest;
mod simd;
mod train;

pub use encoder::CpuEncoder;
pub use train::train;
