//! The embedded CPU backend.

mod encoder;
mod kmeans;
mod nearest;
mod pruned;
mod search;
mod simd;
mod train;

pub use encoder::{CpuEncoder, as_float32};
pub use pruned::PRUNED_FROM;
pub use train::train;
