//! The embedded CPU backend.

mod center;
mod distinct;
mod encoder;
mod grouped;
mod kmeans;
mod nearest;
mod partitions;
mod pruned;
mod search;
mod simd;
mod smallest;
mod sub_vectors;
mod train;

pub use encoder::{CpuEncoder, as_float32};
pub use kmeans::Means;
pub use search::table_bytes;
pub use train::{Refinement, train, train_centroids};
