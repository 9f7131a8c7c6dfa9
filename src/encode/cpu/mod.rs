//! The embedded CPU backend.

mod encoder;
mod kmeans;
mod nearest;
mod pruned;
mod simd;
mod train;

pub use encoder::CpuEncoder;
pub use pruned::PRUNED_FROM;
pub use train::train;
